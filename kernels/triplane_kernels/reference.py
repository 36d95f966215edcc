"""Every operation in plain PyTorch: the definition that the other backends are held to.

Runs in any dtype on any device. Half-precision inputs are read as they are and computed with in
float32; a float64 input makes the whole computation and its result float64; autocast has no say.
All of it is built from operations that can be differentiated twice. Memory stays bounded: points
and voxels are processed in chunks, and under grad a chunk is recomputed in the backward.

`triplane_kernels.ops` describes the arguments and checks them; nothing here does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triplane_kernels.decoder import DensityMLP, Hidden, Output
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout

Planes = Tensor | Sequence[Tensor]
Target = Tensor | tuple[Planes, DensityMLP]
Layer = tuple[Tensor, Tensor | None]

POINTS_PER_CHUNK = 2**18
GRID_ELEMENTS_PER_CHUNK = 2**22  # voxels times the widest layer: 16 MiB in float32


# ------------------------------------------------------------------------------------- points


def sample_features(planes: Planes, points: Tensor, layout: TriplaneLayout) -> Tensor:
    """The reduced feature of every point, [B, M, C']."""
    dtype = compute_dtype(planes, None, points)
    with autocast_off(points.device):
        images = _images(planes, dtype)
        points = points.to(dtype).expand(_batch(planes), -1, -1)
        (features,) = _in_chunks(lambda part: (_reduced(images, part, layout),), points)
    return features


def density(planes: Planes, decoder: DensityMLP, points: Tensor, layout: TriplaneLayout) -> Tensor:
    """The density of every point, [B, M]."""
    dtype = compute_dtype(planes, decoder, points)
    with autocast_off(points.device):
        images = _images(planes, dtype)
        points = points.to(dtype).expand(_batch(planes), -1, -1)
        layers = _density_layers(decoder, dtype)

        def evaluate(part: Tensor) -> tuple[Tensor]:
            return (_density(decoder, layers, _reduced(images, part, layout)),)

        (sigma,) = _in_chunks(evaluate, points)
    return sigma


def radiance(
    planes: Planes, decoder: DensityMLP, points: Tensor, layout: TriplaneLayout
) -> tuple[Tensor, Tensor]:
    """The density [B, M] and the decoder's other outputs [B, M, F] of every point."""
    dtype = compute_dtype(planes, decoder, points)
    with autocast_off(points.device):
        images = _images(planes, dtype)
        points = points.to(dtype).expand(_batch(planes), -1, -1)
        layers = _layers(decoder, dtype)

        def evaluate(part: Tensor) -> tuple[Tensor, Tensor]:
            raw = _mlp(decoder.hidden, layers, _reduced(images, part, layout))
            return apply_output(decoder.output, raw[..., 0] + decoder.bias_shift), raw[..., 1:]

        sigma, features = _in_chunks(evaluate, points)
    return sigma, features


def density_gradient(
    planes: Planes, decoder: DensityMLP, points: Tensor, layout: TriplaneLayout
) -> tuple[Tensor, Tensor]:
    """The density [B, M] and its derivative by position [B, M, 3] of every point.

    The chain rule is written out, so that it needs no autograd (it works under `no_grad`) and can
    itself be differentiated. On a pixel's edge, where the density has a kink, it is the
    derivative towards larger pixel coordinates. A point whose density is NaN has a NaN gradient.
    """
    dtype = compute_dtype(planes, decoder, points)
    with autocast_off(points.device):
        images = _images(planes, dtype)
        points = points.to(dtype).expand(_batch(planes), -1, -1)
        layers = _density_layers(decoder, dtype)

        def evaluate(part: Tensor) -> tuple[Tensor, Tensor]:
            lookups = [
                Lookup.at(part, image, axes, layout)
                for image, axes in zip(images, layout.axes, strict=True)
            ]
            values = [lookup.value() for lookup in lookups]
            sigma, d_feature = _density_and_gradient(decoder, layers, _reduce(values, layout))
            d_point = [torch.zeros_like(sigma) for _ in range(3)]
            d_values = reduce_backward(d_feature, values, layout)
            for lookup, (a, b), d_value in zip(lookups, layout.axes, d_values, strict=True):
                d_a, d_b = lookup.gradient(d_value)
                d_point[a] = d_point[a] + d_a
                d_point[b] = d_point[b] + d_b
            gradient = torch.stack(d_point, dim=-1)
            return sigma, gradient.masked_fill(sigma.isnan()[..., None], torch.nan)

        sigma, gradient = _in_chunks(evaluate, points)
    return sigma, gradient


# -------------------------------------------------------------------------------------- grids


def density_grid(planes: Planes, decoder: DensityMLP, grid: Grid, layout: TriplaneLayout) -> Tensor:
    """The density on a regular grid, [B, X, Y, Z], in the separable form.

    On an axis-aligned grid a lookup on a plane with axes (x, y) depends on the x and y index
    only, and its weights are a product of a weight along each axis. So every plane is resampled
    to a table, along one image axis after the other; the first layer, being linear, is applied
    to the tables (for every reduction but the product); and a voxel is left with the sum of a few
    table entries, an activation and the layers after it.
    """
    dtype = compute_dtype(planes, decoder)
    with autocast_off(decoder.weights[0].device):
        volume = _SeparableDensity.tabulate(planes, decoder, grid, layout, dtype)
        slabs = volume.slabs(volume.slab_thickness())
        evaluate = _recomputed(volume.evaluate, unless=len(slabs) == 1)
        return torch.cat([evaluate(*slab) for slab in slabs], dim=1)


def density_grid_by_points(
    planes: Planes, decoder: DensityMLP, grid: Grid, layout: TriplaneLayout
) -> Tensor:
    """What `density_grid` must equal: `density` at every point of the grid."""
    dtype = compute_dtype(planes, decoder)
    points = grid.points(dtype, decoder.weights[0].device).reshape(1, -1, 3)
    return density(planes, decoder, points, layout).unflatten(1, grid.shape)


def density_grid_loss(
    planes: Planes,
    decoder: DensityMLP,
    grid: Grid,
    layout: TriplaneLayout,
    target: Target,
    kind: Literal["l1", "l2"] = "l1",
) -> Tensor:
    """The mean absolute or squared difference of two volumes, [B].

    Slab by slab; of the volumes given by planes, neither is ever held whole.
    """
    if isinstance(target, Tensor):
        dtype = torch.promote_types(compute_dtype(planes, decoder), target.dtype)
    else:
        dtype = torch.promote_types(compute_dtype(planes, decoder), compute_dtype(*target))

    with autocast_off(decoder.weights[0].device):
        ours = _SeparableDensity.tabulate(planes, decoder, grid, layout, dtype)
        thickness = ours.slab_thickness()
        if isinstance(target, Tensor):
            theirs = None
            their_slabs = [(0, part) for part in target.to(dtype).split(thickness, dim=1)]
        else:
            theirs = _SeparableDensity.tabulate(*target, grid, layout, dtype)
            thickness = min(thickness, theirs.slab_thickness())
            their_slabs = theirs.slabs(thickness)
        our_slabs = ours.slabs(thickness)

        def summed_error(our_slab: Slab, their_slab: Slab) -> Tensor:
            other = their_slab[1] if theirs is None else theirs.evaluate(*their_slab)
            difference = ours.evaluate(*our_slab) - other
            error = difference.abs() if kind == "l1" else difference.square()
            return error.sum(dim=(1, 2, 3))

        error = _recomputed(summed_error, unless=len(our_slabs) == 1)
        errors = [error(*pair) for pair in zip(our_slabs, their_slabs, strict=True)]
        return reduce(add, errors) / grid.numel


Slab = tuple[Any, ...]  # thickness along x, then one part of every table


@dataclass(frozen=True)
class _SeparableDensity:
    """A density on a grid, as tables whose broadcast sum or product is a voxel's vector.

    Each table is [B, X or 1, Y or 1, Z or 1, K]. Their sum is the first layer's output; their
    product, for the product reduction, is the feature, and `first` is still to be applied to it.
    """

    tables: list[Tensor]
    first: Layer | None
    rest: list[Layer]
    decoder: DensityMLP
    shape: tuple[int, int, int]

    @classmethod
    def tabulate(
        cls,
        planes: Planes,
        decoder: DensityMLP,
        grid: Grid,
        layout: TriplaneLayout,
        dtype: torch.dtype,
    ) -> _SeparableDensity:
        first, *rest = _density_layers(decoder, dtype)
        weight, bias = first
        tables: dict[int, Tensor] = {}  # by the axis that they do not depend on
        for number, (plane, axes) in enumerate(zip(_plane_list(planes), layout.axes, strict=True)):
            table = _resample(plane.to(dtype), axes, grid, layout)
            missing = 3 - sum(axes)
            if layout.reduce == "product":
                tables[missing] = tables[missing] * table if missing in tables else table
            else:
                table = F.linear(table, _plane_columns(weight, number, layout))
                tables[missing] = tables[missing] + table if missing in tables else table
        broadcast = [table.unsqueeze(1 + missing) for missing, table in tables.items()]
        if layout.reduce == "product":
            return cls(broadcast, first, rest, decoder, grid.shape)
        if bias is not None:
            broadcast[0] = broadcast[0] + bias
        return cls(broadcast, None, rest, decoder, grid.shape)

    def evaluate(self, thickness: int, *tables: Tensor) -> Tensor:
        """The density in one slab, [B, thickness, Y, Z]."""
        if self.first is None:
            value = reduce(add, tables)
        else:
            value = F.linear(reduce(mul, tables), *self.first)
        for layer in self.rest:
            value = F.linear(activate(self.decoder.hidden, value), *layer)
        sigma = apply_output(self.decoder.output, value[..., 0] + self.decoder.bias_shift)
        return sigma.expand(-1, thickness, *self.shape[1:])

    def slab_thickness(self) -> int:
        """How many x planes to evaluate at once."""
        batch, *_, channels = self.tables[0].shape
        widest = max(channels, *(weight.shape[0] for weight, _ in self.rest), 1)
        elements = batch * self.shape[1] * self.shape[2] * widest
        return max(1, GRID_ELEMENTS_PER_CHUNK // max(1, elements))

    def slabs(self, thickness: int) -> list[Slab]:
        """Arguments of `evaluate` for every slab, cut by `split`, whose backward is one `cat`."""
        count = -(-self.shape[0] // thickness)
        thicknesses = [min(thickness, self.shape[0] - i * thickness) for i in range(count)]
        parts = [
            table.split(thickness, dim=1) if table.shape[1] == self.shape[0] else [table] * count
            for table in self.tables
        ]
        return list(zip(thicknesses, *parts, strict=True))


def _resample(plane: Tensor, axes: tuple[int, int], grid: Grid, layout: TriplaneLayout) -> Tensor:
    """A plane [B, C, H, W] looked up at the grid's coordinates: a table [B, N_p, N_q, C], p < q."""
    a, b = axes
    table = plane.permute(3, 2, 0, 1)  # [W, H, B, C]
    table = _resample_rows(table, a, grid, layout).transpose(0, 1)
    table = _resample_rows(table, b, grid, layout)  # [N_b, N_a, B, C]
    return table.permute(2, 0, 1, 3) if b < a else table.permute(2, 1, 0, 3)


def _resample_rows(rows: Tensor, axis: int, grid: Grid, layout: TriplaneLayout) -> Tensor:
    """Linear interpolation along the first dimension, at the grid's coordinates on `axis`.

    Positions and weights are worked out in float64 whatever the dtype: there are few of them.
    """
    coordinates = grid.coordinates(axis, torch.float64, "cpu")
    taps = Taps.at(coordinates, layout.extents[axis], rows.shape[0], layout)
    low, high = (
        rows.index_select(0, index.to(rows.device)) * weight.to(rows)[:, None, None, None]
        for index, weight in zip(taps.index, taps.weight, strict=True)
    )
    return low + high


def _plane_columns(weight: Tensor, plane: int, layout: TriplaneLayout) -> Tensor:
    """The part of the first layer's weight that acts on one plane's lookup."""
    count = len(layout.axes)
    if layout.reduce == "mean":
        return weight / count
    if layout.reduce == "concat":
        return weight.chunk(count, dim=1)[plane]
    if layout.reduce == "concat_channel_major":
        return weight[:, plane::count]
    return weight


# ------------------------------------------------------------------------------------- lookup


@dataclass(frozen=True)
class Taps:
    """Linear interpolation along one image axis: two pixels, and the weight of each.

    `inside` is 1 where a pixel counts and 0 where it does not; `rate` is the derivative of the
    pixel coordinate by the world coordinate.
    """

    index: tuple[Tensor, Tensor]
    weight: tuple[Tensor, Tensor]
    inside: tuple[Tensor, Tensor]
    rate: Tensor

    @classmethod
    def at(cls, coordinate: Tensor, extent: float, size: int, layout: TriplaneLayout) -> Taps:
        # Nothing beyond u = 4 can touch the image, and clamping there makes infinities harmless.
        # A NaN passes the clamps, and reaches the result by way of the weights.
        u = (coordinate * (2 / extent)).clamp(-4, 4)
        if layout.align_corners:
            pixel, scale = (u + 1) * ((size - 1) / 2), (size - 1) / extent
        else:
            pixel, scale = ((u + 1) * size - 1) / 2, size / extent
        rate = torch.full_like(pixel, scale)
        if layout.padding == "border":
            rate = rate * ((pixel >= 0) & (pixel <= size - 1))
            pixel = pixel.clamp(0, size - 1)
        floor = pixel.detach().floor()
        fraction = pixel - floor
        # Clamped after the conversion: what an integer makes of a NaN is anyone's guess.
        low = floor.long()
        high = low + 1
        if layout.padding == "border":
            low_inside = high_inside = torch.ones_like(floor)
        else:
            low_inside, high_inside = (((i >= 0) & (i < size)).to(floor.dtype) for i in (low, high))
        return cls(
            index=(low.clamp(0, size - 1), high.clamp(0, size - 1)),
            weight=((1 - fraction) * low_inside, fraction * high_inside),
            inside=(low_inside, high_inside),
            rate=rate,
        )

    @property
    def slope(self) -> tuple[Tensor, Tensor]:
        """The derivative of each weight by the world coordinate."""
        return -self.rate * self.inside[0], self.rate * self.inside[1]


@dataclass(frozen=True)
class Image:
    """A plane as rows of channels, [B * H * W, C]: what a lookup reads is contiguous."""

    rows: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Lookup:
    """A bilinear lookup of points on one plane: taps along the width (a) and the height (b)."""

    image: Image
    a: Taps
    b: Taps

    @classmethod
    def at(
        cls, points: Tensor, image: Image, axes: tuple[int, int], layout: TriplaneLayout
    ) -> Lookup:
        extent_a, extent_b = (layout.extents[axis] for axis in axes)
        return cls(
            image,
            Taps.at(points[..., axes[0]], extent_a, image.width, layout),
            Taps.at(points[..., axes[1]], extent_b, image.height, layout),
        )

    @property
    def pixels(self) -> Tensor:
        """Rows of the image at the corners (00, 01, 10, 11; height first), [B * M, 4]."""
        batch = self.a.rate.shape[0]
        first_row = torch.arange(batch, device=self.a.rate.device)[:, None] * self.image.height
        rows = [(first_row + index) * self.image.width for index in self.b.index]
        return torch.stack([row + a for row in rows for a in self.a.index], dim=-1).flatten(0, 1)

    def value(self) -> Tensor:
        """[B, M, C]."""
        weights = torch.stack([b * a for b in self.b.weight for a in self.a.weight], dim=-1)
        values = _WeightedRows.apply(self.image.rows, self.pixels, weights.flatten(0, 1))
        return values.unflatten(0, self.a.rate.shape)

    def gradient(self, d_value: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative by each of the two coordinates, [B, M] each, given that by the value."""
        d_corners = _row_products(self.image.rows, self.pixels, d_value.flatten(0, 1))
        corners = d_corners.unflatten(0, self.a.rate.shape).unbind(-1)
        d_a = d_b = torch.zeros_like(self.a.rate)
        for (b, a), d_weight in zip(((0, 0), (0, 1), (1, 0), (1, 1)), corners, strict=True):
            d_a = d_a + d_weight * self.a.slope[a] * self.b.weight[b]
            d_b = d_b + d_weight * self.a.weight[a] * self.b.slope[b]
        return d_a, d_b


class _WeightedRows(torch.autograd.Function):
    """sum_t weights[n, t] * rows[index[n, t]]: [R, C], [N, T], [N, T] -> [N, C].

    `embedding_bag` gathers and sums in one pass, where separate operations would write every
    corner of every point to memory. Its own derivative cannot be differentiated again; this one
    is made of operations that can.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index, weights)
        return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows, index, weights = ctx.saved_tensors
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows = torch.zeros_like(rows)
            for corner, weight in zip(index.unbind(1), weights.unbind(1), strict=True):
                d_rows = d_rows.index_add(0, corner, weight[:, None] * d_out)
        if ctx.needs_input_grad[2]:
            d_weights = _row_products(rows, index, d_out)
        return d_rows, None, d_weights


def _row_products(rows: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Dot products rows[index[n, t]] . values[n]: [R, C], [N, T], [N, C] -> [N, T]."""
    products = [(rows.index_select(0, corner) * values).sum(dim=-1) for corner in index.unbind(1)]
    return torch.stack(products, dim=-1)


def _reduced(images: list[Image], points: Tensor, layout: TriplaneLayout) -> Tensor:
    """The feature of every point, [B, M, C']."""
    values = [
        Lookup.at(points, image, axes, layout).value()
        for image, axes in zip(images, layout.axes, strict=True)
    ]
    return _reduce(values, layout)


def _reduce(values: list[Tensor], layout: TriplaneLayout) -> Tensor:
    """One feature of the lookups on every plane."""
    if layout.reduce == "concat":
        return torch.cat(values, dim=-1)
    if layout.reduce == "concat_channel_major":
        return torch.stack(values, dim=-1).flatten(-2)
    if layout.reduce == "product":
        return reduce(mul, values)
    total = reduce(add, values)
    return total / len(values) if layout.reduce == "mean" else total


def reduce_backward(
    d_feature: Tensor, values: list[Tensor], layout: TriplaneLayout
) -> list[Tensor]:
    """The derivative by each plane's lookup, given that by the feature."""
    count = len(values)
    if layout.reduce == "concat":
        return list(d_feature.chunk(count, dim=-1))
    if layout.reduce == "concat_channel_major":
        return [d_feature[..., plane::count] for plane in range(count)]
    if layout.reduce == "product":
        others = ([v for p, v in enumerate(values) if p != plane] for plane in range(count))
        return [reduce(mul, factors, d_feature) for factors in others]
    return [d_feature / count if layout.reduce == "mean" else d_feature] * count


def add_in_fixed_order(
    d_images: Sequence[Tensor],
    d_features: Tensor,
    images: Sequence[Tensor],
    points: Tensor,
    layout: TriplaneLayout,
) -> None:
    """Adds the planes' gradients, given that by the features, to `d_images`.

    Images and their gradients are [B, H, W, C]. PyTorch has sums that are the same at every run
    under `torch.use_deterministic_algorithms`.
    """
    lookups = [
        Lookup.at(
            points.expand(image.shape[0], -1, -1),
            Image(image.flatten(0, 2).float(), image.shape[1], image.shape[2]),
            axes,
            layout,
        )
        for image, axes in zip(images, layout.axes, strict=True)
    ]
    values = [d_features] * len(lookups)  # only a product's derivative looks at them
    if layout.reduce == "product":
        values = [lookup.value() for lookup in lookups]
    d_values = reduce_backward(d_features, values, layout)
    for lookup, d_value, d_image in zip(lookups, d_values, d_images, strict=True):
        rows = d_image.view(-1, d_image.shape[-1])
        weights = [b * a for b in lookup.b.weight for a in lookup.a.weight]
        for pixel, weight in zip(lookup.pixels.unbind(1), weights, strict=True):
            rows.index_add_(0, pixel, (weight[..., None] * d_value).flatten(0, 1))


# ------------------------------------------------------------------------------------ decoder


def _layers(decoder: DensityMLP, dtype: torch.dtype) -> list[Layer]:
    return [
        (weight.to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(decoder.weights, decoder.biases, strict=True)
    ]


def _density_layers(decoder: DensityMLP, dtype: torch.dtype) -> list[Layer]:
    """The layers with only the first row of the last, which is all that density needs."""
    *hidden, (weight, bias) = _layers(decoder, dtype)
    return [*hidden, (weight[:1], None if bias is None else bias[:1])]


def _mlp(hidden: Hidden, layers: list[Layer], features: Tensor) -> Tensor:
    value = F.linear(features, *layers[0])
    for layer in layers[1:]:
        value = F.linear(activate(hidden, value), *layer)
    return value


def _density(decoder: DensityMLP, layers: list[Layer], features: Tensor) -> Tensor:
    raw = _mlp(decoder.hidden, layers, features)[..., 0]
    return apply_output(decoder.output, raw + decoder.bias_shift)


def _density_and_gradient(
    decoder: DensityMLP, layers: list[Layer], features: Tensor
) -> tuple[Tensor, Tensor]:
    """The density [B, M], and its derivative by the feature [B, M, C']."""
    before = []  # the values that go into the activations
    value = F.linear(features, *layers[0])
    for layer in layers[1:]:
        before.append(value)
        value = F.linear(activate(decoder.hidden, value), *layer)
    raw = value[..., 0] + decoder.bias_shift
    gradient = output_slope(decoder.output, raw)[..., None] @ layers[-1][0]
    for (weight, _), value in zip(reversed(layers[:-1]), reversed(before), strict=True):
        gradient = (gradient * activation_slope(decoder.hidden, value)) @ weight
    return apply_output(decoder.output, raw), gradient


def _softplus(x: Tensor) -> Tensor:
    # torch's own threshold of 20 is off by 2e-9 there, which float64 sees; 40 is exact in both.
    return F.softplus(x, threshold=40)


def activate(hidden: Hidden, x: Tensor) -> Tensor:
    if hidden == "softplus":
        return _softplus(x)
    return torch.relu(x) if hidden == "relu" else F.silu(x)


def activation_slope(hidden: Hidden, x: Tensor) -> Tensor:
    if hidden == "softplus":
        return torch.sigmoid(x)
    if hidden == "relu":
        return (x > 0).to(x.dtype)
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def apply_output(output: Output, raw: Tensor) -> Tensor:
    if output == "softplus":
        return _softplus(raw)
    return torch.exp(raw) if output == "exp" else raw


def output_slope(output: Output, raw: Tensor) -> Tensor:
    if output == "softplus":
        return torch.sigmoid(raw)
    return torch.exp(raw) if output == "exp" else torch.ones_like(raw)


# ------------------------------------------------------------------------- dtypes and memory


def compute_dtype(
    planes: Planes, decoder: DensityMLP | None = None, points: Tensor | None = None
) -> torch.dtype:
    """What is computed in and returned: the inputs' promoted type, and at least float32."""
    tensors = [*_plane_list(planes)]
    if decoder is not None:
        tensors += decoder.parameters
    if points is not None:
        tensors.append(points)
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _plane_list(planes: Planes) -> Sequence[Tensor]:
    """One [B, C, H, W] a plane."""
    return planes.unbind(1) if isinstance(planes, Tensor) else planes


def _batch(planes: Planes) -> int:
    return planes.shape[0] if isinstance(planes, Tensor) else planes[0].shape[0]


def _images(planes: Planes, dtype: torch.dtype) -> list[Image]:
    return [
        Image(
            rows=plane.to(dtype).permute(0, 2, 3, 1).reshape(-1, plane.shape[1]),
            height=plane.shape[2],
            width=plane.shape[3],
        )
        for plane in _plane_list(planes)
    ]


def _in_chunks(
    function: Callable[[Tensor], tuple[Tensor, ...]], points: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function to a part of the points at a time, and join what it returns."""
    parts = points.split(max(1, POINTS_PER_CHUNK // max(1, points.shape[0])), dim=1)
    function = _recomputed(function, unless=len(parts) == 1)
    results = [function(part) for part in parts]
    return tuple(torch.cat(result, dim=1) for result in zip(*results, strict=True))


def _recomputed(function: Callable[..., Any], unless: bool) -> Callable[..., Any]:
    """The function, keeping nothing for the backward but its arguments."""
    if unless or not torch.is_grad_enabled():
        return function

    def recompute(*arguments: Any) -> Any:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    return recompute


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would make the numbers depend on where a call stands."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
