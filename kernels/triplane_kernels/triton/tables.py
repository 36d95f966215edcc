# mypy: disallow-untyped-defs=False
"""Planes to tables on a regular grid, with the first decoder layer applied, and back.

On an axis-aligned grid a bilinear lookup on a plane depends on two grid indices, and its weights
are a product of a weight along each axis. A table [B, N_p, H, N_q] holds, for grid axes p and q,

    table[b, i, h, k] = sum_c W[h, c] sum_pixels R_p[i, y] R_q[k, x] plane[b, c, y, x]

with R_p [N_p, size] and R_q the resampling matrices, two non-zeros a row. The adjoint is a gather
too, because the grid points that touch a pixel are a range: no atomics, the same bits at every run.
What `frame` says of tables and their padding holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triplane_kernels.frame import AxisTaps, PlaneTaps
from triplane_kernels.triton.elementary import DOT_PRECISION
from triplane_kernels.triton.launch import Launch, block, blocks, on_device_of


def add_table(
    table: Tensor | None, plane: Tensor, taps: PlaneTaps, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A plane's table, plus the table given (in place), plus the bias.

    plane [B, C, H, W]; weight [H, C], float32; bias [H], float32. Returns [B, N_p, H, N_q].
    """
    out = _new_table(plane, taps, weight.shape[0]) if table is None else table
    _tabulate(out, plane, taps, weight, bias, add=table is not None)
    return out


def feature_table(plane: Tensor, taps: PlaneTaps) -> Tensor:
    """A plane resampled on the grid, [B, N_p, C, N_q]."""
    out = _new_table(plane, taps, plane.shape[1])
    _tabulate(out, plane, taps, None, None, add=False)
    return out


def weight_gradient(d_table: Tensor, plane: Tensor, taps: PlaneTaps) -> Tensor:
    """[H, C]: the gradient of the weight that made the table."""
    batch, n_rows, hidden, pitch = d_table.shape
    channels = plane.shape[1]
    image = taps.oriented(plane)
    launch = _launch()
    block_h, block_c = block(hidden, 64), block(channels, 32)
    partial = d_table.new_empty(batch * n_rows, hidden, channels)
    with on_device_of(plane):
        _weight_gradient_kernel[
            (batch * n_rows, blocks(hidden, block_h), blocks(channels, block_c))
        ](
            d_table,
            _readable(image),
            partial,
            taps.rows.index,
            taps.rows.weight,
            taps.columns.index,
            taps.columns.weight,
            n_rows,
            taps.columns.count,
            pitch,
            *image.stride(),
            C=channels,
            H=hidden,
            BLOCK_H=block_h,
            BLOCK_C=block_c,
            BLOCK_Q=block(taps.columns.count, 64),
            BF16=plane.dtype == torch.bfloat16,
            **launch.arguments,
        )
    return partial.sum(dim=0)


def plane_gradient(
    d_table: Tensor, plane: Tensor, taps: PlaneTaps, weight: Tensor | None
) -> Tensor:
    """The plane's gradient, [B, C, H, W] in the plane's dtype.

    `weight` [H, C] is what the table was made with, None for a feature table.
    """
    d_features = d_table if weight is None else _feature_gradient(d_table, weight)
    batch, n_rows, channels, _ = d_features.shape
    # Along q first, with everything else as one dimension; then along p.
    d_columns = _adjoint(d_features.view(1, -1, taps.columns.pitch).transpose(1, 2), taps.columns)
    d_columns = d_columns.transpose(1, 2)
    d_pixels = _adjoint(d_columns.reshape(batch, n_rows, -1), taps.rows)
    d_image = d_pixels.view(batch, taps.rows.size, channels, taps.columns.size).transpose(1, 2)
    return taps.oriented(d_image).to(plane.dtype)


def _new_table(plane: Tensor, taps: PlaneTaps, units: int) -> Tensor:
    shape = (plane.shape[0], taps.rows.count, units, taps.columns.pitch)
    return torch.empty(shape, dtype=torch.float32, device=plane.device)


def _readable(plane: Tensor) -> Tensor:
    """The interpreter cannot compute with bfloat16, so kernels take its bits and widen them."""
    return plane.view(torch.int16) if plane.dtype == torch.bfloat16 else plane


def _launch() -> Launch:
    return Launch(constants={}, num_warps=4, num_stages=1)


def _tabulate(
    table: Tensor,
    plane: Tensor,
    taps: PlaneTaps,
    weight: Tensor | None,
    bias: Tensor | None,
    add: bool,
) -> None:
    batch, n_rows, units, pitch = table.shape
    image = taps.oriented(plane)
    launch = _launch()
    block_h, block_q = block(units, 64), block(pitch, 64)
    with on_device_of(plane):
        _tabulate_kernel[(batch * n_rows, blocks(pitch, block_q), blocks(units, block_h))](
            _readable(image),
            table,
            weight,
            bias,
            taps.rows.index,
            taps.rows.weight,
            taps.columns.index,
            taps.columns.weight,
            n_rows,
            taps.columns.count,
            pitch,
            *image.stride(),
            *((0, 0) if weight is None else weight.stride()),
            C=plane.shape[1],
            H=units,
            BLOCK_H=block_h,
            BLOCK_C=block(plane.shape[1], 32),
            BLOCK_Q=block_q,
            ADD=add,
            BF16=plane.dtype == torch.bfloat16,
            **launch.arguments,
        )


def _feature_gradient(d_table: Tensor, weight: Tensor) -> Tensor:
    """[B, N_p, C, N_q], padded: what a table's gradient is before the weight."""
    batch, n_rows, hidden, pitch = d_table.shape
    channels = weight.shape[1]
    d_features = d_table.new_empty(batch, n_rows, channels, pitch)
    launch = _launch()
    block_c, block_q = block(channels, 64), block(pitch, 64)
    with on_device_of(d_table):
        _feature_gradient_kernel[
            (batch * n_rows, blocks(pitch, block_q), blocks(channels, block_c))
        ](
            d_table,
            d_features,
            weight,
            pitch,
            *weight.stride(),
            C=channels,
            H=hidden,
            BLOCK_H=block(hidden, 32),
            BLOCK_C=block_c,
            BLOCK_Q=block_q,
            **launch.arguments,
        )
    return d_features


def _adjoint(d_points: Tensor, taps: AxisTaps) -> Tensor:
    """The transposed interpolation along dimension 1: [O, count or more, N] -> [O, size, N]."""
    outer, _, inner = d_points.shape
    # What is contiguous in the input is contiguous in the output.
    along = d_points.stride(1) == 1
    shape = (outer, inner, taps.size) if along else (outer, taps.size, inner)
    d_pixels = d_points.new_empty(shape)
    if along:
        d_pixels = d_pixels.transpose(1, 2)
    block_n = block(inner, 16 if along else 256)
    block_x = block(taps.size, 64 if along else 4, least=1)
    with on_device_of(d_points):
        _adjoint_kernel[(blocks(inner, block_n) * outer, blocks(taps.size, block_x))](
            d_points,
            d_pixels,
            taps.index,
            taps.weight,
            taps.reach,
            taps.count,
            taps.size,
            inner,
            taps.widest,
            *d_points.stride(),
            *d_pixels.stride(),
            BLOCK_X=block_x,
            BLOCK_N=block_n,
            **_launch().options,
        )
    return d_pixels


# ------------------------------------------------------------------------------------- kernels


@triton.jit
def _pixels(pointers, mask, BF16: tl.constexpr):
    """Pixels as float32; of bfloat16, the bits are given as int16."""
    value = tl.load(pointers, mask=mask, other=0)
    if BF16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = value.to(tl.float32)
    return value


@triton.jit
def _features(
    image,  # of this sample
    row_index,
    row_weight,
    column_index,
    column_weight,
    row,
    q,
    c,
    n_rows,
    n_columns,
    image_channel,
    image_row,
    image_column,
    C: tl.constexpr,
    BF16: tl.constexpr,
):
    """[BLOCK_C, BLOCK_Q]: channels c of the lookups at one grid row and the columns q.

    As in the reference, a pixel of weight 0 still counts where it is NaN.
    """
    q_mask = q < n_columns
    mask = (c < C)[:, None] & q_mask[None, :]
    x_low = tl.load(column_index + q, mask=q_mask, other=0).to(tl.int64)
    x_high = tl.load(column_index + n_columns + q, mask=q_mask, other=0).to(tl.int64)
    to_low = tl.load(column_weight + q, mask=q_mask, other=0.0)[None, :]
    to_high = tl.load(column_weight + n_columns + q, mask=q_mask, other=0.0)[None, :]
    y_low = tl.load(row_index + row).to(tl.int64)
    y_high = tl.load(row_index + n_rows + row).to(tl.int64)
    from_low = image + y_low * image_row + c.to(tl.int64)[:, None] * image_channel
    from_high = image + y_high * image_row + c.to(tl.int64)[:, None] * image_channel
    left = (x_low * image_column)[None, :]
    right = (x_high * image_column)[None, :]
    low = _pixels(from_low + left, mask, BF16) * to_low
    low += _pixels(from_low + right, mask, BF16) * to_high
    high = _pixels(from_high + left, mask, BF16) * to_low
    high += _pixels(from_high + right, mask, BF16) * to_high
    return low * tl.load(row_weight + row) + high * tl.load(row_weight + n_rows + row)


@triton.jit
def _tabulate_kernel(
    image,  # [B, C, *, *], by its strides
    table,  # [B, n_rows, H, pitch]
    weight,  # [H, C] by its strides, or None: the table is then of features, H = C
    bias,  # [H] or None
    row_index,
    row_weight,
    column_index,
    column_weight,
    n_rows,
    n_columns,
    pitch,
    image_batch,
    image_channel,
    image_row,
    image_column,
    weight_unit,
    weight_channel,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ADD: tl.constexpr,
    BF16: tl.constexpr,
):
    """One program: one grid row of one sample, a block of columns, a block of units."""
    table_row = tl.program_id(0).to(tl.int64)
    row = table_row % n_rows
    image += table_row // n_rows * image_batch
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    if weight is None:
        value = _features(
            image,
            row_index,
            row_weight,
            column_index,
            column_weight,
            row,
            q,
            h,
            n_rows,
            n_columns,
            image_channel,
            image_row,
            image_column,
            C,
            BF16,
        )
    else:
        value = tl.zeros((BLOCK_H, BLOCK_Q), tl.float32)
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            features = _features(
                image,
                row_index,
                row_weight,
                column_index,
                column_weight,
                row,
                q,
                c,
                n_rows,
                n_columns,
                image_channel,
                image_row,
                image_column,
                C,
                BF16,
            )
            w = tl.load(
                weight + h[:, None] * weight_unit + c[None, :] * weight_channel,
                mask=(h < H)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            value = tl.dot(w, features, value, input_precision=DOT_PRECISION)
    if bias is not None:
        value += tl.load(bias + h, mask=h < H, other=0.0)[:, None]
    value = tl.where((q < n_columns)[None, :], value, 0.0)
    mask = (h < H)[:, None] & (q < pitch)[None, :]
    out = table + (table_row * H + h[:, None]) * pitch + q[None, :]
    if ADD:
        value += tl.load(out, mask=mask, other=0.0)
    tl.store(out, value, mask=mask)


@triton.jit
def _weight_gradient_kernel(
    d_table,  # [B, n_rows, H, pitch]
    image,  # [B, C, *, *], by its strides
    partial,  # [B * n_rows, H, C]
    row_index,
    row_weight,
    column_index,
    column_weight,
    n_rows,
    n_columns,
    pitch,
    image_batch,
    image_channel,
    image_row,
    image_column,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BF16: tl.constexpr,
):
    """One program: what one grid row of one sample adds to a block of the weight's gradient."""
    table_row = tl.program_id(0).to(tl.int64)
    row = table_row % n_rows
    image += table_row // n_rows * image_batch
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_weight = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    first = 0
    while first < n_columns:
        q = first + tl.arange(0, BLOCK_Q)
        features = _features(
            image,
            row_index,
            row_weight,
            column_index,
            column_weight,
            row,
            q,
            c,
            n_rows,
            n_columns,
            image_channel,
            image_row,
            image_column,
            C,
            BF16,
        )
        d = tl.load(
            d_table + (table_row * H + h[:, None]) * pitch + q[None, :],
            mask=(h < H)[:, None] & (q < n_columns)[None, :],
            other=0.0,
        )
        d_weight = tl.dot(d, tl.trans(features), d_weight, input_precision=DOT_PRECISION)
        first += BLOCK_Q
    tl.store(
        partial + (table_row * H + h[:, None]) * C + c[None, :],
        d_weight,
        mask=(h < H)[:, None] & (c < C)[None, :],
    )


@triton.jit
def _feature_gradient_kernel(
    d_table,  # [rows, H, pitch]
    d_features,  # [rows, C, pitch]
    weight,  # [H, C], by its strides
    pitch,
    weight_unit,
    weight_channel,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One program: one table row, a block of columns, a block of channels."""
    table_row = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    value = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        w = tl.load(
            weight + h[None, :] * weight_unit + c[:, None] * weight_channel,
            mask=(h < H)[None, :] & (c < C)[:, None],
            other=0.0,
        )
        d = tl.load(
            d_table + (table_row * H + h[:, None]) * pitch + q[None, :],
            mask=(h < H)[:, None] & (q < pitch)[None, :],
            other=0.0,
        )
        value = tl.dot(w, d, value, input_precision=DOT_PRECISION)
    tl.store(
        d_features + (table_row * C + c[:, None]) * pitch + q[None, :],
        value,
        mask=(c < C)[:, None] & (q < pitch)[None, :],
    )


@triton.jit
def _adjoint_kernel(
    d_points,  # [outer, count, inner], by its strides
    d_pixels,  # [outer, size, inner], by its strides
    index,  # [2, count]
    weight,  # [2, count]
    reach,  # [2, size]
    count,
    size,
    inner,
    widest,
    points_outer,
    points_axis,
    points_inner,
    pixels_outer,
    pixels_axis,
    pixels_inner,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_pixels[o, x, n] = sum over the grid points g that touch x of weight * d_points[o, g, n]."""
    inner_blocks = tl.cdiv(inner, BLOCK_N)
    part = tl.program_id(0).to(tl.int64)
    n = part % inner_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    outer = part // inner_blocks
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    source = d_points + outer * points_outer + n[:, None] * points_inner
    first = tl.load(reach + x, mask=x < size, other=0)
    stop = tl.load(reach + size + x, mask=x < size, other=0)
    value = tl.zeros((BLOCK_N, BLOCK_X), tl.float32)
    step = 0
    while step < widest:
        g = first + step
        mask = g < stop
        # Both pixels are the same one where a border pads.
        low = tl.load(weight + g, mask=mask, other=0.0)
        high = tl.load(weight + count + g, mask=mask, other=0.0)
        is_low = tl.load(index + g, mask=mask, other=-1) == x
        is_high = tl.load(index + count + g, mask=mask, other=-1) == x
        w = tl.where(is_low, low, 0.0) + tl.where(is_high, high, 0.0)
        d = tl.load(
            source + g.to(tl.int64)[None, :] * points_axis,
            mask=(n < inner)[:, None] & mask[None, :],
            other=0.0,
        )
        value += w[None, :] * d
        step += 1
    tl.store(
        d_pixels
        + (outer * pixels_outer + n[:, None] * pixels_inner)
        + x.to(tl.int64)[None, :] * pixels_axis,
        value,
        mask=(n < inner)[:, None] & (x < size)[None, :],
    )
