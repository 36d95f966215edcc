"""What every kernel's launch needs to know of the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from triplane_kernels.triton.elementary import INTERPRETED


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and launched.

    `constants` are the compile-time arguments that are chosen here and not by the model: block
    sizes, and whether these divide the sizes.
    """

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch, `options` among them."""
        return {**self.constants, **self.options}

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # a * b + c as one instruction, rounded once
        }


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, so make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def block(size: int, most: int, least: int = 16) -> int:
    """A power of two for a dimension: enough for all of it, if that is not beyond `most`.

    The interpreter's cost is by operation and not by element, so there blocks are large.
    """
    return max(least, min(triton.next_power_of_2(size), max(most, 256) if INTERPRETED else most))


def blocks(size: int, of: int) -> int:
    """How many blocks cover a dimension."""
    return -(-size // of)
