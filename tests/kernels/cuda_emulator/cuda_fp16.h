// See cuda_runtime.h. A compiler without _Float16 (GCC before 12) cannot build the emulator.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};
struct __half {
  unsigned short bits;
  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
};
inline float __half2float(__half value) {
  return static_cast<float>(emulator_bits<_Float16>(value.bits));
}
inline __half __float2half_rn(float value) {
  return __half_raw{emulator_bits<unsigned short>(static_cast<_Float16>(value))};
}
