"""A compact 3-D residual network with squeeze-and-excitation that scores a density slab."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class RewardNetwork(nn.Module):
    """Slab of any size to one score.

    Three channels of coordinates stand beside the density, because what people judge in a head
    depends on where it is; means and maxima over the volume feed the score.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 48, 64)) -> None:
        super().__init__()
        channels = [4, *widths]
        self.stages = nn.Sequential(*(Stage(a, b) for a, b in pairwise(channels)))
        self.hidden = nn.Linear(2 * channels[-1], 64)
        self.score = nn.Linear(64, 1)

    def forward(self, slab: Tensor) -> Tensor:
        """Normalised slab [B, X, Y, Z], values in [0, 100] -> reward [B]."""
        axes = [
            torch.linspace(-1, 1, size, device=slab.device, dtype=slab.dtype)
            for size in slab.shape[1:]
        ]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        coordinates = coordinates.expand(slab.shape[0], -1, -1, -1, -1)
        x = self.stages(torch.cat([slab[:, None] / 50 - 1, coordinates], dim=1))
        pooled = torch.cat([x.mean(dim=(2, 3, 4)), x.amax(dim=(2, 3, 4))], dim=1)
        return self.score(F.silu(self.hidden(pooled)))[:, 0]
