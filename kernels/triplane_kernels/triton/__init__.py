"""The backend for NVIDIA and AMD GPUs, and for any machine by way of Triton's interpreter.

Importing this package needs Triton, so nothing but the choice of this backend imports it.
"""

from __future__ import annotations

from triplane_kernels.triton.density_grid import density_grid, density_grid_backward
from triplane_kernels.triton.density_grid_loss import (
    density_grid_loss,
    density_grid_loss_backward,
)
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
]
