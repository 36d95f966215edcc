"""Losses on scalar rewards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(chosen: Tensor, rejected: Tensor, mistakes: float = 0.0) -> Tensor:
    """`margin_loss` of what is chosen over what is rejected."""
    return margin_loss(chosen - rejected, mistakes)


def margin_loss(margin: Tensor, mistakes: float = 0.0) -> Tensor:
    """Mean of -log P, the negative log-likelihood of choices by `choice_probability`."""
    if mistakes == 0:
        return F.softplus(-margin).mean()  # finite where a probability would round to 0
    return -choice_probability(margin, mistakes).log().mean()


def choice_probability(margin: Tensor, mistakes: float = 0.0) -> Tensor:
    """P = mistakes + (1 - 2 mistakes) sigmoid(margin), of choosing what scores higher by `margin`.

    Bradley-Terry by an annotator who in a share of answers, 0 to below 1/2, means the other side.
    It bounds what one wrong answer can ask of a reward.
    """
    return mistakes + (1 - 2 * mistakes) * torch.sigmoid(margin)


def reward_size_loss(*rewards: Tensor) -> Tensor:
    """Mean square of all rewards: pins the constant that pairs leave free and bounds the scale."""
    total = sum((reward.square().sum() for reward in rewards), start=rewards[0].new_zeros(()))
    return total / sum(reward.numel() for reward in rewards)
