"""Axes of w: skewed parts of a known mixture come to lie along single axes."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_generator

from densityrl.errors import CheckpointError
from densityrl.generator import latents
from densityrl.generator.axes import FIRST_SEED, SAMPLES, LatentAxes, modes, orthogonal, sharpened

ONE_SIDED, GAUSSIAN, W_DIM = 4, 3, 12
Z_DIM = ONE_SIDED + GAUSSIAN
OFFSET = 5.0  # of w: its mean is nowhere near zero


def sources_of(z):
    """Independent sources [N, 7] of latents [N, 7]: two kinds of a tail, twice each; the rest as
    they are."""
    exponential = -torch.special.ndtr(-z[:, :2]).log()
    faults = z[:, 2:ONE_SIDED].relu().pow(1.5)  # half of all samples have none
    return torch.cat([exponential, faults, z[:, ONE_SIDED:]], dim=1)


def mixing(seed=0):
    """[7, W_DIM]; no source is an axis or a principal component of w."""
    return torch.randn(Z_DIM, W_DIM, generator=torch.Generator().manual_seed(seed))


def generator_of(w_of):
    """As much of a generator as axes need, with a mapping of one's own; three rows of w."""
    return SimpleNamespace(
        z_dim=Z_DIM,
        device=torch.device("cpu"),
        mapping=lambda z: w_of(z)[:, None].expand(-1, 3, -1),
    )


def mixed(seed=0):
    return generator_of(lambda z: sources_of(z) @ mixing(seed) + OFFSET)


def unseen(count=5000):
    """Sources and w of latents that took no part in finding the axes."""
    sources = sources_of(latents(range(count), Z_DIM))
    return sources, sources @ mixing() + OFFSET


@pytest.fixture(scope="module")
def axes():
    return LatentAxes.of(mixed(), Z_DIM)


def correlation(y, sources):
    """[K, S] of columns."""
    return torch.corrcoef(torch.cat([y.T, sources.T]))[: y.shape[1], y.shape[1] :]


# --- the axes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_skewed_sources_are_found_one_by_one(seed):
    """Whatever way they are mixed, and with the sign of their tail."""
    found = LatentAxes.of(mixed(seed), Z_DIM)
    sources = sources_of(latents(range(5000), Z_DIM))
    both = correlation(found.coordinates(sources @ mixing(seed) + OFFSET), sources)
    best = both[:ONE_SIDED, :ONE_SIDED].max(dim=1)
    assert (best.values > 0.95).all()
    assert sorted(best.indices.tolist()) == list(range(ONE_SIDED))
    assert (both[ONE_SIDED:, :ONE_SIDED].abs() < 0.3).all()  # what is left is Gaussian


def test_axes_are_sharp_where_third_moments_are_not():
    """Ten faults among Gaussians: samples without a fault have its coordinate alike.

    Third moments alone leave much of the other sources in it.
    """
    drawn = torch.Generator().manual_seed(1)
    z = torch.randn(5000, 30, generator=drawn)
    sources = torch.cat([z[:, :10].relu().pow(1.5), z[:, 10:]], dim=1)
    sources = (sources - sources.mean(dim=0)) / sources.std(dim=0)
    start = torch.eye(30)
    for _ in range(50):
        start = orthogonal(sources.T @ (sources @ start).square())
    sharp = sharpened(sources, start, 10)
    torch.testing.assert_close(sharp.T @ sharp, torch.eye(30), rtol=0, atol=1e-5)

    def spread(turn):
        y = sources @ turn
        return torch.stack([y[z[:, k] < 0, k].std() for k in range(10)]).max().item()

    assert spread(start) > 0.08
    assert spread(sharp) < 0.02
    assert torch.equal(sharpened(sources, start, 0), start)  # nothing is skewed


def test_tails_to_the_left_are_turned_round():
    """The same axes when every source is mirrored, pointing to the tail again."""
    mirrored = LatentAxes.of(generator_of(lambda z: -sources_of(z) @ mixing()), Z_DIM)
    sources, w = unseen()
    both = correlation(mirrored.coordinates(OFFSET - w), sources)[:ONE_SIDED, :ONE_SIDED]
    assert (both.amax(dim=1) > 0.95).all()


def test_the_most_skewed_come_first(axes):
    """Known: 2 for an exponential; more for the faults; nothing for Gaussians."""
    assert torch.equal(axes.skewness, axes.skewness.sort(descending=True).values)
    z = latents(range(FIRST_SEED, FIRST_SEED + SAMPLES), Z_DIM)
    sources = sources_of(z)
    scores = (sources - sources.mean(dim=0)) / sources.std(dim=0)
    known = scores.pow(3).mean(dim=0)[:ONE_SIDED].sort(descending=True).values
    torch.testing.assert_close(axes.skewness[:ONE_SIDED], known, rtol=0.05, atol=0)
    assert (axes.skewness[ONE_SIDED:] < 0.1).all()
    y = axes.coordinates(sources @ mixing() + OFFSET)
    torch.testing.assert_close(axes.skewness, y.pow(3).mean(dim=0), rtol=0, atol=1e-3)


def test_modes_are_where_most_samples_are(axes):
    """Below the mean, which is 0, where there is a tail; at no fault where half have none."""
    assert (axes.typical[:ONE_SIDED] < -0.4).all()
    assert (axes.typical[ONE_SIDED:].abs() < 0.5).all()
    sources, w = unseen()
    both = correlation(axes.coordinates(w), sources)
    for source in range(2, ONE_SIDED):
        none = axes.coordinates(w[sources[:, source] == 0])[:, both[:, source].argmax()]
        assert axes.typical[both[:, source].argmax()].item() == pytest.approx(
            none.mean().item(), abs=0.1
        )


def test_coordinates_are_uncorrelated_and_of_variance_1(axes):
    z = latents(range(FIRST_SEED, FIRST_SEED + SAMPLES), Z_DIM)
    y = axes.coordinates(sources_of(z) @ mixing() + OFFSET)
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(Z_DIM), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cov(y.T), torch.eye(Z_DIM), rtol=0, atol=1e-3)
    new = axes.coordinates(unseen()[1])
    torch.testing.assert_close(torch.cov(new.T), torch.eye(Z_DIM), rtol=0, atol=0.15)


def test_directions_undo_the_readout(axes):
    _, w = unseen(50)
    assert axes.directions.shape == axes.readout.shape == (W_DIM, Z_DIM)
    torch.testing.assert_close(
        axes.readout.T @ axes.directions, torch.eye(Z_DIM), rtol=0, atol=1e-5
    )
    rebuilt = axes.mean + axes.coordinates(w) @ axes.directions.T
    torch.testing.assert_close(rebuilt, w, rtol=0, atol=1e-3)
    assert axes.coordinates(w[:, None].expand(-1, 3, -1)).shape == (50, 3, Z_DIM)


def test_fewer_axes_span_the_widest_components(axes):
    """What they leave of w is what the other principal components say."""
    few = LatentAxes.of(mixed(), 3)
    assert few.directions.shape == (W_DIM, 3)
    assert few.typical.shape == few.skewness.shape == (3,)
    w = sources_of(latents(range(FIRST_SEED, FIRST_SEED + SAMPLES), Z_DIM)) @ mixing() + OFFSET
    left = w - few.mean - few.coordinates(w) @ few.directions.T
    variances = torch.linalg.eigvalsh(torch.cov(w.T))
    assert left.var(dim=0).sum().item() == pytest.approx(variances[:-3].sum().item(), rel=1e-3)


def test_no_more_axes_than_w_has_directions(axes):
    """w has 12 numbers, of which 7 say everything; rounding is no direction of its own."""
    many = LatentAxes.of(mixed(), 100)
    for name in ("mean", "directions", "readout", "typical", "skewness"):
        assert torch.equal(getattr(many, name), getattr(axes, name))
    flat = LatentAxes.of(generator_of(lambda z: sources_of(z)[:, :1] @ mixing()[:1]), 100)
    assert flat.directions.shape == (W_DIM, 1)
    assert flat.skewness.item() == pytest.approx(2, abs=0.2)


def test_the_same_axes_every_time(axes):
    """Bit by bit, whatever torch's own random numbers are, which are left as they were."""
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = LatentAxes.of(mixed(), Z_DIM)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("mean", "directions", "readout", "typical", "skewness"):
        assert torch.equal(getattr(again, name), getattr(axes, name))


def test_axes_of_a_real_generator():
    """Its own w, the first row of it, without truncation."""
    generator = tiny_generator()
    axes = LatentAxes.of(generator, 6)
    ws = generator.mapping(latents(range(FIRST_SEED, FIRST_SEED + SAMPLES), 8))
    torch.testing.assert_close(axes.mean, ws[:, 0].mean(dim=0), rtol=0, atol=1e-4)
    y = axes.coordinates(ws[:, 0])
    torch.testing.assert_close(torch.cov(y.T), torch.eye(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.pow(3).mean(dim=0), axes.skewness, rtol=0, atol=1e-2)
    assert not any(getattr(axes, name).requires_grad for name in ("directions", "typical"))


@pytest.mark.parametrize("value", [0.0, 0.3, 5.1, 1e4, float("nan")])
def test_a_mapping_that_says_nothing(value):
    constant = generator_of(lambda z: torch.full((len(z), W_DIM), value))
    with pytest.raises(CheckpointError, match="w is not finite or is the same for every latent"):
        LatentAxes.of(constant, 4)


def test_no_axes_are_refused():
    with pytest.raises(ValueError, match="at least one axis is needed, not 0"):
        LatentAxes.of(tiny_generator(), 0)


# --- modes ---------------------------------------------------------------------------------------


def test_modes_by_hand():
    """Of nine numbers: the shortest five, of which the shortest three."""
    column = torch.tensor([[9.0, 0.0, 5.2, 5.05, 5.3, 5.0, 5.9, 20.0, -4.0]]).T
    by_hand = [(5.0 + 5.05 + 5.2 + 5.3 + 5.9) / 5, (5.0 + 5.05 + 5.2) / 3]
    found = torch.cat([modes(column, at_least=5), modes(column, at_least=3)])
    torch.testing.assert_close(found, torch.tensor(by_hand))
    torch.testing.assert_close(modes(column), column.mean(dim=0))


def test_modes_of_known_samples():
    """A point where half of all lie, the foot of an exponential, the middle of a normal; moved
    and stretched as their sample is."""
    drawn = torch.Generator().manual_seed(0)
    normal = torch.randn(20_000, 10, generator=drawn)
    one_sided = normal.relu()
    assert torch.equal(modes(one_sided), torch.zeros(10))
    torch.testing.assert_close(modes(3 - 2 * one_sided), torch.full((10,), 3.0))
    exponential = -torch.rand(20_000, 10, generator=drawn).log()
    assert (modes(exponential).abs() < 0.2).all()
    found = modes(normal)
    assert (found.abs() < 0.5).all()
    assert abs(found.mean().item()) < 0.15
    torch.testing.assert_close(modes(0.5 * normal - 7), 0.5 * found - 7, rtol=0, atol=1e-3)
    assert not torch.equal(found, modes(normal.roll(1, 1)))  # each column's own
    torch.testing.assert_close(modes(normal.roll(1, 1)), found.roll(1))
