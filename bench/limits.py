"""How fast the device could be at best: the time that the fewest operations take.

CPU    every vector instruction goes through the pipes that fused multiply-adds use; their rate is
       measured, as that of a matrix product in float32 on the same threads in the same run.
GPU    grids: the special-function unit, one logarithm a (voxel, hidden unit) in the factored form
       and one reciprocal each for the two gradients. Points: the bytes of the looked-up corners
       over the path that fills the L1 caches from L2.

Rates of a GPU are from its multiprocessor count and its highest clock.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

import torch
from problem import CHANNELS, HIDDEN, Case

from triplane_kernels import EG3D, Grid

# CPU, operations in a lane of the vector unit a (voxel, hidden unit): what the C++ kernel's inner
# loops need in the factored form, a polynomial logarithm in the forward and a division and the
# sums of the gradients in the backward.
CPU_GRID_FORWARD = 10
CPU_GRID_BACKWARD = 16
# The same for the activation of a point's hidden unit, which has no factored form.
CPU_POINT_SOFTPLUS = 20
CPU_POINT_SIGMOID = 12

# GPU, special-function operations a (voxel, hidden unit).
GPU_GRID_FORWARD = 1
GPU_GRID_BACKWARD = 2

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
            return cls(vector_lane_operations=_fused_multiply_adds())
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


def _fused_multiply_adds(size: int = 512, seconds: float = 0.5) -> float:
    """The best rate seen of fused multiply-adds in float32, a second, on torch's threads.

    512: the three matrices stay in the cache, so that arithmetic is all that is timed.
    """
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = a @ b
    best, end = 0.0, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = max(best, size**3 / (time.perf_counter() - start))
    return best


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
