"""How near pictures are to others: one to one, and as sets."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 7  # pixels a side, scikit-image's default
FEATURE_WIDTHS = (16, 32, 64, 64)
FEATURES = 64
IMAGES_AT_A_TIME = 32


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]; infinite where they are equal."""
    error = F.mse_loss(image.clamp(-1, 1).double(), reference.clamp(-1, 1).double())
    return float(10 * torch.log10(4 / error))


def ssim(image: Tensor, reference: Tensor) -> float:
    """Mean structural similarity of images [3, H, W] in [-1, 1], both sides >= 3; 1 if equal.

    Z. Wang et al., IEEE Transactions on Image Processing 13, 2004, with a uniform window.
    """
    from skimage.metrics import structural_similarity

    shown, expected = (x.detach().clamp(-1, 1).double().cpu().numpy() for x in (image, reference))
    largest_odd = (min(shown.shape[1:]) - 1) // 2 * 2 + 1
    return float(
        structural_similarity(
            shown,
            expected,
            win_size=min(SSIM_WINDOW, largest_odd),
            data_range=2.0,
            channel_axis=0,
        )
    )


class ImageFeatures:
    """Images to 64 numbers each, through a fixed convolutional network with random weights.

    Four convolutions of stride 2, each followed by a leaky ReLU; the mean and the standard
    deviation over the pixels of every channel of every layer, projected at random. On the CPU in
    float64, so that a seed gives the same numbers whatever the generator runs on.

    Distances between such features are not FID, whose network has learned to see: they depend on
    this network, its seed and the images' size, and compare only within one benchmark.
    """

    def __init__(self, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            """Gaussian, of the size that keeps the variance through a ReLU."""
            drawn = torch.randn(*shape, generator=source, dtype=torch.float64)
            return drawn * (2 / drawn[0].numel()) ** 0.5

        widths = (3, *FEATURE_WIDTHS)
        self._kernels = [
            weights(wide, narrow, 3, 3)
            for narrow, wide in zip(widths, FEATURE_WIDTHS, strict=False)
        ]
        self._projection = weights(FEATURES, 2 * sum(FEATURE_WIDTHS))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Images [N, 3, H, W] in [-1, 1] to features [N, 64] float64."""
        parts = []
        for part in images.split(IMAGES_AT_A_TIME):
            x = part.cpu().double().clamp(-1, 1)
            statistics = []
            for kernel in self._kernels:
                x = F.leaky_relu(F.conv2d(x, kernel, stride=2, padding=1), 0.2)
                statistics += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)]
            parts.append(torch.cat(statistics, dim=1) @ self._projection.T)
        return torch.cat(parts).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features [N, D] and [M, D] float64.

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    (D. C. Dowson, B. V. Landau, Journal of Multivariate Analysis 12, 1982). S_a S_b has the
    eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is symmetric. Raises ValueError below two
    samples a set.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs two samples or more, not {len(a)} and {len(b)}")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    distance = shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum()
    return max(0.0, float(distance))
