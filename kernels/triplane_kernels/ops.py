"""The public operations: check the arguments, choose a backend, call it.

Backends: "cpu", the C++ kernels, for tensors on the CPU; "triton" and "cuda" (CUDA C++) for a GPU;
"reference", plain PyTorch, for every device and dtype. The kernels run as torch custom ops
(`library`).

What holds for all of them:

planes   [B, P, C, H, W], or a sequence of P tensors [B, C, Hp, Wp] where sizes differ; P, the
         number of planes, is the layout's. float32, bfloat16, float16 or float64.
points   [B, M, 3] in world units, or [1, M, 3] for the same points in every sample. Points
         outside the box are allowed; a NaN coordinate gives NaN.
decoder  a `DensityMLP` on the planes' device.
backend  "auto" takes the best one for the device; a name forces one, and an error says why it
         cannot be had. `available_backends` tells what "auto" takes.

Results have the promoted dtype of all inputs, and at least float32: half-precision planes are
read as they are and computed with in float32; float64 is for "reference" alone. Autocast changes
nothing. Everything can be differentiated, and differentiated again (second derivatives are the
reference's, whatever the backend). An argument that does not fit raises
ValueError, or TypeError for a dtype; a backend that cannot be had raises RuntimeError.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triplane_kernels import cpu, cuda, library, reference
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

# Best first; the last takes everything. CUDA C++ comes before Triton once it is measured to be
# faster: bench/results.
_BACKENDS = ("cpu", "triton", "cuda", "reference")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_GRID_OPERATIONS = ("density_grid", "density_grid_loss")


def sample_features(
    planes: Planes, points: Tensor, layout: TriplaneLayout, *, backend: str = "auto"
) -> Tensor:
    """The feature of every point, before any decoder: [B, M, layout.feature_channels(C)].

    A bilinear lookup on every plane, as `torch.nn.functional.grid_sample` does it, and the
    layout's reduction over the planes (EG3D, arXiv:2112.07945, section 4.2).
    """
    _check_planes(planes, layout)
    _check_points(points, planes)
    chosen = _backend("sample_features", backend, planes, None, layout, points)
    if chosen == "reference":
        return reference.sample_features(planes, points, layout)
    groups = (_plane_group(planes), [points.float()])
    settings = library.layout_settings(layout, _combine(layout))
    (features,) = library.sample_features(groups, settings, chosen)
    count = len(layout.axes)
    if layout.reduce == "mean":
        return features / count
    if layout.reduce == "concat_channel_major":
        return features.unflatten(-1, (count, -1)).transpose(-1, -2).flatten(-2)
    return features


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
    chosen = _backend("density", backend, planes, decoder, layout, points)
    if chosen == "reference":
        return reference.density(planes, decoder, points, layout)
    return _radiance(planes, decoder, points, layout, chosen, rows=1)[0]


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
    chosen = _backend("radiance", backend, planes, decoder, layout, points)
    if chosen == "reference":
        return reference.radiance(planes, decoder, points, layout)
    sigma, features = _radiance(planes, decoder, points, layout, chosen)
    return sigma, features


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
    chosen = _backend("density_grid", backend, planes, decoder, layout)
    if chosen == "reference":
        return reference.density_grid(planes, decoder, grid, layout)
    groups = (_plane_group(planes), *_decoder_groups(decoder, layout, rows=1))
    settings = (
        decoder.hidden,
        decoder.output,
        *library.grid_settings(grid),
        *library.layout_settings(layout, _combine(layout)),
    )
    return library.density_grid(groups, settings, chosen)[0]


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
    chosen = _backend("density_grid_loss", backend, planes, decoder, layout, target=target)
    if chosen == "reference":
        return reference.density_grid_loss(planes, decoder, grid, layout, target, kind)
    groups = (_plane_group(planes), *_decoder_groups(decoder, layout, rows=1))
    if isinstance(target, Tensor):
        target_groups: tuple[list[Tensor], ...] = ([target.float()], [], [], [])
        target_activations = (decoder.hidden, decoder.output)  # not looked at
    else:
        target_planes, other = target
        target_decoder = _decoder_groups(other, layout, rows=1)
        target_groups = ([], _plane_group(target_planes), *target_decoder)
        target_activations = (other.hidden, other.output)
    settings = (
        decoder.hidden,
        decoder.output,
        *target_activations,
        kind,
        *library.grid_settings(grid),
        *library.layout_settings(layout, _combine(layout)),
    )
    return library.density_grid_loss((*groups, *target_groups), settings, chosen)[0]


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
    chosen = _backend("density_gradient", backend, planes, decoder, layout, points)
    if chosen == "reference":
        return reference.density_gradient(planes, decoder, points, layout)
    # The kernel's own backward by the points, of every sample separately.
    points = points.expand(_first(planes).shape[0], -1, -1)
    groups, settings = _radiance_arguments(planes, decoder, points, layout, rows=1)
    outputs = library.radiance(groups, settings, chosen)
    d_outputs = [torch.ones_like(outputs[0]), torch.zeros_like(outputs[1])]
    detached = [output.detach() for output in outputs]
    (gradient,) = library.radiance.call_backward(
        d_outputs, detached, groups, settings, chosen, (False, False, False, True)
    )
    sigma = outputs[0]
    return sigma, gradient.masked_fill(sigma.isnan()[..., None], torch.nan)


# ------------------------------------------------------------------- arguments of the kernels


def _radiance(
    planes: Planes,
    decoder: DensityMLP,
    points: Tensor,
    layout: TriplaneLayout,
    backend: str,
    rows: int | None = None,
) -> list[Tensor]:
    groups, settings = _radiance_arguments(planes, decoder, points, layout, rows)
    return library.radiance(groups, settings, backend)


def _radiance_arguments(
    planes: Planes,
    decoder: DensityMLP,
    points: Tensor,
    layout: TriplaneLayout,
    rows: int | None,
) -> tuple[library.Groups, library.Settings]:
    groups = (
        _plane_group(planes),
        *_decoder_groups(decoder, layout, rows),
        [points.float()],
    )
    settings = library.layout_settings(layout, _combine(layout))
    return groups, (decoder.hidden, decoder.output, *settings)


def _plane_group(planes: Planes) -> list[Tensor]:
    return [planes] if isinstance(planes, Tensor) else list(planes)


def _combine(layout: TriplaneLayout) -> str:
    """What is left of a reduction when the decoder's first layer has taken its share."""
    return {"mean": "sum", "concat_channel_major": "concat"}.get(layout.reduce, layout.reduce)


def _decoder_groups(
    decoder: DensityMLP, layout: TriplaneLayout, rows: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases for a plain sum or concatenation, with only `rows` of the last layer."""
    weights = [weight.float() for weight in decoder.weights]
    biases = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias.float()
        for weight, bias in zip(weights, decoder.biases, strict=True)
    ]
    count = len(layout.axes)
    if layout.reduce == "mean":
        weights[0] = weights[0] / count
    elif layout.reduce == "concat_channel_major":
        weights[0] = weights[0].unflatten(1, (-1, count)).transpose(1, 2).flatten(1)
    if rows is not None:
        weights[-1], biases[-1] = weights[-1][:rows], biases[-1][:rows]
    if decoder.bias_shift:
        biases[-1] = torch.cat([biases[-1][:1] + decoder.bias_shift, biases[-1][1:]])
    return weights, biases


# ----------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class BackendChoice:
    """What backend="auto" takes for one operation, and why; and what could be forced."""

    chosen: str
    why: str
    available: tuple[str, ...]


def available_backends(device: torch.device | str = "cpu") -> dict[str, BackendChoice]:
    """For every operation, the backend that "auto" takes on a device for float32 inputs."""
    device = torch.device(device)
    refusals = {name: _why_not(name, device) for name in _BACKENDS}
    available = tuple(name for name, refusal in refusals.items() if not refusal)
    candidates = (*_candidates(device), "reference")
    chosen = next(name for name in candidates if not refusals[name])
    passed_over = [f"{name}: {refusals[name]}" for name in candidates[: candidates.index(chosen)]]
    why = "; ".join(passed_over) or "the first choice"
    return {operation: BackendChoice(chosen, why, available) for operation in OPERATIONS}


def _backend(
    operation: str,
    name: str,
    planes: Planes,
    decoder: DensityMLP | None,
    layout: TriplaneLayout,
    points: Tensor | None = None,
    target: Target | None = None,
) -> str:
    """The backend of an operation. An explicit choice is met or refused, never replaced."""
    if name not in ("auto", *_BACKENDS):
        known = ", ".join(repr(n) for n in ("auto", *_BACKENDS))
        raise RuntimeError(f"backend={name!r} cannot run {operation}: there are {known}.")
    if name == "reference":
        return name
    dtype = reference.compute_dtype(planes, decoder, points)
    if isinstance(target, Tensor):
        dtype = torch.promote_types(dtype, target.dtype)
    elif target is not None:
        dtype = torch.promote_types(dtype, reference.compute_dtype(*target))
    device = _first(planes).device
    for candidate in _candidates(device) if name == "auto" else (name,):
        refusal = _why_not(candidate, device)
        if not refusal and dtype != torch.float32:
            refusal = "it computes in float32, and an input is float64"
        if not refusal:
            refusal = _why_not_for(candidate, operation, decoder, layout, target)
        if not refusal:
            return candidate
        if name != "auto":
            raise RuntimeError(f"backend={name!r} cannot run {operation} here: {refusal}.")
    return "reference"


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The kernels that "auto" tries; Triton's interpreter, on the CPU, only runs when named."""
    return ("cpu",) if device.type == "cpu" else _BACKENDS[:-1]


def _why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device; empty if it can."""
    if name == "cpu":
        return cpu.why_not(device)
    if name == "triton":
        return _why_not_triton(device)
    if name == "cuda":
        return cuda.why_not(device)
    return ""


def _why_not_for(
    name: str,
    operation: str,
    decoder: DensityMLP | None,
    layout: TriplaneLayout,
    target: Target | None,
) -> str:
    """Why a backend that runs here has no kernel for a call; empty if it has."""
    if operation in _GRID_OPERATIONS:
        if name == "cpu":
            return cpu.why_not_grid(layout)
        if name == "cuda":
            decoders = [decoder] if isinstance(target, Tensor | None) else [decoder, target[1]]
            refusals = [cuda.why_not_grid(each, layout) for each in decoders if each is not None]
            return next(filter(None, refusals), "")
    elif name == "cuda":
        return cuda.why_not_points(decoder, layout, all_rows=operation == "radiance")
    return ""


def _why_not_triton(device: torch.device) -> str:
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda" or (device.type == "cpu" and _TRITON_INTERPRETED):
        return ""
    return "it computes on a GPU (or, with TRITON_INTERPRET=1, very slowly on the CPU)"


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
