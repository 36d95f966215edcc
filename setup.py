"""Build entry point: metadata is in pyproject.toml; compiled parts under csrc/ are added here."""

from setuptools import setup

setup()
