"""Few numbers that move every sample of a generator along axes of w."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densityrl.generator import TriplaneGenerator
from densityrl.generator.axes import SKEWED, LatentAxes
from densityrl.generator.layers import ModulatedConv, ToImage


class Steering(nn.Module):
    """w + directions (pull (typical - y) + push), with y the coordinates of w along the axes.

    `pull` in [0, 1] is the truncation trick for one axis at a time: at 1 every sample has the
    axis's most common coordinate, and those that had it do not move. It acts along skewed axes,
    where the tail is rare and often wrong. Along the others, which have no such side, `push` moves
    all samples alike. Both are [K] and 0 at the start. `fold` puts them into a generator's weights.
    """

    mean: Tensor
    directions: Tensor
    readout: Tensor
    typical: Tensor
    skewed: Tensor

    def __init__(self, axes: LatentAxes) -> None:
        super().__init__()
        for name in ("mean", "directions", "readout", "typical"):
            self.register_buffer(name, getattr(axes, name))
        self.register_buffer("skewed", (axes.skewness > SKEWED).to(axes.typical.dtype))
        self.pull = nn.Parameter(torch.zeros_like(axes.typical))
        self.push = nn.Parameter(torch.zeros_like(axes.typical))

    def forward(self, ws: Tensor) -> Tensor:
        """ws [B, L, w_dim] -> the same shape."""
        missing = self.typical - (ws - self.mean) @ self.readout
        along = self.skewed * self.pull * missing + (1 - self.skewed) * self.push
        return ws + along @ self.directions.T

    @torch.no_grad()
    def clip(self) -> None:
        """Keep `pull` where it means something; call it after each step of an optimiser."""
        self.pull.clamp_(0, 1)

    @torch.no_grad()
    def fold(self, generator: TriplaneGenerator) -> None:
        """Change the generator's weights so that it does by itself what `forward` does to its ws.

        Every layer reads w through an affine map, and so takes this one in: architecture and file
        format stay as they are.
        """
        pull = (self.skewed * self.pull).double()
        push = ((1 - self.skewed) * self.push).double()
        directions, readout = self.directions.double(), self.readout.double()
        typical = self.typical.double() + self.mean.double() @ readout
        shift = directions @ (pull * typical + push)
        for layer in generator.modules():
            if isinstance(layer, ModulatedConv | ToImage):
                affine = layer.affine
                applied, _ = affine.effective()
                affine.bias.add_(applied.double() @ shift / affine.lr_mul)
                stored = affine.weight.double()
                affine.weight.copy_(stored - (stored @ directions * pull) @ readout.T)
