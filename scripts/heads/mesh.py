"""Triangle meshes in the box [-1/2, 1/2]^3: normals, columns of voxels, solids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Lines through pixel centres are moved by this much of a pixel, off edges that meshes share.
OFF_EDGE = (1e-5, 2e-5)


class Hits(NamedTuple):
    """Where lines along z meet triangles; arrays of one length."""

    triangle: np.ndarray  # index
    x: np.ndarray  # pixel
    y: np.ndarray
    z: np.ndarray  # world
    weights: np.ndarray  # [N, 3] barycentric
    facing: np.ndarray  # +1 where the triangle faces +z, -1 where -z


def vertex_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3], weighted by the area of the triangles [F, 3] around."""
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    cross = np.cross(b - a, c - a)
    ends = triangles.T.reshape(-1)
    normals = np.stack(
        [np.bincount(ends, np.tile(cross[:, k], 3), len(vertices)) for k in range(3)], axis=1
    )
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)


def hits_along_z(vertices: np.ndarray, triangles: np.ndarray, resolution: int) -> Hits:
    """Meet triangles with the lines through the centres of resolution^2 pixels of the box."""
    pixels = (vertices[:, :2].astype(np.float64) + 0.5) * resolution - 0.5 + OFF_EDGE
    corners = pixels[triangles]  # [F, 3, 2]
    low = np.maximum(np.ceil(corners.min(axis=1)).astype(int), 0)
    high = np.minimum(np.floor(corners.max(axis=1)).astype(int), resolution - 1)
    size = np.maximum(high - low + 1, 0)
    count = size[:, 0] * size[:, 1]
    triangle = np.repeat(np.arange(len(triangles)), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    x = low[triangle, 0] + within // np.maximum(size[triangle, 1], 1)
    y = low[triangle, 1] + within % np.maximum(size[triangle, 1], 1)

    a, b, c = corners[triangle].transpose(1, 0, 2)
    to_b, to_c, to_pixel = b - a, c - a, np.stack([x, y], axis=1) - a
    area = to_b[:, 0] * to_c[:, 1] - to_b[:, 1] * to_c[:, 0]
    flat = area == 0
    safe = np.where(flat, 1.0, area)
    u = (to_pixel[:, 0] * to_c[:, 1] - to_pixel[:, 1] * to_c[:, 0]) / safe
    v = (to_b[:, 0] * to_pixel[:, 1] - to_b[:, 1] * to_pixel[:, 0]) / safe
    inside = (u >= 0) & (v >= 0) & (u + v <= 1) & ~flat
    triangle, weights = triangle[inside], np.stack([1 - u - v, u, v], axis=1)[inside]
    z = (vertices[triangles[triangle], 2] * weights).sum(axis=1)
    return Hits(triangle, x[inside], y[inside], z, weights, np.sign(area[inside]))


def voxelize(vertices: np.ndarray, triangles: np.ndarray, resolution: int) -> np.ndarray:
    """Which voxel centres lie inside a closed mesh whose triangles face outward; [X, Y, Z] bool."""
    hits = hits_along_z(vertices, triangles, resolution)
    entered = np.zeros((resolution, resolution, resolution + 1), dtype=np.int32)
    first = np.clip(np.ceil((hits.z + 0.5) * resolution - 0.5), 0, resolution).astype(int)
    np.add.at(entered, (hits.x, hits.y, first), -hits.facing.astype(np.int32))
    return np.cumsum(entered, axis=2)[:, :, :resolution] > 0


def front_most(vertices: np.ndarray, triangles: np.ndarray, resolution: int) -> Hits:
    """The hits that are seen from +z: at most one a pixel."""
    hits = hits_along_z(vertices, triangles, resolution)
    order = np.lexsort((-hits.z, hits.y, hits.x))
    x, y = hits.x[order], hits.y[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
    return Hits(*(field[order[first]] for field in hits))
