"""Measuring what fine-tuning changed."""

from densityrl.evaluation.compare import evaluate

__all__ = ["evaluate"]
