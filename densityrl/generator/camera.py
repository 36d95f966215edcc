"""Cameras in EG3D's form: 25 numbers, a 4x4 camera-to-world matrix and 3x3 intrinsics, row-major.

Camera axes are OpenCV's (x right, y down, z forward); intrinsics are in units of the image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FFHQ_FOV_DEG = 18.837  # across the diagonal, see `intrinsics`


def camera_pose(
    yaw: float, pitch: float, pivot: Sequence[float] = (0.0, 0.0, 0.0), radius: float = 2.7
) -> Tensor:
    """[4, 4] camera-to-world matrix on a sphere around the origin, looking at `pivot`.

    yaw and pitch are offsets from the frontal view: yaw in radians; equal steps of pitch are
    equal steps of height, as in EG3D (an offset of pi/2 reaches the pole).
    """
    azimuth = math.pi / 2 - yaw
    height = min(max(math.pi / 2 + pitch, 1e-5), math.pi - 1e-5)
    polar = math.acos(1 - 2 * height / math.pi)
    origin = radius * torch.tensor(
        [
            math.sin(polar) * math.cos(azimuth),
            math.cos(polar),
            math.sin(polar) * math.sin(azimuth),
        ],
        dtype=torch.float64,
    )
    forward = torch.nn.functional.normalize(
        torch.tensor(pivot, dtype=torch.float64) - origin, dim=0
    )
    up = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    right = -torch.nn.functional.normalize(torch.linalg.cross(up, forward), dim=0)
    down = torch.nn.functional.normalize(torch.linalg.cross(forward, right), dim=0)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.stack([right, down, forward], dim=1)
    pose[:3, 3] = origin
    return pose.float()


def intrinsics(fov_deg: float = FFHQ_FOV_DEG) -> Tensor:
    """[3, 3] pinhole intrinsics; the field of view is measured across the diagonal.

    The constants 1.414 and 3.14159 are EG3D's, kept to match its cameras to the last digit.
    """
    focal = 1 / (math.tan(fov_deg * 3.14159 / 360) * 1.414)
    return torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=torch.float32)


def camera_label(pose: Tensor, camera_intrinsics: Tensor) -> Tensor:
    """[4, 4] and [3, 3] -> [1, 25], the form in which generators take a camera."""
    return torch.cat([pose.reshape(16), camera_intrinsics.reshape(9)])[None]


def pixel_rays(c: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Rays through the pixel centres of a square image, row-major.

    c [B, 25] -> origins [B, R*R, 3], unit directions [B, R*R, 3] in world space, so that depth
    is distance along the ray.
    """
    pose = c[:, :16].reshape(-1, 4, 4)
    k = c[:, 16:25].reshape(-1, 3, 3)
    centres = (torch.arange(resolution, device=c.device, dtype=c.dtype) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    fx, fy, cx, cy, skew = (k[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1)))
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    in_camera = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    directions = torch.nn.functional.normalize(in_camera @ pose[:, :3, :3].mT, dim=-1)
    origins = pose[:, None, :3, 3].expand_as(directions)
    return origins, directions
