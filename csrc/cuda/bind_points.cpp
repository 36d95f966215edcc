#include <algorithm>
#include <vector>

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace densityrl::cuda {

void bind_points(py::module_& m) {
  m.attr("MAX_POINT_PLANES") = kMaxPlanes;
  m.attr("MAX_WIDTH") = kMaxWidth;
  m.attr("MAX_UNITS") = kMaxUnits;
  m.attr("MAX_REST") = kMaxRest;
  py::class_<PointPlane>(m, "PointPlane", py::module_local())
      .def(py::init([](Address data, int64_t batch_stride, int height, int width, int axis_across,
                       int axis_down, float rate_across, float rate_down) {
             return PointPlane{at<const void>(data), batch_stride, height,      width,
                               axis_across,          axis_down,    rate_across, rate_down};
           }),
           py::kw_only(), py::arg("data"), py::arg("batch_stride"), py::arg("height"),
           py::arg("width"), py::arg("axis_across"), py::arg("axis_down"), py::arg("rate_across"),
           py::arg("rate_down"));
  py::class_<PointField>(m, "PointField", py::module_local())
      .def(py::init([](int batch, int channels, const std::vector<PointPlane>& planes,
                       const std::string& number, const std::string& combine, bool border,
                       bool align_corners, int64_t count, Address points, int64_t points_stride) {
             if (planes.size() > kMaxPlanes)
               throw std::invalid_argument("more than " + std::to_string(kMaxPlanes) + " planes");
             PointField field{};
             field.batch = batch;
             field.channels = channels;
             field.plane_count = static_cast<int>(planes.size());
             std::copy(planes.begin(), planes.end(), field.planes);
             field.number = choose<Number>(number, {"float32", "bfloat16", "float16"});
             field.combine = choose<Combine>(combine, {"sum", "concat", "product"});
             field.border = border;
             field.align_corners = align_corners;
             field.count = count;
             field.points = at<const float>(points);
             field.points_stride = points_stride;
             return field;
           }),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("planes"),
           py::arg("number"), py::arg("combine"), py::arg("border"), py::arg("align_corners"),
           py::arg("count"), py::arg("points"), py::arg("points_stride"));
  py::class_<Decoder>(m, "Decoder", py::module_local())
      .def(py::init([](int width, int units, int rest, Address w1, Address b1, Address w2,
                       Address b2, const std::string& hidden, const std::string& output) {
             return Decoder{width,
                            units,
                            rest,
                            at<const float>(w1),
                            at<const float>(b1),
                            at<const float>(w2),
                            at<const float>(b2),
                            choose<Hidden>(hidden, {"softplus", "relu", "silu"}),
                            choose<Output>(output, {"identity", "softplus", "exp"})};
           }),
           py::kw_only(), py::arg("width"), py::arg("units"), py::arg("rest"), py::arg("w1"),
           py::arg("b1"), py::arg("w2"), py::arg("b2"), py::arg("hidden"), py::arg("output"));
  m.def(
      "sample_features",
      [](const PointField& field, Address features, int device, Address stream) {
        enqueue("sample_features", device, stream,
                [&](cudaStream_t s) { return sample_features(field, at<float>(features), s); });
      },
      py::kw_only(), py::arg("field"), py::arg("features"), py::arg("device"), py::arg("stream"));
  m.def(
      "sample_features_backward",
      [](const PointField& field, Address d_features, const std::vector<Address>& d_planes,
         Address d_points, int device, Address stream) {
        float* planes[kMaxPlanes] = {};
        if (!d_planes.empty() && d_planes.size() != static_cast<size_t>(field.plane_count))
          throw std::invalid_argument("there is not one gradient for each plane");
        std::transform(d_planes.begin(), d_planes.end(), planes, at<float>);
        enqueue("sample_features backward", device, stream, [&](cudaStream_t s) {
          return sample_features_backward(field, at<const float>(d_features), planes,
                                          at<float>(d_points), s);
        });
      },
      py::kw_only(), py::arg("field"), py::arg("d_features"), py::arg("d_planes"),
      py::arg("d_points"), py::arg("device"), py::arg("stream"));
  m.def(
      "radiance",
      [](const PointField& field, const Decoder& decoder, Address sigma, Address rest, int device,
         Address stream) {
        enqueue("radiance", device, stream, [&](cudaStream_t s) {
          return radiance(field, decoder, at<float>(sigma), at<float>(rest), s);
        });
      },
      py::kw_only(), py::arg("field"), py::arg("decoder"), py::arg("sigma"), py::arg("rest"),
      py::arg("device"), py::arg("stream"));
  m.def("radiance_partials", &radiance_partials, py::arg("field"));
  m.def(
      "radiance_backward",
      [](const PointField& field, const Decoder& decoder, Address d_sigma, Address d_rest,
         Address sigma, Address d_features, int blocks, Address partials, int device,
         Address stream) {
        enqueue("radiance backward", device, stream, [&](cudaStream_t s) {
          return radiance_backward(field, decoder, at<const float>(d_sigma),
                                   at<const float>(d_rest), at<const float>(sigma),
                                   at<float>(d_features), blocks, at<float>(partials), s);
        });
      },
      py::kw_only(), py::arg("field"), py::arg("decoder"), py::arg("d_sigma"), py::arg("d_rest"),
      py::arg("sigma"), py::arg("d_features"), py::arg("blocks"), py::arg("partials"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace densityrl::cuda
