// Which of the compiled instruction sets this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace densityrl {

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  decltype(&baseline::density_grid) density_grid;
  decltype(&baseline::density_grid_backward) density_grid_backward;
  decltype(&baseline::density_grid_loss) density_grid_loss;
  decltype(&baseline::density_grid_loss_backward) density_grid_loss_backward;
  decltype(&baseline::points) points;
  decltype(&baseline::points_backward) points_backward;
};

// Names of the variants that run here, best first.
std::vector<std::string> runnable_isas();

// The variant in use: the best, or what use_isa chose.
const Kernels& kernels();

// Throws std::invalid_argument for a name that runnable_isas does not list.
void use_isa(const std::string& isa);

// The clock that this thread's processor runs at now, in Hz: times steps that each wait for the one
// before, for some 10 ms.
double measured_clock();

}  // namespace densityrl
