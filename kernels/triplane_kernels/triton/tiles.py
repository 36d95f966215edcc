"""How much a program of each kernel takes at once: defaults, by the kind of device.

`TILES[family][kernel]`, with the families as `device_family` names them. A device whose own family
is not in the table takes its vendor's. `tune` finds out on a device what is best there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from triplane_kernels.triton.elementary import INTERPRETED


class Tile(NamedTuple):
    """Of a kernel on a grid: how much of a slice a program takes, and with how many warps."""

    elements: int  # of a forward: rows times columns; of a backward: units times columns
    widest: int  # the most columns
    warps: int


class PointTile(NamedTuple):
    """Of a kernel at points: how many a program takes, and with how many warps."""

    points: int
    columns: int  # the most columns of a feature at once
    warps: int


# On a grid, the kernels with two tables and with three. A forward's thread has 32 elements, whose
# independent chains hide latencies; a backward's program is one warp, so that the sum over columns
# stays within it.
#
# At points, "large" is for decoders that hold more than EG3D's does. These tiles spill no register
# on compute capability 9.0; `tests/kernels/test_triton_machine_code.py` looks.
_AT_POINTS: dict[str, PointTile] = {
    "features": PointTile(32, 32, 4),
    "features backward": PointTile(16, 32, 4),
    "radiance": PointTile(64, 32, 4),
    "radiance large": PointTile(64, 16, 8),
    "radiance wide": PointTile(32, 32, 8),
    "radiance wide large": PointTile(32, 16, 8),
    "decoder backward": PointTile(16, 64, 4),
    "decoder backward large": PointTile(16, 64, 8),
}

TILES: dict[str, dict[str, Tile | PointTile]] = {
    "nvidia": {
        "forward two": Tile(32 * 128, 128, 4),
        "forward three": Tile(16 * 128, 128, 8),
        "backward two": Tile(4 * 256, 256, 1),
        "backward three": Tile(4 * 256, 256, 1),
        **_AT_POINTS,
    },
    "amd": {  # a warp has 64 lanes
        "forward two": Tile(64 * 128, 128, 4),
        "forward three": Tile(32 * 128, 128, 8),
        "backward two": Tile(8 * 256, 256, 1),
        "backward three": Tile(8 * 256, 256, 1),
        **_AT_POINTS,
    },
    "interpreter": {  # whose cost is by operation, not by element
        "forward two": Tile(2**18, 512, 4),
        "forward three": Tile(2**18, 512, 4),
        "backward two": Tile(2**18, 512, 1),
        "backward three": Tile(2**18, 512, 1),
        **_AT_POINTS,
    },
}


def device_family(device: torch.device) -> str:
    """The key of `TILES` for a device: its own kind, say "sm_90", if that is there."""
    if INTERPRETED:
        return "interpreter"
    if device.type == "cuda" and (own := own_family(device)) in TILES:
        return own
    return "nvidia" if torch.version.hip is None else "amd"


@lru_cache  # every launch asks
def own_family(device: torch.device) -> str:
    """The kind of a GPU: "sm_90" for compute capability 9.0, "gfx942" on AMD."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def grid_tile(family: str, kernel: str) -> Tile:
    """Of "forward" or "backward", each for "two" tables or "three"."""
    tile = TILES[family][kernel]
    assert isinstance(tile, Tile)
    return tile


def point_tile(device: torch.device, kernel: str) -> PointTile:
    """Of a kernel at points."""
    tile = TILES[device_family(device)][kernel]
    assert isinstance(tile, PointTile)
    return tile
