"""The inversion network: w found again from slabs, and a score of what was found."""

import math

import pytest
import torch
from tiny import tiny_generator

from densityrl.errors import PreferenceError
from densityrl.reward import InversionNetwork, RewardModel, inversion
from densityrl.volume import SlabSettings, density_slab, ws_of_seeds

SHAPE = (4, 5, 3)
LEVEL, SOFTNESS = 10.0, 60.0
SPREADS = torch.tensor([3.0, 2.0, 1.0, 0.7, 0.5, 0.3])  # of w along its principal axes


def world(count, noise, seed=0):
    """Raw slabs [count, *SHAPE] linear in w once they are squashed, w, and its coordinates.

    Coordinates are standard normal along axes that are the same for every seed.
    """
    fixed = torch.Generator().manual_seed(123)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=fixed))[0]
    rule = torch.randn(6, math.prod(SHAPE), generator=fixed) / 6**0.5
    drawn = torch.Generator().manual_seed(seed)
    coordinates = torch.randn(count, 6, generator=drawn)
    noises = noise * torch.randn(count, math.prod(SHAPE), generator=drawn)
    squashed = (0.15 * coordinates @ rule + 0.1 + noises).clamp(-0.99, 0.99)
    sigma = LEVEL + SOFTNESS * torch.atanh(squashed)
    return sigma.reshape(count, *SHAPE), (coordinates * SPREADS) @ axes.T + 5, coordinates


def network_of(components):
    return InversionNetwork(SHAPE, components, LEVEL, SOFTNESS)


def fitted(sigma, w, components=6):
    """A network and the share of w that it says it explains."""
    network = network_of(components)
    return network, network.fit([sigma], w)


def found(network, sigma):
    """[B, K]: what the network sees of w, by its definition."""
    seen = torch.tanh((sigma - LEVEL) / SOFTNESS) - network.mean
    return torch.einsum("bxyz,kxyz->bk", seen, network.projection)


def random_network(components=2):
    """One whose every weight takes part."""
    torch.manual_seed(0)
    network = network_of(components)
    with torch.no_grad():
        for tensor in (network.mean, network.projection, *network.score.parameters()):
            tensor.normal_()
    return network


# --- the fit -------------------------------------------------------------------------------------


def test_w_is_found_again():
    """New slabs show the coordinates along each principal axis, in order, up to their signs."""
    network, explained = fitted(*world(200, noise=0.01)[:2])
    assert 0.95 < explained <= 1
    sigma, _, coordinates = world(100, noise=0.01, seed=1)
    both = torch.corrcoef(torch.cat([found(network, sigma).T, coordinates.T]))[:6, 6:].abs()
    assert (both.diagonal() > 0.9).all()
    assert torch.equal(both.argmax(dim=1), torch.arange(6))


def ridge_regression(sigma, w, rows):
    """(linear map [points, K] fitted to some rows, squashed slabs, targets), in float64."""
    seen = torch.tanh((sigma.double() - LEVEL) / SOFTNESS).flatten(1)
    seen = seen - seen.mean(dim=0)
    centred = w.double() - w.double().mean(dim=0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    target = centred @ axes.T / sizes * len(w) ** 0.5
    ridge = inversion.RIDGE * seen.square().sum(dim=1).mean()
    normal = seen[rows].T @ seen[rows] + ridge * torch.eye(seen.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, seen[rows].T @ target[rows]), seen, target


def test_the_fit_by_hand():
    """By the normal equations over points, where the network solves for weights of slabs."""
    sigma, w, _ = world(100, noise=0.2)
    network, explained = fitted(sigma, w)
    regression, seen, _ = ridge_regression(sigma, w, torch.arange(100))
    regression = regression / (seen @ regression).std(dim=0)
    ours = network.projection.flatten(1).T.double()
    signs = (ours * regression).sum(dim=0).sign()  # an axis and its opposite are the same
    torch.testing.assert_close(ours * signs, regression, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found(network, sigma).std(dim=0), torch.ones(6))

    left_out = torch.arange(100) % 5 == 0
    regression, seen, target = ridge_regression(sigma, w, ~left_out)
    wrong = (seen @ regression - target)[left_out].square().sum()
    by_hand = 1 - wrong / target[left_out].square().sum()
    assert explained == pytest.approx(by_hand.item(), abs=1e-4)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_the_explained_share_is_that_of_slabs_never_seen(noise):
    sigma, w, _ = world(150, noise)
    _, explained = fitted(sigma, w)
    everything = torch.arange(2150) < 150  # 2000 new ones
    new_sigma, new_w, _ = world(2000, noise, seed=1)
    regression, seen, target = ridge_regression(
        torch.cat([sigma, new_sigma]), torch.cat([w, new_w]), everything
    )
    wrong = (seen @ regression - target)[150:].square().mean()
    assert 1 - wrong.item() == pytest.approx(explained, abs=0.1)


def test_slabs_that_say_nothing():
    """As many free numbers as slabs: a fit explains what it has seen, and nothing else."""
    sigma, _, _ = world(60, noise=0.3)
    _, unrelated, _ = world(60, noise=0.3, seed=2)
    _, explained = fitted(sigma, unrelated)
    assert explained < 0.15


def test_fewer_components_are_the_widest_ones():
    sigma, w, _ = world(200, noise=0.01)
    narrow, whole = fitted(sigma, w, components=2)[0], fitted(sigma, w)[0]
    assert narrow.projection.shape == (2, *SHAPE)
    torch.testing.assert_close(narrow.projection, whole.projection[:2], rtol=1e-3, atol=1e-4)
    assert narrow.mean.shape == SHAPE
    torch.testing.assert_close(narrow.mean, torch.tanh((sigma - LEVEL) / SOFTNESS).mean(dim=0))


def test_parts_are_one_whole():
    sigma, w, _ = world(50, noise=0.1)
    network, explained = fitted(sigma, w)
    in_parts = network_of(6)
    assert in_parts.fit(sigma.split(16), w) == pytest.approx(explained, abs=1e-4)
    torch.testing.assert_close(in_parts.projection, network.projection, rtol=1e-3, atol=1e-5)


def test_too_many_numbers_are_refused(monkeypatch):
    sigma, w, _ = world(50, noise=0.1)
    monkeypatch.setattr(inversion, "LARGEST", 50 * 60)
    fitted(sigma, w)
    monkeypatch.setattr(inversion, "LARGEST", 50 * 60 - 1)
    with pytest.raises(PreferenceError) as refusal:
        fitted(sigma, w)
    assert str(refusal.value) == (
        "50 slabs of 60 points are too many for the inversion network: lower --resolution or "
        "--inversion-slabs, or take --network conv"
    )


# --- the score -----------------------------------------------------------------------------------


def test_squash_by_hand():
    squashed = network_of(2).squash(torch.tensor([10.0, 70.0, -20.0, -1e9, 1e9]))
    by_hand = [0.0, math.tanh(1), math.tanh(-0.5), -1.0, 1.0]
    torch.testing.assert_close(squashed, torch.tensor(by_hand))
    other = InversionNetwork(SHAPE, 2, level=2.0, softness=4.0)
    assert other.squash(torch.tensor(4.0)).item() == pytest.approx(math.tanh(0.5))


def test_score_by_hand():
    network = random_network()
    sigma, _, _ = world(3, noise=0.1)
    by_hand = []
    for slab in sigma.double():
        total = network.score.bias.double()[0]
        for weight, direction in zip(network.score.weight[0], network.projection, strict=True):
            seen = torch.tanh((slab - LEVEL) / SOFTNESS) - network.mean.double()
            total = total + weight.double() * (seen * direction.double()).sum()
        by_hand.append(total)
    torch.testing.assert_close(network(sigma), torch.stack(by_hand).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(sigma), network.score(found(network, sigma))[:, 0])


def test_before_training_every_slab_scores_nothing():
    network, _ = fitted(*world(50, noise=0.1)[:2])
    assert torch.equal(network(world(4, noise=0.1, seed=1)[0]), torch.zeros(4))


def test_scores_do_not_depend_on_their_neighbours():
    network = random_network()
    slabs = world(3, noise=0.1)[0]
    alone = torch.cat([network(slab[None]) for slab in slabs])
    torch.testing.assert_close(network(slabs), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(slabs.flip(0)), alone.flip(0), rtol=1e-5, atol=1e-5)


def test_the_gradient_reaches_the_density():
    """By hand at the level, where the squashing is 1 / softness steep; elsewhere by differences."""
    network = random_network().double()
    sigma = torch.full((1, *SHAPE), LEVEL, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(sigma).sum(), sigma)
    by_hand = torch.einsum("k,kxyz->xyz", network.score.weight[0], network.projection) / SOFTNESS
    torch.testing.assert_close(gradient[0], by_hand)
    elsewhere = world(2, noise=0.1)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(network, elsewhere)


# --- with a generator ----------------------------------------------------------------------------


def test_a_generators_own_w_is_found_in_its_slabs():
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    seeds = range(150)
    sigma = density_slab(generator, seeds, settings)
    w = ws_of_seeds(generator, seeds, settings)[:, 0]
    assert InversionNetwork(sigma.shape[1:], 4).fit([sigma], w) > 0.3
    assert InversionNetwork(sigma.shape[1:], 4).fit([sigma], w.roll(1, 0)) < 0.1


def test_saving_and_loading(tmp_path):
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    sigma = density_slab(generator, range(20), settings)
    network = InversionNetwork(sigma.shape[1:], 3, level=6.0, softness=9.0)
    network.fit([sigma], ws_of_seeds(generator, range(20), settings)[:, 0])
    with torch.no_grad():
        network.score.weight.normal_()
        network.score.bias.fill_(0.25)
    RewardModel(network.requires_grad_(False), settings, 1.0).save(tmp_path)
    copy = RewardModel.load(tmp_path)
    assert isinstance(copy.network, InversionNetwork)
    assert copy.network.describe() == {
        "shape": [8, 9, 9],
        "components": 3,
        "level": 6.0,
        "softness": 9.0,
    }
    assert torch.equal(copy.score_slab(sigma), network(sigma))
    assert not any(p.requires_grad for p in copy.network.parameters())
    planes = generator.planes(ws_of_seeds(generator, [3], settings))
    torch.testing.assert_close(copy.score_planes(generator, planes), network(sigma[3:4]))
