"""How sure a win rate is, and how far a predicted preference can be believed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CalibrationBin:
    """The `count` predictions whose confidence is in [low, high), the last bin closed."""

    low: float
    high: float
    confidence: float  # mean
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Errors of predicted probabilities, both in [0, 1] and 0 at best; bins without empty ones."""

    expected_calibration_error: float
    brier: float
    bins: tuple[CalibrationBin, ...]


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion (E. B. Wilson, JASA 22, 1927, p. 209).

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    p = successes / n

    successes: 0 to n, a tie counting a half; z: normal quantile, by default of 95 %.
    Returns (low, high) within [0, 1]; (0, 1) for n = 0. Raises ValueError out of range.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z**2 / (2 * n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1 + z**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def calibration(
    probabilities: Sequence[float] | np.ndarray,
    outcomes: Sequence[float] | np.ndarray,
    bins: int = 10,
) -> Calibration:
    """Compare predicted preferences with what was preferred.

    A prediction is made with confidence max(p, 1 - p), and is right where the side above a half
    won; p of exactly a half, like a tie, counts as half right. Over `bins` bins of equal width
    between 0.5 and 1,

        expected calibration error = sum_b count_b / n |accuracy_b - confidence_b|
        Brier score                = mean (p - outcome)^2

    (C. Guo et al., arXiv:1706.04599, eq. 3; G. W. Brier, Monthly Weather Review 78, 1950, halved
    as is usual for two classes).

    probabilities [n]: that the first of a pair beats the second; outcomes [n]: 1 where it did,
    0 where it did not, 0.5 for a tie. Raises ValueError for an empty or malformed input.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    outcome = np.asarray(outcomes, dtype=np.float64)
    if p.ndim != 1 or p.shape != outcome.shape or not len(p):
        raise ValueError(f"need two equal lists, not shapes {p.shape} and {outcome.shape}")
    if not (((p >= 0) & (p <= 1)).all() and ((outcome >= 0) & (outcome <= 1)).all()):
        raise ValueError("probabilities and outcomes must be within 0 and 1")
    confidence = np.maximum(p, 1 - p)
    predicted = (1 + np.sign(p - 0.5)) / 2
    right = 1 - np.abs(predicted - outcome)

    edges = np.linspace(0.5, 1, bins + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence, side="right")
    rows = []
    for index in np.unique(bin_of).tolist():
        inside = bin_of == index
        rows.append(
            CalibrationBin(
                low=float(edges[index]),
                high=float(edges[index + 1]),
                confidence=float(confidence[inside].mean()),
                accuracy=float(right[inside].mean()),
                count=int(inside.sum()),
            )
        )
    return Calibration(
        expected_calibration_error=sum(
            row.count * abs(row.accuracy - row.confidence) for row in rows
        )
        / len(p),
        brier=float(((p - outcome) ** 2).mean()),
        bins=tuple(rows),
    )
