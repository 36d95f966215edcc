"""Rewards learned from preferences over density slabs."""

from densityrl.reward.inversion import InversionNetwork
from densityrl.reward.model import RewardModel
from densityrl.reward.network import ConvNetwork

__all__ = ["ConvNetwork", "InversionNetwork", "RewardModel"]
