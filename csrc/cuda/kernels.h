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

// A plane of a table. Strides are in elements; `row` and `column` are along the table's axes.
struct TablePlane {
  const void* data;
  Number number;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  const float* weight;  // [units][weight_stride], of which the first `channels` are the plane's
  int weight_stride;
  Taps rows, columns;
};

struct Table {
  int batch, channels, units, pitch;
  int plane_count;
  TablePlane planes[kMaxPlanes];
};

// table = bias (or null: 0) + the planes' contributions. Without planes: the bias.
cudaError_t tabulate(const Table&, int rows, int columns, const float* bias, float* table,
                     cudaStream_t);

// How many partial sums `table_backward` leaves of a weight's gradient.
int weight_partials(const Table&);

// For every plane p: d_features[p] [B][channels][rows][columns], the gradient by the resampled
// plane (null: not wanted); d_weights[p] [weight_partials][units][channels], to be summed (null:
// not wanted).
cudaError_t table_backward(const Table&, const float* d_table, float* const* d_features,
                           float* const* d_weights, cudaStream_t);

// d_plane [B][channels], then by the strides given, as float32: the adjoint of the resampling.
cudaError_t plane_gradient(const Table&, int plane, const float* d_features, float* d_plane,
                           int64_t row_stride, int64_t column_stride, cudaStream_t);

// ---------------------------------------------------------------------- grids (density_grid.cu)

// A density field of a decoder of two layers on a grid, by its tables: see density_grid.cu. Tables
// are contiguous, but for the slices: `rows` and `columns` may begin at a later one.
struct GridField {
  int units;
  int slices, rows, columns;          // of the part of the volume that is worked on
  int rows_pitch, columns_pitch;      // columns_pitch also of `third`
  int64_t rows_batch, columns_batch;  // strides over samples
  const float* rows_table;            // [B][slices][units][rows_pitch]
  const float* columns_table;         // [B][slices][units][columns_pitch]
  const float* third_table;           // [B][rows][units][columns_pitch], or null
  const float* w2;                    // [units]
  const float* b2;                    // [1]
  Hidden hidden;
  Output output;
};

// A volume [B][slices][rows][columns] by its strides.
struct Volume {
  float* data;  // or null
  int64_t batch_stride, slice_stride, row_stride, column_stride;
};

cudaError_t density_grid(const GridField&, int batch, Volume sigma, cudaStream_t);

// Gradients of the tables, given that by sigma. d_rows and d_columns are laid out as the tables;
// d_third is added to if `add_third`. d_w2 [B][slices][units] (null: not wanted) is to be summed.
// Without `sigma`, d_sigma is the gradient by the raw density.
cudaError_t density_grid_backward(const GridField&, int batch, Volume d_sigma, Volume sigma,
                                  float* d_rows, float* d_columns, float* d_third, bool add_third,
                                  float* d_w2, cudaStream_t);

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

constexpr int kMaxWidth = 96;  // of a reduced feature that the kernels with a decoder take
constexpr int kMaxUnits = 64;
constexpr int kMaxRest = 64;

// features [B][count][width]
cudaError_t sample_features(const PointField&, float* features, cudaStream_t);

// Adds to d_planes[p], float32 and laid out as the plane (all null: not wanted), by atomic
// additions; writes d_points [B][count][3] (null: not wanted).
cudaError_t sample_features_backward(const PointField&, const float* d_features,
                                     float* const* d_planes, float* d_points, cudaStream_t);

// sigma [B][count], rest [B][count][rest]
cudaError_t radiance(const PointField&, const Decoder&, float* sigma, float* rest, cudaStream_t);

// How many partial sums `radiance_backward` leaves of the parameters' gradients.
int radiance_partials(const PointField&, const Decoder&);

// d_features [B][count][width], the gradient by the reduced features (null: not wanted), and
// partials [radiance_partials][parameters] (null: not wanted), in the order w1, w2, b1, b2.
cudaError_t radiance_backward(const PointField&, const Decoder&, const float* d_sigma,
                              const float* d_rest, const float* sigma, float* d_features,
                              float* partials, cudaStream_t);

}  // namespace densityrl::cuda
