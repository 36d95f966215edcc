"""Points on channels-last planes, as the GPU backends look them up, part by part.

The gradient by the features is written for a bounded number of points, small enough to stay in the
cache, and carried on to planes and points by the backend's own kernel: with atomic additions in
float32, or, under `torch.use_deterministic_algorithms`, by PyTorch's sorted ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from triplane_kernels import reference
from triplane_kernels.backend import Needs
from triplane_kernels.layout import TriplaneLayout

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

CHUNK_BYTES = 2**25  # of one intermediate: what fits in the level-2 cache of an A100


@dataclass(frozen=True)
class Lookup:
    """Points, and the planes to look them up on, as the kernels take them.

    images  one [B, H, W, C] a plane; within a sample contiguous.
    points  [B, M, 3] or [1, M, 3]; within a sample contiguous.
    """

    images: tuple[Tensor, ...]
    points: Tensor
    layout: TriplaneLayout

    together: ClassVar[int]  # a part's number of points is a multiple

    @classmethod
    def of(cls, planes: Sequence[Tensor], points: Tensor, layout: TriplaneLayout) -> Self:
        """Planes that lie channels-last already are not copied."""
        return cls(tuple(_channels_last(plane) for plane in planes), points.contiguous(), layout)

    @property
    def batch(self) -> int:
        return self.images[0].shape[0]

    @property
    def count(self) -> int:
        """Points a sample."""
        return self.points.shape[1]

    @property
    def channels(self) -> int:
        """Of a plane."""
        return self.images[0].shape[-1]

    @property
    def width(self) -> int:
        """Length of the reduced feature."""
        return self.layout.feature_channels(self.channels)

    def at(self, part: slice) -> Self:
        """The lookup of a part of the points."""
        return replace(self, points=self.points[:, part])

    def parts(self, width: int) -> Iterator[slice]:
        """Parts of the points, such that `width` numbers for each point of one fit CHUNK_BYTES."""
        step = CHUNK_BYTES // (4 * self.together * width * max(1, self.batch))
        step = max(1, step) * self.together
        return (slice(i, min(i + step, self.count)) for i in range(0, self.count, step))

    def carry_back(
        self, d_features: Tensor, d_images: tuple[Tensor, ...] | None, d_points: Tensor | None
    ) -> None:
        """Adds to d_images, like `images`; writes d_points [B, M, 3]. d_features [B, M, C']."""
        raise NotImplementedError


def _channels_last(plane: Tensor) -> Tensor:
    """A plane [B, C, H, W] as [B, H, W, C], every sample contiguous."""
    image = plane.permute(0, 2, 3, 1)
    return image if image[:1].is_contiguous() else image.contiguous()


@dataclass(frozen=True)
class LookupGradients:
    """Gradients of planes and points, summed up part by part.

    images  one float32 [B, H, W, C] a plane, or None.
    points  of the points' own shape, or None.
    """

    images: tuple[Tensor, ...] | None
    points: Tensor | None

    @classmethod
    def zeros(cls, lookup: Lookup, needs: Needs) -> LookupGradients:
        images = points = None
        if needs.planes:
            device = lookup.points.device
            images = tuple(torch.zeros(image.shape, device=device) for image in lookup.images)
        if needs.points:
            points = torch.zeros_like(lookup.points)
        return cls(images, points)

    def add(self, lookup: Lookup, d_features: Tensor, part: slice) -> None:
        """Takes in the part of the points that `lookup` holds; d_features [B, M', C']."""
        d_images, d_points = self.images, None
        if d_images is not None and torch.are_deterministic_algorithms_enabled():
            reference.add_in_fixed_order(
                d_images, d_features, lookup.images, lookup.points, lookup.layout
            )
            d_images = None
        if self.points is not None:
            d_points = self.points.new_empty(lookup.batch, lookup.count, 3)
        if d_images is not None or d_points is not None:
            lookup.carry_back(d_features, d_images, d_points)
        if self.points is not None and d_points is not None:
            self.points[:, part] = d_points.sum_to_size(lookup.points.shape)

    def of_planes(self, planes: Sequence[Tensor]) -> list[Tensor] | None:
        """In the planes' shape and dtype."""
        if self.images is None:
            return None
        return [
            plane.new_empty(plane.shape).copy_(image.permute(0, 3, 1, 2))
            for plane, image in zip(planes, self.images, strict=True)
        ]
