#include <algorithm>
#include <array>
#include <vector>

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace densityrl::cuda {

namespace {

// Strides over samples, channels, rows and columns.
using Strides = std::array<int64_t, 4>;

// Of something there is one of for every plane of a table.
template <class To, class From, class Convert>
std::array<To, kMaxPlanes> for_planes(const Table& table, const std::vector<From>& values,
                                      Convert convert) {
  std::array<To, kMaxPlanes> result{};
  if (values.empty()) return result;
  if (values.size() != static_cast<size_t>(table.plane_count))
    throw std::invalid_argument("a list is not as long as the table's planes are many");
  std::transform(values.begin(), values.end(), result.begin(), convert);
  return result;
}

}  // namespace

void bind_tables(py::module_& m) {
  m.attr("MAX_PLANES") = kMaxPlanes;
  m.attr("FEATURE_BLOCK") = kFeatureBlock;
  py::class_<Taps>(m, "Taps", py::module_local())
      .def(py::init([](Address index, Address weight, Address reach, int count, int size) {
             return Taps{at<const int32_t>(index), at<const float>(weight),
                         at<const int32_t>(reach), count, size};
           }),
           py::kw_only(), py::arg("index"), py::arg("weight"), py::arg("reach"), py::arg("count"),
           py::arg("size"));
  py::class_<TablePlane>(m, "TablePlane", py::module_local())
      .def(py::init([](Address data, const Strides& strides, Address weight, int weight_stride,
                       const Taps& rows, const Taps& columns) {
             return TablePlane{at<const void>(data), strides[0], strides[1],
                               strides[2],           strides[3], at<const float>(weight),
                               weight_stride,        rows,       columns};
           }),
           py::kw_only(), py::arg("data"), py::arg("strides"), py::arg("weight"),
           py::arg("weight_stride"), py::arg("rows"), py::arg("columns"));
  py::class_<Table>(m, "Table", py::module_local())
      .def(py::init([](int batch, int channels, int units, int rows, int columns, int pitch,
                       const std::string& number, const std::vector<TablePlane>& planes) {
             if (planes.size() > kMaxPlanes)
               throw std::invalid_argument("more than " + std::to_string(kMaxPlanes) +
                                           " planes in a table");
             Table table{};
             table.batch = batch;
             table.channels = channels;
             table.units = units;
             table.rows = rows;
             table.columns = columns;
             table.pitch = pitch;
             table.number = choose<Number>(number, {"float32", "bfloat16", "float16"});
             table.plane_count = static_cast<int>(planes.size());
             std::copy(planes.begin(), planes.end(), table.planes);
             return table;
           }),
           py::kw_only(), py::arg("batch"), py::arg("channels"), py::arg("units"), py::arg("rows"),
           py::arg("columns"), py::arg("pitch"), py::arg("number"), py::arg("planes"));
  m.def(
      "tabulate",
      [](const Table& table, Address bias, Address out, int device, Address stream) {
        enqueue("tabulate", device, stream, [&](cudaStream_t s) {
          return tabulate(table, at<const float>(bias), at<float>(out), s);
        });
      },
      py::kw_only(), py::arg("table"), py::arg("bias"), py::arg("out"), py::arg("device"),
      py::arg("stream"));
  m.def("weight_partials", &weight_partials, py::arg("table"));
  m.def(
      "table_backward",
      [](const Table& table, Address d_table, const std::vector<Address>& d_features, int partials,
         const std::vector<Address>& d_weights, int64_t partial_stride, int unit_stride,
         Address d_bias, int device, Address stream) {
        auto features = for_planes<float*>(table, d_features, at<float>);
        WeightPartials weights{};
        weights.count = partials;
        auto addresses = for_planes<float*>(table, d_weights, at<float>);
        std::copy(addresses.begin(), addresses.end(), weights.weights);
        weights.partial_stride = partial_stride;
        weights.unit_stride = unit_stride;
        weights.bias = at<float>(d_bias);
        enqueue("backward of tabulate", device, stream, [&](cudaStream_t s) {
          return table_backward(table, at<const float>(d_table), features.data(),
                                d_weights.empty() ? nullptr : &weights, s);
        });
      },
      py::kw_only(), py::arg("table"), py::arg("d_table"), py::arg("d_features"),
      py::arg("partials"), py::arg("d_weights"), py::arg("partial_stride"), py::arg("unit_stride"),
      py::arg("d_bias"), py::arg("device"), py::arg("stream"));
  m.def(
      "plane_gradients",
      [](const Table& table, const std::vector<Address>& d_features,
         const std::vector<Address>& d_planes, const std::vector<Strides>& strides, int device,
         Address stream) {
        auto features = for_planes<const float*>(table, d_features, at<const float>);
        auto data = for_planes<void*>(table, d_planes, at<void>);
        auto planes = for_planes<PlaneGradient>(table, strides, [](const Strides& s) {
          return PlaneGradient{nullptr, s[0], s[1], s[2], s[3]};
        });
        for (int p = 0; p < kMaxPlanes; ++p) planes[p].data = data[p];
        enqueue("gradients of planes", device, stream, [&](cudaStream_t s) {
          return plane_gradients(table, features.data(), planes.data(), s);
        });
      },
      py::kw_only(), py::arg("table"), py::arg("d_features"), py::arg("d_planes"),
      py::arg("strides"), py::arg("device"), py::arg("stream"));
}

}  // namespace densityrl::cuda
