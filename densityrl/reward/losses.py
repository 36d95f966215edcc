"""Losses on scalar rewards."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected): the negative log-likelihood of Bradley-Terry."""
    return F.softplus(rejected - chosen).mean()


def reward_size_loss(*rewards: Tensor) -> Tensor:
    """Mean square of all rewards: pins the constant that pairs leave free and bounds the scale."""
    total = sum((reward.square().sum() for reward in rewards), start=rewards[0].new_zeros(()))
    return total / sum(reward.numel() for reward in rewards)
