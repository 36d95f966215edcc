"""The CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs, behind the functions of `backend.Backend`.

They need neither Triton nor a compiler at run time, and cover what most triplane models are:
decoders of two layers. `why_not` and `why_not_for` say what they leave to other backends.
"""

from __future__ import annotations

from triplane_kernels.cuda.density_grid import (
    density_grid,
    density_grid_backward,
    density_grid_loss,
    density_grid_loss_backward,
    why_not_grid,
)
from triplane_kernels.cuda.launch import why_not
from triplane_kernels.cuda.points import (
    radiance,
    radiance_backward,
    sample_features,
    sample_features_backward,
    why_not_points,
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
    "why_not_grid",
    "why_not_points",
]
