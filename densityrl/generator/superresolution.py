"""Rendered features to the final image: EG3D's super-resolution modules (arXiv:2112.07945, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from densityrl.generator.layers import NoiseMode, SynthesisBlock, binomial_filter

FEATURE_CHANNELS = 32  # what every module reads


@dataclass(frozen=True)
class Variant:
    """A module's fixed shape; widths do not follow the checkpoint's other options."""

    native_side: int
    image_side: int
    widths: tuple[int, int]
    first_block_up: bool
    spare_filter: bool  # the file holds a filter at the top level that nothing reads


VARIANTS = {
    "SuperresolutionHybrid8XDC": Variant(128, 512, (256, 128), True, False),
    "SuperresolutionHybrid8X": Variant(128, 512, (128, 64), True, True),
    "SuperresolutionHybrid4X": Variant(128, 256, (128, 64), False, True),
    "SuperresolutionHybrid2X": Variant(64, 128, (128, 64), False, True),
}


class SuperResolution(nn.Module):
    """Two synthesis blocks driven by the last row of ws."""

    def __init__(self, variant: str, w_dim: int, clamp: float | None, antialias: bool) -> None:
        super().__init__()
        shape = VARIANTS[variant]
        self.native_side = shape.native_side
        self.antialias = antialias
        if shape.spare_filter:
            self.register_buffer("resample_filter", binomial_filter())
        first, second = shape.widths
        self.block0 = SynthesisBlock(
            FEATURE_CHANNELS, first, 3, w_dim, shape.image_side // 2, shape.first_block_up, clamp
        )
        self.block1 = SynthesisBlock(first, second, 3, w_dim, shape.image_side, True, clamp)

    def forward(self, rgb: Tensor, features: Tensor, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        """rgb [B, 3, r, r] and features [B, 32, r, r], both in [-1, 1] -> image [B, 3, R, R]."""
        rows = ws[:, -1:].expand(-1, 3, -1)
        if features.shape[-1] != self.native_side:
            size = (self.native_side, self.native_side)
            features = F.interpolate(features, size, mode="bilinear", antialias=self.antialias)
            rgb = F.interpolate(rgb, size, mode="bilinear", antialias=self.antialias)
        x, rgb = self.block0(features, rgb, rows, noise_mode)
        _, rgb = self.block1(x, rgb, rows, noise_mode)
        return rgb
