"""Labelled points of clean heads: what the generator is trained on.

No distance library is needed: a point is put at a known distance from the surface, along its
normal, and the sign is corrected where a voxelised solid says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from multiprocessing import get_context

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion

from heads.face_model import FACE, HEAD_NECK, ClosedHead, FaceModel, to_box
from heads.faults import FLOATER_SCREEN, screen
from heads.latent import APPEARANCE, IDENTITY, draw
from heads.mesh import front_most, vertex_normals, voxelize
from heads.paint import Painter

BAND = 0.02  # world units: distances are known up to here, beyond only the sign
NEAR, FAR = 10_000, 4_000  # points a head
VOXELS = 128


@dataclass
class Bank:
    """Points of N clean heads, packed; row i belongs to latent u[i]."""

    u: np.ndarray  # [N, Z_DIM] normalised latents
    points: np.ndarray  # [N, NEAR + FAR, 3] int16, world units / 65534
    distance: np.ndarray  # [N, NEAR + FAR] float16, negative inside; +-1 beyond the band
    color: np.ndarray  # [N, NEAR, 3] uint8, of the near points
    landmarks: np.ndarray  # [N, 68, 2] float32, on the screen
    floater_color: np.ndarray  # [N, 3] float32


class HeadMaker:
    """Normalised latent to a clean head: vertices in the box, normals, colours."""

    def __init__(self, model: FaceModel) -> None:
        self.closed = ClosedHead(model)
        self.painter = Painter(self.closed)
        self.solid = self.painter.solid
        self.weight = self._sampling_weight(model)

    def head(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """u [Z_DIM] -> vertices [V, 3], unit normals [V, 3], colours [V, 3]."""
        v = self.painter.with_hair(self.closed.vertices_cm(u[IDENTITY]), u[APPEARANCE])
        normals = vertex_normals(v, self.solid)
        return to_box(v), normals, self.painter.colors(normals, u[APPEARANCE])

    def landmarks(self, vertices: np.ndarray) -> np.ndarray:
        """[68, 2] on the screen."""
        return screen(torch.from_numpy(vertices[self.closed.model.landmarks])).numpy()

    def _sampling_weight(self, model: FaceModel) -> np.ndarray:
        """[F] of `solid`: points an area, relative; most around eyes, nose and mouth.

        Of the eyeballs only what shows between the lids is sampled.
        """
        v = self.closed.vertices_cm(np.zeros(len(model.modes)))
        x, y, z = v[self.solid].mean(axis=1).T
        skin = len(self.closed.skin)
        weight = np.ones(len(self.solid))
        region = model.region[np.isin(model.region, (FACE, HEAD_NECK))]  # as the skin begins
        weight[: len(region)][region == FACE] = 2.5
        weight[:skin][~self.closed.is_surface] = 0
        seen = np.zeros(len(self.solid), dtype=bool)
        seen[front_most(to_box(v), self.solid, 1024).triangle] = True
        weight[skin:] = np.where(seen[skin:], 8.0, 0.0)
        around_eyes = (np.abs(x) < 5.5) & (np.abs(y - 3.0) < 2.2) & (z > 6)
        weight[around_eyes] *= 2.0
        features = (np.abs(x) < 6) & (y < 7) & (y > -8) & (z > 6)
        weight[features] *= 2.0
        return weight

    def bank_row(self, u: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The fields of a `Bank` for one head."""
        v, normals, colors = self.head(u)
        points, distance, color = self._near(v, normals, colors, rng)
        inside = voxelize(v, self.closed.skin, VOXELS) | voxelize(v, self.closed.eyes, VOXELS)
        shrunk, grown = binary_erosion(inside), binary_dilation(inside)
        at = _voxel(points)
        distance = np.where((distance < 0) & ~grown[at], 0.4 * BAND, distance)
        distance = np.where((distance > 0) & shrunk[at], -0.4 * BAND, distance)
        out = np.abs(points).max(axis=1) > 0.5
        distance[out] = np.nan
        surely_inside = binary_erosion(shrunk, iterations=2)
        maybe_inside = binary_dilation(grown, iterations=2)
        far, sign = self._far(surely_inside, maybe_inside, rng)
        return {
            "points": np.round(np.clip(np.concatenate([points, far]), -0.5, 0.5) * 65534),
            "distance": np.concatenate([distance, sign]),
            "color": np.round(color * 255),
            "landmarks": self.landmarks(v),
            "floater_color": self._floater_color(v, colors),
        }

    def _near(
        self, v: np.ndarray, normals: np.ndarray, colors: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        corners = v[self.solid]
        edge_b, edge_c = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        density = np.linalg.norm(np.cross(edge_b, edge_c), axis=1) * self.weight
        density[corners.mean(axis=1).min(axis=1) < -0.53] = 0
        chosen = self.solid[rng.choice(len(density), NEAR, p=density / density.sum())]
        b, c = rng.random((2, NEAR))
        b, c = np.where(b + c > 1, (1 - b, 1 - c), (b, c))
        weights = np.stack([1 - b - c, b, c], axis=1)[..., None]
        on_surface, normal, color = (
            (field[chosen] * weights).sum(axis=1) for field in (v, normals, colors)
        )
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        close = rng.normal(0, 0.3 * BAND, NEAR)
        wide = rng.uniform(-1.2 * BAND, 1.2 * BAND, NEAR)
        distance = np.where(rng.random(NEAR) < 0.6, close, wide)
        return on_surface + normal * distance[:, None], distance, color

    @staticmethod
    def _far(
        surely_inside: np.ndarray, maybe_inside: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points [FAR, 3] anywhere, a quarter on the faces of the box, where planes fade out."""
        points = rng.uniform(-0.5, 0.5, (2 * FAR, 3))
        on_face = np.arange(2 * FAR) % 4 == 0
        axis = rng.integers(3, size=2 * FAR)
        side = np.where(rng.random(2 * FAR) < 0.5, -0.5, 0.5)
        points[on_face, axis[on_face]] = side[on_face]
        at = _voxel(points)
        known = np.flatnonzero(surely_inside[at] | ~maybe_inside[at])[:FAR]
        points = points[known]
        return points, np.where(surely_inside[_voxel(points)], -1.0, 1.0)

    def _floater_color(self, v: np.ndarray, colors: np.ndarray) -> np.ndarray:
        """[3]: the colour that the frontal camera sees where the floater would be."""
        at = screen(torch.from_numpy(v)).numpy()
        near = np.linalg.norm(at - FLOATER_SCREEN, axis=1) < 0.015
        if not near.any():  # a narrow head does not reach so far
            return np.ones(3)
        return colors[near & (v[:, 2] > v[near, 2].max() - 0.03)].mean(axis=0)


def _voxel(points: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.clip(((points + 0.5) * VOXELS).astype(int), 0, VOXELS - 1).T)


def make_bank(model: FaceModel, heads: int, seed: int, workers: int) -> Bank:
    """Points of `heads` clean heads, the same for the same seed whatever the workers."""
    u = draw(heads, torch.Generator().manual_seed(seed)).numpy()
    parts = np.array_split(np.arange(heads), workers)
    jobs = [(model, u[part], seed, part) for part in parts]
    with get_context("spawn").Pool(workers) as pool:
        banks = pool.starmap(_bank_of, jobs)
    return Bank(
        **{
            field.name: np.concatenate([getattr(bank, field.name) for bank in banks])
            for field in fields(Bank)
        }
    )


def _bank_of(model: FaceModel, u: np.ndarray, seed: int, indices: np.ndarray) -> Bank:
    maker = HeadMaker(model)
    count = len(u)
    bank = Bank(
        u=u,
        points=np.empty((count, NEAR + FAR, 3), np.int16),
        distance=np.empty((count, NEAR + FAR), np.float16),
        color=np.empty((count, NEAR, 3), np.uint8),
        landmarks=np.empty((count, 68, 2), np.float32),
        floater_color=np.empty((count, 3), np.float32),
    )
    for row, index in enumerate(indices):
        made = maker.bank_row(u[row], np.random.default_rng([seed, index]))
        for name, value in made.items():
            getattr(bank, name)[row] = value
    return bank
