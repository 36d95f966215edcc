"""Mean difference of a density on a grid from a volume or from a second field.

For decoders of two layers, one kernel computes both densities and compares them in registers. It
either sums the difference, and no volume is written; or it writes the difference's gradient for
some slices at a time, from which the kernel of `density_grid` goes on to the tables. Fields that
have no kernel of their own are compared in PyTorch, some slices at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs, zero_gradients
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.triton.density_grid import (
    TwoLayerField,
    forward_launch,
    forward_programs,
    grid_field,
)
from triplane_kernels.triton.grid_kernels import loss_kernel
from triplane_kernels.triton.launch import Launch, on_device_of
from triplane_kernels.triton.separable import GridField
from triplane_kernels.triton.tiles import device_family

Kind = Literal["l1", "l2"]


def density_grid_loss(
    field: Field, target: Tensor | Field, grid: Grid, layout: TriplaneLayout, kind: Kind
) -> Tensor:
    """See `Backend.density_grid_loss`."""
    scratch = field.decoder.weights[0]
    batch = field.planes[0].shape[0]
    if batch == 0:
        return scratch.new_zeros(0)
    ours = grid_field(field, grid, layout)
    theirs = _target_on(ours, target, grid, layout)
    sums = []
    if _has_kernel(ours, theirs):
        shape = (batch, *ours.frame.shape)
        launch = loss_launch(ours, theirs, shape)
        sums.append(scratch.new_empty(batch, forward_programs(shape, launch) // batch))
        _run_kernel(ours, theirs, shape, 0, kind, launch, errors=sums[0])
    else:
        for first, count in _slabs(ours, theirs):
            shape = (batch, count, *ours.frame.shape[1:])
            difference = _slab(ours, shape, first, scratch) - _slab(theirs, shape, first, scratch)
            error = difference.abs() if kind == "l1" else difference.square()
            sums.append(error.sum(dim=(2, 3)))
    return torch.cat(sums, dim=1).sum(dim=1) / grid.numel


def density_grid_loss_backward(
    d_loss: Tensor,
    field: Field,
    target: Tensor | Field,
    grid: Grid,
    layout: TriplaneLayout,
    kind: Kind,
    needs: Needs,
    target_needs: Needs,
) -> tuple[Gradients, Gradients | Tensor | None]:
    """See `Backend.density_grid_loss_backward`."""
    batch = field.planes[0].shape[0]
    of_field = needs.planes or needs.decoder
    of_target = target_needs.planes or target_needs.decoder
    d_target = None
    if isinstance(target, Tensor) and of_target:
        d_target = torch.empty_like(target, memory_format=torch.contiguous_format)
    if batch == 0:
        d_field = zero_gradients(field, needs)
        if isinstance(target, Tensor):
            return d_field, d_target
        return d_field, zero_gradients(target, target_needs)

    ours = grid_field(field, grid, layout, needs)
    theirs = _target_on(ours, target, grid, layout, target_needs)
    has_kernel = _has_kernel(ours, theirs)
    scale = d_loss.float() / grid.numel
    for first, count in _slabs(ours, theirs):
        shape = (batch, count, *ours.frame.shape[1:])
        d_ours = scale.new_empty(shape) if of_field else None
        d_theirs = scale.new_empty(shape) if of_target and d_target is None else None
        if d_target is not None:
            d_theirs = ours.frame.view(d_target)[:, first : first + count]
        sigma = their_sigma = None
        if has_kernel:
            launch = loss_launch(ours, theirs, shape)
            _run_kernel(ours, theirs, shape, first, kind, launch, scale, None, d_ours, d_theirs)
        else:
            sigma = _slab(ours, shape, first, scale)
            their_sigma = _slab(theirs, shape, first, scale)
            d = sigma - their_sigma
            d = scale[:, None, None, None] * (d.sign() if kind == "l1" else 2 * d)
            if d_ours is not None:
                d_ours.copy_(d)
            if d_theirs is not None:
                torch.neg(d, out=d_theirs)
        # The kernel has the slope of the output in its results already.
        if d_ours is not None:
            ours.add_gradient(d_ours, sigma, first)
        if d_theirs is not None and not isinstance(theirs, Tensor):
            theirs.add_gradient(d_theirs, their_sigma, first)

    d_field = ours.gradients() if of_field else Gradients()
    if isinstance(theirs, Tensor):
        return d_field, d_target
    return d_field, theirs.gradients() if of_target else Gradients()


def loss_launch(ours: GridField, theirs: Tensor | GridField, shape: Sequence[int]) -> Launch:
    """Of the loss kernel, for slices [B, slices, rows, columns]: as the forward kernel's."""
    assert isinstance(ours, TwoLayerField)
    units = math.gcd(ours.units, theirs.units) if isinstance(theirs, TwoLayerField) else ours.units
    has_third = ours.tables.third is not None
    return forward_launch(shape, units, has_third, device_family(ours.w2.device))


def _has_kernel(ours: GridField, theirs: Tensor | GridField) -> bool:
    return isinstance(ours, TwoLayerField) and isinstance(theirs, Tensor | TwoLayerField)


def _target_on(
    ours: GridField,
    target: Tensor | Field,
    grid: Grid,
    layout: TriplaneLayout,
    needs: Needs | None = None,
) -> Tensor | GridField:
    """What is compared with: a volume [B, S, R, C], or a field."""
    if isinstance(target, Tensor):
        return ours.frame.view(target)
    return grid_field(target, grid, layout, needs)


def _slabs(ours: GridField, theirs: Tensor | GridField) -> Iterator[tuple[int, int]]:
    """First slice and number of slices of what is processed at once."""
    thickness = ours.slices_at_once()
    if not isinstance(theirs, Tensor):
        thickness = min(thickness, theirs.slices_at_once())
    n_slices = ours.frame.shape[0]
    for first in range(0, n_slices, thickness):
        yield first, min(thickness, n_slices - first)


def _slab(volume: Tensor | GridField, shape: Sequence[int], first: int, scratch: Tensor) -> Tensor:
    """Slices from `first` on, [B, slices, R, C], of a volume or of a field."""
    if isinstance(volume, Tensor):
        return volume[:, first : first + shape[1]]
    sigma = scratch.new_empty(shape)
    volume.sigma(sigma, first)
    return sigma


def _run_kernel(
    ours: GridField,
    theirs: Tensor | GridField,
    shape: Sequence[int],
    first: int,
    kind: Kind,
    launch: Launch,
    scale: Tensor | None = None,
    errors: Tensor | None = None,
    d_ours: Tensor | None = None,
    d_theirs: Tensor | None = None,
) -> None:
    """Either `errors` is filled, [B, programs a sample], or d_ours and d_theirs are."""
    assert isinstance(ours, TwoLayerField)
    no_strides = (0, 0, 0, 0)
    target: tuple[Any, ...]
    if isinstance(theirs, TwoLayerField):
        target = (*theirs.kernel_arguments(first), None, *no_strides)
        their_units, hidden, output = theirs.units, theirs.decoder.hidden, theirs.decoder.output
    else:
        assert isinstance(theirs, Tensor)
        target = (*(None,) * 6, *(0,) * 5, theirs[:, first:], *theirs.stride())
        their_units, hidden, output = 0, "relu", "identity"
    with on_device_of(ours.w2):
        loss_kernel[(forward_programs(shape, launch),)](
            *ours.kernel_arguments(first),
            *target,
            scale,
            errors,
            d_ours,
            *(no_strides if d_ours is None else d_ours.stride()),
            d_theirs,
            *(no_strides if d_theirs is None else d_theirs.stride()),
            *shape[1:],
            *ours.pitches,
            H=ours.units,
            HIDDEN=ours.decoder.hidden,
            OUTPUT=ours.decoder.output,
            THEIR_H=their_units,
            THEIR_HIDDEN=hidden,
            THEIR_OUTPUT=output,
            KIND=kind,
            **launch.arguments,
        )
