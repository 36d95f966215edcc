from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from triplane_kernels import Grid, eg3d_lattice

FACE_CROP = ((0.25, 0.25), (0.25, 0.2), (0.4, 0.1))


def test_last_axis_varies_fastest() -> None:
    points = Grid.cube(2, extent=1.0).points().reshape(-1, 3)
    assert points[1].tolist() == [-0.5, -0.5, 0.5]
    assert points[4].tolist() == [0.5, -0.5, -0.5]


def test_ends_are_included() -> None:
    grid = Grid(lo=(0, 1, 2), hi=(4, 1.5, 2), shape=(5, 3, 1))
    assert grid.coordinates(0).tolist() == [0, 1, 2, 3, 4]
    assert grid.coordinates(1).tolist() == [1, 1.25, 1.5]
    assert grid.coordinates(2).tolist() == [2]
    assert grid.spacing == (1, 0.25, 0)
    assert grid.numel == 15
    assert grid.points().shape == (5, 3, 1, 3)


def test_an_axis_of_one_point_sits_at_lo() -> None:
    assert Grid((0, 0, -3), (1, 1, 3), (2, 2, 1)).coordinates(2).tolist() == [-3]


def test_coordinates_are_rounded_once() -> None:
    grid = Grid.cube(257, extent=0.7)
    exact = torch.tensor([-0.35 + 0.7 * i / 256 for i in range(257)], dtype=torch.float64)
    assert_close(grid.coordinates(0, torch.float64), exact, rtol=0, atol=1e-16)
    assert torch.equal(grid.coordinates(0), grid.coordinates(0, torch.float64).float())


def test_slab_of_the_paper() -> None:
    assert Grid.slab(256, 1.0, FACE_CROP).shape == (128, 141, 129)


def test_slab_points_are_points_of_the_cube() -> None:
    n = 256
    cube, slab = Grid.cube(n, 1.0), Grid.slab(n, 1.0, FACE_CROP)
    for axis, (lo, hi) in enumerate(FACE_CROP):
        inside = cube.coordinates(axis, torch.float64)[int(lo * n) : n - int(hi * n)]
        assert_close(slab.coordinates(axis, torch.float64), inside, rtol=0, atol=3e-16)


def test_a_fraction_that_falls_short_of_its_integer_still_cuts() -> None:
    assert 0.29 * 100 < 29
    assert Grid.slab(100, 1.0, ((0.29, 0), (0, 0), (0, 0))).shape == (71, 100, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 2, 2)}, "shape must be three positive integers"),
        ({"shape": (2, 2)}, "shape must be three positive integers"),
        ({"lo": (0.0, 0.0, 2.0)}, "lo must not exceed hi"),
        ({"hi": (1.0, float("inf"), 1.0)}, "hi must be a finite number or three"),
    ],
)
def test_refuses_what_is_no_grid(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"lo": (0.0, 0.0, 0.0), "hi": (1.0, 1.0, 1.0), "shape": (2, 2, 2)} | arguments)


@pytest.mark.parametrize(
    ("n", "crop", "message"),
    [
        (0, FACE_CROP, "n must be at least 1"),
        (8, FACE_CROP[:2], "a pair of fractions for each of 3 axes"),
        (8, ((0.5, 0.5), (0, 0), (0, 0)), "leaves no points of 8"),
        (8, ((-0.1, 0), (0, 0), (0, 0)), r"fractions in \[0, 1\)"),
    ],
)
def test_refuses_what_is_no_slab(n: int, crop: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.slab(n, 1.0, crop)


def test_eg3d_lattice_by_hand() -> None:
    lattice = eg3d_lattice(2, extent=1.0)
    # Sample 1: z index 1, y index 1/2, x index 1/4; the step is 1.
    assert lattice[0, 0, 1].tolist() == [-0.25, 0.0, 0.5]
    # Sample 7: z index 1, y index 3.5 mod 2, x index 1.75.
    assert lattice[1, 1, 1].tolist() == [1.25, 1.0, 0.5]


def test_eg3d_lattice_is_that_of_the_official_script(shared_data: Path) -> None:
    expected = np.load(shared_data / "eg3d_parity" / "expected.npz")["gensamples_coords"]
    ours = eg3d_lattice(24, extent=1.0).reshape(-1, 3)
    assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-6)


def test_eg3d_lattice_drifts_by_up_to_a_voxel() -> None:
    n = 24
    drift = (eg3d_lattice(n, 1.0) - Grid.cube(n, 1.0).points()) * (n - 1)
    assert_close(drift.amax(dim=(0, 1, 2)), torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=0.05)
    assert drift.min() > -1e-4
