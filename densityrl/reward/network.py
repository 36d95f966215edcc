"""Networks that score a slab of raw density."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densityrl.volume import normalize_slab


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means (arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // 4, 4))
        self.excite = nn.Linear(self.squeeze.out_features, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3, 4)))))
        return x * torch.sigmoid(gate)[:, :, None, None, None]


class Stage(nn.Module):
    """Halve each side, then one residual block."""

    def __init__(self, in_channels: int, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv3d(in_channels, channels, 3, stride=2, padding=1)
        self.norm0 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.gate = SqueezeExcite(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm0(self.down(x)))
        y = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.gate(self.norm2(self.conv2(y))))


class ConvNetwork(nn.Module):
    """A compact 3-D residual network with squeeze-and-excitation, learned from pairs alone.

    Slabs are normalised to `value_range` first, each by its own extremes, as in the paper. Three
    channels of coordinates stand beside the density, because what people judge in a head depends
    on where it is; means and maxima over the volume feed the score. Takes slabs of any size.
    """

    kind = "conv"

    def __init__(
        self,
        widths: Sequence[int] = (16, 32, 48, 64),
        value_range: tuple[float, float] = (0.0, 100.0),
    ) -> None:
        super().__init__()
        self.widths, self.value_range = tuple(widths), value_range
        channels = [4, *widths]
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in pairwise(channels)))
        self.hidden = nn.Linear(2 * channels[-1], 64)
        self.score = nn.Linear(64, 1)

    def describe(self) -> dict[str, Any]:
        return {"widths": list(self.widths), "value_range": list(self.value_range)}

    @classmethod
    def described(cls, widths: Sequence[int], value_range: Sequence[float]) -> ConvNetwork:
        low, high = value_range
        return cls(tuple(widths), (low, high))

    def forward(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] -> reward [B]."""
        axes = [
            torch.linspace(-1, 1, size, device=sigma.device, dtype=sigma.dtype)
            for size in sigma.shape[1:]
        ]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        coordinates = coordinates.expand(sigma.shape[0], -1, -1, -1, -1)
        low, high = self.value_range
        value = (normalize_slab(sigma, low, high) - low) / (high - low) * 2 - 1
        x = self.stages(torch.cat([value[:, None], coordinates], dim=1))
        pooled = torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1)
        return self.score(F.silu(self.hidden(pooled)))[:, 0]
