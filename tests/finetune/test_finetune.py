"""Fine-tuning: its terms, the reward to reach, which parameters move, its guard."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from tiny import CONFIG, save_tiny, tiny_generator, tiny_reward

from densityrl.config import FinetuneConfig
from densityrl.errors import CheckpointError, NonFiniteError, RunError
from densityrl.finetune.losses import Terms, sculpting_terms
from densityrl.finetune.train import TARGET_DRAW, Finetuner, finetune, moving_parameters
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.generator.axes import LatentAxes
from densityrl.reward import InversionNetwork, RewardModel
from densityrl.run import load_state
from densityrl.volume import SlabSettings, density_slab, ws_of_seeds
from triplane_kernels import Grid, density_grid

# What moves by default, and weights.
TRAIN = pytest.mark.parametrize("train", [("steering",), ("mapping",)], ids="-".join)


@pytest.fixture(autouse=True)
def axes_of_both_kinds(monkeypatch):
    """All axes of a generator this small are skewed; of these bounds some are over, some under.

    Fewer samples to find them from are enough, and save a second each time.
    """
    monkeypatch.setattr("densityrl.finetune.steering.SKEWED", 1.2)
    monkeypatch.setattr("densityrl.generator.axes.SAMPLES", 2000)


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
        target_seeds=6,
    )


def make_trainer(config):
    return Finetuner(config, load_generator(config.generator), RewardModel.load(config.reward))


def pace(trainer, steps=2):
    """Train so many steps; names of the generator's parameters that moved."""
    before = {name: p.clone() for name, p in trainer.tuned.named_parameters()}
    for _ in range(steps):
        trainer._train_step()
        trainer.step += 1
    return {n for n, p in trainer.tuned.named_parameters() if not torch.equal(p, before[n])}


def changed(generator, start):
    """Names of parameters and buffers of a generator that are not those of the other one."""
    values = generator.state_dict()
    return {name for name, old in start.state_dict().items() if not torch.equal(values[name], old)}


def weighted(reward, *, shape="target", target=0.0, scale=1.0, **values):
    """The loss of rewards alone."""
    config = FinetuneConfig(generator="", reward="", reward_shape=shape, **values)
    return Terms(reward, torch.zeros(len(reward)), torch.zeros(len(reward))).loss(
        config, target, scale
    )


def by_hand_config(shape, reward_weight):
    return FinetuneConfig(
        generator="",
        reward="",
        reward_shape=shape,
        reward_weight=reward_weight,
        consistency_weight=0.01,
        appearance_weight=2.0,
    )


def test_clipped_loss_by_hand():
    config = by_hand_config("clip", 10.0)
    terms = Terms(torch.tensor([3.0, 25.0, -11.0]), torch.tensor([1.0, 2, 3]), torch.ones(3))
    # -10 * clip(r) + 0.01 * consistency + 2 * appearance
    by_hand = [-30 + 0.01 + 2, -100 + 0.02 + 2, 100 + 0.03 + 2]
    for target, scale in ((0.0, 1.0), (5.0, 3.0)):  # which do not count here
        loss = terms.loss(config, target, scale)
        torch.testing.assert_close(loss, torch.tensor(by_hand).mean())


def test_loss_to_a_target_by_hand():
    config = by_hand_config("target", 4.0)
    terms = Terms(torch.tensor([1.5, -2.5, 25.0]), torch.tensor([1.0, 2, 3]), torch.ones(3))
    # 4 * max((1.5 - r) / 2, 0)^2 + 0.01 * consistency + 2 * appearance; no clip
    missing = [0, 4, 0]
    by_hand = [4 * m + 0.01 * c + 2 for m, c in zip(missing, (1, 2, 3), strict=True)]
    loss = terms.loss(config, 1.5, 2.0)
    torch.testing.assert_close(loss, torch.tensor(by_hand).mean())


def test_rewards_above_the_target_are_left_alone():
    """No loss and no pull there; below, a pull that grows with what is missing, without a clip."""
    rewards = torch.tensor([1.0 - 2 * 12, 1.0 - 2 * 3, 1.0, 1.0 + 2 * 12], requires_grad=True)
    loss = weighted(rewards, target=1.0, scale=2.0, reward_weight=10.0)
    (gradient,) = torch.autograd.grad(loss, rewards)
    far, below, at, above = (-gradient * 4).tolist()
    assert far == pytest.approx(10 * 2 * 12 / 2)
    assert below == pytest.approx(10 * 2 * 3 / 2)
    assert at == above == 0
    assert weighted(rewards[2:], target=1.0, scale=2.0, reward_weight=10.0) == 0


def test_the_weight_does_not_depend_on_the_rewards_scale():
    """Ten times the reward, target and spread: the same loss, and the same pull in all."""
    rewards = torch.tensor([-3.0, 0.5, 2.0], requires_grad=True)
    losses = [
        weighted(rewards * factor, target=1.2 * factor, scale=0.8 * factor) for factor in (1, 10)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    one, ten = (torch.autograd.grad(loss, rewards)[0] for loss in losses)
    torch.testing.assert_close(one, ten)
    clipped = [weighted(rewards * factor, shape="clip") for factor in (1, 10)]
    assert clipped[0] != clipped[1]


# --- the reward to reach -------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_the_target_is_a_quantile_of_the_frozen_generators_rewards(config, quantile):
    """Over latents that no step of training draws."""
    trainer = make_trainer(dataclasses.replace(config, reward_target=quantile))
    seeds = np.random.default_rng([config.seed, TARGET_DRAW]).integers(2**31, 2**32, 6).tolist()
    slabs = density_slab(tiny_generator(), seeds, trainer.reward.settings)
    rewards = trainer.reward.score_slab(slabs).double().numpy()
    assert trainer.target == pytest.approx(np.quantile(rewards, quantile), rel=1e-4)
    assert trainer.scale == pytest.approx(rewards.std(ddof=1), rel=1e-3)
    assert config.steps < TARGET_DRAW


def test_the_target_is_the_same_each_time(config):
    """A resumed run reaches for what it reached for: nothing of it is in its state."""
    first, again = make_trainer(config), make_trainer(config)
    assert (again.target, again.scale) == (first.target, first.scale)
    other = make_trainer(dataclasses.replace(config, seed=1))
    assert (other.target, other.scale) != (first.target, first.scale)


def test_a_clipped_reward_needs_no_target(config, monkeypatch):
    monkeypatch.setattr(Finetuner, "rewards", None)
    trainer = make_trainer(dataclasses.replace(config, reward_shape="clip"))
    assert (trainer.target, trainer.scale) == (0.0, 1.0)


@pytest.mark.parametrize("score", [0.0, 0.05, -7.3])
def test_a_reward_without_an_opinion_is_refused(config, tmp_path, score):
    reward = tiny_reward()
    reward.network.score.bias.fill_(score)
    reward.network.score.weight.zero_()
    reward.save(tmp_path / "reward")
    with pytest.raises(
        NonFiniteError,
        match=r"^the reward gives every head the same score: train it on more preferences$",
    ):
        finetune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rewards_of_batches_are_in_the_order_of_seeds(config):
    trainer = make_trainer(config)
    seeds = [3, 1, 4, 1, 5]
    slabs = density_slab(tiny_generator(), seeds, trainer.reward.settings)
    rewards = trainer.rewards(trainer.frozen, seeds)
    torch.testing.assert_close(rewards, trainer.reward.score_slab(slabs), rtol=1e-4, atol=1e-5)


# --- terms ---------------------------------------------------------------------------------------


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
    config = dataclasses.replace(config, reward_shape="clip")  # all rewards are the same
    settings = SlabSettings(resolution=16, truncation_psi=0.0)
    generator, reward = tiny_generator(), tiny_reward(settings)
    expected = reward.score_slab(density_slab(generator, [0], settings)).item()
    figures = Finetuner(config, generator, reward)._train_step()
    assert figures["reward"] == pytest.approx(expected, abs=1e-5)


# --- what moves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "prefixes"),
    [
        (("synthesis",), ("backbone.synthesis.",)),
        (("decoder", "mapping"), ("osg_decoder.", "backbone.mapping.")),
        (("early",), ("backbone.synthesis.b4.", "backbone.synthesis.b16.", "backbone.synthesis.")),
    ],
)
def test_only_the_chosen_parameters_move(config, groups, prefixes):
    trainer = make_trainer(dataclasses.replace(config, train=groups))
    before = {name: p.clone() for name, p in trainer.tuned.named_parameters()}
    moved = pace(trainer)
    assert moved
    assert all(name.startswith(prefixes) for name in moved)
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in moved)
    averaged = dict(trainer.ema.named_parameters())
    assert all(not torch.equal(averaged[name], before[name]) for name in moved)
    frozen = dict(trainer.frozen.named_parameters())
    assert all(torch.equal(frozen[name], before[name]) for name in before)


@pytest.mark.parametrize("group", [None, "mapping", "decoder"])
def test_steering_moves_alone_or_with_others(config, group):
    """While it is trained no weight has it; the product has it in its affine layers."""
    train = ("steering",) if group is None else ("steering", group)
    trainer = make_trainer(dataclasses.replace(config, train=train))
    beside = set() if group is None else names_of(tiny_generator(), group)
    moved = pace(trainer)
    assert moved == beside == changed(trainer.ema, trainer.frozen)
    for steering in (trainer.steering, trainer.ema_steering):
        skewed = steering.skewed.bool()
        assert 0 < skewed.sum() < len(skewed)
        assert steering.pull[skewed].any()
        assert not steering.pull[~skewed].any()
        assert steering.push[~skewed].all()
        assert not steering.push[skewed].any()
    affine = {name for name, _ in tiny_generator().named_parameters() if ".affine." in name}
    assert changed(trainer.average(), trainer.frozen) == affine | beside
    assert not changed(trainer.frozen, tiny_generator())


def test_the_product_has_the_average_of_steering(config):
    """And not its last numbers."""
    trainer = make_trainer(dataclasses.replace(config, push_rate=0.1))
    pace(trainer)
    ws = trainer.frozen.mapping(torch.randn(4, 8))
    product = trainer.average().planes(ws)
    expected, last = (
        trainer.frozen.planes(steering(ws).detach())
        for steering in (trainer.ema_steering, trainer.steering)
    )
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    assert (last - expected).abs().max() > 0.01


def test_what_is_scored_in_training_is_steered(config):
    """Planes of the loss, of samples that steering moves, and of no others."""
    trainer = make_trainer(dataclasses.replace(config, reward_shape="clip"))
    with torch.no_grad():
        trainer.steering.pull.fill_(0.8)
        trainer.steering.push.fill_(0.5)
    draw = np.random.default_rng([config.seed, 0, 0])
    seeds = draw.integers(2**31, 2**32, config.batch).tolist()
    ws = ws_of_seeds(trainer.frozen, seeds, trainer.reward.settings)
    with torch.no_grad():
        steered, plain = (
            trainer.reward.score_planes(trainer.frozen, trainer.frozen.planes(w)).mean().item()
            for w in (trainer.steering(ws), ws)
        )
    figures = trainer._train_step()
    assert figures["reward"] == pytest.approx(steered, rel=1e-4)
    assert abs(steered - plain) > 1e-2 * abs(plain)
    assert figures["consistency"] > 0.1


def test_pulls_stay_within_their_bounds(config):
    """With steps of more than the whole way."""
    trainer = make_trainer(dataclasses.replace(config, pull_rate=3.0))
    for _ in range(3):
        pace(trainer, 1)
        assert ((trainer.steering.pull >= 0) & (trainer.steering.pull <= 1)).all()
    assert (trainer.steering.pull.min(), trainer.steering.pull.max()) == (0, 1)


def names_of(generator, *groups):
    return set(moving_parameters(generator, groups))


@pytest.mark.parametrize("which", ["tiny", "heads"])
def test_groups_of_parameters(which):
    """Each word against the names it stands for, by their parts."""
    generator = tiny_generator() if which == "tiny" else load_generator("heads")
    parts = {name: name.split(".") for name, _ in generator.named_parameters()}
    synthesis = {name for name, part in parts.items() if part[:2] == ["backbone", "synthesis"]}
    early = {name for name in synthesis if parts[name][2] in ("b4", "b8", "b16")}
    assert names_of(generator, "synthesis") == synthesis
    assert names_of(generator, "early") == early
    assert names_of(generator, "early", "late") == synthesis
    assert names_of(generator, "styles") == {n for n in synthesis if "affine" in parts[n]}
    for group, start in (("mapping", ["backbone", "mapping"]), ("decoder", ["osg_decoder"])):
        expected = {name for name, part in parts.items() if part[: len(start)] == start}
        assert names_of(generator, group) == expected != set()
    assert names_of(generator, "mapping", "synthesis", "decoder") == set(parts)
    moving = moving_parameters(generator, ["styles", "decoder"])
    assert {n for n, p in generator.named_parameters() if p.requires_grad} == set(moving)
    if which == "heads":
        late = names_of(generator, "late")
        assert late == synthesis - early
        assert {parts[name][2] for name in late} == {"b32", "b64", "b128"}


def test_unknown_parameters_are_refused():
    with pytest.raises(
        RunError, match="from steering, mapping, synthesis, styles, early, late, decoder"
    ):
        moving_parameters(tiny_generator(), ["backbone"])
    with pytest.raises(RunError, match="called nothing"):
        moving_parameters(tiny_generator(), [])
    with pytest.raises(RunError, match=r"^this generator has no parameters called late$"):
        moving_parameters(tiny_generator(), ["late"])  # its planes have a side of 16
    with pytest.raises(RunError, match=r"^this generator has no parameters called steering$"):
        moving_parameters(tiny_generator(), ["steering"])  # a generator by itself has none


def uneven_generator(**values):
    """One whose mapping and decoder store weights divided by constants of their own."""
    config = dataclasses.replace(CONFIG, mapping_lr_mul=0.02, decoder_lr_mul=0.25, **values)
    torch.manual_seed(0)
    return TriplaneGenerator(config).eval().requires_grad_(False)


def gain_of(name):
    """What stored numbers of this name are multiplied with."""
    if name.startswith("backbone.mapping.fc"):
        return 0.02
    return 0.25 if name.startswith("osg_decoder.") else 1.0


STEERING = ("steering.pull", "steering.push")


def equal(config, equal_rates):
    return dataclasses.replace(
        config,
        train=("mapping", "synthesis", "decoder", "steering"),
        learning_rate=1e-3,
        pull_rate=0.05,
        push_rate=0.003,
        equal_rates=equal_rates,
        reward_shape="clip",
    )


@pytest.mark.parametrize("equal_rates", [True, False])
def test_rates_of_parameters(config, equal_rates):
    """The first of mapping's layers reads a camera and is stored as it is used."""
    trainer = Finetuner(equal(config, equal_rates), uneven_generator(c_dim=25), tiny_reward())
    names = {id(parameter): name for name, parameter in trainer.moving.items()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert (rates.pop("steering.pull"), rates.pop("steering.push")) == (0.05, 0.003)
    assert rates.keys() == dict(trainer.tuned.named_parameters()).keys()
    assert {gain_of(name) for name in rates} == {0.02, 0.25, 1.0}
    assert "backbone.mapping.embed.weight" in rates
    for name, rate in rates.items():
        assert rate == pytest.approx(1e-3 / (gain_of(name) if equal_rates else 1.0))


@pytest.mark.parametrize("equal_rates", [True, False])
def test_the_first_step_moves_what_is_used_by_the_same(config, equal_rates):
    """Adam's first step is its rate; used weights are those stored, times a gain and a width's."""
    generator = uneven_generator()
    trainer = Finetuner(equal(config, equal_rates), generator, tiny_reward())
    trainer._train_step()
    before = dict(generator.named_parameters())
    before.update({name: torch.zeros_like(trainer.moving[name]) for name in STEERING})
    moved = {n: (p - before[n]).abs().max().item() for n, p in trainer.moving.items()}
    for name in ("backbone.mapping.fc0.weight", "backbone.mapping.fc1.bias"):
        assert moved[name] * 0.02 == pytest.approx(1e-3 * (1 if equal_rates else 0.02), rel=0.05)
    assert moved["osg_decoder.net.0.weight"] * 0.25 == pytest.approx(
        1e-3 * (1 if equal_rates else 0.25), rel=0.05
    )
    assert moved["backbone.synthesis.b4.const"] == pytest.approx(1e-3, rel=0.05)
    assert [moved[name] for name in STEERING] == pytest.approx([0.05, 0.003], rel=0.05)


@TRAIN
def test_accumulation_is_a_larger_batch(config, train, monkeypatch):
    """Two batches of 2 with the latents of one batch of 4 give its gradient."""
    parts = iter([np.arange(4), np.arange(2), np.arange(2, 4)])

    class Draw:
        def integers(self, low, high, size):
            return next(parts) + low

        def uniform(self, low, high, shape):
            return np.zeros(shape)

    trainers = [
        make_trainer(
            dataclasses.replace(
                config, train=train, batch=batch, accumulate=accumulate, gradient_clip=1e9
            )
        )
        for batch, accumulate in ((4, 1), (2, 2))
    ]
    monkeypatch.setattr("numpy.random.default_rng", lambda seed: Draw())
    gradients = []
    for trainer in trainers:
        trainer._train_step()
        gradients.append({n: p.grad.clone() for n, p in trainer.moving.items()})
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-5)


@TRAIN
def test_not_finite_stops_and_keeps_the_last_good_state(config, train, tmp_path, monkeypatch):
    config = dataclasses.replace(config, train=train)
    original = Finetuner._train_step

    def poisoned(self):
        if self.step == 2:
            self.reward.network.score.bias.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(Finetuner, "_train_step", poisoned)
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        finetune(config, tmp_path / "run")
    monkeypatch.setattr(Finetuner, "_train_step", original)
    trainer = make_trainer(config)
    trainer.load_state_dict(load_state(tmp_path / "run" / "state.safetensors"))
    assert trainer.step == 2
    assert all(bool(p.isfinite().all()) for p in trainer.moving.values())
    steps = [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [0, 1, 2]
    assert not (tmp_path / "run" / "generator.json").exists()


@TRAIN
def test_the_product_is_a_generator(config, train, tmp_path):
    """The one whose rewards the summary tells, and it differs where it was to."""
    config = dataclasses.replace(config, train=train, learning_rate=5e-3, push_rate=0.2)
    summary = finetune(config, tmp_path / "run")
    start, tuned = load_generator(config.generator), load_generator(tmp_path / "run")
    part = ".affine." if train == ("steering",) else "backbone.mapping.fc"
    names = {name for name, _ in start.named_parameters() if part in name}
    assert changed(tuned, start) == names
    assert summary["steps"] == 3
    trainer = make_trainer(config)
    before, after = trainer.held_out_rewards(start), trainer.held_out_rewards(tuned)
    assert summary["held_out_reward_before"] == pytest.approx(before.mean().item(), rel=1e-6)
    assert summary["held_out_reward_after"] == pytest.approx(after.mean().item(), rel=1e-6)
    assert summary["held_out_share_better"] == pytest.approx((after > before).float().mean().item())
    assert (after - before).abs().min() > 1e-4 * before.abs().mean()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"loss", "reward", "consistency", "appearance"} <= lines[1].keys()
    assert lines[-1]["held_out_reward"] == pytest.approx(summary["held_out_reward_after"])


def test_another_start_cannot_be_resumed(config, tmp_path):
    finetune(config, tmp_path / "run")
    save_tiny(config.generator, seed=5)
    with pytest.raises(RunError, match="not the one this run started from"):
        finetune(dataclasses.replace(config, steps=4), tmp_path / "run", resume=True)


@TRAIN
def test_more_steps_may_be_asked_for(config, train, tmp_path):
    config = dataclasses.replace(config, train=train)
    finetune(config, tmp_path / "longer")
    longer = dataclasses.replace(config, steps=5)
    finetune(longer, tmp_path / "longer", resume=True)
    finetune(longer, tmp_path / "at once")
    assert end_of(tmp_path / "longer") == end_of(tmp_path / "at once")


def end_of(run):
    """Last figures and every weight of a run."""
    return (run / "metrics.jsonl").read_text().splitlines()[-1], load_generator(run).fingerprint()


@pytest.mark.parametrize("train", [("steering",), ("steering", "mapping")], ids="-".join)
def test_a_run_keeps_its_axes(config, train, tmp_path, monkeypatch):
    """Another machine may find them in another order: those of the state count.

    Killed in its fourth step, the run goes on after the second.
    """
    config = dataclasses.replace(config, train=train, steps=5, checkpoint_every=2)
    finetune(config, tmp_path / "at once")
    step = Finetuner._train_step

    def killed(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Finetuner, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "run")
    monkeypatch.setattr(Finetuner, "_train_step", step)
    monkeypatch.setattr(LatentAxes, "of", classmethod(partial(turned, LatentAxes.of)))
    found = make_trainer(config)
    kept = load_state(tmp_path / "run" / "state.safetensors")["axes"]
    assert kept.keys() == dict(found.steering.named_buffers()).keys()
    for name in ("directions", "readout", "typical", "skewed"):
        assert not torch.equal(getattr(found.steering, name), kept[name])
    finetune(config, tmp_path / "run", resume=True)
    assert end_of(tmp_path / "run") == end_of(tmp_path / "at once")


def turned(find, _, generator, count):
    """The axes that are found, from the last to the first."""
    axes = find(generator, count)
    return LatentAxes(
        axes.mean,
        axes.directions.flip(1),
        axes.readout.flip(1),
        axes.typical.flip(0),
        axes.skewness.flip(0),
    )


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


@pytest.mark.parametrize(
    ("group", "liked", "share"), [("mapping", 1, 0.9), ("synthesis", 1, 1), ("steering", -1, 0.6)]
)
def test_an_inversion_reward_is_raised(config, tmp_path, group, liked, share):
    """Where it says that w moves along one axis; a few steps, of that term alone.

    Steering can shorten the tail of a skewed axis, which is liked the less, and not lengthen it.
    """
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    slabs = density_slab(generator, range(40), settings)
    network = InversionNetwork(slabs.shape[1:], 3)
    w = ws_of_seeds(generator, range(40), settings)[:, 0]
    network.fit([slabs], LatentAxes.of(generator, 3).coordinates(w))
    with torch.no_grad():
        network.score.weight[0, 0] = liked
    RewardModel(network.requires_grad_(False), settings, 1.0).save(config.reward)
    alone = dataclasses.replace(
        config,
        train=(group,),
        learning_rate=1e-3,
        reward_target=1.0,  # few are left alone
        target_seeds=16,
        held_out_seeds=tuple(range(48)),
        steps=8,
        batch=4,
        consistency_weight=0.0,
        appearance_weight=0.0,
        ema_decay=0.0,
    )
    summary = finetune(alone, tmp_path / "run")
    assert summary["held_out_reward_after"] > summary["held_out_reward_before"]
    assert summary["held_out_share_better"] >= share
