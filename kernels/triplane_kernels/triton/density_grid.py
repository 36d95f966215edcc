"""Density on a regular grid: tables for all that is linear, one logarithm a voxel and unit.

With the tables of `separable`, a decoder of two layers leaves to every voxel (slice s, row r,
column c)

    sigma = output(b2 + sum_h w2[h] f(x_h)),   x_h = rows[s, h, r] + columns[s, h, c] (+ third)

and for f = softplus the exponential of the sum is the product of the tables' exponentials:

    softplus(x_h) = ln 2 log2(1 + u_h),   u_h = e^rows[s, h, r] e^columns[s, h, c]
    sigmoid(x_h) = u_h / (1 + u_h)

so the tables hold exponentials, and an element costs two multiply-adds and one logarithm, or a
reciprocal in the backward. Two things limit that form. The products must not leave the range of
float32; and 1 + u is exact to 2^-24 of 1 and not of u, which shows where nearly all of a slice is
far below zero. `_choose_forms` finds the slices concerned, on the device; their tables stay as
they are, and the kernels take the plain, everywhere accurate form for them. So they do for the
other hidden activations.

The backward sums in a fixed order and without atomics. One program owns a slice and some hidden
units, keeps a block of columns in registers, and goes through the rows:

    d_columns[s, h, c] = w2[h] sum_r g f'(x)     in registers, stored once
    d_rows[s, h, r]    = w2[h] sum_c g f'(x)     one reduction over the lanes for every row
    d_w2[h]            = sum g f(x)              in registers, then a sum over all programs

with g the gradient by the raw density. A third table is owned by rows instead of slices and takes
a second pass, with the parts of rows and slices exchanged.

The fast path is for decoders of two layers and layouts that sum or concatenate. Any other field
goes to `deep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs, zero_gradients
from triplane_kernels.decoder import Output
from triplane_kernels.frame import Frame, Tables, padded
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.triton.deep import DeepField, times_output_slope
from triplane_kernels.triton.grid_kernels import (
    choose_form_kernel,
    density_backward_kernel,
    density_kernel,
    exponentiate_kernel,
)
from triplane_kernels.triton.launch import Launch, block, blocks, on_device_of
from triplane_kernels.triton.separable import GridField, gradients_of_first_layer, tabulate
from triplane_kernels.triton.tiles import device_family, grid_tile

# How large entries that are exponentiated may be, in magnitude: their product must stay within
# float32's range, which ends at e^87.
LARGEST_OF_TWO = 40.0
LARGEST_OF_THREE = 28.0

# The least root mean square of softplus, weighted by w2, for which an error of 2^-22 in log2(1 + u)
# is of no account.
LEAST_SOFTPLUS = 0.2

SLAB_ELEMENTS = 2**24  # of a scratch volume: 64 MiB


# --------------------------------------------------------------------------------- operations


def density_grid(field: Field, grid: Grid, layout: TriplaneLayout) -> Tensor:
    """See `Backend.density_grid`."""
    plane = field.planes[0]
    sigma = plane.new_empty(plane.shape[0], *grid.shape, dtype=torch.float32)
    if sigma.numel() > 0:
        volume = grid_field(field, grid, layout)
        volume.sigma(volume.frame.view(sigma), 0)
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
    volume = grid_field(field, grid, layout, needs)
    d_volume, values = (volume.frame.view(t.contiguous()) for t in (d_sigma, sigma))
    volume.add_gradient(d_volume, values, 0)
    return volume.gradients()


def grid_field(
    field: Field, grid: Grid, layout: TriplaneLayout, needs: Needs | None = None
) -> GridField:
    """The field, by its kernels if it has some. `needs` is for a backward."""
    if len(field.decoder.weights) == 2 and layout.reduce != "product":
        return TwoLayerField(field, grid, layout, needs)
    return DeepField(field, grid, layout, needs)


# --------------------------------------------------------------------------------- two layers


class TwoLayerField:
    """A `GridField` with kernels of its own.

    tables  of exponentials in the slices that are not plain.
    plain   [B, N_slice], or [B, 1] with a third table, int32: not 0 where the kernels are to use
            the plain form. None: everywhere.
    """

    def __init__(
        self, field: Field, grid: Grid, layout: TriplaneLayout, needs: Needs | None = None
    ) -> None:
        self._field, self._grid, self._layout, self._needs = field, grid, layout, needs
        self.decoder = field.decoder
        self.frame = Frame.of(grid, layout)
        self.tables = tabulate(field, grid, layout, self.frame)
        weight, bias = self.decoder.weights[1], self.decoder.biases[1]
        assert bias is not None
        self.w2, self.b2 = weight[0].contiguous(), bias
        self.plain: Tensor | None = None
        if self.decoder.hidden == "softplus":
            self.plain = _choose_forms(self.tables, self.w2, self.frame)
        if needs is not None:
            self._d_rows = torch.empty_like(self.tables.rows)
            self._d_columns = torch.empty_like(self.tables.columns)
            self._d_third: Tensor | None = None
            self._d_w2 = torch.zeros_like(self.w2)
            self._d_b2 = torch.zeros_like(self.b2)

    @property
    def units(self) -> int:
        """Width of the hidden layer."""
        return self.w2.shape[0]

    @property
    def pitches(self) -> tuple[int, int]:
        """The padded numbers of rows and of columns in the tables."""
        return self.tables.rows.shape[3], self.tables.columns.shape[3]

    def slices_at_once(self) -> int:
        batch, (_, n_rows, n_columns) = self.tables.rows.shape[0], self.frame.shape
        return max(1, SLAB_ELEMENTS // (batch * n_rows * n_columns))

    def sigma(self, out: Tensor, first: int) -> None:
        launch = forward_launch(
            out.shape, self.units, self.tables.third is not None, device_family(out.device)
        )
        with on_device_of(out):
            density_kernel[(forward_programs(out.shape, launch),)](
                *self.kernel_arguments(first),
                out,
                *out.shape[1:],
                *self.pitches,
                *out.stride(),
                H=self.units,
                HIDDEN=self.decoder.hidden,
                OUTPUT=self.decoder.output,
                **launch.arguments,
            )

    def kernel_arguments(self, first: int) -> tuple[Any, ...]:
        """What the forward kernels take of a field, for the slices from `first` on."""
        rows, columns, third = self.tables
        return (
            rows[:, first:],
            columns[:, first:],
            third,
            self.w2,
            self.b2,
            *self._plain_from(first),
            rows.stride(0),
            columns.stride(0),
            0 if third is None else third.stride(0),
        )

    def add_gradient(self, d_sigma: Tensor, sigma: Tensor | None, first: int) -> None:
        assert self._needs is not None
        part = slice(first, first + d_sigma.shape[1])
        rows, columns, third = self.tables
        self._sweep(
            Tables(rows[:, part], columns[:, part], third),
            self._plain_from(first),
            d_sigma,
            sigma,
            self._d_rows[:, part],
            self._d_columns[:, part],
            self._d_w2 if self._needs.decoder else None,
        )
        if third is not None:
            # With the parts of slices and rows exchanged, the third table takes the columns'.
            d_third = torch.empty_like(third)
            self._sweep(
                Tables(rows[:, part].transpose(1, 3), third, columns[:, part]),
                self._plain_from(0),
                d_sigma.transpose(1, 2),
                None if sigma is None else sigma.transpose(1, 2),
                None,
                d_third,
                None,
            )
            self._d_third = d_third if self._d_third is None else self._d_third + d_third
        if self._needs.decoder:
            self._d_b2 += _sum_of_raw_gradient(d_sigma, sigma, self.decoder.output)

    def gradients(self) -> Gradients:
        assert self._needs is not None
        d_tables = Tables(self._d_rows, self._d_columns, self._d_third)
        first = gradients_of_first_layer(
            d_tables, self._field, self._grid, self._layout, self.frame, self._needs
        )
        return first.followed_by([self._d_w2[None]], [self._d_b2])

    def _plain_from(self, first: int) -> tuple[Tensor | None, int, int]:
        """The flags from a slice on, and their strides over samples and slices."""
        if self.plain is None:
            return None, 0, 0
        if self.tables.third is not None:
            return self.plain, self.plain.stride(0), 0
        return self.plain[:, first:], self.plain.stride(0), self.plain.stride(1)

    def _sweep(
        self,
        tables: Tables,
        plain: tuple[Tensor | None, int, int],
        d_sigma: Tensor,
        sigma: Tensor | None,
        d_rows: Tensor | None,
        d_columns: Tensor,
        d_w2: Tensor | None,
    ) -> None:
        """Run the backward kernel: it overwrites d_rows and d_columns, and adds to d_w2.

        Slices and rows may have exchanged parts, then `tables.rows` is a transposed view.
        """
        rows, columns, third = tables
        batch, n_slices, n_rows, n_columns = d_sigma.shape
        family = device_family(d_sigma.device)
        launch = backward_launch(n_columns, self.units, third is not None, family)
        n_blocks = blocks(n_columns, launch.constants["BLOCK_C"])
        # What is summed over the columns is left as one partial sum for each block of them.
        rows_partial = w2_partial = None
        if d_rows is not None:
            one = n_blocks == 1
            rows_partial = d_rows[None] if one else rows.new_empty(n_blocks, *rows.shape)
        if d_w2 is not None:
            w2_partial = rows.new_empty(batch * n_slices * n_blocks, self.units)
        programs = batch * n_slices * blocks(self.units, launch.constants["BLOCK_H"])
        forms = [self.decoder.hidden] if self.plain is None else ["factored", self.decoder.hidden]
        with on_device_of(d_sigma):
            for form in forms:
                density_backward_kernel[(programs, n_blocks)](
                    rows,
                    columns,
                    third,
                    self.w2,
                    *plain,
                    d_sigma,
                    sigma,
                    rows_partial,
                    d_columns,
                    w2_partial,
                    n_slices,
                    n_rows,
                    n_columns,
                    columns.shape[3],
                    *rows.stride(),
                    columns.stride(0),
                    0 if third is None else third.stride(0),
                    *d_sigma.stride(),
                    *((0, 0) if rows_partial is None else rows_partial.stride()[:2]),
                    d_columns.stride(0),
                    H=self.units,
                    FORM=form,
                    OUTPUT="identity" if sigma is None else self.decoder.output,
                    **launch.arguments,
                )
        if d_rows is not None and rows_partial is not None and n_blocks > 1:
            d_rows.copy_(rows_partial.sum(dim=0))
        if d_w2 is not None and w2_partial is not None:
            d_w2 += w2_partial.sum(dim=0)


def _choose_forms(tables: Tables, w2: Tensor, frame: Frame) -> Tensor:
    """Where the factored form would not do, [B, N_slice] or, with a third table, [B, 1]: int32.

    That is where an entry is too large to be exponentiated (or NaN), or softplus too small: its
    mean over a slice is at least softplus of the mean, which the tables' means give. Elsewhere the
    tables' entries become their exponentials.
    """
    if tables.third is not None:
        plain = _plain_samples(tables, w2, frame)
        for table in (tables.rows, tables.columns, tables.third):
            _exponentiate(table, plain)
        return plain
    rows, columns, _ = tables
    batch, n_slices, units, _ = rows.shape
    plain = rows.new_empty(batch, n_slices, dtype=torch.int32)
    block_h = block(units, 32)
    launch = Launch({"BLOCK_H": block_h, "BLOCK_N": 4096 // block_h}, num_warps=8)
    with on_device_of(rows):
        choose_form_kernel[(batch * n_slices,)](
            rows,
            columns,
            w2,
            plain,
            frame.count("rows"),
            frame.count("columns"),
            rows.shape[3],
            columns.shape[3],
            LARGEST_OF_TWO,
            LEAST_SOFTPLUS,
            H=units,
            **launch.arguments,
        )
    return plain


def _plain_samples(tables: Tables, w2: Tensor, frame: Frame) -> Tensor:
    """See `_choose_forms`; with a third table, what one slice is made of, others are too."""
    assert tables.third is not None
    rows = tables.rows[..., : frame.count("rows")]
    columns = tables.columns[..., : frame.count("columns")]
    three = (rows, columns, tables.third[..., : frame.count("third")])
    largest = torch.stack([torch.linalg.vector_norm(t, torch.inf, dim=(1, 2, 3)) for t in three])
    in_range = (largest <= LARGEST_OF_THREE).all(dim=0)[:, None]
    means = torch.stack([table.mean(dim=(1, 3)) for table in three])
    mean = means.sum(dim=0)[:, None]  # [B, 1, H]
    strength = torch.linalg.vector_norm(F.softplus(mean) * w2, dim=-1)
    visible = strength >= LEAST_SOFTPLUS * torch.linalg.vector_norm(w2)
    return (~(in_range & visible)).to(torch.int32)


def _exponentiate(table: Tensor, plain: Tensor) -> None:
    """e^table, in place, where a slice is not plain."""
    batch, n_slices, *_ = table.shape
    size = table[0, 0].numel()
    launch = Launch({"BLOCK": block(size, 2048)})
    with on_device_of(table):
        exponentiate_kernel[(batch * n_slices, blocks(size, launch.constants["BLOCK"]))](
            table,
            plain,
            n_slices,
            size,
            plain.stride(0),
            plain.stride(1) if plain.shape[1] > 1 else 0,
            **launch.arguments,
        )


def _sum_of_raw_gradient(d_sigma: Tensor, sigma: Tensor | None, output: Output) -> Tensor:
    """The gradient of the last bias, from parts of a volume such that a copy is small."""
    if sigma is None or output == "identity":
        return d_sigma.sum()
    step = max(1, SLAB_ELEMENTS // d_sigma[:, 0].numel())
    pairs = zip(d_sigma.split(step, dim=1), sigma.split(step, dim=1), strict=True)
    return torch.stack([times_output_slope(*pair, output).sum() for pair in pairs]).sum()


# ------------------------------------------------------------------------------------ launches


def forward_launch(
    shape: Sequence[int], units: int, has_third: bool, family: str = "nvidia"
) -> Launch:
    """Of the forward kernels, for a volume's shape [B, slices, rows, columns]."""
    _, _, n_rows, n_columns = shape
    tile = grid_tile(family, "forward three" if has_third else "forward two")
    block_c = _least_padding(n_columns, tile.widest)
    block_r = min(tile.elements // block_c, triton.next_power_of_2(n_rows))
    return Launch(
        {
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
            "UNROLL": next(n for n in (4, 2, 1) if units % n == 0),
            "EVEN": padded(n_rows) % block_r == 0 and padded(n_columns) % block_c == 0,
            "SLICES": 4 if has_third else 1,
        },
        num_warps=tile.warps,
    )


def forward_programs(shape: Sequence[int], launch: Launch) -> int:
    """How many programs a forward kernel is launched with."""
    batch, n_slices, n_rows, n_columns = shape
    constants = launch.constants
    tiles = blocks(n_rows, constants["BLOCK_R"]) * blocks(n_columns, constants["BLOCK_C"])
    return batch * blocks(n_slices, constants["SLICES"]) * tiles


def backward_launch(n_columns: int, units: int, has_third: bool, family: str = "nvidia") -> Launch:
    """Of the backward kernel."""
    tile = grid_tile(family, "backward three" if has_third else "backward two")
    block_c = _least_padding(n_columns, tile.widest)
    block_h = min(tile.elements // block_c, triton.next_power_of_2(units))
    return Launch(
        {
            "BLOCK_H": block_h,
            "BLOCK_C": block_c,
            "EVEN": units % block_h == 0 and padded(n_columns) % block_c == 0,
            "EVEN_VOLUME": n_columns % block_c == 0,
        },
        num_warps=tile.warps,
    )


def _least_padding(size: int, widest: int) -> int:
    """Of the powers of two from widest / 4 to widest, the one that pads a size least."""
    candidates = [widest, widest // 2, widest // 4]
    return min(candidates, key=lambda width: blocks(size, width) * width)
