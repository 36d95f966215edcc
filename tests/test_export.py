"""Volumes and meshes that other tools read."""

import numpy as np
import pytest
import torch
import trimesh

from densityrl.export import extract_surface, write_mesh, write_volume
from triplane_kernels import Grid

GRID = Grid((-1.0, -1.0, -1.0), (1.0, 1.0, 1.2), (40, 41, 45))


def ball(centre, radius):
    """A field that is 10 on the sphere and rises inwards, 20 a unit."""
    points = GRID.points(dtype=torch.float64).numpy()
    return 10 + 20 * (radius - np.linalg.norm(points - np.array(centre), axis=-1))


def test_a_volume_comes_back(tmp_path):
    sigma = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    grid = Grid((0.0, -1.0, 2.0), (1.0, 1.0, 2.5), (2, 3, 4))
    write_volume(tmp_path / "v.npz", sigma, grid)
    with np.load(tmp_path / "v.npz") as file:
        assert sorted(file) == ["hi", "lo", "sigma"]
        np.testing.assert_array_equal(file["sigma"], sigma)
        assert file["lo"].tolist() == [0.0, -1.0, 2.0]
        assert file["hi"].tolist() == [1.0, 1.0, 2.5]


def test_a_sphere_is_where_it_should_be():
    vertices, faces = extract_surface(ball((0.1, -0.2, 0.3), 0.5), GRID)
    distance = np.linalg.norm(vertices - np.array([0.1, -0.2, 0.3]), axis=1)
    assert np.abs(distance - 0.5).max() < 0.002
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.01)  # positive: faces out


def test_no_surface():
    assert extract_surface(np.zeros((4, 4, 4)), Grid.cube(4, 1.0)) is None
    assert extract_surface(np.full((4, 4, 4), 50.0), Grid.cube(4, 1.0)) is None


def test_a_surface_that_leaves_the_volume_is_open():
    vertices, faces = extract_surface(ball((0, 0, 1.2), 0.5), GRID)
    assert not trimesh.Trimesh(vertices, faces, process=False).is_watertight
    assert vertices[:, 2].max() == pytest.approx(1.2)


@pytest.mark.parametrize("suffix", ["ply", "obj", "glb", "stl"])
def test_mesh_files(tmp_path, suffix):
    surface = extract_surface(ball((0, 0, 0), 0.4), GRID)
    write_mesh(tmp_path / f"m.{suffix}", *surface)
    mesh = trimesh.load_mesh(tmp_path / f"m.{suffix}")
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == [f"m.{suffix}"]
