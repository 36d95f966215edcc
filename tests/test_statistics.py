"""Intervals and calibration against values worked out by hand."""

import numpy as np
import pytest

from densityrl.statistics import CalibrationBin, calibration, wilson_interval


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
