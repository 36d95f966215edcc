"""Layers of StyleGAN2 (arXiv:1912.04958), the backbone of EG3D, in plain PyTorch.

Parameters are stored unscaled ("equalised learning rate", arXiv:1710.10196): the effective weight
of a layer is its stored weight times a constant, so that one learning rate suits every layer.
Parameter and buffer names are those of EG3D's files.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NoiseMode = Literal["const", "random", "none"]
LRELU_GAIN = math.sqrt(2.0)  # keeps the variance of a leaky ReLU with slope 0.2


def normalize_second_moment(x: Tensor) -> Tensor:
    """Divide each row of [B, D] by the root of its mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class FullyConnected(nn.Module):
    """Linear layer with effective weight `lr_mul / sqrt(fan_in) * weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Literal["linear", "lrelu"] = "linear",
        lr_mul: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.lr_mul = lr_mul
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_mul))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bias [out] as they are applied."""
        gain = self.lr_mul / math.sqrt(self.weight.shape[1])
        return self.weight * gain, self.bias * self.lr_mul

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.effective()
        x = F.linear(x.to(weight.dtype), weight, bias)
        return F.leaky_relu(x, 0.2) * LRELU_GAIN if self.activation == "lrelu" else x


def binomial_filter() -> Tensor:
    """[4, 4] low-pass filter [1, 3, 3, 1] x [1, 3, 3, 1] of unit sum."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64


def filter2d(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve every channel of [B, C, H, W] with `taps` [h, w]; valid positions only."""
    channels = x.shape[1]
    kernel = taps.to(x.dtype).flip([0, 1]).expand(channels, 1, -1, -1)
    return F.conv2d(x, kernel, groups=channels)


def upsample2d(x: Tensor, taps: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2H, 2W]: zeros between the pixels, then the low-pass filter."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height, 2, width, 2)
    spread[:, :, :, 0, :, 0] = x
    spread = spread.reshape(batch, channels, 2 * height, 2 * width)
    return filter2d(F.pad(spread, [2, 1, 2, 1]), taps * 4)


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style, then demodulated, with noise.

    Demodulation is applied to the output instead of the weights, which is the same product in
    another order and lets the whole batch share one convolution. Upsampling is a transposed
    convolution of stride 2 followed by the low-pass filter.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: bool = False,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up = up
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", binomial_filter())

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode) -> Tensor:
        """x [B, I, H, W], w [B, w_dim] -> [B, O, H, W], or [B, O, 2H, 2W] when upsampling."""
        weight = self.weight
        style = self.affine(w)
        demodulation = (style.square() @ weight.square().sum(dim=(2, 3)).T + 1e-8).rsqrt()
        x = x * style[:, :, None, None]
        if self.up:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
            x = filter2d(F.pad(x, [1, 1, 1, 1]), self.resample_filter * 4)
        else:
            x = F.conv2d(x, weight, padding=1)
        shift = self.bias[:, None, None]
        if noise_mode == "const":
            shift = shift + self.noise_const * self.noise_strength
        elif noise_mode == "random":
            noise = torch.randn(x.shape[0], 1, *x.shape[2:], device=x.device, dtype=x.dtype)
            shift = shift + noise * self.noise_strength
        elif noise_mode != "none":
            raise ValueError(f"noise_mode must be const, random or none, not {noise_mode!r}")
        # The gain of the activation commutes with it, so scale, noise and bias are one pass.
        scale = (demodulation * LRELU_GAIN)[:, :, None, None]
        x = F.leaky_relu_(torch.addcmul(shift * LRELU_GAIN, x, scale), 0.2)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class ToImage(nn.Module):
    """1x1 modulated convolution without demodulation: features to image (or plane) channels."""

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, I, H, W], w [B, w_dim] -> [B, O, H, W]."""
        style = self.affine(w) / math.sqrt(self.weight.shape[1])
        x = F.conv2d(x * style[:, :, None, None], self.weight, self.bias)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions (one where the block starts from the learned constant)
    and a skip connection to the image.

    Rows of w: each convolution takes the next one, `torgb` the one after its last convolution
    without using it up.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        image_channels: int,
        w_dim: int,
        resolution: int,
        up: bool = True,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("resample_filter", binomial_filter())
        if in_channels is None:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = ModulatedConv(in_channels, out_channels, w_dim, resolution, up, clamp)
        self.has_input = in_channels is not None
        self.conv1 = ModulatedConv(out_channels, out_channels, w_dim, resolution, False, clamp)
        self.torgb = ToImage(out_channels, image_channels, w_dim, clamp)

    @property
    def num_conv(self) -> int:
        return 2 if self.has_input else 1

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, noise_mode: NoiseMode
    ) -> tuple[Tensor, Tensor]:
        """x and image of the block before (None for the first), ws [B, num_conv + 1, w_dim]."""
        dtype = self.conv1.weight.dtype
        if self.has_input:
            assert x is not None
            x = self.conv0(x.to(dtype), ws[:, 0], noise_mode)
        else:
            x = self.const.expand(ws.shape[0], -1, -1, -1)
        x = self.conv1(x, ws[:, self.num_conv - 1], noise_mode)
        rgb = self.torgb(x, ws[:, self.num_conv]).float()  # images add up in float32
        if image is not None:
            rgb = rgb + (upsample2d(image, self.resample_filter) if self.up else image)
        return x, rgb
