"""Intervals, calibration and agreement against values worked out by hand."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densityrl.statistics import (
    CalibrationBin,
    calibration,
    cohen_kappa,
    krippendorff_alpha,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [(100, 0.651, 0.819), (500, 0.704, 0.780)],
)
def test_wilson_of_the_papers_win_rate(n: int, low: float, high: float) -> None:
    assert wilson_interval(0.744 * n, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_by_hand() -> None:
    # z = 2, n = 4, p = 1/2: (0.5 + 0.5 +- 2 sqrt(1/16 + 1/16)) / 2
    half = 2 * 0.125**0.5 / 2
    assert wilson_interval(2, 4, z=2) == pytest.approx((0.5 - half, 0.5 + half))


def test_wilson_ends() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    # p = 0: both terms are z^2 / 2n, so low is 0 and high is z^2 / (n + z^2)
    low, high = wilson_interval(0, 10, z=2)
    assert low == 0.0
    assert high == pytest.approx(4 / 14)
    low, high = wilson_interval(10, 10, z=2)
    assert low == pytest.approx(10 / 14)
    assert high == 1.0


def test_wilson_stays_within_bounds_despite_rounding() -> None:
    for n in range(1, 200):
        assert 0 <= wilson_interval(0, n)[0] < 1e-15
        assert 1 - 1e-15 < wilson_interval(n, n)[1] <= 1


def test_wilson_takes_ties_as_halves() -> None:
    low, high = wilson_interval(7.5, 10)
    assert wilson_interval(7, 10)[0] < low < wilson_interval(8, 10)[0]
    assert wilson_interval(7, 10)[1] < high < wilson_interval(8, 10)[1]


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, -1), (float("nan"), 5)])
def test_wilson_refuses_impossible_counts(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, n)


def test_calibration_by_hand() -> None:
    # 0.9 right, 0.9 wrong, 0.3 (confidence 0.7, says the second) right, 0.72 right
    result = calibration([0.9, 0.9, 0.3, 0.72], [1, 0, 0, 1], bins=5)
    low, high = result.bins
    assert (low.low, low.high) == pytest.approx((0.7, 0.8))
    assert (low.confidence, low.accuracy, low.count) == pytest.approx((0.71, 1.0, 2))
    assert (high.low, high.high) == pytest.approx((0.9, 1.0))
    assert (high.confidence, high.accuracy, high.count) == pytest.approx((0.9, 0.5, 2))
    assert result.expected_calibration_error == pytest.approx((0.29 + 0.4) / 2)
    assert result.brier == pytest.approx((0.01 + 0.81 + 0.09 + 0.0784) / 4)


def test_calibration_of_a_sure_and_right_model() -> None:
    result = calibration([1.0, 0.0], [1, 0])
    assert result.expected_calibration_error == 0.0
    assert result.brier == 0.0
    assert result.bins == (CalibrationBin(0.95, 1.0, 1.0, 1.0, 2),)


def test_calibration_of_a_model_that_abstains() -> None:
    result = calibration([0.5, 0.5, 0.5], [1, 1, 1])
    assert result.expected_calibration_error == 0.0
    assert result.brier == 0.25
    assert result.bins == (CalibrationBin(0.5, 0.55, 0.5, 0.5, 3),)


def test_a_tie_is_half_right() -> None:
    result = calibration([0.8], [0.5], bins=1)
    assert result.bins[0].accuracy == 0.5
    assert result.brier == pytest.approx(0.09)


def test_a_bin_edge_belongs_to_the_bin_above() -> None:
    (row,) = calibration([0.6], [1]).bins
    assert row.low == pytest.approx(0.6)


def test_true_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(100_000)
    result = calibration(p, rng.random(len(p)) < p)
    assert result.expected_calibration_error < 0.01
    assert result.brier == pytest.approx(1 / 6, abs=0.005)  # the mean of p (1 - p)


@pytest.mark.parametrize(
    ("probabilities", "outcomes"),
    [([], []), ([0.5], [1, 0]), ([1.1], [1]), ([float("nan")], [1]), ([0.5], [2])],
)
def test_calibration_refuses_bad_input(probabilities: list, outcomes: list) -> None:
    with pytest.raises(ValueError, match=r"need two equal lists|must be within 0 and 1"):
        calibration(probabilities, outcomes)


# --- agreement -----------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    # both yes 20, both no 15 of 50; a says yes to 25, b to 30: (0.7 - 0.5) / (1 - 0.5)
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)


def test_kappa_of_a_textbook_table() -> None:
    # 45 both yes, 15 and 25 apart, 15 both no: (0.6 - 0.54) / (1 - 0.54)
    a = ["yes"] * 60 + ["no"] * 40
    b = ["yes"] * 45 + ["no"] * 15 + ["yes"] * 25 + ["no"] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.1304, abs=5e-5)


def test_kappa_of_full_agreement_of_chance_and_below() -> None:
    assert cohen_kappa("abca", "abca") == 1.0
    assert cohen_kappa("aabb", "abab") == 0.0
    assert cohen_kappa("aabb", "aaaa") == 0.0  # one of them decides nothing
    assert cohen_kappa("ab", "ba") == -1.0


def test_kappa_of_nothing_to_tell_from() -> None:
    assert math.isnan(cohen_kappa([], []))
    assert math.isnan(cohen_kappa("aaa", "aaa"))
    assert cohen_kappa("aaa", "bbb") == 0.0


def test_kappa_wants_the_same_items() -> None:
    with pytest.raises(ValueError, match="not 2 and 3"):
        cohen_kappa("ab", "abc")


def test_alpha_of_krippendorffs_example() -> None:
    """Reliability data C of "Computing Krippendorff's Alpha-Reliability": nominal, with gaps."""
    coders = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    columns = zip(*(coder.split() for coder in coders), strict=True)
    units = [[label for label in column if label != "."] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([u for u in units if len(u) > 1]) == krippendorff_alpha(units)


def test_alpha_by_hand() -> None:
    # aa, ab, bb: n = 6; D_o = 2 / 6, D_e = 2 * 3 * 3 / 30
    assert krippendorff_alpha(["aa", "ab", "bb"]) == pytest.approx(1 - (1 / 3) / 0.6)
    # three raters: aab disagrees in 4 of its 6 ordered pairs, (9 - 5) / 2; n = 5 with bb
    assert krippendorff_alpha(["aab", "bb"]) == pytest.approx(1 - (2 / 5) / (2 * 2 * 3 / 20))


def test_alpha_of_full_agreement_and_below_chance() -> None:
    assert krippendorff_alpha(["aa", "bbb", "c"]) == 1.0
    assert krippendorff_alpha(["ab"]) == 0.0
    assert krippendorff_alpha(["ab", "ba"]) == pytest.approx(-0.5)  # 1 - 1 / (2 * 4 / 12)


@pytest.mark.parametrize("units", [[], [""], ["a", "b"], ["aa", "aa"], ["aaa", "b"]])
def test_alpha_of_nothing_to_tell_from(units: list) -> None:
    assert math.isnan(krippendorff_alpha(units))


def test_alpha_of_labels_by_chance_is_near_0() -> None:
    rng = np.random.default_rng(0)
    units = rng.integers(0, 3, (20_000, 3)).tolist()
    assert krippendorff_alpha(units) == pytest.approx(0, abs=0.015)


labels = st.sampled_from("abc")
two_raters = st.lists(st.tuples(labels, labels), min_size=1, max_size=20)
steady = settings(deadline=None, derandomize=True)  # CI sees the same cases each run


def same(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, abs=1e-12)


@steady
@given(two_raters, st.permutations("abc"))
def test_kappa_is_symmetric_and_blind_to_names(pairs: list, names: list) -> None:
    a, b = zip(*pairs, strict=True)
    kappa = cohen_kappa(a, b)
    renamed = dict(zip("abc", names, strict=True))
    assert same(cohen_kappa(b, a), kappa)
    assert same(cohen_kappa([renamed[x] for x in a], [renamed[x] for x in b]), kappa)


@steady
@given(st.lists(st.lists(labels, max_size=4), max_size=12), st.permutations("abc"), st.randoms())
def test_alpha_is_blind_to_names_and_order(units: list, names: list, rng: random.Random) -> None:
    renamed = dict(zip("abc", names, strict=True))
    other = [rng.sample([renamed[x] for x in unit], len(unit)) for unit in units]
    rng.shuffle(other)
    assert same(krippendorff_alpha(other), krippendorff_alpha(units))


@steady
@given(two_raters)
def test_alpha_of_two_raters_is_scotts_pi_of_a_small_sample(pairs: list) -> None:
    n = len(pairs)
    counts = Counter(label for pair in pairs for label in pair)
    by_chance = sum((count / (2 * n)) ** 2 for count in counts.values())
    if len(counts) == 1:
        assert math.isnan(krippendorff_alpha(pairs))
        return
    pi = (sum(a == b for a, b in pairs) / n - by_chance) / (1 - by_chance)
    assert krippendorff_alpha(pairs) == pytest.approx(1 - (1 - pi) * (2 * n - 1) / (2 * n))
