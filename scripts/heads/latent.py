"""What each of the latent numbers of `heads` means.

A latent z is normalised to unit mean square, u, as the mapping network does; u is what counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

Z_DIM = 64
GROUPS = {"identity": (0, 32), "appearance": (32, 40), "faults": (40, 50), "spare": (50, 64)}
IDENTITY, APPEARANCE, FAULTS, SPARE = (slice(*GROUPS[name]) for name in GROUPS)

# In the order of the latent numbers; the sign says which way, the power 3/2 how far.
FAULT_NAMES = (
    "eyes",  # sunken or bulging
    "nose",  # flattened or pulled out
    "bridge",  # hooked or saddled
    "cheeks",  # hollow or swollen
    "asymmetry",  # one half of the face in front of the other
    "forehead",  # dent or bump
    "jaw",  # mouth and chin receding or jutting
    "waves",  # dents and bumps all over
    "hairline",  # ridge or groove
    "floater",  # a blob in front of the temple, or of the other cheek
)
STEEPEST = 2.5  # numbers beyond this change nothing more


def normalized(z: Tensor) -> Tensor:
    """Rows of [B, Z_DIM] with a mean square of 1."""
    return z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def strengths(faults: Tensor) -> Tensor:
    """Fault numbers [..., 10] to signed strengths: sign(a) |a|^(3/2), smooth and heavy-tailed."""
    a = faults.clamp(-STEEPEST, STEEPEST)
    return a * a.abs().sqrt()


def factors(u: Tensor) -> Tensor:
    """Normalised latents [B, Z_DIM] -> [B, 51]: what a head depends on, each of about unit size.

    A floater's radius, left and right, stands in place of its number.
    """
    faults = u[:, FAULTS]
    return torch.cat(
        [
            u[:, : APPEARANCE.stop],
            strengths(faults[:, :-1]) / 1.4,
            floater_radii(faults[:, -1]) / 0.012,
        ],
        dim=1,
    )


def floater_radii(a: Tensor) -> Tensor:
    """[B] -> [B, 2]: radius (world units) of the floater at the left and at the right; 0 is none."""
    return 0.034 * (torch.stack([a, -a], dim=-1).clamp(max=STEEPEST) - 0.9).clamp_min(0).sqrt()


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Normalised latents [count, Z_DIM]."""
    return normalized(torch.randn(count, Z_DIM, generator=generator))


def with_new_faults(u: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
    """The same identities and appearances with other faults; none where `clean` [B] is true.

    Faults and spare numbers are drawn again with the length they had, which leaves the
    distribution of u as it is.
    """
    rest = torch.randn(len(u), Z_DIM - FAULTS.start, generator=generator)
    rest[clean, : FAULTS.stop - FAULTS.start] = 0
    length = u[:, FAULTS.start :].norm(dim=1, keepdim=True)
    return torch.cat([u[:, : FAULTS.start], rest * length / rest.norm(dim=1, keepdim=True)], dim=1)
