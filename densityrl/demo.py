"""The whole loop on the bundled generator, judged by a rule whose truth is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from densityrl.config import FinetuneConfig, RewardConfig
from densityrl.evaluation import evaluate, seed_pictures
from densityrl.export import SURFACE_LEVEL
from densityrl.finetune.train import finetune
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.picture import resized, sheet, write_png
from densityrl.preference import write_preferences
from densityrl.preference.oracle import RULES, SimulatedAnnotator, clean_volumes
from densityrl.reward import RewardModel
from densityrl.reward.train import train_reward
from densityrl.run import progress
from densityrl.sample import TILE, sample
from densityrl.volume import SlabSettings, density_slab

if TYPE_CHECKING:
    from PIL import Image

GENERATOR = "heads"
ANNOTATOR = SimulatedAnnotator(rule="clean", mistakes=0.1, ties=0.2, seed=0)
RESOLUTION = 64  # points a side of the box that the annotator and the reward read
FIRST_SEED = 10_000  # of those that are ranked
HELD_OUT = range(1000, 1100)
SHOWN = 3  # heads in before_after.png
SEEDS_AT_A_TIME = 16


def demo(out: str | Path, *, pairs: int, steps: int, resume: bool = False) -> Iterator[str]:
    """Sample, simulate preferences, train a reward, fine-tune, evaluate; yields what to print.

    The simulated annotator prefers the head whose surface is nearer to that of its clean twin,
    the same head without faults; some of its answers are mistakes, some pairs are ties.
    With `resume`, finished stages are kept and the one that was cut short goes on.
    """
    out = Path(out)
    base = load_generator(GENERATOR)
    settings = SlabSettings(resolution=RESOLUTION)

    yield f"1/5 sampling 6 heads of the bundled generator '{GENERATOR}' ..."
    sample(base, range(6), out / "base", SlabSettings(slab="full"), SURFACE_LEVEL)
    yield f"    {out / 'base' / 'sheet.png'}"

    yield f"2/5 {pairs} pairs, of which a simulated annotator prefers {RULES[ANNOTATOR.rule]} ..."
    table = out / "preferences.csv"
    if not (resume and table.exists()):
        seeds = np.arange(FIRST_SEED, FIRST_SEED + ANNOTATOR.seeds_needed(pairs))
        scores = annotator_scores(base, seeds.tolist(), settings)
        preferences = ANNOTATOR.prefer(seeds, scores, pairs)
        write_preferences(table, preferences.table)
        yield f"    {preferences.mistakes} of them by mistake; {preferences.ties} ties left out"

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

    yield f"5/5 comparing on {len(HELD_OUT)} held-out seeds ..."
    tuned = load_generator(out / "tuned")
    result = evaluate(
        base,
        tuned,
        RewardModel.load(out / "reward"),
        HELD_OUT,
        out / "evaluation",
        level=SURFACE_LEVEL,
        annotator=replace(ANNOTATOR, mistakes=0.0, ties=0.0),
        about={"base": GENERATOR, "tuned": str(out / "tuned"), "reward": str(out / "reward")},
    )
    sample(tuned, range(6), out / "sculpted", SlabSettings(slab="full"), SURFACE_LEVEL)
    faulty = sorted(result["per_seed"], key=lambda row: row["simulated"]["base_score"])[:SHOWN]
    shown = [row["seed"] for row in faulty]
    write_png(out / "before_after.png", before_after(base, tuned, shown, settings))
    judged = result["simulated_annotator"]
    low, high = judged["tuned_preferred_interval"]
    yield (
        f"    by the simulated annotator's own rule "
        f"{judged['tuned_preferred'] * len(HELD_OUT):g} of {len(HELD_OUT)} heads are better "
        f"(95 % interval {low:.1%} to {high:.1%}): mean distance to the clean head "
        f"{judged['base_distance']:.2f} -> {judged['tuned_distance']:.2f} "
        f"{judged['distance_unit']}"
    )
    low, high = result["tuned_preferred_interval"]
    yield (
        f"    by the reward {result['tuned_preferred']:.1%} are better "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )
    yield f"    front view kept to {result['appearance_psnr_db']:.1f} dB PSNR"
    yield (
        f"    {out / 'before_after.png'} (the {len(shown)} of these seeds with the worst faults: "
        f"{', '.join(map(str, shown))}), {out / 'sculpted' / 'sheet.png'}, "
        f"{out / 'evaluation' / 'report.html'}"
    )


def annotator_scores(
    base: TriplaneGenerator, seeds: Sequence[int], settings: SlabSettings
) -> np.ndarray:
    """The simulated annotator's scores [S] of seeds of the base generator."""
    grid = settings.grid(base.box_side)
    scores = []
    with progress(len(seeds), "volumes") as bar:
        for start in range(0, len(seeds), SEEDS_AT_A_TIME):
            part = seeds[start : start + SEEDS_AT_A_TIME]
            volumes = density_slab(base, part, settings)
            scores.append(ANNOTATOR.scores(volumes, grid, clean_volumes(base, part, settings)))
            bar.update(start + len(part))
    return np.concatenate(scores)


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
