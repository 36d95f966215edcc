# mypy: disallow-untyped-defs=False
"""The kernels of `density_grid` and its loss, for decoders of two layers.

Tables are as in `separable`, contiguous within a sample, their last dimension padded to a pitch, so
that loads are aligned; H hidden units; every volume is [B, slices S, rows R, columns C] by its
strides. FORM is how a unit's activation is computed: by
name, from the sum of the tables' entries, or "factored", from the product of their exponentials.
`plain` tells, for a slice, which of the two the tables are made for; without it (None) it is the
former.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triplane_kernels.triton.elementary import (
    LN_2,
    activate,
    activation_slope,
    exp,
    log2,
    output,
    reciprocal,
    times_output_slope,
)


@triton.jit
def exponentiate_kernel(
    table,  # [B, N, size]
    plain,  # [B, N], by its strides
    n_slices,
    size,
    plain_batch,
    plain_slice,
    BLOCK: tl.constexpr,
):
    """e^table in place, but not in plain slices."""
    part = tl.program_id(0).to(tl.int64)
    if tl.load(plain + part // n_slices * plain_batch + part % n_slices * plain_slice) == 0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        entries = table + part * size + at
        tl.store(entries, exp(tl.load(entries, mask=at < size, other=0.0)), mask=at < size)


@triton.jit
def _table_means(
    table, h, count, pitch, largest, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The mean [BLOCK_H] of units h over a table's slice, and how many are not up to `largest`."""
    total = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
    beyond = tl.zeros((BLOCK_H, BLOCK_N), tl.int32)
    first = 0
    while first < count:
        n = first + tl.arange(0, BLOCK_N)
        mask = (h < H)[:, None] & (n < count)[None, :]
        value = tl.load(table + h[:, None] * pitch + n[None, :], mask=mask, other=0.0)
        total += value
        beyond += tl.where(tl.abs(value) <= largest, 0, 1)  # a NaN is beyond
        first += BLOCK_N
    return tl.sum(total, axis=1) / count, tl.sum(tl.sum(beyond, axis=1), axis=0)


@triton.jit
def _exponentiate_slice(table, size, BLOCK: tl.constexpr):
    first = 0
    while first < size:
        at = first + tl.arange(0, BLOCK)
        entries = tl.load(table + at, mask=at < size, other=0.0)
        tl.store(table + at, exp(entries), mask=at < size)
        first += BLOCK


@triton.jit
def choose_form_kernel(
    rows,  # [B, S, H, R]
    columns,  # [B, S, H, C]
    w2,
    plain,  # [B, S]
    n_rows,
    n_columns,
    rows_pitch,
    columns_pitch,
    largest,
    least_softplus,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: whether a slice is plain; if not, the exponentials of its entries, in place."""
    part = tl.program_id(0).to(tl.int64)
    rows += part * (H * rows_pitch)
    columns += part * (H * columns_pitch)
    beyond = tl.full((), 0, tl.int32)
    strength = tl.full((), 0.0, tl.float32)
    full_strength = tl.full((), 0.0, tl.float32)
    for first in range(0, H, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        a, beyond_a = _table_means(rows, h, n_rows, rows_pitch, largest, H, BLOCK_H, BLOCK_N)
        b, beyond_b = _table_means(
            columns, h, n_columns, columns_pitch, largest, H, BLOCK_H, BLOCK_N
        )
        beyond += beyond_a + beyond_b
        w = tl.load(w2 + h, mask=h < H, other=0.0)
        activation = w * activate(a + b, "softplus")
        strength += tl.sum(activation * activation, axis=0)
        full_strength += tl.sum(w * w, axis=0)
    visible = strength >= least_softplus * least_softplus * full_strength
    factored = (beyond == 0) & visible
    tl.store(plain + part, tl.where(factored, 0, 1))
    if factored:
        _exponentiate_slice(rows, H * rows_pitch, BLOCK_H * BLOCK_N)
        _exponentiate_slice(columns, H * columns_pitch, BLOCK_H * BLOCK_N)


# ------------------------------------------------------------------------------------- forward


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Masked, unless blocks divide the size."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _join(a, b, FORM: tl.constexpr):
    """Entries of two tables as one."""
    return a * b if FORM == "factored" else a + b


@triton.jit
def _unit(a, b, FORM: tl.constexpr):
    """A hidden unit's activation; in the factored form softplus in units of ln 2."""
    return log2(a * b + 1.0) if FORM == "factored" else activate(a + b, FORM)


@triton.jit
def _sum_one_slice(
    rows,  # of the slice
    columns,
    w2,
    r,
    c,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    FORM: tl.constexpr,
):
    """sum_h w2[h] f(x_h) of a tile, from two tables."""
    total = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    for first in range(0, H, UNROLL):
        for step in tl.static_range(UNROLL):
            h = first + step
            a = _load(rows + h * rows_pitch + r, r < rows_pitch, EVEN)
            b = _load(columns + h * columns_pitch + c, c < columns_pitch, EVEN)
            total += tl.load(w2 + h) * _unit(a[:, None], b[None, :], FORM)
    return total


@triton.jit
def _sum_four_slices(
    rows,  # of the sample
    columns,
    third,
    w2,
    slice0,
    slice1,
    slice2,
    slice3,
    r,
    c,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    EVEN: tl.constexpr,
    FORM: tl.constexpr,
):
    """sum_h w2[h] f(x_h) of a tile in four slices, which share what is read of the third table."""
    total0 = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    total1 = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    total2 = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    total3 = tl.zeros((r.shape[0], c.shape[0]), tl.float32)
    of_row = r < rows_pitch
    of_column = c < columns_pitch
    of_tile = of_row[:, None] & of_column[None, :]
    third += r.to(tl.int64)[:, None] * (H * columns_pitch) + c[None, :]
    rows0 = rows + slice0 * (H * rows_pitch) + r
    rows1 = rows + slice1 * (H * rows_pitch) + r
    rows2 = rows + slice2 * (H * rows_pitch) + r
    rows3 = rows + slice3 * (H * rows_pitch) + r
    columns0 = columns + slice0 * (H * columns_pitch) + c
    columns1 = columns + slice1 * (H * columns_pitch) + c
    columns2 = columns + slice2 * (H * columns_pitch) + c
    columns3 = columns + slice3 * (H * columns_pitch) + c
    for h in range(H):
        w = tl.load(w2 + h)
        t = _load(third + h * columns_pitch, of_tile, EVEN)
        a0 = _load(rows0 + h * rows_pitch, of_row, EVEN)[:, None]
        a1 = _load(rows1 + h * rows_pitch, of_row, EVEN)[:, None]
        a2 = _load(rows2 + h * rows_pitch, of_row, EVEN)[:, None]
        a3 = _load(rows3 + h * rows_pitch, of_row, EVEN)[:, None]
        b0 = _load(columns0 + h * columns_pitch, of_column, EVEN)[None, :]
        b1 = _load(columns1 + h * columns_pitch, of_column, EVEN)[None, :]
        b2 = _load(columns2 + h * columns_pitch, of_column, EVEN)[None, :]
        b3 = _load(columns3 + h * columns_pitch, of_column, EVEN)[None, :]
        total0 += w * _unit(a0, _join(b0, t, FORM), FORM)
        total1 += w * _unit(a1, _join(b1, t, FORM), FORM)
        total2 += w * _unit(a2, _join(b2, t, FORM), FORM)
        total3 += w * _unit(a3, _join(b3, t, FORM), FORM)
    return total0, total1, total2, total3


@triton.jit
def raw_slice(
    rows,
    columns,
    w2,
    b2,
    plain,
    plain_batch,
    plain_slice,
    rows_batch,
    columns_batch,
    sample,
    index,
    r,
    c,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The raw density of rows r and columns c in slice `index` of a sample, from two tables."""
    rows += sample * rows_batch + index * (H * rows_pitch)
    columns += sample * columns_batch + index * (H * columns_pitch)
    if plain is None:
        total = _sum_one_slice(
            rows, columns, w2, r, c, rows_pitch, columns_pitch, H, UNROLL, EVEN, HIDDEN
        )
    elif tl.load(plain + sample * plain_batch + index * plain_slice) == 0:
        total = _sum_one_slice(
            rows, columns, w2, r, c, rows_pitch, columns_pitch, H, UNROLL, EVEN, "factored"
        )
        total *= LN_2
    else:
        total = _sum_one_slice(
            rows, columns, w2, r, c, rows_pitch, columns_pitch, H, 1, EVEN, HIDDEN
        )
    return total + tl.load(b2)


@triton.jit
def raw_four_slices(
    rows,
    columns,
    third,
    w2,
    b2,
    plain,
    plain_batch,
    rows_batch,
    columns_batch,
    third_batch,
    sample,
    index,
    n_slices,
    r,
    c,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The raw density of rows r and columns c in four slices from `index` on, from three tables.

    Beyond the last slice it is that of the last.
    """
    rows += sample * rows_batch
    columns += sample * columns_batch
    third += sample * third_batch
    s1 = tl.minimum(index + 1, n_slices - 1)
    s2 = tl.minimum(index + 2, n_slices - 1)
    s3 = tl.minimum(index + 3, n_slices - 1)
    if plain is None:
        t0, t1, t2, t3 = _sum_four_slices(
            rows,
            columns,
            third,
            w2,
            index,
            s1,
            s2,
            s3,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            EVEN,
            HIDDEN,
        )
    elif tl.load(plain + sample * plain_batch) == 0:
        t0, t1, t2, t3 = _sum_four_slices(
            rows,
            columns,
            third,
            w2,
            index,
            s1,
            s2,
            s3,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            EVEN,
            "factored",
        )
        t0 *= LN_2
        t1 *= LN_2
        t2 *= LN_2
        t3 *= LN_2
    else:
        t0, t1, t2, t3 = _sum_four_slices(
            rows,
            columns,
            third,
            w2,
            index,
            s1,
            s2,
            s3,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            EVEN,
            HIDDEN,
        )
    bias = tl.load(b2)
    return t0 + bias, t1 + bias, t2 + bias, t3 + bias


@triton.jit
def place(
    n_slices,
    n_rows,
    n_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Which sample, first slice, rows and columns a forward program has.

    The tiles of one slice are neighbours: they read the same part of the tables.
    """
    program = tl.program_id(0)
    tiles_across = tl.cdiv(n_columns, BLOCK_C)
    tiles = tl.cdiv(n_rows, BLOCK_R) * tiles_across
    groups = tl.cdiv(n_slices, SLICES)
    tile = program % tiles
    group = program // tiles
    sample = (group // groups).to(tl.int64)
    index = (group % groups * SLICES).to(tl.int64)
    r = tile // tiles_across * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile % tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)
    return sample, index, r, c


@triton.jit
def tile_at(volume, sample, index, r, c, volume_batch, volume_slice, volume_row, volume_column):
    """Pointers to a tile of a slice of a volume."""
    volume += sample * volume_batch + index * volume_slice
    return volume + (r.to(tl.int64)[:, None] * volume_row + c.to(tl.int64)[None, :] * volume_column)


@triton.jit
def tile_mask(index, r, c, n_slices, n_rows, n_columns):
    """Which of a tile's voxels are in the volume."""
    rows_of_slice = tl.where(index < n_slices, n_rows, 0)
    return (r < rows_of_slice)[:, None] & (c < n_columns)[None, :]


@triton.jit
def density_kernel(
    rows,
    columns,
    third,  # or None
    w2,
    b2,
    plain,  # or None
    plain_batch,
    plain_slice,
    rows_batch,
    columns_batch,
    third_batch,
    sigma,
    n_slices,
    n_rows,
    n_columns,
    rows_pitch,
    columns_pitch,
    sigma_batch,
    sigma_slice,
    sigma_row,
    sigma_column,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One program: a tile of rows and columns, in one slice or, with a third table, in four."""
    sample, index, r, c = place(n_slices, n_rows, n_columns, BLOCK_R, BLOCK_C, SLICES)
    at = tile_at(sigma, sample, index, r, c, sigma_batch, sigma_slice, sigma_row, sigma_column)
    mask = tile_mask(index, r, c, n_slices, n_rows, n_columns)
    if third is None:
        raw = raw_slice(
            rows,
            columns,
            w2,
            b2,
            plain,
            plain_batch,
            plain_slice,
            rows_batch,
            columns_batch,
            sample,
            index,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            HIDDEN,
            UNROLL,
            EVEN,
        )
        tl.store(at, output(raw, OUTPUT), mask=mask)
    else:
        raw0, raw1, raw2, raw3 = raw_four_slices(
            rows,
            columns,
            third,
            w2,
            b2,
            plain,
            plain_batch,
            rows_batch,
            columns_batch,
            third_batch,
            sample,
            index,
            n_slices,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            HIDDEN,
            EVEN,
        )
        tl.store(at, output(raw0, OUTPUT), mask=mask)
        for step in tl.static_range(1, 4):
            at += sigma_slice
            raw = raw1 if step == 1 else (raw2 if step == 2 else raw3)
            mask = tile_mask(index + step, r, c, n_slices, n_rows, n_columns)
            tl.store(at, output(raw, OUTPUT), mask=mask)


# ---------------------------------------------------------------------------------------- loss


@triton.jit
def _field_tiles(
    rows,
    columns,
    third,
    w2,
    b2,
    plain,
    plain_batch,
    plain_slice,
    rows_batch,
    columns_batch,
    third_batch,
    sample,
    index,
    n_slices,
    r,
    c,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A program's density in four slices, which are the same one if there is no third table."""
    if third is None:
        raw0 = raw_slice(
            rows,
            columns,
            w2,
            b2,
            plain,
            plain_batch,
            plain_slice,
            rows_batch,
            columns_batch,
            sample,
            index,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            HIDDEN,
            UNROLL,
            EVEN,
        )
        sigma0 = output(raw0, OUTPUT)
        sigma1 = sigma0
        sigma2 = sigma0
        sigma3 = sigma0
    else:
        raw0, raw1, raw2, raw3 = raw_four_slices(
            rows,
            columns,
            third,
            w2,
            b2,
            plain,
            plain_batch,
            rows_batch,
            columns_batch,
            third_batch,
            sample,
            index,
            n_slices,
            r,
            c,
            rows_pitch,
            columns_pitch,
            H,
            HIDDEN,
            EVEN,
        )
        sigma0 = output(raw0, OUTPUT)
        sigma1 = output(raw1, OUTPUT)
        sigma2 = output(raw2, OUTPUT)
        sigma3 = output(raw3, OUTPUT)
    return sigma0, sigma1, sigma2, sigma3


@triton.jit
def loss_kernel(
    rows,
    columns,
    third,  # or None
    w2,
    b2,
    plain,  # or None
    plain_batch,
    plain_slice,
    rows_batch,
    columns_batch,
    third_batch,
    their_rows,  # or None, with all else that is theirs: the target is a volume
    their_columns,
    their_third,
    their_w2,
    their_b2,
    their_plain,
    their_plain_batch,
    their_plain_slice,
    their_rows_batch,
    their_columns_batch,
    their_third_batch,
    target,  # or None
    target_batch,
    target_slice,
    target_row,
    target_column,
    scale,  # [B] gradient of one voxel's error; None where `errors` is not
    errors,  # [B, programs of a sample] or None
    d_ours,  # the gradient by our raw density, or None
    d_ours_batch,
    d_ours_slice,
    d_ours_row,
    d_ours_column,
    d_theirs,  # by their raw density or by the volume, or None
    d_theirs_batch,
    d_theirs_slice,
    d_theirs_row,
    d_theirs_column,
    n_slices,
    n_rows,
    n_columns,
    rows_pitch,
    columns_pitch,
    H: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    THEIR_H: tl.constexpr,
    THEIR_HIDDEN: tl.constexpr,
    THEIR_OUTPUT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Compares two densities on a tile: the sum of the errors, or their gradients."""
    sample, index, r, c = place(n_slices, n_rows, n_columns, BLOCK_R, BLOCK_C, SLICES)
    ours0, ours1, ours2, ours3 = _field_tiles(
        rows,
        columns,
        third,
        w2,
        b2,
        plain,
        plain_batch,
        plain_slice,
        rows_batch,
        columns_batch,
        third_batch,
        sample,
        index,
        n_slices,
        r,
        c,
        rows_pitch,
        columns_pitch,
        H,
        HIDDEN,
        OUTPUT,
        UNROLL,
        EVEN,
    )
    if their_rows is not None:
        theirs0, theirs1, theirs2, theirs3 = _field_tiles(
            their_rows,
            their_columns,
            their_third,
            their_w2,
            their_b2,
            their_plain,
            their_plain_batch,
            their_plain_slice,
            their_rows_batch,
            their_columns_batch,
            their_third_batch,
            sample,
            index,
            n_slices,
            r,
            c,
            rows_pitch,
            columns_pitch,
            THEIR_H,
            THEIR_HIDDEN,
            THEIR_OUTPUT,
            UNROLL,
            EVEN,
        )
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in tl.static_range(SLICES):
        slice_index = index + step
        mask = tile_mask(slice_index, r, c, n_slices, n_rows, n_columns)
        ours = (ours0 if step == 0 else ours1) if step < 2 else (ours2 if step == 2 else ours3)
        if their_rows is None:
            at = tile_at(
                target,
                sample,
                slice_index,
                r,
                c,
                target_batch,
                target_slice,
                target_row,
                target_column,
            )
            theirs = tl.load(at, mask=mask, other=0.0)
        elif step < 2:
            theirs = theirs0 if step == 0 else theirs1
        else:
            theirs = theirs2 if step == 2 else theirs3
        difference = ours - theirs
        if errors is not None:
            error = tl.abs(difference) if KIND == "l1" else difference * difference
            total += tl.where(mask, error, 0.0)
        else:
            if KIND == "l1":
                # A NaN is neither, and stays.
                slope = tl.where(
                    difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference)
                )
            else:
                slope = 2.0 * difference
            d = tl.load(scale + sample) * slope
            if d_ours is not None:
                at = tile_at(
                    d_ours,
                    sample,
                    slice_index,
                    r,
                    c,
                    d_ours_batch,
                    d_ours_slice,
                    d_ours_row,
                    d_ours_column,
                )
                tl.store(at, times_output_slope(d, ours, OUTPUT), mask=mask)
            if d_theirs is not None:
                at = tile_at(
                    d_theirs,
                    sample,
                    slice_index,
                    r,
                    c,
                    d_theirs_batch,
                    d_theirs_slice,
                    d_theirs_row,
                    d_theirs_column,
                )
                tl.store(at, times_output_slope(-d, theirs, THEIR_OUTPUT), mask=mask)
    if errors is not None:
        tl.store(errors + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


# ------------------------------------------------------------------------------------ backward


@triton.jit
def _sweep_rows(
    rows,  # [BLOCK_H] pointers to the first row's entries
    b,  # [BLOCK_H, BLOCK_C] the columns' entries
    third,  # [BLOCK_H, BLOCK_C] pointers to the first row's entries, or None
    w,  # [BLOCK_H]
    d_sigma,  # [BLOCK_C] pointers to the first row
    sigma,  # likewise
    d_rows,  # [BLOCK_H] pointers to the first row, or None
    of_unit,
    of_tile,
    of_column,
    n_rows,
    rows_row,
    third_row,
    sigma_row,
    FORM: tl.constexpr,
    OUTPUT: tl.constexpr,
    NEED_W2: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VOLUME: tl.constexpr,
):
    """Sums over all rows, of g f'(x) and of g f(x) where needed; stores those over the columns."""
    d_columns = tl.zeros(b.shape, tl.float32)
    d_w2 = tl.zeros(b.shape, tl.float32)
    row = tl.full((), 0, tl.int64)
    while row < n_rows:
        a = _load(rows + row * rows_row, of_unit, EVEN)[:, None]
        g = _load(d_sigma + row * sigma_row, of_column, EVEN_VOLUME)
        if OUTPUT != "identity":
            value = _load(sigma + row * sigma_row, of_column, EVEN_VOLUME)
            g = times_output_slope(g, value, OUTPUT)
        g = g[None, :]
        if third is None:
            entry = b
        else:
            entry = _join(b, _load(third + row * third_row, of_tile, EVEN), FORM)
        if FORM == "factored":
            u = a * entry
            one_and_u = u + 1.0
            d = g * (u * reciprocal(one_and_u))
            if NEED_W2:
                d_w2 += g * log2(one_and_u)
        else:
            x = a + entry
            d = g * activation_slope(x, FORM)
            if NEED_W2:
                d_w2 += g * activate(x, FORM)
        d_columns += d
        if d_rows is not None:
            tl.store(d_rows + row * rows_row, tl.sum(d, axis=1) * w, mask=of_unit)
        row += 1
    if FORM == "factored":
        d_w2 *= LN_2
    return d_columns, d_w2


@triton.jit
def density_backward_kernel(
    rows,  # [B, S, H, R], by its strides
    columns,  # [B, S, H, C]
    third,  # [B, R, H, C], or None
    w2,
    plain,  # or None
    plain_batch,
    plain_slice,
    d_sigma,
    sigma,  # of d_sigma's strides; None for the output "identity"
    d_rows,  # [blocks of columns, B, S, H, R], of the strides of rows within a sample, or None
    d_columns,  # [B, S, H, C]
    d_w2,  # [B * S * blocks of columns, H], or None
    n_slices,
    n_rows,
    n_columns,
    columns_pitch,
    rows_batch,
    rows_slice,
    rows_unit,
    rows_row,
    columns_batch,
    third_batch,
    sigma_batch,
    sigma_slice,
    sigma_row,
    sigma_column,
    d_rows_block,
    d_rows_batch,
    d_columns_batch,
    H: tl.constexpr,
    FORM: tl.constexpr,
    OUTPUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_VOLUME: tl.constexpr,
):
    """One program: some hidden units and columns of one slice, and all rows one after the other.

    What is summed over rows stays in registers and is stored once; what is summed over columns
    takes a reduction over the lanes for every row. A launch does the slices of one form: the
    registers that the plain form takes would cost the other one its occupancy.
    """
    unit_blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) // unit_blocks
    sample = (part // n_slices).to(tl.int64)
    index = (part % n_slices).to(tl.int64)
    if plain is not None:
        is_plain = tl.load(plain + sample * plain_batch + index * plain_slice) != 0
        if is_plain == (FORM == "factored"):
            return
    h = tl.program_id(0) % unit_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_unit = h < H
    of_column = c < n_columns
    of_tile = of_unit[:, None] & (c < columns_pitch)[None, :]

    rows += sample * rows_batch + index * rows_slice + h * rows_unit
    in_slice = h[:, None] * columns_pitch + c[None, :]
    columns += sample * columns_batch + index * (H * columns_pitch)
    b = _load(columns + in_slice, of_tile, EVEN)
    w = _load(w2 + h, of_unit, EVEN)
    if third is not None:
        third += sample * third_batch + in_slice
    in_volume = sample * sigma_batch + index * sigma_slice + c * sigma_column
    d_sigma += in_volume
    if OUTPUT != "identity":
        sigma += in_volume
    if d_rows is not None:
        d_rows += tl.program_id(1).to(tl.int64) * d_rows_block + sample * d_rows_batch
        d_rows += index * rows_slice + h * rows_unit

    over_rows, of_w2 = _sweep_rows(
        rows,
        b,
        third,
        w,
        d_sigma,
        sigma,
        d_rows,
        of_unit,
        of_tile,
        of_column,
        n_rows,
        rows_row,
        H * columns_pitch,
        sigma_row,
        FORM,
        OUTPUT,
        d_w2 is not None,
        EVEN,
        EVEN_VOLUME,
    )
    d_columns += sample * d_columns_batch + index * (H * columns_pitch)
    tl.store(d_columns + in_slice, over_rows * w[:, None], mask=of_tile)
    if d_w2 is not None:
        d_w2 += (part.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * H
        tl.store(d_w2 + h, tl.sum(of_w2, axis=1), mask=of_unit)
