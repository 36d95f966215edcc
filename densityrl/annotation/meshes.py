"""Samples to the surfaces that an annotator sees, made in a process of their own.

The server stays free of torch and answers while a surface is being made.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from densityrl.config import MeshSettings
from densityrl.errors import DensityRLError
from densityrl.preference.store import Sample
from densityrl.run import atomic_write, name_of

if TYPE_CHECKING:
    from densityrl.generator import TriplaneGenerator
    from densityrl.reward import RewardModel
    from densityrl.volume import SlabSettings
    from triplane_kernels import Grid

LEVEL_SAMPLES = 4  # whose histogram suggests a level
OPACITY_LENGTH = 1 / 128  # of the box's side, over which opacity is counted


class NoSurfaceError(DensityRLError):
    """The density of a sample crosses the level nowhere."""


@dataclass(frozen=True)
class Opened:
    """What the process that makes surfaces found when it started."""

    fingerprint: str  # of the generator
    settings: MeshSettings  # with the level
    suggested_level: float
    lo: tuple[float, float, float]  # of the box that is shown, world units
    hi: tuple[float, float, float]
    process: int  # its number

    @property
    def level(self) -> float:
        assert self.settings.level is not None
        return self.settings.level


def suggest_level(sigma: np.ndarray, box_side: float) -> float:
    """A raw density that parts what is opaque from what is clear, for volumes of any shape.

    Otsu's threshold (IEEE Trans. SMC 9, 1979, p. 62) of the histogram of opacities over a length
    d, 1/128 of the box's side, taken back to a density: opacity = 1 - exp(-softplus(sigma - 1) d),
    as light is attenuated in EG3D (arXiv:2112.07945). Raw densities themselves have no histogram
    of two humps where they grow without bound on either side. ValueError for a constant volume.
    """
    from skimage.filters import threshold_otsu

    length = OPACITY_LENGTH * box_side
    density = np.logaddexp(0, sigma.astype(np.float64) - 1)
    opacity = 1 - np.exp(-density * length)
    if np.ptp(opacity) == 0:
        raise ValueError("the density is the same everywhere, so no level parts it")
    density_there = -np.log1p(-float(threshold_otsu(opacity))) / length
    # The inverse of softplus, for a density that may be large.
    return float(1 + density_there + np.log(-np.expm1(-density_there)))


class MeshMaker:
    """Surfaces and scores of one generator's samples; surfaces need a level in the settings."""

    def __init__(self, generator: TriplaneGenerator, settings: MeshSettings) -> None:
        self.generator = generator
        self.settings = settings

    def slab(self, psi: float) -> SlabSettings:
        from densityrl.volume import SlabSettings

        settings = self.settings
        return SlabSettings(resolution=settings.resolution, slab=settings.slab, truncation_psi=psi)

    def glb(self, sample: Sample) -> bytes | str:
        """The surface of a sample as binary glTF: positions, normals, colours, triangles.

        Colours are the first three features of the decoder, what the generator renders before
        any super-resolution, at the vertices. NoSurfaceError where the level is crossed nowhere.
        """
        import torch

        from densityrl.export import encoded_mesh
        from densityrl.volume import planes_of_seeds, slab_of_planes

        slab = self.slab(sample.psi)
        grid = slab.grid(self.generator.box_side)
        with torch.no_grad():
            planes = planes_of_seeds(self.generator, [sample.seed], slab)
            sigma = slab_of_planes(self.generator, planes, slab)[0].cpu().numpy()
            surface = self._surface(sigma, grid)
            colors = self._colors(planes, surface[0])
            normals = _normals(sigma, grid, surface[0])
        return encoded_mesh("glb", *surface, normals=normals, colors=colors)

    def _surface(self, sigma: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        from densityrl.export import extract_surface

        level, most = self.settings.level, self.settings.triangles
        assert level is not None
        surface = extract_surface(sigma, grid, level)
        if surface is None:
            raise NoSurfaceError(f"this sample has no surface at the raw density {level:g}")
        vertices, faces = surface
        if len(faces) > most:
            import fast_simplification

            vertices, faces = fast_simplification.simplify(
                np.ascontiguousarray(vertices, dtype=np.float32),
                np.ascontiguousarray(faces),
                target_count=most,
            )
        return vertices, faces

    def _colors(self, planes: Any, vertices: np.ndarray) -> np.ndarray | None:
        """[V, 3] uint8 sRGB; None for a decoder of fewer than three features."""
        import torch

        from densityrl.generator.render import eg3d_color
        from triplane_kernels import radiance

        points = torch.from_numpy(np.ascontiguousarray(vertices, dtype=np.float32)).to(planes)
        _, raw = radiance(planes, self.generator.decoder, points[None], self.generator.layout)
        if raw.shape[-1] < 3:
            return None
        colors = eg3d_color(raw[0, :, :3].float()).clamp(0, 1)
        return (colors * 255).round().byte().cpu().numpy()

    def suggested_level(self, seeds: Sequence[int], psi: float) -> float:
        """`suggest_level` of the volumes of these seeds taken together."""
        from densityrl.volume import density_slab

        volumes = density_slab(self.generator, seeds, self.slab(psi))
        return suggest_level(volumes.cpu().numpy(), self.generator.box_side)

    def scores(self, reward: RewardModel, samples: Sequence[Sample]) -> list[float]:
        """The reward of each sample, on the slab that the reward was trained on."""
        from densityrl.volume import density_slab

        values = []
        for sample in samples:
            settings = replace(reward.settings, truncation_psi=sample.psi)
            slab = density_slab(self.generator, [sample.seed], settings)
            values.append(float(reward.score_slab(slab)[0]))
        return values


def _normals(sigma: np.ndarray, grid: Grid, vertices: np.ndarray) -> np.ndarray:
    """[V, 3] unit normals out of what is dense: the volume's slope, not the triangles'.

    A simplified surface is then shaded as smoothly as the one it was made from.
    """
    from scipy.ndimage import map_coordinates

    spacing = np.array(grid.spacing)
    at = ((vertices - np.array(grid.lo)) / spacing).T
    normals = np.empty(vertices.shape, dtype=np.float32)
    for axis in range(3):
        step = np.zeros((3, 1))
        step[axis] = 1
        ahead = map_coordinates(sigma, at + step, order=1, mode="nearest")
        behind = map_coordinates(sigma, at - step, order=1, mode="nearest")
        normals[:, axis] = (behind - ahead) / spacing[axis]
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


# --- in the process that makes surfaces ----------------------------------------------------------


def begin_process() -> None:
    """Ends with the server, even one that is killed, and leaves an interrupt to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_maker: MeshMaker | None = None
_reward: tuple[tuple[str, int], RewardModel] | None = None  # with its directory and its time


def open_generator(
    name: str,
    device: str,
    settings: MeshSettings,
    seeds: Sequence[int],
    psi: float,
) -> Opened:
    """Load the generator that this process makes surfaces of; the first call that it gets.

    seeds: of the volumes that suggest a level.
    """
    global _maker
    from densityrl.generator import load_generator

    generator = load_generator(name, device)
    _maker = MeshMaker(generator, settings)
    try:
        suggested = _maker.suggested_level(seeds, psi)
    except ValueError as error:
        raise DensityRLError(f"nothing of {name} can be shown: {error}") from None
    if settings.level is None:
        settings = _maker.settings = replace(settings, level=suggested)
    grid = _maker.slab(psi).grid(generator.box_side)
    return Opened(
        fingerprint=generator.fingerprint(),
        settings=settings,
        suggested_level=suggested,
        lo=grid.lo,
        hi=grid.hi,
        process=os.getpid(),
    )


def make_mesh(sample: Sample, path: str) -> None:
    """Write the surface of a sample, whole or not at all."""
    assert _maker is not None, "open_generator comes first"
    atomic_write(path, _maker.glb(sample))


def reward_scores(directory: str, samples: Sequence[Sample]) -> tuple[int, list[float]]:
    """The time stamp of a reward and its scores of samples; reads it again when it has changed."""
    global _reward
    from densityrl.reward import RewardModel

    assert _maker is not None, "open_generator comes first"
    stamp = reward_stamp(directory)
    if _reward is None or _reward[0] != (directory, stamp):
        model = RewardModel.load(directory, _maker.generator.device)
        model.check(_maker.generator)
        _reward = (directory, stamp), model
    return stamp, _maker.scores(_reward[1], samples)


def reward_stamp(directory: str | Path) -> int:
    """Changes when the reward does; 0 where there is none."""
    from densityrl.reward.model import WEIGHTS

    path = Path(directory) / WEIGHTS
    return path.stat().st_mtime_ns if path.exists() else 0


def cache_key(fingerprint: str, settings: MeshSettings) -> str:
    """A name for a folder of surfaces, another one for another generator or setting."""
    return name_of({"generator": fingerprint, **asdict(settings)})
