"""Train the bundled generator `busts`: sculpted heads made of ellipsoids, spheres and a capsule.

Geometry and colour are known in closed form, so no data set is needed; 16 of the 64 latent
numbers move the shape and 6 the colour, the others do nothing. About 25 minutes on one core:

    python scripts/train_busts.py --out densityrl/generator/bundled/busts
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from densityrl.generator import GeneratorConfig, TriplaneGenerator, load_generator, save_generator
from triplane_kernels import EG3D_CORRECTED, radiance

CONFIG = GeneratorConfig(
    z_dim=64,
    w_dim=96,
    c_dim=0,
    synthesis_channels=(64, 64, 64, 48, 32),
    plane_channels=16,
    plane_axes=EG3D_CORRECTED.axes,
    decoder_hidden=64,
    decoder_features=3,
    decoder_lr_mul=5.0,
    rendering={
        "box_warp": 1.0,
        "ray_start": 2.2,
        "ray_end": 3.3,
        "depth_resolution": 32,
        "depth_resolution_importance": 32,
        "clamp_mode": "softplus",
        "disparity_space_sampling": False,
        "white_back": True,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0.0, 0.0, 0.0],
    },
    neural_rendering_resolution=64,
)
BAND = 0.02  # distance over which the target density goes from its largest to its smallest value
LEVEL, SWING = 10.0, 50.0  # raw density on the surface, and what is added or taken across the band


def ellipsoid(x: Tensor, centre: list, radii: list) -> Tensor:
    """Signed distance of an axis-aligned ellipsoid, first order around its surface."""
    offset = x - torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, centre)), dim=-1)
    r = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, radii)), dim=-1)
    scaled = (offset / r).norm(dim=-1)
    return scaled * (scaled - 1) / (offset / r.square()).norm(dim=-1).clamp_min(1e-6)


def capsule(x: Tensor, start: list, end: list, radius: Tensor) -> Tensor:
    """Signed distance of a segment with a radius."""
    a = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, start)), dim=-1)
    b = torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, end)), dim=-1)
    along = b - a
    t = ((x - a) * along).sum(-1) / along.square().sum(-1)
    return (x - a - t.clamp(0, 1)[..., None] * along).norm(dim=-1) - radius


def union(a: Tensor, b: Tensor, blend: float) -> Tensor:
    """Smooth minimum: equal to the minimum where the two differ by more than `blend`."""
    h = (blend - (a - b).abs()).clamp_min(0) / blend
    return torch.minimum(a, b) - h.square() * blend / 4


def shape_numbers(z: Tensor) -> list[Tensor]:
    """The first 16 latent numbers, each [B, 1], softly limited to [-2, 2]."""
    return list((2 * torch.tanh(z[:, :16] / 2)).unsqueeze(-1).unbind(dim=1))


def bust_distance(x: Tensor, z: Tensor) -> Tensor:
    """Signed distance [B, M] (negative inside) at points [B, M, 3] for latents [B, 64]."""
    p = shape_numbers(z)
    zero = torch.zeros_like(p[0])
    mirrored = torch.cat([x[..., :1].abs(), x[..., 1:]], dim=-1)
    d = ellipsoid(
        x,
        [zero, 0.10 + zero, -0.03 + zero],
        [0.185 + 0.014 * p[0], 0.235 + 0.016 * p[1], 0.22 + 0.016 * p[2]],
    )
    jaw_z = 0.03 + 0.012 * p[4]
    d = union(
        d,
        ellipsoid(
            x, [zero, -0.07 + zero, jaw_z], [0.125 + 0.014 * p[3], 0.16 + zero, 0.145 + zero]
        ),
        0.06,
    )
    chin = [zero, -0.19 + 0.012 * p[5], 0.11 + 0.02 * p[6]]
    d = union(d, (x - torch.stack(chin, -1)).norm(dim=-1) - 0.045, 0.05)
    cheek = torch.stack([0.085 + zero, -0.01 + zero, 0.115 + zero], -1)
    d = union(d, (mirrored - cheek).norm(dim=-1) - (0.06 + 0.012 * p[7]), 0.04)
    socket = torch.stack([0.07 + zero, 0.085 + zero, 0.215 + zero], -1)
    depth = 0.042 + 0.012 * p[8]
    d = -union(-d, (mirrored - socket).norm(dim=-1) - depth, 0.03)
    eye = torch.stack([0.07 + zero, 0.085 + zero, 0.14 + 0.012 * p[9]], -1)
    d = union(d, (mirrored - eye).norm(dim=-1) - 0.036, 0.008)
    nose = capsule(
        x,
        [zero, 0.10 + zero, 0.185 + zero],
        [zero, 0.0 + zero, 0.235 + 0.03 * p[10]],
        0.026 + 0.006 * p[11],
    )
    d = union(d, nose, 0.03)
    ear = ellipsoid(
        mirrored,
        [0.195 + 0.014 * p[0], 0.05 + zero, -0.03 + zero],
        [0.022 + zero, 0.055 + 0.012 * p[12], 0.035 + zero],
    )
    d = union(d, ear, 0.02)
    bump = torch.stack([zero, 0.21 + zero, 0.15 + zero], -1)
    d = union(d, (x - bump).norm(dim=-1) - (0.045 + 0.016 * p[13]), 0.06)
    neck = capsule(
        x,
        [zero, -0.12 + zero, -0.05 + zero],
        [zero, -0.45 + zero, -0.07 + zero],
        0.085 + 0.01 * p[14],
    )
    d = union(d, neck, 0.04)
    shoulders = ellipsoid(
        x, [zero, -0.5 + zero, -0.06 + zero], [0.34 + 0.03 * p[15], 0.15 + zero, 0.14 + zero]
    )
    return union(d, shoulders, 0.08)


def bust_color(x: Tensor, z: Tensor, normal: Tensor) -> Tensor:
    """Colour [B, M, 3] in [0, 1] of the surface at x, with the light baked in."""
    tone = torch.tanh(z[:, 16:22] / 1.5).unsqueeze(1)
    skin = torch.tensor([0.80, 0.62, 0.52]) * (1 + 0.22 * tone[..., :1])
    hair = torch.tensor([0.30, 0.22, 0.16]) * (1 + 0.8 * tone[..., 1:2])
    shirt = 0.45 + 0.3 * tone[..., 2:5]
    lips = skin * torch.tensor([0.95, 0.62, 0.62])
    iris = torch.tensor([0.22, 0.34, 0.40]) * (1 + 0.6 * tone[..., 5:6])
    p = shape_numbers(z)

    def paint(under: Tensor, over: Tensor, inside: Tensor) -> Tensor:
        share = torch.sigmoid(inside / 0.006)[..., None]
        return under * (1 - share) + over * share

    side, y, depth = x[..., 0].abs(), x[..., 1], x[..., 2]
    color = skin.expand_as(x)
    color = paint(color, lips, 1 - ((side / 0.05).square() + ((y + 0.1) / 0.017).square()).sqrt())
    color = torch.where((depth > 0.1)[..., None], color, skin.expand_as(x))
    eye = torch.stack([side - 0.07, y - 0.085, depth - 0.14 - 0.012 * p[9]], dim=-1)
    on_eye = 0.041 - eye.norm(dim=-1)
    color = paint(color, torch.tensor([0.93, 0.92, 0.90]).expand_as(x), on_eye)
    off_axis = eye[..., :2].norm(dim=-1)
    color = paint(color, iris.expand_as(x), torch.minimum(on_eye, 0.019 - off_axis))
    color = paint(color, 0.1 * torch.ones_like(x), torch.minimum(on_eye, 0.008 - off_axis))
    color = paint(
        color,
        hair.expand_as(x),
        torch.maximum(y - 0.20 - 0.35 * depth, -depth - 0.06).minimum(y + 0.10),
    )
    color = paint(color, shirt.expand_as(x), -0.37 - y + 0.4 * side)
    light = F.normalize(torch.tensor([0.35, 0.5, 0.8]), dim=0)
    return (color * (0.62 + 0.38 * (normal @ light).clamp_min(0))[..., None]).clamp(0.01, 0.99)


def distance_and_normal(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        d = bust_distance(x, z)
        (gradient,) = torch.autograd.grad(d.sum(), x)
    return d.detach(), F.normalize(gradient, dim=-1)


def labelled_points(z: Tensor, near: int, far: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points [B, near + far, 3], distances and normals.

    The first `near` lie beside the surface, half of them on the face; of the others a quarter
    lies on the faces of the box, where planes fade out.
    """
    x = torch.rand(z.shape[0], near, 3) - 0.5
    face = torch.tensor([[-0.14, -0.2, 0.05], [0.14, 0.22, 0.35]])
    x[:, ::2] = face[0] + (x[:, ::2] + 0.5) * (face[1] - face[0])
    for _ in range(2):  # Newton steps onto the surface
        d, normal = distance_and_normal(x, z)
        x = x - d[..., None] * normal
    offset = torch.randn(z.shape[0], near, 1) * torch.where(
        torch.rand(z.shape[0], near, 1) < 0.7, 0.005, 0.02
    )
    elsewhere = torch.rand(z.shape[0], far, 3) - 0.5
    on_box = torch.randint(3, (z.shape[0], far // 4, 1))
    elsewhere[:, : far // 4].scatter_(2, on_box, 0.5 * torch.randn(on_box.shape).sign())
    x = torch.cat([x + offset * normal, elsewhere], dim=1).clamp(-0.5, 0.5)
    return x, *distance_and_normal(x, z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="a generator of this kind to go on from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = TriplaneGenerator(CONFIG)
    if args.start:
        generator.load_state_dict(load_generator(args.start).state_dict())
    generator.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.9, 0.99))
    began = time.monotonic()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 50)
        rate = args.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))
        optimizer.param_groups[0]["lr"] = rate
        z = torch.randn(args.batch, CONFIG.z_dim)
        x, distance, normal = labelled_points(z, near=1536, far=512)
        planes = generator.planes(generator.mapping(z), noise_mode="none")
        sigma, raw = radiance(planes, generator.decoder, x, generator.layout)
        target = LEVEL + SWING * (-distance / BAND).clamp(-1, 1)
        shape_loss = F.smooth_l1_loss(sigma, target, beta=10.0) / SWING
        on_surface = (distance.abs() < BAND)[..., None]
        error = (torch.sigmoid(raw) - bust_color(x, z, normal)).abs() * on_surface
        color_loss = error.sum() / on_surface.sum().clamp_min(1) / 3
        loss = shape_loss + color_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            wrong = ((sigma > LEVEL) != (distance < 0)).float().mean().item()
            print(
                f"step {step} shape {shape_loss:.4f} color {color_loss:.4f} "
                f"wrong side {wrong:.4f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            with torch.no_grad():
                rows = generator.backbone.mapping(torch.randn(4096, CONFIG.z_dim), None)
                generator.backbone.mapping.w_avg.copy_(rows.mean(dim=0))
            half = TriplaneGenerator(CONFIG)
            half.load_state_dict(generator.state_dict())
            save_generator(
                half.half(),
                args.out,
                {"script": "scripts/train_busts.py", "steps": step + 1, "seed": args.seed},
            )


if __name__ == "__main__":
    main()
