"""A trained reward: network, and the exact slab and normalisation it was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densityrl.errors import CheckpointError
from densityrl.generator.model import TriplaneGenerator
from densityrl.reward.inversion import InversionNetwork
from densityrl.reward.network import ConvNetwork
from densityrl.run import atomic_write
from densityrl.volume import SlabSettings, slab_of_planes

FORMAT = "densityrl-reward"
FORMAT_VERSION = 2
DESCRIPTION, WEIGHTS = "reward.json", "reward.safetensors"
NETWORKS = {network.kind: network for network in (InversionNetwork, ConvNetwork)}


@dataclass
class RewardModel:
    """Scores generators. Volumes of another shape than it was trained on are refused."""

    network: InversionNetwork | ConvNetwork
    settings: SlabSettings
    box_side: float  # world units, of the generator it was trained with

    def score_slab(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] on the reward's own grid -> reward [B]; differentiable."""
        expected = tuple(self.settings.grid(self.box_side).shape)
        if tuple(sigma.shape[1:]) != expected:
            raise ValueError(
                f"this reward reads slabs of {expected}, not {tuple(sigma.shape[1:])}: "
                "make them with reward.settings"
            )
        return self.network(sigma)

    def score_planes(self, generator: TriplaneGenerator, planes: Tensor) -> Tensor:
        """Reward [B] of planes the generator made; differentiable in planes and decoder."""
        self.check(generator)
        return self.score_slab(slab_of_planes(generator, planes, self.settings))

    def check(self, generator: TriplaneGenerator) -> None:
        """CheckpointError if the reward was not trained for generators like this one."""
        if generator.box_side != self.box_side:
            raise CheckpointError(
                f"the reward was trained on a box of side {self.box_side}, the generator's is "
                f"{generator.box_side}: train a reward with this generator"
            )

    def save(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Write reward.safetensors and reward.json into a directory, each whole or not at all.

        The description also travels inside the weights, so that the two cannot be mixed up.
        """
        from safetensors.torch import save

        path = Path(path)
        description = json.dumps(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "network": {"kind": self.network.kind, **self.network.describe()},
                "slab": asdict(self.settings),
                "box_side": self.box_side,
                "provenance": provenance or {},
            },
            indent=1,
        )
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        atomic_write(path / WEIGHTS, save(tensors, metadata={"description": description}))
        atomic_write(path / DESCRIPTION, description)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> RewardModel:
        """Read a directory that `save` wrote; CheckpointError says what is wrong with it."""
        from safetensors import SafetensorError, safe_open

        file = Path(path) / WEIGHTS
        if not file.is_file():
            raise CheckpointError(
                f"no reward in {path}: {WEIGHTS} is missing; `densityrl reward-train` writes it "
                "when it has finished"
            )
        try:
            with safe_open(file, framework="pt", device=str(device)) as handle:
                description = json.loads((handle.metadata() or {}).get("description", "null"))
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise CheckpointError(f"{file} is not a {FORMAT} file")
        if description.get("version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {description.get('version')}; this release reads "
                f"version {FORMAT_VERSION}"
            )
        try:
            about = dict(description["network"])
            network = NETWORKS[about.pop("kind")].described(**about)
            network.load_state_dict(tensors)
            settings = SlabSettings(**description["slab"])
            box_side = float(description["box_side"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} does not describe itself: {error}") from None
        network.eval().requires_grad_(False).to(device)
        return cls(network, settings, box_side)
