"""How far a density on a grid is from that of other planes, as fine-tuning asks at every step.

The mean absolute difference on the paper's grid (arXiv:2606.27305). The other field is the frozen
start: no gradient flows into it, and the usual path does not record one.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from problem import Case, Inputs, PointDensity
from torch import Tensor

from triplane_kernels import EG3D, Grid, density_grid_loss

ONE = Case(
    op="density_grid_loss",
    size="64^3",
    where=Grid.cube(64, EG3D.extents),
    direction="forward+backward",
    two_fields=True,
)

CASES = (ONE, replace(ONE, size="64^3 batch 16", batch=16, full=True))


def usual(inputs: Inputs, path: PointDensity) -> Tensor:
    points = inputs.where.points(device=inputs.planes.device).reshape(1, -1, 3)
    with torch.no_grad():
        start = path(*inputs.target, points)
    return (path(inputs.planes, inputs.decoder, points) - start).abs().mean(dim=1)


def ours(inputs: Inputs, backend: str) -> Tensor:
    return density_grid_loss(
        inputs.planes, inputs.decoder, inputs.where, EG3D, inputs.target, backend=backend
    )


def test_density_grid_loss(measure: Callable[..., None], case: Case, provider: str) -> None:
    measure(case, provider, usual, ours)
