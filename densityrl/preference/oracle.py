"""Simulated annotators: rules on density volumes, for pairs whose true answer is known.

No person is involved: what is learned from these pairs shows that learning works, and nothing
about taste.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from densityrl.export import SURFACE_LEVEL
from densityrl.generator.model import TriplaneGenerator, latents
from densityrl.geometry import asymmetry, nose_length, roughness, surface_distance
from densityrl.preference.table import PreferenceTable
from densityrl.volume import SlabSettings, slab_of_planes
from triplane_kernels import Grid

# What a simulated annotator prefers.
RULES = {
    "clean": "the head whose surface is nearer to that of its clean twin",
    "smooth": "the head with less of bumps and dents",
    "symmetric": "the head that is more like its mirror image",
    "nose": "the head with the longer nose",
}


@torch.no_grad()
def clean_volumes(
    generator: TriplaneGenerator,
    seeds: Sequence[int],
    settings: SlabSettings,
    *,
    batch: int = 4,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Raw density slabs [len(seeds), X, Y, Z] of the seeds' clean twins, as the generator has them.

    What `density_slab` gives, but of `without_faults`. For the twins of a tuned generator's heads
    give the frozen one. Raises ValueError for a generator that knows no faults.
    """
    slabs = [torch.empty(0, *settings.grid(generator.box_side).shape, device=generator.device)]
    for start in range(0, len(seeds), batch):
        z = latents(seeds[start : start + batch], generator.z_dim).to(generator.device)
        ws = generator.mapping(
            generator.without_faults(z),
            truncation_psi=settings.truncation_psi,
            truncation_cutoff=settings.truncation_cutoff,
        )
        slabs.append(slab_of_planes(generator, generator.planes(ws), settings))
        if on_progress is not None:
            on_progress(start + len(z))
    return torch.cat(slabs)


@dataclass(frozen=True)
class SimulatedPreferences:
    """What a simulated annotator answered."""

    table: PreferenceTable  # the decided pairs
    ties: int  # further pairs that were shown and too close to decide
    mistakes: int  # decided pairs that came out wrong


@dataclass(frozen=True, kw_only=True)
class SimulatedAnnotator:
    """Prefers by a rule, errs at a known rate, and does not decide the closest pairs."""

    rule: str  # one of RULES
    mistakes: float = 0.0  # chance of a decided pair to come out wrong, 0 to 1
    ties: float = 0.0  # share of the pairs shown, those of the smallest difference, below 1
    seed: int = 0  # of which seeds meet, and of the mistakes
    level: float = SURFACE_LEVEL  # raw density of the surface

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {self.rule!r}")
        if not 0 <= self.mistakes <= 1:
            raise ValueError(f"mistakes must be a share from 0 to 1, not {self.mistakes}")
        if not 0 <= self.ties < 1:
            raise ValueError(f"ties must be a share from 0 to below 1, not {self.ties}")

    def scores(self, volumes: Tensor, grid: Grid, clean: Tensor | None = None) -> np.ndarray:
        """[S] float64 of raw density volumes [S, X, Y, Z], larger is better; in world units.

        The rule "clean" compares each with its twin in `clean` [S, X, Y, Z], see
        `clean_volumes`; the other rules do not look at it.
        """
        heads = volumes.detach().cpu().numpy()
        if self.rule == "clean":
            if clean is None or clean.shape != volumes.shape:
                raise ValueError(
                    f"the rule clean needs the twins' volumes, {list(volumes.shape)} as the heads'"
                )
            twins = clean.detach().cpu().numpy()
            scores = [
                -surface_distance(head, twin, grid, self.level)
                for head, twin in zip(heads, twins, strict=True)
            ]
        elif self.rule == "smooth":
            scores = [-roughness(head, grid, self.level) for head in heads]
        elif self.rule == "symmetric":
            scores = [-asymmetry(head, grid, self.level) for head in heads]
        else:
            scores = [nose_length(head, grid, self.level) for head in heads]
        return np.array(scores, dtype=np.float64)

    def seeds_needed(self, pairs: int) -> int:
        """How many seeds `prefer` uses up for so many decided pairs."""
        return 2 * self._shown(pairs)

    def prefer(self, seeds: np.ndarray, scores: np.ndarray, pairs: int) -> SimulatedPreferences:
        """Decide `pairs` pairs of the seeds [S] with these scores [S]; no seed is in two pairs.

        Shows round(pairs / (1 - ties)) random pairs and leaves the closest undecided.
        Deterministic in the annotator's seed.
        """
        shown = self._shown(pairs)
        if len(seeds) < 2 * shown:
            raise ValueError(f"{pairs} pairs need {2 * shown} seeds, not {len(seeds)}")
        if len(np.unique(seeds)) != len(seeds):
            raise ValueError("the seeds to prefer among must differ; leave out the repeated ones")
        if len(scores) != len(seeds) or not np.isfinite(scores).all():
            raise ValueError(f"each of the {len(seeds)} seeds needs one finite score")
        draw = np.random.default_rng(self.seed)
        left, right = draw.permutation(len(seeds))[: 2 * shown].reshape(2, shown)
        closest_first = np.argsort(np.abs(scores[left] - scores[right]), kind="stable")
        decided = np.sort(closest_first[shown - pairs :])
        left, right = left[decided], right[decided]
        wrong = draw.random(pairs) < self.mistakes
        left_wins = (scores[left] > scores[right]) ^ wrong
        table = PreferenceTable(
            winners=np.where(left_wins, seeds[left], seeds[right]),
            losers=np.where(left_wins, seeds[right], seeds[left]),
            annotators=np.full(pairs, f"simulated:{self.rule}"),
        )
        return SimulatedPreferences(table, ties=shown - pairs, mistakes=int(wrong.sum()))

    def _shown(self, pairs: int) -> int:
        return round(pairs / (1 - self.ties))
