"""Latent to planes: mapping network and synthesis network (StyleGAN2, with EG3D's camera input)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densityrl.generator.layers import (
    FullyConnected,
    NoiseMode,
    SynthesisBlock,
    normalize_second_moment,
)


class MappingNetwork(nn.Module):
    """z and camera to w: normalise each, concatenate, fully connected layers (EG3D, sec. 4.4)."""

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_layers: int,
        hidden_features: int | None = None,
        embed_features: int | None = None,
        lr_mul: float = 0.01,
    ) -> None:
        super().__init__()
        hidden = hidden_features or w_dim
        embed = 0 if c_dim == 0 else embed_features or w_dim
        if embed:
            self.embed = FullyConnected(c_dim, embed)
        self.has_camera = embed > 0
        self.num_layers = num_layers
        widths = [z_dim + embed, *[hidden] * (num_layers - 1), w_dim]
        for index in range(num_layers):
            layer = FullyConnected(widths[index], widths[index + 1], "lrelu", lr_mul)
            setattr(self, f"fc{index}", layer)
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor, c: Tensor | None) -> Tensor:
        """z [B, z_dim], c [B, c_dim] (unused without a camera input) -> w [B, w_dim]."""
        x = normalize_second_moment(z.float())
        if self.has_camera:
            assert c is not None
            x = torch.cat([x, normalize_second_moment(self.embed(c.float()).float())], dim=1)
        for index in range(self.num_layers):
            x = getattr(self, f"fc{index}")(x)
        return x.float()


class SynthesisNetwork(nn.Module):
    """w to planes: blocks of growing resolution, each adding to the image through a skip.

    `channels[i]` is the width of the block of resolution 4 * 2**i; `image_channels` is
    planes times channels a plane.
    """

    def __init__(
        self, w_dim: int, channels: Sequence[int], image_channels: int, clamp: float | None
    ) -> None:
        super().__init__()
        self.resolutions = [4 << index for index in range(len(channels))]
        previous: int | None = None
        for resolution, width in zip(self.resolutions, channels, strict=True):
            block = SynthesisBlock(previous, width, image_channels, w_dim, resolution, clamp=clamp)
            setattr(self, f"b{resolution}", block)
            previous = width

    @property
    def blocks(self) -> list[SynthesisBlock]:
        return [getattr(self, f"b{resolution}") for resolution in self.resolutions]

    @property
    def num_ws(self) -> int:
        return sum(block.num_conv for block in self.blocks) + 1

    def forward(self, ws: Tensor, noise_mode: NoiseMode) -> Tensor:
        """ws [B, num_ws, w_dim] -> [B, image_channels, R, R], float32."""
        x = image = None
        row = 0
        for block in self.blocks:
            x, image = block(x, image, ws[:, row : row + block.num_conv + 1], noise_mode)
            row += block.num_conv
        assert image is not None
        return image


class Backbone(nn.Module):
    """Mapping and synthesis under the names that EG3D's files use."""

    def __init__(self, mapping: MappingNetwork, synthesis: SynthesisNetwork) -> None:
        super().__init__()
        self.synthesis = synthesis
        self.mapping = mapping
