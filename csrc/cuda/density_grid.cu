// Density on a regular grid from tables: one logarithm a voxel and hidden unit, and back.
//
// A decoder of two layers leaves to every voxel (slice s, row r, column c)
//
//   sigma = output(b2 + sum_h w2[h] f(x_h)),   x_h = rows[s, h, r] + columns[s, h, c] (+ third)
//
// and for f = softplus the exponential of the sum is the product of the tables' exponentials:
//
//   softplus(x_h) = ln 2 log2(1 + u_h),   u_h = e^rows e^columns,   sigmoid(x_h) = 1 - 1 / (1 +
//   u_h)
//
// In this factored form the special-function unit, 16 lanes a clock and multiprocessor, is what
// limits, at one logarithm a voxel and unit; so one of four logarithms is a polynomial on the
// FP32 units, which are idle otherwise. Two things limit the form: products must not leave the
// range of float32; and 1 + u is exact to 2^-24 of 1 and not of u, which shows where nearly all of
// a slice is far below zero. `choose_forms` finds the slices concerned. Their tables stay as they
// are, and the kernels take the plain form for them, accurate everywhere; so they do for other
// activations.
//
// The backward sums in a fixed order, without atomics. A warp owns a slice and some hidden units,
// keeps a block of columns in registers and goes through the rows:
//
//   d_columns[s, h, c] = w2[h] sum_r g f'(x)     in registers, stored once
//   d_rows[s, h, r]    = w2[h] sum_c g f'(x)     a reduction over the lanes for eight rows at once
//   d_w2[h]            = sum g f(x)              in registers, then a sum over all slices
//
// with g the gradient by the raw density. A third table is owned by rows instead of slices, and
// takes a second pass in which rows and slices have exchanged their parts.

#include <type_traits>
#include <utility>

#include "device.cuh"

namespace densityrl::cuda {

namespace {

// Least root mean square of softplus, weighted by w2, for which an error of 2^-22 in log2(1 + u) is
// of no account.
constexpr float kLeastSoftplus = 0.2f;

// Whether some of the logarithms are polynomials. A polynomial takes 14 instructions where a
// scheduler has 8 clocks for one logarithm on the special-function unit: between one of sixteen and
// one of four balances the two, by what else a loop does. Compute capability 8.0 has half the FP32
// lanes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool kPolynomials = false;
#else
constexpr bool kPolynomials = true;
#endif

// log2(x) of a normal x without the special-function unit, absolute error 4e-7.
__device__ __forceinline__ float log2_polynomial(float x) {
  int bits = __float_as_int(x);
  int exponent = (bits - 0x3f3504f3) & static_cast<int>(0xff800000);  // of x / sqrt(1/2), in place
  float f = __int_as_float(bits - exponent) - 1.f;                    // from -0.29 to 0.41
  float q = fmaf(f, 0.17063452303409576f, -0.2726980149745941f);
  q = fmaf(q, f, 0.29726260900497437f);
  q = fmaf(q, f, -0.3589618504047394f);
  q = fmaf(q, f, 0.48046502470970154f);
  q = fmaf(q, f, -0.7213758826255798f);
  q = fmaf(q, f, 1.442699670791626f);
  return fmaf(q, f, static_cast<float>(exponent) * 0x1p-23f);
}

enum class Form { factored, softplus, relu, silu };

template <Form form>
constexpr Hidden kHidden = form == Form::relu   ? Hidden::relu
                           : form == Form::silu ? Hidden::silu
                                                : Hidden::softplus;

// The plain form of a hidden activation, as a template argument.
template <class Call>
__device__ __forceinline__ void with_plain_form(Hidden hidden, Call call) {
  if (hidden == Hidden::softplus)
    call(std::integral_constant<Form, Form::softplus>());
  else if (hidden == Hidden::relu)
    call(std::integral_constant<Form, Form::relu>());
  else
    call(std::integral_constant<Form, Form::silu>());
}

__device__ __forceinline__ void load4(const float* from, float (&to)[4]) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ bool is_plain(const GridField& field, int64_t sample, int slice) {
  if (field.plain == nullptr) return true;
  return field.plain[sample * field.plain_batch + (field.third_table ? 0 : slice)] != 0;
}

// ------------------------------------------------------------------------------------- forward

// What a block of 256 threads and each of these take of a volume. Both kinds of tile have a
// thread's columns in vectors of four.
constexpr int kThreads = 256;

template <int vectors>
struct TwoTables {
  static constexpr bool kThird = false;
  static constexpr int kSlices = 1, kRows = 4, kVectors = vectors;  // of a thread
  static constexpr int kTileSlices = 1, kTileRows = 64, kTileColumns = 64 * vectors;
  static constexpr int kVectorStep = 64;  // columns from a vector to the thread's next

  __device__ static int slice() { return 0; }
  __device__ static int row() { return threadIdx.x / 16 * 4; }
  __device__ static int column() { return threadIdx.x % 16 * 4; }

  // Three of sixteen, seven of thirty-two.
  __device__ static constexpr bool by_polynomial(int i, int j) {
    return j % 4 == 3 && !(i == 3 && j == 4 * vectors - 1);
  }
};

struct ThreeTables {
  static constexpr bool kThird = true;
  static constexpr int kSlices = 2, kRows = 4, kVectors = 1;
  static constexpr int kTileSlices = 8, kTileRows = 32, kTileColumns = 32;
  static constexpr int kVectorStep = 32;

  __device__ static int slice() { return threadIdx.x / 64 * 2; }
  __device__ static int row() { return threadIdx.x / 8 % 8 * 4; }
  __device__ static int column() { return threadIdx.x % 8 * 4; }

  __device__ static constexpr bool by_polynomial(int i, int j) { return j == 3 && i % 2 == 1; }
};

template <class Tile>
using Voxels = float[Tile::kSlices][Tile::kRows][4 * Tile::kVectors];

// Blocks of a volume: x goes through slices and samples, y through tiles of rows and columns.
template <class Tile>
dim3 tiles_of(const GridField& field, int batch) {
  return dim3(static_cast<unsigned>(batch * ceil_div(field.slices, Tile::kTileSlices)),
              static_cast<unsigned>(ceil_div(field.rows, Tile::kTileRows) *
                                    ceil_div(field.columns, Tile::kTileColumns)));
}

// A thread's first voxel.
struct Place {
  int64_t sample;
  int slice, row, column;
};

template <class Tile>
__device__ __forceinline__ Place place_in(const GridField& field) {
  int parts = (field.slices + Tile::kTileSlices - 1) / Tile::kTileSlices;
  int across = (field.columns + Tile::kTileColumns - 1) / Tile::kTileColumns;
  return {blockIdx.x / parts,
          static_cast<int>(blockIdx.x % parts) * Tile::kTileSlices + Tile::slice(),
          static_cast<int>(blockIdx.y) / across * Tile::kTileRows + Tile::row(),
          static_cast<int>(blockIdx.y) % across * Tile::kTileColumns + Tile::column()};
}

// Calls call(s, i, j, slice, row, column) for all of a thread's voxels that exist.
template <class Tile, class Call>
__device__ __forceinline__ void for_voxels(const GridField& field, const Place& at, Call call) {
#pragma unroll
  for (int s = 0; s < Tile::kSlices; ++s)
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 4 * Tile::kVectors; ++j) {
        int column = at.column + j / 4 * Tile::kVectorStep + j % 4;
        if (at.slice + s < field.slices && at.row + i < field.rows && column < field.columns)
          call(s, i, j, at.slice + s, at.row + i, column);
      }
}

// sum_h w2[h] f(x_h) of a thread's voxels. Beyond the volume, entries of its last ones are taken.
template <Form form, class Tile>
__device__ __forceinline__ void sum_units(const GridField& field, const Place& at,
                                          Voxels<Tile>& sum) {
  const float* rows[Tile::kSlices];
  const float* columns[Tile::kSlices][Tile::kVectors];
  const float* third[Tile::kRows];
  int row = min(at.row, field.rows_pitch - 4);
#pragma unroll
  for (int s = 0; s < Tile::kSlices; ++s) {
    int64_t slice = min(at.slice + s, field.slices - 1);
    rows[s] = field.rows_table + at.sample * field.rows_batch +
              slice * field.units * field.rows_pitch + row;
#pragma unroll
    for (int v = 0; v < Tile::kVectors; ++v)
      columns[s][v] = field.columns_table + at.sample * field.columns_batch +
                      slice * field.units * field.columns_pitch +
                      min(at.column + v * Tile::kVectorStep, field.columns_pitch - 4);
  }
  if constexpr (Tile::kThird) {
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
      third[i] = field.third_table +
                 ((at.sample * field.rows + min(at.row + i, field.rows - 1)) * field.units) *
                     field.columns_pitch +
                 min(at.column, field.columns_pitch - 4);
  }

#pragma unroll 2
  for (int unit = 0; unit < field.units; ++unit) {
    float a[Tile::kSlices][4], b[Tile::kSlices][4 * Tile::kVectors], t[Tile::kRows][4];
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s) {
      load4(rows[s], a[s]);
      rows[s] += field.rows_pitch;
#pragma unroll
      for (int v = 0; v < Tile::kVectors; ++v) {
        load4(columns[s][v], reinterpret_cast<float (&)[4]>(b[s][4 * v]));
        columns[s][v] += field.columns_pitch;
      }
    }
    if constexpr (Tile::kThird) {
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        load4(third[i], t[i]);
        third[i] += field.columns_pitch;
      }
    }
    float w = field.w2[unit] * (form == Form::factored ? kLn2 : 1.f);
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s)
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int j = 0; j < 4 * Tile::kVectors; ++j) {
          float value;
          if constexpr (form == Form::factored) {
            float one_and_u = Tile::kThird ? fmaf(a[s][i] * b[s][j], t[i][j % 4], 1.f)
                                           : fmaf(a[s][i], b[s][j], 1.f);
            value = kPolynomials && Tile::by_polynomial(i, j) ? log2_polynomial(one_and_u)
                                                              : log2_approx(one_and_u);
          } else {
            float x = a[s][i] + b[s][j] + (Tile::kThird ? t[i][j % 4] : 0.f);
            value = activate<kHidden<form>>(x);
          }
          sum[s][i][j] = fmaf(w, value, sum[s][i][j]);
        }
  }
}

template <class Tile>
__device__ __forceinline__ void raw_density(const GridField& field, const Place& at,
                                            Voxels<Tile>& raw) {
#pragma unroll
  for (int s = 0; s < Tile::kSlices; ++s)
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 4 * Tile::kVectors; ++j) raw[s][i][j] = 0;
  if (is_plain(field, at.sample, min(at.slice, field.slices - 1)))
    with_plain_form(field.hidden,
                    [&](auto form) { sum_units<decltype(form)::value, Tile>(field, at, raw); });
  else
    sum_units<Form::factored, Tile>(field, at, raw);
  float b2 = field.b2[0];
#pragma unroll
  for (int s = 0; s < Tile::kSlices; ++s)
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 4 * Tile::kVectors; ++j) raw[s][i][j] += b2;
}

__device__ __forceinline__ int64_t offset_in(const Volume& volume, int64_t sample, int slice,
                                             int row, int column) {
  return sample * volume.batch_stride + slice * volume.slice_stride + row * volume.row_stride +
         column * volume.column_stride;
}

template <class Tile>
__global__ void __launch_bounds__(kThreads)
    density_kernel(const GridField field, const Volume sigma, const bool vectors) {
  Place at = place_in<Tile>(field);
  Voxels<Tile> raw;
  raw_density<Tile>(field, at, raw);
  if (vectors && field.output == Output::identity) {
#pragma unroll
    for (int s = 0; s < Tile::kSlices; ++s)
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i)
#pragma unroll
        for (int v = 0; v < Tile::kVectors; ++v) {
          int column = at.column + v * Tile::kVectorStep;
          if (at.slice + s >= field.slices || at.row + i >= field.rows || column >= field.columns)
            continue;
          const float (&r)[4 * Tile::kVectors] = raw[s][i];
          float* to = sigma.data + offset_in(sigma, at.sample, at.slice + s, at.row + i, column);
          *reinterpret_cast<float4*>(to) =
              make_float4(r[4 * v], r[4 * v + 1], r[4 * v + 2], r[4 * v + 3]);
        }
    return;
  }
  for_voxels<Tile>(field, at, [&](int s, int i, int j, int slice, int row, int column) {
    sigma.data[offset_in(sigma, at.sample, slice, row, column)] =
        apply_output(raw[s][i][j], field.output);
  });
}

// Whether rows of a volume can be read and written four columns at a time.
bool takes_vectors(const Volume& volume, int columns) {
  return volume.column_stride == 1 && columns % 4 == 0 && volume.row_stride % 4 == 0 &&
         volume.slice_stride % 4 == 0 && volume.batch_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(volume.data) % 16 == 0;
}

bool is_empty(const GridField& field, int batch) {
  return batch == 0 || field.slices == 0 || field.rows == 0 || field.columns == 0;
}

// Calls `launcher` with the tile that pads a volume's columns less.
template <class Launcher>
cudaError_t with_tile(const GridField& field, Launcher launcher) {
  if (field.third_table) return launcher(ThreeTables());
  if (ceil_div(field.columns, 64) % 2 == 1) return launcher(TwoTables<1>());
  return launcher(TwoTables<2>());
}

// ---------------------------------------------------------------------------------------- loss

// `theirs.units` is 0 where the target is a volume. See density_grid_loss.
template <class Tile>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(const GridField ours, const GridField theirs, const Volume target,
                const Difference kind, const float* scale, float* errors, const Volume d_ours,
                const Volume d_theirs) {
  Place at = place_in<Tile>(ours);
  Voxels<Tile> raw, other;
  raw_density<Tile>(ours, at, raw);
  if (theirs.units > 0) raw_density<Tile>(theirs, at, other);

  float total = 0;
  for_voxels<Tile>(ours, at, [&](int s, int i, int j, int slice, int row, int column) {
    float sigma = apply_output(raw[s][i][j], ours.output);
    float sought = theirs.units > 0 ? apply_output(other[s][i][j], theirs.output)
                                    : target.data[offset_in(target, at.sample, slice, row, column)];
    float difference = sigma - sought;
    if (errors != nullptr) {
      total += kind == Difference::l1 ? fabsf(difference) : difference * difference;
      return;
    }
    float slope = 2.f * difference;
    if (kind == Difference::l1)  // a NaN is neither, and stays
      slope = difference > 0.f ? 1.f : difference < 0.f ? -1.f : difference;
    float d = scale[at.sample] * slope;
    if (d_ours.data != nullptr)
      d_ours.data[offset_in(d_ours, at.sample, slice, row, column)] =
          times_output_slope(d, sigma, ours.output);
    if (d_theirs.data != nullptr)
      d_theirs.data[offset_in(d_theirs, at.sample, slice, row, column)] =
          theirs.units > 0 ? times_output_slope(-d, sought, theirs.output) : -d;
  });
  if (errors == nullptr) return;

  __shared__ float of_warps[kThreads / kWarp];
  total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (float part : of_warps) sum += part;
    errors[static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = sum;
  }
}

// ------------------------------------------------------------------------------------ backward

// The gradient by the raw density, with zeros where `Gradient` has more rows or slices.
__global__ void __launch_bounds__(kThreads)
    raw_gradient_kernel(const Volume d_sigma, const Volume sigma, const int slices, const int rows,
                        const int columns, const Output output, const Gradient raw) {
  int64_t sample = blockIdx.x / raw.slices;
  int slice = static_cast<int>(blockIdx.x % raw.slices), row = static_cast<int>(blockIdx.y);
  float* to =
      raw.data + sample * raw.batch_stride + slice * raw.slice_stride + row * raw.row_stride;
  bool exists = slice < slices && row < rows;
  for (int column = threadIdx.x; column < raw.columns; column += kThreads) {
    float value = 0;
    if (exists && column < columns) {
      value = d_sigma.data[offset_in(d_sigma, sample, slice, row, column)];
      if (sigma.data != nullptr)
        value = times_output_slope(value, sigma.data[offset_in(sigma, sample, slice, row, column)],
                                   output);
    }
    to[column] = value;
  }
}

// How a warp goes through the tables: two of them; three; or three with rows and slices exchanged,
// for the gradient of the third.
enum class Sweep { two, three, third };

// The sweep's tables, with its own slices and rows.
struct SweepTables {
  const float *rows, *columns, *third;
  int64_t rows_batch, rows_slice, rows_unit, rows_row;  // strides
  int64_t columns_batch, columns_slice;
  int64_t third_batch, third_row;
  int slices, n_rows, n_columns, units, pitch;  // pitch: of columns and third
  const float* w2;
  const int32_t* plain;
  int64_t plain_batch, plain_slice;
  Hidden hidden;
};

constexpr int kUnits = 2;  // of a warp
constexpr int kSweepThreads = 256;
constexpr int kUnitsOfBlock = kUnits * kSweepThreads / kWarp;
constexpr int kRowsAtOnce = kGradientPadding;  // whose sums over the columns are reduced together

// A lane's columns: kColumns of them, as vectors of four (or two) that stand 32 vectors apart.
template <int kColumns>
struct LaneColumns {
  static constexpr int kVector = kColumns < 4 ? kColumns : 4;

  __device__ static int at(int j) {
    return (threadIdx.x % kWarp) * kVector + j / kVector * kWarp * kVector + j % kVector;
  }

  // Where a lane's vectors are in a row; beyond `count`, a multiple of kVector, the row's last one.
  using Offsets = int[kColumns / kVector];
  __device__ __forceinline__ static void find(int count, Offsets& offsets) {
#pragma unroll
    for (int v = 0; v < kColumns / kVector; ++v) offsets[v] = min(at(v * kVector), count - kVector);
  }

  __device__ __forceinline__ static void load(const float* row, const Offsets& offsets,
                                              float (&to)[kColumns]) {
#pragma unroll
    for (int v = 0; v < kColumns / kVector; ++v) {
      const float* from = row + offsets[v];
      if constexpr (kVector == 4) {
        load4(from, reinterpret_cast<float (&)[4]>(to[4 * v]));
      } else {
        float2 pair = *reinterpret_cast<const float2*>(from);
        to[2 * v] = pair.x, to[2 * v + 1] = pair.y;
      }
    }
  }

  // As far as `count` reaches.
  __device__ __forceinline__ static void store(const float (&from)[kColumns], int count,
                                               float* row) {
#pragma unroll
    for (int j = 0; j < kColumns; j += kVector) {
      if (at(j) >= count) continue;
      if constexpr (kVector == 4)
        *reinterpret_cast<float4*>(row + at(j)) =
            make_float4(from[j], from[j + 1], from[j + 2], from[j + 3]);
      else
        *reinterpret_cast<float2*>(row + at(j)) = make_float2(from[j], from[j + 1]);
    }
  }
};

// The lanes whose bit 2 `half` is set keep the upper `half` values, the others the lower ones, each
// plus what its partner had of them; and so on with half as many.
template <int half>
__device__ __forceinline__ void fold(float (&values)[kUnits * kRowsAtOnce]) {
  bool upper = threadIdx.x & (2 * half);
#pragma unroll
  for (int k = 0; k < half; ++k) {
    float sent = upper ? values[k] : values[k + half];
    float kept = upper ? values[k + half] : values[k];
    values[k] = kept + __shfl_xor_sync(kAllLanes, sent, 2 * half);
  }
  if constexpr (half > 1) fold<half / 2>(values);
}

// Sums each of `values` over the lanes: the sum of values[k] is returned to lanes 2 k and 2 k + 1.
__device__ __forceinline__ float transposed_sum(float (&values)[kUnits * kRowsAtOnce]) {
  static_assert(kUnits * kRowsAtOnce == kWarp / 2);
  fold<kWarp / 4>(values);
  return values[0] + __shfl_xor_sync(kAllLanes, values[0], 1);
}

// One row of a warp's unit `number`: adds g f'(x) to the sum over columns and to those over rows,
// and g f(x).
template <Form form, bool need_w2, int polynomials, int kColumns>
__device__ __forceinline__ void add_row(float a, const float (&b)[kColumns],
                                        const float (&g)[kColumns], int number, float& over_columns,
                                        float (&over_rows)[kColumns], float& of_w2) {
  if constexpr (form == Form::factored) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      // One reciprocal serves two: `largest` keeps the product in range.
      float x0 = fmaf(a, b[j], 1.f), x1 = fmaf(a, b[j + 1], 1.f);
      float r = reciprocal_approx(x0 * x1);
      float slope0 = fmaf(-r, x1, 1.f), slope1 = fmaf(-r, x0, 1.f);
      over_columns = fmaf(g[j], slope0, over_columns);
      over_columns = fmaf(g[j + 1], slope1, over_columns);
      over_rows[j] = fmaf(g[j], slope0, over_rows[j]);
      over_rows[j + 1] = fmaf(g[j + 1], slope1, over_rows[j + 1]);
      if constexpr (need_w2) {
        of_w2 = fmaf(g[j], log2_approx(x0), of_w2);
        bool polynomial =
            kPolynomials && j % 4 == 2 &&
            (number % 2 == 0 ? polynomials == 3 || j % 8 == 6 : polynomials == 3 && j % 8 == 6);
        float last = polynomial ? log2_polynomial(x1) : log2_approx(x1);
        of_w2 = fmaf(g[j + 1], last, of_w2);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float x = a + b[j];
      float slope = activation_slope<kHidden<form>>(x);
      over_columns = fmaf(g[j], slope, over_columns);
      over_rows[j] = fmaf(g[j], slope, over_rows[j]);
      if constexpr (need_w2) of_w2 = fmaf(g[j], activate<kHidden<form>>(x), of_w2);
    }
  }
}

template <Form form, Sweep sweep, bool need_w2, int kColumns>
__device__ __forceinline__ void sweep_rows(const SweepTables& tables, const Gradient& gradient,
                                           int64_t sample, int slice, int first_unit, float* d_rows,
                                           float* d_columns, float* d_w2) {
  using Lane = LaneColumns<kColumns>;
  constexpr bool kFactored = form == Form::factored;
  constexpr bool kInVectors = kFactored && sweep != Sweep::third;  // the entries of eight rows
  // What a column that does not exist has, so that it adds nothing: activation and slope are 0.
  constexpr float kNothing = kFactored ? 0.f : -1e30f;
  int lane = threadIdx.x % kWarp;
  // A warp's last unit may be missing: it then does the one before again, and stores nothing.
  int units = min(kUnits, tables.units - first_unit);
  auto step = [&](int u, int of) { return min(u, units - 1) * of; };
  int64_t rows_at =
      sample * tables.rows_batch + slice * tables.rows_slice + first_unit * tables.rows_unit;
  int64_t columns_at = sample * tables.columns_batch + slice * tables.columns_slice +
                       static_cast<int64_t>(first_unit) * tables.pitch;
  int rows_unit = static_cast<int>(tables.rows_unit);
  float of_w2[kUnits] = {};

  for (int first = 0; first < tables.n_columns; first += kColumns * kWarp) {
    typename Lane::Offsets offsets;
    Lane::find(gradient.columns - first, offsets);  // the tables are not narrower
    float b[kUnits][kColumns], over_rows[kUnits][kColumns];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      Lane::load(tables.columns + columns_at + step(u, tables.pitch) + first, offsets, b[u]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (first + Lane::at(j) >= tables.n_columns) b[u][j] = kNothing;
        over_rows[u][j] = 0;
      }
    }
    const float* a_row = tables.rows + rows_at;
    const float* g_row =
        gradient.data + sample * gradient.batch_stride + slice * gradient.slice_stride + first;
    const float* t_row = nullptr;
    if constexpr (sweep != Sweep::two)
      t_row = tables.third + sample * tables.third_batch +
              static_cast<int64_t>(first_unit) * tables.pitch + first;

    for (int row = 0; row < tables.n_rows; row += kRowsAtOnce) {
      float over_columns[kUnits * kRowsAtOnce];
      float sum_of_lane = 0;  // that of unit lane / 2 / kRowsAtOnce, row lane / 2 % kRowsAtOnce
      float in_rows[kUnits] = {};  // a sum of sums: less rounding
      float a[kUnits][kRowsAtOnce];
      if constexpr (kInVectors) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const float* from = a_row + step(u, rows_unit) + row;
          load4(from, reinterpret_cast<float (&)[4]>(a[u][0]));
          load4(from + 4, reinterpret_cast<float (&)[4]>(a[u][4]));
        }
      }
// The code of an activation is long: not repeated for every row.
#pragma unroll(kInVectors ? kRowsAtOnce : kFactored ? 4 : 1)
      for (int i = 0; i < kRowsAtOnce; ++i) {
        float g[kColumns];  // of a row beyond the last: 0
        Lane::load(g_row, offsets, g);
        g_row += gradient.row_stride;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          float entry[kColumns];
          if constexpr (sweep == Sweep::two) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) entry[j] = b[u][j];
          } else {
            Lane::load(t_row + step(u, tables.pitch), offsets, entry);
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
              entry[j] = kFactored ? entry[j] * b[u][j] : entry[j] + b[u][j];
          }
          float of_row;
          if constexpr (kInVectors)
            of_row = a[u][i];
          else
            of_row = a_row[step(u, rows_unit)];
          float sum = 0;
          add_row<form, need_w2, sweep == Sweep::two ? 3 : 1>(of_row, entry, g, u, sum,
                                                              over_rows[u], in_rows[u]);
          if constexpr (kInVectors) {
            over_columns[u * kRowsAtOnce + i] = sum;
          } else if constexpr (sweep != Sweep::third) {
            sum = warp_sum(sum);
            if (lane / 2 == u * kRowsAtOnce + i) sum_of_lane = sum;
          }
        }
        if (row + i + 1 < tables.n_rows) {
          if constexpr (!kInVectors) a_row += tables.rows_row;
          if constexpr (sweep != Sweep::two) t_row += tables.third_row;
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) of_w2[u] += in_rows[u];
      if constexpr (sweep != Sweep::third) {
        if constexpr (kFactored) sum_of_lane = transposed_sum(over_columns);
        int u = lane / 2 / kRowsAtOnce;
        if (lane % 2 == 0 && u < units) {
          // A table's padding has room for the rows beyond the last.
          float* to = d_rows + rows_at + u * rows_unit + row + lane / 2 % kRowsAtOnce;
          float value = sum_of_lane * tables.w2[first_unit + u];
          *to = first == 0 ? value : *to + value;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (u >= units) break;
      float w = tables.w2[first_unit + u];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) over_rows[u][j] *= w;
      Lane::store(over_rows[u], tables.pitch - first,
                  d_columns + columns_at + u * tables.pitch + first);
    }
  }
  if constexpr (need_w2) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float sum = warp_sum(of_w2[u]) * (kFactored ? kLn2 : 1.f);
      if (lane == 0 && u < units)
        d_w2[(sample * tables.slices + slice) * tables.units + first_unit + u] = sum;
    }
  }
}

// Block x: sample and slice; y: hidden units. Does the slices of its form only: the registers that
// the plain form takes would cost the other one its occupancy.
template <bool factored, Sweep sweep, bool need_w2, int kColumns>
__global__ void __launch_bounds__(kSweepThreads, 2)
    sweep_kernel(const SweepTables tables, const Gradient gradient, float* d_rows, float* d_columns,
                 float* d_w2) {
  int64_t sample = blockIdx.x / tables.slices;
  int slice = static_cast<int>(blockIdx.x % tables.slices);
  bool plain = tables.plain == nullptr ||
               tables.plain[sample * tables.plain_batch + slice * tables.plain_slice] != 0;
  if (plain == factored) return;
  int first_unit =
      static_cast<int>(blockIdx.y) * kUnitsOfBlock + static_cast<int>(threadIdx.x) / kWarp * kUnits;
  if (first_unit >= tables.units) return;
  if constexpr (factored)
    sweep_rows<Form::factored, sweep, need_w2, kColumns>(tables, gradient, sample, slice,
                                                         first_unit, d_rows, d_columns, d_w2);
  else
    with_plain_form(tables.hidden, [&](auto form) {
      sweep_rows<decltype(form)::value, sweep, need_w2, kColumns>(
          tables, gradient, sample, slice, first_unit, d_rows, d_columns, d_w2);
    });
}

template <Sweep sweep, bool need_w2>
cudaError_t run_sweep(const SweepTables& tables, int batch, const Gradient& gradient, float* d_rows,
                      float* d_columns, float* d_w2, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(batch) * tables.slices,
            static_cast<unsigned>(ceil_div(tables.units, kUnitsOfBlock)));
  auto run = [&](auto kernel) {
    return launch(kernel, grid, kSweepThreads, stream, tables, gradient, d_rows, d_columns, d_w2);
  };
  if (tables.plain != nullptr) {
    cudaError_t status = tables.n_columns <= 64    ? run(sweep_kernel<true, sweep, need_w2, 2>)
                         : tables.n_columns <= 128 ? run(sweep_kernel<true, sweep, need_w2, 4>)
                                                   : run(sweep_kernel<true, sweep, need_w2, 8>);
    if (status != cudaSuccess || tables.hidden != Hidden::softplus) return status;
  }
  return run(sweep_kernel<false, sweep, need_w2, 4>);
}

// ------------------------------------------------------------------------------- choice of form

// Of the entries of a table's row, [units][pitch]: the mean of every unit is added to means[unit],
// and the largest magnitude returned, to every thread; a NaN is infinite.
__device__ float add_means(const float* entries, int units, int columns, int pitch, float* means) {
  __shared__ float of_warps[kThreads / kWarp];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float largest = 0;
  for (int unit = warp; unit < units; unit += kThreads / kWarp) {
    const float* from = entries + static_cast<int64_t>(unit) * pitch;
    float sum = 0;
    for (int column = 4 * lane; column < columns; column += 4 * kWarp) {
      float v[4];
      load4(from + column, v);  // the padding is 0
      for (float entry : v) {
        float magnitude = fabsf(entry);
        largest = fmaxf(largest, magnitude < INFINITY ? magnitude : INFINITY);
        sum += entry;
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) means[unit] += sum / static_cast<float>(columns);
  }
  largest = warp_max(largest);
  __syncthreads();
  if (lane == 0) of_warps[warp] = largest;
  __syncthreads();
  for (float other : of_warps) largest = fmaxf(largest, other);
  return largest;
}

// Whether softplus is too small for the factored form: its mean is at least softplus of the mean.
// The same for every thread of a block.
__device__ bool is_too_small(const float* means, const float* w2, int units) {
  __shared__ float of_warps[2][kThreads / kWarp];
  float strength = 0, full = 0;
  for (int unit = threadIdx.x; unit < units; unit += kThreads) {
    float value = w2[unit] * softplus(means[unit]);
    strength = fmaf(value, value, strength);
    full = fmaf(w2[unit], w2[unit], full);
  }
  strength = warp_sum(strength);
  full = warp_sum(full);
  if (threadIdx.x % kWarp == 0) {
    of_warps[0][threadIdx.x / kWarp] = strength;
    of_warps[1][threadIdx.x / kWarp] = full;
  }
  __syncthreads();
  strength = full = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    strength += of_warps[0][warp];
    full += of_warps[1][warp];
  }
  return !(strength >= kLeastSoftplus * kLeastSoftplus * full);
}

__device__ void exponentiate(float* entries, int64_t size) {
  for (int64_t i = 4 * threadIdx.x; i < size; i += 4 * kThreads) {
    float v[4];
    load4(entries + i, v);
    *reinterpret_cast<float4*>(entries + i) =
        make_float4(exp_accurate(v[0]), exp_accurate(v[1]), exp_accurate(v[2]), exp_accurate(v[3]));
  }
}

constexpr int kMeans = 1024;  // units whose means are in shared memory

// Two tables: block x is a sample's slice.
__global__ void __launch_bounds__(kThreads)
    choose_slices_kernel(const GridField field, float largest, float* rows, float* columns,
                         int32_t* plain) {
  __shared__ float means[kMeans];
  int64_t sample = blockIdx.x / field.slices, slice = blockIdx.x % field.slices;
  rows += sample * field.rows_batch + slice * field.units * field.rows_pitch;
  columns += sample * field.columns_batch + slice * field.units * field.columns_pitch;
  for (int unit = threadIdx.x; unit < field.units; unit += kThreads) means[unit] = 0;
  __syncthreads();
  float largest_row = add_means(rows, field.units, field.rows, field.rows_pitch, means);
  float largest_column = add_means(columns, field.units, field.columns, field.columns_pitch, means);
  bool factored = largest_row <= largest && largest_column <= largest &&
                  !is_too_small(means, field.w2, field.units);
  if (threadIdx.x == 0) plain[blockIdx.x] = !factored;
  if (!factored) return;
  exponentiate(rows, static_cast<int64_t>(field.units) * field.rows_pitch);
  exponentiate(columns, static_cast<int64_t>(field.units) * field.columns_pitch);
}

// The rows of a sample's three tables, one after the other.
struct TableRow {
  float* entries;
  int columns, pitch, rows;  // rows: how many the table has
};

__device__ __forceinline__ TableRow table_row(const GridField& field, float* rows, float* columns,
                                              float* third, int64_t sample, int number) {
  int64_t units = field.units;
  if (number < field.slices)
    return {rows + sample * field.rows_batch + number * units * field.rows_pitch, field.rows,
            field.rows_pitch, field.slices};
  number -= field.slices;
  if (number < field.slices)
    return {columns + sample * field.columns_batch + number * units * field.columns_pitch,
            field.columns, field.columns_pitch, field.slices};
  number -= field.slices;
  return {third + (sample * field.rows + number) * units * field.columns_pitch, field.columns,
          field.columns_pitch, field.rows};
}

// Three tables: block x is a sample's row of a table, whose units' shares in the table's mean and
// whose largest magnitude go to statistics[block].
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const GridField field, float* rows, float* columns, float* third,
                      float* statistics) {
  int count = 2 * field.slices + field.rows;
  TableRow row = table_row(field, rows, columns, third, blockIdx.x / count, blockIdx.x % count);
  statistics += static_cast<int64_t>(blockIdx.x) * (field.units + 1);
  for (int unit = threadIdx.x; unit < field.units; unit += kThreads) statistics[unit] = 0;
  __syncthreads();
  float largest = add_means(row.entries, field.units, row.columns, row.pitch, statistics);
  for (int unit = threadIdx.x; unit < field.units; unit += kThreads)
    statistics[unit] /= static_cast<float>(row.rows);
  if (threadIdx.x == 0) statistics[field.units] = largest;
}

// Block x is a sample.
__global__ void __launch_bounds__(kThreads)
    choose_samples_kernel(const GridField field, float largest, const float* statistics,
                          int32_t* plain) {
  __shared__ float means[kMeans];
  int count = 2 * field.slices + field.rows, size = field.units + 1;
  statistics += static_cast<int64_t>(blockIdx.x) * count * size;
  for (int unit = threadIdx.x; unit < field.units; unit += kThreads) {
    float sum = 0;
    for (int row = 0; row < count; ++row)
      sum += statistics[static_cast<int64_t>(row) * size + unit];
    means[unit] = sum;
  }
  int beyond = 0;
  for (int row = threadIdx.x; row < count; row += kThreads)
    beyond |= !(statistics[static_cast<int64_t>(row) * size + field.units] <= largest);
  beyond = __syncthreads_or(beyond);
  bool too_small = is_too_small(means, field.w2, field.units);
  if (threadIdx.x == 0) plain[blockIdx.x] = beyond || too_small;
}

__global__ void __launch_bounds__(kThreads)
    exponentiate_kernel(const GridField field, float* rows, float* columns, float* third,
                        const int32_t* plain) {
  int count = 2 * field.slices + field.rows;
  int64_t sample = blockIdx.x / count;
  if (plain[sample]) return;
  TableRow row = table_row(field, rows, columns, third, sample, blockIdx.x % count);
  exponentiate(row.entries, static_cast<int64_t>(field.units) * row.pitch);
}

}  // namespace

// ----------------------------------------------------------------------------------- launchers

cudaError_t choose_forms(const GridField& field, int batch, float largest, float* rows_table,
                         float* columns_table, float* third_table, int32_t* plain,
                         float* statistics, cudaStream_t stream) {
  if (is_empty(field, batch)) return cudaSuccess;
  if (field.units > kMeans) return cudaErrorInvalidValue;
  if (third_table == nullptr)
    return launch(choose_slices_kernel, dim3(static_cast<unsigned>(batch) * field.slices), kThreads,
                  stream, field, largest, rows_table, columns_table, plain);
  dim3 grid(static_cast<unsigned>(batch) * (2 * field.slices + field.rows));
  cudaError_t status = launch(statistics_kernel, grid, kThreads, stream, field, rows_table,
                              columns_table, third_table, statistics);
  if (status != cudaSuccess) return status;
  status = launch(choose_samples_kernel, dim3(static_cast<unsigned>(batch)), kThreads, stream,
                  field, largest, statistics, plain);
  if (status != cudaSuccess) return status;
  return launch(exponentiate_kernel, grid, kThreads, stream, field, rows_table, columns_table,
                third_table, plain);
}

cudaError_t density_grid(const GridField& field, int batch, Volume sigma, cudaStream_t stream) {
  if (is_empty(field, batch)) return cudaSuccess;
  bool vectors = takes_vectors(sigma, field.columns);
  return with_tile(field, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(density_kernel<Tile>, tiles_of<Tile>(field, batch), kThreads, stream, field,
                  sigma, vectors);
  });
}

int loss_partials(const GridField& field) {
  int count = 0;
  with_tile(field, [&](auto tile) {
    dim3 grid = tiles_of<decltype(tile)>(field, 1);
    count = static_cast<int>(grid.x * grid.y);
    return cudaSuccess;
  });
  return count;
}

cudaError_t density_grid_loss(const GridField& ours, const GridField* theirs, Volume target,
                              int batch, Difference kind, const float* scale, float* errors,
                              Volume d_ours, Volume d_theirs, cudaStream_t stream) {
  if (is_empty(ours, batch)) return cudaSuccess;
  GridField other = theirs ? *theirs : GridField{};
  return with_tile(ours, [&](auto tile) {
    using Tile = decltype(tile);
    return launch(loss_kernel<Tile>, tiles_of<Tile>(ours, batch), kThreads, stream, ours, other,
                  target, kind, scale, errors, d_ours, d_theirs);
  });
}

bool is_gradient(Volume d_sigma, int slices, int rows, int columns, bool third) {
  return takes_vectors(d_sigma, columns) && rows % kGradientPadding == 0 &&
         (!third || slices % kGradientPadding == 0);
}

cudaError_t raw_gradient(Volume d_sigma, Volume sigma, int batch, int slices, int rows, int columns,
                         Output output, Gradient raw, cudaStream_t stream) {
  if (batch == 0 || raw.slices == 0 || raw.rows == 0 || columns == 0) return cudaSuccess;
  if (output == Output::identity) sigma.data = nullptr;
  dim3 grid(static_cast<unsigned>(batch) * raw.slices, static_cast<unsigned>(raw.rows));
  return launch(raw_gradient_kernel, grid, kThreads, stream, d_sigma, sigma, slices, rows, columns,
                output, raw);
}

cudaError_t density_grid_backward(const GridField& field, int batch, Gradient gradient,
                                  float* d_rows, float* d_columns, float* d_third, float* d_w2,
                                  cudaStream_t stream) {
  if (is_empty(field, batch)) return cudaSuccess;
  int64_t units = field.units;
  SweepTables tables{};
  tables.rows = field.rows_table;
  tables.columns = field.columns_table;
  tables.third = field.third_table;
  tables.rows_batch = field.rows_batch;
  tables.rows_slice = units * field.rows_pitch;
  tables.rows_unit = field.rows_pitch;
  tables.rows_row = 1;
  tables.columns_batch = field.columns_batch;
  tables.columns_slice = units * field.columns_pitch;
  tables.third_batch = field.rows * units * field.columns_pitch;
  tables.third_row = units * field.columns_pitch;
  tables.slices = field.slices;
  tables.n_rows = field.rows;
  tables.n_columns = field.columns;
  tables.units = field.units;
  tables.pitch = field.columns_pitch;
  tables.w2 = field.w2;
  tables.plain = field.plain;
  tables.plain_batch = field.plain_batch;
  tables.plain_slice = field.third_table ? 0 : 1;
  tables.hidden = field.hidden;
  auto sweep = [&](auto with_w2) {
    constexpr bool need_w2 = decltype(with_w2)::value;
    return field.third_table ? run_sweep<Sweep::three, need_w2>(tables, batch, gradient, d_rows,
                                                                d_columns, d_w2, stream)
                             : run_sweep<Sweep::two, need_w2>(tables, batch, gradient, d_rows,
                                                              d_columns, d_w2, stream);
  };
  cudaError_t status = d_w2 ? sweep(std::true_type()) : sweep(std::false_type());
  if (status != cudaSuccess || field.third_table == nullptr) return status;

  // Rows and slices exchange their parts; with them the second table and the third.
  SweepTables exchanged = tables;
  exchanged.columns = tables.third;
  exchanged.third = tables.columns;
  exchanged.rows_slice = tables.rows_row;
  exchanged.rows_row = tables.rows_slice;
  exchanged.columns_batch = tables.third_batch;
  exchanged.columns_slice = tables.third_row;
  exchanged.third_batch = tables.columns_batch;
  exchanged.third_row = tables.columns_slice;
  exchanged.slices = tables.n_rows;
  exchanged.n_rows = tables.slices;
  std::swap(gradient.slice_stride, gradient.row_stride);
  return run_sweep<Sweep::third, false>(exchanged, batch, gradient, nullptr, d_third, nullptr,
                                        stream);
}

}  // namespace densityrl::cuda
