"""The CUDA extension, and what every call into it needs to know."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

extension: Any = None  # the module
try:
    extension = importlib.import_module("triplane_kernels._cuda")
except ImportError as error:
    _missing = (
        f"the CUDA extension is not there ({error}); reinstall with nvcc on the PATH and "
        "DENSITYRL_CUDA=1"
    )
else:
    _missing = ""

NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(device: torch.device) -> str:
    """Why these kernels cannot run on a device; empty if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it computes on NVIDIA GPUs only"
    return _missing


def queue(tensor: Tensor) -> dict[str, int]:
    """Where a call on this tensor is enqueued: the arguments `device` and `stream`."""
    stream = torch.cuda.current_stream(tensor.device)
    return {"device": stream.device_index, "stream": stream.cuda_stream}


def address(tensor: Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
