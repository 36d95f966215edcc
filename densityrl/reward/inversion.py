"""A reward in the space in which the generator itself varies.

Pairs are few and their labels are noisy; volumes without labels cost nothing. So a linear map from
a slab to the latent w that made it is fitted first, in closed form, and only a score of what it
finds is learned from pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densityrl.errors import PreferenceError

# In units of a slab's mean squared distance from the mean slab. Far more than the fit itself needs:
# what hardly shows in a slab is then hardly found, and pairs do not get lost in it.
RIDGE = 2.0
LINEAR = 0.5  # size of the components beside the units: smaller numbers are trusted less
SHARPNESS = 4.0  # of a unit's bend, per standard deviation
LARGEST = 2**31  # numbers in all slabs together; a fit holds three times as many, 24 GiB


def check_size(slabs: int, points: int, components: int) -> None:
    """PreferenceError where so many slabs of so many points are too many or too few to fit."""
    if slabs <= components:
        raise PreferenceError(
            f"{slabs} slabs are too few to find {components} components of w: raise "
            "--inversion-slabs, or take --preset conv"
        )
    if slabs * points > LARGEST:
        raise PreferenceError(
            f"{slabs} slabs of {points} points are too many for the inversion network: lower "
            "--resolution or --inversion-slabs, or take --preset conv"
        )


class InversionNetwork(nn.Module):
    """Slab -> principal components of w, as far as a linear map sees them -> score.

    The density is read as tanh((sigma - level) / softness): where the surface is, and not how
    negative empty space happens to be. The score is linear in the components and in one-sided
    units, softplus(y - floor), along axes on which heads that are liked less vary more: a fault
    that a head does not have pulls at little. Takes slabs of the one shape it was fitted on.
    """

    kind = "inversion"
    mean: Tensor
    projection: Tensor
    explained: Tensor
    axes: Tensor
    floors: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        components: int,
        units: int = 10,
        level: float = 10.0,
        softness: float = 120.0,
    ) -> None:
        super().__init__()
        self.shape, self.level, self.softness = tuple(shape), level, softness
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("projection", torch.zeros(components, *self.shape))
        self.register_buffer("explained", torch.zeros([]))
        self.register_buffer("axes", torch.zeros(components, units))
        self.register_buffer("floors", torch.zeros(units))
        self.score = nn.Linear(components + units, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "components": len(self.projection),
            "units": len(self.floors),
            "level": self.level,
            "softness": self.softness,
        }

    @classmethod
    def described(
        cls, shape: Sequence[int], components: int, units: int, level: float, softness: float
    ) -> InversionNetwork:
        return cls(shape, components, units, level, softness)

    def forward(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] -> reward [B]."""
        found = self.find(sigma)
        along = found @ self.axes - self.floors
        units = F.softplus(along, beta=SHARPNESS)
        return self.score(torch.cat([LINEAR * found, units], dim=1))[:, 0]

    def find(self, sigma: Tensor) -> Tensor:
        """Raw density [B, X, Y, Z] -> components of w [B, K], uncorrelated, of variance 1."""
        seen = (self.squash(sigma) - self.mean).flatten(1)
        return seen @ self.projection.flatten(1).T

    def squash(self, sigma: Tensor) -> Tensor:
        return torch.tanh((sigma - self.level) / self.softness)

    @torch.no_grad()
    def fit(self, slabs: Sequence[Tensor], w: Tensor) -> None:
        """Fit the map by ridge regression.

        slabs: raw density of N latents, in parts [n, X, Y, Z]; w [N, w_dim]. `explained` becomes
        the share of the components' variance, weighted alike, that the map explains on every
        fifth latent when it is fitted on the others.
        """
        count, components = len(w), len(self.projection)
        seen = torch.cat([self.squash(part).flatten(1) for part in slabs])
        self.mean.copy_(seen.mean(dim=0).reshape(self.shape))
        seen -= self.mean.flatten()
        centred = w - w.mean(dim=0)
        _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
        axes, sizes = axes[:components], sizes[:components]
        target = centred @ axes.T / (sizes.clamp_min(1e-6 * sizes[0]) / count**0.5)
        gram = seen @ seen.T
        if not gram.diagonal().mean() > 1e-9 * seen.shape[1] or not sizes[0] > 0:
            raise PreferenceError("all slabs are alike: there is nothing to tell them apart by")
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(count, device=gram.device)

        left_out = torch.arange(count, device=w.device) % 5 == 0
        used = ~left_out
        dual = torch.linalg.solve((gram + ridge)[used][:, used], target[used])
        error = (gram[left_out][:, used] @ dual - target[left_out]).square().mean()
        self.explained.copy_(1 - error / target[left_out].square().mean())

        dual = torch.linalg.solve(gram + ridge, target)  # [N, K]
        values, vectors = torch.linalg.eigh(torch.cov((gram @ dual).T))
        whitening = vectors / values.clamp_min(1e-12 * values[-1]).sqrt() @ vectors.T
        self.projection.copy_(((dual @ whitening).T @ seen).reshape(self.projection.shape))

    @torch.no_grad()
    def bend(self, found: Tensor, winners: Tensor, losers: Tensor) -> None:
        """Choose the units' axes and floors.

        found [N, K]: components of slabs with and without labels; winners, losers [P, K]: of
        pairs. With q the direction from losers to winners, the axes are the eigenvectors of
        -E[(q f) f f^T] with the largest eigenvalues: directions in which heads that q likes less
        are spread more widely. If f is a sum of independent parts of which some are skewed and
        disliked, these parts are those eigenvectors, because the matrix is a slice of f's third
        cumulant (the identity behind tensor methods for independent components,
        arXiv:1210.7559). Each axis points to its longer tail; the floor is the quartile below.
        """
        liked = found @ F.normalize((winners - losers).mean(dim=0), dim=0)
        slice_ = -(found * (liked - liked.mean())[:, None]).T @ found / len(found)
        axes = torch.linalg.eigh(slice_).eigenvectors[:, -len(self.floors) :]
        along = found @ axes
        sign = torch.where(along.pow(3).mean(dim=0) < 0, -1.0, 1.0)
        self.axes.copy_(axes * sign)
        self.floors.copy_((along * sign).quantile(0.25, dim=0))
