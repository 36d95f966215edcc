// What the parts of the Python module triplane_kernels._cuda share.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace densityrl::cuda {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class Enum>
Enum choose(const std::string& name, std::initializer_list<const char*> names) {
  int index = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(index);
    ++index;
  }
  throw std::invalid_argument("unknown option '" + name + "'");
}

inline void check(cudaError_t status, const std::string& what, int device) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(what + " on CUDA device " + std::to_string(device) + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// Calls a launcher with the stream, on a device; a status that is no success becomes a
// RuntimeError.
template <class Launcher>
void enqueue(const char* what, int device, Address stream, Launcher launcher) {
  check(cudaSetDevice(device), what, device);
  check(launcher(at<CUstream_st>(stream)), what, device);
}

void bind_tables(pybind11::module_& module);
void bind_density_grid(pybind11::module_& module);
void bind_points(pybind11::module_& module);

}  // namespace densityrl::cuda
