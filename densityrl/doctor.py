"""What is installed, and what each operation would run on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from densityrl import __version__
from densityrl.generator import bundled_generators
from triplane_kernels import available_backends, cpu, cuda

PACKAGES = ("triton", "numpy", "safetensors", "scikit-image", "trimesh")
OPTIONAL = {
    "tensorboard": "curves in TensorBoard: pip install 'densityrl[tensorboard]'",
    "fastapi": "the annotation page: pip install 'densityrl[annotate]'",
}

SLOWER = "without it density on a CPU takes ten to twenty times as long"


def report() -> str:
    """Several lines of plain text."""
    lines = [f"densityrl {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    versions = {"torch": torch.__version__} | {name: _version(name) for name in PACKAGES}
    lines.append(
        "packages: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    for name, use in OPTIONAL.items():
        lines.append(f"optional: {name} {_version(name)} ({use})")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        lines.append(f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        lines.append("GPU: torch sees none")
    lines.append(f"threads: {torch.get_num_threads()}")
    missing = cpu.why_not(torch.device("cpu"))
    if missing:
        lines.append(f"CPU kernels: {missing}; {SLOWER}")
    else:
        lines.append(f"CPU kernels: compiled, {cpu.isa()} in use")
    lines.append(f"CUDA kernels: {cuda.why_not(torch.device('cuda')) or 'compiled'}")
    lines.append(f"bundled generators: {', '.join(bundled_generators())}")
    for device in devices:
        lines.append(f"operations on {device}:")
        for name, choice in available_backends(torch.device(device)).items():
            lines.append(f"  {name}: {choice.chosen} ({choice.why})")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
