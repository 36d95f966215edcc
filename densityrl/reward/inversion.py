"""A reward in the space in which the generator itself varies.

Pairs are few and their labels are noisy; volumes without labels cost nothing. So a linear map from
a slab to the latent w that made it is fitted first, in closed form, and only a linear score of what
it finds is learned from pairs.
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
LARGEST = 2**31  # numbers in all slabs together: what a fit holds in memory, 8 GiB


class InversionNetwork(nn.Module):
    """Slab -> principal components of w, as far as a linear map sees them -> score.

    The density is read as tanh((sigma - level) / softness): where the surface is, and not how
    negative empty space happens to be. Takes slabs of the one shape it was fitted on.
    """

    kind = "inversion"
    mean: Tensor
    projection: Tensor

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
        seen = (self.squash(sigma) - self.mean).flatten(1)
        return self.score(seen @ self.projection.flatten(1).T)[:, 0]

    def squash(self, sigma: Tensor) -> Tensor:
        return torch.tanh((sigma - self.level) / self.softness)

    @torch.no_grad()
    def fit(self, slabs: Sequence[Tensor], w: Tensor) -> float:
        """Fit the map by ridge regression; found components get a variance of 1.

        slabs: raw density of N latents, in parts [n, X, Y, Z]; w [N, w_dim]. Returns the share of
        the components' variance, weighted alike, that the map explains on every fifth latent
        when it is fitted on the others.
        """
        count = len(w)
        if count * self.mean.numel() > LARGEST:
            raise PreferenceError(
                f"{count} slabs of {self.mean.numel()} points are too many for the inversion "
                "network: lower --resolution or --inversion-slabs, or take --network conv"
            )
        seen = torch.cat([self.squash(part).flatten(1) for part in slabs])
        self.mean.copy_(seen.mean(dim=0).reshape(self.shape))
        seen -= self.mean.flatten()
        centred = w - w.mean(dim=0)
        _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
        axes, sizes = axes[: len(self.projection)], sizes[: len(self.projection)]
        target = centred @ axes.T / (sizes.clamp_min(1e-6 * sizes[0]) / count**0.5)
        gram = seen @ seen.T
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(count, device=gram.device)

        left_out = torch.arange(count, device=w.device) % 5 == 0
        used = ~left_out
        dual = torch.linalg.solve((gram + ridge)[used][:, used], target[used])
        error = (gram[left_out][:, used] @ dual - target[left_out]).square().mean()

        dual = torch.linalg.solve(gram + ridge, target)  # [N, K]
        spread = (gram @ dual).std(dim=0)
        self.projection.copy_(((dual / spread).T @ seen).reshape(self.projection.shape))
        return 1 - float(error / target[left_out].square().mean())
