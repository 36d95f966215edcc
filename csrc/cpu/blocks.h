// Small matrix products and transposes, and a decoder applied to a block of columns. A column is
// a point or a voxel, and the columns of a row are what a vector holds.
#pragma once

#include "simd.h"

namespace densityrl {
namespace DENSITYRL_ISA {

constexpr int kBlock = 64;  // columns in a block

template <int ROWS, int VECTORS>
inline void multiply_tile(float* out, int64_t out_stride, const float* left, int64_t left_stride,
                          const float* right, int64_t right_stride, int depth, const float* bias,
                          bool accumulate) {
  vf total[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v)
      total[row][v] = accumulate ? load(out + row * out_stride + v * kLanes) : vf{};
  for (int d = 0; d < depth; ++d) {
    vf operand[VECTORS];
    for (int v = 0; v < VECTORS; ++v) operand[v] = load(right + d * right_stride + v * kLanes);
    for (int row = 0; row < ROWS; ++row) {
      const float factor = left[row * left_stride + d];
      for (int v = 0; v < VECTORS; ++v) total[row][v] += factor * operand[v];
    }
  }
  // The bias comes last: it may be large beside the products, and would cost each a rounding.
  for (int row = 0; row < ROWS; ++row)
    for (int v = 0; v < VECTORS; ++v)
      store(out + row * out_stride + v * kLanes, bias ? total[row][v] + bias[row] : total[row][v]);
}

template <int ROWS>
inline void multiply_rows(float* out, int64_t out_stride, const float* left, int64_t left_stride,
                          const float* right, int64_t right_stride, int depth, int64_t columns,
                          const float* bias, bool accumulate) {
  constexpr int kVectors = DENSITYRL_LANES == 16 ? 4 : 2;
  int64_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes)
    multiply_tile<ROWS, kVectors>(out + column, out_stride, left, left_stride, right + column,
                                  right_stride, depth, bias, accumulate);
  for (; column < columns; column += kLanes)
    multiply_tile<ROWS, 1>(out + column, out_stride, left, left_stride, right + column,
                           right_stride, depth, bias, accumulate);
}

// out [rows][columns] = left [rows][depth] right [depth][columns] + bias [rows] (may be null), or
// with `accumulate` added to what is there. columns is a multiple of kPad.
inline void multiply(float* out, int64_t out_stride, const float* left, int64_t left_stride,
                     const float* right, int64_t right_stride, int rows, int depth, int64_t columns,
                     const float* bias, bool accumulate) {
  int row = 0;
  for (; row + 4 <= rows; row += 4)
    multiply_rows<4>(out + row * out_stride, out_stride, left + row * left_stride, left_stride,
                     right, right_stride, depth, columns, bias ? bias + row : nullptr, accumulate);
  for (; row < rows; ++row)
    multiply_rows<1>(out + row * out_stride, out_stride, left + row * left_stride, left_stride,
                     right, right_stride, depth, columns, bias ? bias + row : nullptr, accumulate);
}

// out [columns][rows] = in [rows][columns] or, with `add`, added to what is there. Rows of `out`
// are written to a multiple of kPad, with zeros; rows of `in` are read to one.
template <bool ADD = false>
inline void transpose(float* out, int64_t out_stride, const float* in, int64_t in_stride, int rows,
                      int columns) {
  for (int r = 0; r < padded(rows); r += kLanes)
    for (int c = 0; c < columns; c += kLanes) {
      vf tile[kLanes], shuffled[kLanes];
      for (int i = 0; i < kLanes; ++i)
        tile[i] = r + i < rows ? load(in + (r + i) * in_stride + c) : vf{};
      // Interleaving row i with row i + kLanes / 2, log2(kLanes) times over, transposes.
      for (int round = 1; round < kLanes; round *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
          shuffled[2 * i] = interleave_low(tile[i], tile[i + kLanes / 2]);
          shuffled[2 * i + 1] = interleave_high(tile[i], tile[i + kLanes / 2]);
        }
        for (int i = 0; i < kLanes; ++i) tile[i] = shuffled[i];
      }
      for (int i = 0; i < kLanes && c + i < columns; ++i) {
        float* p = out + (c + i) * out_stride + r;
        store(p, ADD ? load(p) + tile[i] : tile[i]);
      }
    }
}

inline float row_sum(const float* row, int64_t columns) {
  vf total = {};
  for (int64_t column = 0; column < columns; column += kLanes) total += load(row + column);
  return sum(total);
}

// Where one group's partial sums of the decoder's gradients lie in a row of floats. A weight's
// rows are padded.
struct PartialLayout {
  int64_t floats = 0;
  int64_t weight[kMaxLayers], bias[kMaxLayers];

  PartialLayout(const Mlp& mlp, int first_depth) {
    for (int layer = 0; layer < mlp.layers; ++layer) {
      const int depth = layer ? mlp.widths[layer] : first_depth;
      weight[layer] = floats;
      floats += mlp.widths[layer + 1] * padded(depth);
      bias[layer] = floats;
      floats += padded(mlp.widths[layer + 1]);
    }
  }
};

// A decoder's layers after the first product, and the working memory for one block of columns.
class BlockMlp {
 public:
  // floats of working memory that one thread needs
  static int64_t memory(const Mlp& mlp, bool backward) {
    int64_t rows = mlp.widths[mlp.layers], widest = rows;
    for (int layer = 1; layer < mlp.layers; ++layer) {
      rows += (backward ? 2 : 1) * mlp.widths[layer];
      widest = greater<int64_t>(widest, mlp.widths[layer]);
    }
    return kBlock * (rows + (backward ? 3 * padded(widest) : 0));
  }

  // transposed: [in][out] of every layer from the second on; null for a forward only
  BlockMlp(const Mlp& mlp, const float* const* transposed, float* memory)
      : mlp_(mlp), transposed_(transposed) {
    const bool backward = transposed != nullptr;
    int64_t widest = mlp.widths[mlp.layers];
    for (int layer = 1; layer < mlp.layers; ++layer) {
      value_[layer] = memory;
      memory += kBlock * mlp.widths[layer];
      slope_[layer] = backward ? memory : nullptr;
      if (backward) memory += kBlock * mlp.widths[layer];
      widest = greater<int64_t>(widest, mlp.widths[layer]);
    }
    value_[mlp.layers] = memory;
    memory += kBlock * mlp.widths[mlp.layers];
    for (int i = 0; backward && i < 3; ++i, memory += kBlock * padded(widest)) spare_[i] = memory;
  }

  // [widths[1]][kBlock]: where the first product is to be put.
  float* first() { return value_[1]; }
  // [widths[layers]][kBlock]
  float* raw() { return value_[mlp_.layers]; }

  // From the first product to the raw outputs; `count` columns are wanted.
  void forward(int count) {
    const int columns = static_cast<int>(padded(count));
    for (int layer = 1; layer < mlp_.layers; ++layer) {
      activate_layer(layer, columns);
      multiply(value_[layer + 1], kBlock, mlp_.weights[layer], mlp_.widths[layer], value_[layer],
               kBlock, mlp_.widths[layer + 1], mlp_.widths[layer], columns, mlp_.biases[layer],
               false);
    }
  }

  // After forward, from the gradient of the raw outputs, which is found and overwritten in
  // raw(), to that of the first product, which is returned. Adds to `partial`, if not null.
  float* backward(int count, const PartialLayout& layout, float* partial) {
    const int columns = static_cast<int>(padded(count));
    float* gradient = raw();
    for (int layer = mlp_.layers - 1; layer >= 1; --layer) {
      const int rows = mlp_.widths[layer + 1], depth = mlp_.widths[layer];
      if (partial) {
        const int64_t stride = padded(depth);
        transpose(spare_[2], stride, value_[layer], kBlock, depth, columns);
        multiply(partial + layout.weight[layer], stride, gradient, kBlock, spare_[2], stride, rows,
                 columns, stride, nullptr, true);
        for (int row = 0; row < rows; ++row)
          partial[layout.bias[layer] + row] += row_sum(gradient + row * kBlock, columns);
      }
      float* next = spare_[layer % 2];
      multiply(next, kBlock, transposed_[layer], rows, gradient, kBlock, depth, rows, columns,
               nullptr, false);
      for (int row = 0; row < depth; ++row)
        for (int column = 0; column < columns; column += kLanes) {
          float* p = next + row * kBlock + column;
          store(p, load(p) * load(slope_[layer] + row * kBlock + column));
        }
      gradient = next;
    }
    return gradient;
  }

 private:
  template <Hidden hidden>
  void activate_as(int layer, int columns) {
    for (int row = 0; row < mlp_.widths[layer]; ++row)
      for (int column = 0; column < columns; column += kLanes) {
        const int64_t at = row * kBlock + column;
        const Activated result = activate<hidden>(load(value_[layer] + at));
        store(value_[layer] + at, result.value);
        if (slope_[layer]) store(slope_[layer] + at, result.slope);
      }
  }

  void activate_layer(int layer, int columns) {
    switch (mlp_.hidden) {
      case Hidden::softplus:
        return activate_as<Hidden::softplus>(layer, columns);
      case Hidden::relu:
        return activate_as<Hidden::relu>(layer, columns);
      case Hidden::silu:
        return activate_as<Hidden::silu>(layer, columns);
    }
  }

  const Mlp& mlp_;
  const float* const* transposed_;
  float* value_[kMaxLayers + 1];
  float* slope_[kMaxLayers];
  float* spare_[3] = {};
};

// [in][out] copies of every layer from the second on.
class TransposedWeights {
 public:
  explicit TransposedWeights(const Mlp& mlp) {
    int64_t floats = 0;
    for (int layer = 1; layer < mlp.layers; ++layer)
      floats += static_cast<int64_t>(mlp.widths[layer]) * mlp.widths[layer + 1];
    memory_.allocate(floats);
    float* out = memory_.get();
    for (int layer = 1; layer < mlp.layers; ++layer) {
      layers_[layer] = out;
      for (int i = 0; i < mlp.widths[layer]; ++i)
        for (int o = 0; o < mlp.widths[layer + 1]; ++o)
          *out++ = mlp.weights[layer][static_cast<int64_t>(o) * mlp.widths[layer] + i];
    }
  }
  const float* const* layers() const { return layers_; }

 private:
  Buffer memory_;
  const float* layers_[kMaxLayers];
};

// The partial sums of the decoder's gradients, one row of floats a group.
class Partials {
 public:
  Partials(const Mlp& mlp, int first_depth, int64_t extra, int groups)
      : layout(mlp, first_depth), mlp_(mlp), stride_(layout.floats + extra), groups_(groups) {
    memory_.allocate(groups * stride_);
    std::memset(memory_.get(), 0, 4 * groups * stride_);
  }

  float* group(int index) const { return memory_.get() + index * stride_; }

  // One number: the sum over the groups, in their order.
  float total(int64_t at) const {
    float result = 0;
    for (int index = 0; index < groups_; ++index) result += group(index)[at];
    return result;
  }

  // out [rows][columns] from a matrix with padded rows
  void write(float* out, int64_t at, int rows, int columns) const {
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < columns; ++column)
        *out++ = total(at + row * padded(columns) + column);
  }

  // All biases, and the weights from `first_layer` on.
  void write_layers(const MlpGradients& gradients, int first_layer) const {
    for (int layer = 0; layer < mlp_.layers; ++layer) {
      const int rows = mlp_.widths[layer + 1];
      write(gradients.biases[layer], layout.bias[layer], 1, rows);
      if (layer >= first_layer)
        write(gradients.weights[layer], layout.weight[layer], rows, mlp_.widths[layer]);
    }
  }

  const PartialLayout layout;

 private:
  const Mlp& mlp_;
  const int64_t stride_;
  const int groups_;
  Buffer memory_;
};

}  // namespace DENSITYRL_ISA
}  // namespace densityrl
