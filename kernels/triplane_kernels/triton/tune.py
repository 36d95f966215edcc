"""Finds, on a GPU, the best tile of every hot kernel, and installs it in the running process.

Nothing is tuned at import or at first use: `tiles` has defaults, and what `tune` finds on a device
is for whoever wants more of that device, or for the table of defaults itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid
from triplane_kernels.layout import EG3D, EG3D_CORRECTED, TriplaneLayout
from triplane_kernels.triton import points as at_points
from triplane_kernels.triton.density_grid import TwoLayerField
from triplane_kernels.triton.tiles import (
    TILES,
    PointTile,
    Tile,
    device_family,
    own_family,
)

# What is tried besides the default; such as fit the registers of current GPUs.
CANDIDATES: dict[str, tuple[Tile | PointTile, ...]] = {
    "forward two": (
        Tile(16 * 128, 128, 4),
        Tile(32 * 128, 128, 8),
        Tile(64 * 128, 128, 8),
        Tile(16 * 64, 64, 2),
    ),
    "forward three": (
        Tile(8 * 128, 128, 4),
        Tile(16 * 128, 128, 4),
        Tile(32 * 64, 64, 8),
        Tile(8 * 128, 128, 8),
    ),
    "backward two": (
        Tile(2 * 256, 256, 1),
        Tile(4 * 128, 128, 1),
        Tile(8 * 128, 128, 1),
        Tile(8 * 256, 256, 2),
    ),
    "backward three": (
        Tile(2 * 256, 256, 1),
        Tile(4 * 128, 128, 1),
        Tile(8 * 128, 128, 1),
        Tile(8 * 256, 256, 2),
    ),
    "radiance": (PointTile(32, 32, 4), PointTile(64, 32, 8), PointTile(128, 32, 8)),
    "features": (PointTile(16, 32, 4), PointTile(64, 32, 4), PointTile(64, 32, 8)),
    "features backward": (PointTile(32, 32, 4), PointTile(8, 32, 2), PointTile(32, 32, 8)),
    "decoder backward": (PointTile(32, 64, 8), PointTile(16, 64, 8)),
}

LEAST_GAIN = 0.02  # of the time, for which a default is given up
MAX_DIFFERENCE = 1e-4  # from the default's result, relative, in the norm; some sums cancel

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of what is timed; by default EG3D's."""

    grid: int = 256  # points a side
    points: int = 2**20
    channels: int = 32
    resolution: int = 256
    hidden: int = 64


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A tile that was tried: its time, or why it has none."""

    tile: Tile | PointTile
    ms: float | None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Of one kernel: the tile to take, and all that were tried, the default first."""

    family: str
    kernel: str
    best: Tile | PointTile
    trials: tuple[Trial, ...]

    @property
    def gain(self) -> float:
        """The default's time over the best tile's."""
        ms = {trial.tile: trial.ms for trial in self.trials}
        default, best = self.trials[0].ms, ms[self.best]
        return default / best if default and best else 1.0


def tune(seconds: float = math.inf) -> list[Choice]:
    """The best tile of every hot kernel on the current GPU, installed for this process.

    What is timed has EG3D's sizes. After `seconds`, what has not been tried is left out; one
    candidate takes up to some seconds, most of it to compile.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "Tuning times the kernels on a GPU, and torch sees none here: run it on the machine "
            "that is to be tuned for (elsewhere the defaults hold)."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    return list(choices(device, own_family(device), seconds=seconds))


def choices(
    device: torch.device,
    family: str,
    candidates: Mapping[str, Sequence[Tile | PointTile]] = CANDIDATES,
    size: Size | None = None,
    timer: Timer | None = None,
    seconds: float = math.inf,
) -> Iterator[Choice]:
    """Kernel by kernel what `tune` finds, each installed under the family at once."""
    stop = time.monotonic() + seconds
    timer = timer or _median_ms
    TILES.setdefault(family, dict(TILES[device_family(device)]))
    for kernel, tiles in candidates.items():
        if time.monotonic() >= stop:
            return
        choice = _choice(_job(kernel, device, size or Size()), family, kernel, tiles, timer, stop)
        TILES[family][kernel] = choice.best
        yield choice


@dataclass(frozen=True)
class _Job:
    """`run` is timed; `result` is what a tile must not change."""

    run: Callable[[], Any]
    result: Callable[[], Sequence[Tensor]]


def _choice(
    job: _Job,
    family: str,
    kernel: str,
    tiles: Sequence[Tile | PointTile],
    timer: Timer,
    stop: float,
) -> Choice:
    default = TILES[family][kernel]
    expected = job.result()
    trials = [Trial(tile=default, ms=timer(job.run))]
    longest = 0.0  # that a candidate has taken so far
    try:
        for tile in tiles:
            start = time.monotonic()
            if start + longest >= stop:
                break
            if tile == default:
                continue
            TILES[family][kernel] = tile
            trials.append(_trial(job, tile, expected, timer))
            longest = max(longest, time.monotonic() - start)
    finally:
        TILES[family][kernel] = default
    times = {trial.tile: trial.ms for trial in trials if trial.ms is not None}
    best = min(times, key=lambda tile: times[tile])
    if times[best] > (1 - LEAST_GAIN) * times[default]:
        best = default
    return Choice(family=family, kernel=kernel, best=best, trials=tuple(trials))


def _trial(job: _Job, tile: Tile | PointTile, expected: Sequence[Tensor], timer: Timer) -> Trial:
    try:
        pairs = list(zip(job.result(), expected, strict=True))
    # A tile that a device has not the registers or the shared memory for is not an error here.
    except (triton.runtime.errors.TritonError, RuntimeError) as error:
        return Trial(tile=tile, ms=None, error=f"{type(error).__name__}: {error}"[:200])
    difference = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)
    if not difference <= MAX_DIFFERENCE:
        return Trial(tile=tile, ms=None, error=f"differs from the default by {difference:.1e}")
    return Trial(tile=tile, ms=timer(job.run))


def _median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median"))


# --------------------------------------------------------------------------- what is timed


def _job(kernel: str, device: torch.device, size: Size) -> _Job:
    """A call of little else than the kernel."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device)

    planes = [normal(1, size.channels, size.resolution, size.resolution) for _ in EG3D.axes]
    decoder = DensityMLP(
        (
            normal(size.hidden, size.channels, scale=size.channels**-0.5 / len(planes)),
            normal(1, size.hidden, scale=size.hidden**-0.5),
        ),
        (normal(size.hidden), normal(1)),
    )
    field = Field(planes, decoder)
    if kernel.endswith((" two", " three")):
        layout = _summed(EG3D if kernel.endswith(" two") else EG3D_CORRECTED)
        d_sigma = normal(1, size.grid, size.grid, size.grid)
        return _grid_job(kernel, field, Grid.cube(size.grid, 1.0), layout, d_sigma)
    points = (torch.rand(1, size.points, 3, generator=generator) - 0.5).to(device)
    return _points_job(kernel, field, points, _summed(EG3D), normal(1, size.points))


def _summed(layout: TriplaneLayout) -> TriplaneLayout:
    return TriplaneLayout(layout.axes, layout.extents, "sum", layout.padding, layout.align_corners)


def _grid_job(
    kernel: str, field: Field, grid: Grid, layout: TriplaneLayout, d_sigma: Tensor
) -> _Job:
    needs = Needs(planes=True, decoder=True)
    volume = TwoLayerField(field, grid, layout, needs)
    d_volume = volume.frame.view(d_sigma)
    if kernel.startswith("forward"):
        sigma = volume.frame.view(torch.empty_like(d_sigma))

        def result() -> Sequence[Tensor]:
            volume.sigma(sigma, 0)
            return [sigma.clone()]

        return _Job(lambda: volume.sigma(sigma, 0), result)

    def gradients() -> Sequence[Tensor]:
        fresh = TwoLayerField(field, grid, layout, needs)
        fresh.add_gradient(d_volume, None, 0)
        return _tensors(fresh.gradients())

    return _Job(lambda: volume.add_gradient(d_volume, None, 0), gradients)


def _points_job(
    kernel: str, field: Field, points: Tensor, layout: TriplaneLayout, d_sigma: Tensor
) -> _Job:
    d_features = d_sigma[..., None].expand(-1, -1, field.decoder.in_channels).contiguous()
    d_rest = d_sigma.new_empty(*d_sigma.shape, 0)

    def run() -> list[Tensor]:
        if kernel == "radiance":
            return [at_points.radiance(field, points, layout)[0]]
        if kernel == "features":
            return [at_points.sample_features(field.planes, points, layout)]
        if kernel == "features backward":
            needs = Needs(planes=True, decoder=False)
            return _tensors(
                at_points.sample_features_backward(d_features, field.planes, points, layout, needs)
            )
        needs = Needs(planes=False, decoder=True)
        return _tensors(
            at_points.radiance_backward(d_sigma, d_rest, d_sigma, field, points, layout, needs)
        )

    return _Job(run, run)


def _tensors(gradients: Gradients) -> list[Tensor]:
    groups = (gradients.planes, gradients.weights, gradients.biases)
    return [tensor for group in groups if group is not None for tensor in group]
