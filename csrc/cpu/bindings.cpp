// The Python module triplane_kernels._cpu: addresses and sizes in, nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "team.h"

namespace py = pybind11;
using namespace densityrl;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Enum>
Enum choose(const std::string& name, std::initializer_list<const char*> names) {
  int index = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(index);
    ++index;
  }
  throw std::invalid_argument("unknown option '" + name + "'");
}

Difference difference(const std::string& kind) { return choose<Difference>(kind, {"l1", "l2"}); }

// A decoder, and where its gradients go (no addresses: none are wanted).
struct Decoder {
  Decoder(std::vector<int> widths, const std::vector<Address>& weights,
          const std::vector<Address>& biases, const std::string& hidden, const std::string& output,
          const std::vector<Address>& weight_gradients, const std::vector<Address>& bias_gradients)
      : widths(std::move(widths)),
        hidden(choose<Hidden>(hidden, {"softplus", "relu", "silu"})),
        output(choose<Output>(output, {"identity", "softplus", "exp"})) {
    for (Address a : weights) this->weights.push_back(at<const float>(a));
    for (Address a : biases) this->biases.push_back(at<const float>(a));
    for (Address a : weight_gradients) this->weight_gradients.push_back(at<float>(a));
    for (Address a : bias_gradients) this->bias_gradients.push_back(at<float>(a));
    if (weights.size() > kMaxLayers)
      throw std::invalid_argument("more than " + std::to_string(kMaxLayers) + " layers");
  }

  Mlp mlp() const {
    return {static_cast<int>(weights.size()),
            widths.data(),
            weights.data(),
            biases.data(),
            hidden,
            output};
  }
  MlpGradients gradients() const {
    if (bias_gradients.empty()) return {nullptr, nullptr};
    return {weight_gradients.data(), bias_gradients.data()};
  }

  std::vector<int> widths;
  std::vector<const float*> weights, biases;
  std::vector<float*> weight_gradients, bias_gradients;
  Hidden hidden;
  Output output;
};

struct Grid {
  Grid(int batch, int channels, std::array<int, 3> shape, std::vector<GridPlane> planes,
       std::array<int, 3> table_channels, std::array<Address, 3> table_weight,
       std::array<Address, 3> table_weight_gradient, const Decoder& decoder)
      : planes(std::move(planes)), decoder(decoder) {
    field.batch = batch;
    field.channels = channels;
    for (int t = 0; t < 3; ++t) {
      field.shape[t] = shape[t];
      field.table_channels[t] = table_channels[t];
      field.table_weight[t] = at<const float>(table_weight[t]);
      field.table_weight_gradient[t] = at<float>(table_weight_gradient[t]);
    }
  }
  const GridField& get() {
    field.planes = planes.data();
    field.plane_count = static_cast<int>(planes.size());
    field.mlp = decoder.mlp();
    field.gradients = decoder.gradients();
    return field;
  }

  std::vector<GridPlane> planes;
  Decoder decoder;
  GridField field;
};

struct Points {
  Points(int batch, int channels, std::vector<PointPlane> planes, const std::string& combine,
         bool border, bool align_corners, int64_t count, Address points, int64_t points_stride,
         Address points_gradient, const Decoder& decoder)
      : planes(std::move(planes)), decoder(decoder) {
    if (this->planes.size() > kMaxPlanes)
      throw std::invalid_argument("more than " + std::to_string(kMaxPlanes) + " planes");
    field.batch = batch;
    field.channels = channels;
    field.combine = choose<Combine>(combine, {"sum", "concat", "product"});
    field.border = border;
    field.align_corners = align_corners;
    field.count = count;
    field.points = at<const float>(points);
    field.points_stride = points_stride;
    field.points_gradient = at<float>(points_gradient);
  }
  const PointField& get() {
    field.planes = planes.data();
    field.plane_count = static_cast<int>(planes.size());
    field.mlp = decoder.mlp();
    field.gradients = decoder.gradients();
    return field;
  }

  std::vector<PointPlane> planes;
  Decoder decoder;
  PointField field;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of triplane_kernels. Arrays are addresses of contiguous float32.";
  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def("runnable_isas", &runnable_isas, "What this processor and build run, best first.");
  m.def("measured_clock", &measured_clock, "Of this thread's processor now, in Hz.");
  m.def("use_isa", &use_isa, py::arg("isa"));

  py::class_<Taps>(m, "Taps").def(
      py::init([](Address low, Address high, Address weight_low, Address weight_high) {
        return Taps{at<const int32_t>(low), at<const int32_t>(high), at<const float>(weight_low),
                    at<const float>(weight_high)};
      }),
      py::kw_only(), py::arg("low"), py::arg("high"), py::arg("weight_low"),
      py::arg("weight_high"));
  py::class_<Decoder>(m, "Decoder")
      .def(py::init<std::vector<int>, const std::vector<Address>&, const std::vector<Address>&,
                    const std::string&, const std::string&, const std::vector<Address>&,
                    const std::vector<Address>&>(),
           py::kw_only(), py::arg("widths"), py::arg("weights"), py::arg("biases"),
           py::arg("hidden"), py::arg("output"), py::arg("weight_gradients"),
           py::arg("bias_gradients"));
  py::class_<GridPlane>(m, "GridPlane")
      .def(py::init([](Address data, Address gradient, int64_t batch_stride,
                       int64_t gradient_stride, int height, int width, const Taps& across,
                       const Taps& down, int table, int channel, bool width_is_slow) {
             return GridPlane{at<const float>(data),
                              at<float>(gradient),
                              batch_stride,
                              gradient_stride,
                              height,
                              width,
                              across,
                              down,
                              table,
                              channel,
                              width_is_slow};
           }),
           py::kw_only(), py::arg("data"), py::arg("gradient"), py::arg("batch_stride"),
           py::arg("gradient_stride"), py::arg("height"), py::arg("width"), py::arg("across"),
           py::arg("down"), py::arg("table"), py::arg("channel"), py::arg("width_is_slow"));
  py::class_<Grid>(m, "GridField")
      .def(py::init<int, int, std::array<int, 3>, std::vector<GridPlane>, std::array<int, 3>,
                    std::array<Address, 3>, std::array<Address, 3>, const Decoder&>(),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("shape"),
           py::arg("planes"), py::arg("table_channels"), py::arg("table_weight"),
           py::arg("table_weight_gradient"), py::arg("decoder"));
  py::class_<PointPlane>(m, "PointPlane")
      .def(py::init([](Address data, Address gradient, int64_t batch_stride,
                       int64_t gradient_stride, int height, int width, int axis_across,
                       int axis_down, float extent_across, float extent_down) {
             return PointPlane{at<const float>(data),
                               at<float>(gradient),
                               batch_stride,
                               gradient_stride,
                               height,
                               width,
                               axis_across,
                               axis_down,
                               extent_across,
                               extent_down};
           }),
           py::kw_only(), py::arg("data"), py::arg("gradient"), py::arg("batch_stride"),
           py::arg("gradient_stride"), py::arg("height"), py::arg("width"), py::arg("axis_across"),
           py::arg("axis_down"), py::arg("extent_across"), py::arg("extent_down"));
  py::class_<Points>(m, "PointField")
      .def(py::init<int, int, std::vector<PointPlane>, const std::string&, bool, bool, int64_t,
                    Address, int64_t, Address, const Decoder&>(),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("planes"),
           py::arg("combine"), py::arg("border"), py::arg("align_corners"), py::arg("count"),
           py::arg("points"), py::arg("points_stride"), py::arg("points_gradient"),
           py::arg("decoder"));

  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def(
      "density_grid",
      [](Grid& field, Address sigma, int threads) {
        Team team(threads);
        kernels().density_grid(field.get(), at<float>(sigma), team);
      },
      NoGil());
  m.def(
      "density_grid_backward",
      [](Grid& field, Address d_sigma, Address sigma, int threads) {
        Team team(threads);
        kernels().density_grid_backward(field.get(), at<const float>(d_sigma),
                                        at<const float>(sigma), team);
      },
      NoGil());
  m.def(
      "density_grid_loss",
      [](Grid& field, Grid* target, Address volume, const std::string& kind, Address loss,
         int threads) {
        Team team(threads);
        kernels().density_grid_loss(field.get(), target ? &target->get() : nullptr,
                                    at<const float>(volume), difference(kind), at<float>(loss),
                                    team);
      },
      NoGil());
  m.def(
      "density_grid_loss_backward",
      [](Grid& field, Grid* target, Address volume, const std::string& kind, Address d_loss,
         Address d_volume, int threads) {
        Team team(threads);
        kernels().density_grid_loss_backward(field.get(), target ? &target->get() : nullptr,
                                             at<const float>(volume), difference(kind),
                                             at<const float>(d_loss), at<float>(d_volume), team);
      },
      NoGil());
  m.def(
      "points",
      [](Points& field, Address sigma, Address features, int threads) {
        Team team(threads);
        kernels().points(field.get(), at<float>(sigma), at<float>(features), team);
      },
      NoGil());
  m.def(
      "points_backward",
      [](Points& field, Address d_sigma, Address sigma, Address d_features, int threads) {
        Team team(threads);
        kernels().points_backward(field.get(), at<const float>(d_sigma), at<const float>(sigma),
                                  at<const float>(d_features), team);
      },
      NoGil());
}
