"""How the GPU backends lay a field on a regular grid out as tables.

The grid's axes get parts: the volume is cut into slices along one of them, and a slice has rows
and columns. The first layer's output at a voxel is the sum of one entry each of

    rows    [B, N_slice, H, N_row]      from the planes over the slice and the row axis
    columns [B, N_slice, H, N_column]   from the planes over the slice and the column axis
    third   [B, N_row, H, N_column]     from the planes over the row and the column axis

The slice axis is chosen such that `third` is missing wherever a layout allows: EG3D's has planes
over (x, y) and (x, z) only. If `rows` or `columns` has no plane, it is zero.

Tables are hidden unit major: what a kernel reads together, the entries of one unit, is contiguous.
The last dimension of a table and of its gradient is padded to a multiple of `ALIGNMENT`. The
padding of a table is 0; that of a gradient is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triplane_kernels.backend import Gradients
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.reference import Taps

ALIGNMENT = 16  # elements: vectors may be loaded

Part = Literal["rows", "columns", "third"]


class Tables(NamedTuple):
    """Tables, or their gradients; see the module's docstring."""

    rows: Tensor
    columns: Tensor
    third: Tensor | None


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
        """How a plane becomes its table."""
        return PlaneTaps.at(plane, axes, self.rows_axis(self.part(axes)), grid, layout)


def plane_weight(weight: Tensor, plane: int, layout: TriplaneLayout) -> Tensor:
    """The columns of the first layer's weight that act on one plane's lookup, a view."""
    if layout.reduce == "concat":
        return weight.chunk(len(layout.axes), dim=1)[plane]
    return weight


@dataclass(frozen=True)
class AxisTaps:
    """Linear interpolation along one axis, from `size` pixels to `count` grid points.

    index   [2, count] int32: the lower and the upper pixel of every grid point.
    weight  [2, count] float32.
    reach   [2, size] int32: the grid points from reach[0] up to, not with, reach[1] are those
            that have the pixel among their two.
    widest  the most grid points that a pixel has.
    """

    index: Tensor
    weight: Tensor
    reach: Tensor
    widest: int

    @property
    def count(self) -> int:
        """Number of grid points."""
        return self.index.shape[1]

    @property
    def pitch(self) -> int:
        """Number of grid points with the padding of a table."""
        return padded(self.count)

    @property
    def size(self) -> int:
        """Number of pixels."""
        return self.reach.shape[1]


@lru_cache(maxsize=64)
def axis_taps(
    grid: Grid, axis: int, layout: TriplaneLayout, size: int, device: torch.device
) -> AxisTaps:
    """The taps of a grid's axis on an image side of `size` pixels; worked out in float64."""
    coordinates = grid.coordinates(axis, torch.float64, "cpu")
    taps = Taps.at(coordinates, layout.extents[axis], size, layout)
    low, high = taps.index  # both ascend along the axis
    pixels = torch.arange(size)
    first = torch.searchsorted(high, pixels)
    stop = torch.searchsorted(low, pixels, right=True)
    return AxisTaps(
        index=torch.stack([low, high]).to(device, torch.int32),
        weight=torch.stack(taps.weight).to(device, torch.float32),
        reach=torch.stack([first, stop]).to(device, torch.int32),
        widest=int((stop - first).max()),
    )


def padded(count: int) -> int:
    """A table's last dimension."""
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PlaneTaps:
    """How a plane [B, C, H, W] becomes a table over grid axes p (its rows) and q (its columns)."""

    rows: AxisTaps
    columns: AxisTaps
    rows_are_width: bool

    @classmethod
    def at(
        cls,
        plane: Tensor,
        axes: tuple[int, int],
        rows_axis: int,
        grid: Grid,
        layout: TriplaneLayout,
    ) -> PlaneTaps:
        height, width = plane.shape[2:]
        along_width = axis_taps(grid, axes[0], layout, width, plane.device)
        along_height = axis_taps(grid, axes[1], layout, height, plane.device)
        if axes[0] == rows_axis:
            return cls(along_width, along_height, True)
        return cls(along_height, along_width, False)

    def oriented(self, plane: Tensor) -> Tensor:
        """[B, C, size along p, size along q], a view."""
        return plane.transpose(2, 3) if self.rows_are_width else plane


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
