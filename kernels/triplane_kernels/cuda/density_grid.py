"""Density on a regular grid, and its loss, by the CUDA kernels of csrc/cuda/density_grid.cu.

For decoders of two layers and layouts that sum or concatenate. The tables (`frame`) of a softplus
decoder are exponentiated where that is exact enough: `choose_forms` in the kernels' source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs, zero_gradients
from triplane_kernels.cuda import launch
from triplane_kernels.cuda.launch import address, empty
from triplane_kernels.cuda.tables import gradients_of_first_layer, tabulate
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.frame import Frame, Tables
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout

Kind = Literal["l1", "l2"]

# How large entries of two and of three tables that are exponentiated may be, in magnitude. Products
# must stay within float32's range, which ends at e^87; in the backward those of two voxels.
LARGEST_FORWARD = (40.0, 28.0)
LARGEST_BACKWARD = (21.0, 14.0)

MOST_UNITS = 1024

SLAB_ELEMENTS = 2**24  # of a scratch volume: 64 MiB

NO_VOLUME = (0, 0, 0, 0, 0)


def why_not_grid(decoder: DensityMLP, layout: TriplaneLayout) -> str:
    """Why grids of a decoder and a layout cannot be computed; empty if they can."""
    if layout.reduce == "product":
        return "product reductions have no CUDA grid kernel"
    if len(decoder.weights) != 2:
        return "decoders of other than two layers have no CUDA grid kernel"
    if decoder.weights[0].shape[0] > MOST_UNITS:
        return f"decoders of more than {MOST_UNITS} hidden units have no CUDA grid kernel"
    return ""


# --------------------------------------------------------------------------------- operations


def density_grid(field: Field, grid: Grid, layout: TriplaneLayout) -> Tensor:
    """See `Backend.density_grid`."""
    sigma = empty(field.planes[0], field.planes[0].shape[0], *grid.shape)
    if sigma.numel() > 0:
        volume = GridVolume(field, grid, layout, LARGEST_FORWARD)
        launch.extension.density_grid(
            field=volume.slices(),
            batch=volume.batch,
            sigma=numbers(volume.frame.view(sigma)),
            **launch.queue(sigma),
        )
    return sigma


def density_grid_backward(
    d_sigma: Tensor,
    sigma: Tensor,
    field: Field,
    grid: Grid,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    """See `Backend.density_grid_backward`."""
    if sigma.numel() == 0:
        return zero_gradients(field, needs)
    volume = GridVolume(field, grid, layout, LARGEST_BACKWARD)
    gradients = TableGradients(volume, needs)
    d_view, view = (volume.frame.view(t.contiguous()) for t in (d_sigma, sigma))
    if field.decoder.output == "identity" and launch.extension.is_gradient(
        d_sigma=numbers(d_view), shape=volume.frame.shape, third=volume.tables.third is not None
    ):
        gradients.add(d_view, d_view.shape[1:], 0)
        return gradients.of_inputs()
    for first, count in slabs(volume):
        part = slice(first, first + count)
        shape = (count, *volume.frame.shape[1:])
        raw = empty(sigma, volume.batch, *padded_shape(volume, count))
        launch.extension.raw_gradient(
            d_sigma=numbers(d_view[:, part]),
            sigma=numbers(view[:, part]),
            batch=volume.batch,
            shape=shape,
            output=field.decoder.output,
            raw=gradient_numbers(raw),
            **launch.queue(sigma),
        )
        gradients.add(raw, shape, first)
    return gradients.of_inputs()


def density_grid_loss(
    field: Field, target: Tensor | Field, grid: Grid, layout: TriplaneLayout, kind: Kind
) -> Tensor:
    """See `Backend.density_grid_loss`."""
    batch = field.planes[0].shape[0]
    if batch == 0:
        return empty(field.planes[0], 0)
    ours = GridVolume(field, grid, layout, LARGEST_FORWARD)
    theirs = _target(ours, target, grid, layout, LARGEST_FORWARD)
    described = ours.slices()
    errors = empty(field.planes[0], batch, launch.extension.loss_partials(described))
    _compare(ours, theirs, 0, None, kind, errors=errors)
    return errors.sum(dim=1) / grid.numel


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

    ours = GridVolume(field, grid, layout, LARGEST_BACKWARD)
    theirs = _target(ours, target, grid, layout, LARGEST_BACKWARD)
    scale = d_loss.float() / grid.numel
    d_ours = TableGradients(ours, needs) if of_field else None
    d_theirs = None
    if isinstance(theirs, GridVolume) and of_target:
        d_theirs = TableGradients(theirs, target_needs)
    for first, count in slabs(ours):
        shape = (count, *ours.frame.shape[1:])
        # The kernel writes the voxels that exist; the padding must be 0.
        raw = [
            None if gradients is None else scale.new_zeros(batch, *padded_shape(ours, count))
            for gradients in (d_ours, d_theirs)
        ]
        outputs = list(raw)
        if d_target is not None:
            outputs[1] = ours.frame.view(d_target)[:, first : first + count]
        _compare(ours, theirs, first, count, kind, scale=scale, outputs=outputs)
        for gradients, part in zip((d_ours, d_theirs), raw, strict=True):
            if gradients is not None and part is not None:
                gradients.add(part, shape, first)
    d_field = Gradients() if d_ours is None else d_ours.of_inputs()
    if isinstance(target, Tensor):
        return d_field, d_target
    return d_field, Gradients() if d_theirs is None else d_theirs.of_inputs()


# --------------------------------------------------------------------------------------- parts


class GridVolume:
    """A field on a grid, by its tables.

    plain  [B, N_slice], or [B] with a third table, int32: not 0 where the tables' entries are not
           their exponentials. None: nowhere.
    """

    def __init__(
        self, field: Field, grid: Grid, layout: TriplaneLayout, largest: tuple[float, float]
    ) -> None:
        self.field, self.grid, self.layout = field, grid, layout
        self.frame = Frame.of(grid, layout)
        self.tables = tabulate(field, grid, layout, self.frame)
        self.batch, _, self.units, _ = self.tables.rows.shape
        weight, bias = field.decoder.weights[1], field.decoder.biases[1]
        assert bias is not None
        self.w2, self.b2 = weight.contiguous(), bias
        self.plain: Tensor | None = None
        if field.decoder.hidden == "softplus":
            self._choose_forms(largest)

    def _choose_forms(self, largest: tuple[float, float]) -> None:
        third = self.tables.third is not None
        described = self.slices()
        n_slices, n_rows, _ = self.frame.shape
        size = (self.batch,) if third else (self.batch, n_slices)
        self.plain = self.w2.new_empty(size, dtype=torch.int32)
        statistics = None
        if third:
            statistics = empty(self.w2, self.batch, 2 * n_slices + n_rows, self.units + 1)
        launch.extension.choose_forms(
            field=described,
            batch=self.batch,
            largest=largest[third],
            tables=[address(table) for table in self.tables],
            plain=address(self.plain),
            statistics=address(statistics),
            **launch.queue(self.w2),
        )

    def slices(self, first: int = 0, count: int | None = None) -> Any:
        """The field as the extension takes it, some of its slices."""
        rows, columns, third = self.tables
        n_slices, n_rows, n_columns = self.frame.shape
        plain = self.plain
        if plain is not None and third is None:
            plain = plain[:, first:]
        return launch.extension.GridField(
            units=self.units,
            shape=(n_slices - first if count is None else count, n_rows, n_columns),
            pitches=(rows.shape[3], columns.shape[3]),
            batch_strides=(rows.stride(0), columns.stride(0)),
            tables=[address(rows[:, first:]), address(columns[:, first:]), address(third)],
            plain=address(plain),
            plain_batch=0 if plain is None else plain.stride(0),
            w2=address(self.w2),
            b2=address(self.b2),
            hidden=self.field.decoder.hidden,
            output=self.field.decoder.output,
        )


class TableGradients:
    """Gradients of a volume's tables and second layer; slabs of slices are taken in one by one."""

    def __init__(self, volume: GridVolume, needs: Needs) -> None:
        self._volume, self._needs = volume, needs
        rows, columns, _ = volume.tables
        self._d_rows, self._d_columns = torch.empty_like(rows), torch.empty_like(columns)
        self._d_third: Tensor | None = None
        self._d_w2 = torch.zeros_like(volume.w2)
        self._d_b2 = torch.zeros_like(volume.b2)

    def add(self, gradient: Tensor, shape: Sequence[int], first: int) -> None:
        """Take in the gradient by the raw density of slices from `first` on, [B, S, R, C].

        `shape` is without the padding that the extension's `Gradient` has.
        """
        volume = self._volume
        third = volume.tables.third
        d_third = None if third is None else torch.empty_like(third)
        d_w2 = None
        if self._needs.decoder:
            d_w2 = empty(gradient, volume.batch, shape[0], volume.units)
        launch.extension.density_grid_backward(
            field=volume.slices(first, shape[0]),
            batch=volume.batch,
            gradient=gradient_numbers(gradient),
            d_rows=address(self._d_rows[:, first:]),
            d_columns=address(self._d_columns[:, first:]),
            d_third=address(d_third),
            d_w2=address(d_w2),
            **launch.queue(gradient),
        )
        if d_third is not None:
            self._d_third = d_third if self._d_third is None else self._d_third + d_third
        if d_w2 is not None:
            self._d_w2 += d_w2.sum(dim=(0, 1))
            self._d_b2 += gradient.sum()

    def of_inputs(self) -> Gradients:
        """What the gradients taken in amount to, as far as needed."""
        volume = self._volume
        d_tables = Tables(self._d_rows, self._d_columns, self._d_third)
        first = gradients_of_first_layer(
            d_tables, volume.field, volume.grid, volume.layout, volume.frame, self._needs
        )
        return first.followed_by([self._d_w2], [self._d_b2])


def slabs(volume: GridVolume) -> Iterator[tuple[int, int]]:
    """First slice and number of slices of what has room in a scratch volume."""
    n_slices, n_rows, n_columns = volume.frame.shape
    padding = launch.extension.GRADIENT_PADDING
    count = SLAB_ELEMENTS // (volume.batch * n_rows * n_columns)
    count = max(padding, count // padding * padding)
    for first in range(0, n_slices, count):
        yield first, min(count, n_slices - first)


def padded_shape(volume: GridVolume, slices: int) -> tuple[int, int, int]:
    """Of a gradient's memory."""
    _, n_rows, n_columns = volume.frame.shape
    padding = launch.extension.GRADIENT_PADDING

    def padded(count: int, to: int) -> int:
        return -(-count // to) * to

    if volume.tables.third is not None:
        slices = padded(slices, padding)
    return slices, padded(n_rows, padding), padded(n_columns, 4)


def numbers(volume: Tensor | None) -> tuple[int, ...]:
    """A volume [B, S, R, C] as the extension takes it."""
    return NO_VOLUME if volume is None else (address(volume), *volume.stride())


def gradient_numbers(gradient: Tensor) -> tuple[int, ...]:
    """A gradient [B, S, R, C] with its padding as the extension takes it."""
    return address(gradient), *gradient.shape[1:], *gradient.stride()[:3]


def _target(
    ours: GridVolume,
    target: Tensor | Field,
    grid: Grid,
    layout: TriplaneLayout,
    largest: tuple[float, float],
) -> GridVolume | Tensor:
    """What is compared with: a field, or a volume [B, S, R, C]."""
    if isinstance(target, Tensor):
        return ours.frame.view(target)
    return GridVolume(target, grid, layout, largest)


def _compare(
    ours: GridVolume,
    theirs: GridVolume | Tensor,
    first: int,
    count: int | None,
    kind: Kind,
    scale: Tensor | None = None,
    errors: Tensor | None = None,
    outputs: Sequence[Tensor | None] = (None, None),
) -> None:
    """Either `errors` is filled, or the `outputs`, our and their gradients, are."""
    volume = None
    if isinstance(theirs, Tensor):
        volume = theirs[:, first:]
    launch.extension.density_grid_loss(
        ours=ours.slices(first, count),
        theirs=theirs.slices(first, count) if isinstance(theirs, GridVolume) else None,
        target=numbers(volume),
        batch=ours.batch,
        kind=kind,
        scale=address(scale),
        errors=address(errors),
        d_ours=numbers(outputs[0]),
        d_theirs=numbers(outputs[1]),
        **launch.queue(ours.w2),
    )
