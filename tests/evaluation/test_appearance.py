"""Distances of pictures: cases by hand, and what must hold of any."""

import itertools
import math

import numpy as np
import pytest
import torch

from densityrl.evaluation.appearance import ImageFeatures, frechet_distance, psnr, ssim


def pictures(count, side=24):
    """Smooth random images [count, 3, side, side] in [-1, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def test_psnr():
    black, grey = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -0.5)
    assert psnr(black, grey) == pytest.approx(10 * math.log10(4 / 0.25))
    assert psnr(black, black) == math.inf
    assert psnr(black - 3, black) == math.inf  # compared as they are shown


def test_ssim_by_hand():
    one, other = torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.25)
    luminance = 0.01 * 2  # K1 times the range: what is left where nothing varies
    expected = (2 * 0.5 * 0.25 + luminance**2) / (0.5**2 + 0.25**2 + luminance**2)
    assert ssim(one, other) == pytest.approx(expected, rel=1e-6)
    assert ssim(one + 3, torch.ones(3, 8, 8)) == 1  # compared as they are shown


@pytest.mark.parametrize("side", [3, 4, 7, 24])
def test_ssim_falls_with_noise(side):
    image = pictures(1, side)[0]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    values = [ssim(image + size * noise, image) for size in (0, 0.05, 0.2, 0.8)]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9


def gaussian(count, dimensions):
    """Samples whose mean is 0 and whose covariance is 1, up to rounding."""
    drawn = np.random.default_rng(0).standard_normal((count, dimensions))
    drawn -= drawn.mean(axis=0)
    return drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T


def test_frechet_distance_of_gaussians():
    unit = gaussian(50, 4)
    assert frechet_distance(unit, unit) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(unit, unit + np.array([3, 0, -4, 0])) == pytest.approx(25)
    assert frechet_distance(unit, 3 * unit) == pytest.approx(4 * (1 - 3) ** 2)
    # Commuting covariances: the squared distance of the standard deviations.
    assert frechet_distance(unit * [1, 2, 3, 4], unit * [2, 2, 5, 1]) == pytest.approx(1 + 4 + 9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Two dimensions, where tr (S_a S_b)^(1/2) = sqrt(tr S_a S_b + 2 sqrt(det S_a S_b))."""
    unit = gaussian(50, 2)
    mix_a, mix_b = np.array([[2.0, 0.0], [1.0, 0.5]]), np.array([[1.0, -0.7], [0.0, 3.0]])
    s_a, s_b = mix_a @ mix_a.T, mix_b @ mix_b.T
    root = np.sqrt(np.trace(s_a @ s_b) + 2 * np.sqrt(np.linalg.det(s_a @ s_b)))
    expected = np.trace(s_a) + np.trace(s_b) - 2 * root
    there = frechet_distance(unit @ mix_a.T, unit @ mix_b.T)
    assert there == pytest.approx(expected)
    assert frechet_distance(unit @ mix_b.T, unit @ mix_a.T) == pytest.approx(there)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    few = np.random.default_rng(1).standard_normal((5, 20))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="needs two samples or more, not 1 and 5"):
        frechet_distance(few[:1], few)


def test_distance_of_features_grows_with_noise():
    images, features = pictures(80), ImageFeatures()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    clean = features(images)
    distances = [
        frechet_distance(features(images + size * noise), clean) for size in (0, 0.05, 0.2, 0.8)
    ]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert all(2 * a < b for a, b in itertools.pairwise(distances[1:]))


def test_features_are_fixed_by_the_seed():
    images = pictures(40)
    there = ImageFeatures(3)(images)
    assert there.shape == (40, 64)
    assert there.dtype == np.float64
    np.testing.assert_array_equal(ImageFeatures(3)(images), there)
    np.testing.assert_allclose(ImageFeatures(3)(images[35:]), there[35:], rtol=1e-10)
    assert np.abs(ImageFeatures(4)(images) - there).max() > 0.1


def test_features_stay_what_they_were():
    """A changed network would make distances of two releases incomparable without a word."""
    there = ImageFeatures()(pictures(2))[:, :2]
    expected = [[-0.11402345, 0.06863664], [-0.10822354, -0.03795271]]
    np.testing.assert_allclose(there, expected, atol=1e-6)
