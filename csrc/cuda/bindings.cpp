// The Python module triplane_kernels._cuda: addresses and sizes in, nothing of torch.

#include "bindings.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of triplane_kernels. Arrays are device addresses.";
  densityrl::cuda::bind_tables(m);
  densityrl::cuda::bind_density_grid(m);
  densityrl::cuda::bind_points(m);
}
