"""The whole loop on the bundled generator, judged by a rule whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from densityrl.config import FinetuneConfig, RewardConfig
from densityrl.evaluation import evaluate, seed_pictures
from densityrl.export import SURFACE_LEVEL
from densityrl.finetune.train import finetune
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.picture import resized, sheet, write_png
from densityrl.preference import write_preferences
from densityrl.preference.oracle import front_mass, simulate_preferences
from densityrl.reward import RewardModel
from densityrl.reward.train import train_reward
from densityrl.sample import TILE, sample
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, density_slab

if TYPE_CHECKING:
    from PIL import Image

GENERATOR = "busts"
RESOLUTION = 48  # points a side of the box that the reward reads
HELD_OUT = range(1000, 1100)
SHOWN = (1, 2, 4)


def demo(out: str | Path, *, pairs: int, steps: int, resume: bool = False) -> Iterator[str]:
    """Sample, simulate preferences, train a reward, fine-tune, evaluate; yields what to print.

    The simulated annotator prefers more mass in the front half of the slab. With `resume`,
    finished stages are kept and the one that was cut short goes on.
    """
    out = Path(out)
    base = load_generator(GENERATOR)
    settings = SlabSettings(resolution=RESOLUTION)

    yield f"1/5 sampling 6 heads of the bundled generator '{GENERATOR}' ..."
    sample(base, range(6), out / "base", SlabSettings(slab="full"), SURFACE_LEVEL)
    yield f"    {out / 'base' / 'sheet.png'}"

    yield f"2/5 {pairs} pairs, of which an annotator prefers the one with more mass in front ..."
    table = out / "preferences.csv"
    if not (resume and table.exists()):
        seeds = np.arange(10_000, 10_000 + 2 * pairs)
        scores = front_mass(density_slab(base, seeds.tolist(), settings)).numpy()
        write_preferences(table, simulate_preferences(seeds, scores, pairs))

    yield "3/5 training a reward on them ..."
    reward = train_reward(
        RewardConfig(generator=GENERATOR, preferences=str(table), resolution=RESOLUTION),
        out / "reward",
        resume=resume and (out / "reward" / "config.json").exists(),
    )
    low, high = reward["accuracy_interval"]
    yield f"    held-out accuracy {reward['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})"

    yield f"4/5 fine-tuning the generator, {steps} steps ..."
    finetune(
        FinetuneConfig(generator=GENERATOR, reward=str(out / "reward"), steps=steps),
        out / "tuned",
        resume=resume and (out / "tuned" / "config.json").exists(),
    )

    yield "5/5 comparing on 100 held-out seeds ..."
    tuned = load_generator(out / "tuned")
    summary = evaluate(
        base,
        tuned,
        RewardModel.load(out / "reward"),
        HELD_OUT,
        out / "evaluation",
        level=SURFACE_LEVEL,
        about={"base": GENERATOR, "tuned": str(out / "tuned"), "reward": str(out / "reward")},
    )
    sample(tuned, range(6), out / "sculpted", SlabSettings(slab="full"), SURFACE_LEVEL)
    write_png(out / "before_after.png", before_after(base, tuned, SHOWN, settings))
    before, after = (front_mass(density_slab(g, HELD_OUT, settings)) for g in (base, tuned))
    right_way = int(torch.count_nonzero(after > before))
    low, high = wilson_interval(right_way, len(HELD_OUT))
    yield (
        f"    by the annotator's own rule {right_way} of {len(HELD_OUT)} heads moved the right "
        f"way (95 % interval {low:.1%} to {high:.1%}): mass in front {before.mean():.3f} -> "
        f"{after.mean():.3f}"
    )
    yield f"    by the reward {summary['tuned_preferred']:.1%} are better"
    yield f"    front view kept to {summary['appearance_psnr_db']:.1f} dB PSNR"
    yield f"    {out / 'before_after.png'}, {out / 'evaluation' / 'report.html'}"


def before_after(
    base: TriplaneGenerator,
    tuned: TriplaneGenerator,
    seeds: Sequence[int],
    sampling: SlabSettings,
) -> Image.Image:
    """A row of pictures a generator, three of each seed."""
    pictures = [seed_pictures(base, tuned, seed, sampling, SURFACE_LEVEL) for seed in seeds]
    views = ("render", "three-quarter", "side")
    rows = [
        [resized(of_seed[f"{which} {view}"], TILE) for of_seed in pictures for view in views]
        for which in ("base", "tuned")
    ]
    return sheet(rows, ("before", "after"))
