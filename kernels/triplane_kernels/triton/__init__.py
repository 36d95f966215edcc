"""The backend for NVIDIA and AMD GPUs, and for any machine by way of Triton's interpreter.

Importing this package needs Triton, so nothing but the choice of this backend imports it.
"""

from __future__ import annotations

import torch

from triplane_kernels.triton.density_grid import density_grid, density_grid_backward
from triplane_kernels.triton.density_grid_loss import (
    density_grid_loss,
    density_grid_loss_backward,
)
from triplane_kernels.triton.elementary import INTERPRETED
from triplane_kernels.triton.points import (
    radiance,
    radiance_backward,
    sample_features,
    sample_features_backward,
)

__all__ = [
    "density_grid",
    "density_grid_backward",
    "density_grid_loss",
    "density_grid_loss_backward",
    "radiance",
    "radiance_backward",
    "sample_features",
    "sample_features_backward",
    "why_not",
]


def why_not(device: torch.device) -> str:
    """Empty if tensors of this device can be handled, otherwise the reason and the remedy."""
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return ""
    if device.type == "cpu":
        return (
            "Triton's kernels run on a CPU only in its interpreter: set TRITON_INTERPRET=1 before "
            "Triton is imported."
        )
    return f"Triton's kernels need a CUDA or HIP device, and the tensors are on {device.type!r}."
