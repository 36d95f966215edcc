"""Seeds to density slabs: what a reward model reads, made once and kept on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from densityrl.errors import RunError
from densityrl.generator.model import TriplaneGenerator, latents
from densityrl.run import atomic_write, name_of
from triplane_kernels import Grid, density_grid

# Fraction of the points cut off each face of the cube: ((left, right), (bottom, top), (rear,
# front)); the paper's crop around the face, 128 x 141 x 129 of 256^3 (arXiv:2606.27305).
FACE_CROP = ((0.25, 0.25), (0.25, 0.2), (0.4, 0.1))


@dataclass(frozen=True, kw_only=True)
class SlabSettings:
    """Which part of the density field is read, and how it is sampled from a latent.

    The defaults are the paper's but for the resolution, where it has 256 points a side.
    """

    resolution: int = 64  # points a side of the whole box
    slab: Literal["face", "full"] = "face"
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = 14

    def grid(self, box_side: float) -> Grid:
        """The grid in a box of the given side (world units)."""
        if self.slab == "full":
            return Grid.cube(self.resolution, box_side)
        if self.slab == "face":
            return Grid.slab(self.resolution, box_side, FACE_CROP)
        raise ValueError(f"slab must be face or full, not {self.slab!r}")


def normalize_slab(sigma: Tensor, low: float = 0.0, high: float = 100.0) -> Tensor:
    """Min-max of each volume of [B, X, Y, Z] to [low, high], the paper's normalisation.

    A constant volume becomes `low`. Differentiable.
    """
    smallest = sigma.amin(dim=(1, 2, 3), keepdim=True)
    spread = sigma.amax(dim=(1, 2, 3), keepdim=True) - smallest
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    return (sigma - smallest) / spread * (high - low) + low


def slab_of_planes(generator: TriplaneGenerator, planes: Tensor, settings: SlabSettings) -> Tensor:
    """Raw density [B, X, Y, Z] of planes the generator made; differentiable."""
    grid = settings.grid(generator.box_side)
    return density_grid(planes, generator.decoder, grid, generator.layout)


def ws_of_seeds(
    generator: TriplaneGenerator, seeds: Sequence[int], settings: SlabSettings
) -> Tensor:
    """ws [B, L, w_dim] of seeds, truncated as the settings say; frontal conditioning camera."""
    return generator.mapping(
        latents(seeds, generator.z_dim).to(generator.device),
        truncation_psi=settings.truncation_psi,
        truncation_cutoff=settings.truncation_cutoff,
    )


def planes_of_seeds(
    generator: TriplaneGenerator, seeds: Sequence[int], settings: SlabSettings
) -> Tensor:
    """Planes [B, 3, C, H, W] of seeds, with constant noise; see `ws_of_seeds`."""
    return generator.planes(ws_of_seeds(generator, seeds, settings), noise_mode="const")


@torch.no_grad()
def density_slab(
    generator: TriplaneGenerator,
    seeds: Sequence[int],
    settings: SlabSettings | None = None,
    *,
    cache: VolumeCache | None = None,
    batch: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Raw density slabs [len(seeds), X, Y, Z] float32 on the generator's device.

    With a cache, volumes are read from it where they are and added where they are not.
    `on_progress` is told how many are done. No gradient; see `slab_of_planes` for that.
    """
    settings = settings or SlabSettings()
    volumes: dict[int, Tensor] = {}
    if cache is not None:
        for seed in seeds:
            if (found := cache.get(seed)) is not None:
                volumes[seed] = torch.from_numpy(found)
    missing = [seed for seed in dict.fromkeys(seeds) if seed not in volumes]
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        sigma = slab_of_planes(generator, planes_of_seeds(generator, part, settings), settings)
        for seed, volume in zip(part, sigma.cpu(), strict=True):
            volumes[seed] = volume
            if cache is not None:
                cache.put(seed, volume.numpy())
        if on_progress is not None:
            on_progress(len(seeds) - len(missing) + start + len(part))
    if not volumes:
        return torch.empty(0, *settings.grid(generator.box_side).shape, device=generator.device)
    return torch.stack([volumes[seed] for seed in seeds]).to(generator.device)


class VolumeCache:
    """Slabs on disk, one file a seed, in a folder named by generator and settings.

    A changed weight or setting is another folder, so a stale volume is never read; a file
    appears only when it is whole.
    """

    def __init__(self, root: str | Path, generator: TriplaneGenerator, settings: SlabSettings):
        key = {"generator": generator.fingerprint(), **asdict(settings)}
        self.shape = tuple(settings.grid(generator.box_side).shape)
        self.folder = Path(root) / name_of(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            atomic_write(self.folder / "key.json", json.dumps(key, indent=1))

    def _file(self, seed: int) -> Path:
        return self.folder / f"seed{seed:010d}.npy"

    def get(self, seed: int) -> np.ndarray | None:
        """The volume [X, Y, Z] of a seed, or None; RunError if the file is not one of ours."""
        try:
            volume = np.load(self._file(seed), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError) as error:
            raise RunError(f"{self._file(seed)} is unreadable ({error}): delete it") from None
        if volume.shape != self.shape or volume.dtype != np.float32:
            raise RunError(
                f"{self._file(seed)} holds {volume.dtype} {volume.shape}, expected float32 "
                f"{self.shape}: delete it"
            )
        return volume

    def put(self, seed: int, volume: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(volume, dtype=np.float32))
        atomic_write(self._file(seed), buffer.getvalue())
