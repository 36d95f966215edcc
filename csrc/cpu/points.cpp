// Features, density and radiance at arbitrary points.
//
// Planes are copied to channels-last, where the channels of a pixel are contiguous. A block of
// points is looked up, blended and put through the decoder before the next is touched. The
// backward does so again, a chunk of points at a time: first the gradient of every point's
// feature, then the scatter into the planes, in which every image row has one owner that visits
// its points in their order. So no atomics are needed, and the sum does not depend on the number
// of threads.
//
// Many points are first sorted by the axis that most planes have: neighbours in that order look up
// neighbouring columns or rows, which stay in the cache, wherever else they lie.

#include "blocks.h"

namespace densityrl {
namespace DENSITYRL_ISA {
namespace {

constexpr int kChunk = 1 << 16;  // points whose feature gradients are held at a time
constexpr int kChunkGroups = 32;
constexpr int kBins = 256;  // of the sort
constexpr int kSortTasks = 32;
constexpr int64_t kFewPoints = 1 << 15;    // are not sorted,
constexpr int64_t kSmallImages = 1 << 18;  // nor are points in images that a cache holds: floats
constexpr int kAhead = 8;                  // points that are asked for in advance

// Where a block of points falls on one axis of an image: two pixels, their weights, and whether
// they count, times the derivative of the pixel coordinate by the world coordinate.
struct AxisTaps {
  int32_t low[kBlock], high[kBlock];
  float weight_low[kBlock], weight_high[kBlock];
  float slope_low[kBlock], slope_high[kBlock];
};

inline vi clamp_index(vi index, int32_t size) {
  index = index < 0 ? vi{} : index;
  return index >= size ? vi{} + (size - 1) : index;
}

// coordinates [kBlock] in world units
void locate(const float* coordinates, float extent, int size, bool border, bool align_corners,
            AxisTaps& taps) {
  const float per_unit = 2.0f / extent;
  for (int at = 0; at < kBlock; at += kLanes) {
    // Nothing beyond u = 4 touches the image, and infinities become harmless. A NaN passes.
    const vf u = minimum(maximum(load(coordinates + at) * per_unit, splat(-4.0f)), splat(4.0f));
    vf pixel = align_corners ? (u + 1.0f) * ((size - 1) * 0.5f)
                             : ((u + 1.0f) * static_cast<float>(size) - 1.0f) * 0.5f;
    vf rate = splat((align_corners ? size - 1 : size) / extent);
    if (border) {
      const float last = static_cast<float>(size - 1);
      rate = pixel < 0.0f ? vf{} : (pixel > last ? vf{} : rate);
      pixel = minimum(maximum(pixel, vf{}), splat(last));
    }
    vf floor = __builtin_convertvector(__builtin_convertvector(pixel, vi), vf);
    floor = floor > pixel ? floor - 1.0f : floor;
    const vf fraction = pixel - floor;
    const vi low = __builtin_convertvector(floor, vi), high = low + 1;
    vf low_counts = splat(1.0f), high_counts = splat(1.0f);
    if (!border) {
      low_counts = ((low >= 0) & (low < size)) ? low_counts : vf{};
      high_counts = ((high >= 0) & (high < size)) ? high_counts : vf{};
    }
    const vf poisoned = pixel * 0.0f;  // what an integer makes of a NaN is anyone's guess
    *reinterpret_cast<vi*>(taps.low + at) = clamp_index(low, size);
    *reinterpret_cast<vi*>(taps.high + at) = clamp_index(high, size);
    store(taps.weight_low + at, (1.0f - fraction) * low_counts + poisoned);
    store(taps.weight_high + at, fraction * high_counts + poisoned);
    store(taps.slope_low + at, -rate * low_counts);
    store(taps.slope_high + at, rate * high_counts);
  }
}

struct PlaneTaps {
  alignas(64) AxisTaps across;
  alignas(64) AxisTaps down;
};

// What the scatter needs to know of a point on a plane.
struct Corner {
  int32_t across_low, across_high, down_low, down_high;
  float weight_across_low, weight_across_high, weight_down_low, weight_down_high;
};

class Work {
 public:
  Work(const PointField& field, int threads, bool backward)
      : field_(field),
        pixel_(padded(field.channels)),
        separate_(field.combine != Combine::sum),
        stride_(pixel_ * (field.combine == Combine::concat ? field.plane_count : 1)),
        lookup_stride_(pixel_ * (separate_ ? field.plane_count : 1)),
        transposed_(field.mlp),
        partials_(field.mlp, static_cast<int>(stride_), 0, backward ? kChunkGroups : 0) {
    int64_t pixels = 0;
    for (int p = 0; p < field.plane_count; ++p) {
      first_pixel_[p] = pixels;
      pixels += static_cast<int64_t>(field.planes[p].height) * field.planes[p].width;
    }
    images_.allocate(pixels * pixel_);
    sorted_ = field.count >= kFewPoints && pixels * pixel_ > kSmallImages;
    if (sorted_) {
      sorted_points_.allocate(3 * field.count);
      position_ = allocate<int64_t>(field.count);
      bins_ = allocate<int64_t>(kSortTasks * kBins);
    }
    if (backward && field.planes[0].gradient) {
      image_gradients_.allocate(pixels * pixel_);
      corners_ = allocate<Corner>(static_cast<int64_t>(field.plane_count) * kChunk);
      int rows = 0;
      for (int p = 0; p < field.plane_count; ++p) {
        first_row_[p] = rows + p;  // one more each, for the end of the last
        rows += field.planes[p].height;
      }
      row_begin_ = allocate<int32_t>(rows + field.plane_count);
      order_ = allocate<int32_t>(static_cast<int64_t>(field.plane_count) * 2 * kChunk);
      chunk_.allocate(kChunk * lookup_stride_);
    }
    const Mlp& mlp = field.mlp;
    if (mlp.layers) {
      // The first layer's columns are spread as the channels are.
      const int own = field.channels, parts = static_cast<int>(stride_ / pixel_);
      first_.allocate(mlp.widths[1] * stride_);
      first_back_.allocate(mlp.widths[1] * stride_);
      std::memset(first_.get(), 0, 4 * mlp.widths[1] * stride_);
      std::memset(first_back_.get(), 0, 4 * mlp.widths[1] * stride_);
      for (int h = 0; h < mlp.widths[1]; ++h)
        for (int part = 0; part < parts; ++part)
          for (int c = 0; c < own; ++c) {
            const float w = mlp.weights[0][(static_cast<int64_t>(h) * parts + part) * own + c];
            first_.get()[h * stride_ + part * pixel_ + c] = w;
            first_back_.get()[(part * pixel_ + c) * mlp.widths[1] + h] = w;
          }
    }
    mlp_floats_ = mlp.layers ? BlockMlp::memory(mlp, backward) : 0;
    thread_floats_ = kBlock * (3 * lookup_stride_ + 2 * stride_) + mlp_floats_;
    memory_.allocate(threads * thread_floats_);
    taps_ = allocate<PlaneTaps>(static_cast<int64_t>(threads) * field.plane_count);
  }
  ~Work() {
    std::free(position_);
    std::free(bins_);
    std::free(taps_);
    std::free(corners_);
    std::free(row_begin_);
    std::free(order_);
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  // Copies one sample's planes to channels-last, and sorts its points.
  void start_sample(int sample, Team& team) {
    if (sorted_) sort(field_.points + sample * field_.points_stride, team);
    each_row(team, [&](int p, int y) {
      const PointPlane& plane = field_.planes[p];
      const int64_t size = static_cast<int64_t>(plane.height) * plane.width;
      const float* in =
          plane.data + sample * plane.batch_stride + static_cast<int64_t>(y) * plane.width;
      to_channels_last(image(images_, p) + static_cast<int64_t>(y) * plane.width * pixel_, in, size,
                       plane.width);
    });
    if (image_gradients_.get())
      each_row(team, [&](int p, int y) {
        const int64_t row = static_cast<int64_t>(field_.planes[p].width) * pixel_;
        std::memset(image(image_gradients_, p) + y * row, 0, 4 * row);
      });
  }

  void forward(int sample, float* sigma, float* features, Team& team) {
    const int64_t blocks = (field_.count + kBlock - 1) / kBlock;
    const int64_t per_task = 16;
    parallel(team, (blocks + per_task - 1) / per_task, [&](int task, int thread) {
      for (int64_t b = task * per_task; b < lesser((task + 1) * per_task, blocks); ++b)
        forward_block(sample, b * kBlock, sigma, features, thread);
    });
  }

  void backward(int sample, const float* d_sigma, const float* sigma, const float* d_features,
                Team& team) {
    for (int64_t begin = 0; begin < field_.count; begin += kChunk) {
      const int count = static_cast<int>(lesser<int64_t>(kChunk, field_.count - begin));
      constexpr int kShare = kChunk / kChunkGroups;
      parallel(team, (count + kShare - 1) / kShare, [&](int group, int thread) {
        for (int at = group * kShare; at < lesser((group + 1) * kShare, count); at += kBlock)
          backward_block(sample, begin + at, at, lesser(kBlock, count - at), d_sigma, sigma,
                         d_features, group, thread);
      });
      if (image_gradients_.get()) scatter(count, team);
    }
    if (!image_gradients_.get()) return;
    each_row(team, [&](int p, int y) {
      const PointPlane& plane = field_.planes[p];
      const int64_t size = static_cast<int64_t>(plane.height) * plane.width;
      float* out =
          plane.gradient + sample * plane.gradient_stride + static_cast<int64_t>(y) * plane.width;
      const float* in = image(image_gradients_, p) + static_cast<int64_t>(y) * plane.width * pixel_;
      from_channels_last(out, size, in, plane.width);
    });
  }

  // After every sample.
  void write_decoder_gradients() const {
    if (!field_.gradients.weights) return;
    partials_.write_layers(field_.gradients, 1);
    const int parts = static_cast<int>(stride_ / pixel_), own = field_.channels;
    float* out = field_.gradients.weights[0];
    for (int h = 0; h < field_.mlp.widths[1]; ++h)
      for (int part = 0; part < parts; ++part)
        for (int c = 0; c < own; ++c)
          *out++ = partials_.total(partials_.layout.weight[0] + h * stride_ + part * pixel_ + c);
  }

 private:
  template <class T>
  static T* allocate(int64_t count) {
    return static_cast<T*>(aligned_memory(count * static_cast<int64_t>(sizeof(T))));
  }

  float* image(const Buffer& images, int p) const {
    return images.get() + first_pixel_[p] * pixel_;
  }

  // visit(plane, image row) for every row of every plane
  template <class Visit>
  void each_row(Team& team, const Visit& visit) {
    int64_t rows = 0;
    for (int p = 0; p < field_.plane_count; ++p) rows += field_.planes[p].height;
    parallel(team, rows, [&](int task, int) {
      int p = 0;
      while (task >= field_.planes[p].height) task -= field_.planes[p++].height;
      visit(p, task);
    });
  }

  // out [width][pixel] = in [channels][width], channels `size` apart
  void to_channels_last(float* out, const float* in, int64_t size, int width) const {
    float tile[kPad * kPad] __attribute__((aligned(64)));
    for (int x = 0; x < width; x += kPad) {
      const int columns = lesser(width - x, kPad);
      for (int c = 0; c < field_.channels; c += kPad) {
        const int rows = lesser(field_.channels - c, kPad);
        const float* from = in + c * size + x;
        int64_t from_stride = size;
        if (columns < kPad) {  // whole vectors would be read beyond the image
          for (int r = 0; r < rows; ++r)
            std::memcpy(tile + r * kPad, from + r * size, 4 * static_cast<size_t>(columns));
          from = tile, from_stride = kPad;
        }
        transpose(out + static_cast<int64_t>(x) * pixel_ + c, pixel_, from, from_stride, rows,
                  columns);
      }
    }
  }

  void from_channels_last(float* out, int64_t size, const float* in, int width) const {
    float tile[kPad * kPad] __attribute__((aligned(64)));
    for (int c = 0; c < field_.channels; c += kPad)
      for (int x = 0; x < width; x += kPad) {
        const int rows = lesser(width - x, kPad), columns = lesser(field_.channels - c, kPad);
        transpose(tile, kPad, in + static_cast<int64_t>(x) * pixel_ + c, pixel_, rows, columns);
        for (int channel = 0; channel < columns; ++channel)
          std::memcpy(out + (c + channel) * size + x, tile + channel * kPad,
                      4 * static_cast<size_t>(rows));
      }
  }

  struct ThreadMemory {
    float *lookups, *d_lookups, *spare;  // [kBlock][lookup_stride], one row a point
    float* features;                     // [stride][kBlock]
    float* rows;                         // [kBlock][stride]: the features, a row a point
    float* mlp;
    PlaneTaps* taps;
  };

  ThreadMemory memory(int thread) const {
    ThreadMemory m;
    float* p = memory_.get() + thread * thread_floats_;
    m.lookups = p, p += kBlock * lookup_stride_;
    m.d_lookups = p, p += kBlock * lookup_stride_;
    m.spare = p, p += kBlock * lookup_stride_;
    m.features = p, p += kBlock * stride_;
    m.rows = p, p += kBlock * stride_;
    m.mlp = p;
    m.taps = taps_ + static_cast<int64_t>(thread) * field_.plane_count;
    return m;
  }

  // A counting sort, stable, by position along one axis: fills sorted_points_ and position_.
  void sort(const float* points, Team& team) {
    int planes_with[3] = {}, axis = 0;
    float extent[3] = {1, 1, 1};
    for (int p = 0; p < field_.plane_count; ++p) {
      const PointPlane& plane = field_.planes[p];
      ++planes_with[plane.axis_across], ++planes_with[plane.axis_down];
      extent[plane.axis_across] = plane.extent_across;
      extent[plane.axis_down] = plane.extent_down;
    }
    for (int other = 1; other < 3; ++other)
      if (planes_with[other] > planes_with[axis]) axis = other;
    const float scale = kBins / extent[axis];
    const auto bin = [&](int64_t n) {
      const float at = points[3 * n + axis] * scale + kBins / 2;
      return at >= 0 ? (at < kBins ? static_cast<int>(at) : kBins - 1) : 0;  // a NaN goes first
    };
    const auto share = [&](int task) { return field_.count * task / kSortTasks; };
    parallel(team, kSortTasks, [&](int task, int) {
      int64_t* counts = bins_ + task * kBins;
      std::memset(counts, 0, sizeof(int64_t) * kBins);
      for (int64_t n = share(task); n < share(task + 1); ++n) ++counts[bin(n)];
    });
    int64_t total = 0;
    for (int b = 0; b < kBins; ++b)
      for (int task = 0; task < kSortTasks; ++task) {
        const int64_t own = bins_[task * kBins + b];
        bins_[task * kBins + b] = total;
        total += own;
      }
    parallel(team, kSortTasks, [&](int task, int) {
      int64_t* next = bins_ + task * kBins;
      for (int64_t n = share(task); n < share(task + 1); ++n) {
        const int64_t to = next[bin(n)]++;
        position_[to] = n;
        std::memcpy(sorted_points_.get() + 3 * to, points + 3 * n, 12);
      }
    });
  }

  // Where the n-th point in the order of work was given.
  int64_t position(int64_t n) const { return sorted_ ? position_[n] : n; }

  // Fills m.taps, m.rows and, for a product, m.lookups. Points beyond `count` are at the origin.
  void look_up(int sample, int64_t begin, int count, ThreadMemory& m) const {
    alignas(64) float coordinates[3][kBlock];
    const float* points =
        (sorted_ ? sorted_points_.get() : field_.points + sample * field_.points_stride) +
        3 * begin;
    for (int n = 0; n < kBlock; ++n)
      for (int axis = 0; axis < 3; ++axis)
        coordinates[axis][n] = n < count ? points[3 * n + axis] : 0.0f;
    for (int p = 0; p < field_.plane_count; ++p) {
      const PointPlane& plane = field_.planes[p];
      locate(coordinates[plane.axis_across], plane.extent_across, plane.width, field_.border,
             field_.align_corners, m.taps[p].across);
      locate(coordinates[plane.axis_down], plane.extent_down, plane.height, field_.border,
             field_.align_corners, m.taps[p].down);
    }
    const bool product = field_.combine == Combine::product;
    float* out = product ? m.lookups : m.rows;
    const int64_t out_stride = product ? lookup_stride_ : stride_;
    for (int p = 0; p < field_.plane_count; ++p) {
      const float* pixels = image(images_, p);
      const AxisTaps &across = m.taps[p].across, &down = m.taps[p].down;
      const int64_t width = field_.planes[p].width;
      const bool add = p && field_.combine == Combine::sum;
      for (int n = 0; n < kBlock; ++n) {
        const float* low_row = pixels + down.low[n] * width * pixel_;
        const float* high_row = pixels + down.high[n] * width * pixel_;
        const int64_t low = across.low[n] * pixel_, high = across.high[n] * pixel_;
        const float w00 = down.weight_low[n] * across.weight_low[n];
        const float w01 = down.weight_low[n] * across.weight_high[n];
        const float w10 = down.weight_high[n] * across.weight_low[n];
        const float w11 = down.weight_high[n] * across.weight_high[n];
        float* to = out + n * out_stride + (separate_ ? p * pixel_ : 0);
        for (int64_t c = 0; c < pixel_; c += kLanes) {
          vf value = add ? load(to + c) : vf{};
          value += w00 * load(low_row + low + c);
          value += w01 * load(low_row + high + c);
          value += w10 * load(high_row + low + c);
          value += w11 * load(high_row + high + c);
          store(to + c, value);
        }
      }
    }
    if (!product) return;
    for (int n = 0; n < kBlock; ++n)
      for (int64_t c = 0; c < pixel_; c += kLanes) {
        vf value = load(m.lookups + n * lookup_stride_ + c);
        for (int p = 1; p < field_.plane_count; ++p)
          value *= load(m.lookups + n * lookup_stride_ + p * pixel_ + c);
        store(m.rows + n * stride_ + c, value);
      }
  }

  void first_layer(BlockMlp& mlp, const ThreadMemory& m) const {
    transpose(m.features, kBlock, m.rows, stride_, kBlock, static_cast<int>(stride_));
    multiply(mlp.first(), kBlock, first_.get(), stride_, m.features, kBlock, field_.mlp.widths[1],
             static_cast<int>(stride_), kBlock, field_.mlp.biases[0], false);
  }

  void forward_block(int sample, int64_t begin, float* sigma, float* features, int thread) {
    const int count = static_cast<int>(lesser<int64_t>(kBlock, field_.count - begin));
    const int64_t start = sample * field_.count;
    ThreadMemory m = memory(thread);
    look_up(sample, begin, count, m);
    if (!field_.mlp.layers) {
      const int parts = static_cast<int>(stride_ / pixel_);
      for (int n = 0; n < count; ++n)
        for (int part = 0; part < parts; ++part)
          std::memcpy(features + ((start + position(begin + n)) * parts + part) * field_.channels,
                      m.rows + n * stride_ + part * pixel_,
                      4 * static_cast<size_t>(field_.channels));
      return;
    }
    BlockMlp mlp(field_.mlp, nullptr, m.mlp);
    first_layer(mlp, m);
    mlp.forward(kBlock);
    const float* raw = mlp.raw();
    alignas(64) float density[kBlock];
    for (int n = 0; n < kBlock; n += kLanes)
      store(density + n, output_of(field_.mlp.output, load(raw + n)));
    const int others = field_.mlp.widths[field_.mlp.layers] - 1;
    for (int n = 0; n < count; ++n) {
      const int64_t at = start + position(begin + n);
      sigma[at] = density[n];
      for (int row = 0; row < others; ++row)
        features[at * others + row] = raw[(row + 1) * kBlock + n];
    }
  }

  void backward_block(int sample, int64_t begin, int in_chunk, int count, const float* d_sigma,
                      const float* sigma, const float* d_features, int group, int thread) {
    const int64_t start = sample * field_.count;
    ThreadMemory m = memory(thread);
    look_up(sample, begin, count, m);
    float* d_rows = m.d_lookups;  // the gradient of the features, a row a point
    if (!field_.mlp.layers) {
      const int parts = static_cast<int>(stride_ / pixel_);
      std::memset(d_rows, 0, 4 * kBlock * stride_);
      for (int n = 0; n < count; ++n)
        for (int part = 0; part < parts; ++part)
          std::memcpy(d_rows + n * stride_ + part * pixel_,
                      d_features + ((start + position(begin + n)) * parts + part) * field_.channels,
                      4 * static_cast<size_t>(field_.channels));
    } else {
      BlockMlp mlp(field_.mlp, transposed_.layers(), m.mlp);
      first_layer(mlp, m);
      mlp.forward(kBlock);
      float* raw = mlp.raw();
      const int rows = field_.mlp.widths[field_.mlp.layers];
      std::memset(raw, 0, 4 * static_cast<size_t>(rows) * kBlock);
      alignas(64) float value[kBlock] = {};
      for (int n = 0; n < count; ++n) {
        const int64_t at = start + position(begin + n);
        raw[n] = d_sigma[at];
        value[n] = sigma[at];
        for (int row = 1; row < rows; ++row)
          raw[row * kBlock + n] = d_features[at * (rows - 1) + row - 1];
      }
      for (int n = 0; n < kBlock; n += kLanes)
        store(raw + n, load(raw + n) * output_slope(field_.mlp.output, load(value + n)));
      float* partial = field_.gradients.weights ? partials_.group(group) : nullptr;
      const float* d_first = mlp.backward(kBlock, partials_.layout, partial);
      const int hidden = field_.mlp.widths[1];
      if (partial) {
        multiply(partial + partials_.layout.weight[0], stride_, d_first, kBlock, m.rows, stride_,
                 hidden, kBlock, stride_, nullptr, true);
        for (int h = 0; h < hidden; ++h)
          partial[partials_.layout.bias[0] + h] += row_sum(d_first + h * kBlock, kBlock);
      }
      if (!image_gradients_.get() && !field_.points_gradient) return;
      multiply(m.features, kBlock, first_back_.get(), hidden, d_first, kBlock,
               static_cast<int>(stride_), hidden, kBlock, nullptr, false);
      transpose(d_rows, stride_, m.features, kBlock, static_cast<int>(stride_), kBlock);
    }
    if (field_.combine == Combine::product) {
      separate_product(m);
      d_rows = m.spare;
    }
    if (field_.points_gradient) points_gradient(start, begin, count, d_rows, m);
    if (!image_gradients_.get()) return;
    std::memcpy(chunk_.get() + in_chunk * lookup_stride_, d_rows, 4 * count * lookup_stride_);
    for (int p = 0; p < field_.plane_count; ++p)
      for (int n = 0; n < count; ++n) {
        const AxisTaps &across = m.taps[p].across, &down = m.taps[p].down;
        corners_[static_cast<int64_t>(p) * kChunk + in_chunk + n] = {
            across.low[n],        across.high[n],        down.low[n],        down.high[n],
            across.weight_low[n], across.weight_high[n], down.weight_low[n], down.weight_high[n]};
      }
  }

  // m.spare = for each plane the product of the others' lookups, times the gradient.
  void separate_product(ThreadMemory& m) const {
    for (int n = 0; n < kBlock; ++n)
      for (int p = 0; p < field_.plane_count; ++p)
        for (int64_t c = 0; c < pixel_; c += kLanes) {
          vf value = load(m.d_lookups + n * stride_ + c);
          for (int other = 0; other < field_.plane_count; ++other)
            if (other != p) value *= load(m.lookups + n * lookup_stride_ + other * pixel_ + c);
          store(m.spare + n * lookup_stride_ + p * pixel_ + c, value);
        }
  }

  void points_gradient(int64_t start, int64_t begin, int count, const float* d_lookups,
                       const ThreadMemory& m) const {
    for (int n = 0; n < count; ++n) {
      float d_point[3] = {};
      for (int p = 0; p < field_.plane_count; ++p) {
        const PointPlane& plane = field_.planes[p];
        const AxisTaps &across = m.taps[p].across, &down = m.taps[p].down;
        const float* pixels = image(images_, p);
        const int64_t width = plane.width;
        const float* low_row = pixels + down.low[n] * width * pixel_;
        const float* high_row = pixels + down.high[n] * width * pixel_;
        const int64_t low = across.low[n] * pixel_, high = across.high[n] * pixel_;
        const float* d = d_lookups + n * lookup_stride_ + (separate_ ? p * pixel_ : 0);
        vf product[4] = {};
        for (int64_t c = 0; c < pixel_; c += kLanes) {
          const vf gradient = load(d + c);
          product[0] += gradient * load(low_row + low + c);
          product[1] += gradient * load(low_row + high + c);
          product[2] += gradient * load(high_row + low + c);
          product[3] += gradient * load(high_row + high + c);
        }
        const float d00 = sum(product[0]), d01 = sum(product[1]);
        const float d10 = sum(product[2]), d11 = sum(product[3]);
        d_point[plane.axis_across] +=
            down.weight_low[n] * (across.slope_low[n] * d00 + across.slope_high[n] * d01) +
            down.weight_high[n] * (across.slope_low[n] * d10 + across.slope_high[n] * d11);
        d_point[plane.axis_down] +=
            across.weight_low[n] * (down.slope_low[n] * d00 + down.slope_high[n] * d10) +
            across.weight_high[n] * (down.slope_low[n] * d01 + down.slope_high[n] * d11);
      }
      const int64_t at = start + position(begin + n);
      for (int axis = 0; axis < 3; ++axis) field_.points_gradient[3 * at + axis] = d_point[axis];
    }
  }

  // Adds a chunk's feature gradients to the planes' gradients.
  void scatter(int count, Team& team) {
    // Order the points of the chunk by image row: each counts twice, for its lower and upper row.
    parallel(team, field_.plane_count, [&](int p, int) {
      const Corner* corners = corners_ + static_cast<int64_t>(p) * kChunk;
      int32_t* begin = row_begin_ + first_row_[p];
      int32_t* order = order_ + static_cast<int64_t>(p) * 2 * kChunk;
      const int rows = field_.planes[p].height;
      std::memset(begin, 0, sizeof(int32_t) * static_cast<size_t>(rows + 1));
      for (int n = 0; n < count; ++n) {
        ++begin[corners[n].down_low];
        ++begin[corners[n].down_high];
      }
      int32_t total = 0;
      for (int row = 0; row <= rows; ++row) {
        const int32_t own = begin[row];
        begin[row] = total;
        total += own;
      }
      // begin[row] moves to the row's end, which is where the next one begins.
      for (int n = 0; n < count; ++n) {
        order[begin[corners[n].down_low]++] = 2 * n;
        order[begin[corners[n].down_high]++] = 2 * n + 1;
      }
    });
    each_row(team, [&](int p, int y) {
      const Corner* corners = corners_ + static_cast<int64_t>(p) * kChunk;
      const int32_t* end = row_begin_ + first_row_[p];
      const int32_t* order = order_ + static_cast<int64_t>(p) * 2 * kChunk;
      float* row =
          image(image_gradients_, p) + static_cast<int64_t>(y) * field_.planes[p].width * pixel_;
      for (int32_t at = y ? end[y - 1] : 0; at < end[y]; ++at) {
        if (at + kAhead < end[y]) {
          const int next = order[at + kAhead] >> 1;
          __builtin_prefetch(corners + next);
          const float* d = chunk_.get() + next * lookup_stride_ + (separate_ ? p * pixel_ : 0);
          for (int64_t c = 0; c < pixel_; c += 16) __builtin_prefetch(d + c);
        }
        const int n = order[at] >> 1;
        const Corner& corner = corners[n];
        const float weight = order[at] & 1 ? corner.weight_down_high : corner.weight_down_low;
        const float low_weight = weight * corner.weight_across_low;
        const float high_weight = weight * corner.weight_across_high;
        const float* d = chunk_.get() + n * lookup_stride_ + (separate_ ? p * pixel_ : 0);
        float* low = row + corner.across_low * pixel_;
        float* high = row + corner.across_high * pixel_;
        for (int64_t c = 0; c < pixel_; c += kLanes) {
          const vf gradient = load(d + c);
          store(low + c, load(low + c) + low_weight * gradient);
          store(high + c, load(high + c) + high_weight * gradient);
        }
      }
    });
  }

  const PointField& field_;
  const int64_t pixel_;          // floats a pixel: the channels, padded
  const bool separate_;          // whether planes have their own lookups, and are not summed
  const int64_t stride_;         // floats of a point's feature
  const int64_t lookup_stride_;  // floats of what a point looks up before a product
  const TransposedWeights transposed_;
  const Partials partials_;
  int64_t first_pixel_[kMaxPlanes];
  int first_row_[kMaxPlanes];
  Buffer images_, image_gradients_;  // channels-last, one sample
  Buffer first_, first_back_;        // the first layer's weight [H][stride], [stride][H]
  Buffer chunk_, memory_;
  int64_t mlp_floats_ = 0, thread_floats_ = 0;
  bool sorted_;
  Buffer sorted_points_;         // [count][3], in the order of work
  int64_t* position_ = nullptr;  // [count], of the sorted points
  int64_t* bins_ = nullptr;      // [kSortTasks][kBins]
  PlaneTaps* taps_ = nullptr;
  Corner* corners_ = nullptr;
  int32_t *row_begin_ = nullptr, *order_ = nullptr;
};

}  // namespace

void points(const PointField& field, float* sigma, float* features, Team& team) {
  Work work(field, team.threads(), false);
  for (int sample = 0; sample < field.batch; ++sample) {
    work.start_sample(sample, team);
    work.forward(sample, sigma, features, team);
  }
}

void points_backward(const PointField& field, const float* d_sigma, const float* sigma,
                     const float* d_features, Team& team) {
  Work work(field, team.threads(), true);
  for (int sample = 0; sample < field.batch; ++sample) {
    work.start_sample(sample, team);
    work.backward(sample, d_sigma, sigma, d_features, team);
  }
  if (field.mlp.layers) work.write_decoder_gradients();
}

}  // namespace DENSITYRL_ISA
}  // namespace densityrl
