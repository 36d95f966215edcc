"""Measures of the surface in one density volume, sharper than the voxels it is sampled on.

Volumes are raw density [X, Y, Z] on a `Grid`, larger inside; the surface is where it passes
`level`. What leaves the volume is cut off there, and the cut is no surface.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from densityrl.export import SURFACE_LEVEL
from triplane_kernels import Grid

LIMIT = 0.05  # world units; the most that one point of a surface counts in a distance
FINE, COARSE = 0.02, 0.05  # world units; the two scales on which roughness compares curvature

# World units, where the nose of a face in a box of side 1 is looked for in the frontal view.
NOSE_X, NOSE_Y = 0.035, (-0.10, 0.08)  # half width of the nose; lowest and highest tip
CHEEK_X, CHEEK_Y = (0.05, 0.10), 0.03  # distance from the middle; half height around the tip


class _Surface(NamedTuple):
    vertices: np.ndarray  # [V, 3] in world units
    normals: np.ndarray  # [V, 3], of length 1, all to the same side


def surface_distance(
    a: np.ndarray,
    b: np.ndarray,
    grid: Grid,
    level: float = SURFACE_LEVEL,
    limit: float = LIMIT,
) -> float:
    """Mean distance between the surfaces of two volumes [X, Y, Z] on one grid, in world units.

    The mean over the marching cubes vertices of both surfaces, either one's weighing half. A
    vertex counts the distance to the nearest vertex of the other surface, measured along the
    mean of the two normals, which is exact between concentric spheres; where the two do not face
    the same way, or lie beside each other, it counts the distance itself. No vertex counts more
    than `limit`, so that a floater weighs no more than its size. Where either volume has no
    surface the distance is `limit`.
    """
    first, second = _surface(a, grid, level), _surface(b, grid, level)
    if first is None or second is None:
        return limit
    there, back = _distances(first, second, grid), _distances(second, first, grid)
    return float(np.minimum(there, limit).mean() + np.minimum(back, limit).mean()) / 2


def roughness(sigma: np.ndarray, grid: Grid, level: float = SURFACE_LEVEL) -> float:
    """Mean height of the bumps and dents on the surface of [X, Y, Z], in world units.

    The solid blurred by a Gaussian of width s has the value 1/2 - s H / sqrt(2 pi) on a surface
    of mean curvature H; solved for H, that is the curvature H_s at scale s. The result is the
    mean over the vertices of FINE^2 |H_FINE - H_COARSE|. Waves A cos(k x) have
    H_s = A cos(k x) (1 - exp(-s^2 k^2 / 2)) / s^2: those 0.03 to 0.08 long count with more than
    half of their height, longer ones with less. A sphere has the same H at either scale, so the
    size of a head does not matter.

    Vertices within COARSE of the volume's faces do not count, because their surroundings are cut
    off. Where no others are left the result is FINE, more than any head has.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    surface = _surface(sigma, grid, level)
    if surface is None:
        return FINE
    vertices = surface.vertices[_face_distance(surface.vertices, grid) >= COARSE]
    if len(vertices) == 0:
        return FINE

    spacing = np.array(grid.spacing)
    slope = np.linalg.norm(np.stack(np.gradient(sigma, *spacing)), axis=0)
    # How much of each voxel is inside, from its distance to the surface: (sigma - level) / slope.
    # Far from the surface the slope may be 0.
    deep = sigma - level
    share = deep / np.maximum(slope * spacing.mean(), np.maximum(np.abs(deep), 1e-12))
    inside = np.clip(share + 0.5, 0, 1)
    at = ((vertices - np.array(grid.lo)) / spacing).T

    def curvature(scale: float) -> np.ndarray:
        blurred = gaussian_filter(inside, scale / spacing, mode="nearest", truncate=3)
        return np.sqrt(2 * np.pi) / scale * (0.5 - map_coordinates(blurred, at, order=1))

    return float(FINE**2 * np.abs(curvature(FINE) - curvature(COARSE)).mean())


def asymmetry(sigma: np.ndarray, grid: Grid, level: float = SURFACE_LEVEL) -> float:
    """`surface_distance` between a volume [X, Y, Z] and its mirror image in x, in world units.

    Raises ValueError for a grid that is not the same on both sides of x = 0.
    """
    if abs(grid.lo[0] + grid.hi[0]) > 1e-6 * grid.spacing[0]:
        raise ValueError(
            f"asymmetry needs a grid centred at x = 0, not one from {grid.lo[0]} to {grid.hi[0]}"
        )
    surface = _surface(sigma, grid, level)
    if surface is None:
        return LIMIT
    # Mirrored vertices rather than a mirrored volume; either direction then has the same mean.
    flip = np.array([-1, 1, 1], dtype=np.float32)
    mirrored = _Surface(surface.vertices * flip, surface.normals * flip)
    return float(np.minimum(_distances(surface, mirrored, grid), LIMIT).mean())


def nose_length(sigma: np.ndarray, grid: Grid, level: float = SURFACE_LEVEL) -> float:
    """How far the tip of the nose stands out in front of the cheeks, in world units.

    Read from the depth map of [X, Y, Z] seen from +z, of its largest connected solid: floaters
    are invisible. The tip is the foremost point within NOSE_X and NOSE_Y, the cheeks are the
    median depth within CHEEK_X on both sides and CHEEK_Y above and below the tip. 0 where there
    is nothing to see.
    """
    depth = _front(sigma, grid, level)
    x, y = (grid.coordinates(axis).numpy() for axis in (0, 1))
    middle = (np.abs(x) < NOSE_X)[:, None] & ((y > NOSE_Y[0]) & (y < NOSE_Y[1]))
    nose = np.where(middle, depth, -np.inf)
    tip = nose.max(initial=-np.inf)
    if tip == -np.inf:
        return 0.0
    tip_y = y[nose.max(axis=0).argmax()]
    sides = (np.abs(x) > CHEEK_X[0]) & (np.abs(x) < CHEEK_X[1])
    cheeks = depth[sides[:, None] & (np.abs(y - tip_y) <= CHEEK_Y)]
    cheeks = cheeks[cheeks > -np.inf]
    return float(tip - np.median(cheeks)) if len(cheeks) else 0.0


def _check_shape(sigma: np.ndarray, grid: Grid) -> None:
    if sigma.shape != grid.shape:
        raise ValueError(f"a volume {sigma.shape} does not belong on a grid {grid.shape}")


def _surface(sigma: np.ndarray, grid: Grid, level: float) -> _Surface | None:
    """Vertices and normals where a volume [X, Y, Z] passes the level; None if nowhere."""
    from skimage.measure import marching_cubes

    _check_shape(sigma, grid)
    if not sigma.min() < level < sigma.max():
        return None
    steps, _, normals, _ = marching_cubes(sigma, level, gradient_direction="ascent")
    spacing = np.array(grid.spacing, dtype=np.float32)
    normals = normals / spacing  # a gradient by index becomes one by position
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return _Surface(steps * spacing + np.array(grid.lo, dtype=np.float32), normals)


def _distances(a: _Surface, b: _Surface, grid: Grid) -> np.ndarray:
    """[V] distances of a's vertices from the surface b, as `surface_distance` counts them."""
    from scipy.spatial import cKDTree

    direct, nearest = cKDTree(b.vertices).query(a.vertices)
    normals = b.normals[nearest]
    offset = a.vertices - b.vertices[nearest]
    across = np.abs(np.sum(offset * (a.normals + normals), axis=1)) / 2
    facing = np.sum(a.normals * normals, axis=1) > 0.5
    beside = np.sqrt(np.maximum(direct**2 - across**2, 0))
    matched = facing & (beside < 2 * max(grid.spacing))
    # What has no counterpart may have one beyond the face of the volume, no nearer than the face.
    return np.where(matched, across, np.minimum(direct, _face_distance(a.vertices, grid)))


def _face_distance(points: np.ndarray, grid: Grid) -> np.ndarray:
    """[N] distances of points [N, 3] inside the volume from the nearest of its six faces."""
    return np.minimum(points - np.array(grid.lo), np.array(grid.hi) - points).min(axis=1)


def _front(sigma: np.ndarray, grid: Grid, level: float) -> np.ndarray:
    """[X, Y] z of the foremost surface of the largest solid; -inf where a ray passes it by."""
    from scipy.ndimage import label

    _check_shape(sigma, grid)
    parts, count = label(sigma > level)
    if count == 0:
        return np.full(grid.shape[:2], -np.inf)
    solid = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    last = grid.shape[2] - 1
    first = last - solid[:, :, ::-1].argmax(axis=2)
    before = np.minimum(first + 1, last)
    inner, outer = (
        np.take_along_axis(sigma, index[:, :, None], axis=2)[:, :, 0] for index in (first, before)
    )
    # A solid that reaches the front face is seen on that face: before == first there.
    step = np.where(before > first, inner - level, 0) / np.where(before > first, inner - outer, 1)
    depth = grid.lo[2] + (first + step) * grid.spacing[2]
    return np.where(solid.any(axis=2), depth, -np.inf)
