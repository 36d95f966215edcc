"""The density on a regular grid, against the usual path at every voxel."""

from collections.abc import Callable
from dataclasses import replace

from problem import Case, Inputs, PointDensity, both_directions
from torch import Tensor

from densityrl.volume import FACE_CROP
from triplane_kernels import EG3D, Grid, density_grid

OP = "density_grid"

# The paper's crop around a face (arXiv:2606.27305), which rewards read.
FACE = Grid.slab(256, EG3D.extents, FACE_CROP)


def cube(n: int) -> Case:
    return Case(op=OP, size=f"{n}^3", where=Grid.cube(n, EG3D.extents))


FACE_CASE = Case(op=OP, size="x".join(map(str, FACE.shape)), where=FACE)

CASES = (
    *both_directions(cube(64)),
    *both_directions(cube(128)),
    FACE_CASE,
    replace(FACE_CASE, direction="forward+backward", full=True),
    *both_directions(replace(cube(256), full=True)),
    *both_directions(replace(cube(512), full=True, devices=("cuda",))),
    replace(cube(1024), full=True, devices=("cuda",)),
)


def usual(inputs: Inputs, path: PointDensity) -> Tensor:
    """The usual path makes the grid's points too: nobody keeps them."""
    points = inputs.where.points(device=inputs.planes.device)
    sigma = path(inputs.planes, inputs.decoder, points.reshape(1, -1, 3))
    return sigma.unflatten(1, inputs.where.shape)


def ours(inputs: Inputs, backend: str) -> Tensor:
    return density_grid(inputs.planes, inputs.decoder, inputs.where, EG3D, backend=backend)


def test_density_grid(measure: Callable[..., None], case: Case, provider: str) -> None:
    measure(case, provider, usual, ours)
