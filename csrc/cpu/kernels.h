// What the CPU kernels take: plain structs of pointers and sizes, fp32, row-major.
#pragma once

#include <cstdint>

namespace densityrl {

enum class Hidden { softplus, relu, silu };
enum class Output { identity, softplus, exp };
enum class Combine { sum, concat, product };
enum class Difference { l1, l2 };

// Fixed, so that results do not depend on the number of threads: that many partial sums of the
// decoder's gradients are kept, each over its own share of the work.
constexpr int kMaxGroups = 64;
constexpr int kThirdTableGroups = 8;  // fewer where each also holds a table's gradient
constexpr int kMaxLayers = 64;
constexpr int kMaxPlanes = 64;

struct Mlp {
  int layers;                   // 0: no decoder
  const int* widths;            // [layers + 1]: inputs of the first layer, outputs of each
  const float* const* weights;  // [layers] of [out][in]
  const float* const* biases;   // [layers] of [out]
  Hidden hidden;
  Output output;
};

struct MlpGradients {  // written, not added to; null where none is asked for
  float* const* weights;
  float* const* biases;
};

// Linear interpolation along an image axis: for every grid coordinate two pixels and weights.
struct Taps {
  const int32_t* low;
  const int32_t* high;
  const float* weight_low;
  const float* weight_high;
};

struct GridPlane {
  const float* data;  // [B][C][H][W]; a sample's block is contiguous
  float* gradient;    // likewise, or null
  int64_t batch_stride, gradient_stride;
  int height, width;
  Taps across, down;   // along the width, along the height
  int table;           // 0: (x, y), 1: (x, z), 2: (y, z)
  int channel;         // where its channels begin in the table
  bool width_is_slow;  // the image's width is the table's first axis
};

// A density field on a grid, as up to three tables whose broadcast sum goes into the decoder's
// first activation. Layer 0 of the mlp is split into the tables' columns.
struct GridField {
  int batch, channels;
  int shape[3];
  int plane_count;
  const GridPlane* planes;
  int table_channels[3];         // 0: the table is absent
  const float* table_weight[3];  // [widths[1]][table_channels]
  float* table_weight_gradient[3];
  Mlp mlp;
  MlpGradients gradients;  // of layer 0 only the bias
};

struct PointPlane {
  const float* data;  // [B][C][H][W]; a sample's block is contiguous
  float* gradient;    // likewise, or null
  int64_t batch_stride, gradient_stride;
  int height, width;
  int axis_across, axis_down;
  float extent_across, extent_down;
};

struct PointField {
  int batch, channels;
  int plane_count;
  const PointPlane* planes;
  Combine combine;
  bool border, align_corners;
  int64_t count;        // points a sample
  const float* points;  // [B][count][3], samples `points_stride` apart (0: shared)
  int64_t points_stride;
  float* points_gradient;  // [B][count][3] or null
  Mlp mlp;                 // without layers, the features themselves are the output
  MlpGradients gradients;
};

class Team;

// The functions that are compiled once for every instruction set.
#define DENSITYRL_KERNELS                                                                         \
  /* sigma [B][X][Y][Z] */                                                                        \
  void density_grid(const GridField&, float* sigma, Team&);                                       \
  void density_grid_backward(const GridField&, const float* d_sigma, const float* sigma, Team&);  \
  /* loss [B]; the target is a second field, or a volume where that is null */                    \
  void density_grid_loss(const GridField&, const GridField* target, const float* volume,          \
                         Difference, float* loss, Team&);                                         \
  void density_grid_loss_backward(const GridField&, const GridField* target, const float* volume, \
                                  Difference, const float* d_loss, float* d_volume, Team&);       \
  /* sigma [B][M], features [B][M][rows - 1]; or, without layers, features [B][M][C'] */          \
  void points(const PointField&, float* sigma, float* features, Team&);                           \
  void points_backward(const PointField&, const float* d_sigma, const float* sigma,               \
                       const float* d_features, Team&);

namespace baseline {
DENSITYRL_KERNELS
}
#if defined(__x86_64__)
namespace avx2 {
DENSITYRL_KERNELS
}
namespace avx512 {
DENSITYRL_KERNELS
}
#endif

}  // namespace densityrl
