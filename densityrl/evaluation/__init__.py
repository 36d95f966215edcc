"""Measuring what fine-tuning changed."""

from densityrl.evaluation.compare import evaluate, seed_pictures

__all__ = ["evaluate", "seed_pictures"]
