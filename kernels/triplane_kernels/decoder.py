"""The network that turns a feature vector into density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

Hidden = Literal["softplus", "relu", "silu"]
Output = Literal["identity", "softplus", "exp"]


@dataclass(frozen=True, eq=False)
class DensityMLP:
    """A multi-layer perceptron whose first output is density.

    weights     one [out, in] matrix a layer, one layer or more; effective values, with any
                gain (as of equalised learning rates) already folded in.
    biases      one [out] vector a layer, or None where a layer has none.
    hidden      activation after every layer but the last: "softplus", "relu", "silu".
    output      sigma = output(row 0 of the last layer + bias_shift): "identity" (raw density,
                EG3D), "softplus", "exp".
    bias_shift  -1 for models that define density as softplus(raw - 1) or exp(raw - 1).

    Further rows of the last layer are features (a colour, say) and are handed on raw.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    hidden: Hidden = "softplus"
    output: Output = "identity"
    bias_shift: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        object.__setattr__(self, "biases", tuple(self.biases))
        if not self.weights or len(self.weights) != len(self.biases):
            raise ValueError(
                "A decoder needs one weight or more and a bias (or None) for each, "
                f"got {len(self.weights)} and {len(self.biases)}."
            )
        for number, weight in enumerate(self.weights):
            if weight.ndim != 2 or 0 in weight.shape:
                raise ValueError(f"weights[{number}] must be [out, in], got {_shape(weight)}.")
            if number and weight.shape[1] != self.weights[number - 1].shape[0]:
                raise ValueError(
                    f"weights[{number}] takes {weight.shape[1]} inputs, but the layer before "
                    f"gives {self.weights[number - 1].shape[0]}."
                )
            bias = self.biases[number]
            if bias is not None and bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"biases[{number}] must be [{weight.shape[0]}], got {_shape(bias)}."
                )
        if self.hidden not in get_args(Hidden):
            raise ValueError(f"hidden must be one of {get_args(Hidden)}, got {self.hidden!r}.")
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {self.output!r}.")

    @property
    def in_channels(self) -> int:
        """Length of the feature vector that goes in."""
        return self.weights[0].shape[1]

    @property
    def out_channels(self) -> int:
        """Rows of the last layer: density, and then the features."""
        return self.weights[-1].shape[0]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Every weight, then every bias that is there."""
        return (*self.weights, *(bias for bias in self.biases if bias is not None))

    def to(self, *args: Any, **kwargs: Any) -> DensityMLP:
        """The decoder with `Tensor.to` applied to every parameter."""
        return self._with(
            [weight.to(*args, **kwargs) for weight in self.weights],
            [None if bias is None else bias.to(*args, **kwargs) for bias in self.biases],
        )

    def detach(self) -> DensityMLP:
        """The decoder with parameters that take no gradient."""
        return self._with(
            [weight.detach() for weight in self.weights],
            [None if bias is None else bias.detach() for bias in self.biases],
        )

    def _with(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> DensityMLP:
        return replace(self, weights=tuple(weights), biases=tuple(biases))


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
