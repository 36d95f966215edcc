"""Faults of geometry that hardly show from the front, made on purpose and known exactly.

Surfaces move along the viewing rays of the frontal camera, so that what it sees keeps its colours;
three-quarter and side views show the fault. Floaters take the colour of what they hide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heads.latent import strengths

CAMERA_Z = 2.7  # the frontal camera's place on the z axis, world units
FACE_PLANE_Z = 0.2  # screen coordinates are world units on this plane
FLOATER_SCREEN = (0.16, 0.13)
FLOATER_Z = 0.42


def screen(points: Tensor) -> Tensor:
    """[..., 3] -> [..., 2]: where the frontal camera sees points, on the plane z = 0.2."""
    return points[..., :2] * (CAMERA_Z - FACE_PLANE_Z) / (CAMERA_Z - points[..., 2:3])


def displaced(points: Tensor, landmarks: Tensor, faults: Tensor) -> Tensor:
    """Points [B, M, 3] of clean heads to where the faults move them.

    landmarks: the 68 of each head on the screen [B, 68, 2]; faults: latent numbers [B, 10].
    """
    toward = torch.tensor([0.0, 0.0, CAMERA_Z], dtype=points.dtype) - points
    toward = toward / toward.norm(dim=-1, keepdim=True)
    fade = ((points[..., 2] + 0.1) / 0.22).clamp(0, 1)  # nothing moves at the back of the head
    fade = fade * fade * (3 - 2 * fade)
    amount = _displacement(screen(points), landmarks, strengths(faults)) * fade
    return points + amount[..., None] * toward


def _displacement(at: Tensor, landmarks: Tensor, strength: Tensor) -> Tensor:
    """Toward the camera, world units [B, M], at screen positions [B, M, 2]."""

    def place(indices: tuple[int, ...], up: float = 0.0) -> Tensor:
        centre = landmarks[:, list(indices)].mean(dim=1)
        return centre + centre.new_tensor([0.0, up])

    def blob(centre: Tensor, width: float, height: float) -> Tensor:
        offset = (at - centre[:, None]) / at.new_tensor([width, height])
        return torch.exp(-0.5 * offset.square().sum(dim=-1))

    centre = place((27, 30, 33))
    middle = at[..., 0] - centre[:, None, 0]
    height = at[..., 1] - centre[:, None, 1]
    face = torch.exp(-((middle / 0.24).square() + (height / 0.30).square()).square())
    waves = torch.sin(60 * middle + 0.6) * torch.sin(55 * height + 1.1) + torch.sin(
        40 * (middle + height) + 2.0
    ) * torch.sin(46 * (middle - height) - 0.6)
    arch = at[..., 1] - place((19, 24), up=0.145)[:, None, 1] + 1.1 * middle.square()
    ridge = torch.exp(-0.5 * (arch / 0.020).square()) * torch.exp(-((middle / 0.19) ** 4))
    left_eye, right_eye = place(tuple(range(42, 48))), place(tuple(range(36, 42)))
    # Heights chosen so that each fault of one size moves the surface about as far on average.
    shapes = {
        "eyes": -0.039 * (blob(left_eye, 0.042, 0.032) + blob(right_eye, 0.042, 0.032)),
        "nose": -0.050 * blob(place((30,)), 0.038, 0.055),
        "bridge": 0.035 * blob(place((28,)), 0.030, 0.045),
        "cheeks": -0.022
        * (blob(place((14, 35)), 0.042, 0.050) + blob(place((2, 31)), 0.042, 0.050)),
        "asymmetry": 0.020
        * (blob(place((11, 54)), 0.045, 0.05) - blob(place((5, 48)), 0.045, 0.05)),
        "forehead": 0.034 * blob(place((19, 24), up=0.085), 0.070, 0.050),
        "jaw": -0.040 * blob(place((8, 57)), 0.065, 0.060),
        "waves": 0.007 * waves * face,
        "hairline": 0.026 * ridge,
    }
    total = torch.zeros_like(middle)
    for index, shape in enumerate(shapes.values()):
        total = total + strength[:, index, None] * shape
    return total


def floater_centre() -> Tensor:
    """[3], world units."""
    u, v = FLOATER_SCREEN
    scale = (CAMERA_Z - FLOATER_Z) / (CAMERA_Z - FACE_PLANE_Z)
    return torch.tensor([u * scale, v * scale, FLOATER_Z])
