"""Train a reward on preference pairs: volumes once, then pairwise logistic loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densityrl.config import RewardConfig
from densityrl.errors import NonFiniteError, PreferenceError, RunError
from densityrl.generator import TriplaneGenerator, load_generator
from densityrl.generator.axes import LatentAxes
from densityrl.preference import (
    PreferenceTable,
    Split,
    read_preferences,
    split_preferences,
    write_preferences,
)
from densityrl.preference.store import check_samples
from densityrl.reward.inversion import InversionNetwork, check_size
from densityrl.reward.losses import (
    choice_probability,
    margin_loss,
    preference_loss,
    reward_size_loss,
)
from densityrl.reward.model import RewardModel
from densityrl.reward.network import ConvNetwork
from densityrl.run import (
    Interrupted,
    InterruptGuard,
    Metrics,
    RunDirectory,
    progress,
    write_summary,
)
from densityrl.statistics import calibration, wilson_interval
from densityrl.volume import SlabSettings, VolumeCache, density_slab, ws_of_seeds

PREFERENCES = "preferences.csv"  # the pairs of a run


def train_reward(
    config: RewardConfig, out: str | Path, *, resume: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Run or resume a training; returns the summary that is also written to `summary.json`.

    The directory ends with reward.safetensors and reward.json (`RewardModel.load` reads them),
    metrics.jsonl, config.json, preferences.csv and the volumes. Held-out figures are of the test
    pairs, which took no part in training or in choosing when to stop.
    """
    if not 0 <= config.mistakes < 0.5:
        raise RunError(f"mistakes must be a share from 0 to below 0.5, not {config.mistakes}")
    generator = load_generator(config.generator, device)
    # A run goes on with the pairs it began with: people may be adding to a store of choices.
    begun = Path(out) / PREFERENCES
    check_samples(config.preferences, generator.fingerprint(), config.truncation_psi)
    table = read_preferences(
        begun if resume and begun.exists() else config.preferences, config.limit
    )
    split = split_preferences(table, config.split, config.seed)
    slabs = len(split.train.seeds) + config.inversion_slabs
    network = new_network(config, generator, slabs)  # refuses before anything is written
    with RunDirectory.create(out, "reward-train", asdict(config), resume) as run:
        write_preferences(begun, table)
        volumes = Volumes(config, generator, Path(config.volumes or run.path / "volumes"))
        volumes.prepare(table)
        trainer = RewardTrainer(config, generator, network.to(device), split, volumes)
        if (state := run.load_state()) is not None:
            trainer.load_state_dict(state)
        else:
            trainer.fit_inversion()
        trainer.run(run)
        model = trainer.best_model()
        held_out = split.test if len(split.test) else split.validation
        summary = {
            "pairs": {
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "dropped": split.dropped,
            },
            "best_epoch": trainer.best_epoch,
            "validation_loss": trainer.best_loss,
            "held_out": "test" if len(split.test) else "validation",
            **inversion_figures(model.network),
            **held_out_figures(model, volumes, held_out, config.mistakes),
        }
        model.save(
            run.path,
            {"generator": config.generator, "fingerprint": generator.fingerprint(), **summary},
        )
        write_summary(run.path / "summary.json", summary)
        return summary


class Volumes:
    """The slabs of ranked seeds and of anchors, made once, read from disk as training needs them.

    Anchors are the same generator at low truncation: known-good samples.
    """

    def __init__(self, config: RewardConfig, generator: TriplaneGenerator, folder: Path) -> None:
        self.generator = generator
        self.settings = SlabSettings(
            resolution=config.resolution,
            slab=config.slab,
            truncation_psi=config.truncation_psi,
            truncation_cutoff=config.truncation_cutoff,
        )
        self.anchor_settings = replace(self.settings, truncation_psi=config.anchor_psi)
        self.anchor_seeds = range(
            config.anchor_first_seed, config.anchor_first_seed + config.anchors
        )
        self.unlabelled_seeds = range(
            config.inversion_first_seed,
            config.inversion_first_seed
            + (config.inversion_slabs if config.network == "inversion" else 0),
        )
        self._ranked = VolumeCache(folder, generator, self.settings)
        self._anchors = VolumeCache(folder, generator, self.anchor_settings)

    def prepare(self, table: PreferenceTable) -> None:
        """Make every volume that is not there yet."""
        ranked = table.seeds.tolist()
        total = len(ranked) + len(self.anchor_seeds) + len(self.unlabelled_seeds)
        with progress(total, "volumes") as bar:
            done = 0
            for seeds, read in (
                (ranked, self.ranked),
                (self.anchor_seeds, self.anchors),
                (self.unlabelled_seeds, self.ranked),
            ):
                for start in range(0, len(seeds), 16):
                    part = seeds[start : start + 16]
                    read(part)
                    done += len(part)
                    bar.update(done)

    def ranked(self, seeds: Sequence[int]) -> Tensor:
        """Raw density [B, X, Y, Z] of seeds, made as the ranked ones were."""
        return density_slab(self.generator, seeds, self.settings, cache=self._ranked)

    def anchors(self, seeds: Sequence[int]) -> Tensor:
        """Raw density [B, X, Y, Z] of anchor seeds."""
        return density_slab(self.generator, seeds, self.anchor_settings, cache=self._anchors)


class RewardTrainer:
    """The loop and everything that a resumed run needs to go on to the same numbers.

    Random choices are drawn from (seed, epoch), so there is no generator state to keep.
    """

    def __init__(
        self,
        config: RewardConfig,
        generator: TriplaneGenerator,
        network: InversionNetwork | ConvNetwork,
        split: Split,
        volumes: Volumes,
    ) -> None:
        self.config = config
        self.split = split
        self.volumes = volumes
        self.generator = generator
        self.box_side = generator.box_side
        self.network = network
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.steps_per_epoch = -(-len(split.train) // config.batch)
        self.step = 0
        self.best_epoch = -1
        self.best_loss = float("inf")
        self.best_weights = copy.deepcopy(self.network.state_dict())

    def fit_inversion(self) -> None:
        """Fit the inversion network's map, where there is one, on every slab of a training seed
        and those without labels; held-out seeds take no part."""
        if not isinstance(self.network, InversionNetwork):
            return
        train = self.split.train
        seeds = [*train.seeds.tolist(), *self.volumes.unlabelled_seeds]
        parts = [seeds[start : start + 64] for start in range(0, len(seeds), 64)]
        with torch.no_grad():
            w = torch.cat(
                [ws_of_seeds(self.generator, part, self.volumes.settings) for part in parts]
            )
        axes = LatentAxes.of(self.generator, len(self.network.projection))
        self.network.fit([self.volumes.ranked(part) for part in parts], axes.coordinates(w[:, 0]))
        self.best_weights = copy.deepcopy(self.network.state_dict())

    def run(self, run: RunDirectory) -> None:
        """Train until patience or epochs run out; checkpoints after every epoch."""
        total = self.config.epochs * self.steps_per_epoch
        with (
            Metrics(run.path / "metrics.jsonl", self.step) as metrics,
            InterruptGuard() as interrupt,
            progress(total, "reward", start=self.step) as bar,
        ):
            while self.step < total and not self._out_of_patience():
                figures = self._train_step()
                self.step += 1
                metrics.log(self.step, **figures)
                bar.update(self.step, **figures)
                if self.step % self.steps_per_epoch == 0:
                    metrics.log(self.step, **self._validate())
                    run.save_state(self.state_dict())
                if interrupt.requested:
                    run.save_state(self.state_dict())
                    raise Interrupted(interrupt.requested, self.step)

    def _out_of_patience(self) -> bool:
        epoch, inside = divmod(self.step, self.steps_per_epoch)
        return inside == 0 and epoch - 1 - self.best_epoch >= self.config.patience

    def _train_step(self) -> dict[str, float]:
        epoch, index = divmod(self.step, self.steps_per_epoch)
        train, batch = self.split.train, self.config.batch
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(train))
        chosen = order[index * batch : (index + 1) * batch]
        winners, losers = train.winners[chosen].tolist(), train.losers[chosen].tolist()
        volumes = [self.volumes.ranked(winners), self.volumes.ranked(losers)]
        draw = np.random.default_rng([self.config.seed, epoch, index])
        if self.config.anchors:
            volumes.append(
                self.volumes.anchors(draw.choice(self.volumes.anchor_seeds, len(chosen)).tolist())
            )
        if self.config.mirror:
            mirrored = torch.from_numpy(draw.random(len(chosen)) < 0.5)
            mirrored = mirrored.to(volumes[0].device)[:, None, None, None]
            volumes = [torch.where(mirrored, sigma.flip(1), sigma) for sigma in volumes]
        self.network.train()
        rewards = self.network(torch.cat(volumes))
        winner, loser, *anchor = rewards.chunk(len(volumes))
        pair_loss = preference_loss(winner, loser, self.config.mistakes)
        loss = pair_loss + self.config.reward_size_weight * reward_size_loss(rewards)
        if isinstance(self.network, InversionNetwork):
            sparsity = self.config.sparsity / math.sqrt(len(train))
            loss = loss + sparsity * self.network.score.weight.abs().sum()
        for known_good in anchor:
            both = preference_loss(known_good, winner) + preference_loss(known_good, loser)
            loss = loss + self.config.anchor_weight * both / 2
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the reward's loss is {loss.item()} at step {self.step + 1}: lower the learning "
                "rate; the last epoch's state is kept"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        return {
            "loss": loss.item(),
            "pair_loss": pair_loss.item(),
            "accuracy": (winner > loser).float().mean().item(),
            "margin": (winner - loser).mean().item(),
        }

    def _validate(self) -> dict[str, float]:
        margins = pair_margins(self.network, self.volumes, self.split.validation)
        loss = margin_loss(margins, self.config.mistakes).item()
        if loss < self.best_loss:
            self.best_loss = loss
            self.best_epoch = self.step // self.steps_per_epoch - 1
            self.best_weights = copy.deepcopy(self.network.state_dict())
        accuracy = (margins > 0).float().mean().item()
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    def best_model(self) -> RewardModel:
        """The weights with the best validation loss, ready to score."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.best_weights)
        return RewardModel(
            network.eval().requires_grad_(False), self.volumes.settings, self.box_side
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss if self.best_epoch >= 0 else None,
            "network": self.network.state_dict(),
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.best_epoch = state["best_epoch"]
        self.best_loss = float("inf") if state["best_loss"] is None else state["best_loss"]
        self.network.load_state_dict(state["network"])
        self.best_weights = state["best_weights"]
        self.optimizer.load_state_dict(state["optimizer"])


def new_network(
    config: RewardConfig, generator: TriplaneGenerator, slabs: int
) -> InversionNetwork | ConvNetwork:
    """The untrained network that the configuration asks for; `slabs` are there to fit it on."""
    if config.network == "conv":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return ConvNetwork(config.widths)
    if config.network != "inversion":
        raise RunError(f"network={config.network!r} is unknown: give inversion or conv")
    settings = SlabSettings(resolution=config.resolution, slab=config.slab)
    shape = settings.grid(generator.box_side).shape
    components = min(config.components, generator.w_dim)
    check_size(slabs, math.prod(shape), components)
    return InversionNetwork(shape, components)


def inversion_figures(network: InversionNetwork | ConvNetwork) -> dict[str, float]:
    """What the inversion network's map is worth, where there is one."""
    if isinstance(network, InversionNetwork):
        return {"inversion_explained": float(network.explained)}
    return {}


@torch.no_grad()
def pair_margins(
    network: InversionNetwork | ConvNetwork,
    volumes: Volumes,
    pairs: PreferenceTable,
    batch: int = 16,
) -> Tensor:
    """Reward of the winner less the loser's, [len(pairs)] on the CPU."""
    network.eval()
    margins = []
    for start in range(0, len(pairs), batch):
        rows = slice(start, start + batch)
        winner, loser = (
            network(volumes.ranked(seeds[rows].tolist())) for seeds in (pairs.winners, pairs.losers)
        )
        margins.append((winner - loser).cpu())
    return torch.cat(margins) if margins else torch.empty(0)


def held_out_figures(
    model: RewardModel, volumes: Volumes, pairs: PreferenceTable, mistakes: float
) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, loss, and calibration on held-out pairs.

    Loss and calibration are of the answers, mistakes and all.
    """
    if not len(pairs):
        raise PreferenceError("no held-out pairs to report accuracy on: change the split")
    margins = pair_margins(model.network, volumes, pairs).double()
    correct = int((margins > 0).sum())
    low, high = wilson_interval(correct, len(pairs))
    probabilities = choice_probability(margins, mistakes).numpy()
    return {
        "accuracy": correct / len(pairs),
        "accuracy_interval": [low, high],
        "loss": margin_loss(margins, mistakes).item(),
        "calibration": asdict(calibration(probabilities, np.ones(len(pairs)))),
    }
