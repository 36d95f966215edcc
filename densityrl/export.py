"""Volumes and meshes in files that other tools read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from densityrl.run import atomic_write
from triplane_kernels import Grid

SURFACE_LEVEL = 10.0  # raw density at which the paper meshes


def write_volume(path: str | Path, sigma: np.ndarray, grid: Grid) -> None:
    """One `.npz`: sigma [X, Y, Z] float32, and the world positions lo, hi of its end points."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, sigma=sigma.astype(np.float32), lo=np.array(grid.lo), hi=np.array(grid.hi)
    )
    atomic_write(path, buffer.getvalue())


def extract_surface(
    sigma: np.ndarray, grid: Grid, level: float = SURFACE_LEVEL
) -> tuple[np.ndarray, np.ndarray] | None:
    """Marching cubes at raw density `level`.

    Returns vertices [V, 3] in world units and triangles [F, 3], counter-clockwise seen from
    outside, or None where the density crosses the level nowhere. A surface that leaves the
    volume stays open there.
    """
    from skimage.measure import marching_cubes

    if not sigma.min() < level < sigma.max():
        return None
    # scikit-image winds by the left-hand rule, so "ascent" turns the faces of what is denser out.
    vertices, faces, _, _ = marching_cubes(
        sigma, level, spacing=tuple(grid.spacing), gradient_direction="ascent"
    )
    return vertices + np.array(grid.lo, dtype=vertices.dtype), faces


def encoded_mesh(
    kind: str,
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    normals: np.ndarray | None = None,
    colors: np.ndarray | None = None,
) -> bytes | str:
    """A mesh as a file of this kind ("ply", "glb", "obj", ...) has it.

    vertices [V, 3], faces [F, 3]; of the vertices normals [V, 3], colors [V, 3] uint8.
    """
    import trimesh

    mesh = trimesh.Trimesh(
        vertices, faces, vertex_normals=normals, vertex_colors=colors, process=False
    )
    options: dict[str, Any] = {} if normals is None else {"include_normals": True}
    data = mesh.export(file_type=kind, **options)
    assert not isinstance(data, dict)  # which only kinds without a file give
    return data


def write_mesh(path: str | Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Write a mesh; the suffix (.ply, .glb, .obj, ...) chooses the format."""
    atomic_write(path, encoded_mesh(Path(path).suffix.lstrip("."), vertices, faces))
