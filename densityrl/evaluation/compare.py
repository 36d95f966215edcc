"""A tuned generator against its base on seeds neither was tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from densityrl.evaluation.report import SeedComparison, write_report
from densityrl.generator import TriplaneGenerator
from densityrl.picture import image_of_tensor, shade_volume
from densityrl.reward import RewardModel
from densityrl.run import progress, write_summary
from densityrl.sample import SIDE, THREE_QUARTER, TILE
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, slab_of_planes, ws_of_seeds
from triplane_kernels import Grid, density_grid_loss


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; infinite where they are equal."""
    error = F.mse_loss(image.clamp(-1, 1).double(), reference.clamp(-1, 1).double())
    return float(10 * torch.log10(4 / error))


@torch.no_grad()
def evaluate(
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    reward: RewardModel,
    seeds: Sequence[int],
    out: str | Path,
    *,
    level: float,
    pictures: int = 8,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Compare on `seeds`; writes evaluation.json and report.html, returns the former's content.

    Seeds are truncated as the reward's own samples were.
    The share of seeds whose tuned geometry the reward prefers counts ties as half and comes with
    its 95 % Wilson interval. Pictures show seeds from the least to the largest gain, evenly
    spaced in rank, so the worst is among them.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with progress(len(seeds), "evaluate") as bar:
        for done, seed in enumerate(seeds, 1):
            results.append(_compare_seed(base, tuned, reward, seed))
            bar.update(done)
    gains = np.array([result.gain for result in results])
    wins = float((gains > 0).sum() + (gains == 0).sum() / 2)
    quality = np.array([result.psnr for result in results])
    summary: dict[str, Any] = {
        **(about or {}),
        "seeds": len(seeds),
        "tuned_preferred": wins / len(seeds),
        "tuned_preferred_interval": list(wilson_interval(wins, len(seeds))),
        "base_reward": float(np.mean([result.base_reward for result in results])),
        "tuned_reward": float(np.mean([result.tuned_reward for result in results])),
        "drift": float(np.mean([result.drift for result in results])),
        # Equal images have no finite PSNR; JSON has no infinity.
        "appearance_psnr_db": float(np.mean(quality)) if np.isfinite(quality).all() else None,
    }
    rows = [
        {**vars(result), "psnr": result.psnr if np.isfinite(result.psnr) else None}
        for result in results
    ]
    write_summary(out / "evaluation.json", {**summary, "per_seed": rows})
    order = np.argsort(gains, kind="stable")
    ranks = np.unique(np.linspace(0, len(results) - 1, min(pictures, len(results))).round())
    shown = [results[order[int(rank)]] for rank in ranks]
    tiles = [seed_pictures(base, tuned, result.seed, reward.settings, level) for result in shown]
    write_report(out / "report.html", summary, shown, tiles, gains)
    return summary


def _compare_seed(
    base: TriplaneGenerator, tuned: TriplaneGenerator, reward: RewardModel, seed: int
) -> SeedComparison:
    ws0, ws1 = (ws_of_seeds(g, [seed], reward.settings) for g in (base, tuned))
    planes0, planes1 = base.planes(ws0), tuned.planes(ws1)
    grid = Grid.cube(64, base.box_side)
    drift = density_grid_loss(
        planes1, tuned.decoder, grid, tuned.layout, (planes0, base.decoder), kind="l1"
    )
    camera = base.frontal_camera()
    return SeedComparison(
        seed=seed,
        base_reward=float(reward.score_planes(base, planes0)),
        tuned_reward=float(reward.score_planes(tuned, planes1)),
        drift=float(drift),
        psnr=psnr(
            tuned.render(ws1, camera, planes=planes1)["image"],
            base.render(ws0, camera, planes=planes0)["image"],
        ),
    )


@torch.no_grad()
def seed_pictures(
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    seed: int,
    sampling: SlabSettings,
    level: float,
) -> dict[str, np.ndarray]:
    """Pictures [H, W, 3] uint8 of one seed in both generators, in the report's order.

    `sampling` says how a seed becomes a latent; the whole box is shown, whatever its slab.
    "base render", "tuned render"; "base front", ... and "three-quarter", "side": the surface at
    raw density `level`; "density change, middle slice": red where it rose, blue where it fell.
    """
    settings = replace(sampling, resolution=96, slab="full")
    grid = settings.grid(base.box_side)
    renders, views, slices = {}, {}, {}
    for name, generator in (("base", base), ("tuned", tuned)):
        ws = ws_of_seeds(generator, [seed], settings)
        planes = generator.planes(ws)
        image = generator.render(ws, base.frontal_camera(), planes=planes)["image"][0]
        renders[f"{name} render"] = image_of_tensor(image)
        sigma = slab_of_planes(generator, planes, settings)[0].cpu()
        for view, yaw in (("front", 0.0), ("three-quarter", THREE_QUARTER), ("side", SIDE)):
            views[f"{name} {view}"] = shade_volume(sigma, grid, level, yaw, size=TILE)
        slices[name] = sigma[len(sigma) // 2]  # [y, z]: the plane that cuts the face in two
    change = (slices["tuned"] - slices["base"]).flip(0, 1)  # y up, front left as in the side view
    return {
        **dict(sorted(renders.items())),
        **{
            f"{name} {view}": views[f"{name} {view}"]
            for view in ("front", "three-quarter", "side")
            for name in ("base", "tuned")
        },
        "density change, middle slice": _diverging(change.numpy()),
    }


def _diverging(values: np.ndarray) -> np.ndarray:
    """Signed values [H, W] to [H, W, 3] uint8: white at 0, red above, blue below."""
    strength = np.clip(values / max(float(np.abs(values).max()), 1e-12), -1, 1)
    fade = 1 - np.abs(strength)
    red = np.where(strength > 0, 1.0, fade)
    blue = np.where(strength < 0, 1.0, fade)
    return (np.stack([red, fade, blue], axis=-1) * 255).astype(np.uint8)
