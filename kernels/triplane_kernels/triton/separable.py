"""A field on a regular grid as tables (`frame`), and from their gradients to the inputs'."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.frame import FirstLayerGradients, Frame, Part, Tables, plane_weight
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.triton.tables import add_table, plane_gradient, weight_gradient


class GridField(Protocol):
    """A field on a grid, some slices at a time: what `density_grid` and its loss are made of."""

    frame: Frame

    def slices_at_once(self) -> int:
        """How many slices of a volume in memory at once are reasonable."""

    def sigma(self, out: Tensor, first: int) -> None:
        """The density of slices from `first` on, written to `out` [B, slices, R, C]."""

    def add_gradient(self, d_sigma: Tensor, sigma: Tensor | None, first: int) -> None:
        """Take in the gradient of slices from `first` on; each of them once, in ascending order.

        d_sigma, sigma [B, slices, R, C]. Without `sigma`, `d_sigma` is the gradient by the raw
        density, before the output activation.
        """

    def gradients(self) -> Gradients:
        """What the gradients taken in amount to, as far as needed."""


def tabulate(field: Field, grid: Grid, layout: TriplaneLayout, frame: Frame) -> Tables:
    """The tables of a field whose layout sums or concatenates; the bias is in one of them."""
    weight, bias = field.decoder.weights[0], field.decoder.biases[0]
    units, batch = weight.shape[0], field.planes[0].shape[0]
    tables: dict[Part, Tensor] = {}
    for number, (plane, axes) in enumerate(zip(field.planes, layout.axes, strict=True)):
        part = frame.part(axes)
        taps = frame.plane_taps(plane, axes, grid, layout)
        columns = plane_weight(weight, number, layout)
        tables[part] = add_table(
            tables.get(part), plane, taps, columns, bias if number == 0 else None
        )
    for part in ("rows", "columns"):
        if part not in tables:
            tables[part] = weight.new_zeros(frame.table_shape(part, batch, units))
    return Tables(tables["rows"], tables["columns"], tables.get("third"))


def gradients_of_first_layer(
    d_tables: Tables,
    field: Field,
    grid: Grid,
    layout: TriplaneLayout,
    frame: Frame,
    needs: Needs,
) -> FirstLayerGradients:
    """From the tables' gradients to those of the planes and of the first layer."""
    weight = field.decoder.weights[0]
    d_planes: list[Tensor] = []
    d_weights: list[Tensor] = []
    for number, (plane, axes) in enumerate(zip(field.planes, layout.axes, strict=True)):
        d_table = getattr(d_tables, frame.part(axes))
        taps = frame.plane_taps(plane, axes, grid, layout)
        if needs.planes:
            columns = plane_weight(weight, number, layout)
            d_planes.append(plane_gradient(d_table, plane, taps, columns))
        if needs.decoder:
            d_weights.append(weight_gradient(d_table, plane, taps))
    d_weight = d_bias = None
    if needs.decoder:
        if layout.reduce == "concat":
            d_weight = torch.cat(d_weights, dim=1)
        else:
            d_weight = torch.stack(d_weights).sum(dim=0)
        # Every voxel's gradient is in each of the tables.
        d_bias = d_tables.rows[..., : frame.count("rows")].sum(dim=(0, 1, 3))
    return FirstLayerGradients(d_planes if needs.planes else None, d_weight, d_bias)
