"""Simulated annotators."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import CONFIG, tiny_generator

from densityrl.generator import TriplaneGenerator, latents
from densityrl.preference.oracle import RULES, SimulatedAnnotator, clean_volumes
from densityrl.volume import SlabSettings, density_slab, slab_of_planes
from triplane_kernels import Grid

GRID = Grid.cube(40, 1.0)
SEEDS = np.arange(1000, 3000)
SCORES = np.random.default_rng(1).random(2000)


def score_of(seeds):
    return SCORES[seeds - 1000]


def ball(radius, centre=(0.0, 0.0, 0.0)):
    distance = (GRID.points() - torch.tensor(centre)).norm(dim=-1) - radius
    return (10 - 3000 * distance).clamp(-90, 110)


# --- rules ---------------------------------------------------------------------------------------


def better_and_worse(rule):
    """Two heads, and their clean twins where the rule needs them."""
    head = ball(0.3)
    if rule == "clean":
        return head, ball(0.31), torch.stack([ball(0.302), ball(0.302)])
    if rule == "smooth":
        waves = 25 * torch.cos(100 * GRID.points()[..., 0])
        return head, head + waves, None
    if rule == "symmetric":
        return head, torch.maximum(head, ball(0.1, (0.25, 0.1, 0.1))), None
    return torch.maximum(head, ball(0.05, (0.0, 0.0, 0.32))), head, None


@pytest.mark.parametrize("rule", RULES)
def test_the_better_head_has_the_larger_score(rule):
    better, worse, clean = better_and_worse(rule)
    scores = SimulatedAnnotator(rule=rule).scores(torch.stack([better, worse]), GRID, clean)
    assert scores.dtype == np.float64
    assert scores.shape == (2,)
    assert scores[0] > scores[1] + 1e-4


def test_the_rule_clean_by_hand():
    heads, twins = torch.stack([ball(0.3), ball(0.31)]), torch.stack([ball(0.302), ball(0.302)])
    scores = SimulatedAnnotator(rule="clean").scores(heads, GRID, twins)
    np.testing.assert_allclose(scores, [-0.002, -0.008], rtol=0.05)


def test_the_level_is_the_annotator_s():
    heads, twins = ball(0.3)[None], ball(0.3)[None] + 3
    at_10, at_11 = (
        SimulatedAnnotator(rule="clean", level=level).scores(heads, GRID, twins - (level - 10) * 3)
        for level in (10.0, 11.0)
    )
    np.testing.assert_allclose(at_10, -0.001, rtol=0.05)
    np.testing.assert_allclose(at_11, 0, atol=1e-6)


def test_the_rule_clean_needs_twins():
    annotator = SimulatedAnnotator(rule="clean")
    heads = ball(0.3)[None]
    for twins in (None, heads[:0]):
        with pytest.raises(ValueError, match="needs the twins' volumes"):
            annotator.scores(heads, GRID, twins)


# --- clean twins ---------------------------------------------------------------------------------


def test_clean_volumes_are_the_volumes_of_clean_latents():
    groups = {"faults": (2, 5), "spare": (5, 8)}
    generator = TriplaneGenerator(dataclasses.replace(CONFIG, latent_groups=groups))
    generator.load_state_dict(tiny_generator().state_dict())
    generator.eval().requires_grad_(False)
    generator.backbone.mapping.w_avg.fill_(0.3)
    settings = SlabSettings(resolution=8, truncation_psi=0.7, truncation_cutoff=3)
    seeds, told = [5, 1, 9, 4, 7], []
    clean = clean_volumes(generator, seeds, settings, on_progress=told.append)
    assert told == [4, 5]
    z = generator.without_faults(latents(seeds, 8))
    ws = generator.mapping(z, truncation_psi=0.7, truncation_cutoff=3)
    torch.testing.assert_close(clean, slab_of_planes(generator, generator.planes(ws), settings))
    assert not torch.allclose(clean, density_slab(generator, seeds, settings))
    assert clean_volumes(generator, [], settings).shape == (0, *clean.shape[1:])


def test_no_clean_volumes_without_groups():
    with pytest.raises(ValueError, match="no latent groups named faults and spare"):
        clean_volumes(tiny_generator(), [1], SlabSettings(resolution=8))


# --- pairs ---------------------------------------------------------------------------------------


def test_the_larger_score_wins_and_no_seed_comes_twice():
    answers = SimulatedAnnotator(rule="nose").prefer(SEEDS, SCORES, 300)
    table = answers.table
    assert len(table) == 300
    assert len(table.seeds) == 600
    assert (answers.ties, answers.mistakes) == (0, 0)
    assert (score_of(table.winners) > score_of(table.losers)).all()
    assert set(table.annotators) == {"simulated:nose"}


def test_the_same_seed_is_the_same_table():
    def table(seed):
        annotator = SimulatedAnnotator(rule="smooth", mistakes=0.3, ties=0.2, seed=seed)
        return annotator.prefer(SEEDS, SCORES, 100).table

    assert np.array_equal(table(3).winners, table(3).winners)
    assert np.array_equal(table(3).losers, table(3).losers)
    assert not np.array_equal(table(3).winners, table(4).winners)


def test_mistakes_are_counted_and_of_their_rate():
    answers = SimulatedAnnotator(rule="smooth", mistakes=0.2).prefer(SEEDS, SCORES, 1000)
    wrong = score_of(answers.table.winners) < score_of(answers.table.losers)
    assert wrong.sum() == answers.mistakes
    assert answers.mistakes / 1000 == pytest.approx(0.2, abs=0.04)
    assert SimulatedAnnotator(rule="smooth", mistakes=1.0).prefer(SEEDS, SCORES, 9).mistakes == 9


def test_ties_are_the_closest_pairs():
    every = SimulatedAnnotator(rule="smooth").prefer(SEEDS, SCORES, 1000).table
    answers = SimulatedAnnotator(rule="smooth", ties=0.3).prefer(SEEDS, SCORES, 700)
    assert (len(answers.table), answers.ties) == (700, 300)
    gap = score_of(every.winners) - score_of(every.losers)
    widest = np.sort(np.argsort(gap)[300:])
    np.testing.assert_array_equal(answers.table.winners, every.winners[widest])
    np.testing.assert_array_equal(answers.table.losers, every.losers[widest])


def test_seeds_needed():
    annotator = SimulatedAnnotator(rule="smooth", ties=0.25)
    assert annotator.seeds_needed(30) == 80
    assert len(annotator.prefer(SEEDS[:80], SCORES[:80], 30).table) == 30
    with pytest.raises(ValueError, match="30 pairs need 80 seeds, not 79"):
        annotator.prefer(SEEDS[:79], SCORES[:79], 30)


def test_seeds_and_scores_that_do_not_do():
    annotator = SimulatedAnnotator(rule="smooth")
    with pytest.raises(ValueError, match="must differ"):
        annotator.prefer(np.array([1, 2, 1]), np.zeros(3), 1)
    for scores in (np.zeros(2), np.array([0, np.nan, 1])):
        with pytest.raises(ValueError, match="each of the 3 seeds needs one finite score"):
            annotator.prefer(np.arange(3), scores, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "pretty"}, "rule must be one of clean, smooth, symmetric, nose, not 'pretty'"),
        ({"rule": "nose", "mistakes": 1.1}, "mistakes must be a share from 0 to 1, not 1.1"),
        ({"rule": "nose", "mistakes": float("nan")}, "mistakes must be a share"),
        ({"rule": "nose", "ties": 1.0}, "ties must be a share from 0 to below 1, not 1.0"),
        ({"rule": "nose", "ties": -0.1}, "ties must be a share from 0 to below 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_annotators_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedAnnotator(**options)
