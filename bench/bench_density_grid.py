"""density_grid against the usual path, at EG3D's sizes.

The usual path is what EG3D-like code does: `grid_sample` and the whole decoder at every voxel, a
million points at a time. Times are recorded, never asserted; so is the largest difference from
float64, relative to the largest magnitude, of the volume or (backward) of the planes' gradient.

Two cores of an AMD EPYC, torch 2.13, float32, median of 3 rounds, usual / density_grid:

    64^3    forward   322 /  48 ms   6.7x     with backward  1159 / 225 ms   5.2x
    128^3   forward  2882 / 285 ms  10.1x     with backward  7002 / 706 ms   9.9x

Every point needs 64 softplus; at the rate of torch's own vectorised exp on these cores
(1.66e9 a second) 128^3 points would take 81 ms, of which forward reaches 28 %.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triplane_kernels import EG3D, DensityMLP, Grid, density_grid

POINTS_PER_CHUNK = 10**6
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Inputs(NamedTuple):
    planes: Tensor
    decoder: DensityMLP
    d_sigma: Tensor


def make_inputs(n: int, device: str, dtype: torch.dtype, requires_grad: bool) -> Inputs:
    """One sample of random planes at EG3D's sizes: 32 x 256 x 256, 32 -> 64 -> 33."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(device, dtype).requires_grad_(requires_grad)

    weights = [normal(64, 32, scale=32**-0.5), normal(33, 64, scale=64**-0.5)]
    decoder = DensityMLP(weights, [normal(64), normal(33)])
    return Inputs(normal(1, 3, 32, 256, 256), decoder, normal(1, n, n, n).detach())


def usual_path(planes: Tensor, decoder: DensityMLP, grid: Grid) -> Tensor:
    points = grid.points(planes.dtype, planes.device).reshape(1, -1, 3)
    sigma = []
    for part in points.split(POINTS_PER_CHUNK, dim=1):
        u = 2 * part / EG3D.extents[0]
        feature = sum(
            F.grid_sample(planes[:, p], u[:, :, None, list(axes)], align_corners=False)
            for p, axes in enumerate(EG3D.axes)
        )
        hidden = (feature / 3)[..., 0].transpose(1, 2)
        hidden = F.softplus(F.linear(hidden, decoder.weights[0], decoder.biases[0]))
        sigma.append(F.linear(hidden, decoder.weights[1], decoder.biases[1])[..., 0])
    return torch.cat(sigma, dim=1).reshape(1, *grid.shape)


def separable(planes: Tensor, decoder: DensityMLP, grid: Grid) -> Tensor:
    return density_grid(planes, decoder, grid, EG3D)


PROVIDERS = {"usual": usual_path, "density_grid": separable}
Provider = Callable[[Tensor, DensityMLP, Grid], Tensor]


def forward(provider: Provider, inputs: Inputs, grid: Grid) -> Tensor:
    with torch.no_grad():
        return provider(inputs.planes, inputs.decoder, grid)


def forward_backward(provider: Provider, inputs: Inputs, grid: Grid) -> Tensor:
    """The gradient of the planes; those of the decoder are computed as well."""
    sigma = provider(inputs.planes, inputs.decoder, grid)
    parameters = (inputs.planes, *inputs.decoder.parameters)
    return torch.autograd.grad(sigma, parameters, inputs.d_sigma)[0]


DIRECTIONS = {"forward": forward, "forward_backward": forward_backward}


@cache
def exact(n: int, direction: str, device: str) -> Tensor:
    inputs = make_inputs(n, device, torch.float64, direction == "forward_backward")
    return DIRECTIONS[direction](separable, inputs, Grid.cube(n, 1.0))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("device", DEVICES)
def test_density_grid(benchmark: Any, device: str, n: int, direction: str, provider: str) -> None:
    inputs = make_inputs(n, device, torch.float32, direction == "forward_backward")
    grid = Grid.cube(n, 1.0)

    def run() -> Tensor:
        result = DIRECTIONS[direction](PROVIDERS[provider], inputs, grid)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"density_grid {n}^3 {direction} {device}"
    ours = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    expected = exact(n, direction, device)
    error = (ours - expected).abs().max() / expected.abs().max()
    benchmark.extra_info |= {
        "max_error_vs_float64": error.item(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
