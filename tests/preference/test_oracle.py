"""Simulated annotators."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densityrl.preference.oracle import front_mass, simulate_preferences


def test_front_mass_by_hand():
    sigma = torch.full((1, 2, 2, 4), -1000.0)
    sigma[0, 0, 0, 3] = 5.0
    assert front_mass(sigma).item() == pytest.approx(1.0)
    sigma[0, 1, 1, 0] = 5.0
    assert front_mass(sigma).item() == pytest.approx(0.5)
    sigma[0, 1, 1, 1] = 3.0
    front, rear = F.softplus(torch.tensor([4.0, 2.0]))
    assert front_mass(sigma).item() == pytest.approx((front / (2 * front + rear)).item())


def test_the_larger_score_wins_and_no_seed_comes_twice():
    seeds = np.arange(100, 150)
    scores = np.random.default_rng(1).random(50)
    table = simulate_preferences(seeds, scores, 20)
    assert len(table) == 20
    assert len(table.seeds) == 40
    assert (scores[table.winners - 100] > scores[table.losers - 100]).all()
    again = simulate_preferences(seeds, scores, 20)
    assert np.array_equal(again.winners, table.winners)
    other = simulate_preferences(seeds, scores, 20, seed=1)
    assert not np.array_equal(other.winners, table.winners)


def test_mistakes():
    seeds, scores = np.arange(2000), np.random.default_rng(1).random(2000)
    table = simulate_preferences(seeds, scores, 1000, mistakes=0.2)
    assert np.mean(scores[table.winners] < scores[table.losers]) == pytest.approx(0.2, abs=0.04)


def test_too_few_seeds():
    with pytest.raises(ValueError, match="30 pairs need 60 seeds, not 59"):
        simulate_preferences(np.arange(59), np.zeros(59), 30)
