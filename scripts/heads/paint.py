"""Colours of a head: masks on the mean head, a palette from eight latent numbers, baked light."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from skimage.measure import points_in_poly

from heads.face_model import EYEBALL_L, EYEBALL_R, IRIS, ClosedHead
from heads.mesh import vertex_normals

IRIS_DEG, PUPIL_DEG = 24.0, 9.5  # from the optical axis


def smooth_step(x: np.ndarray | float) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def mix(under: np.ndarray, over: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    return under + (over - under) * share


class Painter:
    """Masks [V] in [0, 1], made once on the mean head; the same vertices serve every head."""

    def __init__(self, head: ClosedHead) -> None:
        v = head.vertices_cm(np.zeros(len(head.model.modes)))
        landmarks = v[head.model.landmarks]
        skin_count = int(head.eyes.min())
        is_skin = np.ones(len(v), dtype=bool)
        is_skin[skin_count : len(head.model.neutral)] = False
        front = is_skin & (v[:, 2] > 6)
        x, y, z = v.T

        def distance(*curves: np.ndarray) -> np.ndarray:
            width = curves[0].shape[1]  # 2 or 3 coordinates
            along = np.linspace(0, 1, 12)[:, None]
            dense = [c[:-1, None] + along * np.diff(c, axis=0)[:, None] for c in curves]
            return cKDTree(np.concatenate(dense).reshape(-1, width)).query(v[:, :width])[0]

        outline = landmarks[[*range(48, 60), 48], :2]
        inside = np.where(points_in_poly(v[:, :2], outline), 1, -1)
        self.lips = front * smooth_step(inside * distance(outline) / 0.08)
        self.mouth_line = front * np.exp(-((distance(landmarks[60:65]) / 0.18) ** 2))
        self.brows = front * np.exp(-((distance(landmarks[17:22], landmarks[22:27]) / 0.42) ** 4))
        lids = distance(landmarks[36:40], landmarks[42:46])
        self.lids = front * np.exp(-((lids / 0.16) ** 2))
        nostrils = landmarks[[32, 34]] + [0, 0.1, 0]
        self.nostrils = front * np.exp(-((cKDTree(nostrils).query(v)[0] / 0.45) ** 2))

        def blush(centre: np.ndarray, width: float) -> np.ndarray:
            return np.exp(-((np.linalg.norm(v - centre, axis=1) / width) ** 2))

        left, right = (
            (landmarks[a] + landmarks[b]) / 2 + [0, 1, 0] for a, b in ((14, 35), (2, 31))
        )
        self.blush = front * (
            np.maximum(blush(left, 2.5), blush(right, 2.5)) + 0.7 * blush(landmarks[30], 1.6)
        )
        off_ear = np.sqrt(((y - 1.2) / 3.3) ** 2 + ((z - 0.15) / 2.7) ** 2)
        ear = smooth_step((1.12 - off_ear) / 0.05) * (np.abs(x) > 5.5)
        scalp = smooth_step((y - 0.95 * z - 0.2 - 0.25 * np.abs(x)) / 0.55)
        self.hair = is_skin * scalp * smooth_step((y + 5.5) / 0.8) * (1 - ear)
        self.shirt = is_skin * smooth_step((0.12 * np.abs(x) - 13.2 - y) / 0.25)

        self.eye, self.iris, self.pupil = np.zeros((3, len(v)))
        model = head.model
        iris = np.unique(model.triangles[model.region == IRIS])
        for name in (EYEBALL_L, EYEBALL_R):
            ball = np.unique(model.triangles[model.region == name])
            own_iris = iris[np.sign(x[iris]) == np.sign(x[ball].mean())]
            centre = v[ball].mean(axis=0)
            axis = v[own_iris].mean(axis=0) - centre
            spokes = v[ball] - centre
            cosine = spokes @ axis / (np.linalg.norm(spokes, axis=1) * np.linalg.norm(axis))
            off_axis_deg = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
            self.eye[ball] = 1
            self.iris[ball] = smooth_step((IRIS_DEG - off_axis_deg) / 1.5)
            self.pupil[ball] = smooth_step((PUPIL_DEG - off_axis_deg) / 1.2)
        self.solid = np.concatenate([head.skin, head.eyes])
        self._waves = v @ [0.5, 0.3, 0.4], v @ [-0.3, 0.5, 0.35]

    def with_hair(self, v_cm: np.ndarray, appearance: np.ndarray) -> np.ndarray:
        """Vertices [V, 3] moved out where hair grows, as thick as appearance [8] says."""
        a = appearance
        growth = np.log1p(np.exp(1.5 * min(a[4], 1.0)))  # no more than two centimetres or so
        thickness_cm = (0.25 + 1.1 * growth) * smooth_step(3 * (a[4] + 1))
        locks = np.sin(self._waves[0] + 2 * a[2]) * np.sin(self._waves[1] + 2 * a[3])
        normals = vertex_normals(v_cm, self.solid)
        return v_cm + normals * (self.hair * thickness_cm * (1 + 0.3 * locks))[:, None]

    def colors(self, normals: np.ndarray, appearance: np.ndarray) -> np.ndarray:
        """Colours [V, 3] in [0, 1] with light baked in, for vertex normals [V, 3]."""
        a = appearance
        rgb = np.array
        tone = smooth_step(1.6 * a[0])
        skin = mix(rgb([0.34, 0.21, 0.15]), rgb([0.93, 0.74, 0.64]), tone)
        skin = skin * (1 + 0.05 * np.tanh(a[1]) * rgb([1, 0, -1]))
        brown = mix(rgb([0.06, 0.05, 0.05]), rgb([0.28, 0.17, 0.10]), smooth_step(2 * a[2]))
        hair = mix(brown, rgb([0.75, 0.60, 0.36]), smooth_step(2.5 * a[3] - 2.5) * tone)
        iris = mix(rgb([0.22, 0.13, 0.07]), rgb([0.30, 0.45, 0.55]), smooth_step(3 * a[6] - 1.5))
        shirt = mix(rgb([0.12, 0.15, 0.25]), rgb([0.75, 0.75, 0.72]), smooth_step(2 * a[5]))

        color = skin + self.blush[:, None] * [0.06, -0.02, -0.02]
        lips = skin * [0.86, 0.52, 0.52] + [0.04, 0, 0.01]
        for over, share in (
            (lips, 0.75 * self.lips),
            (0.35, self.mouth_line),
            (mix(hair, skin, 0.15), 0.85 * self.brows),
            (0.35, self.lids),
            (0.45, self.nostrils),
            (hair, self.hair * smooth_step(3 * (a[4] + 1))),
            (shirt, self.shirt),
        ):
            target = color * over if isinstance(over, float) else over
            color = mix(color, target, share[:, None])
        eye = mix(rgb([[0.93, 0.92, 0.90]]), iris, self.iris[:, None])
        eye = mix(eye, rgb([0.02, 0.02, 0.02]), self.pupil[:, None])
        color = mix(color, eye, self.eye[:, None])

        light = rgb([0.35 * np.tanh(a[7]), 0.45, 0.85])
        facing = normals @ (light / np.linalg.norm(light))
        on_skin = 0.40 + 0.30 * np.clip(0.5 + 0.5 * facing, 0, 1) + 0.36 * np.clip(facing, 0, 1)
        on_eye = 0.55 + 0.40 * np.clip(facing, 0, 1)
        return np.clip(color * np.where(self.eye > 0, on_eye, on_skin)[:, None], 0, 1)
