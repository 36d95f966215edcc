// Vectors of DENSITYRL_LANES floats, by the vector extensions of GCC and Clang: one source for
// every instruction set. Everything lives in the namespace DENSITYRL_ISA, and no inline function
// of the standard library is used beside it: the linker keeps one copy of such a function, and
// that could be the one compiled for a processor that this machine does not have.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "team.h"

namespace densityrl {
namespace DENSITYRL_ISA {

constexpr int kLanes = DENSITYRL_LANES;

// Rows of working memory are multiples of this, whatever the instruction set, so that every
// variant sums in blocks of the same shape.
constexpr int kPad = 16;

typedef float vf __attribute__((vector_size(4 * DENSITYRL_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * DENSITYRL_LANES)));
typedef vf vf_anywhere __attribute__((aligned(4), may_alias));

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
template <class T>
constexpr T lesser(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T greater(T a, T b) {
  return a < b ? b : a;
}

inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_anywhere*>(p) = v; }
inline vf splat(float x) { return vf{} + x; }
inline vf minimum(vf a, vf b) { return b < a ? b : a; }  // a NaN in a stays
inline vf maximum(vf a, vf b) { return a < b ? b : a; }  // likewise
inline vf absolute(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

inline float sum(vf x) {
#if DENSITYRL_LANES == 16
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
#endif
}

inline bool any(vi mask) {
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= mask[lane];
  return bits != 0;
}

// 1 / x to within 2 units in the last place, for normal x below 2^126.
inline vf reciprocal(vf x) {
#if DENSITYRL_LANES == 16
  vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (2.0f - x * y);
#elif defined(__AVX__)
  vf y = (vf)_mm256_rcp_ps((__m256)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// 1 + u = 2^e (1 + r), 1 / sqrt 2 <= 1 + r < sqrt 2, for 0 <= u < 2^126. r is found from u itself
// and not from the rounded 1 + u, so small u lose nothing.
struct SplitLog {
  vf r;
  vi exponent;  // e 2^23
};
inline SplitLog split_1p(vf u) {
  const vi bits = (vi)(u + 1.0f) - 0x3F3504F3;  // less sqrt(1 / 2): rounds the exponent
  const vi exponent = bits & (int32_t)0xFF800000;
  const vf inverse_power = (vf)(0x3F800000 - exponent);
  return {u * inverse_power + (inverse_power - 1.0f), exponent};
}

// 2^23 log2(1 + u): the scale lets the exponent stay where it is in the bits.
constexpr float kLog2Scale = 8388608.0f;

#if DENSITYRL_LANES == 16
// With AVX-512 a table of 32 entries fits in registers: 1 + u = 2^e (1 + r) / c, c about
// 1 / (1 + i / 32), |r| <= 1 / 64, and log2(1 + r) / r is a polynomial of degree 2 with a relative
// error of 2.4e-7. Five multiplications fewer than the polynomial alone; with rounding the error
// is 3.4e-7 relative for small u, 1.5e-7 from u = 0.1 on.
alignas(64) constexpr float kLog2C[32] = {
    32 / 32.f, 32 / 33.f, 32 / 34.f, 32 / 35.f, 32 / 36.f, 32 / 37.f, 32 / 38.f, 32 / 39.f,
    32 / 40.f, 32 / 41.f, 32 / 42.f, 32 / 43.f, 32 / 44.f, 32 / 45.f, 32 / 46.f, 32 / 47.f,
    32 / 48.f, 32 / 49.f, 32 / 50.f, 32 / 51.f, 32 / 52.f, 32 / 53.f, 32 / 54.f, 32 / 55.f,
    32 / 56.f, 32 / 57.f, 32 / 58.f, 32 / 59.f, 32 / 60.f, 32 / 61.f, 32 / 62.f, 32 / 63.f};
// -2^23 log2 c
alignas(64) constexpr float kMinusLog2C[32] = {
    0,           372404.5f,  733691.438f, 1084504.5f,  1425434.12f, 1757021.88f, 2079766.62f,
    2394127.25f, 2700528.5f, 2999364.f,   3290996.75f, 3575768.f,   3853991.5f,  4125962.5f,
    4391956.f,   4652229.f,  4907021.f,   5156560.f,   5401057.5f,  5640712.f,   5875714.f,
    6106239.f,   6332455.f,  6554520.5f,  6772583.5f,  6986787.5f,  7197266.5f,  7404146.5f,
    7607549.f,   7807591.5f, 8004379.f,   8198017.5f};

inline vf look_up(const float* table, vi index) {
  return (vf)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index,
                                    _mm512_load_ps(table + 16));
}

// N at once, step by step: a scheduler of the processor sees 64 instructions, and with the whole
// of one logarithm after the other there would be too few in it that do not wait.
template <int N>
inline void scaled_log2_1p(const vf (&u)[N], vf (&result)[N]) {
  vi bits[N], exponent[N];
  vf factor[N], r[N], q[N];
  for (int n = 0; n < N; ++n) bits[n] = (vi)(u[n] + 1.0f);
  // less 1, and half an entry more
  for (int n = 0; n < N; ++n) bits[n] += (1 << 17) - 0x3F800000;
  for (int n = 0; n < N; ++n) exponent[n] = bits[n] & (int32_t)0xFF800000;
  for (int n = 0; n < N; ++n) bits[n] >>= 18;  // the lookup reads the lowest five bits
  for (int n = 0; n < N; ++n) factor[n] = (vf)((vi)look_up(kLog2C, bits[n]) - exponent[n]);
  for (int n = 0; n < N; ++n) r[n] = u[n] * factor[n] + (factor[n] - 1.0f);
  for (int n = 0; n < N; ++n)
    result[n] = look_up(kMinusLog2C, bits[n]) + __builtin_convertvector(exponent[n], vf);
  for (int n = 0; n < N; ++n)
    q[n] = r[n] * (0.4809643030166626f * kLog2Scale) + -0.7214135527610779f * kLog2Scale;
  for (int n = 0; n < N; ++n) q[n] = q[n] * r[n] + 1.4426950216293335f * kLog2Scale;
  for (int n = 0; n < N; ++n) result[n] = q[n] * r[n] + result[n];
}
#else
// log2(1 + r) / r is a polynomial of degree 7 with a relative error of 1.7e-7 (3.2e-7 with
// rounding).
template <int N>
inline void scaled_log2_1p(const vf (&u)[N], vf (&result)[N]) {
  constexpr float kFactors[] = {
      0.23404328525066376f, -0.24887681007385254f, 0.28709855675697327f, -0.3602396249771118f,
      0.48092323541641235f, -0.7213528156280518f,  1.442694902420044f,
  };
  SplitLog s[N];
  for (int n = 0; n < N; ++n) s[n] = split_1p(u[n]);
  for (int n = 0; n < N; ++n) result[n] = splat(-0.14581282436847687f * kLog2Scale);
  for (float factor : kFactors)
    for (int n = 0; n < N; ++n) result[n] = result[n] * s[n].r + factor * kLog2Scale;
  for (int n = 0; n < N; ++n)
    result[n] = result[n] * s[n].r + __builtin_convertvector(s[n].exponent, vf);
}
#endif

// ln(1 + u), where no tight loop counts the operations: degree 8, relative error 1.7e-7 with
// rounding.
constexpr float kLn2 = 0.6931471805599453f;
inline vf log_1p(vf u) {
  const SplitLog s = split_1p(u);
  vf q = splat(0.12582819163799286f * kLn2);
  q = q * s.r + -0.20726019144058228f * kLn2;
  q = q * s.r + 0.2157147228717804f * kLn2;
  q = q * s.r + -0.23894654214382172f * kLn2;
  q = q * s.r + 0.2879166007041931f * kLn2;
  q = q * s.r + -0.36070358753204346f * kLn2;
  q = q * s.r + 0.48091062903404236f * kLn2;
  q = q * s.r + -0.7213473320007324f * kLn2;
  q = q * s.r + 1.0f;
  return q * s.r + __builtin_convertvector(s.exponent, vf) * (kLn2 / kLog2Scale);
}

// 2^n p, with p in [0.7, 1.42], is e^x. x log2 e = n + y with log2 e in two parts; 2^y is a
// polynomial of degree 6 with a relative error of 2e-9 before rounding.
struct Exponential {
  vf p;
  vi n;
};
inline Exponential split_exponential(vf x) {
  const vf shifted = x * 1.4426950216293335f + 12582912.0f;  // 1.5 * 2^23: rounds
  const vf n = shifted - 12582912.0f;
  const vf y = (x * 1.4426950216293335f - n) + x * 1.9259629911e-8f;
  vf p = splat(0.00015346646250691265f);
  p = p * y + 0.0013399971649050713f;
  p = p * y + 0.0096184853464365f;
  p = p * y + 0.05550328642129898f;
  p = p * y + 0.24022646248340607f;
  p = p * y + 0.6931471824645996f;
  p = p * y + 1.0f;
  return {p, (vi)shifted - 0x4B400000};
}

// e^x for x <= 88, relative error below 2e-7. Below -87 it stays at e^-87, which is as good as 0.
inline vf bounded_exponential(vf x) {
  const Exponential e = split_exponential(maximum(x, splat(-87.0f)));
  return e.p * (vf)((e.n + 127) << 23);
}

// e^x for any x: subnormals as 0, infinity from 88.72 on.
inline vf exponential(vf x) {
  const Exponential e = split_exponential(minimum(maximum(x, splat(-87.3f)), splat(88.72f)));
  const vi half = e.n >> 1;  // in two steps: e^88.7 is a float, but 2^128 is none
  const vf result = (e.p * (vf)((half + 127) << 23)) * (vf)((e.n - half + 127) << 23);
  return x < -87.3f ? vf{} : (x > 88.72f ? splat(__builtin_inff()) : result);
}

struct Activated {
  vf value, slope;
};

template <Hidden hidden>
inline Activated activate(vf x) {
  if (hidden == Hidden::relu) return {x < 0.0f ? vf{} : x, x > 0.0f ? splat(1.0f) : vf{}};
  const vf u = bounded_exponential(-absolute(x));  // in (0, 1]
  const vf r = reciprocal(u + 1.0f);
  const vf sigmoid = x < 0.0f ? u * r : r;
  const vf poisoned = x * 0.0f;  // a NaN must not be lost in the comparisons
  if (hidden == Hidden::silu) return {x * sigmoid, sigmoid * (x * (1.0f - sigmoid) + 1.0f)};
  return {maximum(x, vf{}) + log_1p(u), sigmoid + poisoned};
}

inline vf output_of(Output output, vf raw) {
  if (output == Output::identity) return raw;
  if (output == Output::exp) return exponential(raw);
  return activate<Hidden::softplus>(raw).value;
}

// The slope of the output activation by its value: of e^x that is the value, of softplus
// 1 - e^-value, which for small values is the value itself.
inline vf output_slope(Output output, vf value) {
  if (output == Output::identity) return splat(1.0f);
  if (output == Output::exp) return value;
  const vf series = value * (1.0f - value * (0.5f - value * (1.0f / 6 - value * (1.0f / 24))));
  return value < 0.05f ? series : 1.0f - exponential(-value);
}

#if defined(__clang__)
#define DENSITYRL_SHUFFLE2(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DENSITYRL_SHUFFLE2(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

inline vf interleave_low(vf a, vf b) {
#if DENSITYRL_LANES == 16
  return DENSITYRL_SHUFFLE2(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif DENSITYRL_LANES == 8
  return DENSITYRL_SHUFFLE2(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return DENSITYRL_SHUFFLE2(a, b, 0, 4, 1, 5);
#endif
}

inline vf interleave_high(vf a, vf b) {
#if DENSITYRL_LANES == 16
  return DENSITYRL_SHUFFLE2(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif DENSITYRL_LANES == 8
  return DENSITYRL_SHUFFLE2(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return DENSITYRL_SHUFFLE2(a, b, 2, 6, 3, 7);
#endif
}

// Aligned working memory that frees itself.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) { allocate(floats); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void allocate(int64_t floats) {
    std::free(data_);
    data_ = static_cast<float*>(aligned_memory(4 * floats));
  }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
};

// body(task, thread) for every task; body is any callable.
template <class Body>
void parallel(Team& team, int64_t tasks, const Body& body) {
  team.run(
      static_cast<int>(tasks),
      [](void* context, int task, int thread) {
        (*static_cast<const Body*>(context))(task, thread);
      },
      const_cast<Body*>(&body));
}

}  // namespace DENSITYRL_ISA
}  // namespace densityrl
