"""Pictures of density volumes and of rendered images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densityrl.run import atomic_write
from triplane_kernels import Grid

if TYPE_CHECKING:
    from PIL import Image

CLAY = (0.78, 0.76, 0.73)
BACKGROUND = 1.0


@torch.no_grad()
def shade_volume(
    sigma: Tensor, grid: Grid, level: float, yaw: float = 0.0, pitch: float = 0.0, size: int = 160
) -> np.ndarray:
    """The surface sigma = level of a volume [X, Y, Z] in clay, [size, size, 3] uint8.

    Orthographic, turned by yaw and pitch (radians; 0, 0 is the front), the volume's centre in the
    middle. Where the surface is cut by the volume's face, the cut is closed.
    """
    lo, hi = (torch.tensor(corner, dtype=torch.float32) for corner in (grid.lo, grid.hi))
    volume = sigma.detach().float().cpu()
    padded = F.pad(volume, [1] * 6, value=float(volume.min()))  # closes cuts
    step = torch.tensor(grid.spacing, dtype=torch.float32)
    lo, hi = lo - step, hi + step
    centre, radius = (lo + hi) / 2, float((hi - lo).norm()) / 2
    window = float((hi - lo).max()) / 2

    def read(volumes: Tensor, points: Tensor) -> Tensor:
        """Trilinear values [C, ...] of volumes [C, X, Y, Z] at world points [..., 3]."""
        at = ((points - lo) / (hi - lo) * 2 - 1).flip(-1).reshape(1, 1, 1, -1, 3)
        values = F.grid_sample(volumes[None], at, padding_mode="border", align_corners=True)
        return values.reshape(volumes.shape[0], *points.shape[:-1])

    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    right = torch.tensor([cy, 0.0, -sy])
    toward_eye = torch.tensor([sy * cp, sp, cy * cp])
    up = torch.linalg.cross(toward_eye, right)
    v, u = torch.meshgrid(
        torch.linspace(window, -window, size), torch.linspace(-window, window, size), indexing="ij"
    )
    start = centre + u[..., None] * right + v[..., None] * up + radius * toward_eye
    count = math.ceil(2 * radius / float(step.min()))
    depths = torch.linspace(0, 2 * radius, count)

    before = torch.full((size, size), float("-inf"))
    hit_depth = torch.full((size, size), float("nan"))
    for depth in depths.tolist():
        points = start - depth * toward_eye
        inside = ((points >= lo) & (points <= hi)).all(dim=-1)
        value = torch.where(inside, read(padded[None], points)[0], float("-inf"))
        entered = hit_depth.isnan() & (value > level)
        share = ((level - before) / (value - before)).nan_to_num(nan=1.0)
        first = depth - (1 - share) * float(depths[1])
        hit_depth = torch.where(entered, first, hit_depth)
        before = value
    hit = ~hit_depth.isnan()
    points = start - hit_depth.nan_to_num()[..., None] * toward_eye
    slopes = torch.stack(torch.gradient(padded, spacing=step.tolist()))
    normals = -F.normalize(read(slopes, points).movedim(0, -1), dim=-1)
    key = F.normalize(toward_eye + 0.5 * up - 0.4 * right, dim=0)
    light = 0.25 + 0.55 * (normals @ key).clamp_min(0) + 0.2 * (normals @ toward_eye).clamp_min(0)
    color = torch.where(hit[..., None], light[..., None] * torch.tensor(CLAY), BACKGROUND)
    return (color.clamp(0, 1) * 255).round().byte().numpy()


def image_of_tensor(image: Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] to [H, W, 3] uint8, by EG3D's rule: x * 127.5 + 128, truncated."""
    pixels = (image.detach().float() * 127.5 + 128).clamp(0, 255)
    return pixels.permute(1, 2, 0).byte().cpu().numpy()


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A square picture [H, H, 3] uint8 at another side."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def sheet(
    rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], columns: Sequence[str] = ()
) -> Image.Image:
    """Tiles of one size [S, S, 3] uint8 in rows, each row labelled at its left."""
    from PIL import Image, ImageDraw, ImageFont

    side = rows[0][0].shape[0]
    font = ImageFont.load_default(13)
    margin = 12 + max(int(font.getlength(label)) for label in labels)
    top = 24 if columns else 4
    picture = Image.new(
        "RGB", (margin + len(rows[0]) * (side + 4), top + len(rows) * (side + 4)), "white"
    )
    draw = ImageDraw.Draw(picture)
    for x, title in enumerate(columns):
        draw.text((margin + x * (side + 4) + 4, 4), title, fill="black", font=font)
    for y, (tiles, label) in enumerate(zip(rows, labels, strict=True)):
        draw.text((6, top + y * (side + 4) + side // 2), label, fill="black", font=font)
        for x, tile in enumerate(tiles):
            picture.paste(Image.fromarray(tile), (margin + x * (side + 4), top + y * (side + 4)))
    return picture


def png_bytes(picture: Image.Image | np.ndarray) -> bytes:
    import io

    from PIL import Image

    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: str | Path, picture: Image.Image | np.ndarray) -> None:
    """Write a PNG whole or not at all."""
    atomic_write(path, png_bytes(picture))
