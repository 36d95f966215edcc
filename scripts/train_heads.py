"""Train the bundled generator `heads` from scratch: real head shapes with faults made on purpose.

The shapes are those of ICT-FaceKit (MIT licence), as a checkout or as one .npz of its arrays:

    python scripts/train_heads.py --ict ICT-FaceKit --out densityrl/generator/bundled/heads

About an hour on two cores, of which the points take five minutes; they are kept in --work, and so
is the state: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from heads.face_model import read_face_model
from heads.faults import displaced, floater_centre
from heads.latent import FAULTS, GROUPS, Z_DIM, draw, factors, floater_radius, with_new_faults
from heads.points import BAND, FAR, NEAR, Bank, make_bank
from torch import Tensor, nn

from densityrl.generator import GeneratorConfig, TriplaneGenerator, save_generator
from triplane_kernels import EG3D_CORRECTED, radiance

CONFIG = GeneratorConfig(
    z_dim=Z_DIM,
    w_dim=160,
    c_dim=0,
    mapping_features=192,
    synthesis_channels=(96, 96, 96, 64, 48, 24),
    plane_channels=16,
    plane_axes=EG3D_CORRECTED.axes,
    decoder_hidden=64,
    decoder_features=3,
    decoder_lr_mul=5.0,
    rendering={
        "box_warp": 1.0,
        "ray_start": 2.2,
        "ray_end": 3.3,
        "depth_resolution": 48,
        "depth_resolution_importance": 48,
        "clamp_mode": "softplus",
        "disparity_space_sampling": False,
        "white_back": True,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0.0, 0.0, 0.0],
        "camera_fov_deg": 25.0,
    },
    neural_rendering_resolution=96,
    latent_groups=GROUPS,
    millimetres=300.0,
)
LEVEL, SWING = 10.0, 100.0  # raw density on the surface, and what is added or taken across the band
CLEAN_SHARE = 0.2  # of the heads in a batch: clean twins must be as good as others
NEAR_FLOATER = 250  # points a head around the place where a floater may be


@dataclass
class Batch:
    """What a step looks at: points [B, M, 3], distances [B, M], colours of the first [B, K, 3]."""

    u: Tensor
    points: Tensor
    distance: Tensor
    color: Tensor


class Batches:
    """Heads of a bank with faults drawn anew each time."""

    def __init__(self, bank: Bank, near: int, far: int) -> None:
        self.bank, self.near, self.far = bank, near, far
        self.floater = floater_centre()

    def draw(self, step: int, size: int, seed: int) -> Batch:
        """The batch of a step: the same whenever it is drawn."""
        rng = np.random.default_rng([seed, step])
        torch_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        heads = np.sort(rng.choice(len(self.bank.u), size, replace=False))
        near = rng.choice(NEAR, self.near, replace=False)
        far = NEAR + rng.choice(FAR, self.far, replace=False)
        u = with_new_faults(
            torch.from_numpy(self.bank.u[heads]),
            torch.rand(size, generator=torch_rng) < CLEAN_SHARE,
            torch_rng,
        )
        rows = np.concatenate([near, far])
        points = torch.from_numpy(self.bank.points[heads][:, rows].astype(np.float32) / 65534)
        distance = torch.from_numpy(self.bank.distance[heads][:, rows].astype(np.float32))
        color = torch.from_numpy(self.bank.color[heads][:, near].astype(np.float32) / 255)
        points = displaced(points, torch.from_numpy(self.bank.landmarks[heads]), u[:, FAULTS])

        # Where a floater may be, whether there is one or not, so that no ghost of it stays.
        around = self.floater + 0.03 * torch.randn(size, NEAR_FLOATER, 3, generator=torch_rng)
        points = torch.cat([around, points], dim=1)
        distance = torch.cat([distance.new_full((size, NEAR_FLOATER), 1.0), distance], dim=1)
        color = torch.cat([color.new_zeros(size, NEAR_FLOATER, 3), color], dim=1)
        radius = floater_radius(u[:, FAULTS])[:, None]
        to_floater = (points - self.floater).norm(dim=-1) - radius
        nearer = (to_floater < distance) & (radius > 0)
        distance = torch.where(nearer, to_floater, distance)
        floater_color = torch.from_numpy(self.bank.floater_color[heads])[:, None]
        color = torch.where(nearer[:, : color.shape[1], None], floater_color, color)
        return Batch(u, points.clamp(-0.5, 0.5), distance, color)


def losses(generator: TriplaneGenerator, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, colour, and the share of points on the wrong side of the surface.

    Inside the band the density is pinned to the distance, beyond it only to its side.
    """
    planes = generator.planes(generator.mapping(batch.u), noise_mode="none")
    sigma, raw = radiance(planes, generator.decoder, batch.points, generator.layout)
    known = torch.isfinite(batch.distance)
    depth = -batch.distance.nan_to_num() / BAND
    value = (sigma - LEVEL) / SWING
    error = torch.where(depth.abs() < 1, (value - depth).abs(), F.relu(1 - value * depth.sign()))
    shape = F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1, reduction="none")[
        known
    ].mean()
    colored = batch.color.shape[1]
    on_surface = (known & (depth.abs() < 1))[:, :colored, None]
    color_error = (torch.sigmoid(raw[:, :colored]) - batch.color).abs() * on_surface
    color = color_error.sum() / (3 * on_surface.sum().clamp_min(1))
    wrong = ((value > 0) != (depth > 0))[known].float().mean()
    return shape, color, wrong.detach()


def fit_mapping(generator: TriplaneGenerator, steps: int, seed: int) -> float:
    """Fit the mapping network so that a linear map of w gives what a head depends on.

    Faults then are straight lines in w: easier for the synthesis, and truncation weakens them.
    Returns the mean squared error left, of factors of about unit size.
    """
    rng = torch.Generator().manual_seed(seed)
    mapping = generator.backbone.mapping
    width = factors(draw(2, rng)).shape[1]
    readout = nn.Linear(CONFIG.w_dim, width)
    optimizer = torch.optim.Adam(
        [
            {"params": mapping.parameters(), "lr": 2e-3 / CONFIG.mapping_lr_mul},
            {"params": readout.parameters(), "lr": 2e-3},
        ],
        betas=(0.9, 0.99),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        u = draw(512, rng)
        loss = F.mse_loss(readout(mapping(u, None)), factors(u))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: warm-up, plateau, cosine to 2 %."""
    done = step / steps
    fade = 1.0 if done < 0.3 else 0.5 * (1 + math.cos(math.pi * (done - 0.3) / 0.7))
    return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * fade)


def save(average: TriplaneGenerator, out: Path, provenance: dict[str, object]) -> None:
    with torch.no_grad():
        # Truncation draws toward the mean of clean heads; that of all has a little of each fault.
        rng = torch.Generator().manual_seed(1)
        u = with_new_faults(draw(8192, rng), torch.ones(8192, dtype=torch.bool), rng)
        rows = average.backbone.mapping(u, None)
        average.backbone.mapping.w_avg.copy_(rows.mean(dim=0))
    half = TriplaneGenerator(CONFIG)
    half.load_state_dict(average.state_dict())
    save_generator(half.half(), out, provenance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ict", type=Path, required=True, help="ICT-FaceKit: checkout or .npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/heads"), help="points and state")
    parser.add_argument("--heads", type=int, default=5000, help="clean heads in the bank")
    parser.add_argument("--steps", type=int, default=14_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--near", type=int, default=5000, help="points a head and step")
    parser.add_argument("--far", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    stored = args.work / f"bank_{args.heads}_{args.seed}.npz"
    if not stored.exists():
        began = time.monotonic()
        model = read_face_model(args.ict, GROUPS["identity"][1])
        bank = make_bank(model, args.heads, args.seed, workers=torch.get_num_threads())
        partial = stored.with_suffix(".partial.npz")
        np.savez(partial, **vars(bank))
        partial.replace(stored)
        print(f"points of {args.heads} heads, {time.monotonic() - began:.0f} s", flush=True)
    with np.load(stored) as arrays:
        bank = Bank(**{field.name: arrays[field.name] for field in fields(Bank)})
    batches = Batches(bank, args.near, args.far)

    torch.manual_seed(args.seed)
    generator = TriplaneGenerator(CONFIG).to(memory_format=torch.channels_last)
    state_file = args.work / "state.pt"
    if not state_file.exists():
        left = fit_mapping(generator, steps=16_000, seed=args.seed)
        print(f"mapping fitted, {left:.4f} of the factors' variance left", flush=True)
    average = copy.deepcopy(generator).requires_grad_(False)
    optimizer = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.9, 0.99))
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        generator.load_state_dict(state["generator"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began, sums = time.monotonic(), torch.zeros(3)
    for step in range(first, args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * rate_at(step, args.steps)
        shape, color, wrong = losses(generator, batches.draw(step, args.batch, args.seed))
        optimizer.zero_grad()
        (shape + color).backward()
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), generator.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)
        sums += torch.stack([shape.detach(), color.detach(), wrong])
        done = step + 1
        if done % 100 == 0:
            means = " ".join(f"{value:.4f}" for value in (sums / 100).tolist())
            seconds = (time.monotonic() - began) / (done - first)
            print(f"step {done} shape, colour, wrong side {means} {seconds:.3f} s/step", flush=True)
            sums.zero_()
        if done % 500 == 0 or done == args.steps:
            state = {
                "generator": generator.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
            }
            partial = state_file.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(state_file)
            provenance = {
                "script": "scripts/train_heads.py",
                "steps": done,
                "seed": args.seed,
                "batch": args.batch,
                "heads": args.heads,
            }
            save(average, args.out, provenance)


if __name__ == "__main__":
    main()
