// The CUDA kernels' launchers: device pointers, sizes and a stream in, a status out. Nothing of
// torch. A launcher only enqueues work on its stream; what it writes is complete after that.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace densityrl::cuda {

enum class Hidden { softplus, relu, silu };
enum class Output { identity, softplus, exp };
enum class Combine { sum, concat, product };
enum class Difference { l1, l2 };
enum class Number { float32, bfloat16, float16 };

constexpr int kMaxPlanes = 6;

// ------------------------------------------------------------------------- tables (tables.cu)
//
// A table [B][rows][units][pitch] holds, for two of the grid's axes, what the first layer makes of
// the planes over these axes; rows belong to the first axis, columns (contiguous, `pitch` of them,
// zero from `columns` on) to the second.

// Linear interpolation from an image's side of `size` pixels to `count` points of a grid's axis.
struct Taps {
  const int32_t* index;  // [2][count]: the lower and the upper pixel
  const float* weight;   // [2][count]
  const int32_t* reach;  // [2][size]: the points, from and up to, that have the pixel as one of two
  int count, size;
};

// A plane of a table. Strides are in elements; `row` and `column` are along the table's axes, and
// an offset along both of them must be below 2^30.
struct TablePlane {
  const void* data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  const float* weight;  // [units][weight_stride], of which the first `channels` are the plane's
  int weight_stride;
  Taps rows, columns;
};

// Planes with the same weight are neighbours. Memory of tables is aligned to 16 bytes.
struct Table {
  int batch, channels, units;
  int rows, columns, pitch;  // the pitch is a multiple of kTablePadding
  Number number;             // of all the planes
  int plane_count;
  TablePlane planes[kMaxPlanes];
};

constexpr int kTablePadding = 16;

// table = bias (or null: 0) + the planes' contributions. Without planes: the bias.
cudaError_t tabulate(const Table&, const float* bias, float* table, cudaStream_t);

// Partial sums of the first layer's gradient, by its strides; their sums over `count` are it.
struct WeightPartials {
  int count;
  float* weights[kMaxPlanes];  // [count][units][channels], of all planes with the first's weight
  int64_t partial_stride;
  int unit_stride;
  float* bias;  // [count][units], or null: not wanted
};

// A `count` that suits a table.
int weight_partials(const Table&);

constexpr int kFeatureBlock = 8;

// The first of planes with the same weight stands for all of them. `d_features`: for every plane,
// the gradient by what is looked up on it, [B][rows][blocks][pitch][kFeatureBlock], the channels in
// blocks; null: not wanted. Of the table's gradient the padding is not looked at.
cudaError_t table_backward(const Table&, const float* d_table, float* const* d_features,
                           const WeightPartials*, cudaStream_t);

// The gradient of a plane, of the planes' number type.
struct PlaneGradient {
  void* data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// For every plane, the adjoint of the lookup; here every plane needs `d_features`.
cudaError_t plane_gradients(const Table&, const float* const* d_features,
                            const PlaneGradient* d_planes, cudaStream_t);

// ---------------------------------------------------------------------- grids (density_grid.cu)

// The tables of a density field whose decoder has two layers: see density_grid.cu.
struct GridField {
  int units;
  int slices, rows, columns;          // of the part of the volume that is worked on
  int rows_pitch, columns_pitch;      // columns_pitch also of `third`
  int64_t rows_batch, columns_batch;  // strides over samples: `slices` may be a part of them
  const float* rows_table;            // [B][slices][units][rows_pitch]
  const float* columns_table;         // [B][slices][units][columns_pitch]
  const float* third_table;           // [B][rows][units][columns_pitch], or null
  const int32_t* plain;               // [B][slices], with a third table [B]; or null: all are plain
  int64_t plain_batch;
  const float* w2;  // [units]
  const float* b2;  // [1]
  Hidden hidden;
  Output output;
};

// A volume [B][slices][rows][columns] by its strides.
struct Volume {
  float* data;  // or null
  int64_t batch_stride, slice_stride, row_stride, column_stride;
};

// Marks as plain in `plain` the slices (with a third table: samples) whose tables have entries
// beyond `largest` or are too small for the factored form, and replaces the other tables' entries
// by their exponentials. With a third table, `statistics` has room for
// [B][2 slices + rows][units + 1] floats.
cudaError_t choose_forms(const GridField&, int batch, float largest, float* rows_table,
                         float* columns_table, float* third_table, int32_t* plain,
                         float* statistics, cudaStream_t);

cudaError_t density_grid(const GridField&, int batch, Volume sigma, cudaStream_t);

// The gradient by the raw density, [B][slices][rows][columns]: columns are contiguous, 16 bytes
// aligned, a multiple of 4. The backward reads rows (and with a third table slices) up to the next
// multiple of kGradientPadding: they must be there, and be 0.
struct Gradient {
  float* data;
  int slices, rows, columns;  // with the padding
  int64_t batch_stride, slice_stride, row_stride;
};

constexpr int kGradientPadding = 8;

// Whether a volume's gradient can be read as it is.
bool is_gradient(Volume d_sigma, int slices, int rows, int columns, bool third);

// Fills `raw`, padding included, given the gradient by sigma. `sigma` is not looked at for the
// output identity.
cudaError_t raw_gradient(Volume d_sigma, Volume sigma, int batch, int slices, int rows, int columns,
                         Output, Gradient raw, cudaStream_t);

// Gradients of the tables (of their logarithms, where these are exponentials). d_rows, d_columns
// and d_third are laid out as the tables and overwritten. d_w2 [B][slices][units] (null: not
// wanted) is to be summed.
cudaError_t density_grid_backward(const GridField&, int batch, Gradient, float* d_rows,
                                  float* d_columns, float* d_third, float* d_w2, cudaStream_t);

// How many partial sums a sample `density_grid_loss` leaves.
int loss_partials(const GridField&);

// The target is a field, or a volume where that is null. Either `errors` [B][loss_partials] is
// filled, with sums over tiles, or the gradients by the raw densities (by the volume, for a target
// that is one), `scale` [B] times the slope of a voxel's error.
cudaError_t density_grid_loss(const GridField& ours, const GridField* theirs, Volume target,
                              int batch, Difference, const float* scale, float* errors,
                              Volume d_ours, Volume d_theirs, cudaStream_t);

// --------------------------------------------------------------------------- points (points.cu)

// A plane lying channels-last, [B][height][width][channels].
struct PointPlane {
  const void* data;
  int64_t batch_stride;
  int height, width;
  int axis_across, axis_down;    // the coordinates along the width and along the height
  float rate_across, rate_down;  // 2 / the box's extent along them
};

struct PointField {
  int batch, channels;
  int plane_count;
  PointPlane planes[kMaxPlanes];
  Number number;
  Combine combine;
  bool border, align_corners;
  int64_t count;        // points a sample
  const float* points;  // [B][count][3], samples `points_stride` apart (0: shared)
  int64_t points_stride;
};

// A decoder of two layers, width -> units -> 1 + rest: weights are contiguous.
struct Decoder {
  int width, units, rest;
  const float *w1, *b1;  // [units][width], [units]
  const float *w2, *b2;  // [1 + rest][units], [1 + rest]
  Hidden hidden;
  Output output;
};

// What the kernels with a decoder take. In a concat, the channels of a plane count as the next
// multiple of 16.
constexpr int kMaxWidth = 96;
constexpr int kMaxUnits = 64;
constexpr int kMaxRest = 64;

// features [B][count][width]
cudaError_t sample_features(const PointField&, float* features, cudaStream_t);

// Adds to d_planes[p], float32 [B][height][width][channels] (all null: not wanted), by atomic
// additions; writes d_points [B][count][3] (null: not wanted).
cudaError_t sample_features_backward(const PointField&, const float* d_features,
                                     float* const* d_planes, float* d_points, cudaStream_t);

// sigma [B][count], rest [B][count][rest]
cudaError_t radiance(const PointField&, const Decoder&, float* sigma, float* rest, cudaStream_t);

// Into how many partial sums `radiance_backward` is best divided; the same on every device.
int radiance_partials(const PointField&);

// d_features [B][count][width], the gradient by the reduced features (null: not wanted), and the
// parameters' gradients in the order w1, w2, b1, b2, as partials [blocks][parameters] to be summed
// (null: not wanted).
cudaError_t radiance_backward(const PointField&, const Decoder&, const float* d_sigma,
                              const float* d_rest, const float* sigma, float* d_features,
                              int blocks, float* partials, cudaStream_t);

}  // namespace densityrl::cuda
