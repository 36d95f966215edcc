"""Simulated annotators: rules on density volumes whose truth is known."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from densityrl.preference.table import PreferenceTable


def front_mass(sigma: Tensor) -> Tensor:
    """Share in [0, 1] of a volume's mass that lies in its front half; raw [B, X, Y, Z] -> [B].

    Mass is the density that a ray marcher sees, softplus(sigma - 1). Larger is better.
    """
    mass = F.softplus(sigma - 1).sum(dim=(1, 2))
    return mass[:, mass.shape[1] // 2 :].sum(dim=1) / mass.sum(dim=1)


def simulate_preferences(
    seeds: np.ndarray, scores: np.ndarray, pairs: int, seed: int = 0, mistakes: float = 0.0
) -> PreferenceTable:
    """Pairs in which the seed with the larger score wins; no seed in more than one pair.

    seeds int [S], scores [S] with S >= 2 * pairs; `mistakes` in [0, 1] is the share of pairs
    that come out wrong. Deterministic in `seed`.
    """
    if len(seeds) < 2 * pairs:
        raise ValueError(f"{pairs} pairs need {2 * pairs} seeds, not {len(seeds)}")
    draw = np.random.default_rng(seed)
    left, right = draw.permutation(len(seeds))[: 2 * pairs].reshape(2, pairs)
    left_wins = (scores[left] > scores[right]) ^ (draw.random(pairs) < mistakes)
    return PreferenceTable(
        winners=np.where(left_wins, seeds[left], seeds[right]),
        losers=np.where(left_wins, seeds[right], seeds[left]),
    )
