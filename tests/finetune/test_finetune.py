"""Fine-tuning: its terms, which parameters move, its guard."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_generator, tiny_reward

from densityrl.config import FinetuneConfig
from densityrl.errors import CheckpointError, NonFiniteError, RunError
from densityrl.finetune.losses import Terms, sculpting_terms
from densityrl.finetune.train import Finetuner, finetune, moving_parameters
from densityrl.generator import load_generator
from densityrl.reward import RewardModel
from densityrl.volume import SlabSettings, density_slab
from triplane_kernels import Grid, density_grid


@pytest.fixture
def config(tmp_path):
    (tmp_path / "reward").mkdir()
    tiny_reward().save(tmp_path / "reward")
    return FinetuneConfig(
        generator=save_tiny(tmp_path / "generator"),
        reward=str(tmp_path / "reward"),
        steps=3,
        batch=2,
        appearance_resolution=6,
        consistency_resolution=12,
        held_out_seeds=(0, 1, 2),
    )


def make_trainer(config):
    return Finetuner(config, load_generator(config.generator), RewardModel.load(config.reward))


def test_loss_by_hand():
    config = FinetuneConfig(generator="", reward="", appearance_weight=2.0)
    terms = Terms(torch.tensor([3.0, 25.0, -11.0]), torch.tensor([1.0, 2, 3]), torch.ones(3))
    # -10 * clip(r) + 0.01 * consistency + 2 * appearance
    by_hand = [-30 + 0.01 + 2, -100 + 0.02 + 2, 100 + 0.03 + 2]
    torch.testing.assert_close(terms.loss(config), torch.tensor(by_hand).mean())


def test_terms_of_an_unchanged_generator(config):
    generator, reward = tiny_generator(), tiny_reward()
    planes = generator.planes(generator.mapping(torch.randn(2, 8)))
    cameras = generator.frontal_camera().expand(2, -1)
    terms = sculpting_terms(generator, generator, reward, planes, planes, cameras, config)
    assert torch.equal(terms.consistency, torch.zeros(2))
    assert torch.equal(terms.appearance, torch.zeros(2))
    assert torch.equal(terms.reward, reward.score_planes(generator, planes))


def test_terms_of_a_shifted_density(config):
    frozen, tuned = tiny_generator(), tiny_generator()
    tuned.osg_decoder.net[2].bias[0] += 0.5
    planes = frozen.planes(frozen.mapping(torch.randn(2, 8)))
    cameras = frozen.frontal_camera().expand(2, -1)
    terms = sculpting_terms(tuned, frozen, tiny_reward(), planes, planes, cameras, config)
    torch.testing.assert_close(terms.consistency, torch.full((2,), 0.5))
    assert (terms.appearance > 0).all()
    squared = dataclasses.replace(config, consistency_kind="l2")
    terms = sculpting_terms(tuned, frozen, tiny_reward(), planes, planes, cameras, squared)
    torch.testing.assert_close(terms.consistency, torch.full((2,), 0.25))


def test_training_latents_are_truncated_as_the_rewards_own(config):
    """At psi 0 every latent is the mean one, so the first step's reward is known."""
    settings = SlabSettings(resolution=16, truncation_psi=0.0)
    generator, reward = tiny_generator(), tiny_reward(settings)
    expected = reward.score_slab(density_slab(generator, [0], settings)).item()
    figures = Finetuner(config, generator, reward)._train_step()
    assert figures["reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("groups", "prefixes"),
    [
        (("synthesis",), ("backbone.synthesis.",)),
        (("decoder", "mapping"), ("osg_decoder.", "backbone.mapping.")),
    ],
)
def test_only_the_chosen_parameters_move(config, groups, prefixes):
    trainer = make_trainer(dataclasses.replace(config, train=groups))
    before = {name: p.clone() for name, p in trainer.tuned.named_parameters()}
    for _ in range(2):
        trainer._train_step()
        trainer.step += 1
    moved = {n for n, p in trainer.tuned.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(name.startswith(prefixes) for name in moved)
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in moved)
    averaged = dict(trainer.ema.named_parameters())
    assert all(not torch.equal(averaged[name], before[name]) for name in moved)
    frozen = dict(trainer.frozen.named_parameters())
    assert all(torch.equal(frozen[name], before[name]) for name in before)


def test_unknown_parameters_are_refused():
    with pytest.raises(RunError, match="choose from mapping, synthesis, decoder"):
        moving_parameters(tiny_generator(), ["backbone"])
    with pytest.raises(RunError, match="called nothing"):
        moving_parameters(tiny_generator(), [])


def test_accumulation_is_a_larger_batch(config, monkeypatch):
    """Two batches of 2 with the latents of one batch of 4 give its gradient."""
    parts = iter([np.arange(4), np.arange(2), np.arange(2, 4)])

    class Draw:
        def integers(self, low, high, size):
            return next(parts) + low

        def uniform(self, low, high, shape):
            return np.zeros(shape)

    monkeypatch.setattr("numpy.random.default_rng", lambda seed: Draw())
    gradients = []
    for batch, accumulate in ((4, 1), (2, 2)):
        c = dataclasses.replace(config, batch=batch, accumulate=accumulate, gradient_clip=1e9)
        trainer = make_trainer(c)
        trainer._train_step()
        gradients.append({n: p.grad.clone() for n, p in trainer.moving.items()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-5)


def test_not_finite_stops_and_keeps_the_last_good_state(config, tmp_path, monkeypatch):
    original = Finetuner._train_step

    def poisoned(self):
        if self.step == 2:
            self.reward.network.score.bias.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(Finetuner, "_train_step", poisoned)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        finetune(config, tmp_path / "run")
    monkeypatch.undo()
    trainer = make_trainer(config)
    from densityrl.run import load_state

    trainer.load_state_dict(load_state(tmp_path / "run" / "state.safetensors"))
    assert trainer.step == 2
    assert all(bool(p.isfinite().all()) for p in trainer.tuned.parameters())
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [0, 1, 2]
    assert not (tmp_path / "run" / "generator.json").exists()


def test_the_product_is_a_generator(config, tmp_path):
    summary = finetune(config, tmp_path / "run")
    tuned = load_generator(tmp_path / "run")
    assert tuned.fingerprint() != load_generator(config.generator).fingerprint()
    assert summary["steps"] == 3
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"loss", "reward", "consistency", "appearance"} <= lines[1].keys()
    assert lines[-1]["held_out_reward"] == pytest.approx(summary["held_out_reward_after"])


def test_another_start_cannot_be_resumed(config, tmp_path):
    finetune(config, tmp_path / "run")
    save_tiny(config.generator, seed=5)
    with pytest.raises(RunError, match="not the one this run started from"):
        finetune(dataclasses.replace(config, steps=4), tmp_path / "run", resume=True)


def test_more_steps_may_be_asked_for(config, tmp_path):
    finetune(config, tmp_path / "longer")
    longer = dataclasses.replace(config, steps=5)
    finetune(longer, tmp_path / "longer", resume=True)
    finetune(longer, tmp_path / "at once")
    ends = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
        for name in ("longer", "at once")
    ]
    assert ends[0] == ends[1]


def test_a_reward_for_another_box_is_refused(config, tmp_path):
    reward = tiny_reward()
    reward.box_side = 2.0
    reward.save(tmp_path / "reward")
    with pytest.raises(CheckpointError, match=r"box of side 2\.0"):
        finetune(config, tmp_path / "run")


def test_the_reward_reads_its_own_grid(config):
    generator, reward = tiny_generator(), tiny_reward()
    planes = generator.planes(generator.mapping(torch.randn(1, 8)))
    grid = Grid.slab(16, 1.0, ((0.25, 0.25), (0.25, 0.2), (0.4, 0.1)))
    sigma = density_grid(planes, generator.decoder, grid, generator.layout)
    assert torch.equal(reward.score_slab(sigma), reward.score_planes(generator, planes))
