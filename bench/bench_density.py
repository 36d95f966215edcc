"""The density at random points of the box, the same for every sample."""

from collections.abc import Callable

import torch
from problem import Case, Inputs, PointDensity, both_directions
from torch import Tensor

from triplane_kernels import EG3D, density

OP = "density"

CASES = (
    *both_directions(Case(op=OP, size="64k points", where=64_000)),
    *both_directions(Case(op=OP, size="1M points", where=10**6)),
    *both_directions(
        Case(op=OP, size="4M points bf16", where=4 * 10**6, planes_dtype=torch.bfloat16, full=True)
    ),
)


def usual(inputs: Inputs, path: PointDensity) -> Tensor:
    return path(inputs.planes, inputs.decoder, inputs.where)


def ours(inputs: Inputs, backend: str) -> Tensor:
    return density(inputs.planes, inputs.decoder, inputs.where, EG3D, backend=backend)


def test_density(measure: Callable[..., None], case: Case, provider: str) -> None:
    measure(case, provider, usual, ours)
