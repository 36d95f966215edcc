"""Seeds to slabs: the paper's crop, normalisation, and the cache on disk."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_generator

from densityrl.errors import RunError
from densityrl.generator import latents
from densityrl.volume import (
    SlabSettings,
    VolumeCache,
    density_slab,
    normalize_slab,
    planes_of_seeds,
    slab_of_planes,
)
from triplane_kernels import density

SETTINGS = SlabSettings(resolution=16)


def test_the_papers_slab():
    assert SlabSettings(resolution=256).grid(1.0).shape == (128, 141, 129)
    assert SlabSettings(resolution=256, slab="full").grid(1.0).shape == (256, 256, 256)
    with pytest.raises(ValueError, match="face or full, not 'head'"):
        SlabSettings(slab="head").grid(1.0)


def test_a_slab_is_the_density_at_its_points():
    generator = tiny_generator()
    settings = SlabSettings(resolution=16, truncation_psi=0.6, truncation_cutoff=3)
    volume = density_slab(generator, [7], settings)
    ws = generator.mapping(latents([7], 8), truncation_psi=0.6, truncation_cutoff=3)
    grid = settings.grid(generator.box_side)
    points = grid.points().reshape(1, -1, 3)
    sigma = density(generator.planes(ws), generator.decoder, points, generator.layout)
    torch.testing.assert_close(volume, sigma.reshape(1, *grid.shape), rtol=1e-4, atol=1e-4)


def test_order_and_repetition_of_seeds():
    generator = tiny_generator()
    volumes = density_slab(generator, [5, 3, 5], SETTINGS, batch=2)
    assert torch.equal(volumes[0], volumes[2])
    assert not torch.equal(volumes[0], volumes[1])
    torch.testing.assert_close(volumes[1:2], density_slab(generator, [3], SETTINGS))
    assert density_slab(generator, [], SETTINGS).shape == (0, *SETTINGS.grid(1.0).shape)


def test_a_slab_has_a_gradient_to_every_parameter_that_makes_it():
    generator = tiny_generator().requires_grad_(True)
    slab_of_planes(generator, planes_of_seeds(generator, [0], SETTINGS), SETTINGS).sum().backward()
    silent = [name for name, p in generator.named_parameters() if p.grad is None]
    assert silent == []


def test_normalisation():
    torch.manual_seed(0)
    volumes = torch.randn(2, 3, 4, 5) * torch.tensor([1.0, 50.0])[:, None, None, None]
    scaled = normalize_slab(volumes)
    torch.testing.assert_close(scaled.amin(dim=(1, 2, 3)), torch.zeros(2))
    torch.testing.assert_close(scaled.amax(dim=(1, 2, 3)), torch.full((2,), 100.0))
    torch.testing.assert_close(normalize_slab(volumes * 3 + 7), scaled, rtol=1e-4, atol=1e-3)
    assert torch.equal(normalize_slab(torch.full((1, 2, 2, 2), 4.0)), torch.zeros(1, 2, 2, 2))
    exact = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize_slab, exact)


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_answers_without_the_generator(tmp_path, monkeypatch):
    generator = tiny_generator()
    cache = VolumeCache(tmp_path, generator, SETTINGS)
    fresh = density_slab(generator, [1, 2], SETTINGS, cache=cache)
    monkeypatch.setattr("densityrl.volume.planes_of_seeds", None)
    assert torch.equal(density_slab(generator, [2, 1], SETTINGS, cache=cache), fresh.flip(0))


def test_progress_counts_what_is_there(tmp_path):
    generator = tiny_generator()
    cache = VolumeCache(tmp_path, generator, SETTINGS)
    density_slab(generator, [1, 2], SETTINGS, cache=cache)
    told = []
    density_slab(
        generator, [0, 1, 2, 3, 4], SETTINGS, cache=cache, batch=2, on_progress=told.append
    )
    assert told == [4, 5]


def test_other_weights_or_settings_are_another_folder(tmp_path):
    generator = tiny_generator()
    folders = {
        VolumeCache(tmp_path, g, settings).folder
        for g in (generator, tiny_generator(1))
        for settings in (SETTINGS, replace(SETTINGS, truncation_psi=0.5))
    }
    assert len(folders) == 4
    assert VolumeCache(tmp_path, tiny_generator(), SETTINGS).folder in folders


@pytest.mark.parametrize(
    "content", [b"", b"not numpy", "truncated", "other shape", "other type"], ids=str
)
def test_a_file_that_is_not_a_volume_is_an_error(tmp_path, content):
    cache = VolumeCache(tmp_path, tiny_generator(), SETTINGS)
    file = cache.folder / "seed0000000004.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "truncated":
        cache.put(4, np.zeros(cache.shape))
        file.write_bytes(file.read_bytes()[:-9])
    elif content == "other shape":
        cache.put(4, np.zeros((2, 2, 2)))
    else:
        np.save(file, np.zeros(cache.shape, dtype=np.float64))
    with pytest.raises(RunError, match=r"seed0000000004\.npy .*delete it"):
        cache.get(4)


def test_a_kill_in_the_middle_of_a_write_leaves_no_volume(tmp_path):
    """The process dies between writing a volume and giving it its name."""
    save_tiny(tmp_path / "generator")
    script = """
import os, sys
from pathlib import Path
from densityrl.generator import load_generator
from densityrl.volume import SlabSettings, VolumeCache, density_slab

settings = SlabSettings(resolution=16)
generator = load_generator(sys.argv[1])
cache = VolumeCache(sys.argv[2], generator, settings)
density_slab(generator, [1], settings, cache=cache)
Path.replace = lambda *_: os._exit(9)
density_slab(generator, [1, 2], settings, cache=cache)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "generator"), str(tmp_path / "cache")],
        check=False,
        env=os.environ,
    )
    assert killed.returncode == 9
    generator = tiny_generator()
    cache = VolumeCache(tmp_path / "cache", generator, SETTINGS)
    assert len(list(cache.folder.glob("*.partial"))) == 1
    assert cache.get(1) is not None
    assert cache.get(2) is None
    whole = density_slab(generator, [1, 2], SETTINGS, cache=cache)
    torch.testing.assert_close(whole, density_slab(generator, [1, 2], SETTINGS))
