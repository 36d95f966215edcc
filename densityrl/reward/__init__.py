"""Rewards learned from preferences over density slabs."""

from densityrl.reward.model import RewardModel
from densityrl.reward.network import RewardNetwork

__all__ = ["RewardModel", "RewardNetwork"]
