"""Reward training: anchors, mirroring, early stopping, what is reported, its guard."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import NETWORKS, save_pairs, save_tiny, tiny_generator

from densityrl.config import RewardConfig
from densityrl.errors import NonFiniteError, PreferenceError, RunError
from densityrl.generator import load_generator, save_generator
from densityrl.generator.axes import LatentAxes
from densityrl.preference import (
    PreferenceTable,
    read_preferences,
    split_preferences,
    write_preferences,
)
from densityrl.preference.store import PreferenceStore
from densityrl.reward import InversionNetwork, RewardModel, inversion
from densityrl.reward.train import RewardTrainer, Volumes, new_network, train_reward
from densityrl.volume import SlabSettings, VolumeCache, density_slab, ws_of_seeds


@pytest.fixture(params=NETWORKS)
def config(tmp_path, request):
    save_pairs(tmp_path / "pairs.csv")
    return RewardConfig(
        generator=save_tiny(tmp_path / "generator"),
        preferences=str(tmp_path / "pairs.csv"),
        resolution=16,
        epochs=2,
        batch=4,
        **NETWORKS[request.param],
    )


only_conv = pytest.mark.parametrize("config", ["conv"], indirect=True)
only_inversion = pytest.mark.parametrize("config", ["inversion"], indirect=True)


def make_trainer(config, folder):
    """A trainer and the list of batches that it shows its network."""
    generator = tiny_generator()
    split = split_preferences(read_preferences(config.preferences), config.split, config.seed)
    volumes = Volumes(config, generator, folder)
    network = new_network(config, generator, len(split.train.seeds) + config.inversion_slabs)
    trainer = RewardTrainer(config, generator, network, split, volumes)
    trainer.fit_inversion()
    shown = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    return trainer, shown


def take_steps(trainer, count):
    for _ in range(count):
        trainer._train_step()
        trainer.step += 1


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
    network = RewardModel.load(tmp_path / "run").network
    explained = {k: v for k, v in summary.items() if k == "inversion_explained"}
    if config.network == "inversion":
        assert explained == {"inversion_explained": network.explained.item()}
        assert 0 < network.explained < 1
    else:
        assert explained == {}
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
    chances = 0.1 + 0.8 / (1 + np.exp(-margins.double().numpy()))  # one answer in ten is wrong
    assert summary["loss"] == pytest.approx(-np.log(chances).mean(), abs=1e-4)
    brier = ((1 - chances) ** 2).mean()
    assert summary["calibration"]["brier"] == pytest.approx(brier, abs=1e-4)


def test_no_signal_stops_early_and_keeps_the_best(config, tmp_path):
    patient = dataclasses.replace(config, epochs=40, patience=2, learning_rate=1e-2)
    summary = train_reward(patient, tmp_path / "run")
    losses = [x["validation_loss"] for x in lines_of(tmp_path / "run") if "validation_loss" in x]
    assert len(losses) < 40
    best = int(np.argmin(losses))
    assert len(losses) - 1 - best == 2
    assert summary["best_epoch"] == best
    assert summary["validation_loss"] == pytest.approx(losses[best])


@only_conv
def test_anchors_come_to_be_preferred(config, tmp_path):
    """Samples near the mean head beat ranked ones, where pairs alone say nothing about them."""
    anchored = dataclasses.replace(
        config, anchors=12, epochs=30, patience=30, learning_rate=3e-3, anchor_psi=0.0
    )
    # Pairs are not to be learned by heart.
    anchored = dataclasses.replace(anchored, weight_decay=0.2)
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


def test_an_unknown_network(config, tmp_path):
    unknown = dataclasses.replace(config, network="oracle")
    with pytest.raises(RunError, match="network='oracle' is unknown: give inversion or conv"):
        train_reward(unknown, tmp_path / "run")


@only_inversion
def test_too_large_a_fit_is_refused_before_volumes_are_made(config, tmp_path, monkeypatch):
    """28 seeds of training pairs and those without labels; slabs of 8 x 9 x 9 points."""
    numbers = (28 + config.inversion_slabs) * 8 * 9 * 9
    monkeypatch.setattr(inversion, "LARGEST", numbers - 1)
    shared = dataclasses.replace(config, volumes=str(tmp_path / "volumes"))
    with pytest.raises(PreferenceError, match=r"^58 slabs of 648 points are too many for "):
        train_reward(shared, tmp_path / "run")
    with pytest.raises(PreferenceError, match="are too many for the inversion network"):
        train_reward(config, tmp_path / "alone")
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(inversion, "LARGEST", numbers)
    train_reward(shared, tmp_path / "fits")
    assert list(tmp_path.rglob("*.npy"))


@only_conv
def test_the_size_of_a_fit_does_not_matter_to_the_conv_network(config, tmp_path, monkeypatch):
    monkeypatch.setattr(inversion, "LARGEST", 0)
    assert train_reward(config, tmp_path / "run")["pairs"]["train"] == 14


@only_inversion
def test_too_few_slabs_for_its_components(config, tmp_path):
    """2 seeds of one training pair, 4 without labels, 6 components."""
    seeds = np.arange(6).reshape(2, 3)
    write_preferences(config.preferences, PreferenceTable(seeds[0], seeds[1]))
    few = dataclasses.replace(config, split=(0.34, 0.33, 0.33), inversion_slabs=4)
    with pytest.raises(PreferenceError, match=r"^6 slabs are too few to find 6 coordinates of w: "):
        train_reward(few, tmp_path / "run")
    enough = dataclasses.replace(few, inversion_slabs=5)
    assert train_reward(enough, tmp_path / "enough")["pairs"]["train"] == 1


# --- the network before training -----------------------------------------------------------------


@only_inversion
@pytest.mark.parametrize(("components", "made"), [(6, 6), (16, 16), (48, 16)])
def test_the_size_of_an_inversion_network(config, components, made):
    """No more components than w has numbers, which is 16."""
    network = new_network(dataclasses.replace(config, components=components), tiny_generator(), 58)
    assert isinstance(network, InversionNetwork)
    assert network.shape == (8, 9, 9)
    assert network.projection.shape == (made, 8, 9, 9)
    assert network.score.weight.shape == (1, made)


@only_conv
def test_first_weights_are_a_function_of_the_seed(config):
    """They take nothing from torch's own generator and leave it as it was."""
    state = torch.get_rng_state()
    first = new_network(config, tiny_generator(), 58)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = new_network(config, tiny_generator(), 58)
    other = new_network(dataclasses.replace(config, seed=1), tiny_generator(), 58)
    assert first.widths == config.widths
    weights = [next(network.parameters()) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- what the inversion network learns -----------------------------------------------------------


@only_inversion
def test_the_map_is_fitted_on_every_slab_that_is_not_held_out(config, tmp_path):
    """To coordinates of their w along the generator's axes, by hand."""
    trainer, _ = make_trainer(config, tmp_path / "volumes")
    everything = [*trainer.split.train.seeds.tolist(), *trainer.volumes.unlabelled_seeds]
    assert len(everything) == 58
    generator, settings = tiny_generator(), trainer.volumes.settings
    w = ws_of_seeds(generator, everything, settings)[:, 0]
    by_hand = InversionNetwork(trainer.network.shape, 6)
    by_hand.fit(
        [density_slab(generator, everything, settings)],
        LatentAxes.of(generator, 6).coordinates(w),
    )
    for name, buffer in by_hand.named_buffers():
        ours = dict(trainer.network.named_buffers())[name]
        torch.testing.assert_close(ours, buffer, rtol=1e-3, atol=1e-4)
        assert torch.equal(trainer.best_weights[name], ours)


@only_inversion
def test_a_generator_with_fewer_axes_than_components(config, tmp_path):
    """Its w varies in 4 directions of 16."""
    generator = load_generator(config.generator)
    with torch.no_grad():
        generator.backbone.mapping.fc1.weight[4:] = 0
    save_generator(generator, config.generator)
    train_reward(config, tmp_path / "run")
    network = RewardModel.load(tmp_path / "run").network
    used = network.projection.flatten(1).any(dim=1)
    assert used.tolist() == [True] * 4 + [False] * 2
    assert network.explained > 0
    assert (network.score.weight[0, 4:] == 0).all()


@only_inversion
def test_a_rule_that_is_linear_in_w_is_learned(config, tmp_path):
    """The head that lies further along a direction of w is preferred; pairs are held out."""
    generator = tiny_generator()
    seeds = np.arange(240)
    w = ws_of_seeds(generator, seeds.tolist(), SlabSettings(resolution=16))[:, 0]
    direction = torch.linalg.svd(w - w.mean(dim=0), full_matrices=False)[2][0]
    scores = (w @ direction).numpy()
    left, right = seeds[:120], seeds[120:]
    better = scores[left] > scores[right]
    table = PreferenceTable(np.where(better, left, right), np.where(better, right, left))
    write_preferences(config.preferences, table)
    many = dataclasses.replace(
        config, split=(0.5, 0.2, 0.3), inversion_slabs=100, anchors=20, epochs=10
    )
    summary = train_reward(many, tmp_path / "run")
    assert summary["pairs"]["test"] >= 30
    assert summary["accuracy_interval"][0] > 0.6


def test_the_loss_has_the_inversion_networks_weights_in_it(config, tmp_path):
    """The sum of their absolute values over the root of 14 pairs; the conv network's loss is
    without it."""
    losses, pair_losses = {}, set()
    for sparsity in (0.0, 0.04, 1.0):
        changed = dataclasses.replace(config, sparsity=sparsity)
        trainer, _ = make_trainer(changed, tmp_path / "volumes")
        with torch.no_grad():
            weight = trainer.network.score.weight
            weight.copy_(torch.linspace(-0.2, 0.3, weight.numel()).reshape(weight.shape))
            sizes = weight.abs().sum().item()
        figures = trainer._train_step()
        losses[sparsity] = figures["loss"]
        pair_losses.add(figures["pair_loss"])
    assert len(pair_losses) == 1
    assert sizes > 0.5
    counts = 1 if config.network == "inversion" else 0
    for sparsity in (0.04, 1.0):
        cost = counts * sparsity * sizes / 14**0.5
        assert losses[sparsity] - losses[0.0] == pytest.approx(cost, abs=1e-5)


@only_inversion
def test_sparsity_leaves_out_what_pairs_do_not_speak_of(config, tmp_path):
    """One coordinate decides, but for mistakes. The others fit these by chance, unless weights
    cost something."""
    plain = dataclasses.replace(config, anchors=0, batch=50)
    drawn = np.random.default_rng(0)
    left = drawn.integers(40, size=200)
    right = (left + drawn.integers(1, 40, size=200)) % 40
    mistakes = drawn.random(200) < 0.2
    weights = {}
    for sparsity in (0.0, 1.4):
        sparse = dataclasses.replace(plain, sparsity=sparsity)
        trainer, _ = make_trainer(sparse, tmp_path / "volumes")
        slabs = trainer.volumes.ranked(range(40))
        trainer.volumes.ranked = slabs.__getitem__  # from memory
        with torch.no_grad():
            found = trainer.network.find(slabs)[:, 2].numpy()
        better = (found[left] > found[right]) != mistakes
        pairs = PreferenceTable(np.where(better, left, right), np.where(better, right, left))
        trainer.split = dataclasses.replace(trainer.split, train=pairs)
        trainer.steps_per_epoch = 4
        take_steps(trainer, 160)
        weights[sparsity] = trainer.network.score.weight[0].detach()
    relevant = torch.arange(6) == 2
    assert weights[1.4][2] > 0.3
    assert weights[1.4][~relevant].abs().max() < 0.03
    assert weights[0.0][~relevant].abs().max() > 0.1


def test_mistakes_are_reckoned_with(config, tmp_path):
    """The loss at the start is log 2 for any share; after that the training goes its own way."""
    learned = {}
    for mistakes in (0.0, 0.1, 0.3):
        trainer, _ = make_trainer(
            dataclasses.replace(config, mistakes=mistakes, sparsity=0.0), tmp_path / "volumes"
        )
        with torch.no_grad():
            trainer.network.score.weight.zero_()
        assert trainer._train_step()["pair_loss"] == pytest.approx(math.log(2), abs=1e-5)
        trainer.step += 1
        take_steps(trainer, 7)
        learned[mistakes] = trainer.network.score.weight.norm().item()
    assert len(set(learned.values())) == 3


@pytest.mark.parametrize("mistakes", [-0.1, 0.5, 1.0, float("nan")])
def test_a_share_of_mistakes_that_says_nothing(config, tmp_path, mistakes):
    with pytest.raises(RunError, match=r"mistakes must be a share from 0 to below 0.5, not"):
        train_reward(dataclasses.replace(config, mistakes=mistakes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@only_inversion
def test_held_out_seeds_take_no_part_in_the_fit(config, tmp_path):
    """Other volumes of validation and test seeds give the same map."""
    trainer, _ = make_trainer(config, tmp_path / "volumes")
    split = trainer.split
    held_out = {*split.validation.seeds.tolist(), *split.test.seeds.tolist()}
    assert held_out
    cache = trainer.volumes._ranked
    for seed in held_out:
        cache.put(seed, np.full(cache.shape, 99.0))
    again, _ = make_trainer(config, tmp_path / "volumes")
    for name, fitted in trainer.network.named_buffers():
        assert torch.equal(dict(again.network.named_buffers())[name], fitted)


# --- batches and mirroring -----------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_epoch_and_index(config, tmp_path):
    """A trainer that starts at the seventh step shows what one that came there shows."""
    through, shown = make_trainer(config, tmp_path / "volumes")
    take_steps(through, 7)
    directly, shown_directly = make_trainer(config, tmp_path / "volumes")
    directly.step = 6
    take_steps(directly, 1)
    assert torch.equal(shown_directly[0], shown[6])
    other, shown_other = make_trainer(dataclasses.replace(config, seed=1), tmp_path / "volumes")
    other.step = 6
    take_steps(other, 1)
    assert not torch.equal(shown_other[0], shown[6])


def test_mirroring_shows_both_sides_of_whole_pairs(config, tmp_path):
    """Each winner, its loser and its anchor are all as they were or all mirrored in x."""
    batches = []
    for mirror in (True, False):
        trainer, shown = make_trainer(
            dataclasses.replace(config, mirror=mirror), tmp_path / "volumes"
        )
        take_steps(trainer, 8)
        batches.append(shown)
    mirrored = []
    for batch, plain in zip(*batches, strict=True):
        same = (batch == plain).all(dim=(1, 2, 3))
        flipped = (batch == plain.flip(1)).all(dim=(1, 2, 3))
        assert torch.equal(same, ~flipped)
        winner, loser, anchor = flipped.chunk(3)
        assert torch.equal(winner, loser)
        assert torch.equal(winner, anchor)
        mirrored.extend(winner.tolist())
    assert len(mirrored) == 2 * 14
    assert 0.2 < np.mean(mirrored) < 0.8


def weights_after(config, folder, steps=4):
    trainer, _ = make_trainer(config, folder)
    take_steps(trainer, steps)
    return dict(trainer.network.named_parameters())


def test_mirroring_changes_what_is_learned_but_of_symmetric_volumes(config, tmp_path, monkeypatch):
    mirror, plain = (dataclasses.replace(config, mirror=value) for value in (True, False))
    learned = [weights_after(c, tmp_path / "volumes") for c in (mirror, plain)]
    assert any(not torch.equal(learned[0][name], learned[1][name]) for name in learned[0])
    make = density_slab

    def symmetric(*arguments, **options):
        sigma = make(*arguments, **options)
        return (sigma + sigma.flip(1)) / 2

    monkeypatch.setattr("densityrl.reward.train.density_slab", symmetric)
    learned = [weights_after(c, tmp_path / "volumes") for c in (mirror, plain)]
    assert all(torch.equal(learned[0][name], learned[1][name]) for name in learned[0])


def test_a_flipped_slab_is_the_density_at_mirrored_points():
    """The grid is symmetric in x, in the face's crop and in the whole box."""
    for slab in ("face", "full"):
        points = SlabSettings(resolution=16, slab=slab).grid(1.0).points()
        mirrored = points * torch.tensor([-1.0, 1.0, 1.0])
        torch.testing.assert_close(points.flip(0), mirrored)


# --- volumes -------------------------------------------------------------------------------------


def test_runs_share_volumes(config, tmp_path, monkeypatch):
    """A second run, of another seed, makes none of the volumes again."""
    made = []
    put = VolumeCache.put

    def counted(self, seed, volume):
        made.append((self.folder.name, seed))
        put(self, seed, volume)

    monkeypatch.setattr(VolumeCache, "put", counted)
    shared = dataclasses.replace(config, volumes=str(tmp_path / "shared"))
    train_reward(shared, tmp_path / "first")
    unlabelled = config.inversion_slabs if config.network == "inversion" else 0
    assert len(made) == len(set(made)) == 40 + config.anchors + unlabelled
    train_reward(dataclasses.replace(shared, seed=1), tmp_path / "second")
    assert len(made) == 40 + config.anchors + unlabelled
    for run in ("first", "second"):
        assert not (tmp_path / run / "volumes").exists()
    monkeypatch.undo()
    train_reward(config, tmp_path / "alone")  # the same reward as with volumes of its own
    rewards = [(tmp_path / run / "reward.safetensors").read_bytes() for run in ("first", "alone")]
    assert len(list((tmp_path / "alone" / "volumes").iterdir())) == 2
    assert rewards[0] == rewards[1]


def choices_of(pairs, path, generator):
    """A store in which somebody preferred the first of each pair."""
    store = PreferenceStore(path, create=True)
    store.describe({"generator": generator.fingerprint(), "truncation_psi": 1.0})
    store.add_table(pairs, "anna", 1.0)
    return store


@only_conv
def test_a_store_of_choices_trains_as_its_table_does(config, tmp_path):
    pairs = read_preferences(config.preferences)
    choices_of(pairs, tmp_path / "pairs.sqlite", tiny_generator()).close()
    stored = dataclasses.replace(config, preferences=str(tmp_path / "pairs.sqlite"))
    assert train_reward(stored, tmp_path / "stored") == train_reward(config, tmp_path / "table")


@only_conv
def test_choices_about_other_samples_are_refused(config, tmp_path):
    pairs = read_preferences(config.preferences)
    choices_of(pairs, tmp_path / "other.sqlite", tiny_generator(seed=1)).close()
    other = dataclasses.replace(config, preferences=str(tmp_path / "other.sqlite"))
    with pytest.raises(PreferenceError, match="about the samples of another generator"):
        train_reward(other, tmp_path / "run")
    choices_of(pairs, tmp_path / "pairs.sqlite", tiny_generator()).close()
    truncated = dataclasses.replace(
        config, preferences=str(tmp_path / "pairs.sqlite"), truncation_psi=0.7
    )
    with pytest.raises(PreferenceError, match=r"about samples at --truncation-psi 1, not 0\.7"):
        train_reward(truncated, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@only_conv
def test_pairs_that_come_in_meanwhile_are_for_the_next_run(config, tmp_path, monkeypatch):
    pairs = read_preferences(config.preferences)
    stored = dataclasses.replace(config, preferences=str(tmp_path / "pairs.sqlite"))
    with choices_of(pairs, tmp_path / "pairs.sqlite", tiny_generator()) as store:
        train_reward(stored, tmp_path / "unbroken")
        original = RewardTrainer._train_step

        def cut_short(self):
            if self.step == 6:
                raise KeyboardInterrupt
            return original(self)

        monkeypatch.setattr(RewardTrainer, "_train_step", cut_short)
        with pytest.raises(KeyboardInterrupt):
            train_reward(stored, tmp_path / "run")
        monkeypatch.undo()
        store.add_table(PreferenceTable([7001, 7003], [7002, 7004]), "anna", 1.0)
    train_reward(stored, tmp_path / "run", resume=True)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "unbroken")
