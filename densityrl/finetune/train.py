"""Fine-tune a generator so that a reward likes its geometry better."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densityrl.config import FinetuneConfig
from densityrl.errors import NonFiniteError, RunError
from densityrl.finetune.losses import sculpting_terms
from densityrl.finetune.steering import Steering
from densityrl.generator import TriplaneGenerator, load_generator, save_generator
from densityrl.generator.axes import LatentAxes
from densityrl.reward import RewardModel
from densityrl.run import (
    Interrupted,
    InterruptGuard,
    Metrics,
    RunDirectory,
    progress,
    write_summary,
)
from densityrl.volume import planes_of_seeds, ws_of_seeds

TARGET_DRAW = 2**40  # no step of training has this number

# Words for `FinetuneConfig.train`, and the names of the parameters that each lets move.
PARAMETER_GROUPS = {
    "steering": r"steering\.",
    "mapping": r"backbone\.mapping\.",
    "synthesis": r"backbone\.synthesis\.",
    "styles": r"backbone\.synthesis\..*\.affine\.",  # how w steers each layer
    "early": r"backbone\.synthesis\.b(4|8|16)\.",
    "late": r"backbone\.synthesis\.b(?!(4|8|16)\.)",  # blocks of 32x32 and more
    "decoder": r"osg_decoder\.",
}


def finetune(
    config: FinetuneConfig, out: str | Path, *, resume: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Run or resume a fine-tuning; returns the summary that is also written to `summary.json`.

    The directory ends as a generator that `load_generator` reads (the moving average of the
    weights), with metrics.jsonl and config.json. Training latents come from seeds of 2**31 and
    above, so any smaller seed is held out; they are truncated as the reward's own samples were.
    """
    trainer = Finetuner(
        config, load_generator(config.generator, device), RewardModel.load(config.reward, device)
    )
    with RunDirectory.create(
        out, "finetune", asdict(config), resume, may_change={"steps", "checkpoint_every"}
    ) as run:
        if (state := run.load_state()) is not None:
            trainer.load_state_dict(state)
        trainer.run(run)
        before = trainer.held_out_rewards(trainer.frozen)
        tuned = trainer.average()
        after = trainer.held_out_rewards(tuned)
        summary = {
            "steps": trainer.step,
            "held_out_seeds": list(config.held_out_seeds),
            "held_out_reward_before": float(before.mean()),
            "held_out_reward_after": float(after.mean()),
            "held_out_share_better": float((after > before).float().mean()),
        }
        provenance = {"command": "finetune", "config": asdict(config), **summary}
        save_generator(tuned, run.path, provenance)
        write_summary(run.path / "summary.json", summary)
        return summary


class Finetuner:
    """The loop and everything that a resumed run needs to go on to the same numbers.

    Latents and cameras are drawn from (seed, step), so there is no generator state to keep.
    """

    def __init__(
        self, config: FinetuneConfig, generator: TriplaneGenerator, reward: RewardModel
    ) -> None:
        reward.check(generator)
        self.config = config
        self.reward = reward
        self.frozen = generator
        self.tuned = copy.deepcopy(generator)
        self.ema = copy.deepcopy(generator)
        self.steering = self.ema_steering = None
        if "steering" in config.train:
            self.steering = Steering(LatentAxes.of(generator, config.steering_axes))
            self.ema_steering = copy.deepcopy(self.steering)
        self.moving = moving_parameters(self.tuned, config.train, self.steering)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [parameter], "lr": self._rate(name)}
                for name, parameter in self.moving.items()
            ],
            betas=(0.0, 0.99),
        )
        self.step = 0
        self.target, self.scale = self._target()

    def run(self, run: RunDirectory) -> None:
        """Train to the last step, with checkpoints that resume to the same numbers."""
        config = self.config
        with (
            # Anew at step 0: a run killed before its first checkpoint logs that step again.
            Metrics(run.path / "metrics.jsonl", self.step or None) as metrics,
            InterruptGuard() as interrupt,
            progress(config.steps, "finetune", start=self.step) as bar,
        ):
            if self.step == 0:
                metrics.log(0, held_out_reward=self._held_out_mean())
            while self.step < config.steps:
                try:
                    figures = self._train_step()
                except NonFiniteError:
                    run.save_state(self.state_dict())
                    raise
                self.step += 1
                if self.step % config.held_out_every == 0 or self.step == config.steps:
                    figures["held_out_reward"] = self._held_out_mean()
                metrics.log(self.step, **figures)
                bar.update(self.step, **figures)
                last = self.step == config.steps
                if last or interrupt.requested or self.step % config.checkpoint_every == 0:
                    run.save_state(self.state_dict())
                if interrupt.requested and not last:
                    raise Interrupted(interrupt.requested, self.step)

    def _train_step(self) -> dict[str, float]:
        config = self.config
        totals: dict[str, float] = {}
        self.optimizer.zero_grad()
        for part in range(config.accumulate):
            draw = np.random.default_rng([config.seed, self.step, part])
            seeds = draw.integers(2**31, 2**32, config.batch).tolist()
            cameras = self._cameras(draw)
            with torch.no_grad():
                frozen_planes = planes_of_seeds(self.frozen, seeds, self.reward.settings)
            ws = ws_of_seeds(self.tuned, seeds, self.reward.settings)
            planes = self.tuned.planes(ws if self.steering is None else self.steering(ws))
            terms = sculpting_terms(
                self.tuned, self.frozen, self.reward, planes, frozen_planes, cameras, config
            )
            loss = terms.loss(config, self.target, self.scale)
            (loss / config.accumulate).backward()
            figures = {
                "loss": loss,
                "reward": terms.reward.mean(),
                "consistency": terms.consistency.mean(),
                "appearance": terms.appearance.mean(),
            }
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value.item() / config.accumulate
        norm = nn.utils.clip_grad_norm_(list(self.moving.values()), config.gradient_clip)
        totals["gradient_norm"] = norm.item()
        bad = [name for name, value in totals.items() if not np.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} not finite at step {self.step + 1}: the state before it is "
                "kept in state.safetensors; start a new run with a lower --learning-rate"
            )
        self.optimizer.step()
        if self.steering is not None:
            self.steering.clip()
        self._update_ema()
        return totals

    def _cameras(self, draw: np.random.Generator) -> Tensor:
        """[B, 25] views around the front."""
        limits = (self.config.appearance_yaw, self.config.appearance_pitch)
        angles = draw.uniform(-1, 1, (self.config.batch, 2)) * limits
        return torch.cat([self.frozen.frontal_camera(yaw, pitch) for yaw, pitch in angles])

    @torch.no_grad()
    def _update_ema(self) -> None:
        # A shorter memory at first, so that the average does not cling to the start.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        average = named_parameters(self.ema, self.ema_steering)
        for name, parameter in self.moving.items():
            average[name].lerp_(parameter, 1 - decay)

    def average(self) -> TriplaneGenerator:
        """A generator with the moving average of the weights, its steering folded in."""
        average = copy.deepcopy(self.ema)
        if self.ema_steering is not None:
            self.ema_steering.fold(average)
        return average

    def _rate(self, name: str) -> float:
        """Learning rate of a parameter.

        With equal rates, that of a stored weight is divided by what the weight is multiplied with,
        beside what depends on its layer's width.
        """
        config = self.config
        if name == "steering.pull":
            return config.pull_rate
        if name == "steering.push":
            return config.push_rate
        if config.equal_rates and name.startswith("backbone.mapping.fc"):
            return config.learning_rate / self.frozen.config.mapping_lr_mul
        if config.equal_rates and name.startswith("osg_decoder."):
            return config.learning_rate / self.frozen.config.decoder_lr_mul
        return config.learning_rate

    def _target(self) -> tuple[float, float]:
        """The reward to reach, and the spread of rewards, both of the frozen generator."""
        if self.config.reward_shape == "clip":
            return 0.0, 1.0
        draw = np.random.default_rng([self.config.seed, TARGET_DRAW])
        seeds = draw.integers(2**31, 2**32, self.config.target_seeds).tolist()
        rewards = self.rewards(self.frozen, seeds)
        spread = float(rewards.std())
        if not spread > 1e-6 * float(rewards.abs().max()):  # equal but for rounding
            raise NonFiniteError(
                "the reward gives every head the same score: train it on more preferences"
            )
        return float(rewards.quantile(self.config.reward_target)), spread

    def held_out_rewards(self, generator: TriplaneGenerator) -> Tensor:
        """Raw reward of each held-out seed, [N] on the CPU."""
        return self.rewards(generator, self.config.held_out_seeds)

    @torch.no_grad()
    def rewards(self, generator: TriplaneGenerator, seeds: Sequence[int]) -> Tensor:
        """Raw rewards [len(seeds)] on the CPU."""
        batch = self.config.batch
        rewards = [
            self.reward.score_planes(
                generator,
                planes_of_seeds(generator, seeds[i : i + batch], self.reward.settings),
            ).cpu()
            for i in range(0, len(seeds), batch)
        ]
        return torch.cat(rewards)

    def _held_out_mean(self) -> float:
        return float(self.held_out_rewards(self.average()).mean())

    def state_dict(self) -> dict[str, Any]:
        average = named_parameters(self.ema, self.ema_steering)
        return {
            "step": self.step,
            "tuned": {name: parameter.detach() for name, parameter in self.moving.items()},
            "ema": {name: average[name].detach() for name in self.moving},
            "optimizer": self.optimizer.state_dict(),
            "start": self.frozen.fingerprint(),
            # Found anew they could differ in the last bit, or in sign.
            "axes": {} if self.steering is None else dict(self.steering.named_buffers()),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["start"] != self.frozen.fingerprint():
            raise RunError(
                f"the generator at {self.config.generator} is not the one this run started from"
            )
        self.step = state["step"]
        average = named_parameters(self.ema, self.ema_steering)
        for name, parameter in self.moving.items():
            parameter.copy_(state["tuned"][name])
            average[name].copy_(state["ema"][name])
        for steering in (self.steering, self.ema_steering):
            if steering is not None:
                steering.load_state_dict(state["axes"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


def named_parameters(
    generator: TriplaneGenerator, steering: Steering | None
) -> dict[str, nn.Parameter]:
    """Parameters of both by name."""
    own = {} if steering is None else dict(steering.named_parameters(prefix="steering"))
    return {**dict(generator.named_parameters()), **own}


def moving_parameters(
    generator: TriplaneGenerator, groups: Sequence[str], steering: Steering | None = None
) -> dict[str, nn.Parameter]:
    """Make the named groups require a gradient and return them by name, the others not."""
    unknown = sorted(set(groups) - PARAMETER_GROUPS.keys())
    if unknown or not groups:
        raise RunError(
            f"no parameters are called {', '.join(unknown) or 'nothing'}: "
            f"choose from {', '.join(PARAMETER_GROUPS)}"
        )
    pattern = re.compile("|".join(PARAMETER_GROUPS[group] for group in groups))
    moving = {}
    for name, parameter in named_parameters(generator, steering).items():
        parameter.requires_grad_(pattern.match(name) is not None)
        if parameter.requires_grad:
            moving[name] = parameter
    if not moving:
        raise RunError(f"this generator has no parameters called {', '.join(groups)}")
    return moving
