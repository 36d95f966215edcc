// What the kernels share: elementary functions, vector access, sums over a warp, the launch.
//
// The approximations are the special-function unit's own instructions (relative error about 2^-22,
// of the logarithm absolute near 1; denormal numbers count as zero). No flag of the compiler
// decides about accuracy: what is approximate is named so.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace densityrl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// ------------------------------------------------------------------------------- instructions

#ifdef DENSITYRL_EMULATED

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flush(std::exp2(x)); }
inline float log2_approx(float x) { return std::log2(flush(x)); }
inline float reciprocal_approx(float x) { return flush(1.f / flush(x)); }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_m16n8k8_tf32(d, a, b);
}
inline void red_add(float4* to, float4 value) { atomicAdd(to, value); }
template <class T>
T* settled(T* at) {
  return at;
}
inline float clamp_or_nan(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

#else

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// D += A B, with A [16][8] and B [8][8] in tf32: the fragments of mma.m16n8k8 (PTX ISA). Lane l has
// of A the rows l / 4 and l / 4 + 8, the columns l % 4 and l % 4 + 4 (a[1] is the lower row's first
// column); of B the rows l % 4 and l % 4 + 4, column l / 4; of D the rows l / 4 (d[0], d[1]) and
// l / 4 + 8, the columns 2 (l % 4) and the next.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Adds four adjacent floats; one memory operation from compute capability 9.0 on.
__device__ __forceinline__ void red_add(float4* to, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
#else
  atomicAdd(&to->x, value.x);
  atomicAdd(&to->y, value.y);
  atomicAdd(&to->z, value.z);
  atomicAdd(&to->w, value.w);
#endif
}

// The pointer itself, to global memory. The compiler works it out once, and does not make parts of
// it part of every address that is relative to it.
template <class T>
__device__ __forceinline__ T* settled(T* at) {
  size_t address = __cvta_generic_to_global(at);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// x between two limits; a NaN stays.
__device__ __forceinline__ float clamp_or_nan(float x, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
}

#endif

// ------------------------------------------------------------------------ elementary functions

// e^x = 2^n e^(x - n ln 2): rounding x log2(e) alone would cost |x| 2^-24.
__device__ __forceinline__ float exp_accurate(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: added and taken away, it rounds
  float n = (fminf(fmaxf(x * kLog2E, -126.f), 127.f) + kRound) - kRound;
  // ln 2 in two parts, of which the first times n is exact.
  float rest = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
  return exp2_approx(n) * exp2_approx(rest * kLog2E);
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)) by a polynomial, relative error 4e-9.
__device__ __forceinline__ float log1p_of_fraction(float e) {
  float s = e * reciprocal_approx(e + 2.f);
  float z = s * s;
  float q = fmaf(z, 0.2817833423614502f, 0.27960601449012756f);
  q = fmaf(q, z, 0.40024909377098083f);
  q = fmaf(q, z, 0.6666631698608398f);
  q = fmaf(q, z, 2.f);
  return q * s;
}

__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }  // a NaN stays

__device__ __forceinline__ float softplus(float x) {
  return relu(x) + log1p_of_fraction(exp_accurate(-fabsf(x)));
}

__device__ __forceinline__ float sigmoid(float x) {
  float e = exp_accurate(-fabsf(x));
  float r = reciprocal_approx(1.f + e);
  return x < 0.f ? e * r : r;
}

template <Hidden hidden>
__device__ __forceinline__ float activate(float x) {
  if constexpr (hidden == Hidden::softplus) return softplus(x);
  if constexpr (hidden == Hidden::relu) return relu(x);
  if constexpr (hidden == Hidden::silu) return x * sigmoid(x);
}

// The derivative; relu's is 0 at 0.
template <Hidden hidden>
__device__ __forceinline__ float activation_slope(float x) {
  if constexpr (hidden == Hidden::softplus) return sigmoid(x);
  if constexpr (hidden == Hidden::relu) return x <= 0.f ? 0.f : 1.f;
  if constexpr (hidden == Hidden::silu) {
    float s = sigmoid(x);
    return s * fmaf(x, 1.f - s, 1.f);
  }
}

__device__ __forceinline__ float apply_output(float raw, Output output) {
  if (output == Output::softplus) return softplus(raw);
  return output == Output::exp ? exp_accurate(raw) : raw;
}

// The gradient by the raw density, given that by sigma: d_sigma times the output's slope, which
// follows from sigma itself: sigma for exp, 1 - e^-sigma for softplus.
__device__ __forceinline__ float times_output_slope(float d_sigma, float sigma, Output output) {
  if (output == Output::identity) return d_sigma;
  if (output == Output::exp) return d_sigma * sigma;
  // Relative error 1e-8 up to 0.7, below which 1 - e^-sigma loses digits.
  float q = fmaf(sigma, -0.0010301340371370316f, 0.008062456734478474f);
  q = fmaf(q, sigma, -0.04156935214996338f);
  q = fmaf(q, sigma, 0.16665059328079224f);
  q = fmaf(q, sigma, -0.4999990165233612f);
  q = fmaf(q, sigma, 1.f);
  return d_sigma * (sigma < 0.7f ? q * sigma : 1.f - exp_accurate(-sigma));
}

// ------------------------------------------------------------------------------- warps, blocks

// The same sum in every lane, in a fixed order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The largest in every lane; a NaN is lost.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------- the launch

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace densityrl::cuda
