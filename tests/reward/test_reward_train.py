"""Reward training: anchors, early stopping, what is reported, its guard."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import save_pairs, save_tiny, tiny_generator

from densityrl.config import RewardConfig
from densityrl.errors import NonFiniteError, PreferenceError
from densityrl.preference import (
    read_preferences,
    split_preferences,
)
from densityrl.reward import RewardModel
from densityrl.reward.train import RewardTrainer, train_reward
from densityrl.volume import density_slab


@pytest.fixture
def config(tmp_path):
    save_pairs(tmp_path / "pairs.csv")
    return RewardConfig(
        generator=save_tiny(tmp_path / "generator"),
        preferences=str(tmp_path / "pairs.csv"),
        resolution=16,
        widths=(8, 8),
        epochs=2,
        batch=4,
    )


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_what_a_run_leaves(config, tmp_path):
    summary = train_reward(config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written == json.loads(json.dumps(summary))
    assert summary["pairs"] == {"train": 14, "validation": 3, "test": 3, "dropped": 0}
    assert summary["held_out"] == "test"
    low, high = summary["accuracy_interval"]
    assert low <= summary["accuracy"] <= high
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert len([line for line in lines if "validation_loss" in line]) == 2
    description = json.loads((tmp_path / "run" / "reward.json").read_text())
    assert description["provenance"]["fingerprint"] == tiny_generator().fingerprint()


def test_reported_accuracy_is_that_of_the_saved_reward(config, tmp_path):
    """Recomputed from files alone: reward, generator, pairs."""
    summary = train_reward(config, tmp_path / "run")
    reward = RewardModel.load(tmp_path / "run")
    held_out = split_preferences(read_preferences(config.preferences), config.split).test
    scores = [
        reward.score_slab(density_slab(tiny_generator(), seeds.tolist(), reward.settings))
        for seeds in (held_out.winners, held_out.losers)
    ]
    margins = scores[0] - scores[1]
    assert summary["accuracy"] == pytest.approx((margins > 0).float().mean().item())
    loss = torch.nn.functional.softplus(-margins).mean().item()
    assert summary["loss"] == pytest.approx(loss, abs=1e-4)


def test_no_signal_stops_early_and_keeps_the_best(config, tmp_path):
    patient = dataclasses.replace(config, epochs=40, patience=2, learning_rate=1e-2)
    summary = train_reward(patient, tmp_path / "run")
    losses = [x["validation_loss"] for x in lines_of(tmp_path / "run") if "validation_loss" in x]
    assert len(losses) < 40
    best = int(np.argmin(losses))
    assert len(losses) - 1 - best == 2
    assert summary["best_epoch"] == best
    assert summary["validation_loss"] == pytest.approx(losses[best])


def test_anchors_come_to_be_preferred(config, tmp_path):
    """Samples near the mean head beat ranked ones, where pairs alone say nothing about them."""
    anchored = dataclasses.replace(
        config, anchors=12, epochs=30, patience=30, learning_rate=3e-3, anchor_psi=0.0
    )
    train_reward(anchored, tmp_path / "run")
    reward = RewardModel.load(tmp_path / "run")
    generator = tiny_generator()
    settings = dataclasses.replace(reward.settings, truncation_psi=0.0)
    anchor = reward.score_slab(density_slab(generator, [100_000], settings))
    ranked = reward.score_slab(density_slab(generator, range(200, 240), reward.settings))
    assert (anchor > ranked).float().mean() > 0.8


def test_not_finite_stops(config, tmp_path, monkeypatch):
    original = RewardTrainer._train_step

    def poisoned(self):
        if self.step == 6:
            with torch.no_grad():
                self.network.score.bias.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(RewardTrainer, "_train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 7: lower the learning rate"):
        train_reward(config, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "reward.safetensors").exists()
    train_reward(config, tmp_path / "run", resume=True)  # from the state of epoch 1
    train_reward(config, tmp_path / "unbroken")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")


def test_too_few_pairs(config, tmp_path):
    with pytest.raises(PreferenceError, match="cannot fill train and validation"):
        train_reward(dataclasses.replace(config, limit=1), tmp_path / "run")
