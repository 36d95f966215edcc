"""ICT-FaceKit's morphable head (Li et al., arXiv:2004.03458) as closed solids.

Centimetres in the model; in the box p = (v - (0, 1, 2)) / 30, so that +x is the subject's left,
+y up, +z out of the face, and one world unit is 300 mm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CENTRE_CM = np.array([0.0, 1.0, 2.0])
BOX_CM = 30.0
NECK_CM = -33.0  # where the neck is closed, well below the box
# Vertex and face ranges of the kept regions in ICT-FaceKit's meshes, from its README.
REGIONS = {
    "face": ((0, 9409), (0, 9230)),
    "head_neck": ((9409, 11248), (9230, 11144)),
    "eyeball_l": ((21451, 23021), (21496, 23094)),
    "eyeball_r": ((23021, 24591), (23094, 24692)),
}
IRIS_MATERIAL = "M_Iris"
FACE, HEAD_NECK, EYEBALL_L, EYEBALL_R, IRIS = "face", "head_neck", "eyeball_l", "eyeball_r", "iris"


@dataclass(frozen=True)
class FaceModel:
    """Mean and modes of registered scans, and one topology for all heads."""

    neutral: np.ndarray  # [V, 3] cm
    modes: np.ndarray  # [K, V, 3] cm, for coefficients of a standard normal distribution
    triangles: np.ndarray  # [F, 3], counter-clockwise from outside
    region: np.ndarray  # [F] str
    landmarks: np.ndarray  # [68] vertices, Multi-PIE's order


def read_face_model(path: str | Path, modes: int) -> FaceModel:
    """Read a checkout of ICT-FaceKit, or one `.npz` with the same arrays."""
    path = Path(path)
    if path.is_file():
        return _read_pack(path, modes)
    if (path / "FaceXModel" / "generic_neutral_mesh.obj").is_file():
        return _read_checkout(path / "FaceXModel", modes)
    raise FileNotFoundError(
        f"{path} is neither an .npz nor a checkout of ICT-FaceKit "
        "(FaceXModel/generic_neutral_mesh.obj is missing)"
    )


def _read_pack(path: Path, modes: int) -> FaceModel:
    with np.load(path) as pack:
        names = pack["region_names"]
        return FaceModel(
            pack["neutral"].astype(np.float64),
            pack["deltas_q"][:modes] * pack["delta_scale"].astype(np.float64),
            pack["tris"],
            names[pack["tri_region"]],
            pack["landmarks68"],
        )


def _read_checkout(folder: Path, modes: int) -> FaceModel:
    neutral, faces, materials = _read_obj(folder / "generic_neutral_mesh.obj")
    kept = np.concatenate([np.arange(*vertices) for vertices, _ in REGIONS.values()])
    new_index = np.full(len(neutral), -1)
    new_index[kept] = np.arange(len(kept))
    triangles, region = [], []
    for name, (_, (first, last)) in REGIONS.items():
        for face, material in zip(faces[first:last], materials[first:last], strict=True):
            is_iris = name.startswith("eyeball") and material.startswith(IRIS_MATERIAL)
            for triangle in _triangulated(face, neutral):
                triangles.append(new_index[triangle])
                region.append(IRIS if is_iris else name)
    deltas = [
        _read_obj(folder / f"identity{mode:03d}.obj")[0][kept] - neutral[kept]
        for mode in range(modes)
    ]
    indices = json.loads((folder / "vertex_indices.json").read_text(encoding="utf-8"))
    return FaceModel(
        neutral[kept],
        np.array(deltas),
        np.array(triangles, dtype=np.int32),
        np.array(region),
        new_index[np.array(indices["idx_to_landmark_verts"])],
    )


def _read_obj(path: Path) -> tuple[np.ndarray, list[list[int]], list[str]]:
    """Vertices [V, 3], faces (vertex indices from 0), and each face's material."""
    vertices: list[list[float]] = []
    faces: list[list[int]] = []
    materials: list[str] = []
    material = ""
    with path.open(encoding="utf-8") as file:
        for line in file:
            word, _, rest = line.partition(" ")
            if word == "v":
                vertices.append([float(number) for number in rest.split()[:3]])
            elif word == "usemtl":
                material = rest.strip()
            elif word == "f":
                faces.append([int(corner.split("/")[0]) - 1 for corner in rest.split()])
                materials.append(material)
    return np.array(vertices), faces, materials


def _triangulated(face: list[int], vertices: np.ndarray) -> list[list[int]]:
    """A triangle as it is, a quadrangle cut along its shorter diagonal."""
    if len(face) == 3:
        return [face]
    a, b, c, d = face
    if np.linalg.norm(vertices[a] - vertices[c]) <= np.linalg.norm(vertices[b] - vertices[d]):
        return [[a, b, c], [a, c, d]]
    return [[a, b, d], [b, c, d]]


class ClosedHead:
    """Skin and eyeballs as closed solids, on one topology that is valid for every identity.

    The neck's ring is dropped below the box and closed there; lips and eyelids are zipped, upper
    to lower, so that a head has no inside but its own.
    """

    def __init__(self, model: FaceModel) -> None:
        self.model = model
        skin = model.triangles[np.isin(model.region, (FACE, HEAD_NECK))]
        loops = boundary_loops(skin)
        height = [model.neutral[loop, 1].mean() for loop in loops]
        neck = loops[int(np.argmin(height))]
        openings = [loop for loop in loops if loop is not neck]
        self.neck = neck
        dropped = len(model.neutral) + np.arange(len(neck))
        bottom = len(model.neutral) + len(neck)
        following = np.roll(np.arange(len(neck)), -1)
        skirt = [
            np.stack([neck, neck[following], dropped[following]], axis=1),
            np.stack([neck, dropped[following], dropped], axis=1),
            np.stack([dropped, dropped[following], np.full(len(neck), bottom)], axis=1),
        ]
        zips = [zipped(loop, model.neutral) for loop in openings]
        self.skin = np.concatenate([skin, *skirt, *zips]).astype(np.int32)
        self.eyes = model.triangles[np.isin(model.region, (EYEBALL_L, EYEBALL_R))]
        # What may be sampled as surface: not the caps that no one sees.
        self.is_surface = np.arange(len(self.skin)) < len(skin) + 2 * len(neck)

    def vertices_cm(self, coefficients: np.ndarray) -> np.ndarray:
        """[V', 3] of the head with these coefficients [K]; the neck's new vertices come last."""
        v = self.model.neutral + np.tensordot(coefficients, self.model.modes, 1)
        ring = v[self.neck] * [1, 0, 1] + [0, NECK_CM, 0]
        return np.concatenate([v, ring, ring.mean(axis=0, keepdims=True)])


def to_box(v_cm: np.ndarray) -> np.ndarray:
    return (v_cm - CENTRE_CM) / BOX_CM


def boundary_loops(triangles: np.ndarray) -> list[np.ndarray]:
    """Closed loops of edges with a triangle on one side only.

    Ordered against that triangle, so that caps built on them face as the mesh does.
    """
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    directed = set(map(tuple, edges.tolist()))
    after = {b: a for a, b in directed if (b, a) not in directed}
    loops = []
    while after:
        start, vertex = after.popitem()
        loop = [start]
        while vertex != start:
            loop.append(vertex)
            vertex = after.pop(vertex)
        loops.append(np.array(loop))
    return loops


def zipped(loop: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Close a long opening: triangles [F, 3] between its two borders, from end to end in x."""
    x = vertices[loop, 0]
    loop = np.roll(loop, -int(np.argmin(x)))
    far = int(np.argmax(vertices[loop, 0]))
    one, other = loop[: far + 1].tolist(), [loop[0], *loop[: far - 1 : -1].tolist()]
    triangles = []
    i = j = 0
    while i + 1 < len(one) or j + 1 < len(other):
        step_one = j + 1 == len(other) or (
            i + 1 < len(one) and vertices[one[i + 1], 0] <= vertices[other[j + 1], 0]
        )
        if step_one:
            triangle = (one[i], one[i + 1], other[j])
            i += 1
        else:
            triangle = (one[i], other[j + 1], other[j])
            j += 1
        if len(set(triangle)) == 3:
            triangles.append(triangle)
    return np.array(triangles)
