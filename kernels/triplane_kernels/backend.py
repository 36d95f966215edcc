"""What every kernel backend offers, and the form in which it gets its arguments.

A backend is a module with the functions of `Backend`. `ops` brings the arguments into one form
before it calls one:

planes   P tensors [B, C, Hp, Wp], float32, bfloat16 or float16, any strides.
layout   reduce is "sum", "concat" or "product" (a mean is a sum with the first layer's weight
         divided by P, channel-major a concat with its columns permuted); extent is three numbers.
decoder  float32 parameters, every bias present, bias_shift 0; for the grid functions the last
         layer has one row.
points   float32 [B, M, 3], or [1, M, 3] for all samples.

Results are float32, gradients of planes have the planes' dtype. Nothing of size voxels x channels
or points x channels is kept between a forward and its backward: backwards recompute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout


class Needs(NamedTuple):
    """Which gradients a backward is to compute."""

    planes: bool
    decoder: bool
    points: bool = False


class Gradients(NamedTuple):
    """Like the inputs they belong to; None where none was asked for."""

    planes: list[Tensor] | None = None
    weights: list[Tensor] | None = None
    biases: list[Tensor] | None = None
    points: Tensor | None = None


class Field(NamedTuple):
    """A density field: planes and the decoder that reads them."""

    planes: Sequence[Tensor]
    decoder: DensityMLP


class Backend(Protocol):
    """The functions of a backend; sigma has the decoder's output activation applied."""

    def sample_features(
        self, planes: Sequence[Tensor], points: Tensor, layout: TriplaneLayout
    ) -> Tensor:
        """[B, M, C']."""

    def sample_features_backward(
        self,
        d_features: Tensor,
        planes: Sequence[Tensor],
        points: Tensor,
        layout: TriplaneLayout,
        needs: Needs,
    ) -> Gradients:
        """Gradients of planes and points (the latter of the points' own shape)."""

    def radiance(
        self, field: Field, points: Tensor, layout: TriplaneLayout
    ) -> tuple[Tensor, Tensor]:
        """sigma [B, M], and the last layer's other rows, raw: [B, M, F], F may be 0."""

    def radiance_backward(
        self,
        d_sigma: Tensor,
        d_features: Tensor,
        sigma: Tensor,
        field: Field,
        points: Tensor,
        layout: TriplaneLayout,
        needs: Needs,
    ) -> Gradients:
        """`sigma` is the forward's: from it follows the slope of the output activation."""

    def density_grid(self, field: Field, grid: Grid, layout: TriplaneLayout) -> Tensor:
        """[B, X, Y, Z]."""

    def density_grid_backward(
        self,
        d_sigma: Tensor,
        sigma: Tensor,
        field: Field,
        grid: Grid,
        layout: TriplaneLayout,
        needs: Needs,
    ) -> Gradients:
        """Gradients of planes and decoder."""

    def density_grid_loss(
        self,
        field: Field,
        target: Tensor | Field,
        grid: Grid,
        layout: TriplaneLayout,
        kind: Literal["l1", "l2"],
    ) -> Tensor:
        """[B]: mean over the voxels. `target` is a float32 volume [B, X, Y, Z] or a field."""

    def density_grid_loss_backward(
        self,
        d_loss: Tensor,
        field: Field,
        target: Tensor | Field,
        grid: Grid,
        layout: TriplaneLayout,
        kind: Literal["l1", "l2"],
        needs: Needs,
        target_needs: Needs,
    ) -> tuple[Gradients, Gradients | Tensor | None]:
        """Of the field, and of the target: a field's Gradients, or a volume's gradient.

        For a volume `target_needs.planes` asks for its gradient. The gradient of |x| at 0 is 0.
        """


def zero_gradients(field: Field, needs: Needs) -> Gradients:
    """The gradients of a volume without samples."""
    weights = field.decoder.weights
    return Gradients(
        planes=[torch.zeros_like(plane) for plane in field.planes] if needs.planes else None,
        weights=[torch.zeros_like(weight) for weight in weights] if needs.decoder else None,
        biases=[weight.new_zeros(len(weight)) for weight in weights] if needs.decoder else None,
    )
