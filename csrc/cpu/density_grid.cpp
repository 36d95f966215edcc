// The density on a regular grid, in the separable form.
//
// A lookup on a plane with axes (x, y) depends on the x and y index only, so every plane is
// resampled once at N^2 points, and the decoder's first layer, being linear, is applied there:
//
//     first[h](i, j, k) = A[h](i, j) + B[h](i, k) + C[h](j, k)
//
// One x index i is a slice, with a slice of A and of B; a thread works on one slice at a time,
// and nothing of the size of the grid exists but the result. Decoders with one hidden softplus
// layer take the factored form: with a = e^A, b = e^B, c = e^C,
//
//     sigma = bias + sum_h w[h] ln(1 + a b c)
//
// which leaves one logarithm for every voxel and hidden unit. Slices in which the product could
// leave the range of a float, and all other decoders, are computed block by block as the decoder
// is written.

#include "blocks.h"

namespace densityrl {
namespace DENSITYRL_ISA {
namespace {

// ----------------------------------------------------------------------------- factored form

// How many rows and vectors of voxels are in registers at once.
constexpr int kTileRows = 4;
constexpr int kTileVectors = 1;

// out [ROWS][VECTORS * kLanes] = bias + sum_h weight[h] ln(1 + a b c), weight times ln 2 / 2^23
template <bool THREE, int ROWS, int VECTORS>
inline void factored_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                          const float* c, int64_t c_row, const float* weight, int hidden,
                          float bias, float* out, int64_t out_stride) {
  vf total[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v) total[row][v] = vf{};
  for (int h = 0; h < hidden; ++h) {
    vf factor[VECTORS];
    for (int v = 0; v < VECTORS; ++v) factor[v] = load(b + h * b_stride + v * kLanes);
    vf u[ROWS * VECTORS], logarithm[ROWS * VECTORS];
    for (int row = 0; row < ROWS; ++row) {
      const float scale = a[h * a_stride + row];
      for (int v = 0; v < VECTORS; ++v) {
        u[row * VECTORS + v] = scale * factor[v];
        if (THREE) u[row * VECTORS + v] *= load(c + row * c_row + h * b_stride + v * kLanes);
      }
    }
    scaled_log2_1p(u, logarithm);
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) total[row][v] += weight[h] * logarithm[row * VECTORS + v];
  }
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v)
      store(out + row * out_stride + v * kLanes, total[row][v] + bias);
}

template <bool THREE, int ROWS>
inline void factored_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                          const float* c, int64_t c_row, const float* weight, int hidden,
                          float bias, float* out, int64_t columns) {
  int64_t k = 0;
  for (; k + kTileVectors * kLanes <= columns; k += kTileVectors * kLanes)
    factored_tile<THREE, ROWS, kTileVectors>(a, a_stride, b + k, b_stride, THREE ? c + k : c, c_row,
                                             weight, hidden, bias, out + k, columns);
  for (; k < columns; k += kLanes)
    factored_tile<THREE, ROWS, 1>(a, a_stride, b + k, b_stride, THREE ? c + k : c, c_row, weight,
                                  hidden, bias, out + k, columns);
}

// One slice: a [H][a_stride], b [H][b_stride], c [rows][H][b_stride]; out [rows][columns].
template <bool THREE>
void factored_slice(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                    const float* c, const float* weight, int hidden, float bias, float* out,
                    int rows, int64_t columns) {
  const int64_t c_row = hidden * b_stride;
  int j = 0;
  for (; j + kTileRows <= rows; j += kTileRows)
    factored_rows<THREE, kTileRows>(a + j, a_stride, b, b_stride, THREE ? c + j * c_row : c, c_row,
                                    weight, hidden, bias, out + j * columns, columns);
  for (; j < rows; ++j)
    factored_rows<THREE, 1>(a + j, a_stride, b, b_stride, THREE ? c + j * c_row : c, c_row, weight,
                            hidden, bias, out + j * columns, columns);
}

// The gradients of one slice for one hidden unit and VECTORS * kLanes columns, given that of the
// raw density, g [rows][g_stride]. With s = u / (1 + u), u = a b c:
//
//     d_a[j] += weight sum_k g s     d_b[k] = weight sum_j g s     d_c[j, k] += weight g s
//
// Returns sum g ln(1 + u) 2^23 / ln 2, vector by vector, if WEIGHT.
template <bool THREE, bool WEIGHT, int VECTORS>
inline vf factored_gradient_tile(const float* a, const float* b, const float* c, int64_t c_row,
                                 const float* g, int64_t g_stride, float weight, int rows,
                                 float* d_a, float* d_b, float* d_c) {
  constexpr int GROUP = lesser(VECTORS, 4);
  vf factor[VECTORS], column_total[VECTORS], weight_total = {};
  for (int v = 0; v < VECTORS; ++v) {
    factor[v] = load(b + v * kLanes);
    column_total[v] = vf{};
  }
  for (int j = 0; j < rows; ++j) {
    const float scale = a[j];
    vf row_total = {};
    for (int first = 0; first < VECTORS; first += GROUP) {
      vf u[GROUP], d[GROUP], logarithm[GROUP];
      for (int n = 0; n < GROUP; ++n) {
        u[n] = scale * factor[first + n];
        if (THREE) u[n] *= load(c + j * c_row + (first + n) * kLanes);
      }
      if (WEIGHT) scaled_log2_1p(u, logarithm);
      for (int n = 0; n < GROUP; ++n) d[n] = reciprocal(u[n] + 1.0f);
      for (int n = 0; n < GROUP; ++n) {
        const vf d_raw = load(g + j * g_stride + (first + n) * kLanes);
        d[n] = d_raw * (u[n] * d[n]);
        if (WEIGHT) weight_total += d_raw * logarithm[n];
      }
      for (int n = 0; n < GROUP; ++n) column_total[first + n] += d[n];
      for (int n = 0; n < GROUP; ++n) row_total += d[n];
      for (int n = 0; THREE && n < GROUP; ++n) {
        float* p = d_c + j * c_row + (first + n) * kLanes;
        store(p, load(p) + weight * d[n]);
      }
    }
    d_a[j] += weight * sum(row_total);
  }
  for (int v = 0; v < VECTORS; ++v) store(d_b + v * kLanes, weight * column_total[v]);
  return weight_total;
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// g [rows][columns]. d_a [H][a_stride] is added to, d_b [H][b_stride] is written, d_c
// [rows][H][b_stride] and d_weight [H] (null: not wanted) are added to.
template <bool THREE, bool WEIGHT>
void factored_gradient_slice(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             const float* c, const float* weight, int hidden, const float* g,
                             int rows, int64_t columns, float* d_a, float* d_b, float* d_c,
                             float* d_weight) {
  constexpr int kVectors = DENSITYRL_LANES == 16 ? 8 : 4;
  const int64_t c_row = hidden * b_stride;
  for (int h = 0; h < hidden; ++h) {
    vf weight_total = {};
    const auto tile = [&](auto vectors, int64_t k) {
      constexpr int count = decltype(vectors)::value;
      const int64_t at = h * b_stride + k;
      weight_total += factored_gradient_tile<THREE, WEIGHT, count>(
          a + h * a_stride, b + at, THREE ? c + at : c, c_row, g + k, columns, weight[h], rows,
          d_a + h * a_stride, d_b + at, THREE ? d_c + at : d_c);
    };
    int64_t k = 0;
    for (; k + kVectors * kLanes <= columns; k += kVectors * kLanes) tile(Count<kVectors>{}, k);
    for (; k < columns; k += kLanes) tile(Count<1>{}, k);
    if (WEIGHT) d_weight[h] += sum(weight_total) * (kLn2 / kLog2Scale);
  }
}

// ------------------------------------------------------------------------------------ a field

// The stride of rows of n floats. An odd number of cache lines, or the rows of a power of two would
// all compete for a few sets of the first-level cache.
constexpr int64_t spread(int64_t n) { return (padded(n) / kPad | 1) * kPad; }

// What one thread needs to work on a slice.
struct SliceMemory {
  float *a, *b, *d_a, *d_b;  // [H][padded Y or Z]
  float* c;                  // [H][padded Z]: a row of the third table, where it is recomputed
  float* table;              // a table's slice, transposed
  float* mlp;                // of BlockMlp
  int prepared;              // the slice that a and b are of; -1: none
  bool factored;             // and whether they are exponentials
};

// One field, one sample at a time: its tables and the work on one slice of the grid.
class Field {
 public:
  Field(const GridField& field, int threads, bool backward)
      : field_(field),
        hidden_(field.mlp.widths[1]),
        rows_(field.shape[1]),
        columns_(padded(field.shape[2])),
        a_stride_(spread(field.shape[1])),
        b_stride_(spread(field.shape[2])),
        three_(field.table_channels[2] > 0),
        groups_(lesser(field.shape[0], three_ ? kThirdTableGroups : kMaxGroups)),
        factorable_(field.mlp.layers == 2 && field.mlp.hidden == Hidden::softplus),
        transposed_(field.mlp),
        partials_(field.mlp, 0, table_weight_floats(field), backward ? groups_ : 0),
        layout_(partials_.layout) {
    const int slow[] = {field.shape[0], field.shape[0], field.shape[1]};
    const int fast[] = {field.shape[1], field.shape[2], field.shape[2]};
    int widest = 0;
    int64_t partial_at = layout_.floats;  // the tables' weights follow the layers
    for (int t = 0; t < 3; ++t) {
      slow_[t] = slow[t];
      fast_[t] = spread(fast[t]);
      const int channels = field.table_channels[t];
      if (!channels) continue;
      if (biased_ < 0) biased_ = t;
      widest = greater(widest, channels);
      tables_[t].allocate(slow_[t] * channels * fast_[t]);
      // What resampling does not write must be finite: it meets zero gradients.
      for (int64_t row = 0; row < static_cast<int64_t>(slow_[t]) * channels; ++row)
        std::memset(tables_[t].get() + row * fast_[t] + padded(fast[t]), 0,
                    4 * (fast_[t] - padded(fast[t])));
      table_partial_[t] = partial_at;
      partial_at += hidden_ * padded(channels);
      if (backward) {
        back_[t].allocate(static_cast<int64_t>(channels) * hidden_);
        for (int h = 0; h < hidden_; ++h)
          for (int c = 0; c < channels; ++c)
            back_[t].get()[c * hidden_ + h] = field.table_weight[t][h * channels + c];
      }
    }
    if (three_) third_.allocate(third_floats());
    if (three_ && backward) third_gradient_.allocate(groups_ * third_floats());
    scaled_weight_.allocate(hidden_);
    if (factorable_)
      for (int h = 0; h < hidden_; ++h)
        scaled_weight_.get()[h] = field.mlp.weights[1][h] * (kLn2 / kLog2Scale);

    const int64_t longest = greater(a_stride_, b_stride_);
    const int64_t mlp = BlockMlp::memory(field.mlp, backward);
    const int64_t one = (5 * hidden_ + padded(widest)) * longest + mlp;
    memory_.allocate(threads * one);
    slices_ = static_cast<SliceMemory*>(aligned_memory(threads * sizeof(SliceMemory)));
    for (int thread = 0; thread < threads; ++thread) {
      float* p = memory_.get() + thread * one;
      SliceMemory& m = slices_[thread];
      float** const parts[] = {&m.a, &m.b, &m.d_a, &m.d_b};
      for (float** part : parts) *part = p, p += hidden_ * longest;
      m.c = p, p += hidden_ * longest;
      m.table = p, p += longest * padded(widest);
      m.mlp = p;
    }
    // Images on their way to a table and back, one for each thread.
    int64_t image = 0;
    for (int n = 0; n < field.plane_count; ++n) {
      const GridPlane& plane = field.planes[n];
      image = greater(image, image_floats(plane));
    }
    image_floats_ = image;
    images_.allocate(threads * image);
  }
  ~Field() { std::free(slices_); }
  Field(const Field&) = delete;
  Field& operator=(const Field&) = delete;

  int groups() const { return groups_; }
  int64_t columns() const { return columns_; }
  int64_t slice_floats() const { return rows_ * columns_; }
  int first_slice(int group) const {
    return static_cast<int>(static_cast<int64_t>(field_.shape[0]) * group / groups_);
  }

  // Resamples one sample's planes, and makes the third table.
  void tabulate(int sample, Team& team) {
    for (int thread = 0; thread < team.threads(); ++thread) slices_[thread].prepared = -1;
    int64_t tasks = 0;
    for (int t = 0; t < 3; ++t) tasks += field_.table_channels[t];
    parallel(team, tasks, [&](int task, int thread) {
      int t = 0;
      while (task >= field_.table_channels[t]) task -= field_.table_channels[t++];
      resample(t, task, sample, images_.get() + thread * image_floats_);
    });
    if (!three_) return;
    const float* bias = biased_ == 2 ? field_.mlp.biases[0] : nullptr;
    third_plain_ = !factorable_;
    Buffer outside(rows_);
    parallel(team, rows_, [&](int j, int) {
      float* row = third_.get() + j * hidden_ * b_stride_;
      first_product(2, j, bias, row);
      outside.get()[j] = !within_range(row, hidden_ * b_stride_);
    });
    for (int j = 0; j < rows_; ++j) third_plain_ |= outside.get()[j] != 0;
    if (!third_plain_)
      parallel(team, rows_, [&](int j, int) {
        exponentiate(third_.get() + j * hidden_ * b_stride_, hidden_ * b_stride_);
      });
  }

  // out [Y][columns]: sigma at x index i, with the output activation.
  void slice(int i, float* out, int thread) {
    SliceMemory& m = slices_[thread];
    if (prepare(i, m)) {
      const float bias = field_.mlp.biases[1][0];
      (three_ ? factored_slice<true> : factored_slice<false>)(m.a, a_stride_, m.b, b_stride_,
                                                              third_.get(), scaled_weight_.get(),
                                                              hidden_, bias, out, rows_, columns_);
    } else {
      BlockMlp mlp(field_.mlp, nullptr, m.mlp);
      each_block(m, mlp, [&](int j, int64_t k, int count) {
        mlp.forward(count);
        std::memcpy(out + j * columns_ + k, mlp.raw(), 4 * padded(count));
      });
    }
    if (field_.mlp.output == Output::identity) return;
    for (int64_t at = 0; at < slice_floats(); at += kLanes)
      store(out + at, output_of(field_.mlp.output, load(out + at)));
  }

  // From g [Y][columns], the gradient of sigma, which is overwritten, and sigma itself (null where
  // there is no output activation) to gradients of the tables and partial ones of the decoder.
  // Columns beyond Z must be 0 in g.
  void slice_backward(int i, int group, float* g, const float* sigma, bool fresh_group,
                      int thread) {
    SliceMemory& m = slices_[thread];
    if (field_.mlp.output != Output::identity)
      for (int64_t at = 0; at < slice_floats(); at += kLanes)
        store(g + at, load(g + at) * output_slope(field_.mlp.output, load(sigma + at)));

    float* partial = field_.gradients.weights ? partials_.group(group) : nullptr;
    float* d_c = three_ ? third_gradient_.get() + group * third_floats() : nullptr;
    if (three_ && fresh_group) std::memset(d_c, 0, 4 * third_floats());
    std::memset(m.d_a, 0, 4 * hidden_ * a_stride_);
    std::memset(m.d_b, 0, 4 * hidden_ * b_stride_);
    if (prepare(i, m)) {
      const auto run = three_ ? (partial ? factored_gradient_slice<true, true>
                                         : factored_gradient_slice<true, false>)
                              : (partial ? factored_gradient_slice<false, true>
                                         : factored_gradient_slice<false, false>);
      run(m.a, a_stride_, m.b, b_stride_, third_.get(), field_.mlp.weights[1], hidden_, g, rows_,
          columns_, m.d_a, m.d_b, d_c, partial ? partial + layout_.weight[1] : nullptr);
      if (partial) partial[layout_.bias[1]] += row_sum(g, slice_floats());
    } else {
      BlockMlp mlp(field_.mlp, transposed_.layers(), m.mlp);
      each_block(m, mlp, [&](int j, int64_t k, int count) {
        mlp.forward(count);
        std::memcpy(mlp.raw(), g + j * columns_ + k, 4 * padded(count));
        const float* d = mlp.backward(count, layout_, partial);
        for (int h = 0; h < hidden_; ++h) {
          vf total = {};
          for (int64_t at = 0; at < padded(count); at += kLanes) {
            const vf value = load(d + h * kBlock + at);
            total += value;
            float* p = m.d_b + h * b_stride_ + k + at;
            store(p, load(p) + value);
            if (!three_) continue;
            p = d_c + (j * hidden_ + h) * b_stride_ + k + at;
            store(p, load(p) + value);
          }
          m.d_a[h * a_stride_ + j] += sum(total);
        }
      });
    }
    const float* d_first[] = {m.d_a, m.d_b};
    for (int t = 0; t < 2; ++t)
      if (field_.table_channels[t])
        first_product_backward(t, i, d_first[t], m.table,
                               partial ? partial + table_partial_[t] : nullptr,
                               partial && biased_ == t ? partial + layout_.bias[0] : nullptr);
  }

  // After every slice of a sample: the third table's share, and the planes' gradients.
  void finish_sample(int sample, Team& team) {
    if (three_) {
      // The third table's rows are spread over the groups as the slices are.
      parallel(team, groups_, [&](int group, int thread) {
        float* partial = field_.gradients.weights ? partials_.group(group) : nullptr;
        const int64_t row = hidden_ * b_stride_;
        const int end = static_cast<int>(static_cast<int64_t>(rows_) * (group + 1) / groups_);
        for (int j = static_cast<int>(static_cast<int64_t>(rows_) * group / groups_); j < end;
             ++j) {
          float* total = third_gradient_.get() + j * row;
          for (int other = 1; other < groups_; ++other)
            for (int64_t at = 0; at < row; at += kLanes)
              store(total + at, load(total + at) + load(total + other * third_floats() + at));
          first_product_backward(2, j, total, slices_[thread].table,
                                 partial ? partial + table_partial_[2] : nullptr,
                                 partial && biased_ == 2 ? partial + layout_.bias[0] : nullptr);
        }
      });
    }
    if (!field_.planes[0].gradient) return;
    for (int p = 0; p < field_.plane_count; ++p) {
      const GridPlane& plane = field_.planes[p];
      prefer_huge_pages(plane.gradient + sample * plane.gradient_stride,
                        int64_t{4} * field_.channels * plane.height * plane.width);
    }
    parallel(team, static_cast<int64_t>(field_.plane_count) * field_.channels,
             [&](int task, int thread) {
               resample_backward(field_.planes[task / field_.channels], task % field_.channels,
                                 sample, images_.get() + thread * image_floats_);
             });
  }

  // After every sample.
  void write_decoder_gradients() {
    if (!field_.gradients.weights) return;
    partials_.write_layers(field_.gradients, 1);
    for (int t = 0; t < 3; ++t)
      if (field_.table_channels[t])
        partials_.write(field_.table_weight_gradient[t], table_partial_[t], hidden_,
                        field_.table_channels[t]);
  }

 private:
  static int64_t table_weight_floats(const GridField& field) {
    int64_t floats = 0;
    for (int channels : field.table_channels) floats += field.mlp.widths[1] * padded(channels);
    return floats;
  }

  int64_t third_floats() const { return rows_ * hidden_ * b_stride_; }

  // working memory for resampling one channel of a plane
  int64_t image_floats(const GridPlane& plane) const {
    const int64_t down = count_down(plane), across = padded(count_across(plane));
    return down * padded(plane.width) + padded(down) * across;
  }
  int count_across(const GridPlane& plane) const {
    return field_.shape[plane.width_is_slow ? (plane.table == 2 ? 1 : 0) : (plane.table ? 2 : 1)];
  }
  int count_down(const GridPlane& plane) const {
    return field_.shape[plane.width_is_slow ? (plane.table ? 2 : 1) : (plane.table == 2 ? 1 : 0)];
  }

  float* table_row(int t, int slow, int channel) {
    return tables_[t].get() +
           (static_cast<int64_t>(slow) * field_.table_channels[t] + channel) * fast_[t];
  }

  // Fills one channel of a table: the sum of the planes that have it.
  void resample(int t, int channel, int sample, float* memory) {
    bool added = false;
    for (int n = 0; n < field_.plane_count; ++n) {
      const GridPlane& plane = field_.planes[n];
      const int own = channel - plane.channel;
      if (plane.table != t || own < 0 || own >= field_.channels) continue;
      const float* image = plane.data + sample * plane.batch_stride +
                           static_cast<int64_t>(own) * plane.height * plane.width;
      const int down = count_down(plane), across = count_across(plane);
      const int64_t across_stride = padded(across), width = padded(plane.width);
      float* rows = memory;                    // [down][width]
      float* resampled = rows + down * width;  // [padded down][across_stride]
      for (int y = 0; y < down; ++y) {
        const float* low = image + static_cast<int64_t>(plane.down.low[y]) * plane.width;
        const float* high = image + static_cast<int64_t>(plane.down.high[y]) * plane.width;
        const float weight_low = plane.down.weight_low[y], weight_high = plane.down.weight_high[y];
        float* row = rows + y * width;
        for (int x = 0; x < plane.width; ++x) row[x] = weight_low * low[x] + weight_high * high[x];
      }
      for (int y = 0; y < down; ++y) {
        const float* row = rows + y * width;
        float* out = resampled + y * across_stride;
        for (int x = 0; x < across; ++x)
          out[x] = plane.across.weight_low[x] * row[plane.across.low[x]] +
                   plane.across.weight_high[x] * row[plane.across.high[x]];
        for (int x = across; x < across_stride; ++x) out[x] = 0;
      }
      if (plane.width_is_slow) {
        const int64_t slow_stride = static_cast<int64_t>(field_.table_channels[t]) * fast_[t];
        (added ? transpose<true> : transpose<false>)(table_row(t, 0, channel), slow_stride,
                                                     resampled, across_stride, down, across);
      } else {
        for (int y = 0; y < down; ++y) {
          float* out = table_row(t, y, channel);
          const float* in = resampled + y * across_stride;
          for (int64_t x = 0; x < across_stride; x += kLanes)
            store(out + x, added ? load(out + x) + load(in + x) : load(in + x));
        }
      }
      added = true;
    }
  }

  void resample_backward(const GridPlane& plane, int channel, int sample, float* memory) {
    const int down = count_down(plane), across = count_across(plane);
    const int64_t across_stride = padded(across), width = padded(plane.width);
    float* rows = memory;
    float* resampled = rows + down * width;
    const int t = plane.table, at = plane.channel + channel;
    if (plane.width_is_slow) {
      const int64_t slow_stride = static_cast<int64_t>(field_.table_channels[t]) * fast_[t];
      transpose(resampled, across_stride, table_row(t, 0, at), slow_stride, across, down);
    }
    for (int y = 0; y < down; ++y) {
      const float* in = plane.width_is_slow ? resampled + y * across_stride : table_row(t, y, at);
      float* row = rows + y * width;
      std::memset(row, 0, 4 * width);
      for (int x = 0; x < across; ++x) {
        row[plane.across.low[x]] += plane.across.weight_low[x] * in[x];
        row[plane.across.high[x]] += plane.across.weight_high[x] * in[x];
      }
    }
    const int64_t size = static_cast<int64_t>(plane.height) * plane.width;
    float* image = plane.gradient + sample * plane.gradient_stride + channel * size;
    std::memset(image, 0, 4 * size);
    for (int y = 0; y < down; ++y) {
      float* low = image + static_cast<int64_t>(plane.down.low[y]) * plane.width;
      float* high = image + static_cast<int64_t>(plane.down.high[y]) * plane.width;
      const float weight_low = plane.down.weight_low[y], weight_high = plane.down.weight_high[y];
      const float* row = rows + y * width;
      for (int x = 0; x < plane.width; ++x) low[x] += weight_low * row[x];
      for (int x = 0; x < plane.width; ++x) high[x] += weight_high * row[x];
    }
  }

  // out [H][fast] = the first layer applied to a table's slice
  void first_product(int t, int slow, const float* bias, float* out) {
    const int channels = field_.table_channels[t];
    multiply(out, fast_[t], field_.table_weight[t], channels, table_row(t, slow, 0), fast_[t],
             hidden_, channels, fast_[t], bias, false);
  }

  // Adds to the partial gradients, then puts the gradient of the slice in the slice's place.
  void first_product_backward(int t, int slow, const float* d_first, float* memory,
                              float* weight_partial, float* bias_partial) {
    const int channels = field_.table_channels[t];
    const int64_t stride = padded(channels);
    float* table = table_row(t, slow, 0);
    if (weight_partial) {
      transpose(memory, stride, table, fast_[t], channels, static_cast<int>(fast_[t]));
      multiply(weight_partial, stride, d_first, fast_[t], memory, stride, hidden_,
               static_cast<int>(fast_[t]), stride, nullptr, true);
    }
    for (int h = 0; bias_partial && h < hidden_; ++h)
      bias_partial[h] += row_sum(d_first + h * fast_[t], fast_[t]);
    if (field_.planes[0].gradient)
      multiply(table, fast_[t], back_[t].get(), hidden_, d_first, fast_[t], channels, hidden_,
               fast_[t], nullptr, false);
  }

  // m.a and m.b for slice i; true if they are exponentials, as the factored form takes them.
  bool prepare(int i, SliceMemory& m) {
    if (m.prepared == i) return m.factored;  // a loss needs a slice's value, then its gradient
    float* const parts[] = {m.a, m.b};
    bool factored = factorable_ && !(three_ && third_plain_);
    for (int t = 0; t < 2; ++t) {
      const int64_t floats = hidden_ * fast_[t];
      if (field_.table_channels[t])
        first_product(t, i, biased_ == t ? field_.mlp.biases[0] : nullptr, parts[t]);
      else
        std::memset(parts[t], 0, 4 * floats);
      factored = factored && within_range(parts[t], floats);
    }
    if (factored)
      for (int t = 0; t < 2; ++t) exponentiate(parts[t], hidden_ * fast_[t]);
    m.prepared = i;
    m.factored = factored;
    return factored;
  }

  // Whether the product of the exponentials is sure to be a normal float: 2^126 is e^87.3.
  bool within_range(const float* values, int64_t floats) const {
    const float limit = three_ ? 29.0f : 43.5f;
    vi outside = {};
    for (int64_t at = 0; at < floats; at += kLanes)
      outside |= ~(absolute(load(values + at)) <= limit);  // a NaN is outside too
    return !any(outside);
  }

  static void exponentiate(float* values, int64_t floats) {
    for (int64_t at = 0; at < floats; at += kLanes)
      store(values + at, bounded_exponential(load(values + at)));
  }

  // Puts the first layer's output of every block of voxels in mlp.first(), and calls
  // visit(j, k, count) for each.
  template <class Visit>
  void each_block(SliceMemory& m, BlockMlp& mlp, const Visit& visit) {
    for (int j = 0; j < rows_; ++j) {
      const float* c = nullptr;
      if (three_ && third_plain_) {
        c = third_.get() + j * hidden_ * b_stride_;
      } else if (three_) {  // the table was replaced by its exponentials
        first_product(2, j, biased_ == 2 ? field_.mlp.biases[0] : nullptr, m.c);
        c = m.c;
      }
      for (int64_t k = 0; k < field_.shape[2]; k += kBlock) {
        const int count = static_cast<int>(lesser<int64_t>(kBlock, field_.shape[2] - k));
        for (int h = 0; h < hidden_; ++h)
          for (int64_t at = 0; at < padded(count); at += kLanes) {
            vf value = load(m.b + h * b_stride_ + k + at) + m.a[h * a_stride_ + j];
            if (c) value += load(c + h * b_stride_ + k + at);
            store(mlp.first() + h * kBlock + at, value);
          }
        visit(j, k, count);
      }
    }
  }

  const GridField& field_;
  const int hidden_, rows_;
  const int64_t columns_;              // of a slice
  const int64_t a_stride_, b_stride_;  // of the first and second table's slices, and the third's
  const bool three_;
  const int groups_;
  const bool factorable_;
  const TransposedWeights transposed_;
  const Partials partials_;
  const PartialLayout& layout_;
  int biased_ = -1;  // the table that carries the first layer's bias
  int slow_[3];
  int64_t fast_[3];
  Buffer tables_[3];  // [slow][channels][fast]; after the backward of a slice, its gradient
  Buffer back_[3];    // [channels][H]: the transposed weight
  Buffer third_;      // [Y][H][columns]: C, or e^C
  bool third_plain_ = false;
  Buffer third_gradient_;  // [groups][Y][H][columns]
  Buffer scaled_weight_, memory_, images_;
  int64_t table_partial_[3] = {}, image_floats_ = 0;
  SliceMemory* slices_ = nullptr;
};

// [rows][columns] to [rows][padded], the rest 0, and back.
void pad_rows(float* out, int64_t out_stride, const float* in, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    std::memcpy(out + row * out_stride, in + static_cast<int64_t>(row) * columns,
                4 * static_cast<size_t>(columns));
    std::memset(out + row * out_stride + columns, 0, 4 * (out_stride - columns));
  }
}

void unpad_rows(float* out, const float* in, int64_t in_stride, int rows, int columns) {
  for (int row = 0; row < rows; ++row)
    std::memcpy(out + static_cast<int64_t>(row) * columns, in + row * in_stride,
                4 * static_cast<size_t>(columns));
}

int64_t voxels(const GridField& field) {
  return static_cast<int64_t>(field.shape[0]) * field.shape[1] * field.shape[2];
}

class OptionalField {
 public:
  OptionalField(const GridField* field, int threads, bool backward)
      : field_(field ? new Field(*field, threads, backward) : nullptr) {}
  ~OptionalField() { delete field_; }
  OptionalField(const OptionalField&) = delete;
  OptionalField& operator=(const OptionalField&) = delete;
  explicit operator bool() const { return field_; }
  Field* operator->() const { return field_; }

 private:
  Field* field_;
};

}  // namespace

void density_grid(const GridField& field, float* sigma, Team& team) {
  Field work(field, team.threads(), false);
  const bool unpadded = work.columns() == field.shape[2];  // then slices lie as in the volume
  Buffer slices(unpadded ? 0 : team.threads() * work.slice_floats());
  const int64_t slice_voxels = static_cast<int64_t>(field.shape[1]) * field.shape[2];
  for (int sample = 0; sample < field.batch; ++sample) {
    work.tabulate(sample, team);
    parallel(team, field.shape[0], [&](int i, int thread) {
      float* out = sigma + sample * voxels(field) + i * slice_voxels;
      float* slice = unpadded ? out : slices.get() + thread * work.slice_floats();
      work.slice(i, slice, thread);
      if (!unpadded) unpad_rows(out, slice, work.columns(), field.shape[1], field.shape[2]);
    });
  }
}

void density_grid_backward(const GridField& field, const float* d_sigma, const float* sigma,
                           Team& team) {
  Field work(field, team.threads(), true);
  Buffer slices(2 * team.threads() * work.slice_floats());
  const int64_t slice_voxels = static_cast<int64_t>(field.shape[1]) * field.shape[2];
  const bool identity = field.mlp.output == Output::identity;
  for (int sample = 0; sample < field.batch; ++sample) {
    work.tabulate(sample, team);
    parallel(team, work.groups(), [&](int group, int thread) {
      float* g = slices.get() + 2 * thread * work.slice_floats();
      float* own = g + work.slice_floats();
      const int first = work.first_slice(group);
      for (int i = first; i < work.first_slice(group + 1); ++i) {
        const int64_t at = sample * voxels(field) + i * slice_voxels;
        pad_rows(g, work.columns(), d_sigma + at, field.shape[1], field.shape[2]);
        if (!identity) pad_rows(own, work.columns(), sigma + at, field.shape[1], field.shape[2]);
        work.slice_backward(i, group, g, identity ? nullptr : own, i == first, thread);
      }
    });
    work.finish_sample(sample, team);
  }
  work.write_decoder_gradients();
}

void density_grid_loss(const GridField& field, const GridField* target, const float* volume,
                       Difference kind, float* loss, Team& team) {
  Field work(field, team.threads(), false);
  const OptionalField other(target, team.threads(), false);
  Buffer slices(2 * team.threads() * work.slice_floats()), sums(field.shape[0]);
  const int64_t slice_voxels = static_cast<int64_t>(field.shape[1]) * field.shape[2];
  for (int sample = 0; sample < field.batch; ++sample) {
    work.tabulate(sample, team);
    if (other) other->tabulate(sample, team);
    parallel(team, field.shape[0], [&](int i, int thread) {
      float* ours = slices.get() + 2 * thread * work.slice_floats();
      float* theirs = ours + work.slice_floats();
      work.slice(i, ours, thread);
      if (other)
        other->slice(i, theirs, thread);
      else
        pad_rows(theirs, work.columns(), volume + sample * voxels(field) + i * slice_voxels,
                 field.shape[1], field.shape[2]);
      float total = 0;
      for (int j = 0; j < field.shape[1]; ++j) {
        float* row = ours + j * work.columns();
        const float* other_row = theirs + j * work.columns();
        for (int64_t k = 0; k < work.columns(); k += kLanes) {
          const vf d = load(row + k) - load(other_row + k);
          store(row + k, kind == Difference::l1 ? absolute(d) : d * d);
        }
        for (int64_t k = field.shape[2]; k < work.columns(); ++k) row[k] = 0;
        total += row_sum(row, work.columns());
      }
      sums.get()[i] = total;
    });
    double total = 0;
    for (int i = 0; i < field.shape[0]; ++i) total += sums.get()[i];
    loss[sample] = static_cast<float>(total / static_cast<double>(voxels(field)));
  }
}

void density_grid_loss_backward(const GridField& field, const GridField* target,
                                const float* volume, Difference kind, const float* d_loss,
                                float* d_volume, Team& team) {
  const bool needs_ours = field.planes[0].gradient || field.gradients.weights;
  const bool needs_theirs = target && (target->planes[0].gradient || target->gradients.weights);
  Field work(field, team.threads(), needs_ours);
  const OptionalField other(target, team.threads(), needs_theirs);
  const int64_t floats = work.slice_floats();
  Buffer slices(4 * team.threads() * floats);
  const int64_t slice_voxels = static_cast<int64_t>(field.shape[1]) * field.shape[2];
  for (int sample = 0; sample < field.batch; ++sample) {
    work.tabulate(sample, team);
    if (other) other->tabulate(sample, team);
    const float scale = d_loss[sample] / static_cast<float>(voxels(field));
    parallel(team, work.groups(), [&](int group, int thread) {
      float* ours = slices.get() + 4 * thread * floats;
      float *theirs = ours + floats, *d_ours = theirs + floats, *d_theirs = d_ours + floats;
      const int first = work.first_slice(group);
      for (int i = first; i < work.first_slice(group + 1); ++i) {
        const int64_t at = sample * voxels(field) + i * slice_voxels;
        work.slice(i, ours, thread);
        if (other)
          other->slice(i, theirs, thread);
        else
          pad_rows(theirs, work.columns(), volume + at, field.shape[1], field.shape[2]);
        for (int64_t n = 0; n < floats; n += kLanes) {
          const vf d = load(ours + n) - load(theirs + n);
          const vf slope = kind == Difference::l2 ? 2.0f * d
                                                  : (d > 0.0f ? splat(1.0f) : vf{}) -
                                                        (d < 0.0f ? splat(1.0f) : vf{}) + d * 0.0f;
          store(d_ours + n, scale * slope);
          store(d_theirs + n, -scale * slope);
        }
        for (int j = 0; j < field.shape[1]; ++j)
          for (int64_t k = field.shape[2]; k < work.columns(); ++k)
            d_ours[j * work.columns() + k] = d_theirs[j * work.columns() + k] = 0;
        if (d_volume)
          unpad_rows(d_volume + at, d_theirs, work.columns(), field.shape[1], field.shape[2]);
        if (needs_ours) work.slice_backward(i, group, d_ours, ours, i == first, thread);
        if (needs_theirs) other->slice_backward(i, group, d_theirs, theirs, i == first, thread);
      }
    });
    if (needs_ours) work.finish_sample(sample, team);
    if (needs_theirs) other->finish_sample(sample, team);
  }
  if (needs_ours) work.write_decoder_gradients();
  if (needs_theirs) other->write_decoder_gradients();
}

}  // namespace DENSITYRL_ISA
}  // namespace densityrl
