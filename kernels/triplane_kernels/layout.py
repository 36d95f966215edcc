"""How a model lays its feature planes out in space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, cast, get_args

Reduce = Literal["mean", "sum", "product", "concat", "concat_channel_major"]
Padding = Literal["zeros", "border"]


def three_floats(value: float | Sequence[float], name: str) -> tuple[float, float, float]:
    """One number for all three axes, or one for each."""
    values = (value,) * 3 if isinstance(value, Real) else tuple(cast(Sequence[float], value))
    if len(values) != 3 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be a finite number or three of them, got {value!r}.")
    x, y, z = (float(v) for v in values)
    return x, y, z


@dataclass(frozen=True)
class TriplaneLayout:
    """Where each plane lies, and how what is looked up on the planes becomes one feature.

    axes           for each plane (a, b): point coordinate a runs along the image's width,
                   coordinate b along its height; 0, 1, 2 are x, y, z. One plane or more.
    extent         side of the box in world units, one number or one for each axis. The box is
                   centred at the origin: u = 2 x / extent is in [-1, 1] inside.
    reduce         of P looked-up vectors of C channels: "mean", "sum" and "product" give C;
                   "concat" gives P * C with index p * C + c; "concat_channel_major" the same
                   numbers with index c * P + p.
    padding        "zeros": pixels outside the image count as zero; "border": as the nearest pixel.
    align_corners  False: u = -1 and 1 are the outer edges of the outer pixels; True: their centres.

    The lookup is that of `torch.nn.functional.grid_sample`, bilinear, with the same options.
    """

    axes: tuple[tuple[int, int], ...]
    extent: float | tuple[float, float, float]
    reduce: Reduce = "mean"
    padding: Padding = "zeros"
    align_corners: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple((a, b) for a, b in self.axes))
        if not self.axes:
            raise ValueError("A layout needs at least one plane, got none.")
        for pair in self.axes:
            if not set(pair) <= {0, 1, 2} or pair[0] == pair[1]:
                raise ValueError(f"A plane's axes must be two different of 0, 1, 2, got {pair}.")
        if min(three_floats(self.extent, "extent")) <= 0:
            raise ValueError(f"extent must be positive, got {self.extent!r}.")
        if not isinstance(self.extent, Real):
            object.__setattr__(self, "extent", three_floats(self.extent, "extent"))
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"reduce must be one of {get_args(Reduce)}, got {self.reduce!r}.")
        if self.padding not in get_args(Padding):
            raise ValueError(f"padding must be one of {get_args(Padding)}, got {self.padding!r}.")

    @property
    def extents(self) -> tuple[float, float, float]:
        """The box's sides along x, y, z."""
        extent = self.extent
        return extent if isinstance(extent, tuple) else (extent, extent, extent)

    def feature_channels(self, channels: int) -> int:
        """Length of the feature vector made from planes of `channels` channels each."""
        return channels * len(self.axes) if self.reduce.startswith("concat") else channels


# Each preset is what the named project's released weights expect.

EG3D = TriplaneLayout(axes=((0, 1), (0, 2), (2, 0)), extent=1.0)
"""EG3D (arXiv:2112.07945) as released: the third plane is (z, x), so (y, z) is missing
(NVlabs/eg3d issue 67). Side 1 for FFHQ and AFHQ; the ShapeNet model has 1.6."""

EG3D_CORRECTED = TriplaneLayout(axes=((0, 1), (1, 2), (2, 0)), extent=1.0)
"""EG3D with the plane that the paper describes; for models trained with the corrected axes."""

TRIPOSR = TriplaneLayout(axes=((0, 1), (0, 2), (1, 2)), extent=1.74, reduce="concat")
"""TripoSR (stabilityai/TripoSR, config.yaml): radius 0.87."""

OPENLRM = TriplaneLayout(axes=((0, 1), (0, 2), (2, 1)), extent=2.0, reduce="concat")
"""OpenLRM; InstantMesh shares it (its meshes use extent 2.1)."""

SSDNERF = TriplaneLayout(
    axes=((0, 1), (0, 2), (1, 2)), extent=2.0, reduce="concat_channel_major", padding="border"
)
"""SSDNeRF."""

CRM = TriplaneLayout(
    axes=((0, 1), (1, 2), (2, 0)), extent=1.9, reduce="sum", padding="border", align_corners=True
)
"""CRM: features are summed (fea_concat: false); the decoder's row 0 is a signed distance."""

NERFSTUDIO = TriplaneLayout(
    axes=((0, 1), (0, 2), (1, 2)), extent=2.0, reduce="product", align_corners=True
)
"""nerfstudio's TriplaneEncoding with its product reduction (dataclasses.replace for sum)."""
