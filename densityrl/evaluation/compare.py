"""A tuned generator against its base on seeds neither was tuned on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densityrl.evaluation.appearance import psnr, ssim
from densityrl.evaluation.report import SeedComparison, SimulatedJudgement, write_report
from densityrl.generator import TriplaneGenerator
from densityrl.picture import image_of_tensor, shade_volume
from densityrl.preference.oracle import RULES, SimulatedAnnotator, clean_volumes
from densityrl.reward import RewardModel
from densityrl.run import progress, write_summary
from densityrl.sample import SIDE, THREE_QUARTER, TILE
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, slab_of_planes, ws_of_seeds
from triplane_kernels import Grid, density_grid_loss

SIDE_VIEW_YAW = math.radians(30)
ANNOTATOR_RESOLUTION = 64  # points a side of the box whose face slab a simulated annotator reads


@torch.no_grad()
def evaluate(
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    reward: RewardModel,
    seeds: Sequence[int],
    out: str | Path,
    *,
    level: float,
    annotator: SimulatedAnnotator | None = None,
    pictures: int = 8,
    about: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Compare on `seeds`; writes evaluation.json and report.html, returns the former's content.

    Seeds are truncated as the reward's own samples were.
    The share of seeds whose tuned geometry the reward prefers counts ties as half and comes with
    its 95 % Wilson interval. An annotator judges beside the reward, by its rule and without its
    mistakes and ties: "simulated_annotator" in the content. Side views are of +-30 degrees.
    Pictures show seeds from the least to the largest gain, evenly spaced in rank, so the worst is
    among them.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    with progress(len(seeds), "evaluate") as bar:
        for done, seed in enumerate(seeds, 1):
            results.append(_compare_seed(base, tuned, reward, annotator, seed))
            bar.update(done)
    gains = np.array([result.gain for result in results])

    def mean(name: str) -> float | None:
        """None where a PSNR is infinite, as of equal images: JSON has no infinity."""
        value = float(np.mean([getattr(result, name) for result in results]))
        return value if math.isfinite(value) else None

    content: dict[str, Any] = {
        **(about or {}),
        "seeds": len(seeds),
        **_share_preferred(gains),
        "base_reward": mean("base_reward"),
        "tuned_reward": mean("tuned_reward"),
        "drift": mean("drift"),
        "appearance_psnr_db": mean("psnr"),
        "appearance_ssim": mean("ssim"),
        "side_psnr_db": mean("side_psnr"),
        "side_ssim": mean("side_ssim"),
    }
    if annotator is not None:
        content["simulated_annotator"] = _judgement_of_all(
            annotator.rule,
            [result.simulated for result in results if result.simulated is not None],
            base.config.millimetres,
        )
    content["per_seed"] = [result.to_json() for result in results]
    write_summary(out / "evaluation.json", content)
    order = np.argsort(gains, kind="stable")
    ranks = np.unique(np.linspace(0, len(results) - 1, min(pictures, len(results))).round())
    shown = [results[order[int(rank)]] for rank in ranks]
    tiles = [seed_pictures(base, tuned, result.seed, reward.settings, level) for result in shown]
    write_report(out / "report.html", content, shown, tiles, gains)
    return content


def _share_preferred(gains: np.ndarray) -> dict[str, Any]:
    wins = float((gains > 0).sum() + (gains == 0).sum() / 2)
    return {
        "tuned_preferred": wins / len(gains),
        "tuned_preferred_interval": list(wilson_interval(wins, len(gains))),
    }


def _judgement_of_all(
    rule: str, judgements: Sequence[SimulatedJudgement], millimetres: float | None
) -> dict[str, Any]:
    """What a simulated annotator says of all seeds; distances by the rule "clean" alone."""
    base, tuned = np.array([(j.base_score, j.tuned_score) for j in judgements]).T
    judgement = {
        "rule": rule,
        "prefers": RULES[rule],
        **_share_preferred(tuned - base),
        "base_score": float(base.mean()),
        "tuned_score": float(tuned.mean()),
    }
    if rule == "clean":
        apart = np.array([(j.base_distance, j.tuned_distance) for j in judgements])
        judgement["base_distance"], judgement["tuned_distance"] = apart.mean(axis=0).tolist()
        judgement["distance_unit"] = "world units" if millimetres is None else "mm"
    return judgement


def _judge(
    annotator: SimulatedAnnotator,
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    planes: tuple[Tensor, Tensor],
    seed: int,
    sampling: SlabSettings,
) -> SimulatedJudgement:
    """What the annotator says of one seed, given its planes in both generators."""
    settings = replace(sampling, resolution=ANNOTATOR_RESOLUTION, slab="face")
    grid = settings.grid(base.box_side)
    volumes = torch.cat(
        [
            slab_of_planes(generator, of_it, settings)
            for generator, of_it in zip((base, tuned), planes, strict=True)
        ]
    )
    if annotator.rule != "clean":
        return SimulatedJudgement(*annotator.scores(volumes, grid).tolist())
    clean = clean_volumes(base, [seed], settings).expand_as(volumes)
    scores = annotator.scores(volumes, grid, clean)
    distances = -scores * (base.config.millimetres or 1.0)
    return SimulatedJudgement(*scores.tolist(), *distances.tolist())


def _compare_seed(
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    reward: RewardModel,
    annotator: SimulatedAnnotator | None,
    seed: int,
) -> SeedComparison:
    ws0, ws1 = (ws_of_seeds(g, [seed], reward.settings) for g in (base, tuned))
    planes0, planes1 = base.planes(ws0), tuned.planes(ws1)
    grid = Grid.cube(64, base.box_side)
    drift = density_grid_loss(
        planes1, tuned.decoder, grid, tuned.layout, (planes0, base.decoder), kind="l1"
    )
    quality = []
    for yaw in (0.0, -SIDE_VIEW_YAW, SIDE_VIEW_YAW):
        camera = base.frontal_camera(yaw)
        image0 = base.render(ws0, camera, planes=planes0)["image"][0]
        image1 = tuned.render(ws1, camera, planes=planes1)["image"][0]
        quality.append((psnr(image1, image0), ssim(image1, image0)))
    front, *sides = quality
    side_psnr, side_ssim = np.mean(sides, axis=0).tolist()
    return SeedComparison(
        seed=seed,
        base_reward=float(reward.score_planes(base, planes0)),
        tuned_reward=float(reward.score_planes(tuned, planes1)),
        drift=float(drift),
        psnr=front[0],
        ssim=front[1],
        side_psnr=side_psnr,
        side_ssim=side_ssim,
        simulated=(
            None
            if annotator is None
            else _judge(annotator, base, tuned, (planes0, planes1), seed, reward.settings)
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
