"""How sure a win rate is, how far a prediction can be believed, and whether people agree."""

from collections import Counter
from collections.abc import Hashable, Sequence
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


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Agreement of two raters beyond chance (J. Cohen, Educ. Psychol. Meas. 20, 1960, p. 37).

        kappa = (p_observed - p_chance) / (1 - p_chance),    p_chance = sum_k p_a(k) p_b(k)

    a, b: labels of the same items, in one order. 1 for full agreement, 0 for chance, negative
    below it; NaN for no items, or where both gave one same label throughout. Raises ValueError
    for lists of two lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"need labels of the same items, not {len(a)} and {len(b)}")
    n = len(a)
    of_a, of_b = Counter(a), Counter(b)
    agreed = sum(x == y for x, y in zip(a, b, strict=True))
    by_chance = sum(count * of_b[label] for label, count in of_a.items())
    if by_chance == n * n:  # also for n = 0
        return float("nan")
    return (agreed / n - by_chance / n**2) / (1 - by_chance / n**2)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float:
    """Agreement of any number of raters beyond chance, for labels without an order.

        alpha = 1 - D_observed / D_expected
        D_observed = 1/n sum_u sum_{c != k} n_uc n_uk / (m_u - 1)
        D_expected = 1/(n (n - 1)) sum_{c != k} n_c n_k

    over the m_u labels of each unit u that has two or more, n in all (K. Krippendorff, Content
    Analysis, 2004, p. 221). units: of each item its labels, from whoever rated it. 1 for full
    agreement, 0 for chance; NaN where there is nothing to compare, or one same label throughout.
    """
    rated = [Counter(labels) for labels in units if len(labels) > 1]
    of_label: Counter[Hashable] = Counter()
    observed = 0.0
    for counts in rated:
        of_label.update(counts)
        m = counts.total()
        observed += (m**2 - sum(count**2 for count in counts.values())) / (m - 1)
    n = of_label.total()
    expected = n**2 - sum(count**2 for count in of_label.values())
    return 1 - (n - 1) * observed / expected if expected else float("nan")
