"""What is measured: EG3D's sizes, the usual path, and what the answer should have been.

The usual path is what EG3D-like code does (arXiv:2112.07945): one `grid_sample` of the three
planes, the mean, and the decoder at every point, a million points at a time. It gets the decoder
with the density row alone, 32 -> 64 -> 1, as does everything else here, so it is not charged for
colours that nobody reads; and its points lie along the width of `grid_sample`'s output, which is
the fast way round on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from triplane_kernels import EG3D, DensityMLP, Grid

CHANNELS, RESOLUTION, HIDDEN = 32, 256, 64
POINTS_PER_CHUNK = 10**6

# Above this many voxels a forward result is compared on its first and last layers along x only:
# the float64 volume would cost more than all that is measured. The last layers are the ones that
# an overflow of an index would hit.
WHOLE_COMPARISON_VOXELS = 256**3
END_LAYERS = 4

USUAL_PROVIDERS = ("eager", "compiled")

Direction = Literal["forward", "forward+backward"]
PointDensity = Callable[[Tensor, DensityMLP, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one call is given."""

    planes: Tensor  # [B, 3, 32, 256, 256]
    decoder: DensityMLP
    where: Grid | Tensor  # Tensor: points [1, M, 3]
    target: tuple[Tensor, DensityMLP] | None  # the field to compare with; takes no gradient
    d_out: Tensor | None  # gradient of the result; None without a backward

    def double(self) -> Inputs:
        """The same numbers in float64."""
        requires_grad = self.d_out is not None
        planes, decoder = _with_grad(
            self.planes.detach().double(),
            self.decoder.detach().to(torch.float64),
            requires_grad,
        )
        return replace(
            self,
            planes=planes,
            decoder=decoder,
            where=self.where if isinstance(self.where, Grid) else self.where.double(),
            target=self.target and (self.target[0].double(), self.target[1].to(torch.float64)),
            d_out=None if self.d_out is None else self.d_out.double(),
        )


Operation = Callable[[Inputs], Tensor]
Usual = Callable[[Inputs, PointDensity], Tensor]  # given how points are evaluated
Ours = Callable[[Inputs, str], Tensor]  # given the backend


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size in one direction: the rows of the table that compare."""

    op: str
    size: str  # for the table, and for `pytest -k`
    where: Grid | int  # int: so many random points in the box
    direction: Direction = "forward"
    batch: int = 1
    planes_dtype: torch.dtype = torch.float32
    two_fields: bool = False
    full: bool = False  # only with --bench-full
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def points(self) -> int:
        """Densities that are asked for in all."""
        return self.batch * (self.where.numel if isinstance(self.where, Grid) else self.where)

    @property
    def backward(self) -> bool:
        """Whether gradients of planes and decoder are part of the work."""
        return self.direction == "forward+backward"

    def max_error(self, provider: str) -> float:
        """Bound on the relative error, in the norm, that a provider must hold."""
        if self.planes_dtype != torch.float32:
            return 5e-3  # their gradient is rounded to their dtype
        if self.two_fields:
            # |x| has a kink: a voxel where both volumes all but agree may take either sign, and
            # one of 64^3 voxels is 4e-3 of the gradient's norm.
            return 1e-2
        # The usual path rounds a grid's coordinates to float32, 8e-6 of a pixel at 256 pixels.
        return 3e-5 if provider in USUAL_PROVIDERS else 1e-5

    def inputs(self, device: str) -> Inputs:
        """The same random numbers at every call, of the sizes and scales of EG3D's."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, device=device)

        def field() -> tuple[Tensor, DensityMLP]:
            weights = (
                normal(HIDDEN, CHANNELS, scale=CHANNELS**-0.5),
                normal(1, HIDDEN, scale=HIDDEN**-0.5),
            )
            planes = normal(self.batch, len(EG3D.axes), CHANNELS, RESOLUTION, RESOLUTION)
            return planes.to(self.planes_dtype), DensityMLP(weights, (normal(HIDDEN), normal(1)))

        planes, decoder = _with_grad(*field(), self.backward)
        if isinstance(self.where, Grid):
            where: Grid | Tensor = self.where
            result: tuple[int, ...] = (self.batch, *self.where.shape)
        else:
            where = torch.rand(1, self.where, 3, generator=generator, device=device) - 0.5
            result = (self.batch, self.where)
        if self.two_fields:
            result = (self.batch,)
        return Inputs(
            planes=planes,
            decoder=decoder,
            where=where,
            target=field() if self.two_fields else None,
            d_out=normal(*result) if self.backward else None,
        )


def both_directions(case: Case) -> tuple[Case, Case]:
    """A case without and with its backward."""
    return case, replace(case, direction="forward+backward")


def _with_grad(
    planes: Tensor, decoder: DensityMLP, requires_grad: bool
) -> tuple[Tensor, DensityMLP]:
    for tensor in (planes, *decoder.parameters):
        tensor.requires_grad_(requires_grad)
    return planes, decoder


def call(operation: Operation, inputs: Inputs) -> Tensor:
    """One call: the result, or (with a backward) the gradient of the planes.

    The gradients of the decoder's parameters are computed as well.
    """
    if inputs.d_out is None:
        with torch.no_grad():
            return operation(inputs)
    wanted = (inputs.planes, *inputs.decoder.parameters)
    return torch.autograd.grad(operation(inputs), wanted, inputs.d_out)[0]


# ----------------------------------------------------------------------------- the usual path


def usual_density(planes: Tensor, decoder: DensityMLP, points: Tensor) -> Tensor:
    """The density of points [1, M, 3], the usual way: [B, M]."""
    return _in_chunks(_usual_chunk, planes, decoder, points)


def compiled_usual_density() -> PointDensity:
    """The usual path with every chunk compiled; compilation takes place at the first call."""
    torch.compiler.reset()  # past its limit of recompilations torch goes on uncompiled, silently
    chunk = torch.compile(_usual_chunk)
    return lambda planes, decoder, points: _in_chunks(chunk, planes, decoder, points)


def _in_chunks(
    chunk: Callable[..., Tensor], planes: Tensor, decoder: DensityMLP, points: Tensor
) -> Tensor:
    planes = planes.to(points.dtype)  # grid_sample wants one dtype, and points need float32
    parts = points.split(POINTS_PER_CHUNK // planes.shape[0], dim=1)
    return torch.cat([chunk(planes, *decoder.parameters, part) for part in parts], dim=1)


def _usual_chunk(
    planes: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, points: Tensor
) -> Tensor:
    batch, count, channels = planes.shape[:3]
    u = points * (2 / EG3D.extents[0])
    lookups = torch.stack([u[..., list(axes)] for axes in EG3D.axes], dim=1)
    lookups = lookups.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    features = F.grid_sample(planes.flatten(0, 1), lookups, align_corners=False)
    features = features.permute(0, 3, 2, 1).reshape(batch, count, -1, channels).mean(dim=1)
    return F.linear(F.softplus(F.linear(features, w1, b1)), w2, b2)[..., 0]


# ---------------------------------------------------------------------------------- the error


def relative_error(case: Case, ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm, on the part of the result that `exact` holds."""
    if _compared_at_ends(case):
        ours = torch.cat([ours[:, :END_LAYERS], ours[:, -END_LAYERS:]], dim=1)
    return ((ours.double() - exact).norm() / exact.norm()).item()


@lru_cache(maxsize=1)  # the providers of a case come one after the other
def exact_result(case: Case, ours: Ours, device: str) -> Tensor:
    """What `call` should return, from the reference in float64 on the same inputs."""
    inputs = case.inputs(device).double()
    reference = partial(ours, backend="reference")
    if not _compared_at_ends(case):
        return call(reference, inputs)
    assert isinstance(case.where, Grid)
    layers = [call(reference, replace(inputs, where=end)) for end in _ends(case.where)]
    return torch.cat(layers, dim=1)


def _compared_at_ends(case: Case) -> bool:
    large = isinstance(case.where, Grid) and case.where.numel > WHOLE_COMPARISON_VOXELS
    return large and not case.backward


def _ends(grid: Grid) -> tuple[Grid, Grid]:
    """The first and the last layers of a grid along x."""
    depth = (END_LAYERS - 1) * grid.spacing[0]
    shape = (END_LAYERS, *grid.shape[1:])
    (x_lo, *lo), (x_hi, *hi) = grid.lo, grid.hi
    return (
        Grid((x_lo, *lo), (x_lo + depth, *hi), shape),
        Grid((x_hi - depth, *lo), (x_hi, *hi), shape),
    )
