// Planes to tables on a regular grid, with the decoder's first layer applied, and back.
//
// On an axis-aligned grid a bilinear lookup depends on two grid indices, and its weights are a
// product of a weight along each axis, so a plane is resampled once for all voxels:
//
//   table[r, h, c] = bias[h] + sum_planes sum_k W[h, k] F[k](r, c)
//   F[k](r, c) = sum_pixels R_r[r, y] R_c[c, x] plane[k](y, x)
//
// with R the resampling matrices, two entries a row. The way back is
//
//   dF[k](r, c) = sum_h W[h, k] d_table[r, h, c]
//   dW[h, k] = sum_{r, c} d_table[r, h, c] F[k](r, c)
//   d_plane[k](y, x) = sum_{r, c} R_r[r, y] R_c[c, x] dF[k](r, c)
//
// and the last is a gather as well, because the grid points that have a pixel as one of their two
// are a range. Of dW, blocks leave partial sums. No atomics: the same bits at every run. As in the
// reference, a pixel of weight 0 still counts where it is NaN.

#include <algorithm>

#include "device.cuh"

namespace densityrl::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ------------------------------------------------------------------------------ number types

struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}

template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat16 narrow(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // ties to even
}

// ------------------------------------------------------------------------------------ vectors

__device__ __forceinline__ void load4(const float* from, float* to) {
  float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void store4(float* to, const float* from) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// Which of four by eight (or eight by four) tiles is a lane's. Vectors of four are read from shared
// memory fastest if neighbours, in either direction, read the same one.
__device__ __forceinline__ int of_four(int lane) { return (lane & 1) | (lane >> 1 & 2); }
__device__ __forceinline__ int of_eight(int lane) { return (lane >> 1 & 1) | (lane >> 2 & 6); }

// ------------------------------------------------------------------------------------ lookups

// Features of a tile of a table are gathered into shared memory, a channel a warp.
constexpr int kTile = 16;  // table rows, and table columns
constexpr int kPoints = kTile * kTile;
constexpr int kFeatures = kPoints + 4;  // stride of a channel: the banks differ
constexpr int kSteps = 4;               // that a lane takes at once

// The two pixels of a grid's row or column, as offsets in the image in bytes, and their weights.
struct alignas(16) Step {
  unsigned low, high;
  float w_low, w_high;
};

// Of a plane along both of a tile's axes: rows, columns.
using Steps = Step[2][kTile];

// Where a point of a tile is among its channel's. Four columns are contiguous. What a warp stores
// together lies in different banks: points of two rows, four apart, or four columns of eight rows.
// Eight rows on is 8 * kTile on, and eight columns on changes the bit of 8.
__device__ __forceinline__ int slot(int row, int column) {
  return (row ^ (row >> 2 & 1)) * kTile + (column ^ (row << 1 & 12));
}

// Points beyond the table's edge repeat the last: what they sum up to is not used, but must not
// bring in NaN from elsewhere.
template <class T>
__device__ __forceinline__ void load_steps(const Table& table, int first_plane, int stop_plane,
                                           int row, int column, Steps* steps) {
  for (int i = threadIdx.x; i < (stop_plane - first_plane) * 2 * kTile; i += kThreads) {
    const TablePlane& plane = table.planes[first_plane + i / (2 * kTile)];
    bool of_columns = i / kTile % 2 != 0;
    const Taps& taps = of_columns ? plane.columns : plane.rows;
    unsigned stride =
        static_cast<unsigned>(of_columns ? plane.column_stride : plane.row_stride) * sizeof(T);
    int point = min((of_columns ? column : row) + i % kTile, taps.count - 1);
    steps[i / (2 * kTile)][of_columns][i % kTile] = {
        taps.index[point] * stride, taps.index[taps.count + point] * stride, taps.weight[point],
        taps.weight[taps.count + point]};
  }
}

// Lookups at some points along the one axis. `low` and `high` are a point's pixels along the other
// axis. `joined`: a point's upper pixel is the next one's lower.
template <bool joined, class T>
__device__ __forceinline__ void walk(const char* low, const char* high, float w_low, float w_high,
                                     const Step* steps, float (&value)[kSteps]) {
  auto load = [&](unsigned offset, float (&pair)[2]) {
    pair[0] = widen(*reinterpret_cast<const T*>(low + offset));
    pair[1] = widen(*reinterpret_cast<const T*>(high + offset));
  };
  auto blend = [&](const float (&pair)[2]) { return fmaf(pair[1], w_high, pair[0] * w_low); };
  float below[kSteps][2], above[kSteps][2];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (!joined || s == 0) load(steps[s].low, below[s]);
    load(steps[s].high, above[s]);
  }
  float last = 0.f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    float next = blend(above[s]);
    value[s] =
        fmaf(next, steps[s].w_high, (joined && s > 0 ? last : blend(below[s])) * steps[s].w_low);
    last = next;
  }
}

// A warp's lookups of one channel of a plane at a tile's points, written or added to `features`.
// 16 lanes go along the axis whose neighbours are nearest in memory, at two points of the other.
template <class T>
__device__ __forceinline__ void gather(const TablePlane& plane, int64_t sample, int channel,
                                       const Steps& steps, bool add, float* features) {
  int lane = threadIdx.x % kWarp;
  bool along_rows = plane.row_stride < plane.column_stride;
  int along = lane % kTile, half = lane / kTile * kSteps;
  const Step* others = steps[along_rows];
  Step mine = steps[!along_rows][along];
  const char* image =
      reinterpret_cast<const char*>(static_cast<const T*>(plane.data) +
                                    sample * plane.batch_stride + channel * plane.channel_stride);
  const char *low = settled(image + mine.low), *high = settled(image + mine.high);
  unsigned joined =
      __ballot_sync(kAllLanes, others[along].high == others[min(along + 1, kTile - 1)].low);
#pragma unroll 1
  for (int first = 0; first < kTile; first += 2 * kSteps, joined >>= 2 * kSteps) {
    float value[kSteps];
    constexpr unsigned kAll = 0x77;  // within four points, and within the next four
    if ((joined & kAll) == kAll)
      walk<true, T>(low, high, mine.w_low, mine.w_high, others + first + half, value);
    else
      walk<false, T>(low, high, mine.w_low, mine.w_high, others + first + half, value);
    if (along_rows) {
      float* at = features + (slot(along, half) ^ first);
      if (add) {
        float before[kSteps];
        load4(at, before);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) value[s] += before[s];
      }
      store4(at, value);
    } else {
      float* at = features + first * kTile + slot(half, along);
      int one = slot(half + 1, along) - slot(half, along);
      int two = slot(half + 2, along) - slot(half, along);
      float* to[kSteps] = {at, at + one, at + two, at + two + one};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) *to[s] = add ? *to[s] + value[s] : value[s];
    }
  }
}

struct Tile {
  int64_t sample;
  int row, column;
};

__device__ __forceinline__ Tile tile_of(const Table& table, unsigned number) {
  unsigned rows = (table.rows + kTile - 1) / kTile, columns = table.pitch / kTile;
  return {number / columns / rows, static_cast<int>(number / columns % rows) * kTile,
          static_cast<int>(number % columns) * kTile};
}

int64_t tile_count(const Table& table) {
  return table.batch * ceil_div(table.rows, kTile) * (table.pitch / kTile);
}

// Neighbours of the same weight: their lookups are summed before it is applied.
struct Sums {
  int count;
  int stop[kMaxPlanes];  // the plane after them, for the first of them
};

Sums sums_of(const Table& table) {
  Sums sums{};
  for (int p = 0, first = 0; p < table.plane_count; ++p) {
    if (p == 0 || table.planes[p].weight != table.planes[p - 1].weight) first = p, ++sums.count;
    sums.stop[first] = p + 1;
  }
  return sums;
}

// ---------------------------------------------------------------------------------- the table

constexpr int kUnits = 64;            // of a block
constexpr int kChannels = kWarps;     // that are in shared memory at once
constexpr int kWeights = kUnits + 4;  // stride of a channel: the banks differ

// A block has a tile of 16 x 16 points and 64 units, a thread 8 points and 8 units of it. Channels
// go through shared memory in chunks: while one is multiplied, the next is gathered. Half of the
// warps gather before they multiply and half after, so that at any time some use the FP32 units
// and some wait for memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    tabulate_kernel(const __grid_constant__ Table table, const float* __restrict__ bias,
                    float* __restrict__ out, const __grid_constant__ Sums sums, int unit_tiles) {
  alignas(16) __shared__ float features[2][kChannels * kFeatures];
  alignas(16) __shared__ float weights[2][kChannels * kWeights];
  __shared__ Steps steps[kMaxPlanes];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Tile tile = tile_of(table, blockIdx.x / unit_tiles);
  int first_unit = static_cast<int>(blockIdx.x % unit_tiles) * kUnits;
  load_steps<T>(table, 0, table.plane_count, tile.row, tile.column, steps);
  __syncthreads();

  int rounds = (table.channels + kChannels - 1) / kChannels * sums.count;

  // Units 4 u to 4 u + 3, and 32 on; points of vector p, four columns of a row, and 8 rows on.
  int u = of_four(lane) + warp % 2 * 4, p = of_eight(lane) + warp / 2 * 8;
  int point = slot(p / 4, p % 4 * 4);
  float sum[8][8] = {};
  int plane = 0, channel = 0;  // to be gathered next
#pragma unroll 1
  for (int round = -1; round < rounds; ++round) {
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if ((phase == 0) == (warp < kWarps / 2)) {
        if (round + 1 == rounds) continue;
        int buffer = (round + 1) % 2;
        int c = threadIdx.x % kChannels, h = threadIdx.x / kChannels;
        const TablePlane& first = table.planes[plane];
        const float* weight =
            first.weight + static_cast<int64_t>(first_unit + h) * first.weight_stride + channel + c;
        float next[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          bool exists = channel + c < table.channels && first_unit + h + 32 * k < table.units;
          next[k] = exists ? weight[static_cast<int64_t>(32 * k) * first.weight_stride] : 0.f;
        }
        int stop = sums.stop[plane];
#pragma unroll 1
        for (int n = plane; n < stop; ++n) {
          // A channel that does not exist repeats the last: its weight is 0.
          gather<T>(table.planes[n], tile.sample, min(channel + warp, table.channels - 1), steps[n],
                    n > plane, features[buffer] + warp * kFeatures);
          __syncwarp();  // another lane may add to what this one has written
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) weights[buffer][c * kWeights + h + 32 * k] = next[k];
        channel += kChannels;
        if (channel >= table.channels) plane = stop, channel = 0;
      } else {
        if (round < 0) continue;
        const float* f = &features[round % 2][point];
        const float* w = &weights[round % 2][4 * u];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          float a[8], b[8];
          load4(w + c * kWeights, a), load4(w + c * kWeights + 32, a + 4);
          load4(f + c * kFeatures, b), load4(f + c * kFeatures + 8 * kTile, b + 4);
#pragma unroll
          for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
        }
      }
    }
    __syncthreads();
  }

  int column = tile.column + p % 4 * 4, row = tile.row + p / 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int unit = first_unit + 4 * u + (i < 4 ? i : 28 + i);
    float constant = bias != nullptr && unit < table.units ? bias[unit] : 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i][j] += constant;
  }
  if (tile.column + kTile > table.columns) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (column + j % 4 >= table.columns) sum[i][j] = 0.f;
  }
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    int unit = first_unit + 4 * u + quarter / 2 * 32, line = row + quarter % 2 * 8;
    if (line >= table.rows) continue;
    float* to = settled(
        out + ((tile.sample * table.rows + line) * table.units + unit) * table.pitch + column);
#pragma unroll
    for (int i = 0; i < 4; ++i, to += table.pitch)
      if (unit + i < table.units) store4(to, &sum[quarter / 2 * 4 + i][quarter % 2 * 4]);
  }
}

// ------------------------------------------------------------- the gradient by what is looked up

// One for every weight of a table.
struct FeatureGradients {
  int count;
  const float* weight[kMaxPlanes];
  int weight_stride[kMaxPlanes];
  float* d_features[kMaxPlanes];
};

constexpr int kGradientThreads = 128;
constexpr int kGradientChannels = 32;  // of a block
constexpr int kChunk = 8;              // units that are in shared memory at once

// A block has 256 points and 32 channels, a thread 8 of each. The points are 16 pieces of 16
// columns, from any lines (rows of a sample).
__global__ void __launch_bounds__(kGradientThreads, 3)
    feature_gradient_kernel(const float* __restrict__ d_table,
                            const __grid_constant__ FeatureGradients gradients, int units,
                            int channels, int pitch, int64_t lines) {
  alignas(16) __shared__ float d[2][kChunk][kPoints];
  alignas(16) __shared__ float weights[2][kChunk][kGradientChannels];
  int channel_tiles = static_cast<int>(ceil_div(channels, kGradientChannels));
  int number = blockIdx.y / channel_tiles;
  int first_channel = static_cast<int>(blockIdx.y % channel_tiles) * kGradientChannels;
  const float* weight = gradients.weight[number];
  int weight_stride = gradients.weight_stride[number];
  unsigned first_piece = blockIdx.x * (kPoints / kTile), pieces = pitch / kTile;

  // What a thread moves: four points of every other unit; one channel of every fourth unit.
  int points = threadIdx.x % (kPoints / 4) * 4, h_points = threadIdx.x / (kPoints / 4);
  int c = threadIdx.x % kGradientChannels, h_weight = threadIdx.x / kGradientChannels;
  unsigned piece = first_piece + points / kTile;
  bool exists = piece / pieces < lines;
  const float* from = d_table + static_cast<int64_t>(piece / pieces) * units * pitch +
                      piece % pieces * kTile + points % kTile;
  float4 next_d[4];
  float next_weight[2];
  auto load = [&](int unit) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int h = unit + h_points + 2 * k;
      next_d[k] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (exists && h < units)
        next_d[k] = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(h) * pitch);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      int h = unit + h_weight + 4 * k;
      next_weight[k] = 0.f;
      if (h < units && first_channel + c < channels)
        next_weight[k] = weight[static_cast<int64_t>(h) * weight_stride + first_channel + c];
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      *reinterpret_cast<float4*>(&d[buffer][h_points + 2 * k][points]) = next_d[k];
#pragma unroll
    for (int k = 0; k < 2; ++k) weights[buffer][h_weight + 4 * k][c] = next_weight[k];
  };

  // Points 4 p to 4 p + 3, and 128 on; channels 4 k to 4 k + 3, and 16 on.
  int lane = threadIdx.x % kWarp;
  int p = of_eight(lane) + static_cast<int>(threadIdx.x) / kWarp * 8, k = of_four(lane);
  float sum[8][8] = {};  // [point][channel]
  load(0);
  store(0);
  __syncthreads();
  for (int unit = 0, buffer = 0; unit < units; unit += kChunk, buffer ^= 1) {
    bool more = unit + kChunk < units;
    if (more) load(unit + kChunk);
#pragma unroll
    for (int h = 0; h < kChunk; ++h) {
      float a[8], b[8];
      load4(&d[buffer][h][4 * p], a), load4(&d[buffer][h][4 * p + 128], a + 4);
      load4(&weights[buffer][h][4 * k], b), load4(&weights[buffer][h][4 * k + 16], b + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    if (more) store(buffer ^ 1);
    __syncthreads();
  }

  int blocks = static_cast<int>(ceil_div(channels, kFeatureBlock));
  float* out = gradients.d_features[number];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned at = first_piece + (4 * p + 128 * half) / kTile;
    int64_t line = at / pieces, column = at % pieces * kTile + 4 * p % kTile;
    if (line >= lines) continue;
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      int channel = first_channel + 4 * k + 16 * quarter;
      if (channel >= blocks * kFeatureBlock) continue;
      float* to = out +
                  ((line * blocks + channel / kFeatureBlock) * pitch + column) * kFeatureBlock +
                  channel % kFeatureBlock;
#pragma unroll
      for (int i = 0; i < 4; ++i) store4(to + i * kFeatureBlock, &sum[4 * half + i][4 * quarter]);
    }
  }
}

// ----------------------------------------------------------------------- the weight's gradient

constexpr int kWeightChannels = 32;  // of a block, with 64 units
constexpr int kRowsAtOnce = 2;
constexpr int kGradients = kRowsAtOnce * kTile + 4;  // stride of a unit: the banks differ

// A block goes through tiles of the table. Its warps share the points and have all of the block's
// 64 units and 32 channels, a lane 8 of each; at the end the warps' sums are added.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    weight_gradient_kernel(const __grid_constant__ Table table, const float* __restrict__ d_table,
                           const __grid_constant__ WeightPartials partials,
                           const __grid_constant__ Sums sums, unsigned tiles) {
  alignas(16) __shared__ float features[kWeightChannels * kFeatures];
  alignas(16) __shared__ float d[kUnits * kGradients];
  __shared__ Steps steps[kMaxPlanes];
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // y: channels, fastest, then units, then weights.
  int channel_tiles = static_cast<int>(ceil_div(table.channels, kWeightChannels));
  int unit_tiles = static_cast<int>(ceil_div(table.units, kUnits));
  int first_channel = static_cast<int>(blockIdx.y % channel_tiles) * kWeightChannels;
  int first_unit = static_cast<int>(blockIdx.y / channel_tiles % unit_tiles) * kUnits;
  int plane = 0;
  for (int n = blockIdx.y / (channel_tiles * unit_tiles); n > 0; --n) plane = sums.stop[plane];
  int stop = sums.stop[plane];

  // A warp has four of the 32 points of two rows, a lane units lane_unit + 8 i, channels
  // lane_channel + 4 j. A thread moves four columns of two units, 32 apart, to shared memory.
  int lane_unit = of_eight(lane), lane_channel = of_four(lane);
  int moved_unit = threadIdx.x / 8, moved_row = threadIdx.x / 4 % 2;
  int moved_column = threadIdx.x % 4 * 4;
  float sum[8][8] = {};
  float bias[2] = {};
  for (unsigned number = blockIdx.x; number < tiles; number += gridDim.x) {
    Tile tile = tile_of(table, number);
    load_steps<T>(table, plane, stop, tile.row, tile.column, steps);
    __syncthreads();
#pragma unroll 1
    for (int n = plane; n < stop; ++n) {
#pragma unroll 1
      for (int c = warp; c < kWeightChannels && first_channel + c < table.channels; c += kWarps)
        gather<T>(table.planes[n], tile.sample, first_channel + c, steps[n - plane], n > plane,
                  features + c * kFeatures);
      __syncwarp();
    }
    __syncthreads();
    int rows = min(table.rows - tile.row, kTile), left = table.columns - tile.column - moved_column;
    const float* from = d_table +
                        ((tile.sample * table.rows + tile.row + moved_row) * table.units +
                         first_unit + moved_unit) *
                            table.pitch +
                        tile.column + moved_column;
    float next[2][4];
    auto load = [&](int row) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float value[4] = {};
        if (row + moved_row < rows && first_unit + moved_unit + 32 * k < table.units)
          load4(from + static_cast<int64_t>(32 * k) * table.pitch, value);
#pragma unroll
        for (int j = 0; j < 4; ++j) next[k][j] = j < left ? value[j] : 0.f;
      }
      from += static_cast<int64_t>(kRowsAtOnce) * table.units * table.pitch;
    };
    load(0);
#pragma unroll 1
    for (int row = 0; row < rows; row += kRowsAtOnce) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        store4(d + (moved_unit + 32 * k) * kGradients + moved_row * kTile + moved_column, next[k]);
        bias[k] += (next[k][0] + next[k][1]) + (next[k][2] + next[k][3]);
      }
      __syncthreads();
      if (row + kRowsAtOnce < rows) load(row + kRowsAtOnce);
      float a[8][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) load4(d + (lane_unit + 8 * i) * kGradients + 4 * warp, a[i]);
      const float* f = features + lane_channel * kFeatures + slot(row + warp / 4, warp % 4 * 4);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float b[4];
        load4(f + 4 * j * kFeatures, b);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[i][j] = fmaf(a[i][k], b[k], sum[i][j]);
      }
      __syncthreads();
    }
  }

  // The features' memory holds the sums of four warps.
  constexpr int kSums = kUnits * kWeightChannels;
  static_assert(4 * kSums <= kWeightChannels * kFeatures);
  float* mine = features + warp % 4 * kSums + lane;
  if (warp >= 4) {
#pragma unroll
    for (int n = 0; n < 64; ++n) mine[n * kWarp] = sum[n / 8][n % 8];
  }
  __syncthreads();
  if (warp < 4) {
#pragma unroll
    for (int n = 0; n < 64; ++n) mine[n * kWarp] += sum[n / 8][n % 8];
  }
  __syncthreads();
  float* out = partials.weights[plane];
  if (out != nullptr) {
    out += blockIdx.x * partials.partial_stride;
    for (int n = warp; n < 64; n += kWarps) {
      const float* of_warps = features + n * kWarp + lane;
      float total = (of_warps[0] + of_warps[kSums]) + (of_warps[2 * kSums] + of_warps[3 * kSums]);
      int unit = first_unit + lane_unit + n / 8 * 8;
      int channel = first_channel + lane_channel + n % 8 * 4;
      if (unit < table.units && channel < table.channels)
        out[static_cast<int64_t>(unit) * partials.unit_stride + channel] = total;
    }
  }
  if (partials.bias == nullptr || plane > 0 || first_channel > 0) return;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    for (int step = 1; step < 8; step *= 2) bias[k] += __shfl_xor_sync(kAllLanes, bias[k], step);
    int unit = first_unit + moved_unit + 32 * k;
    if (lane % 8 == 0 && unit < table.units)
      partials.bias[static_cast<int64_t>(blockIdx.x) * table.units + unit] = bias[k];
  }
}

// ------------------------------------------------------------------------ the planes' gradients

constexpr int kPixelThreads = 512;
constexpr int kPixels = 32;  // of a block, along both axes
constexpr int kRows = 40;    // table rows that are in shared memory at once
constexpr int kRowPitch = 33;
constexpr int kBlockPitch = 1324;  // of a channel: the banks differ
static_assert(kBlockPitch >= kRows * kRowPitch);

struct PlaneGradients {
  const float* d_features[kMaxPlanes];
  PlaneGradient planes[kMaxPlanes];
};

// A point's two pixels along an axis, and their weights.
struct alignas(16) PixelTaps {
  int low, high;
  float w_low, w_high;
};

__device__ __forceinline__ PixelTaps taps_of(const Taps& taps, int point) {
  return {taps.index[point], taps.index[taps.count + point], taps.weight[point],
          taps.weight[taps.count + point]};
}

// The weight of a pixel in a point's lookup: both of the point's pixels can be the same one.
__device__ __forceinline__ float weight_of(int pixel, const PixelTaps& taps) {
  return (taps.low == pixel ? taps.w_low : 0.f) + (taps.high == pixel ? taps.w_high : 0.f);
}

// A block has 32 x 32 pixels of 8 channels. It sums over table columns first, for some of the rows
// that reach its pixels, then over these rows.
template <class T>
__global__ void __launch_bounds__(kPixelThreads, 2)
    plane_gradient_kernel(const __grid_constant__ Table table,
                          const __grid_constant__ PlaneGradients gradients) {
  __shared__ float summed[kFeatureBlock * kBlockPitch];  // over columns: [channel][row][pixel]
  __shared__ PixelTaps row_taps[kRows];
  int number = blockIdx.y;
  const TablePlane& plane = table.planes[number];
  const Taps &rows = plane.rows, &columns = plane.columns;
  unsigned across = (columns.size + kPixels - 1) / kPixels;
  unsigned down = (rows.size + kPixels - 1) / kPixels;
  unsigned blocks = (table.channels + kFeatureBlock - 1) / kFeatureBlock;
  unsigned block = blockIdx.x;
  int x0 = static_cast<int>(block % across) * kPixels;
  block /= across;
  int y0 = static_cast<int>(block % down) * kPixels;
  block /= down;
  int channel_block = static_cast<int>(block % blocks);
  int64_t sample = block / blocks;
  if (sample >= table.batch) return;  // another plane has more blocks
  const float* d_features =
      gradients.d_features[number] +
      (sample * table.rows * blocks + channel_block) * table.pitch * kFeatureBlock;
  int row_stride = static_cast<int>(blocks) * table.pitch * kFeatureBlock;

  constexpr int kSlices = kPixelThreads / 64, kPixelWarps = kPixelThreads / kWarp;
  constexpr int kOwn = kPixels / kPixelWarps, kRowsOfThread = 4;
  // First a thread has 4 channels of one column of pixels, and every eighth row; then all channels
  // of 2 pixels, such that what a warp writes is contiguous.
  int part = threadIdx.x % 2 * 4, x = threadIdx.x / 2 % kPixels, slice = threadIdx.x / 64;
  const PlaneGradient& out = gradients.planes[number];
  bool along_rows = out.row_stride == 1;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float sum[kOwn][kFeatureBlock] = {};
  int last_y = min(y0 + kPixels, rows.size) - 1;
  int last_row = rows.reach[rows.size + last_y];
#pragma unroll 1
  for (int first = rows.reach[y0]; first < last_row; first += kRows) {
    int stop = min(first + kRows, last_row);
    for (int r = threadIdx.x; r < stop - first; r += kPixelThreads)
      row_taps[r] = taps_of(rows, first + r);
#pragma unroll 1
    for (int row = first + slice; row < stop; row += kRowsOfThread * kSlices) {
      float value[kRowsOfThread][4] = {};
      int point = x0 + x < columns.size ? columns.reach[x0 + x] : 0;
      int end = x0 + x < columns.size ? columns.reach[columns.size + x0 + x] : 0;
#pragma unroll 1
      for (; point < end; ++point) {
        float w = weight_of(x0 + x, taps_of(columns, point));
        const float* from = settled(d_features + static_cast<int64_t>(row) * row_stride +
                                    point * kFeatureBlock + part);
#pragma unroll
        for (int k = 0; k < kRowsOfThread; ++k) {
          float d[4];
          load4(from, d);
#pragma unroll
          for (int c = 0; c < 4; ++c) value[k][c] = fmaf(w, d[c], value[k][c]);
          if (row + kSlices * (k + 1) < stop) from += kSlices * row_stride;
        }
      }
#pragma unroll
      for (int k = 0; k < kRowsOfThread; ++k) {
        if (row + kSlices * k >= stop) break;
#pragma unroll
        for (int c = 0; c < 4; ++c)
          summed[(part + c) * kBlockPitch + (row + kSlices * k - first) * kRowPitch + x] =
              value[k][c];
      }
    }
    __syncthreads();

#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      int y = y0 + (along_rows ? lane : warp + kPixelWarps * k);
      int at = along_rows ? warp + kPixelWarps * k : lane;
      int from = y < rows.size ? max(rows.reach[y], first) : 0;
      int to = y < rows.size ? min(rows.reach[rows.size + y], stop) : 0;
#pragma unroll 1
      for (int r = from - first; r < to - first; ++r) {
        float w = weight_of(y, row_taps[r]);
#pragma unroll
        for (int c = 0; c < kFeatureBlock; ++c)
          sum[k][c] = fmaf(w, summed[c * kBlockPitch + r * kRowPitch + at], sum[k][c]);
      }
    }
    __syncthreads();
  }

  T* data = static_cast<T*>(out.data) + sample * out.batch_stride;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    int y = y0 + (along_rows ? lane : warp + kPixelWarps * k);
    int at = x0 + (along_rows ? warp + kPixelWarps * k : lane);
    if (y >= rows.size || at >= columns.size) continue;
    T* to = data + y * out.row_stride + at * out.column_stride;
#pragma unroll
    for (int c = 0; c < kFeatureBlock; ++c) {
      int channel = channel_block * kFeatureBlock + c;
      if (channel < table.channels) to[channel * out.channel_stride] = narrow<T>(sum[k][c]);
    }
  }
}

// ---------------------------------------------------------------------------------- launching

bool is_valid(const Table& table) {
  if (table.plane_count < 0 || table.plane_count > kMaxPlanes) return false;
  if (table.pitch % kTablePadding != 0 || table.pitch < table.columns) return false;
  for (int p = 0; p < table.plane_count; ++p) {
    const TablePlane& plane = table.planes[p];
    int64_t farthest =
        (plane.rows.size - 1) * plane.row_stride + (plane.columns.size - 1) * plane.column_stride;
    if (farthest >= int64_t{1} << 30 || plane.rows.count != table.rows ||
        plane.columns.count != table.columns)
      return false;
  }
  return true;
}

bool is_empty(const Table& table) {
  return table.batch == 0 || table.units == 0 || table.rows == 0 || table.columns == 0;
}

template <class Call>
cudaError_t with_type(Number number, Call call) {
  if (number == Number::bfloat16) return call(BFloat16());
  return number == Number::float16 ? call(__half()) : call(float());
}

cudaError_t feature_gradients(const Table& table, const float* d_table, float* const* d_features,
                              cudaStream_t stream) {
  FeatureGradients gradients{};
  Sums sums = sums_of(table);
  for (int p = 0; p < table.plane_count; p = sums.stop[p]) {
    if (d_features[p] == nullptr) continue;
    gradients.weight[gradients.count] = table.planes[p].weight;
    gradients.weight_stride[gradients.count] = table.planes[p].weight_stride;
    gradients.d_features[gradients.count++] = d_features[p];
  }
  if (gradients.count == 0) return cudaSuccess;
  int64_t lines = static_cast<int64_t>(table.batch) * table.rows;
  int64_t pieces = lines * (table.pitch / kTile);
  dim3 grid(static_cast<unsigned>(ceil_div(pieces, kPoints / kTile)),
            static_cast<unsigned>(gradients.count * ceil_div(table.channels, kGradientChannels)));
  return launch(feature_gradient_kernel, grid, kGradientThreads, stream, d_table, gradients,
                table.units, table.channels, table.pitch, static_cast<unsigned>(lines));
}

cudaError_t weight_gradients(const Table& table, const float* d_table,
                             const WeightPartials& partials, cudaStream_t stream) {
  Sums sums = sums_of(table);
  int64_t weights =
      sums.count * ceil_div(table.units, kUnits) * ceil_div(table.channels, kWeightChannels);
  if (weights == 0 || partials.count == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(partials.count), static_cast<unsigned>(weights));
  return with_type(table.number, [&](auto number) {
    return launch(weight_gradient_kernel<decltype(number)>, grid, kThreads, stream, table, d_table,
                  partials, sums, static_cast<unsigned>(tile_count(table)));
  });
}

}  // namespace

cudaError_t tabulate(const Table& table, const float* bias, float* out, cudaStream_t stream) {
  if (!is_valid(table)) return cudaErrorInvalidValue;
  if (is_empty(table)) return cudaSuccess;
  int unit_tiles = static_cast<int>(ceil_div(table.units, kUnits));
  dim3 grid(static_cast<unsigned>(tile_count(table) * unit_tiles));
  return with_type(table.number, [&](auto number) {
    return launch(tabulate_kernel<decltype(number)>, grid, kThreads, stream, table, bias, out,
                  sums_of(table), unit_tiles);
  });
}

// Every block has the same number of tiles, or one less.
int weight_partials(const Table& table) {
  constexpr int64_t kMost = 512;
  int64_t tiles = tile_count(table);
  return tiles == 0 ? 0 : static_cast<int>(ceil_div(tiles, ceil_div(tiles, kMost)));
}

cudaError_t table_backward(const Table& table, const float* d_table, float* const* d_features,
                           const WeightPartials* partials, cudaStream_t stream) {
  if (!is_valid(table)) return cudaErrorInvalidValue;
  if (is_empty(table)) return cudaSuccess;
  if (d_features != nullptr) {
    cudaError_t status = feature_gradients(table, d_table, d_features, stream);
    if (status != cudaSuccess) return status;
  }
  return partials == nullptr ? cudaSuccess : weight_gradients(table, d_table, *partials, stream);
}

cudaError_t plane_gradients(const Table& table, const float* const* d_features,
                            const PlaneGradient* d_planes, cudaStream_t stream) {
  if (!is_valid(table)) return cudaErrorInvalidValue;
  PlaneGradients gradients{};
  int64_t most = 0;
  for (int p = 0; p < table.plane_count; ++p) {
    gradients.d_features[p] = d_features[p];
    gradients.planes[p] = d_planes[p];
    most = std::max(most, ceil_div(table.planes[p].rows.size, kPixels) *
                              ceil_div(table.planes[p].columns.size, kPixels));
  }
  most *= table.batch * ceil_div(table.channels, kFeatureBlock);
  if (most == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(most), static_cast<unsigned>(table.plane_count));
  return with_type(table.number, [&](auto number) {
    return launch(plane_gradient_kernel<decltype(number)>, grid, kPixelThreads, stream, table,
                  gradients);
  });
}

}  // namespace densityrl::cuda
