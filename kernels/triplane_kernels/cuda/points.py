"""Features and density at arbitrary points: the kernels of csrc/cuda/points.cu.

Planes are read where they lie if they lie channels-last, and are copied if not. The gradient by the
features is written for a bounded number of points, small enough to stay in the level-2 cache, and
carried on to planes and points by a second kernel: with atomic additions, or, under
`torch.use_deterministic_algorithms`, by PyTorch's sorted ones. All other sums have a fixed order,
which does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.cuda import launch
from triplane_kernels.cuda.launch import NUMBERS, address, empty
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.lookup import Lookup, LookupGradients

# What the kernels take: kernels.h.
MOST_PLANES = 6
MOST_WIDTH = 96
MOST_UNITS = 64
MOST_REST = 64


def why_not_points(
    decoder: DensityMLP | None, layout: TriplaneLayout, all_rows: bool = True
) -> str:
    """Why points of a layout, and of a decoder if there is one, cannot be computed; or empty.

    Without `all_rows` only the last layer's first row, the density, is asked for.
    """
    planes = len(layout.axes)
    if planes > MOST_PLANES:
        return f"layouts of more than {MOST_PLANES} planes have no CUDA point kernel"
    if decoder is None:
        return ""
    width, rest = decoder.in_channels, decoder.out_channels - 1 if all_rows else 0
    if layout.reduce.startswith("concat"):
        blocks = -(-width // planes // 16)  # of 16 channels, to which each plane's are padded
        width = planes * 16 * blocks
    if len(decoder.weights) != 2 or width > MOST_WIDTH or decoder.weights[0].shape[0] > MOST_UNITS:
        return (
            f"decoders of other than two layers, or wider than {MOST_WIDTH} -> {MOST_UNITS}, "
            "have no CUDA point kernel"
        )
    if rest > MOST_REST:
        return f"decoders of more than {MOST_REST} features have no CUDA point kernel"
    return ""


# ---------------------------------------------------------------------------------- operations


@torch.no_grad()
def sample_features(planes: Sequence[Tensor], points: Tensor, layout: TriplaneLayout) -> Tensor:
    """See `Backend.sample_features`."""
    lookup = _Lookup.of(planes, points, layout)
    features = empty(points, lookup.batch, lookup.count, lookup.width)
    launch.extension.sample_features(
        field=lookup.described(), features=address(features), **launch.queue(points)
    )
    return features


@torch.no_grad()
def sample_features_backward(
    d_features: Tensor,
    planes: Sequence[Tensor],
    points: Tensor,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    """See `Backend.sample_features_backward`."""
    lookup = _Lookup.of(planes, points, layout)
    sums = LookupGradients.zeros(lookup, needs)
    for part in lookup.parts(lookup.width):
        sums.add(lookup.at(part), d_features[:, part].contiguous(), part)
    return Gradients(planes=sums.of_planes(planes), points=sums.points)


@torch.no_grad()
def radiance(field: Field, points: Tensor, layout: TriplaneLayout) -> tuple[Tensor, Tensor]:
    """See `Backend.radiance`."""
    lookup, decoder = _Lookup.of(field.planes, points, layout), _Decoder.of(field.decoder)
    sigma = empty(points, lookup.batch, lookup.count)
    rest = empty(points, lookup.batch, lookup.count, field.decoder.out_channels - 1)
    launch.extension.radiance(
        field=lookup.described(),
        decoder=decoder.described(),
        sigma=address(sigma),
        rest=address(rest),
        **launch.queue(points),
    )
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
    """See `Backend.radiance_backward`."""
    lookup, decoder = _Lookup.of(field.planes, points, layout), _Decoder.of(field.decoder)
    sums = LookupGradients.zeros(lookup, needs)
    d_parameters = [torch.zeros_like(parameter) for parameter in decoder.parameters]
    for part in lookup.parts(lookup.width):
        piece = lookup.at(part)
        described = piece.described()
        blocks = launch.extension.radiance_partials(described)
        d_feature = partials = None
        if needs.planes or needs.points:
            d_feature = empty(points, piece.batch, piece.count, piece.width)
        if needs.decoder:
            partials = empty(points, blocks, decoder.numel)
        given = [each[:, part].contiguous() for each in (d_sigma, d_features, sigma)]
        launch.extension.radiance_backward(
            field=described,
            decoder=decoder.described(),
            d_sigma=address(given[0]),
            d_rest=address(given[1]),
            sigma=address(given[2]),
            d_features=address(d_feature),
            blocks=blocks,
            partials=address(partials),
            **launch.queue(points),
        )
        if d_feature is not None:
            sums.add(piece, d_feature, part)
        if partials is not None:
            shares = partials.sum(dim=0).split([each.numel() for each in d_parameters])
            for total, share in zip(d_parameters, shares, strict=True):
                total += share.view_as(total)
    return Gradients(
        planes=sums.of_planes(field.planes),
        weights=d_parameters[:2] if needs.decoder else None,
        biases=d_parameters[2:] if needs.decoder else None,
        points=sums.points,
    )


# -------------------------------------------------------------------------------------- lookup


class _Lookup(Lookup):
    """A lookup as the extension takes it."""

    together = 32  # what is a warp's at a time

    def described(self) -> Any:
        """The extension's PointField. It holds addresses: keep the lookup until it is used."""
        layout = self.layout
        rates = [2 / extent for extent in layout.extents]
        return launch.extension.PointField(
            batch=self.batch,
            channels=self.channels,
            planes=[
                launch.extension.PointPlane(
                    data=address(image),
                    batch_stride=image.stride(0) if self.batch > 1 else 0,
                    height=image.shape[1],
                    width=image.shape[2],
                    axis_across=a,
                    axis_down=b,
                    rate_across=rates[a],
                    rate_down=rates[b],
                )
                for image, (a, b) in zip(self.images, layout.axes, strict=True)
            ],
            number=NUMBERS[self.images[0].dtype],
            combine=layout.reduce,
            border=layout.padding == "border",
            align_corners=layout.align_corners,
            count=self.count,
            points=address(self.points),
            points_stride=self.points.stride(0) if self.points.shape[0] > 1 else 0,
        )

    def carry_back(
        self, d_features: Tensor, d_images: tuple[Tensor, ...] | None, d_points: Tensor | None
    ) -> None:
        launch.extension.sample_features_backward(
            field=self.described(),
            d_features=address(d_features),
            d_planes=[address(image) for image in d_images or ()],
            d_points=address(d_points),
            **launch.queue(d_features),
        )


# ------------------------------------------------------------------------------------- decoder


@dataclass(frozen=True)
class _Decoder:
    """A decoder of two layers, contiguous."""

    mlp: DensityMLP
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, decoder: DensityMLP) -> _Decoder:
        if len(decoder.weights) != 2:
            raise ValueError(f"A decoder of two layers, got {len(decoder.weights)}.")
        weights = tuple(weight.contiguous() for weight in decoder.weights)
        biases = tuple(bias.contiguous() for bias in decoder.biases if bias is not None)
        return cls(decoder, weights, biases)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """In the order in which the kernels have their gradients."""
        return *self.weights, *self.biases

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def described(self) -> Any:
        """The extension's Decoder, of addresses."""
        units, width = self.weights[0].shape
        return launch.extension.Decoder(
            width=width,
            units=units,
            rest=self.mlp.out_channels - 1,
            w1=address(self.weights[0]),
            b1=address(self.biases[0]),
            w2=address(self.weights[1]),
            b2=address(self.biases[1]),
            hidden=self.mlp.hidden,
            output=self.mlp.output,
        )
