"""What a run is made of: one frozen dataclass a command, the only home of its defaults.

Values that differ from the paper's recipe (arXiv:2606.27305) say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Preferences to a reward model."""

    generator: str
    preferences: str
    volumes: str | None = None  # folder of the volumes, which runs may share; None: in the run
    limit: int | None = None  # read only the first pairs
    resolution: int = 64  # points a side of the whole box; the paper has 256
    slab: Literal["face", "full"] = "face"
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = 14
    split: tuple[float, float, float] = (0.70, 0.15, 0.15)  # training, validation, test
    # inversion: linear in what of w a slab shows; conv: the paper's kind, from pairs alone
    network: Literal["inversion", "conv"] = "inversion"
    # Coordinates of w that the inversion network looks for; after 60 the spectrum of the bundled
    # heads' w falls off.
    components: int = 60
    # Of the inversion network's score: times the sum of its absolute weights over the root of the
    # number of training pairs, as the noise of their mean gradient falls.
    sparsity: float = 0.4
    inversion_slabs: int = 1000  # without labels, that it is fitted on beside the ranked ones
    inversion_first_seed: int = 200_000
    widths: tuple[int, ...] = (16, 32, 48, 64)  # of the conv network; the paper's has 8 to 256
    # Show each pair left-right mirrored half of the time; the inversion network has no coordinates
    # for a mirrored head, which is none of the generator's.
    mirror: bool = False
    epochs: int = 30
    patience: int = 8  # epochs without a better validation loss before stopping
    batch: int = 8  # pairs
    learning_rate: float = 1e-2  # 1e-3 suits the conv network; the paper's trains at 1e-5
    weight_decay: float = 0.0  # AdamW's; the paper has 1e-4
    mistakes: float = 0.1  # share of wrong answers that the loss reckons with; the paper has none
    anchors: int = 0  # known-good samples always preferred over ranked ones; the paper has 1000
    anchor_first_seed: int = 100_000
    anchor_psi: float = 0.25
    anchor_weight: float = 0.25
    reward_size_weight: float = 1e-2  # keeps rewards inside the clip of fine-tuning
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Generator and reward to a generator whose geometry the reward likes better."""

    generator: str
    reward: str
    steps: int = 40  # the paper makes about 1,250 of batch 16
    batch: int = 8  # latents a step
    accumulate: int = 1  # batches a step
    learning_rate: float = 2e-4  # of weights
    # Mapping and decoder store weights divided by a constant; their rate is divided by it as well,
    # so that one number suits every layer. The paper moves the mapping 100 times more slowly.
    equal_rates: bool = True
    # Groups of parameters that move; steering: along axes of w, folded into the weights at the end.
    train: tuple[str, ...] = ("steering",)
    steering_axes: int = 60
    pull_rate: float = 0.08  # of the steering's numbers, a step
    push_rate: float = 0.006
    reward_weight: float = 1.0
    # target: only rewards below a quantile of the frozen generator's are raised; clip: the paper's
    reward_shape: Literal["target", "clip"] = "target"
    reward_target: float = 0.9  # that quantile, over target_seeds latents
    target_seeds: int = 64
    reward_clip: float = 10.0
    consistency_weight: float = 0.003
    consistency_kind: Literal["l1", "l2"] = "l1"
    consistency_resolution: int = 64  # points a side of the whole box
    appearance_weight: float = 10.0  # not in the paper, which keeps the GAN loss instead
    appearance_resolution: int = 32  # side of the images compared
    appearance_yaw: float = 0.4  # radians; cameras are drawn within +- yaw and +- pitch
    appearance_pitch: float = 0.2
    ema_decay: float = 0.95
    gradient_clip: float = 1.0
    held_out_seeds: tuple[int, ...] = tuple(range(16))  # never trained on: training latents have
    held_out_every: int = 10  # seeds from 2**31 up
    checkpoint_every: int = 20
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """What of a sample is shown."""

    resolution: int = 128  # points a side of the whole box
    slab: Literal["face", "full"] = "face"
    # Raw density of the surface, as the paper has it; None: the one that the histogram suggests.
    level: float | None = 10.0
    triangles: int = 200_000  # at most; a finer surface is simplified


@dataclass(frozen=True, kw_only=True)
class AnnotationConfig:
    """Which pairs an annotator is given, and of what samples."""

    generator: str
    pairs: int = 200  # an annotator
    repeats: float = 0.1  # of these shown again, sides swapped
    anchors: float = 0.0  # share of the pairs that compare with a known-good sample
    reward: str | None = None  # directory of a reward that chooses pairs
    uncertain: float = 0.5  # share of the other pairs that it chooses
    first_seed: int = 10_000  # of the samples shown
    truncation_psi: float = 1.0
    anchor_first_seed: int = 100_000  # as reward training has them
    anchor_psi: float = 0.25
    mesh: MeshSettings = field(default_factory=MeshSettings)
    cache_bytes: int = 2 * 2**30
    device: str = "cpu"


# The paper's recipe (arXiv:2606.27305) where it differs from the defaults above, but for the parts
# that need images: the GAN's own loss, whose place the appearance term takes here, is left out.
REWARD_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "conv": {"network": "conv", "mirror": True, "learning_rate": 1e-3, "weight_decay": 1e-4},
    "paper": {
        "network": "conv",
        "widths": (8, 16, 32, 64, 128, 256),
        "epochs": 10,
        "batch": 1,
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "mistakes": 0.0,
        "anchors": 1000,
        "reward_size_weight": 1e-8,
    },
}
FINETUNE_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "steps": 1250,
        "batch": 16,
        "learning_rate": 2.5e-3,
        "equal_rates": False,
        "train": ("mapping", "synthesis", "decoder"),
        "reward_weight": 10.0,
        "reward_shape": "clip",
        "consistency_weight": 0.01,
        "appearance_weight": 0.0,
    },
}
