// Enough of CUDA's runtime for a C++ compiler to build csrc/cuda for the CPU, and to run it there.
//
// A block's threads are fibers that take turns at barriers and warp functions, so the kernels
// compute what they would on a GPU, at some thousandth of the speed. Blocks run one after the
// other: shared memory is static. What cannot be seen here: the errors of the special-function
// unit, and races other than those that the order of a block's threads decides (set
// CUDA_EMULATOR_ORDER=reversed for the other order).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define DENSITYRL_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ------------------------------------------------------------------------------------- runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {

struct Thread {
  uint3 thread, block;
  int lane, warp;
};
extern Thread* running;

// Runs `body` once for every thread of every block.
cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body);

void block_barrier();
void warp_barrier();
int block_or(int predicate);
// Every lane gives 8 bytes; the result is what all 32 gave, and lasts until the next exchange.
const uint64_t* exchange(uint64_t value);

template <class T>
T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits)[lane & 31];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// D += A B of the warp instruction mma.m16n8k8 with tf32 operands, on its register fragments.
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace emulator

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  std::tuple<P...> parameters(static_cast<P>(args)...);
  return emulator::run(config->gridDim, config->blockDim, [&] { std::apply(kernel, parameters); });
}

// -------------------------------------------------------------------------------------- device

#define threadIdx (emulator::running->thread)
#define blockIdx (emulator::running->block)
inline dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_or(int predicate) { return emulator::block_or(predicate); }
inline int __syncthreads_and(int predicate) { return !emulator::block_or(!predicate); }
inline void __syncwarp(unsigned = ~0u) { emulator::warp_barrier(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::from_lane(value, emulator::running->lane ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  int lane = emulator::running->lane;
  return emulator::from_lane(value, lane + static_cast<int>(by) < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* all = emulator::exchange(predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

inline float atomicAdd(float* to, float value) {
  float before = *to;
  *to += value;
  return before;
}
inline float4 atomicAdd(float4* to, float4 value) {
  float4 before = *to;
  *to = {before.x + value.x, before.y + value.y, before.z + value.z, before.w + value.w};
  return before;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}

template <class To, class From>
To emulator_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(To));
  return bits;
}
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline int __float2int_rd(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::floor(x)); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }

using std::max;
using std::min;
