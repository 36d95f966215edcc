"""Exact, fast density of triplane NeRFs.

A model is described by a `TriplaneLayout` (how its planes lie in space; presets for well-known
models) and a `DensityMLP` (its decoder); where to evaluate it by points or a `Grid`.
"""

from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid, eg3d_lattice
from triplane_kernels.layout import (
    CRM,
    EG3D,
    EG3D_CORRECTED,
    NERFSTUDIO,
    OPENLRM,
    SSDNERF,
    TRIPOSR,
    TriplaneLayout,
)
from triplane_kernels.ops import (
    BackendChoice,
    available_backends,
    density,
    density_gradient,
    density_grid,
    density_grid_loss,
    radiance,
    sample_features,
)

__all__ = [
    "CRM",
    "EG3D",
    "EG3D_CORRECTED",
    "NERFSTUDIO",
    "OPENLRM",
    "SSDNERF",
    "TRIPOSR",
    "BackendChoice",
    "DensityMLP",
    "Grid",
    "TriplaneLayout",
    "available_backends",
    "density",
    "density_gradient",
    "density_grid",
    "density_grid_loss",
    "eg3d_lattice",
    "radiance",
    "sample_features",
]
