"""A reward in the space in which the generator itself varies.

Pairs are few and their labels are noisy; volumes without labels cost nothing. So a linear map from
a slab to coordinates of the latent w that made it is fitted first, in closed form, and only a
sparse score of what it finds is learned from pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densityrl.errors import PreferenceError

# In units of a slab's mean squared distance from the mean slab. Far more than the fit itself needs:
# what hardly shows in a slab is then hardly found, and pairs do not get lost in it.
RIDGE = 2.0
LARGEST = 2**31  # numbers in all slabs together; a fit holds three times as many, 24 GiB


def check_size(slabs: int, points: int, components: int) -> None:
    """PreferenceError where so many slabs of so many points are too many or too few to fit."""
    if slabs <= components:
        raise PreferenceError(
            f"{slabs} slabs are too few to find {components} coordinates of w: raise "
            "--inversion-slabs, or take --preset conv"
        )
    if slabs * points > LARGEST:
        raise PreferenceError(
            f"{slabs} slabs of {points} points are too many for the inversion network: lower "
            "--resolution or --inversion-slabs, or take --preset conv"
        )


class InversionNetwork(nn.Module):
    """Slab -> coordinates of w, as far as a linear map sees them -> score linear in them.

    The density is read as tanh((sigma - level) / softness): where the surface is, and not how
    negative empty space happens to be. Coordinates along skewed axes (`LatentAxes`) go one way,
    which is what lets a linear score judge faults. Takes slabs of the one shape it was fitted on.
    """

    kind = "inversion"
    mean: Tensor
    projection: Tensor
    explained: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        components: int,
        level: float = 10.0,
        softness: float = 120.0,
    ) -> None:
        super().__init__()
        self.shape, self.level, self.softness = tuple(shape), level, softness
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("projection", torch.zeros(components, *self.shape))
        self.register_buffer("explained", torch.zeros([]))
        self.score = nn.Linear(components, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "components": len(self.projection),
            "level": self.level,
            "softness": self.softness,
        }

    @classmethod
    def described(
        cls, shape: Sequence[int], components: int, level: float, softness: float
    ) -> InversionNetwork:
        return cls(shape, components, level, softness)

    def forward(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] -> reward [B]."""
        return self.score(self.find(sigma))[:, 0]

    def find(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] -> coordinates [B, K].

        What hardly shows is found small; the standard deviations have a mean of 1.
        """
        seen = (self.squash(sigma) - self.mean).flatten(1)
        return seen @ self.projection.flatten(1).T

    def squash(self, sigma: Tensor) -> Tensor:
        return torch.tanh((sigma - self.level) / self.softness)

    @torch.no_grad()
    def fit(self, slabs: Sequence[Tensor], coordinates: Tensor) -> None:
        """Fit the map by ridge regression.

        slabs: raw density of N latents, in parts [n, X, Y, Z]; coordinates [N, K] of their w, of
        which there may be fewer than components: the others are then found to be 0. `explained`
        becomes the share of the coordinates' variance that the map explains on every fifth latent
        when it is fitted on the others.
        """
        count = len(coordinates)
        seen = torch.cat([self.squash(part).flatten(1) for part in slabs])
        self.mean.copy_(seen.mean(dim=0).reshape(self.shape))
        seen -= self.mean.flatten()
        target = coordinates - coordinates.mean(dim=0)
        gram = seen @ seen.T
        if not gram.diagonal().mean() > 1e-9 * seen.shape[1] or not target.square().mean() > 1e-9:
            raise PreferenceError("all slabs are alike: there is nothing to tell them apart by")
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(count, device=gram.device)

        left_out = torch.arange(count, device=gram.device) % 5 == 0
        used = ~left_out
        dual = torch.linalg.solve((gram + ridge)[used][:, used], target[used])
        error = (gram[left_out][:, used] @ dual - target[left_out]).square().mean()
        self.explained.copy_(1 - error / target[left_out].square().mean())

        dual = torch.linalg.solve(gram + ridge, target)  # [N, K]
        dual /= (gram @ dual).std(dim=0).mean()
        self.projection.zero_()
        self.projection[: target.shape[1]] = (dual.T @ seen).unflatten(1, self.shape)
