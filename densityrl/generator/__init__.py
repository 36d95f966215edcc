"""Pretrained triplane generators: latent -> planes -> density, image."""

from densityrl.generator.checkpoint import bundled_generators, load_generator, save_generator
from densityrl.generator.model import GeneratorConfig, TriplaneGenerator, latents

__all__ = [
    "GeneratorConfig",
    "TriplaneGenerator",
    "bundled_generators",
    "latents",
    "load_generator",
    "save_generator",
]
