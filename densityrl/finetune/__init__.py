"""Fine-tuning a generator against a reward."""
