"""The public operations: check the arguments, choose a backend, call it.

What holds for all of them:

planes   [B, P, C, H, W], or a sequence of P tensors [B, C, Hp, Wp] where sizes differ; P, the
         number of planes, is the layout's. float32, bfloat16, float16 or float64.
points   [B, M, 3] in world units, or [1, M, 3] for the same points in every sample. Points
         outside the box are allowed; a NaN coordinate gives NaN.
decoder  a `DensityMLP` on the planes' device.
backend  "auto" takes the best one for the device; a name forces one, and an error says why it
         cannot be had. `available_backends` tells what "auto" takes.

Results have the promoted dtype of all inputs, and at least float32: half-precision planes are
read as they are and computed with in float32. Autocast changes nothing. Everything can be
differentiated, twice where the backend is "reference". An argument that does not fit raises
ValueError, or TypeError for a dtype; a backend that cannot be had raises RuntimeError.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from triplane_kernels import reference
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.reference import Planes, Target

OPERATIONS = (
    "sample_features",
    "density",
    "radiance",
    "density_grid",
    "density_grid_loss",
    "density_gradient",
)

_BACKENDS: dict[str, ModuleType] = {"reference": reference}  # best first; the last takes all


def sample_features(
    planes: Planes, points: Tensor, layout: TriplaneLayout, *, backend: str = "auto"
) -> Tensor:
    """The feature of every point, before any decoder: [B, M, layout.feature_channels(C)].

    A bilinear lookup on every plane, as `torch.nn.functional.grid_sample` does it, and the
    layout's reduction over the planes (EG3D, arXiv:2112.07945, section 4.2).
    """
    _check_planes(planes, layout)
    _check_points(points, planes)
    return _backend("sample_features", backend, points).sample_features(planes, points, layout)


def density(
    planes: Planes,
    decoder: DensityMLP,
    points: Tensor,
    layout: TriplaneLayout,
    *,
    backend: str = "auto",
) -> Tensor:
    """The density of every point, [B, M]: row 0 of the decoder's output on its feature."""
    _check_planes(planes, layout)
    _check_decoder(decoder, planes, layout)
    _check_points(points, planes)
    return _backend("density", backend, points).density(planes, decoder, points, layout)


def radiance(
    planes: Planes,
    decoder: DensityMLP,
    points: Tensor,
    layout: TriplaneLayout,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The density [B, M] and the decoder's other outputs [B, M, F] of every point.

    The other outputs (a colour, say) are raw: the decoder's `output` and `bias_shift` concern
    density alone. F = decoder.out_channels - 1, and may be 0.
    """
    _check_planes(planes, layout)
    _check_decoder(decoder, planes, layout)
    _check_points(points, planes)
    return _backend("radiance", backend, points).radiance(planes, decoder, points, layout)


def density_grid(
    planes: Planes,
    decoder: DensityMLP,
    grid: Grid,
    layout: TriplaneLayout,
    *,
    backend: str = "auto",
) -> Tensor:
    """The density on a regular grid, [B, X, Y, Z].

    Equals `density` at `grid.points()`, up to rounding, at a fraction of the work: on an
    axis-aligned grid each plane is looked up at a table of points and not at every voxel, and the
    decoder's first layer is applied to the tables.
    """
    _check_planes(planes, layout)
    _check_decoder(decoder, planes, layout)
    device = decoder.weights[0]
    return _backend("density_grid", backend, device).density_grid(planes, decoder, grid, layout)


def density_grid_loss(
    planes: Planes,
    decoder: DensityMLP,
    grid: Grid,
    layout: TriplaneLayout,
    target: Target,
    kind: Literal["l1", "l2"] = "l1",
    *,
    backend: str = "auto",
) -> Tensor:
    """How far the density on a grid is from a target, one number a sample, [B].

    target  a volume [B, X, Y, Z], or the (planes, decoder) that would give it, in the same layout.
    kind    "l1": mean |sigma - target| over the voxels; "l2": mean (sigma - target)^2.

    Neither volume is held whole, unless given. Gradients flow into the target as well; detach
    what should take none.
    """
    _check_planes(planes, layout)
    _check_decoder(decoder, planes, layout)
    _check_target(target, planes, grid, layout)
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind must be 'l1' or 'l2', got {kind!r}.")
    chosen = _backend("density_grid_loss", backend, decoder.weights[0])
    return chosen.density_grid_loss(planes, decoder, grid, layout, target, kind)


def density_gradient(
    planes: Planes,
    decoder: DensityMLP,
    points: Tensor,
    layout: TriplaneLayout,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The density [B, M] of every point, and its derivative by position [B, M, 3].

    The derivative is per world unit; a surface normal is its negative, normalised. It needs no
    autograd, and can itself be differentiated (eikonal losses).
    """
    _check_planes(planes, layout)
    _check_decoder(decoder, planes, layout)
    _check_points(points, planes)
    chosen = _backend("density_gradient", backend, points)
    return chosen.density_gradient(planes, decoder, points, layout)


# ----------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class BackendChoice:
    """What backend="auto" takes for one operation, and why; and what could be forced."""

    chosen: str
    why: str
    available: tuple[str, ...]


def available_backends(device: torch.device | str = "cpu") -> dict[str, BackendChoice]:
    """For every operation, the backend that "auto" takes on a device."""
    device = torch.device(device)
    report = {}
    for operation in OPERATIONS:
        refusals = {name: _why_not(name, operation, device) for name in _BACKENDS}
        available = tuple(name for name, refusal in refusals.items() if not refusal)
        passed_over = [
            f"{name}: {refusal}"
            for name, refusal in refusals.items()
            if refusal and name != available[0]
        ]
        why = "; ".join(passed_over) or "the first choice of this build"
        report[operation] = BackendChoice(available[0], why, available)
    return report


def _backend(operation: str, name: str, tensor: Tensor) -> ModuleType:
    """The module that runs an operation. An explicit choice is met or refused, never replaced."""
    if name == "auto":
        name = next(n for n in _BACKENDS if not _why_not(n, operation, tensor.device))
    elif refusal := _why_not(name, operation, tensor.device):
        raise RuntimeError(f"backend={name!r} cannot run {operation} here: {refusal}.")
    return _BACKENDS[name]


def _why_not(name: str, operation: str, device: torch.device) -> str:
    """Why a backend cannot run an operation on a device; empty if it can."""
    if name not in _BACKENDS:
        return f"this build has {', '.join(repr(known) for known in _BACKENDS)} and 'auto'"
    return ""


# ------------------------------------------------------------------------------------- checks


def _check_planes(planes: Planes, layout: TriplaneLayout) -> None:
    if isinstance(planes, Tensor):
        if planes.ndim != 5:
            raise ValueError(f"planes must be [B, P, C, H, W], got {_shape(planes)}.")
        count, each = planes.shape[1], [planes]
    else:
        count, each = len(planes), list(planes)
        for plane in each:
            if plane.ndim != 4:
                raise ValueError(
                    f"Each of a sequence of planes must be [B, C, H, W], got {_shape(plane)}."
                )
            if plane.shape[:2] != each[0].shape[:2]:
                raise ValueError(
                    f"All planes must have the same batch and channels, got {_shape(each[0])} "
                    f"and {_shape(plane)}."
                )
    if count != len(layout.axes):
        raise ValueError(f"The layout has {len(layout.axes)} planes, but planes has {count}.")
    for plane in each:
        if 0 in plane.shape[-3:]:
            raise ValueError(f"Planes must not be empty images, got {_shape(plane)}.")
        _check_float("planes", plane)
        _check_device("planes", plane, each[0].device)


def _check_decoder(decoder: DensityMLP, planes: Planes, layout: TriplaneLayout) -> None:
    first = _first(planes)
    features = layout.feature_channels(first.shape[-3])
    if decoder.in_channels != features:
        raise ValueError(
            f"The decoder takes {decoder.in_channels} channels, but these planes and layout "
            f"give {features}."
        )
    for parameter in decoder.parameters:
        _check_float("decoder", parameter)
        _check_device("decoder", parameter, first.device)


def _check_points(points: Tensor, planes: Planes) -> None:
    first = _first(planes)
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points must be [B, M, 3], got {_shape(points)}.")
    if points.shape[0] not in (1, first.shape[0]):
        raise ValueError(
            f"points must have the planes' batch of {first.shape[0]}, or 1, got {_shape(points)}."
        )
    _check_float("points", points)
    _check_device("points", points, first.device)


def _check_target(target: Target, planes: Planes, grid: Grid, layout: TriplaneLayout) -> None:
    first = _first(planes)
    if isinstance(target, Tensor):
        expected = [first.shape[0], *grid.shape]
        if _shape(target) != expected:
            raise ValueError(f"The target volume must be {expected}, got {_shape(target)}.")
        _check_float("target", target)
        _check_device("target", target, first.device)
        return
    if len(target) != 2 or not isinstance(target[1], DensityMLP):
        raise TypeError("target must be a volume or a pair (planes, decoder).")
    target_planes, target_decoder = target
    _check_planes(target_planes, layout)
    _check_decoder(target_decoder, target_planes, layout)
    other = _first(target_planes)
    if other.shape[0] != first.shape[0]:
        raise ValueError(
            f"The target's planes must have the planes' batch of {first.shape[0]}, "
            f"got {other.shape[0]}."
        )
    _check_device("target", other, first.device)


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}.")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the planes are on {device}.")


def _first(planes: Planes) -> Tensor:
    return planes if isinstance(planes, Tensor) else planes[0]


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
