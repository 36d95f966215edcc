"""What each of the latent numbers of `heads` means.

A latent z is normalised to unit mean square, u, as the mapping network does; u is what counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

Z_DIM = 64
GROUPS = {"identity": (0, 32), "appearance": (32, 40), "faults": (40, 50), "spare": (50, 64)}
IDENTITY, APPEARANCE, FAULTS, SPARE = (slice(*GROUPS[name]) for name in GROUPS)

# In the order of the latent numbers. A number says how strong its fault is; below 0 there is none.
FAULT_NAMES = (
    "eyes",  # sunken
    "nose",  # flattened
    "bridge",  # of the nose, hooked
    "cheeks",  # hollow
    "asymmetry",  # the left of the mouth in front of its right
    "forehead",  # a bump
    "jaw",  # mouth and chin receding
    "waves",  # dents and bumps all over the face
    "hairline",  # a ridge
    "floater",  # a blob in front of the left temple
)
STRONGEST = 1.25  # numbers beyond this change nothing more


def normalized(z: Tensor) -> Tensor:
    """Rows of [B, Z_DIM] with a mean square of 1."""
    return z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def strengths(faults: Tensor) -> Tensor:
    """Fault numbers [..., 10] to strengths: 1.7 max(a, 0)^(3/2), 0 for half of the heads."""
    return 1.7 * faults.clamp(0, STRONGEST) ** 1.5


def floater_radius(faults: Tensor) -> Tensor:
    """Fault numbers [B, 10] to the floater's radius [B], world units; 0 where there is none."""
    return 0.040 * (faults[:, -1].clamp(max=STRONGEST) - 0.4).clamp_min(0).sqrt()


def factors(u: Tensor) -> Tensor:
    """Normalised latents [B, Z_DIM] -> [B, 50]: what a head depends on, each of about unit size.

    The floater's radius stands in place of its number.
    """
    faults = u[:, FAULTS]
    shapes = strengths(faults[:, :-1])
    return torch.cat(
        [u[:, : APPEARANCE.stop], shapes, floater_radius(faults)[:, None] / 0.012], dim=1
    )


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
