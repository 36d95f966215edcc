"""Where a volume is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from triplane_kernels.layout import three_floats

Crop = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Grid:
    """An axis-aligned regular grid: `shape` points from `lo` to `hi`, ends included.

    lo, hi in world units, shape in points, each for x, y, z. An axis of one point sits at lo.
    Volumes on a grid are indexed [x, y, z].
    """

    lo: tuple[float, float, float]
    hi: tuple[float, float, float]
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lo", three_floats(self.lo, "lo"))
        object.__setattr__(self, "hi", three_floats(self.hi, "hi"))
        object.__setattr__(self, "shape", tuple(index(n) for n in self.shape))
        if len(self.shape) != 3 or not all(n >= 1 for n in self.shape):
            raise ValueError(f"shape must be three positive integers, got {self.shape}.")
        if any(lo > hi for lo, hi in zip(self.lo, self.hi, strict=True)):
            raise ValueError(f"lo must not exceed hi on any axis, got {self.lo} and {self.hi}.")

    @classmethod
    def cube(cls, n: int, extent: float | Sequence[float]) -> Grid:
        """n points a side from -extent / 2 to extent / 2 (one extent, or one for each axis)."""
        return cls.slab(n, extent, crop=((0, 0), (0, 0), (0, 0)))

    @classmethod
    def slab(cls, n: int, extent: float | Sequence[float], crop: Crop) -> Grid:
        """The part of `cube(n, extent)` that is left when faces are cut off.

        crop ((x_lo, x_hi), (y_lo, y_hi), (z_lo, z_hi)): fractions; floor(fraction * n) points go
        from each face, so what is left are points of the full cube.
        """
        fractions = tuple(tuple(pair) for pair in crop)
        if len(fractions) != 3 or any(len(pair) != 2 for pair in fractions):
            raise ValueError(f"crop must be a pair of fractions for each of 3 axes, got {crop!r}.")
        if not all(0 <= fraction < 1 for pair in fractions for fraction in pair):
            raise ValueError(f"crop must hold fractions in [0, 1), got {crop!r}.")
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}.")
        lo, hi, shape = [], [], []
        for side, pair in zip(three_floats(extent, "extent"), fractions, strict=True):
            # 1e-9: a product such as 0.29 * 100 that falls short of its integer still counts.
            first, cut_above = (math.floor(fraction * n + 1e-9) for fraction in pair)
            last = n - 1 - cut_above
            if last < first:
                raise ValueError(f"crop {crop!r} leaves no points of {n} along an axis.")
            voxel = side / max(n - 1, 1)
            lo.append(-side / 2 + first * voxel)
            hi.append(side / 2 - cut_above * voxel)
            shape.append(last - first + 1)
        return cls((lo[0], lo[1], lo[2]), (hi[0], hi[1], hi[2]), (shape[0], shape[1], shape[2]))

    @property
    def numel(self) -> int:
        """How many points the grid has."""
        return math.prod(self.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbours along x, y, z; 0 along an axis of one point."""
        x, y, z = (
            (hi - lo) / (n - 1) if n > 1 else 0.0
            for lo, hi, n in zip(self.lo, self.hi, self.shape, strict=True)
        )
        return x, y, z

    def coordinates(
        self,
        axis: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """[shape[axis]] coordinates along one axis, computed in float64 and then cast."""
        # On the CPU first: some devices have no float64.
        exact = torch.linspace(
            self.lo[axis], self.hi[axis], self.shape[axis], dtype=torch.float64, device="cpu"
        )
        return exact.to(dtype).to(device or torch.get_default_device())

    def points(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """[X, Y, Z, 3] all points; z varies fastest in memory."""
        axes = [self.coordinates(axis, dtype, device) for axis in range(3)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def eg3d_lattice(n: int, extent: float, device: torch.device | str | None = None) -> Tensor:
    """[n, n, n, 3] float32: the points that EG3D's sampling script evaluates for an n^3 "cube".

    These are not a regular grid. The script finds a sample's y and x index by division without
    rounding down, so y drifts by up to a voxel along z, and x by up to a voxel along y and z; and
    because it divides in float32, single points land anywhere along an axis once n^3 exceeds
    2^24. Volumes made by that script, and reward models trained on them, carry this shear, and
    need this function to be reproduced. For everything else `Grid` is right. A sheared lattice is
    no product of three axes, so it goes through `density`, not `density_grid`.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}.")
    sample = torch.arange(n**3, device=device)
    running = sample.float()
    steps = torch.stack([(running / n / n) % n, (running / n) % n, (sample % n).float()], dim=-1)
    return (steps * (extent / (n - 1)) - extent / 2).reshape(n, n, n, 3)
