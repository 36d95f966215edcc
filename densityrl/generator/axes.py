"""Axes of w along which a generator's samples are skewed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from densityrl.errors import CheckpointError
from densityrl.generator.model import TriplaneGenerator, latents

SAMPLES = 20_000  # latents that axes are found from
FIRST_SEED = 300_000
SKEWED = 0.3  # an axis of more skewness than this counts as skewed
ROUNDS = 150
SHARPENINGS, SHARPENING_ROUNDS = 3, 10  # modes are found anew in each of the first
WIDTH = 0.3  # of a mode, in standard deviations


@dataclass(frozen=True)
class LatentAxes:
    """w = mean + directions y + rest: y [K] are coordinates of unit variance, uncorrelated.

    The K largest principal components of w (fewer where w has fewer), turned so that the skewness
    of the coordinates is large, and then so that along the skewed axes most samples are at the
    mode: what most have alike and some have much of, as faults are, comes to lie along single
    axes. Coordinates point to their longer tail.
    """

    mean: Tensor  # [w_dim]
    directions: Tensor  # [w_dim, K], from coordinates to w
    readout: Tensor  # [w_dim, K], from w - mean to coordinates
    typical: Tensor  # [K], the coordinates' modes
    skewness: Tensor  # [K], third moments of the coordinates, falling

    @classmethod
    @torch.no_grad()
    def of(cls, generator: TriplaneGenerator, count: int) -> LatentAxes:
        """Of a generator's own samples, always the same ones; no truncation, frontal camera.

        The rotation B comes of rounds of B <- orthogonal factor of E[x (B^T x)^2], x the scaled
        components, which climb the sum of the coordinates' squared third cumulants (independent
        component analysis by its fixed-point iteration, Hyvärinen, IEEE Trans. Neural Netw. 10(3),
        1999, with the contrast u^3 / 3), and of `sharpened`. Among axes that are hardly skewed any
        rotation does; they do not settle.
        """
        if count < 1:
            raise ValueError(f"at least one axis is needed, not {count}")
        z = latents(range(FIRST_SEED, FIRST_SEED + SAMPLES), generator.z_dim)
        w = torch.cat([generator.mapping(part.to(generator.device))[:, 0] for part in z.split(500)])
        mean = w.mean(dim=0)
        covariance = torch.cov(w.T)
        # The rounding of numbers that are all alike stays far below this; not finite fails as well.
        if not covariance.trace() > 1e-12 * mean.square().sum():
            raise CheckpointError(
                "the generator's w is not finite or is the same for every latent, so there are no "
                "axes along which to judge or move it: take another checkpoint"
            )
        variances, components = torch.linalg.eigh(covariance)
        # What float32 makes of a variance of zero is up to 5e-7 of the largest one.
        count = min(count, int((variances > 1e-6 * variances[-1]).sum()))
        sizes, components = variances[-count:].sqrt(), components[:, -count:]
        white = (w - mean) @ components / sizes
        turn = torch.eye(count, device=w.device)
        for _ in range(ROUNDS):
            turn = orthogonal(white.T @ (white @ turn).square())
        turn, skewness = by_skewness(white, turn)
        turn = sharpened(white, turn, int((skewness > SKEWED).sum()))
        turn, skewness = by_skewness(white, turn)
        return cls(
            mean,
            components * sizes @ turn,
            components / sizes @ turn,
            modes(white @ turn),
            skewness,
        )

    def coordinates(self, w: Tensor) -> Tensor:
        """w [..., w_dim] -> y [..., K]."""
        return (w - self.mean) @ self.readout


def by_skewness(white: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Axes [P, K] of white samples [N, P] in falling order of skewness, none below 0, and it."""
    skewness = (white @ turn).pow(3).mean(dim=0)
    order = skewness.abs().argsort(descending=True)
    turn = turn * torch.where(skewness < 0, -1.0, 1.0)
    return turn[:, order], skewness.abs()[order]


def sharpened(white: Tensor, turn: Tensor, count: int) -> Tensor:
    """Axes turned so that along the first `count` more samples are near the modes m.

    The same fixed-point iteration with the contrast E[exp(-(u - m)^2 / (2 WIDTH^2))]: third moments
    hang on a few samples of long tails, and this one on the many that have none. The other axes
    become some basis of what is left.
    """
    if not count:
        return turn
    first = turn[:, :count]
    for _ in range(SHARPENINGS):
        mode = modes(white @ first)
        for _ in range(SHARPENING_ROUNDS):
            away = (white @ first - mode) / WIDTH
            near = torch.exp(-away.square() / 2)
            slope, bend = -away * near, (away.square() - 1) * near / WIDTH
            moved = orthogonal(white.T @ slope / len(white) - first * bend.mean(dim=0))
            first = torch.where((moved * first).sum(dim=0) < 0, -moved, moved)
    rest = torch.linalg.qr(torch.cat([first, turn[:, count:]], dim=1)).Q[:, count:]
    return torch.cat([first, rest], dim=1)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix of the same shape with orthonormal columns."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def modes(y: Tensor, at_least: int = 50) -> Tensor:
    """Half-sample mode of each column of [N, K]: again and again the shortest half of the sample
    (Robertson and Cryer, J. Am. Stat. Assoc. 69(348), 1974), down to `at_least` numbers."""
    found = []
    for column in y.T:
        part = column.sort().values
        while len(part) > at_least:
            half = (len(part) + 1) // 2
            lengths = part[half - 1 :] - part[: len(part) - half + 1]
            start = int(lengths.argmin())
            part = part[start : start + half]
        found.append(part.mean())
    return torch.stack(found)
