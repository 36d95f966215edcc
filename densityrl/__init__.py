"""Sculpt the geometry of a 3D-aware GAN by human preference."""

__version__ = "0.1.0"
