// Features and density at arbitrary points: one pass from planes to sigma, and back.
//
// Planes lie channels-last, so the four pixels around a point are four runs of channels. A warp
// takes 32 points (or 16) through four steps:
//
//   corners   a lane works out one point's pixels and their weights on a plane
//   gather    four lanes, a quad, share a point: of 32 channels each loads 8, 16 bytes at a time,
//             and blends and reduces them over the planes in registers
//   decoder   the first layer on the tensor cores, with the hidden units' values in registers
//   output    the density row as a dot product in float32, other rows on the tensor cores again
//
// Nothing is rearranged between the steps. A matrix product does not mind in which order it sums:
// channel k of the fragments of mma.m16n8k8 can be any that the lane has gathered, if the weights
// are laid out likewise; and hidden units 2t and 2t + 1, which a lane has of one product's result,
// can be rows t and t + 4 of the next one's operand.
//
// The tensor cores' tf32 has 11 of a float's 24 bits. Numbers are split into two of them, and a
// product is made of three.
//
// The backward recomputes. The warps of a block take 16 points each, and share the work on the
// gradient of 32 columns of a weight, which stays in registers until the last tile; its sums have a
// fixed order. The gradient by the features goes to memory, and a second kernel carries it on to
// the planes (by atomic additions: the one thing here that has no fixed order) and to the points.

#include <algorithm>
#include <type_traits>

#include "device.cuh"

namespace densityrl::cuda {

namespace {

// A warp has eight points at a time, its rows.
constexpr int kQuad = 4;
constexpr int kWarpRows = kWarp / kQuad;

// Of a block of 32 channels a lane has 8, in its slots. Two slots are a step of a matrix product.
constexpr int kSlots = 8;
constexpr int kBlock = kQuad * kSlots;
constexpr int kBlockSteps = kSlots / 2;
constexpr int kMaxSteps = kMaxWidth / 8;

constexpr int kUnitTiles = kMaxUnits / 8;

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int row_of_lane() { return lane() / kQuad; }
__device__ __forceinline__ int quarter() { return lane() % kQuad; }

// The channel of a block that is in a slot of a quad's lane.
template <int vector>
__host__ __device__ constexpr int channel_of(int quarter, int slot) {
  return slot / vector * kQuad * vector + quarter * vector + slot % vector;
}

// How many steps of a matrix product so many channels of a block take. An even number: steps are
// done in pairs.
template <int vector>
__host__ __device__ constexpr int steps_of(int channels) {
  int slots = (channels + kQuad * vector - 1) / (kQuad * vector) * vector;
  return channels < kBlock ? (slots + 3) / 4 * 2 : kBlockSteps;
}

// ------------------------------------------------------------------------------------- reading

// Channels that a lane loads as one vector, of a number known to the compiler.
template <Number number, int vector>
struct Vectors {
  static constexpr int kVector = vector;
  static constexpr unsigned kBytes = vector * (number == Number::float32 ? 4 : 2);

  // Of a channel: given what the launcher says.
  __device__ __forceinline__ static unsigned bytes(unsigned) { return kBytes / vector; }

  __device__ __forceinline__ static void load(const char* at, Number, float (&to)[vector]) {
    uint32_t words[kBytes / 4];
    if constexpr (kBytes == 16) {
      uint4 v = __ldg(reinterpret_cast<const uint4*>(at));
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      uint2 v = __ldg(reinterpret_cast<const uint2*>(at));
      words[0] = v.x, words[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < vector; ++i) {
      if constexpr (number == Number::float32)
        to[i] = __uint_as_float(words[i]);
      else if constexpr (number == Number::bfloat16)
        to[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
      else
        to[i] = __half2float(
            __half(__half_raw{static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16))}));
    }
  }
};

// One channel at a time, of any number.
struct Singles {
  static constexpr int kVector = 1;

  __device__ __forceinline__ static unsigned bytes(unsigned given) { return given; }

  __device__ __forceinline__ static void load(const char* at, Number number, float (&to)[1]) {
    if (number == Number::float32) {
      to[0] = __ldg(reinterpret_cast<const float*>(at));
      return;
    }
    unsigned short bits = __ldg(reinterpret_cast<const unsigned short*>(at));
    to[0] = number == Number::bfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                       : __half2float(__half(__half_raw{bits}));
  }
};

// -------------------------------------------------------------------------------------- lookup

// A side of an image. A point's pixel along it is gain * coordinate + offset, and beyond lowest and
// highest these.
struct Side {
  int size, axis;
  float gain, offset, lowest, highest;
};

struct Image {
  const char* data;
  int64_t batch_bytes;
  Side across, down;
};

// A PointField as the kernels take it. A tile is a warp's points.
struct Lookup {
  Image images[kMaxPlanes];
  int planes, channels, parts;
  unsigned width, channel_bytes, pixel_bytes;  // unsigned where 64-bit numbers are multiplied
  Number number;
  Combine combine;
  bool border;
  int64_t count;
  const float* points;
  int64_t points_stride;
  unsigned tiles, sample_tiles;
};

__host__ __device__ constexpr int blocks_of(int channels) {
  return (channels + kBlock - 1) / kBlock;
}

// A block of channels of some planes, reduced, and where it goes: to the columns of the feature
// from `column` on, and to so many steps of the product with the first layer.
template <class Channels>
struct Part {
  int number, from, to;  // the latter are planes
  int channel, column;
  int step, steps;

  __device__ __forceinline__ explicit Part(const Lookup& lookup)
      : number(0),
        from(0),
        to(lookup.combine == Combine::concat ? 1 : lookup.planes),
        channel(0),
        column(0),
        step(0),
        steps(steps_of<Channels::kVector>(lookup.channels)) {}

  __device__ __forceinline__ void advance(const Lookup& lookup) {
    ++number;
    step += steps;
    channel += kBlock;
    column += kBlock;
    if (channel >= lookup.channels) {
      column -= channel - lookup.channels;
      channel = 0;
      ++from;
      ++to;
    }
    steps = steps_of<Channels::kVector>(lookup.channels - channel);
  }
};

// A warp's points of a sample.
template <int rows>
struct Tile {
  unsigned sample, number;  // the latter in the sample

  __device__ Tile(const Lookup& lookup, unsigned of_all)
      : sample(of_all / lookup.sample_tiles), number(of_all - sample * lookup.sample_tiles) {}

  __device__ int64_t point(int row) const { return at(row * kWarpRows + row_of_lane()); }
  __device__ int64_t at(int offset) const {
    return static_cast<int64_t>(number) * (rows * kWarpRows) + offset;
  }
  // The index among all samples' points.
  __device__ int64_t index(const Lookup& lookup, int64_t point) const {
    return sample * lookup.count + point;
  }
};

struct Point {
  float x, y, z;

  __device__ float along(int axis) const { return axis == 0 ? x : axis == 1 ? y : z; }
};

// A lane's point of a tile; behind a sample's last point, that one.
template <int rows>
__device__ __forceinline__ Point point_of(const Lookup& lookup, const Tile<rows>& tile) {
  int64_t index = min(tile.at(lane() % (rows * kWarpRows)), lookup.count - 1);
  const float* at = lookup.points + tile.sample * lookup.points_stride + 3 * index;
  // Infinities become finite, far beyond any image.
  constexpr float kFar = 1e18f;
  return {clamp_or_nan(at[0], -kFar, kFar), clamp_or_nan(at[1], -kFar, kFar),
          clamp_or_nan(at[2], -kFar, kFar)};
}

// The lower and the upper of the two pixels along a side. Beyond the image a pixel is the nearest
// one, with weight 0; a NaN is in the weights.
struct Tap {
  int index[2];
  float weight[2];
  float slope[2];  // of the weight, by the coordinate
  bool moves;      // or the coordinate has no gradient at all
};

__device__ __forceinline__ Tap tap_of(const Side& side, const Point& point, bool border) {
  float exact = fmaf(point.along(side.axis), side.gain, side.offset);
  float pixel = clamp_or_nan(exact, side.lowest, side.highest);
  float fraction = pixel - floorf(pixel);
  int low = __float2int_rd(pixel), high = low + 1;
  bool low_there = static_cast<unsigned>(low) < static_cast<unsigned>(side.size);
  bool high_there = static_cast<unsigned>(high) < static_cast<unsigned>(side.size);
  return {{min(max(low, 0), side.size - 1), min(max(high, 0), side.size - 1)},
          {low_there ? 1.f - fraction : 0.f, high_there ? fraction : 0.f},
          {border || low_there ? -side.gain : 0.f, border || high_there ? side.gain : 0.f},
          border ? exact >= side.lowest && exact <= side.highest : exact == exact};
}

// Of the points of a tile on one plane: the corners 00, 01, 10, 11, height first.
template <int points>
struct Corners {
  uint4 pixels[points];
  float4 weights[points];
};

// The weights' derivatives by the coordinates along width and height.
template <int points>
struct Slopes {
  float4 across[points];
  float4 down[points];
  bool across_moves[points], down_moves[points];
};

template <int points>
__device__ __forceinline__ void find_corners(const Lookup& lookup, const Image& image,
                                             const Point& point, Corners<points>& corners,
                                             Slopes<points>* slopes = nullptr) {
  Tap a = tap_of(image.across, point, lookup.border);
  Tap b = tap_of(image.down, point, lookup.border);
  unsigned width = image.across.size, upper = b.index[0] * width, lower = b.index[1] * width;
  int i = lane() % points;
  __syncwarp();  // all lanes are through with the plane before
  corners.pixels[i] = {upper + a.index[0], upper + a.index[1], lower + a.index[0],
                       lower + a.index[1]};
  corners.weights[i] = {b.weight[0] * a.weight[0], b.weight[0] * a.weight[1],
                        b.weight[1] * a.weight[0], b.weight[1] * a.weight[1]};
  if (slopes != nullptr) {
    slopes->across[i] = {a.slope[0] * b.weight[0], a.slope[1] * b.weight[0],
                         a.slope[0] * b.weight[1], a.slope[1] * b.weight[1]};
    slopes->down[i] = {b.slope[0] * a.weight[0], b.slope[0] * a.weight[1], b.slope[1] * a.weight[0],
                       b.slope[1] * a.weight[1]};
    slopes->across_moves[i] = a.moves;
    slopes->down_moves[i] = b.moves;
  }
  __syncwarp();
}

// Some channels at the four corners.
template <class Channels>
struct CornerValues {
  float v00[Channels::kVector], v01[Channels::kVector], v10[Channels::kVector],
      v11[Channels::kVector];

  __device__ __forceinline__ CornerValues(const Lookup& lookup, const char* base, uint4 pixels) {
    Channels::load(base + static_cast<uint64_t>(pixels.x) * lookup.pixel_bytes, lookup.number, v00);
    Channels::load(base + static_cast<uint64_t>(pixels.y) * lookup.pixel_bytes, lookup.number, v01);
    Channels::load(base + static_cast<uint64_t>(pixels.z) * lookup.pixel_bytes, lookup.number, v10);
    Channels::load(base + static_cast<uint64_t>(pixels.w) * lookup.pixel_bytes, lookup.number, v11);
  }
};

// Calls call(slot, channel) for a lane's vectors of channels, those that there are.
template <class Channels, class Call>
__device__ __forceinline__ void for_vectors(const Lookup& lookup, int channel, Call call) {
#pragma unroll
  for (int slot = 0; slot < kSlots; slot += Channels::kVector) {
    if (channel + channel_of<Channels::kVector>(0, slot) >= lookup.channels) break;
    int first = channel + channel_of<Channels::kVector>(quarter(), slot);
    if (first < lookup.channels) call(slot, first);
  }
}

// A lane's first vector of channels, at an image's first pixel; the vectors of its other slots lie
// at the same distances from there for all lanes.
template <class Channels>
__device__ __forceinline__ const char* first_vector(const Lookup& lookup, const Image& image,
                                                    unsigned sample, int channel) {
  int first = channel + channel_of<Channels::kVector>(quarter(), 0);
  return settled(image.data + sample * image.batch_bytes +
                 first * Channels::bytes(lookup.channel_bytes));
}
template <class Channels>
__device__ __forceinline__ unsigned slot_bytes(const Lookup& lookup, int slot) {
  return channel_of<Channels::kVector>(0, slot) * Channels::bytes(lookup.channel_bytes);
}

// Adds what a lane finds on a plane to its slots; of a product, multiplies them by it.
template <class Channels, int rows>
__device__ __forceinline__ void gather(const Lookup& lookup, const Image& image, unsigned sample,
                                       int channel, bool product,
                                       const Corners<rows * kWarpRows>& corners,
                                       float (&values)[rows][kSlots]) {
  const char* start = first_vector<Channels>(lookup, image, sample, channel);
  for_vectors<Channels>(lookup, channel, [&](int slot, int) {
    const char* base = start + slot_bytes<Channels>(lookup, slot);
#pragma unroll
    for (int row = 0; row < rows; ++row) {
      float4 weight = corners.weights[row * kWarpRows + row_of_lane()];
      CornerValues<Channels> at(lookup, base, corners.pixels[row * kWarpRows + row_of_lane()]);
#pragma unroll
      for (int i = 0; i < Channels::kVector; ++i) {
        float& value = values[row][slot + i];
        float sum = product ? weight.x * at.v00[i] : fmaf(weight.x, at.v00[i], value);
        sum = fmaf(weight.y, at.v01[i], sum);
        sum = fmaf(weight.z, at.v10[i], sum);
        sum = fmaf(weight.w, at.v11[i], sum);
        value = product ? value * sum : sum;
      }
    }
  });
}

template <class Channels, int rows>
__device__ __forceinline__ void reduce_planes(const Lookup& lookup, const Tile<rows>& tile,
                                              const Point& point, const Part<Channels>& part,
                                              bool product, Corners<rows * kWarpRows>& corners,
                                              float (&values)[rows][kSlots]) {
#pragma unroll
  for (int row = 0; row < rows; ++row)
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) values[row][slot] = product ? 1.f : 0.f;
  int p = part.from;
#pragma unroll 1
  do {
    find_corners(lookup, lookup.images[p], point, corners);
    gather<Channels>(lookup, lookup.images[p], tile.sample, part.channel, product, corners, values);
  } while (++p < part.to);
}

// A part of the feature; 0 (of a product 1) in slots without a channel.
template <class Channels, int rows>
__device__ __forceinline__ void find_features(const Lookup& lookup, const Tile<rows>& tile,
                                              const Point& point, const Part<Channels>& part,
                                              Corners<rows * kWarpRows>& corners,
                                              float (&values)[rows][kSlots]) {
  bool product = lookup.combine == Combine::product;
  // One loop for both would take instructions of every channel, two need more registers.
  if (Channels::kVector == 1)
    reduce_planes(lookup, tile, point, part, product, corners, values);
  else if (product)
    reduce_planes(lookup, tile, point, part, true, corners, values);
  else
    reduce_planes(lookup, tile, point, part, false, corners, values);
}

// ------------------------------------------------------------------------------------ features

constexpr int kPointsThreads = 128;  // of a block of the kernels without a decoder
constexpr int kPointsRows = 4;
constexpr int kPointsTile = kPointsRows * kWarpRows;

__device__ __forceinline__ unsigned tile_of_warp() {
  return blockIdx.x * (kPointsThreads / kWarp) + warp();
}

template <class Channels>
__global__ void __launch_bounds__(kPointsThreads, 4)
    features_kernel(const __grid_constant__ Lookup lookup, float* features) {
  __shared__ Corners<kPointsTile> corners[kPointsThreads / kWarp];
  if (tile_of_warp() >= lookup.tiles) return;
  Tile<kPointsRows> tile(lookup, tile_of_warp());
  Point point = point_of(lookup, tile);
#pragma unroll 1
  for (Part<Channels> part(lookup); part.number < lookup.parts; part.advance(lookup)) {
    float values[kPointsRows][kSlots];
    find_features(lookup, tile, point, part, corners[warp()], values);
    for_vectors<Channels>(lookup, part.channel, [&](int slot, int channel) {
#pragma unroll
      for (int row = 0; row < kPointsRows; ++row) {
        if (tile.point(row) >= lookup.count) continue;
        float* to = features + tile.index(lookup, tile.point(row)) * lookup.width + part.column +
                    channel - part.channel;
        const float* v = values[row] + slot;
        if constexpr (Channels::kVector == 1) {
          *to = v[0];
        } else {
#pragma unroll
          for (int i = 0; i < Channels::kVector; i += 4)
            reinterpret_cast<float4*>(to)[i / 4] = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
      }
    });
  }
}

struct PlaneGradients {
  float* at[kMaxPlanes];
};

__device__ __forceinline__ void add(float* to, float weight, const float (&values)[4]) {
  red_add(reinterpret_cast<float4*>(to), make_float4(weight * values[0], weight * values[1],
                                                     weight * values[2], weight * values[3]));
}
__device__ __forceinline__ void add(float* to, float weight, const float (&values)[1]) {
  atomicAdd(to, weight * values[0]);
}

// Sums over a quad of as many numbers as there are rows: a lane gets its quarter's, modulo rows.
template <int rows>
__device__ __forceinline__ float sum_of_quad(const float (&values)[rows]) {
  static_assert(rows == 2 || rows == 4);
  bool odd = quarter() % 2 == 1, upper = quarter() >= 2;
  float half[rows / 2];
#pragma unroll
  for (int i = 0; i < rows / 2; ++i) {
    float kept = odd ? values[2 * i + 1] : values[2 * i];
    float given = odd ? values[2 * i] : values[2 * i + 1];
    half[i] = kept + __shfl_xor_sync(kAllLanes, given, 1);
  }
  if constexpr (rows == 2) return half[0] + __shfl_xor_sync(kAllLanes, half[0], 2);
  float kept = upper ? half[rows / 2 - 1] : half[0], given = upper ? half[0] : half[rows / 2 - 1];
  return kept + __shfl_xor_sync(kAllLanes, given, 2);
}

// Carries the gradient by a plane's lookup, in a lane's slots, on to the plane and to the points.
template <class Channels>
__device__ __forceinline__ void carry_back(const Lookup& lookup, const Image& image,
                                           const Tile<kPointsRows>& tile, int channel,
                                           const Corners<kPointsTile>& corners,
                                           const Slopes<kPointsTile>& slopes,
                                           const float (&d_values)[kPointsRows][kSlots],
                                           float* d_plane, bool points,
                                           float (&d_points)[3][kPointsRows]) {
  constexpr int kVector = Channels::kVector;
  const char* start = first_vector<Channels>(lookup, image, tile.sample, channel);
  for_vectors<Channels>(lookup, channel, [&](int slot, int first) {
    const char* base = start + slot_bytes<Channels>(lookup, slot);
    float* d_base = nullptr;
    if (d_plane != nullptr) {
      int64_t pixels = static_cast<int64_t>(image.across.size) * image.down.size;
      d_base = settled(d_plane + tile.sample * pixels * lookup.channels + first);
    }
#pragma unroll
    for (int row = 0; row < kPointsRows; ++row) {
      if (tile.point(row) >= lookup.count) continue;
      int i = row * kWarpRows + row_of_lane();
      uint4 pixels = corners.pixels[i];
      float d_value[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) d_value[j] = d_values[row][slot + j];
      if (d_base != nullptr) {
        float4 weight = corners.weights[i];
        auto scatter = [&](unsigned pixel, float w) {
          if (w != 0.f) add(d_base + static_cast<uint64_t>(pixel) * lookup.channels, w, d_value);
        };
        scatter(pixels.x, weight.x);
        scatter(pixels.y, weight.y);
        scatter(pixels.z, weight.z);
        scatter(pixels.w, weight.w);
      }
      if (points) {
        CornerValues<Channels> at(lookup, base, pixels);
        float4 d{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          d.x = fmaf(at.v00[j], d_value[j], d.x);
          d.y = fmaf(at.v01[j], d_value[j], d.y);
          d.z = fmaf(at.v10[j], d_value[j], d.z);
          d.w = fmaf(at.v11[j], d_value[j], d.w);
        }
        auto move = [&](int axis, float4 s) {
          float sum = fmaf(s.x, d.x, fmaf(s.y, d.y, fmaf(s.z, d.z, s.w * d.w)));
#pragma unroll
          for (int k = 0; k < 3; ++k)
            if (k == axis) d_points[k][row] += sum;
        };
        // What cannot move has no gradient even if the rest is a NaN.
        if (slopes.across_moves[i]) move(image.across.axis, slopes.across[i]);
        if (slopes.down_moves[i]) move(image.down.axis, slopes.down[i]);
      }
    }
  });
}

// The gradient by a part of the feature; 0 at points behind the last.
template <class Channels>
__device__ __forceinline__ void load_gradient(const Lookup& lookup, const Tile<kPointsRows>& tile,
                                              const Part<Channels>& part, const float* d_features,
                                              float (&d_values)[kPointsRows][kSlots]) {
  for_vectors<Channels>(lookup, part.channel, [&](int slot, int channel) {
#pragma unroll
    for (int row = 0; row < kPointsRows; ++row) {
      bool there = tile.point(row) < lookup.count;
      const float* from = d_features + tile.index(lookup, tile.point(row)) * lookup.width +
                          part.column + channel - part.channel;
      float* to = d_values[row] + slot;
      if constexpr (Channels::kVector == 1) {
        to[0] = there ? __ldg(from) : 0.f;
      } else {
        static_assert(Channels::kVector == 4);
        float4 v = there ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0, 0, 0, 0);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
    }
  });
}

template <class Channels, bool product>
__global__ void __launch_bounds__(kPointsThreads, product ? 3 : 4)
    features_backward_kernel(const __grid_constant__ Lookup lookup, const float* d_features,
                             const __grid_constant__ PlaneGradients d_planes, float* d_points) {
  __shared__ Corners<kPointsTile> corners_of_warps[kPointsThreads / kWarp];
  __shared__ Slopes<kPointsTile> slopes_of_warps[kPointsThreads / kWarp];
  if (tile_of_warp() >= lookup.tiles) return;
  Corners<kPointsTile>& corners = corners_of_warps[warp()];
  Slopes<kPointsTile>& slopes = slopes_of_warps[warp()];
  Tile<kPointsRows> tile(lookup, tile_of_warp());
  Point point = point_of(lookup, tile);
  float d_point[3][kPointsRows] = {};
#pragma unroll 1
  for (Part<Channels> part(lookup); part.number < lookup.parts; part.advance(lookup)) {
    float d_values[kPointsRows][kSlots];
    if (!product) load_gradient(lookup, tile, part, d_features, d_values);
#pragma unroll 1
    for (int p = part.from; p < part.to; ++p) {
      if constexpr (product) {
        load_gradient(lookup, tile, part, d_features, d_values);
#pragma unroll 1
        for (int other = 0; other < lookup.planes; ++other) {
          if (other == p) continue;
          find_corners(lookup, lookup.images[other], point, corners);
          gather<Channels>(lookup, lookup.images[other], tile.sample, part.channel, true, corners,
                           d_values);
        }
      }
      find_corners(lookup, lookup.images[p], point, corners,
                   d_points == nullptr ? nullptr : &slopes);
      carry_back<Channels>(lookup, lookup.images[p], tile, part.channel, corners, slopes, d_values,
                           d_planes.at[p], d_points != nullptr, d_point);
    }
  }
  if (d_points == nullptr) return;
  int64_t index = tile.point(quarter());
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    float sum = sum_of_quad(d_point[axis]);
    if (index < lookup.count) d_points[3 * tile.index(lookup, index) + axis] = sum;
  }
}

// ------------------------------------------------------------------------------------- decoder

// A number as the sum of two of tf32.
struct Split {
  uint32_t high, low;
};

__device__ __forceinline__ Split split(float x) {
  uint32_t high = __float_as_uint(x) & 0xffffe000u;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// Half the error. It takes an instruction more, but no move where the operand's registers, four in
// a row, are not where x is: the compiler knows that tf32 has no lower bits, and does not mask
// them.
__device__ __forceinline__ Split split_rounded(float x) {
  uint32_t rounded = __float_as_uint(x) + 0x1000u;
  return {rounded, __float_as_uint(x - __uint_as_float(rounded & 0xffffe000u))};
}

// Rounded to 22 bits, of which a split leaves nothing out.
__device__ __forceinline__ float splittable(float x) {
  return x == x ? __uint_as_float((__float_as_uint(x) + 2u) & ~3u) : x;
}

// A product on the tensor cores, which round towards zero at every step. So the small terms have a
// sum of their own; and after a few steps a product is added to where numbers are rounded to
// nearest.
struct Product {
  float large[4], small[4];

  __device__ __forceinline__ Product() : large{}, small{} {}
  __device__ __forceinline__ explicit Product(const float (&start)[4]) : small{} {
#pragma unroll
    for (int i = 0; i < 4; ++i) large[i] = start[i];
  }
  __device__ __forceinline__ void step(const Split (&a)[4], const Split (&b)[2]) {
    uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    uint32_t b_high[2] = {b[0].high, b[1].high}, b_low[2] = {b[0].low, b[1].low};
    mma_tf32(small, a_low, b_high);
    mma_tf32(small, a_high, b_low);
    mma_tf32(large, a_high, b_high);
  }
  __device__ __forceinline__ float at(int i) const { return large[i] + small[i]; }
  __device__ __forceinline__ void add_to(float (&sum)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += at(i);
  }
};

// The operand that a result of 16 points and 8 units is for the next product.
__device__ __forceinline__ void as_operand(const float (&d)[4], Split (&a)[4]) {
  a[0] = split(d[0]), a[1] = split(d[2]), a[2] = split(d[1]), a[3] = split(d[3]);
}

// The first layer is stretched by log2(e) for the activations made of powers of 2: units hold
// x = stretch * value, and activations are stretched likewise.
__device__ __forceinline__ float stretch_of(Hidden hidden) {
  return hidden == Hidden::relu ? 1.f : kLog2E;
}
__device__ __forceinline__ float shrink_of(Hidden hidden) {
  return hidden == Hidden::relu ? 1.f : kLn2;
}

template <Hidden hidden>
__device__ __forceinline__ float stretched_activation(float x) {
  if constexpr (hidden == Hidden::softplus) {
    // max(x, 0) + log2(1 + e): a polynomial, relative error 2e-7, where log2_approx would lose what
    // is far below 1.
    float e = exp2_approx(-fabsf(x));
    float q = fmaf(e, -0.0123194744810462f, 0.06360789388418198f);
    q = fmaf(q, e, -0.15535187721252441f);
    q = fmaf(q, e, 0.2560097277164459f);
    q = fmaf(q, e, -0.35339483618736267f);
    q = fmaf(q, e, 0.48006370663642883f);
    q = fmaf(q, e, -0.7213100790977478f);
    q = fmaf(q, e, 1.4426947832107544f);
    return fmaf(q, e, fmaxf(x, 0.f));  // e keeps the NaN that fmaxf loses
  }
  if constexpr (hidden == Hidden::relu) return relu(x);
  if constexpr (hidden == Hidden::silu) return x * reciprocal_approx(1.f + exp2_approx(-x));
}

// The activation's slope at x / stretch, over stretch.
template <Hidden hidden>
__device__ __forceinline__ float shrunk_slope(float x) {
  if constexpr (hidden == Hidden::softplus)
    return reciprocal_approx(fmaf(exp2_approx(-x), kLog2E, kLog2E));
  if constexpr (hidden == Hidden::relu) return activation_slope<hidden>(x);
  if constexpr (hidden == Hidden::silu) {
    float s = reciprocal_approx(1.f + exp2_approx(-x));
    return s * fmaf(x * (1.f - s), kLn2 * kLn2, kLn2);
  }
}

template <class Call>
__device__ __forceinline__ void with_hidden(Hidden hidden, Call call) {
  if (hidden == Hidden::softplus)
    call(std::integral_constant<Hidden, Hidden::softplus>());
  else if (hidden == Hidden::relu)
    call(std::integral_constant<Hidden, Hidden::relu>());
  else
    call(std::integral_constant<Hidden, Hidden::silu>());
}

// What a lane needs of its units of a tile, 2t and 2t + 1 of eight in quarter t.
struct UnitVectors {
  float4 b1[kUnitTiles][kQuad];  // stretched; twice, for two rows
  float2 w2[kUnitTiles][kQuad];  // the density's row
};

// `w2_scale` goes into the density's row.
__device__ __forceinline__ void fill(const Decoder& decoder, float w2_scale, UnitVectors& vectors) {
  float stretch = stretch_of(decoder.hidden);
  for (int i = threadIdx.x; i < kMaxUnits; i += blockDim.x) {
    bool there = i < decoder.units;
    float* b1 = reinterpret_cast<float*>(vectors.b1[0] + i / 2) + i % 2;
    b1[0] = b1[2] = there ? decoder.b1[i] * stretch : 0.f;
    reinterpret_cast<float*>(vectors.w2)[i] = there ? decoder.w2[i] * w2_scale : 0.f;
  }
}

// A lane's entries of the first layer, stretched: of unit l / 4 of a tile, the channels of the two
// slots of a step.
template <class Channels>
__device__ __forceinline__ float2 first_layer(const Lookup& lookup, const Decoder& decoder,
                                              const Part<Channels>& part, int step, int tile,
                                              int lane) {
  float w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int unit = 8 * tile + lane / kQuad;
    int channel = channel_of<Channels::kVector>(lane % kQuad, 2 * step + i);
    bool there = unit < decoder.units && part.channel + channel < lookup.channels;
    w[i] = there ? decoder.w1[unit * decoder.width + part.column + channel] : 0.f;
  }
  float stretch = stretch_of(decoder.hidden);
  return make_float2(splittable(w[0] * stretch), splittable(w[1] * stretch));
}

using FirstLayer = float2[kMaxSteps][kUnitTiles][kWarp];

template <class Channels>
__device__ __forceinline__ void fill(const Lookup& lookup, const Decoder& decoder, FirstLayer& w1) {
  for (Part<Channels> part(lookup); part.number < lookup.parts; part.advance(lookup)) {
    for (int i = threadIdx.x; i < part.steps * kUnitTiles * kWarp; i += blockDim.x) {
      int step = i / (kUnitTiles * kWarp), tile = i / kWarp % kUnitTiles;
      w1[part.step + step][tile][i % kWarp] =
          first_layer<Channels>(lookup, decoder, part, step, tile, i % kWarp);
    }
  }
}

// Adds the first layer's product with a part of the feature, 16 points' of it, to all units.
template <class Channels>
__device__ __forceinline__ void apply(const FirstLayer& w1, const Part<Channels>& part,
                                      const float (&features)[2][kSlots],
                                      float (&units)[kUnitTiles][4]) {
#pragma unroll
  for (int first = 0; first < kBlockSteps; first += 2) {
    if (first >= part.steps) break;
    Split a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = split(features[i % 2][2 * (first + step) + i / 2]);
#pragma unroll
    for (int n = 0; n < kUnitTiles; ++n) {
      Product product;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        float2 w = w1[part.step + first + step][n][lane()];
        Split b[2] = {split(w.x), split(w.y)};
        product.step(a[step], b);
      }
      product.add_to(units[n]);
    }
  }
}

// What goes into the hidden units' activation, stretched, of the 16 points of a tile. `use` gets
// the parts of the feature in turn.
template <class Channels, class Use>
__device__ __forceinline__ void find_units(const Lookup& lookup, const Tile<2>& tile,
                                           const FirstLayer& w1, const UnitVectors& vectors,
                                           Corners<2 * kWarpRows>& corners,
                                           float (&units)[kUnitTiles][4], Use use) {
  Point point = point_of(lookup, tile);
#pragma unroll 1
  for (Part<Channels> part(lookup); part.number < lookup.parts; part.advance(lookup)) {
    float features[2][kSlots];
    find_features(lookup, tile, point, part, corners, features);
    use(part.number, features);
    if (part.number == 0) {
#pragma unroll
      for (int n = 0; n < kUnitTiles; ++n) {
        float4 b = vectors.b1[n][quarter()];
        units[n][0] = b.x, units[n][1] = b.y, units[n][2] = b.z, units[n][3] = b.w;
      }
    }
    apply(w1, part, features, units);
  }
}

template <int rows>
__device__ __forceinline__ void store_sigma(const Lookup& lookup, const Decoder& decoder,
                                            const Tile<rows>& tile, int row, float sum,
                                            float* sigma) {
  if (tile.point(row) < lookup.count)
    sigma[tile.index(lookup, tile.point(row))] =
        apply_output(sum + __ldg(decoder.b2), decoder.output);
}

constexpr int kRadianceThreads = 256;
constexpr int kRadianceWarps = kRadianceThreads / kWarp;
constexpr int kRadianceBlocks = 2;  // that find room on a multiprocessor

// Density alone, of decoders whose feature is one part. 32 points share every load of a weight.
template <class Channels>
__global__ void __launch_bounds__(kRadianceThreads, kRadianceBlocks)
    density_kernel(const __grid_constant__ Lookup lookup, const __grid_constant__ Decoder decoder,
                   float* sigma) {
  constexpr int kTiles = 2, kRows = 2 * kTiles, kPoints = kRows * kWarpRows;
  __shared__ float4 w1[kBlockSteps][kUnitTiles][kWarp];  // high, high, low, low
  __shared__ UnitVectors vectors;
  __shared__ Corners<kPoints> corners[kRadianceWarps];
  Part<Channels> part(lookup);
  for (int i = threadIdx.x; i < kBlockSteps * kUnitTiles * kWarp; i += kRadianceThreads) {
    int step = i / (kUnitTiles * kWarp), n = i / kWarp % kUnitTiles;
    float2 w = first_layer<Channels>(lookup, decoder, part, step, n, i % kWarp);
    Split x = split(w.x), y = split(w.y);
    w1[step][n][i % kWarp] = make_float4(__uint_as_float(x.high), __uint_as_float(y.high),
                                         __uint_as_float(x.low), __uint_as_float(y.low));
  }
  fill(decoder, shrink_of(decoder.hidden), vectors);
  __syncthreads();

#pragma unroll 1
  for (unsigned number = blockIdx.x * kRadianceWarps + warp(); number < lookup.tiles;
       number += gridDim.x * kRadianceWarps) {
    Tile<kRows> tile(lookup, number);
    float features[kRows][kSlots];
    find_features(lookup, tile, point_of(lookup, tile), part, corners[warp()], features);
    Split a[kBlockSteps][kTiles][4];
#pragma unroll
    for (int step = 0; step < kBlockSteps; ++step)
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[step][m][i] = split(features[2 * m + i % 2][2 * step + i / 2]);

    float sums[kRows] = {};
    with_hidden(decoder.hidden, [&](auto hidden) {
#pragma unroll 2  // with more, registers spill
      for (int n = 0; n < kUnitTiles; ++n) {
        float4 b1 = vectors.b1[n][quarter()];
        float2 w2 = vectors.w2[n][quarter()];
        const float start[4] = {b1.x, b1.y, b1.z, b1.w};
        Product units[kTiles] = {Product(start), Product(start)};
#pragma unroll
        for (int step = 0; step < kBlockSteps; ++step) {
          float4 w = w1[step][n][lane()];
          Split b[2] = {{__float_as_uint(w.x), __float_as_uint(w.z)},
                        {__float_as_uint(w.y), __float_as_uint(w.w)}};
#pragma unroll
          for (int m = 0; m < kTiles; ++m) units[m].step(a[step][m], b);
        }
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sums[2 * m + i / 2] = fmaf(
                i % 2 == 0 ? w2.x : w2.y,
                stretched_activation<decltype(hidden)::value>(units[m].at(i)), sums[2 * m + i / 2]);
      }
    });
    store_sigma(lookup, decoder, tile, quarter(), sum_of_quad(sums), sigma);
  }
}

constexpr int kRestPairs = kMaxRest / 16;

// Other rows of the last layer, in pairs of tiles of eight: a lane's entries for both.
using OtherRows = float4[kRestPairs][kUnitTiles][kWarp];

// Density and other rows, of a feature of any number of parts; `in_pairs`: two columns of `rest`
// can be written at once.
template <class Channels>
__global__ void __launch_bounds__(kRadianceThreads, kRadianceBlocks)
    radiance_kernel(const __grid_constant__ Lookup lookup, const __grid_constant__ Decoder decoder,
                    float* sigma, float* rest, bool in_pairs) {
  __shared__ FirstLayer w1;
  __shared__ OtherRows w2;
  __shared__ UnitVectors vectors;
  __shared__ Corners<2 * kWarpRows> corners[kRadianceWarps];
  float shrink = shrink_of(decoder.hidden);
  const unsigned others = decoder.rest;
  const int pairs = (decoder.rest + 15) / 16;
  fill<Channels>(lookup, decoder, w1);
  fill(decoder, shrink, vectors);
  for (int i = threadIdx.x; i < pairs * kUnitTiles * kWarp; i += kRadianceThreads) {
    int pair = i / (kUnitTiles * kWarp), n = i / kWarp % kUnitTiles;
    float w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int row = 16 * pair + 8 * (j / 2) + i % kWarp / kQuad;
      int unit = 8 * n + 2 * (i % kQuad) + j % 2;
      bool there = row < decoder.rest && unit < decoder.units;
      w[j] = there ? splittable(decoder.w2[(1 + row) * decoder.units + unit] * shrink) : 0.f;
    }
    w2[pair][n][i % kWarp] = make_float4(w[0], w[1], w[2], w[3]);
  }
  __syncthreads();

#pragma unroll 1
  for (unsigned number = blockIdx.x * kRadianceWarps + warp(); number < lookup.tiles;
       number += gridDim.x * kRadianceWarps) {
    Tile<2> tile(lookup, number);
    float units[kUnitTiles][4];
    find_units<Channels>(lookup, tile, w1, vectors, corners[warp()], units,
                         [](int, const float (&)[2][kSlots]) {});
    float sums[2] = {};
    with_hidden(decoder.hidden, [&](auto hidden) {
#pragma unroll
      for (int n = 0; n < kUnitTiles; ++n) {
        float2 w = vectors.w2[n][quarter()];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          units[n][i] = stretched_activation<decltype(hidden)::value>(units[n][i]);
          sums[i / 2] = fmaf(i % 2 == 0 ? w.x : w.y, units[n][i], sums[i / 2]);
        }
      }
    });
    float sum = sum_of_quad(sums);
    if (quarter() < 2) store_sigma(lookup, decoder, tile, quarter(), sum, sigma);

    if (pairs == 0) continue;
    float raw[kRestPairs][2][4] = {};
#pragma unroll
    for (int first = 0; first < kUnitTiles; first += 2) {
      Split a[2][4];
      as_operand(units[first], a[0]);
      as_operand(units[first + 1], a[1]);
#pragma unroll
      for (int pair = 0; pair < kRestPairs; ++pair) {
        if (pair >= pairs) break;
        Product products[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float4 w = w2[pair][first + k][lane()];
          Split b[2][2] = {{split(w.x), split(w.y)}, {split(w.z), split(w.w)}};
          products[0].step(a[k], b[0]);
          products[1].step(a[k], b[1]);
        }
        products[0].add_to(raw[pair][0]);
        products[1].add_to(raw[pair][1]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kRestPairs; ++j) {
      int column = 8 * j + 2 * quarter();
      if (column >= decoder.rest) break;
      bool both = column + 1 < decoder.rest;
      float b[2] = {__ldg(decoder.b2 + 1 + column), both ? __ldg(decoder.b2 + 2 + column) : 0.f};
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (tile.point(row) >= lookup.count) continue;
        float* to = rest + tile.index(lookup, tile.point(row)) * others + column;
        const float* r = raw[j / 2][j % 2] + 2 * row;
        if (in_pairs) {
          *reinterpret_cast<float2*>(to) = make_float2(r[0] + b[0], r[1] + b[1]);
        } else {
          to[0] = r[0] + b[0];
          if (both) to[1] = r[1] + b[1];
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------- decoder: backward

constexpr int kBackwardThreads = 128;
constexpr int kBackwardWarps = kBackwardThreads / kWarp;
constexpr int kBackwardTile = 2 * kWarpRows;
// At most: three for each multiprocessor of an H100. A number of the device at hand would decide
// about rounding.
constexpr int kBackwardBlocks = 396;

// A factor of a weight's gradient, which is a sum over points: 32 rows (units, or columns of the
// weight), each with the values at a warp's points, k and k + 8 together. The rows that a lane
// writes are those of its quarter modulo 4. Neither writing nor reading has bank conflicts.
struct Factor {
  float2 rows[kBlock][kWarpRows];

  __device__ __forceinline__ void set(int row, float first, float second) {
    row = kQuad * row + quarter();
    rows[row][row_of_lane() ^ (row & 2) * 2] = make_float2(first, second);
  }
  __device__ __forceinline__ float2 at(int row, int pair) const {
    return rows[row][pair ^ (row & 2) * 2];
  }
};

struct Factors {
  Factor units;  // a half of them at a time
  Factor columns;
};

// A warp's share of a weight's gradient: of each half of the units 16 rows of the factor, and 16
// columns.
struct WeightGradient {
  float sums[2][2][4] = {};
  float units[2][2] = {};  // sums of the units' factor

  __device__ static int first_row() { return warp() / 2 * 16; }
  __device__ static int first_column() { return warp() % 2 * 16; }

  // The unit in a row of a half: see Factor::set.
  __device__ static int unit(int half, int row) {
    return half * kMaxUnits / 2 + row / 8 * 8 + row % 4 * 2 + row / 4 % 2;
  }

  // Adds the products of all warps' points.
  __device__ __forceinline__ void add(const Factors (&factors)[kBackwardWarps], int half) {
#pragma unroll 1  // or registers spill
    for (int first = 0; first < kBackwardWarps; first += 2) {
      Product products[2];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const Factors& from = factors[first + step / 2];
        int pair = step % 2 * kQuad + quarter();
        Split a[4], b[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float2 x = from.units.at(first_row() + 8 * i + row_of_lane(), pair);
          float2 y = from.columns.at(first_column() + 8 * i + row_of_lane(), pair);
          units[half][i] += x.x + x.y;
          a[i] = split_rounded(x.x), a[2 + i] = split_rounded(x.y);
          b[i][0] = split(y.x), b[i][1] = split(y.y);
        }
        products[0].step(a, b[0]);
        products[1].step(a, b[1]);
      }
      products[0].add_to(sums[half][0]);
      products[1].add_to(sums[half][1]);
    }
  }

  // Calls call(unit, column, sum) for all sums.
  template <class Call>
  __device__ __forceinline__ void for_sums(Call call) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          call(unit(half, first_row() + 8 * (i / 2) + row_of_lane()),
               first_column() + 8 * n + 2 * quarter() + i % 2, sums[half][n][i]);
  }
};

// Gradients of a decoder. The blocks' second dimension goes through the parts of the feature, the
// units' factor being the gradient by what goes into their activation, and then through blocks of
// 32 other rows of the last layer, the units' factor being their activations.
template <class Channels>
__global__ void __launch_bounds__(kBackwardThreads, 3)
    radiance_backward_kernel(const __grid_constant__ Lookup lookup,
                             const __grid_constant__ Decoder decoder, const float* d_sigma,
                             const float* d_rest, const float* sigma, float* d_features,
                             float* partials) {
  __shared__ FirstLayer w1;
  __shared__ UnitVectors vectors;
  __shared__ Factors factors_of_warps[kBackwardWarps];
  __shared__ float sums_of_warps[kBackwardWarps][kMaxUnits];
  __shared__ float raw_sums[kBackwardWarps * kWarpRows];
  Factors& factors = factors_of_warps[warp()];
  Corners<kBackwardTile>& corners = reinterpret_cast<Corners<kBackwardTile>&>(factors.units);
  static_assert(sizeof(corners) <= sizeof(factors.units));
  fill<Channels>(lookup, decoder, w1);
  fill(decoder, 1.f, vectors);
  const int thread = threadIdx.x;
  if (thread < kBackwardWarps * kWarpRows) raw_sums[thread] = 0.f;
  __syncthreads();

  const int job = blockIdx.y;
  const unsigned others = decoder.rest;
  const bool first_layer = job < lookup.parts;
  const int first_other = (job - lookup.parts) * kBlock;  // of the rows
  WeightGradient gradient;
  float sums[2 * kUnitTiles] = {};  // of the density's row, or else of a lane's slots

#pragma unroll 1
  for (unsigned first = blockIdx.x * kBackwardWarps; first < lookup.tiles;
       first += gridDim.x * kBackwardWarps) {
    // All warps take part to the end: some may have the last tile once more, for nothing.
    bool exists = first + warp() < lookup.tiles;
    Tile<2> tile(lookup, exists ? first + warp() : lookup.tiles - 1);
    const bool there[2] = {exists && tile.point(0) < lookup.count,
                           exists && tile.point(1) < lookup.count};
    const int64_t point = tile.index(lookup, tile.point(0));  // and the next kWarpRows on
    auto set_columns = [&](const float (&values)[2][kSlots]) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        factors.columns.set(slot, values[0][slot], values[1][slot]);
    };

    float units[kUnitTiles][4];
    find_units<Channels>(lookup, tile, w1, vectors, corners, units,
                         [&](int part, const float (&features)[2][kSlots]) {
                           if (part == job) set_columns(features);
                         });

    if (first_layer) {
      float d_raw[2];
#pragma unroll
      for (int row = 0; row < 2; ++row)
        d_raw[row] =
            there[row] ? times_output_slope(__ldg(d_sigma + point + kWarpRows * row),
                                            __ldg(sigma + point + kWarpRows * row), decoder.output)
                       : 0.f;
      if (job == 0 && partials != nullptr) {
        if (quarter() == 0) raw_sums[thread / kQuad] += d_raw[0] + d_raw[1];
        with_hidden(decoder.hidden, [&](auto hidden) {
#pragma unroll
          for (int n = 0; n < kUnitTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              sums[2 * n + i % 2] =
                  fmaf(d_raw[i / 2], stretched_activation<decltype(hidden)::value>(units[n][i]),
                       sums[2 * n + i % 2]);
        });
      }
      float d_hidden[kUnitTiles][4];
#pragma unroll
      for (int n = 0; n < kUnitTiles; ++n) {
        float2 w = vectors.w2[n][quarter()];
#pragma unroll
        for (int i = 0; i < 4; ++i) d_hidden[n][i] = d_raw[i / 2] * (i % 2 == 0 ? w.x : w.y);
      }
#pragma unroll 1
      for (int other = 0; other < decoder.rest; other += 8) {
        Split a[4];
        const float* weights[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int row = other + 2 * quarter() + i, last = decoder.rest - 1;
          weights[i] = settled(decoder.w2 + (1 + min(row, last)) * decoder.units + row_of_lane());
#pragma unroll
          for (int j = 0; j < 2; ++j)
            a[2 * i + j] = split(there[j] && row <= last
                                     ? __ldg(d_rest + (point + kWarpRows * j) * others + row)
                                     : 0.f);
        }
#pragma unroll
        for (int n = 0; n < kUnitTiles; ++n) {
          bool unit_there = 8 * n + row_of_lane() < decoder.units;
          Split b[2] = {split(unit_there ? __ldg(weights[0] + 8 * n) : 0.f),
                        split(unit_there ? __ldg(weights[1] + 8 * n) : 0.f)};
          Product product;
          product.step(a, b);
          product.add_to(d_hidden[n]);
        }
      }
      with_hidden(decoder.hidden, [&](auto hidden) {
#pragma unroll
        for (int n = 0; n < kUnitTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            units[n][i] = d_hidden[n][i] * shrunk_slope<decltype(hidden)::value>(units[n][i]);
      });
    } else {
      float values[2][kSlots];
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          int column = first_other + kQuad * slot + quarter();
          values[row][slot] = there[row] && column < decoder.rest
                                  ? __ldg(d_rest + (point + kWarpRows * row) * others + column)
                                  : 0.f;
          sums[slot] += values[row][slot];
        }
      set_columns(values);
      with_hidden(decoder.hidden, [&](auto hidden) {
#pragma unroll
        for (int n = 0; n < kUnitTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            units[n][i] = stretched_activation<decltype(hidden)::value>(units[n][i]);
      });
    }

    if (first_layer && d_features != nullptr) {
      Part<Channels> part(lookup);
      while (part.number < job) part.advance(lookup);
      float d_feature[kBlockSteps][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Split a[kUnitTiles / 2][4];
#pragma unroll
        for (int k = 0; k < kUnitTiles / 2; ++k) as_operand(units[half * kUnitTiles / 2 + k], a[k]);
#pragma unroll
        for (int step = 0; step < kBlockSteps; ++step) {
          if (step >= part.steps) break;
          Product product;
#pragma unroll
          for (int k = 0; k < kUnitTiles / 2; ++k) {
            // Units 2t and 2t + 1 of this lane's quarter t, and the slot that its row stands for.
            const float2* tile_of_w1 = w1[part.step + step][half * kUnitTiles / 2 + k];
            const float* w = reinterpret_cast<const float*>(tile_of_w1 + 8 * quarter());
            Split b[2] = {split(w[row_of_lane()]), split(w[8 + row_of_lane()])};
            product.step(a[k], b);
          }
          product.add_to(d_feature[step]);
        }
      }
      for_vectors<Channels>(lookup, part.channel, [&](int slot, int channel) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          if (!there[row]) continue;
          float* to = d_features + (point + kWarpRows * row) * lookup.width + part.column +
                      channel - part.channel;
          if constexpr (Channels::kVector == 1) {
            *to = d_feature[slot / 2][2 * row + slot % 2];
          } else {
#pragma unroll
            for (int i = slot / 2; i < (slot + Channels::kVector) / 2; i += 2)
              reinterpret_cast<float4*>(to)[(i - slot / 2) / 2] =
                  make_float4(d_feature[i][2 * row], d_feature[i][2 * row + 1],
                              d_feature[i + 1][2 * row], d_feature[i + 1][2 * row + 1]);
          }
        }
      });
    }

    if (partials == nullptr) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncwarp();  // all lanes are through with the corners
#pragma unroll
      for (int n = 0; n < kUnitTiles / 2; ++n) {
        const float (&x)[4] = units[half * kUnitTiles / 2 + n];
        factors.units.set(2 * n, x[0], x[2]);
        factors.units.set(2 * n + 1, x[1], x[3]);
      }
      __syncthreads();
      gradient.add(factors_of_warps, half);
      __syncthreads();
    }
  }
  if (partials == nullptr) return;

  // Sums over the lanes that share a number, then over the warps.
#pragma unroll
  for (int i = 0; i < 2 * kUnitTiles; ++i) {
#pragma unroll
    for (int step = kQuad; step < kWarp; step *= 2)
      sums[i] += __shfl_xor_sync(kAllLanes, sums[i], step);
    if (row_of_lane() == 0) sums_of_warps[warp()][kQuad * i + quarter()] = sums[i];
  }
  __syncthreads();
  auto total = [&](int i) {
    float result = 0.f;
    for (int w = 0; w < kBackwardWarps; ++w) result += sums_of_warps[w][i];
    return result;
  };

  const int units = decoder.units;
  float* d_w1 = partials + static_cast<int64_t>(blockIdx.x) *
                               (units * decoder.width + (1 + decoder.rest) * (units + 1) + units);
  float* d_w2 = d_w1 + units * decoder.width;
  float* d_b1 = d_w2 + (1 + decoder.rest) * units;
  float* d_b2 = d_b1 + units;
  const float stretch = stretch_of(decoder.hidden), shrink = shrink_of(decoder.hidden);
  if (!first_layer) {
    gradient.for_sums([&](int unit, int column, float sum) {
      if (unit < units && first_other + column < decoder.rest)
        d_w2[(1 + first_other + column) * units + unit] = sum * shrink;
    });
    if (thread < kBlock && first_other + thread < decoder.rest)
      d_b2[1 + first_other + thread] = total(thread);
    return;
  }
  Part<Channels> part(lookup);
  while (part.number < job) part.advance(lookup);
  gradient.for_sums([&](int unit, int column, float sum) {
    int channel = channel_of<Channels::kVector>(column % kQuad, column / kQuad);
    if (unit < units && part.channel + channel < lookup.channels)
      d_w1[unit * decoder.width + part.column + channel] = sum * stretch;
  });
  if (job != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = gradient.units[half][i];
      for (int step = 1; step < kQuad; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      int unit = WeightGradient::unit(half, WeightGradient::first_row() + 8 * i + row_of_lane());
      if (WeightGradient::first_column() == 0 && quarter() == 0 && unit < units)
        d_b1[unit] = sum * stretch;
    }
  if (thread < units) {
    int in_tile = thread % 8;
    d_w2[thread] = total(thread - in_tile + in_tile % 2 * 4 + in_tile / 2) * shrink;
  }
  if (thread == 0) {
    float sum = 0.f;
    for (float each : raw_sums) sum += each;
    d_b2[0] = sum;
  }
}

// ----------------------------------------------------------------------------------- launching

Side side_of(const PointField& field, int size, int axis, float rate) {
  double scale = 0.5 * (field.align_corners ? size - 1 : size);
  float last = static_cast<float>(size - 1);
  return {size,
          axis,
          static_cast<float>(rate * scale),
          static_cast<float>(scale - (field.align_corners ? 0. : 0.5)),
          field.border ? 0.f : -2.f,  // from where both pixels are beyond the image
          field.border ? last : last + 2.f};
}

unsigned bytes_of(Number number) { return number == Number::float32 ? 4 : 2; }

bool is_empty(const PointField& field) { return field.batch == 0 || field.count == 0; }

int64_t tiles_of(const PointField& field, int points) {
  return field.batch * ceil_div(field.count, points);
}

Lookup lookup_of(const PointField& field, int points) {
  Lookup lookup{};
  for (int p = 0; p < field.plane_count; ++p) {
    const PointPlane& plane = field.planes[p];
    lookup.images[p] = {static_cast<const char*>(plane.data),
                        plane.batch_stride * bytes_of(field.number),
                        side_of(field, plane.width, plane.axis_across, plane.rate_across),
                        side_of(field, plane.height, plane.axis_down, plane.rate_down)};
  }
  lookup.planes = field.plane_count;
  lookup.channels = field.channels;
  int lookups = field.combine == Combine::concat ? field.plane_count : 1;
  lookup.parts = lookups * blocks_of(field.channels);
  lookup.width = lookups * field.channels;
  lookup.channel_bytes = bytes_of(field.number);
  lookup.pixel_bytes = field.channels * lookup.channel_bytes;
  lookup.number = field.number;
  lookup.combine = field.combine;
  lookup.border = field.border;
  lookup.count = field.count;
  lookup.points = field.points;
  lookup.points_stride = field.points_stride;
  lookup.tiles = static_cast<unsigned>(tiles_of(field, points));
  lookup.sample_tiles = static_cast<unsigned>(ceil_div(field.count, points));
  return lookup;
}

// Tiles are counted by 32-bit numbers.
bool is_too_large(const PointField& field, int points) {
  return tiles_of(field, points) > 0x7fffffff;
}

// Steps of the product with the first layer.
template <class Channels>
int steps_of(const PointField& field) {
  int blocks = blocks_of(field.channels);
  int last = steps_of<Channels::kVector>(field.channels - (blocks - 1) * kBlock);
  int planes = field.combine == Combine::concat ? field.plane_count : 1;
  return planes * ((blocks - 1) * kBlockSteps + last);
}

// Whether channels can be read in vectors; `features` (or null) are read or written as float4.
template <int vector>
bool takes_vectors(const PointField& field, const float* features) {
  int64_t bytes = bytes_of(field.number);
  bool takes = field.channels % vector == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0;
  for (int p = 0; p < field.plane_count; ++p)
    takes = takes && reinterpret_cast<uintptr_t>(field.planes[p].data) % (vector * bytes) == 0 &&
            field.planes[p].batch_stride % vector == 0;
  return takes;
}

// Calls `launcher` with the widest vectors that a field has: at most so many channels of a number
// of 16 and of 32 bits.
template <int half, int single, class Launcher>
cudaError_t with_channels(const PointField& field, const float* features, Launcher launcher) {
  if (field.number == Number::float32) {
    using Channels = Vectors<Number::float32, single>;
    if (takes_vectors<single>(field, features)) return launcher(Channels());
  } else if (takes_vectors<half>(field, features)) {
    if (field.number == Number::bfloat16) return launcher(Vectors<Number::bfloat16, half>());
    return launcher(Vectors<Number::float16, half>());
  }
  return launcher(Singles());
}

// The same, of the vectors whose padding the kernels with a decoder have room for.
template <class Launcher>
cudaError_t with_decoder_channels(const PointField& field, const float* features,
                                  Launcher launcher) {
  return with_channels<8, 4>(field, features, [&](auto channels) {
    if (steps_of<decltype(channels)>(field) <= kMaxSteps) return launcher(channels);
    return launcher(Singles());
  });
}

bool is_too_large(const PointField& field, const Decoder& decoder) {
  return steps_of<Singles>(field) > kMaxSteps || decoder.units > kMaxUnits ||
         decoder.rest > kMaxRest;
}

// Enough blocks to fill the device.
cudaError_t blocks_for(int64_t tiles, int warps, int of_multiprocessor, dim3& grid) {
  int device, multiprocessors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    grid = dim3(static_cast<unsigned>(
        std::min<int64_t>(ceil_div(tiles, warps), of_multiprocessor * multiprocessors)));
  return status;
}

}  // namespace

cudaError_t sample_features(const PointField& field, float* features, cudaStream_t stream) {
  if (is_empty(field)) return cudaSuccess;
  if (is_too_large(field, kPointsTile)) return cudaErrorInvalidValue;
  Lookup lookup = lookup_of(field, kPointsTile);
  dim3 grid(static_cast<unsigned>(ceil_div(lookup.tiles, kPointsThreads / kWarp)));
  return with_channels<8, 4>(field, features, [&](auto channels) {
    return launch(features_kernel<decltype(channels)>, grid, kPointsThreads, stream, lookup,
                  features);
  });
}

cudaError_t sample_features_backward(const PointField& field, const float* d_features,
                                     float* const* d_planes, float* d_points, cudaStream_t stream) {
  if (is_empty(field)) return cudaSuccess;
  if (is_too_large(field, kPointsTile)) return cudaErrorInvalidValue;
  Lookup lookup = lookup_of(field, kPointsTile);
  PlaneGradients gradients{};
  for (int p = 0; p < field.plane_count; ++p) gradients.at[p] = d_planes[p];
  dim3 grid(static_cast<unsigned>(ceil_div(lookup.tiles, kPointsThreads / kWarp)));
  // Four channels are what one addition to memory takes.
  return with_channels<4, 4>(field, d_features, [&](auto channels) {
    using Channels = decltype(channels);
    auto kernel = field.combine == Combine::product ? features_backward_kernel<Channels, true>
                                                    : features_backward_kernel<Channels, false>;
    return launch(kernel, grid, kPointsThreads, stream, lookup, d_features, gradients, d_points);
  });
}

cudaError_t radiance(const PointField& field, const Decoder& decoder, float* sigma, float* rest,
                     cudaStream_t stream) {
  if (is_empty(field)) return cudaSuccess;
  return with_decoder_channels(field, nullptr, [&](auto channels) {
    using Channels = decltype(channels);
    bool density = decoder.rest == 0 && steps_of<Channels>(field) <= kBlockSteps &&
                   (field.combine != Combine::concat || field.plane_count == 1);
    int points = (density ? 4 : 2) * kWarpRows;
    if (is_too_large(field, decoder) || is_too_large(field, points)) return cudaErrorInvalidValue;
    Lookup lookup = lookup_of(field, points);
    dim3 grid;
    cudaError_t status = blocks_for(lookup.tiles, kRadianceWarps, kRadianceBlocks, grid);
    if (status != cudaSuccess) return status;
    if (density)
      return launch(density_kernel<Channels>, grid, kRadianceThreads, stream, lookup, decoder,
                    sigma);
    bool in_pairs = decoder.rest % 2 == 0 && reinterpret_cast<uintptr_t>(rest) % 8 == 0;
    return launch(radiance_kernel<Channels>, grid, kRadianceThreads, stream, lookup, decoder, sigma,
                  rest, in_pairs);
  });
}

int radiance_partials(const PointField& field) {
  int64_t blocks = ceil_div(tiles_of(field, kBackwardTile), kBackwardWarps);
  return static_cast<int>(std::min<int64_t>(blocks, kBackwardBlocks));
}

cudaError_t radiance_backward(const PointField& field, const Decoder& decoder, const float* d_sigma,
                              const float* d_rest, const float* sigma, float* d_features,
                              int blocks, float* partials, cudaStream_t stream) {
  if (is_empty(field) || (d_features == nullptr && partials == nullptr)) return cudaSuccess;
  if (is_too_large(field, decoder) || is_too_large(field, kBackwardTile))
    return cudaErrorInvalidValue;
  Lookup lookup = lookup_of(field, kBackwardTile);
  int jobs = lookup.parts + (partials == nullptr ? 0 : blocks_of(decoder.rest));
  dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(jobs));
  return with_decoder_channels(field, d_features, [&](auto channels) {
    return launch(radiance_backward_kernel<decltype(channels)>, grid, kBackwardThreads, stream,
                  lookup, decoder, d_sigma, d_rest, sigma, d_features, partials);
  });
}

}  // namespace densityrl::cuda
