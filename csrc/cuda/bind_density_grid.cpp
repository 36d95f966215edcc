#include <array>

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace densityrl::cuda {

namespace {

// Address, strides over samples, slices, rows and columns.
using VolumeNumbers = std::array<int64_t, 5>;
// Address; slices, rows and columns; strides over samples, slices and rows.
using GradientNumbers = std::array<int64_t, 7>;

Volume volume(const VolumeNumbers& of) {
  return {at<float>(static_cast<Address>(of[0])), of[1], of[2], of[3], of[4]};
}

Gradient gradient(const GradientNumbers& of) {
  return {at<float>(static_cast<Address>(of[0])),
          static_cast<int>(of[1]),
          static_cast<int>(of[2]),
          static_cast<int>(of[3]),
          of[4],
          of[5],
          of[6]};
}

Output output(const std::string& name) {
  return choose<Output>(name, {"identity", "softplus", "exp"});
}

}  // namespace

void bind_density_grid(py::module_& m) {
  py::class_<GridField>(m, "GridField")
      .def(py::init([](int units, std::array<int, 3> shape, std::array<int, 2> pitches,
                       std::array<int64_t, 2> batch_strides, std::array<Address, 3> tables,
                       Address plain, int64_t plain_batch, Address w2, Address b2,
                       const std::string& hidden, const std::string& output_name) {
             GridField field;
             field.units = units;
             field.slices = shape[0];
             field.rows = shape[1];
             field.columns = shape[2];
             field.rows_pitch = pitches[0];
             field.columns_pitch = pitches[1];
             field.rows_batch = batch_strides[0];
             field.columns_batch = batch_strides[1];
             field.rows_table = at<const float>(tables[0]);
             field.columns_table = at<const float>(tables[1]);
             field.third_table = at<const float>(tables[2]);
             field.plain = at<const int32_t>(plain);
             field.plain_batch = plain_batch;
             field.w2 = at<const float>(w2);
             field.b2 = at<const float>(b2);
             field.hidden = choose<Hidden>(hidden, {"softplus", "relu", "silu"});
             field.output = output(output_name);
             return field;
           }),
           py::kw_only(), py::arg("units"), py::arg("shape"), py::arg("pitches"),
           py::arg("batch_strides"), py::arg("tables"), py::arg("plain"), py::arg("plain_batch"),
           py::arg("w2"), py::arg("b2"), py::arg("hidden"), py::arg("output"));
  m.attr("GRADIENT_PADDING") = kGradientPadding;
  m.def(
      "choose_forms",
      [](const GridField& field, int batch, float largest, std::array<Address, 3> tables,
         Address plain, Address statistics, int device, Address stream) {
        enqueue("density_grid: choice of form", device, stream, [&](cudaStream_t s) {
          return choose_forms(field, batch, largest, at<float>(tables[0]), at<float>(tables[1]),
                              at<float>(tables[2]), at<int32_t>(plain), at<float>(statistics), s);
        });
      },
      py::kw_only(), py::arg("field"), py::arg("batch"), py::arg("largest"), py::arg("tables"),
      py::arg("plain"), py::arg("statistics"), py::arg("device"), py::arg("stream"));
  m.def(
      "density_grid",
      [](const GridField& field, int batch, const VolumeNumbers& sigma, int device,
         Address stream) {
        enqueue("density_grid", device, stream,
                [&](cudaStream_t s) { return density_grid(field, batch, volume(sigma), s); });
      },
      py::kw_only(), py::arg("field"), py::arg("batch"), py::arg("sigma"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "is_gradient",
      [](const VolumeNumbers& d_sigma, std::array<int, 3> shape, bool third) {
        return is_gradient(volume(d_sigma), shape[0], shape[1], shape[2], third);
      },
      py::kw_only(), py::arg("d_sigma"), py::arg("shape"), py::arg("third"));
  m.def(
      "raw_gradient",
      [](const VolumeNumbers& d_sigma, const VolumeNumbers& sigma, int batch,
         std::array<int, 3> shape, const std::string& output_name, const GradientNumbers& raw,
         int device, Address stream) {
        enqueue("density_grid: raw gradient", device, stream, [&](cudaStream_t s) {
          return raw_gradient(volume(d_sigma), volume(sigma), batch, shape[0], shape[1], shape[2],
                              output(output_name), gradient(raw), s);
        });
      },
      py::kw_only(), py::arg("d_sigma"), py::arg("sigma"), py::arg("batch"), py::arg("shape"),
      py::arg("output"), py::arg("raw"), py::arg("device"), py::arg("stream"));
  m.def(
      "density_grid_backward",
      [](const GridField& field, int batch, const GradientNumbers& raw, Address d_rows,
         Address d_columns, Address d_third, Address d_w2, int device, Address stream) {
        enqueue("density_grid backward", device, stream, [&](cudaStream_t s) {
          return density_grid_backward(field, batch, gradient(raw), at<float>(d_rows),
                                       at<float>(d_columns), at<float>(d_third), at<float>(d_w2),
                                       s);
        });
      },
      py::kw_only(), py::arg("field"), py::arg("batch"), py::arg("gradient"), py::arg("d_rows"),
      py::arg("d_columns"), py::arg("d_third"), py::arg("d_w2"), py::arg("device"),
      py::arg("stream"));
  m.def("loss_partials", &loss_partials);
  m.def(
      "density_grid_loss",
      [](const GridField& ours, const GridField* theirs, const VolumeNumbers& target, int batch,
         const std::string& kind, Address scale, Address errors, const VolumeNumbers& d_ours,
         const VolumeNumbers& d_theirs, int device, Address stream) {
        enqueue("density_grid_loss", device, stream, [&](cudaStream_t s) {
          return density_grid_loss(ours, theirs, volume(target), batch,
                                   choose<Difference>(kind, {"l1", "l2"}), at<const float>(scale),
                                   at<float>(errors), volume(d_ours), volume(d_theirs), s);
        });
      },
      py::kw_only(), py::arg("ours"), py::arg("theirs"), py::arg("target"), py::arg("batch"),
      py::arg("kind"), py::arg("scale"), py::arg("errors"), py::arg("d_ours"), py::arg("d_theirs"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace densityrl::cuda
