# mypy: disallow-untyped-defs=False
"""Features and density at arbitrary points: one pass from planes to sigma.

A tile of points gathers the four pixels around each point on every plane (C contiguous channels
each, planes lying channels-last), blends and reduces them, and takes the feature through the
decoder on the matrix units; of what lies between, nothing reaches memory. Planes are read in their
own dtype, everything else is float32.

The fast path of `radiance` is a decoder of two layers or more whose hidden layers are equally
wide, up to 128, with up to 64 rows of features. Its backward is one pass where there are exactly
two layers, the hidden one up to 64 wide, and the feature is no longer than 64. Any other decoder
runs in PyTorch on the features of a bounded number of points at a time.

Backwards recompute. The gradient by the feature is written for a bounded number of points, small
enough to stay in the cache, and carried on to planes and points by a second kernel: with atomic
additions in float32, or, under `torch.use_deterministic_algorithms`, by PyTorch's sorted ones. All
other sums have a fixed order. A NaN coordinate makes the gradients of what it touches NaN; which
pixels of a plane that spoils is arbitrary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triplane_kernels import reference
from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.lookup import Lookup, LookupGradients
from triplane_kernels.triton.elementary import (
    DOT_PRECISION,
    activate,
    activation_slope,
    output,
    times_output_slope,
)
from triplane_kernels.triton.launch import Launch, blocks, on_device_of
from triplane_kernels.triton.tiles import point_tile

PROGRAMS = 512  # that share a decoder's backward: each leaves a partial sum of its gradients

MAX_HIDDEN = 128  # width of the hidden layers on the fast path
MAX_REST = 64  # rows of features on the fast path
MAX_HIDDEN_BACKWARD = 64
MAX_FEATURE_BACKWARD = 64


@torch.no_grad()
def sample_features(planes: Sequence[Tensor], points: Tensor, layout: TriplaneLayout) -> Tensor:
    """The reduced feature of every point, [B, M, C']."""
    return _features(_Lookup.of(planes, points, layout))


@torch.no_grad()
def sample_features_backward(
    d_features: Tensor,
    planes: Sequence[Tensor],
    points: Tensor,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    """Gradients of planes and points."""
    lookup = _Lookup.of(planes, points, layout)
    sums = LookupGradients.zeros(lookup, needs)
    for part in lookup.parts(lookup.width):
        sums.add(lookup.at(part), d_features[:, part].contiguous(), part)
    return Gradients(planes=sums.of_planes(planes), points=sums.points)


@torch.no_grad()
def radiance(field: Field, points: Tensor, layout: TriplaneLayout) -> tuple[Tensor, Tensor]:
    """sigma [B, M], and the last layer's other rows, raw: [B, M, F]."""
    lookup = _Lookup.of(field.planes, points, layout)
    decoder = field.decoder
    sigma = points.new_empty(lookup.batch, lookup.count)
    rest = points.new_empty(lookup.batch, lookup.count, decoder.out_channels - 1)
    if _is_fused(decoder):
        lookup.run(
            _radiance_kernel,
            _radiance_launch(lookup, decoder),
            sigma=sigma,
            rest=rest,
            INNER=len(decoder.weights) - 2,
            **_decoder_arguments(decoder),
        )
        return sigma, rest
    for part in lookup.parts(max(_widths(decoder))):
        with reference.autocast_off(points.device):
            *_, raw = _decode(decoder, _features(lookup.at(part)))[1]
            sigma[:, part] = reference.apply_output(decoder.output, raw[..., 0])
            rest[:, part] = raw[..., 1:]
    return sigma, rest


@torch.no_grad()
def radiance_backward(
    d_sigma: Tensor,
    d_features: Tensor,
    sigma: Tensor,
    field: Field,
    points: Tensor,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    """Gradients of planes, decoder and points."""
    lookup = _Lookup.of(field.planes, points, layout)
    decoder = field.decoder
    fused = _is_fused_backward(decoder)
    decoder_backward = _fused_backward if fused else _unfused_backward
    sums = LookupGradients.zeros(lookup, needs)
    d_parameters = [torch.zeros_like(parameter) for parameter in decoder.parameters]
    for part in lookup.parts(lookup.width if fused else sum(_widths(decoder))):
        d_feature, shares = decoder_backward(
            lookup.at(part),
            decoder,
            d_sigma[:, part].contiguous(),
            d_features[:, part].contiguous(),
            sigma[:, part].contiguous(),
            needs,
        )
        if d_feature is not None:
            sums.add(lookup.at(part), d_feature, part)
        if needs.decoder:
            for total, share in zip(d_parameters, shares, strict=True):
                total += share
    layers = len(decoder.weights)
    return Gradients(
        planes=sums.of_planes(field.planes),
        weights=d_parameters[:layers] if needs.decoder else None,
        biases=d_parameters[layers:] if needs.decoder else None,
        points=sums.points,
    )


# ------------------------------------------------------------------------------------- lookup


class _Lookup(Lookup):
    """A lookup that runs the kernels."""

    together = 16  # keeps the parts' memory aligned: for any other Triton compiles anew

    def run(
        self, kernel: Any, launch: Launch, programs: int | None = None, **arguments: Any
    ) -> None:
        """Runs a kernel: so many programs, or one for every tile of points of every sample."""
        if self.count == 0 or self.batch == 0:
            return
        tiles = blocks(self.count, launch.constants["BP"]) * self.batch
        with on_device_of(self.points):
            kernel[(programs or tiles,)](
                images=tuple((i, i.shape[1], i.shape[2], i.stride(0)) for i in self.images),
                rates=tuple(2 / extent for extent in self.layout.extents),
                points=self.points,
                points_stride=self.points.stride(0) if self.points.shape[0] > 1 else 0,
                count=self.count,
                K=self.width,
                C=self.channels,
                AXES=self.layout.axes,
                REDUCE=self.layout.reduce,
                BORDER=self.layout.padding == "border",
                ALIGN_CORNERS=self.layout.align_corners,
                **arguments,
                **launch.arguments,
            )

    def carry_back(
        self, d_features: Tensor, d_images: tuple[Tensor, ...] | None, d_points: Tensor | None
    ) -> None:
        self.run(
            _features_backward_kernel,
            _launch("features backward", d_features.device, self.width),
            d_features=d_features,
            d_images=d_images,
            d_points=d_points,
        )


def _features(lookup: _Lookup) -> Tensor:
    """[B, M, C']."""
    features = lookup.points.new_empty(lookup.batch, lookup.count, lookup.width)
    launch = _launch("features", features.device, lookup.width)
    lookup.run(_features_kernel, launch, features=features)
    return features


# ------------------------------------------------------------------------------------ decoder


def _is_fused(decoder: DensityMLP) -> bool:
    """Whether `radiance` is one pass."""
    widths = {weight.shape[0] for weight in decoder.weights[:-1]}
    return len(widths) == 1 and max(widths) <= MAX_HIDDEN and decoder.out_channels - 1 <= MAX_REST


def _is_fused_backward(decoder: DensityMLP) -> bool:
    """Whether the decoder's part of `radiance_backward` is one pass."""
    return (
        _is_fused(decoder)
        and len(decoder.weights) == 2
        and decoder.weights[0].shape[0] <= MAX_HIDDEN_BACKWARD
        and decoder.in_channels <= MAX_FEATURE_BACKWARD
    )


def _widths(decoder: DensityMLP) -> list[int]:
    """Of the feature and of every layer."""
    return [decoder.in_channels, *(weight.shape[0] for weight in decoder.weights)]


def _decoder_arguments(decoder: DensityMLP) -> dict[str, Any]:
    """The parameters of the first layer, of those between (stacked, or None), and of the last."""
    hidden, rest = decoder.weights[-1].shape[1], decoder.out_channels - 1

    def parameters(layers: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        first, *inner, last = (layer.contiguous() for layer in layers if layer is not None)
        return first, torch.stack(inner) if inner else None, last

    return {
        "weights": parameters(decoder.weights),
        "biases": parameters(decoder.biases),
        "H": hidden,
        "REST": rest,
        "HIDDEN": decoder.hidden,
        "OUTPUT": decoder.output,
        "BH": _matrix_width(hidden),
        "BR": _matrix_width(rest),
    }


def _fused_backward(
    lookup: _Lookup,
    decoder: DensityMLP,
    d_sigma: Tensor,
    d_rest: Tensor,
    sigma: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient by the features, and those by `decoder.parameters`, as far as needed."""
    launch = _decoder_backward_launch(lookup, decoder)
    programs = min(PROGRAMS, blocks(lookup.count, launch.constants["BP"]) * lookup.batch)
    sizes = [parameter.numel() for parameter in decoder.parameters]
    d_features = partials = None
    if needs.planes or needs.points:
        d_features = sigma.new_empty(*sigma.shape, lookup.width)
    if needs.decoder:
        partials = sigma.new_empty(programs, sum(sizes))
    lookup.run(
        _decoder_backward_kernel,
        launch,
        programs,
        d_sigma=d_sigma,
        d_rest=d_rest,
        sigma=sigma,
        d_features=d_features,
        partials=partials,
        samples=lookup.batch,
        **_decoder_arguments(decoder),
    )
    if partials is None:
        return d_features, []
    shares = partials.sum(dim=0).split(sizes)
    return d_features, [
        share.view(parameter.shape)
        for share, parameter in zip(shares, decoder.parameters, strict=True)
    ]


def _unfused_backward(
    lookup: _Lookup,
    decoder: DensityMLP,
    d_sigma: Tensor,
    d_rest: Tensor,
    sigma: Tensor,
    needs: Needs,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient by the features, and those by `decoder.parameters`."""
    with reference.autocast_off(sigma.device):
        inputs, outputs = _decode(decoder, _features(lookup).flatten(0, 1))
        d_raw = d_sigma.flatten() * reference.output_slope(decoder.output, outputs[-1][:, 0])
        gradient = torch.cat([d_raw[:, None], d_rest.flatten(0, 1)], dim=-1)
        d_weights, d_biases = [], []
        for layer in reversed(range(len(decoder.weights))):
            if layer < len(decoder.weights) - 1:
                gradient = gradient * reference.activation_slope(decoder.hidden, outputs[layer])
            d_weights.append(gradient.T @ inputs[layer])
            d_biases.append(gradient.sum(dim=0))
            gradient = gradient @ decoder.weights[layer]
    return gradient.unflatten(0, sigma.shape), [*reversed(d_weights), *reversed(d_biases)]


def _decode(decoder: DensityMLP, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into every layer of the decoder, and what comes out before its activation."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for weight, bias in zip(decoder.weights, decoder.biases, strict=True):
        inputs.append(reference.activate(decoder.hidden, outputs[-1]) if outputs else features)
        outputs.append(F.linear(inputs[-1], weight, bias))
    return inputs, outputs


# ------------------------------------------------------------------------------------ launches


def _launch(kernel: str, device: torch.device, width: int) -> Launch:
    """Of a kernel of `tiles`, for features of a width."""
    tile = point_tile(device, kernel)
    columns = min(tile.columns, _matrix_width(width))
    return Launch({"BP": tile.points, "BK": columns}, num_warps=tile.warps)


def _radiance_launch(lookup: _Lookup, decoder: DensityMLP) -> Launch:
    large = lookup.width > 64 or len(decoder.weights) > 2
    kernel = "radiance"
    if decoder.weights[0].shape[0] > 64:
        kernel = "radiance wide large" if large else "radiance wide"
    elif large:
        kernel = "radiance large"
    return _launch(kernel, lookup.points.device, lookup.width)


def _decoder_backward_launch(lookup: _Lookup, decoder: DensityMLP) -> Launch:
    """A tile holds the whole feature."""
    large = _matrix_width(lookup.width) > 32 or decoder.out_channels - 1 > 32
    kernel = "decoder backward large" if large else "decoder backward"
    return _launch(kernel, lookup.points.device, lookup.width)


def _matrix_width(width: int) -> int:
    """A tile's width for `tl.dot`: a power of two, and 16 at least."""
    return max(16, triton.next_power_of_2(width))


# -------------------------------------------------------------------------- kernels: the lookup


@triton.jit
def _tap(u, size, BORDER: tl.constexpr, ALIGN_CORNERS: tl.constexpr):
    """Where points [BP] lie along one image axis, as `reference.Taps` defines it.

    Returns the lower of two pixels, the weight of the upper one, and its derivative by u.
    """
    if ALIGN_CORNERS:
        scale = (size - 1) * 0.5
        pixel = (u + 1.0) * scale
    else:
        scale = size * 0.5
        pixel = ((u + 1.0) * size - 1.0) * 0.5
    if BORDER:
        moves = (pixel >= 0.0) & (pixel <= size - 1.0)
        pixel = tl.where(pixel < 0.0, 0.0, tl.where(pixel > size - 1.0, size - 1.0, pixel))
    else:
        moves = pixel == pixel
    low = tl.floor(pixel)
    index = tl.where(low == low, low, 0.0).to(tl.int32)
    return index, pixel - low, tl.where(moves, scale, 0.0)


@triton.jit
def _pixel(image, tile, row, column, channels, counts, C: tl.constexpr):
    """Offsets [BP, BK] of some channels of one pixel a point, and a mask: are they there?"""
    _, height, width, _ = image
    _, exists, _ = tile
    inside = exists & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (row * width + column).to(tl.int64) * C
    return offset[:, None] + channels[None, :], inside[:, None] & counts[None, :]


@triton.jit
def _corners(image, tile, row, column, channels, counts, C: tl.constexpr):
    """The values [BP, BK] at the corners 00, 01, 10, 11 (row first); 0 outside the image."""
    plane, _, _, stride = image
    plane += tile[0].to(tl.int64) * stride
    at_00, mask_00 = _pixel(image, tile, row, column, channels, counts, C)
    at_01, mask_01 = _pixel(image, tile, row, column + 1, channels, counts, C)
    at_10, mask_10 = _pixel(image, tile, row + 1, column, channels, counts, C)
    at_11, mask_11 = _pixel(image, tile, row + 1, column + 1, channels, counts, C)
    return (
        tl.load(plane + at_00, mask=mask_00, other=0.0).to(tl.float32),
        tl.load(plane + at_01, mask=mask_01, other=0.0).to(tl.float32),
        tl.load(plane + at_10, mask=mask_10, other=0.0).to(tl.float32),
        tl.load(plane + at_11, mask=mask_11, other=0.0).to(tl.float32),
    )


@triton.jit
def _value(
    image,
    tile,
    a: tl.constexpr,
    b: tl.constexpr,
    channels,
    counts,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """The bilinear lookup [BP, BK] of some channels on one plane; a runs along its width."""
    column, right, _ = _tap(tile[2][a], image[2], BORDER, ALIGN_CORNERS)
    row, below, _ = _tap(tile[2][b], image[1], BORDER, ALIGN_CORNERS)
    v00, v01, v10, v11 = _corners(image, tile, row, column, channels, counts, C)
    left = 1.0 - right
    above = 1.0 - below
    value = v00 * (above * left)[:, None]
    value += v01 * (above * right)[:, None]
    value += v10 * (below * left)[:, None]
    value += v11 * (below * right)[:, None]
    return value


@triton.jit
def _value_slope(
    image,
    tile,
    a: tl.constexpr,
    b: tl.constexpr,
    channels,
    counts,
    d_value,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """The gradients [BP] by u along width and height of the lookup, given that by its value."""
    column, right, rate_right = _tap(tile[2][a], image[2], BORDER, ALIGN_CORNERS)
    row, below, rate_below = _tap(tile[2][b], image[1], BORDER, ALIGN_CORNERS)
    v00, v01, v10, v11 = _corners(image, tile, row, column, channels, counts, C)
    d00 = tl.sum(v00 * d_value, axis=1)
    d01 = tl.sum(v01 * d_value, axis=1)
    d10 = tl.sum(v10 * d_value, axis=1)
    d11 = tl.sum(v11 * d_value, axis=1)
    d_right = (1.0 - below) * (d01 - d00) + below * (d11 - d10)
    d_below = (1.0 - right) * (d10 - d00) + right * (d11 - d01)
    # Where a coordinate cannot move its weight, its gradient is 0 even if the value is NaN.
    d_a = tl.where(rate_right == 0.0, 0.0, d_right * rate_right)
    d_b = tl.where(rate_below == 0.0, 0.0, d_below * rate_below)
    return d_a, d_b


@triton.jit
def _scatter(
    image,
    d_plane,
    tile,
    a: tl.constexpr,
    b: tl.constexpr,
    channels,
    counts,
    d_value,
    C: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Adds the gradient of the lookup's value [BP, BK] to that of the plane."""
    column, right, _ = _tap(tile[2][a], image[2], BORDER, ALIGN_CORNERS)
    row, below, _ = _tap(tile[2][b], image[1], BORDER, ALIGN_CORNERS)
    d_plane += tile[0].to(tl.int64) * image[1] * image[2] * C
    for corner in tl.static_range(4):
        weight_x = right if corner % 2 == 1 else 1.0 - right
        weight_y = below if corner // 2 == 1 else 1.0 - below
        offsets, mask = _pixel(
            image, tile, row + corner // 2, column + corner % 2, channels, counts, C
        )
        tl.atomic_add(
            d_plane + offsets,
            (weight_y * weight_x)[:, None] * d_value,
            mask=mask,
            sem="relaxed",
        )


@triton.jit
def _plane_channels(columns, n, C: tl.constexpr, REDUCE: tl.constexpr):
    """Which channel of plane n each of the feature's columns takes, and whether it has it."""
    channels = columns
    if REDUCE == "concat":
        channels -= n * C
    return channels, (channels >= 0) & (channels < C)


@triton.constexpr_function
def _takes_from(first_column, columns, n, channels, reduce):
    """Whether any of the feature's columns from the first on takes anything from plane n."""
    if reduce != "concat":
        return True
    return n * channels < first_column + columns and first_column < (n + 1) * channels


@triton.jit
def _feature(
    images,
    tile,
    FIRST: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    AXES: tl.constexpr,
    REDUCE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    OMIT: tl.constexpr = -1,
):
    """Columns FIRST to FIRST + BK of the reduced feature, [BP, BK], without plane OMIT."""
    columns = FIRST + tl.arange(0, BK)
    if REDUCE == "product":
        feature = tl.full((tile[1].shape[0], BK), 1.0, tl.float32)
    else:
        feature = tl.zeros((tile[1].shape[0], BK), tl.float32)
    for n in tl.static_range(len(AXES)):
        if n != OMIT and _takes_from(FIRST, BK, n, C, REDUCE):
            channels, counts = _plane_channels(columns, n, C, REDUCE)
            value = _value(
                images[n],
                tile,
                AXES[n][0],
                AXES[n][1],
                channels,
                counts,
                C,
                BORDER,
                ALIGN_CORNERS,
            )
            if REDUCE == "product":
                feature *= value
            elif REDUCE == "concat":
                feature = tl.where(counts[None, :], value, feature)
            else:
                feature += value
    return feature


@triton.jit
def _within_4(u):
    """Beyond 4 nothing of an image is near. Infinities become finite; a NaN stays one."""
    return tl.where(u < -4.0, -4.0, tl.where(u > 4.0, 4.0, u))


@triton.jit
def _tile(points, stride, rates, sample, point, exists):
    """A tile of points of one sample: (sample, which of them exist [BP], u along x, y, z [BP])."""
    row = points + sample.to(tl.int64) * stride + point.to(tl.int64) * 3
    u_x = _within_4(tl.load(row, mask=exists, other=0.0) * rates[0])
    u_y = _within_4(tl.load(row + 1, mask=exists, other=0.0) * rates[1])
    u_z = _within_4(tl.load(row + 2, mask=exists, other=0.0) * rates[2])
    return sample, exists, (u_x, u_y, u_z)


@triton.jit
def _place(count, BP: tl.constexpr):
    """A program's sample, and its points [BP]. A grid's second dimension ends at 65535."""
    tiles = tl.cdiv(count, BP)
    program = tl.program_id(0)
    return program // tiles, (program % tiles) * BP + tl.arange(0, BP)


@triton.jit
def _features_kernel(
    images,
    rates,
    points,
    points_stride,
    features,
    count,
    K: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    AXES: tl.constexpr,
    REDUCE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """features [B, count, K]. Program (sample, tile of BP points)."""
    sample, point = _place(count, BP)
    exists = point < count
    tile = _tile(points, points_stride, rates, sample, point, exists)
    row = (sample.to(tl.int64) * count + point) * K
    for first in tl.static_range(0, K, BK):
        feature = _feature(
            images,
            tile,
            first,
            BK,
            C,
            AXES,
            REDUCE,
            BORDER,
            ALIGN_CORNERS,
        )
        columns = first + tl.arange(0, BK)
        mask = exists[:, None] & (columns < K)[None, :]
        tl.store(features + row[:, None] + columns[None, :], feature, mask=mask)


@triton.jit
def _features_backward_kernel(
    images,
    rates,
    points,
    points_stride,
    d_features,
    d_images,
    d_points,
    count,
    K: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    AXES: tl.constexpr,
    REDUCE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Adds to d_images, each [B, H, W, C]; writes d_points [B, count, 3]; either may be None.

    d_features [B, count, K]. Program (sample, tile of BP points).
    """
    sample, point = _place(count, BP)
    exists = point < count
    tile = _tile(points, points_stride, rates, sample, point, exists)
    row = sample.to(tl.int64) * count + point
    d_x = tl.zeros((BP,), tl.float32)
    d_y = tl.zeros((BP,), tl.float32)
    d_z = tl.zeros((BP,), tl.float32)
    for first in tl.static_range(0, K, BK):
        columns = first + tl.arange(0, BK)
        mask = exists[:, None] & (columns < K)[None, :]
        d_feature = tl.load(d_features + row[:, None] * K + columns[None, :], mask=mask, other=0.0)
        for n in tl.static_range(len(AXES)):
            if _takes_from(first, BK, n, C, REDUCE):
                channels, counts = _plane_channels(columns, n, C, REDUCE)
                d_value = d_feature
                if REDUCE == "product":
                    d_value *= _feature(
                        images,
                        tile,
                        first,
                        BK,
                        C,
                        AXES,
                        REDUCE,
                        BORDER,
                        ALIGN_CORNERS,
                        n,
                    )
                if d_images is not None:
                    _scatter(
                        images[n],
                        d_images[n],
                        tile,
                        AXES[n][0],
                        AXES[n][1],
                        channels,
                        counts,
                        d_value,
                        C,
                        BORDER,
                        ALIGN_CORNERS,
                    )
                if d_points is not None:
                    d_a, d_b = _value_slope(
                        images[n],
                        tile,
                        AXES[n][0],
                        AXES[n][1],
                        channels,
                        counts,
                        d_value,
                        C,
                        BORDER,
                        ALIGN_CORNERS,
                    )
                    if AXES[n][0] == 0:
                        d_x += d_a
                    elif AXES[n][0] == 1:
                        d_y += d_a
                    else:
                        d_z += d_a
                    if AXES[n][1] == 0:
                        d_x += d_b
                    elif AXES[n][1] == 1:
                        d_y += d_b
                    else:
                        d_z += d_b
    if d_points is not None:
        tl.store(d_points + row * 3, d_x * rates[0], mask=exists)
        tl.store(d_points + row * 3 + 1, d_y * rates[1], mask=exists)
        tl.store(d_points + row * 3 + 2, d_z * rates[2], mask=exists)


# ------------------------------------------------------------------------- kernels: the decoder


@triton.jit
def _matrix(weight, row, rows, column, columns):
    """A tile of a matrix [rows, columns]; 0 outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(weight + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _radiance_kernel(
    images,
    rates,
    points,
    points_stride,
    weights,
    biases,
    sigma,
    rest,
    count,
    K: tl.constexpr,
    H: tl.constexpr,
    REST: tl.constexpr,
    INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    AXES: tl.constexpr,
    REDUCE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """sigma [B, count] and rest [B, count, REST] of a decoder K -> H -> ... -> H -> 1 + REST.

    weights and biases are those of the first layer, of the INNER layers between, and of the last.
    Program (sample, tile of BP points).
    """
    sample, point = _place(count, BP)
    exists = point < count
    tile = _tile(points, points_stride, rates, sample, point, exists)
    unit = tl.arange(0, BH)
    real = unit < H

    value = tl.zeros((BP, BH), tl.float32)
    for first in tl.static_range(0, K, BK):
        feature = _feature(
            images,
            tile,
            first,
            BK,
            C,
            AXES,
            REDUCE,
            BORDER,
            ALIGN_CORNERS,
        )
        weight = _matrix(weights[0], unit, H, first + tl.arange(0, BK), K)
        value = tl.dot(feature, tl.trans(weight), value, input_precision=DOT_PRECISION)
    value += tl.load(biases[0] + unit, mask=real, other=0.0)[None, :]
    if INNER > 0:
        for layer in range(INNER):
            square = _matrix(weights[1] + layer * H * H, unit, H, unit, H)
            value = tl.dot(activate(value, HIDDEN), tl.trans(square), input_precision=DOT_PRECISION)
            value += tl.load(biases[1] + layer * H + unit, mask=real, other=0.0)[None, :]
    value = activate(value, HIDDEN)

    row = sample.to(tl.int64) * count + point
    density_weight = tl.load(weights[2] + unit, mask=real, other=0.0)
    raw = tl.sum(value * density_weight[None, :], axis=1) + tl.load(biases[2])
    tl.store(sigma + row, output(raw, OUTPUT), mask=exists)
    if REST > 0:
        out = tl.arange(0, BR)
        weight = _matrix(weights[2] + H, out, REST, unit, H)
        value = tl.dot(value, tl.trans(weight), input_precision=DOT_PRECISION)
        value += tl.load(biases[2] + 1 + out, mask=out < REST, other=0.0)[None, :]
        mask = exists[:, None] & (out < REST)[None, :]
        tl.store(rest + row[:, None] * REST + out[None, :], value, mask=mask)


@triton.jit
def _decoder_backward_kernel(
    images,
    rates,
    points,
    points_stride,
    weights,
    biases,
    d_sigma,
    d_rest,
    sigma,
    d_features,
    partials,
    count,
    samples,
    K: tl.constexpr,
    H: tl.constexpr,
    REST: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUTPUT: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    AXES: tl.constexpr,
    REDUCE: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Backward of a decoder K -> H -> 1 + REST.

    Writes d_features [B, count, K] and partials [programs, parameters]; either may be None. A
    program takes every so manyeth tile of points, and leaves its share of the gradients of both
    weights, then of both biases, in its row of the partials.
    """
    unit = tl.arange(0, BH)
    real = unit < H
    column = tl.arange(0, BK)
    out = tl.arange(0, BR)
    d_weight_1 = tl.zeros((BH, BK), tl.float32)
    d_bias_1 = tl.zeros((BH,), tl.float32)
    d_density_weight = tl.zeros((BH,), tl.float32)
    d_density_bias = tl.zeros((BP,), tl.float32)
    d_rest_weight = tl.zeros((BR, BH), tl.float32)
    d_rest_bias = tl.zeros((BR,), tl.float32)

    tiles = tl.cdiv(count, BP)
    number = tl.program_id(0)
    while number < tiles * samples:
        sample = number // tiles
        point = (number % tiles) * BP + tl.arange(0, BP)
        exists = point < count
        tile = _tile(points, points_stride, rates, sample, point, exists)
        row = sample.to(tl.int64) * count + point
        feature = _feature(
            images,
            tile,
            0,
            BK,
            C,
            AXES,
            REDUCE,
            BORDER,
            ALIGN_CORNERS,
        )
        weight = _matrix(weights[0], unit, H, column, K)
        before = tl.dot(feature, tl.trans(weight), input_precision=DOT_PRECISION)
        before += tl.load(biases[0] + unit, mask=real, other=0.0)[None, :]

        d_raw = times_output_slope(
            tl.load(d_sigma + row, mask=exists, other=0.0),
            tl.load(sigma + row, mask=exists, other=0.0),
            OUTPUT,
        )
        density_weight = tl.load(weights[2] + unit, mask=real, other=0.0)
        d_hidden = d_raw[:, None] * density_weight[None, :]
        if REST > 0:
            mask = exists[:, None] & (out < REST)[None, :]
            d_row = tl.load(d_rest + row[:, None] * REST + out[None, :], mask=mask, other=0.0)
            rest_weight = _matrix(weights[2] + H, out, REST, unit, H)
            d_hidden = tl.dot(d_row, rest_weight, d_hidden, input_precision=DOT_PRECISION)
        if partials is not None:
            hidden = activate(before, HIDDEN)
            d_density_weight += tl.sum(d_raw[:, None] * hidden, axis=0)
            d_density_bias += d_raw
            if REST > 0:
                d_rest_weight = tl.dot(
                    tl.trans(d_row), hidden, d_rest_weight, input_precision=DOT_PRECISION
                )
                d_rest_bias += tl.sum(d_row, axis=0)
        d_before = d_hidden * activation_slope(before, HIDDEN)
        if partials is not None:
            d_bias_1 += tl.sum(d_before, axis=0)
            d_weight_1 = tl.dot(
                tl.trans(d_before), feature, d_weight_1, input_precision=DOT_PRECISION
            )
        if d_features is not None:
            d_feature = tl.dot(d_before, weight, input_precision=DOT_PRECISION)
            mask = exists[:, None] & (column < K)[None, :]
            tl.store(d_features + row[:, None] * K + column[None, :], d_feature, mask=mask)
        number += tl.num_programs(0)

    if partials is not None:
        part = partials + tl.program_id(0) * (H * K + (1 + REST) * H + H + 1 + REST)
        mask = real[:, None] & (column < K)[None, :]
        tl.store(part + unit[:, None] * K + column[None, :], d_weight_1, mask=mask)
        part += H * K
        tl.store(part + unit, d_density_weight, mask=real)
        if REST > 0:
            mask = (out < REST)[:, None] & real[None, :]
            at = part + H + out[:, None] * H + unit[None, :]
            tl.store(at, d_rest_weight, mask=mask)
        part += (1 + REST) * H
        tl.store(part + unit, d_bias_1, mask=real)
        tl.store(part + H, tl.sum(d_density_bias, axis=0))
        if REST > 0:
            tl.store(part + H + 1 + out, d_rest_bias, mask=out < REST)
