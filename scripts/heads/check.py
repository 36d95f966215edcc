"""How good a generator of `heads` is, on latents it was not trained on, against its own targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from densityrl.evaluation.appearance import psnr
from densityrl.generator import TriplaneGenerator
from heads.faults import displaced, floater_centre
from heads.latent import FAULTS, draw, floater_radius, with_new_faults
from heads.mesh import voxelize
from heads.points import HeadMaker
from triplane_kernels import Grid, density_grid

SIDE = 96  # voxels
LEVEL = 10.0
FACE = (slice(30, 66), slice(24, 66))  # of SIDE: the columns whose depth is compared


@dataclass
class Report:
    iou: float  # of solids, model against target
    worst_iou: float
    depth_error_mm: float  # of the face's frontal depth
    fault_share: float  # of the depth change that faults should make, how much they make
    front_psnr_db: float  # of the front image, faults on against off
    rank_correlation: float  # of depth changes, model's against target's, over latents


def solid_of(maker: HeadMaker, u: Tensor) -> np.ndarray:
    """[SIDE]^3 bool: the target of u [Z_DIM], faults and all."""
    v, _, _ = maker.head(u.numpy())
    landmarks = torch.from_numpy(maker.landmarks(v))[None]
    v = displaced(torch.from_numpy(v)[None], landmarks, u[None, FAULTS].double())[0].numpy()
    solid = voxelize(v, maker.closed.skin, SIDE) | voxelize(v, maker.closed.eyes, SIDE)
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    radius = floater_radius(u[None, FAULTS]).item()
    return solid | (np.linalg.norm(points - floater_centre().numpy(), axis=-1) < radius)


def depth_mm(solid: np.ndarray) -> np.ndarray:
    """How far the front of the face lies behind the front of the box."""
    return np.argmax(solid[FACE][..., ::-1], axis=2) * (300.0 / SIDE)


@torch.no_grad()
def check(generator: TriplaneGenerator, maker: HeadMaker, count: int, seed: int) -> Report:
    rng = torch.Generator().manual_seed(seed)
    u = draw(count, rng)
    clean = with_new_faults(u, torch.ones(count, dtype=torch.bool), rng)
    edge = 0.5 - 0.5 / SIDE  # a grid's ends are points; these are the voxels' centres
    grid = Grid((-edge,) * 3, (edge,) * 3, (SIDE,) * 3)
    camera = generator.frontal_camera()
    overlaps, errors, made, wanted, kept = [], [], [], [], []
    for flawed, twin in zip(u, clean, strict=True):
        solids, depths, images = [], [], []
        for latent in (flawed, twin):
            ws = generator.mapping(latent[None])
            planes = generator.planes(ws)
            sigma = density_grid(planes, generator.decoder, grid, generator.layout)[0]
            solids.append((sigma > LEVEL).numpy())
            depths.append(depth_mm(solids[-1]))
            images.append(generator.render(ws, camera, planes=planes)["image"])
        targets = [solid_of(maker, latent) for latent in (flawed, twin)]
        target_depths = [depth_mm(target) for target in targets]
        overlaps.append((solids[0] & targets[0]).sum() / (solids[0] | targets[0]).sum())
        errors.append(np.abs(depths[0] - target_depths[0]).clip(max=30).mean())
        change = target_depths[0] - target_depths[1]
        steady = np.abs(change) < 30  # not where a floater hides the face
        made.append(np.abs(depths[0] - depths[1])[steady].clip(max=30).mean())
        wanted.append(np.abs(change)[steady].mean())
        kept.append(psnr(images[0], images[1]))
    ranks = [np.argsort(np.argsort(values)) for values in (made, wanted)]
    return Report(
        iou=float(np.mean(overlaps)),
        worst_iou=float(np.min(overlaps)),
        depth_error_mm=float(np.mean(errors)),
        fault_share=float(np.sum(made) / np.sum(wanted)),
        front_psnr_db=float(np.mean(kept)),
        rank_correlation=float(np.corrcoef(*ranks)[0, 1]),
    )
