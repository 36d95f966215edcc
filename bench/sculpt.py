"""SculptBench: the whole loop against simulated annotators, whose truth is known.

    python bench/sculpt.py --rules clean --budgets 500
    python bench/sculpt.py --save            # all of it, kept in bench/results

For each rule and number of preferences: rank pairs of the bundled generator's heads, train a
reward, fine-tune, and judge on 200 seeds that took no part. One in ten labels is wrong, and of the
pairs shown the closest fifth gets none; judges make no mistakes. What is finished is kept in
--work and not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, Provenance
from torch import Tensor

from densityrl.config import FINETUNE_PRESETS, REWARD_PRESETS, FinetuneConfig, RewardConfig
from densityrl.evaluation.appearance import ImageFeatures, frechet_distance, psnr, ssim
from densityrl.finetune.train import finetune
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.preference import write_preferences
from densityrl.preference.oracle import RULES, SimulatedAnnotator, clean_volumes
from densityrl.reward import RewardModel
from densityrl.reward.train import train_reward
from densityrl.run import atomic_write, progress
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, VolumeCache, density_slab, slab_of_planes, ws_of_seeds

BUDGETS = (50, 150, 500, 2000)
MISTAKES, TIES = 0.1, 0.2
FIRST_RANKED = 10_000  # seeds from here on are ranked
FIRST_JUDGED = 1000  # unseen: nothing was trained, ranked or chosen with the 200 from here on
FIRST_REFERENCE = 2000  # seeds whose images are the set that others are compared with
IMAGE_SIDE = 64  # pixels
VIEWS = {"front": (0.0,), "side": (-np.pi / 6, np.pi / 6)}  # yaw
SETTINGS = SlabSettings()  # what annotators look at: the paper's crop of 64 points a side


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the loop; the two dictionaries replace defaults of the configurations."""

    rule: str
    pairs: int
    preset: str = "default"
    seed: int = 0
    reward: dict[str, Any] = dataclasses.field(default_factory=dict)
    finetune: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        changes = [f"{key}={value}" for key, value in {**self.reward, **self.finetune}.items()]
        return "_".join([self.rule, str(self.pairs), self.preset, f"s{self.seed}", *changes])

    @property
    def annotator(self) -> SimulatedAnnotator:
        return SimulatedAnnotator(rule=self.rule, mistakes=MISTAKES, ties=TIES, seed=self.seed)

    @property
    def seeds(self) -> list[int]:
        """That are shown to the annotator."""
        return list(range(FIRST_RANKED, FIRST_RANKED + self.annotator.seeds_needed(self.pairs)))

    @property
    def reward_name(self) -> str:
        """Cells that differ in fine-tuning alone share a reward."""
        return dataclasses.replace(self, finetune={}).name


class Heads:
    """Scores of ranked seeds, and what judging needs of the frozen generator; kept in `work`."""

    def __init__(self, generator: str, work: Path) -> None:
        self.word, self.work = generator, work
        for folder in ("cells", "rewards", "results"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        self.generator = load_generator(generator)
        self.volumes = work / "volumes"
        self.grid = SETTINGS.grid(self.generator.box_side)
        self.unit = self.generator.config.millimetres or 1.0

    def result(self, cell: Cell) -> Path:
        return self.work / "results" / f"{cell.name}.json"

    def scores(self, rule: str, seeds: Sequence[int]) -> np.ndarray:
        """[len(seeds)], larger is better."""
        file = self.work / f"scores_{self.generator.fingerprint()[:12]}_{rule}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        missing = [seed for seed in seeds if str(seed) not in known]
        cache = VolumeCache(self.volumes, self.generator, SETTINGS)
        annotator = SimulatedAnnotator(rule=rule)
        with progress(max(len(missing), 1), f"scores, {rule}") as bar:
            for start in range(0, len(missing), 16):
                part = missing[start : start + 16]
                sigma = density_slab(self.generator, part, SETTINGS, cache=cache)
                clean = clean_volumes(self.generator, part, SETTINGS) if rule == "clean" else None
                values = annotator.scores(sigma, self.grid, clean)
                known.update(zip(map(str, part), values.tolist(), strict=True))
                bar.update(start + len(part))
        if missing:
            atomic_write(file, json.dumps(known))
        return np.array([known[str(seed)] for seed in seeds])


@dataclass(frozen=True)
class Looks:
    """What a generator makes of seeds."""

    sigma: Tensor  # [S, X, Y, Z], face slabs
    images: dict[str, Tensor]  # view -> [S, views, 3, R, R]

    @classmethod
    @torch.no_grad()
    def of(cls, generator: TriplaneGenerator, seeds: Sequence[int], views: Sequence[str]) -> Looks:
        sigma: list[Tensor] = []
        images: dict[str, list[Tensor]] = {view: [] for view in views}
        with progress(len(seeds), "look") as bar:
            for done, seed in enumerate(seeds, 1):
                ws = ws_of_seeds(generator, [seed], SETTINGS)
                planes = generator.planes(ws)
                sigma.append(slab_of_planes(generator, planes, SETTINGS))
                for view in views:
                    shots = [
                        generator.render_raw(planes, generator.frontal_camera(yaw), IMAGE_SIDE)
                        for yaw in VIEWS[view]
                    ]
                    images[view].append(torch.stack(shots, dim=1))
                bar.update(done)
        return cls(torch.cat(sigma), {view: torch.cat(shots) for view, shots in images.items()})


@dataclass(frozen=True)
class Start:
    """The frozen generator on the judged seeds."""

    looks: Looks
    clean: Tensor  # [S, X, Y, Z] of the clean twins
    reference: np.ndarray  # [R, 64] image features of other seeds

    @classmethod
    def of(cls, heads: Heads, seeds: Sequence[int]) -> Start:
        others = range(FIRST_REFERENCE, FIRST_REFERENCE + len(seeds))
        fronts = Looks.of(heads.generator, others, ["front"]).images["front"]
        return cls(
            Looks.of(heads.generator, seeds, list(VIEWS)),
            clean_volumes(heads.generator, seeds, SETTINGS),
            ImageFeatures()(fronts[:, 0]),
        )


def run_cell(cell: Cell, heads: Heads, start: Start, judged: Sequence[int]) -> dict[str, Any]:
    """Rank, train, tune and judge."""
    scores = heads.scores(cell.rule, cell.seeds)
    labels = cell.annotator.prefer(np.array(cell.seeds), scores, cell.pairs)
    folder = heads.work / "cells" / cell.name
    table = heads.work / "rewards" / f"{cell.reward_name}.csv"
    write_preferences(table, labels.table)

    reward_folder = heads.work / "rewards" / cell.reward_name
    began = time.monotonic()
    reward_config = RewardConfig(
        generator=heads.word,
        preferences=str(table),
        volumes=str(heads.volumes),
        seed=cell.seed,
        **{**REWARD_PRESETS[cell.preset], **cell.reward},
    )
    if not (reward_folder / "summary.json").exists():
        resume = (reward_folder / "config.json").exists()
        summary = train_reward(reward_config, reward_folder, resume=resume)
        summary["seconds"] = time.monotonic() - began
        atomic_write(reward_folder / "summary.json", json.dumps(summary))
    trained = json.loads((reward_folder / "summary.json").read_text())
    reward = RewardModel.load(reward_folder)
    with torch.no_grad():
        before = density_slab(heads.generator, judged, reward.settings)
        rewards = torch.cat([reward.score_slab(part) for part in before.split(50)]).numpy()
    scores = SimulatedAnnotator(rule=cell.rule).scores(start.looks.sigma, heads.grid, start.clean)

    began = time.monotonic()
    finetune_config = FinetuneConfig(
        generator=heads.word,
        reward=str(reward_folder),
        seed=cell.seed,
        **{**FINETUNE_PRESETS[cell.preset], **cell.finetune},
    )
    finetune(finetune_config, folder, resume=(folder / "config.json").exists())
    tuning_seconds = time.monotonic() - began
    tuned = load_generator(folder)
    return {
        "rule": cell.rule,
        "pairs": cell.pairs,
        "preset": cell.preset,
        "seed": cell.seed,
        "changes": {**cell.reward, **cell.finetune},
        "pair_accuracy": trained["accuracy"],
        "unseen_pair_accuracy": unseen_accuracy(rewards, scores),
        **judge(cell.rule, tuned, heads, start, judged, scores),
        "reward_seconds": trained["seconds"],
        "finetune_seconds": tuning_seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def unseen_accuracy(rewards: np.ndarray, scores: np.ndarray) -> float:
    """Share of all pairs of unseen seeds, the closest fifth left out, ranked as by the rule.

    Labels are without mistakes, so the ceiling is 1.
    """
    i, j = np.triu_indices(len(scores), 1)
    gap = scores[i] - scores[j]
    decided = np.abs(gap) >= np.quantile(np.abs(gap), TIES)
    return float(((rewards[i] > rewards[j]) == (gap > 0))[decided].mean())


def judge(
    rule: str,
    tuned: TriplaneGenerator,
    heads: Heads,
    start: Start,
    judged: Sequence[int],
    before: np.ndarray,
) -> dict[str, Any]:
    """The tuned generator against the frozen one on the judged seeds."""
    looks = Looks.of(tuned, judged, list(VIEWS))
    after = SimulatedAnnotator(rule=rule).scores(looks.sigma, heads.grid, start.clean)
    better = int((after > before).sum())
    by_distance = SimulatedAnnotator(rule="clean")
    distance = [
        -by_distance.scores(sigma, heads.grid, start.clean) * heads.unit
        for sigma in (start.looks.sigma, looks.sigma)
    ]

    def kept(measure: Callable[[Tensor, Tensor], float], view: str) -> float:
        pairs = zip(
            looks.images[view].flatten(0, 1), start.looks.images[view].flatten(0, 1), strict=True
        )
        return float(np.mean([min(measure(a, b), 99.0) for a, b in pairs]))

    features = ImageFeatures()
    frechet = [
        frechet_distance(features(x.images["front"][:, 0]), start.reference)
        for x in (start.looks, looks)
    ]
    return {
        "judged": len(judged),
        "better": better / len(judged),
        "better_interval": list(wilson_interval(better, len(judged))),
        "score_before": float(before.mean()),
        "score_after": float(after.mean()),
        "score_spread": float(before.std()),
        "distance_before_mm": float(distance[0].mean()),
        "distance_after_mm": float(distance[1].mean()),
        "front_psnr_db": kept(psnr, "front"),
        "front_ssim": kept(ssim, "front"),
        "side_psnr_db": kept(psnr, "side"),
        "side_ssim": kept(ssim, "side"),
        "frechet_before": frechet[0],
        "frechet_after": frechet[1],
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "annotator": lambda r: r["rule"],
    "pairs": lambda r: str(r["pairs"]),
    "labels": lambda r: str(r["seed"]),
    "recipe": lambda r: r["preset"] + "".join(f", {k} {v}" for k, v in r["changes"].items()),
    "unseen pairs": lambda r: f"{r['unseen_pair_accuracy']:.1%}",
    "own test pairs": lambda r: f"{r['pair_accuracy']:.0%}",
    "better": lambda r: f"{r['better']:.1%}",
    "score, in spreads": lambda r: (
        f"{(r['score_after'] - r['score_before']) / r['score_spread']:+.2f}"
    ),
    "to clean head, mm": lambda r: f"{r['distance_before_mm']:.2f} → {r['distance_after_mm']:.2f}",
    "front PSNR, SSIM": lambda r: f"{r['front_psnr_db']:.1f} dB, {r['front_ssim']:.3f}",
    "side PSNR, SSIM": lambda r: f"{r['side_psnr_db']:.1f} dB, {r['side_ssim']:.3f}",
    "Fréchet": lambda r: f"{r['frechet_before']:.2f} → {r['frechet_after']:.2f}",
    "seconds": lambda r: f"{r['reward_seconds']:.0f} + {r['finetune_seconds']:.0f}",
    "GiB": lambda r: f"{r['peak_gib']:.1f}",
}


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell(row) for cell in COLUMNS.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def figure_of(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """What more preferences buy: four panels over the number of pairs, a line a rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "unseen pairs ranked right, %": lambda r: 100 * r["unseen_pair_accuracy"],
        "heads better by the rule, %": lambda r: 100 * r["better"],
        "gain by the rule, in spreads before": lambda r: (
            (r["score_after"] - r["score_before"]) / r["score_spread"]
        ),
        "front view kept, dB": lambda r: r["front_psnr_db"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.6), constrained_layout=True)
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for preset, style in (("default", "o-"), ("paper", "x:")):
            for color, rule in enumerate(RULES):
                values = defaultdict(list)  # of several sets of labels the mean is drawn
                for row in rows:
                    # The paper's recipe is drawn however few of its 1,250 steps a CPU was given.
                    asked = preset == "paper" or not row["changes"]
                    if (row["rule"], row["preset"]) == (rule, preset) and asked:
                        values[row["pairs"]].append(value(row))
                if values:
                    label = rule if preset == "default" else f"{rule}, paper's recipe"
                    means = [float(np.mean(values[pairs])) for pairs in sorted(values)]
                    axis.plot(sorted(values), means, style, color=f"C{color}", label=label)
        axis.set_xscale("log")
        axis.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axis.minorticks_off()
        axis.set_xlabel("preferences, one in ten wrong")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _worker(
    heads: Heads, start: Start, cells: Sequence[Cell], judged: Sequence[int], threads: int
) -> None:
    torch.set_num_threads(threads)
    for cell in cells:
        row = run_cell(cell, heads, start, judged)
        line = {**asdict(Provenance.of("cpu")), **row}
        atomic_write(heads.result(cell), json.dumps(line))


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", default="heads")
    parser.add_argument("--work", type=Path, default=Path("runs/sculpt"))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--presets", default="default", help="default, paper")
    parser.add_argument("--seeds", default="0", help="of labels, rewards and fine-tuning")
    parser.add_argument("--reward", nargs="*", default=[], metavar="NAME=VALUE", type=_override)
    parser.add_argument("--finetune", nargs="*", default=[], metavar="NAME=VALUE", type=_override)
    parser.add_argument("--judged", type=int, default=200, help="unseen seeds to judge on")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--save", action="store_true", help="add lines to the results, draw all")
    args = parser.parse_args()

    cells = [
        Cell(
            rule=rule,
            pairs=int(pairs),
            preset=preset,
            seed=int(seed),
            reward=dict(args.reward),
            finetune=dict(args.finetune),
        )
        for preset in args.presets.split(",")
        for rule in args.rules.split(",")
        for pairs in args.budgets.split(",")
        for seed in args.seeds.split(",")
    ]
    judged = range(FIRST_JUDGED, FIRST_JUDGED + args.judged)
    heads = Heads(args.generator, args.work)
    if missing := [cell for cell in cells if not heads.result(cell).exists()]:
        start = Start.of(heads, judged)
        for cell in sorted(missing, key=lambda cell: -cell.pairs):
            heads.scores(cell.rule, cell.seeds)  # once, before the workers would each do it
        threads = max(1, torch.get_num_threads() // args.workers)
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(
                target=_worker,
                args=(heads, start, missing[i :: args.workers], judged, threads),
                daemon=True,
            )
            for i in range(args.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := [process.exitcode for process in processes if process.exitcode]:
            raise SystemExit(f"{len(failed)} of {len(processes)} workers failed, see above")
    rows = [json.loads(heads.result(cell).read_text()) for cell in cells]
    print(table_of(rows))
    if args.save:
        with (RESULTS / "sculpt.jsonl").open("a+") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.seek(0)
            figure_of([json.loads(line) for line in file], RESULTS / "sculpt.png")


if __name__ == "__main__":
    main()
