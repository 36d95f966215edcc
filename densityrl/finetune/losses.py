"""The three terms of fine-tuning, each [B]: reward up, density and colour as they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from densityrl.config import FinetuneConfig
from densityrl.generator import TriplaneGenerator
from densityrl.reward import RewardModel
from triplane_kernels import Grid, density_grid, density_grid_loss


@dataclass(frozen=True)
class Terms:
    """Unweighted terms of one batch; `reward` is raw, before clipping."""

    reward: Tensor
    consistency: Tensor
    appearance: Tensor

    def loss(self, config: FinetuneConfig, target: float, scale: float) -> Tensor:
        """Mean weighted sum.

        reward_shape "clip" is the paper's: the raw reward, counted only inside its clip
        (arXiv:2606.27305). "target" is max(target - r, 0)^2, with r and the target in units of
        `scale`, the spread of rewards before tuning: heads as good as the target are left alone,
        and the weight does not depend on how large a reward's numbers happen to be.
        """
        if config.reward_shape == "clip":
            missing = -self.reward.clamp(-config.reward_clip, config.reward_clip)
        else:
            missing = F.relu((target - self.reward) / scale).square()
        return (
            config.reward_weight * missing
            + config.consistency_weight * self.consistency
            + config.appearance_weight * self.appearance
        ).mean()


def sculpting_terms(
    tuned: TriplaneGenerator,
    frozen: TriplaneGenerator,
    reward: RewardModel,
    planes: Tensor,
    frozen_planes: Tensor,
    cameras: Tensor,
    config: FinetuneConfig,
) -> Terms:
    """Terms for planes [B, 3, C, H, W] that both generators made from the same latents.

    consistency: mean |sigma - sigma_0| (or its square) of raw density over a grid of the whole
    box. appearance: mean |colour - colour_0| of volume-rendered images from cameras [B, 25],
    in units of the colour range [-1, 1]; it takes the place of an image set.
    """
    grid = Grid.cube(config.consistency_resolution, tuned.box_side)
    with torch.no_grad():
        sigma_before = density_grid(frozen_planes, frozen.decoder, grid, frozen.layout)
        color_before = frozen.render_raw(frozen_planes, cameras, config.appearance_resolution)
    consistency = density_grid_loss(
        planes, tuned.decoder, grid, tuned.layout, sigma_before, kind=config.consistency_kind
    )
    color = tuned.render_raw(planes, cameras, config.appearance_resolution)
    appearance = (color - color_before).abs().mean(dim=(1, 2, 3))
    return Terms(reward.score_planes(tuned, planes), consistency, appearance)
