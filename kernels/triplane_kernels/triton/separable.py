"""A field on a regular grid as tables, and from the tables' gradients to the inputs'.

The grid's axes get parts: the volume is cut into slices along one of them, and a slice has rows
and columns. The first layer's output at a voxel is the sum of one entry each of

    rows    [B, N_slice, H, N_row]      from the planes over the slice and the row axis
    columns [B, N_slice, H, N_column]   from the planes over the slice and the column axis
    third   [B, N_row, H, N_column]     from the planes over the row and the column axis

The slice axis is chosen such that `third` is missing wherever a layout allows: EG3D's has planes
over (x, y) and (x, z) only. If `rows` or `columns` has no plane, it is zero. The last dimension is
padded, see `tables`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.triton.tables import (
    PlaneTaps,
    add_table,
    padded,
    plane_gradient,
    weight_gradient,
)

Part = Literal["rows", "columns", "third"]


class Tables(NamedTuple):
    """Tables, or their gradients; see the module's docstring."""

    rows: Tensor
    columns: Tensor
    third: Tensor | None


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


@dataclass(frozen=True)
class Frame:
    """The parts that the grid's axes play: `axes` are those of slices, rows and columns."""

    axes: tuple[int, int, int]
    shape: tuple[int, int, int]  # number of slices, rows and columns

    @classmethod
    def of(cls, grid: Grid, layout: TriplaneLayout) -> Frame:
        missing = {3 - sum(axes) for axes in layout.axes}
        # A plane lacks one axis: with that as the slice axis it would be a third table.
        slices = min({0, 1, 2} - missing, default=0)
        rows, columns = sorted({0, 1, 2} - {slices})
        nx, ny, nz = (grid.shape[axis] for axis in (slices, rows, columns))
        return cls((slices, rows, columns), (nx, ny, nz))

    def part(self, axes: tuple[int, int]) -> Part:
        """The table that a plane with these axes belongs to."""
        parts: dict[int, Part] = {0: "third", 1: "columns", 2: "rows"}
        return parts[self.axes.index(3 - sum(axes))]

    def rows_axis(self, part: Part) -> int:
        """The grid axis of a table's dimension 1."""
        return self.axes[1] if part == "third" else self.axes[0]

    def has_third(self, layout: TriplaneLayout) -> bool:
        return any(self.part(axes) == "third" for axes in layout.axes)

    def table_shape(self, part: Part, batch: int, units: int) -> tuple[int, int, int, int]:
        n_slices, n_rows, n_columns = self.shape
        if part == "third":
            return batch, n_rows, units, padded(n_columns)
        return batch, n_slices, units, padded(n_rows if part == "rows" else n_columns)

    def count(self, part: Part) -> int:
        """How many grid points there are along a table's last dimension, without padding."""
        return self.shape[1] if part == "rows" else self.shape[2]

    def view(self, volume: Tensor) -> Tensor:
        """A volume [B, X, Y, Z] with its dimensions as slices, rows, columns."""
        slices, rows, columns = self.axes
        return volume.permute(0, 1 + slices, 1 + rows, 1 + columns)

    def plane_taps(
        self, plane: Tensor, axes: tuple[int, int], grid: Grid, layout: TriplaneLayout
    ) -> PlaneTaps:
        return PlaneTaps.at(plane, axes, self.rows_axis(self.part(axes)), grid, layout)


def plane_weight(weight: Tensor, plane: int, layout: TriplaneLayout) -> Tensor:
    """The columns of the first layer's weight that act on one plane's lookup, a view."""
    if layout.reduce == "concat":
        return weight.chunk(len(layout.axes), dim=1)[plane]
    return weight


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


class FirstLayerGradients(NamedTuple):
    """None for what was not needed."""

    planes: list[Tensor] | None
    weight: Tensor | None
    bias: Tensor | None

    def followed_by(self, d_weights: list[Tensor], d_biases: list[Tensor]) -> Gradients:
        """With the gradients of the layers after it."""
        if self.weight is None or self.bias is None:
            return Gradients(planes=self.planes)
        return Gradients(self.planes, [self.weight, *d_weights], [self.bias, *d_biases])


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
