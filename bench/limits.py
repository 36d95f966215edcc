"""How fast the device could be at best: the time that the fewest operations take.

CPU    1024 bits of vector operations a cycle and thread (two of AVX-512, four of AVX2 on current
       x86-64 servers), at the clock that the extension measures in the same run. What the inner
       loops need is counted, loads and stores left out.
GPU    grids: the special-function unit. A (voxel, hidden unit) takes one logarithm in the factored
       form, and in the backward another one and half a reciprocal; less those logarithms that the
       CUDA kernels leave to the FP32 units, as many as balance the two on compute capability 9.0.
       Points: the bytes of the looked-up corners over the path that fills the L1 caches from L2.

Rates of a GPU are from its multiprocessor count and its highest clock.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import torch
from problem import CHANNELS, HIDDEN, Case

from triplane_kernels import EG3D, Grid

CPU_LANE_OPERATIONS = 32  # a cycle and thread

# CPU, operations in a lane of a vector for a (voxel, hidden unit), as the C++ kernels' AVX-512
# inner loops have them (scaled_log2_1p in csrc/cpu/simd.h): product of the exponentials, 14 for the
# logarithm, sum; in the backward seven more, for the reciprocal and the sums of the gradients.
CPU_GRID_FORWARD = 16
CPU_GRID_BACKWARD = 23
# The same for the activation of a point's hidden unit, which has no factored form: an exponential,
# a logarithm, and in the backward a reciprocal.
CPU_POINT_SOFTPLUS = 33
CPU_POINT_SIGMOID = 6

# GPU, special-function operations a (voxel, hidden unit): csrc/cuda/density_grid.cu.
GPU_GRID_FORWARD = 1 - 7 / 32
GPU_GRID_BACKWARD = 1 / 2 + 1 - 3 / 16

GPU_SPECIAL_FUNCTION_LANES = 16  # a clock and multiprocessor, compute capability 7.0 to 9.0
GPU_L1_FILL_BYTES = 64  # a clock and multiprocessor

CORNERS = 4 * len(EG3D.axes)


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, a second; None where it does not have them or they are unknown."""

    vector_lane_operations: float | None = None
    special_functions: float | None = None
    l1_fill_bytes: float | None = None

    @classmethod
    def of(cls, device: str) -> Ceilings:
        if device == "cpu":
            return cls(vector_lane_operations=_cpu_lane_operations())
        clock = _highest_clock_hz()
        if clock is None:
            return cls()
        rate = clock * torch.cuda.get_device_properties(device).multi_processor_count
        return cls(
            special_functions=rate * GPU_SPECIAL_FUNCTION_LANES,
            l1_fill_bytes=rate * GPU_L1_FILL_BYTES,
        )

    def seconds(self, case: Case) -> float | None:
        """The least time for one call of a case."""
        if self.vector_lane_operations is not None:
            return cpu_lane_operations(case) / self.vector_lane_operations
        if self.special_functions is None or self.l1_fill_bytes is None:
            return None
        if isinstance(case.where, Grid):
            return gpu_special_functions(case) / self.special_functions
        return gpu_gathered_bytes(case) / self.l1_fill_bytes


def cpu_lane_operations(case: Case) -> float:
    """Operations in a vector lane that one call needs, grid tables left out."""
    if isinstance(case.where, Grid):
        per_pair = CPU_GRID_FORWARD * (2 if case.two_fields else 1)
        per_pair += CPU_GRID_BACKWARD if case.backward else 0
        return case.points * HIDDEN * per_pair
    lookup, layer = CORNERS * CHANNELS, HIDDEN * CHANNELS
    per_point = lookup + layer + HIDDEN * (CPU_POINT_SOFTPLUS + 1)
    if case.backward:
        # The hidden layer again; the gradients of features and weights; corners read and written.
        per_point += 2 * lookup + 3 * layer + HIDDEN * (CPU_POINT_SIGMOID + 2)
    return case.points * per_point


def gpu_special_functions(case: Case) -> float:
    """Special-function operations that one call on a grid needs."""
    per_pair = GPU_GRID_FORWARD * (2 if case.two_fields else 1)
    per_pair += GPU_GRID_BACKWARD if case.backward else 0
    return case.points * HIDDEN * per_pair


def gpu_gathered_bytes(case: Case) -> float:
    """Bytes of corners that one call at points moves: read, read again, and added to."""
    read = CORNERS * CHANNELS * case.planes_dtype.itemsize
    added = CORNERS * CHANNELS * torch.float32.itemsize
    return case.points * (2 * read + added if case.backward else read)


def _cpu_lane_operations() -> float | None:
    """Of torch's threads together, a second; None without the extension."""
    try:
        from triplane_kernels._cpu import measured_clock
    except ImportError:
        return None
    return measured_clock() * CPU_LANE_OPERATIONS * torch.get_num_threads()


def _highest_clock_hz() -> float | None:
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i"]
    try:
        answer = subprocess.run(
            [*command, str(torch.cuda.current_device())],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return float(answer.stdout) * 1e6
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
