"""Samples to surfaces: where the level lies, what a file of a surface holds, what a reward says."""

import io
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from tiny import CONFIG, tiny_generator, tiny_reward

from densityrl.annotation.meshes import (
    MeshMaker,
    NoSurfaceError,
    cache_key,
    reward_stamp,
    suggest_level,
)
from densityrl.config import MeshSettings
from densityrl.export import extract_surface
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.generator.render import eg3d_color
from densityrl.preference.store import Sample
from densityrl.volume import SlabSettings, density_slab, planes_of_seeds
from triplane_kernels import density, radiance

SETTINGS = MeshSettings(resolution=24, slab="full", level=7.0)
SAMPLE = Sample(3, 0.7)


@cache
def maker(**changes):
    return MeshMaker(tiny_generator(), replace(SETTINGS, **changes))


def parsed(data):
    (mesh,) = trimesh.load(io.BytesIO(data), file_type="glb", process=False).geometry.values()
    return mesh


@cache
def surface(**changes):
    return parsed(maker(**changes).glb(SAMPLE))


def points_of(vertices):
    return torch.from_numpy(np.array(vertices, dtype=np.float32))[None]


def sigma_at(vertices, generator=None):
    """Raw density [V], from the planes and not from a volume."""
    generator = generator or tiny_generator()
    planes = planes_of_seeds(generator, [SAMPLE.seed], maker().slab(SAMPLE.psi))
    return density(planes, generator.decoder, points_of(vertices), generator.layout)[0].numpy()


# --- the level -----------------------------------------------------------------------------------


def two_valued(low, high):
    sigma = np.full((8, 8, 8), low, dtype=np.float32)
    sigma[2:6, 2:6, 2:6] = high
    return sigma


@pytest.mark.parametrize("values", [(-5, 40), (-300, 300), (10, 90), (100, 200)])
def test_the_level_parts_two_values(values):
    assert values[0] < suggest_level(two_valued(*values), box_side=1.0) < values[1]


def test_the_level_moves_with_what_is_dense():
    levels = [suggest_level(two_valued(0, high), box_side=1.0) for high in (20, 80, 320)]
    assert levels == sorted(levels)
    assert levels[0] < levels[2] / 2
    shifted = [suggest_level(two_valued(low, 90), box_side=1.0) for low in (10, 40, 70)]
    assert 10 < shifted[0] < 40 < shifted[1] < 70 < shifted[2] < 90


def test_the_level_is_in_units_of_the_box():
    """Twice the box at half the attenuation (softplus(sigma - 1)) is the same picture."""
    small = suggest_level(two_valued(30, 120) + 1, box_side=1.0) - 1
    large = suggest_level(two_valued(15, 60) + 1, box_side=2.0) - 1
    assert large == pytest.approx(small / 2, rel=1e-6)


@pytest.mark.parametrize("value", [-1e4, 0.0, 10.0, 1e6])
def test_no_level_parts_a_constant(value):
    with pytest.raises(ValueError, match="the same everywhere"):
        suggest_level(np.full((4, 4, 4), value, dtype=np.float32), box_side=1.0)


def test_the_level_of_several_volumes():
    volumes = density_slab(tiny_generator(), [4, 9], maker().slab(1.0)).numpy()
    assert maker().suggested_level([4, 9], 1.0) == suggest_level(volumes, box_side=1.0)


def test_the_suggested_level_of_heads_is_the_papers_surface():
    heads = load_generator("heads")
    settings = MeshSettings(resolution=64)
    level = MeshMaker(heads, settings).suggested_level(range(4), 1.0)
    grid = MeshMaker(heads, settings).slab(1.0).grid(heads.box_side)
    for sigma in density_slab(heads, range(4), MeshMaker(heads, settings).slab(1.0)).numpy():
        suggested, _ = extract_surface(sigma, grid, level)
        papers, _ = extract_surface(sigma, grid, 10.0)
        to_papers, _ = cKDTree(papers).query(suggested)
        to_suggested, _ = cKDTree(suggested).query(papers)
        assert max(to_papers.mean(), to_suggested.mean()) < 1.5 * max(grid.spacing)


# --- a surface in a file -------------------------------------------------------------------------


@pytest.mark.parametrize("slab", ["face", "full"])
def test_a_surface_lies_in_its_slab_at_its_level(slab):
    mesh = surface(slab=slab)
    grid = maker(slab=slab).slab(SAMPLE.psi).grid(1.0)
    assert (mesh.vertices >= np.array(grid.lo) - 1e-6).all()
    assert (mesh.vertices <= np.array(grid.hi) + 1e-6).all()
    # Linear between grid points, so off the true level by the density's curvature alone.
    assert np.abs(sigma_at(mesh.vertices) - SETTINGS.level).mean() < 0.1


def test_a_surface_is_of_its_sample():
    other = parsed(maker().glb(Sample(4, SAMPLE.psi)))
    truncated = parsed(maker().glb(Sample(SAMPLE.seed, 0.25)))
    sizes = {len(mesh.vertices) for mesh in (surface(), other, truncated)}
    assert len(sizes) == 3
    assert maker().glb(SAMPLE) == maker().glb(SAMPLE)


def test_triangles_turn_out_of_what_is_dense():
    mesh = surface()
    areas = mesh.area_faces
    middles, facing = mesh.triangles_center, mesh.face_normals
    falls = sigma_at(middles + 0.01 * facing) < sigma_at(middles - 0.01 * facing)
    assert areas[falls].sum() > 0.99 * areas.sum()


def test_normals_point_from_dense_to_clear():
    mesh = surface()
    stored = mesh.vertex_normals
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)
    step = 0.01
    slope = [
        sigma_at(mesh.vertices + step * axis) - sigma_at(mesh.vertices - step * axis)
        for axis in np.eye(3)
    ]
    exact = -np.stack(slope, axis=1)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    inside = (np.abs(mesh.vertices) < 0.4).all(axis=1)  # the volume ends at 0.5
    assert inside.sum() > 100
    cosines = (stored * exact).sum(axis=1)[inside]
    assert cosines.mean() > 0.97
    assert (cosines > 0).mean() > 0.99


def test_normals_are_the_volumes_own():
    """In a file they are the maker's, not those that a reader derives from the triangles."""
    mesh = surface()
    derived = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).vertex_normals
    assert np.abs(mesh.vertex_normals - derived).max() > 0.01


def test_colours_are_the_generators():
    generator, mesh = tiny_generator(), surface()
    planes = planes_of_seeds(generator, [SAMPLE.seed], maker().slab(SAMPLE.psi))
    _, raw = radiance(planes, generator.decoder, points_of(mesh.vertices), generator.layout)
    expected = 255 * eg3d_color(raw[0]).clamp(0, 1).numpy()
    stored = mesh.visual.vertex_colors
    assert stored.shape == (len(mesh.vertices), 4)
    assert np.ptp(stored[:, :3], axis=0).min() > 5
    assert np.abs(stored[:, :3] - expected).max() <= 1
    assert (stored[:, 3] == 255).all()


def test_too_few_features_are_no_colour():
    config = replace(CONFIG, decoder_features=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = TriplaneGenerator(config).eval().requires_grad_(False)
    level = float(density_slab(generator, [SAMPLE.seed], maker().slab(SAMPLE.psi)).median())
    grey = MeshMaker(generator, replace(SETTINGS, level=level)).glb(SAMPLE)
    assert b"POSITION" in grey
    assert b"NORMAL" in grey
    assert b"COLOR_0" not in grey
    assert b"COLOR_0" in maker().glb(SAMPLE)


def test_a_fine_surface_is_simplified():
    whole, simple = surface(), surface(triangles=600)
    assert len(whole.faces) > 1800
    assert 300 < len(simple.faces) <= 600
    distances, _ = cKDTree(whole.sample(50_000, seed=0)).query(simple.vertices)
    spacing = max(maker().slab(1.0).grid(1.0).spacing)
    assert distances.max() < spacing
    assert distances.mean() < spacing / 4
    assert np.linalg.norm(simple.vertex_normals, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_surface_below_the_cap_is_left_alone():
    enough = len(surface().faces)
    assert len(surface(triangles=enough).faces) == enough


@pytest.mark.parametrize("level", [-1e5, 1e5])
def test_no_surface(level):
    with pytest.raises(NoSurfaceError, match=f"no surface at the raw density {level:g}"):
        maker(level=level).glb(SAMPLE)


# --- rewards and names ---------------------------------------------------------------------------


def test_scores_are_the_rewards_own():
    reward = tiny_reward(SlabSettings(resolution=16, truncation_psi=0.9))
    samples = [Sample(5, 1.0), Sample(5, 0.25), Sample(6, 1.0)]
    scores = maker().scores(reward, samples)
    for sample, score in zip(samples, scores, strict=True):
        settings = replace(reward.settings, truncation_psi=sample.psi)
        slab = density_slab(tiny_generator(), [sample.seed], settings)
        assert score == float(reward.score_slab(slab)[0])
    assert len(set(scores)) == 3
    assert maker().scores(reward, []) == []


def test_every_setting_has_its_own_folder():
    others = {"resolution": 25, "slab": "face", "level": 7.5, "triangles": 5}
    assert others.keys() == MeshSettings.__dataclass_fields__.keys()
    keys = [cache_key("a", SETTINGS), cache_key("b", SETTINGS)]
    keys += [cache_key("a", replace(SETTINGS, **{k: v})) for k, v in others.items()]
    assert len(set(keys)) == len(keys)
    assert cache_key("a", replace(SETTINGS)) == keys[0]


def test_a_reward_has_a_time_stamp(tmp_path):
    assert reward_stamp(tmp_path) == 0
    tiny_reward().save(tmp_path)
    first = reward_stamp(tmp_path)
    assert first == reward_stamp(str(tmp_path)) > 0
    os.utime(tmp_path / "reward.safetensors", ns=(first + 1000, first + 1000))
    assert reward_stamp(tmp_path) == first + 1000
