#include "dispatch.h"

#include <chrono>
#include <cstdint>
#include <stdexcept>

namespace densityrl {
namespace {

#define DENSITYRL_TABLE(ISA, NAME, RUNS) \
  {NAME,                                 \
   [] { return bool(RUNS); },            \
   ISA::density_grid,                    \
   ISA::density_grid_backward,           \
   ISA::density_grid_loss,               \
   ISA::density_grid_loss_backward,      \
   ISA::points,                          \
   ISA::points_backward}

const Kernels kVariants[] = {
#if defined(__x86_64__)
    DENSITYRL_TABLE(avx512, "avx512",
                    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
    DENSITYRL_TABLE(avx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
    DENSITYRL_TABLE(baseline, "sse2", true),
#elif defined(__ARM_NEON)
    DENSITYRL_TABLE(baseline, "neon", true),
#else
    DENSITYRL_TABLE(baseline, "generic", true),
#endif
};

const Kernels*& chosen() {
  static const Kernels* choice = nullptr;
  if (!choice)
    for (const Kernels& variant : kVariants)
      if (!choice && variant.runs_here()) choice = &variant;
  return choice;
}

}  // namespace

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Kernels& variant : kVariants)
    if (variant.runs_here()) names.emplace_back(variant.isa);
  return names;
}

const Kernels& kernels() { return *chosen(); }

void use_isa(const std::string& isa) {
  std::string known;
  for (const Kernels& variant : kVariants) {
    if (!variant.runs_here()) continue;
    if (isa == variant.isa) {
      chosen() = &variant;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + variant.isa;
  }
  throw std::invalid_argument("This processor and build run " + known + ", not '" + isa + "'.");
}

double measured_clock() {
  // A xorshift step is three shifts and three exclusive ors, one after the other, and each of them
  // takes one cycle on every processor that the kernels are compiled for.
  constexpr int kSteps = 1 << 20, kCyclesPerStep = 6;
  volatile std::uint64_t sink;
  double best = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    std::uint64_t x = 88172645463325252u + static_cast<std::uint64_t>(attempt);
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < kSteps; ++step) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    sink = x;
    const double clock = kSteps * double(kCyclesPerStep) / seconds.count();
    if (clock > best) best = clock;
  }
  (void)sink;
  return best;
}

}  // namespace densityrl
