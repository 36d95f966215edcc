"""The inversion network: coordinates of w found again from slabs, and a score of what was found."""

import math

import pytest
import torch
from tiny import tiny_generator

from densityrl.errors import PreferenceError
from densityrl.generator.axes import LatentAxes
from densityrl.reward import InversionNetwork, RewardModel, inversion
from densityrl.volume import SlabSettings, density_slab, ws_of_seeds

SHAPE = (4, 5, 3)
LEVEL, SOFTNESS = 10.0, 60.0


def world(count, noise, seed=0, shows=(1.0,) * 6):
    """Raw slabs [count, *SHAPE] linear in six standard normal coordinates once they are squashed,
    and these coordinates.

    The rule is the same for every seed; `shows` says how strongly each coordinate takes part.
    """
    fixed = torch.Generator().manual_seed(123)
    rule = torch.randn(6, math.prod(SHAPE), generator=fixed) / 6**0.5
    drawn = torch.Generator().manual_seed(seed)
    coordinates = torch.randn(count, 6, generator=drawn)
    noises = noise * torch.randn(count, math.prod(SHAPE), generator=drawn)
    shown = coordinates * torch.tensor(shows)
    squashed = (0.15 * shown @ rule + 0.1 + noises).clamp(-0.99, 0.99)
    sigma = LEVEL + SOFTNESS * torch.atanh(squashed)
    return sigma.reshape(count, *SHAPE), coordinates


def network_of(components):
    return InversionNetwork(SHAPE, components, LEVEL, SOFTNESS)


def fitted(sigma, coordinates, components=6):
    """A network and the share of the coordinates that it says it explains."""
    network = network_of(components)
    assert network.fit([sigma], coordinates) is None
    return network, network.explained.item()


def found(network, sigma):
    """[B, K]: what the network sees of the coordinates, by its definition."""
    seen = torch.tanh((sigma - LEVEL) / SOFTNESS) - network.mean
    return torch.einsum("bxyz,kxyz->bk", seen, network.projection)


def random_network(components=3):
    """One whose every weight takes part."""
    torch.manual_seed(0)
    network = network_of(components)
    with torch.no_grad():
        for tensor in (*network.buffers(), *network.parameters()):
            tensor.normal_()
    return network


# --- the fit -------------------------------------------------------------------------------------


def test_coordinates_are_found_again():
    """New slabs show each coordinate, in order and with its sign."""
    network, explained = fitted(*world(200, noise=0.01))
    assert 0.95 < explained <= 1
    sigma, coordinates = world(100, noise=0.01, seed=1)
    both = torch.corrcoef(torch.cat([found(network, sigma).T, coordinates.T]))[:6, 6:]
    assert (both.diagonal() > 0.9).all()
    assert torch.equal(both.argmax(dim=1), torch.arange(6))


def ridge_regression(sigma, coordinates, rows):
    """(linear map [points, K] fitted to some rows, squashed slabs, targets), in float64."""
    seen = torch.tanh((sigma.double() - LEVEL) / SOFTNESS).flatten(1)
    seen = seen - seen.mean(dim=0)
    target = coordinates.double() - coordinates.double().mean(dim=0)
    ridge = inversion.RIDGE * seen.square().sum(dim=1).mean()
    normal = seen[rows].T @ seen[rows] + ridge * torch.eye(seen.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, seen[rows].T @ target[rows]), seen, target


def test_the_fit_by_hand():
    """By the normal equations over points, where the network solves for weights of slabs."""
    sigma, coordinates = world(100, noise=0.2)
    network, explained = fitted(sigma, coordinates)
    regression, seen, _ = ridge_regression(sigma, coordinates, torch.arange(100))
    by_hand = regression / (seen @ regression).std(dim=0).mean()
    ours = network.projection.flatten(1).T.double()
    torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.find(sigma), found(network, sigma))
    torch.testing.assert_close(network.mean, torch.tanh((sigma - LEVEL) / SOFTNESS).mean(dim=0))

    left_out = torch.arange(100) % 5 == 0
    regression, seen, target = ridge_regression(sigma, coordinates, ~left_out)
    wrong = (seen @ regression - target)[left_out].square().sum()
    by_hand = 1 - wrong / target[left_out].square().sum()
    assert explained == pytest.approx(by_hand.item(), abs=1e-4)


def test_what_hardly_shows_is_found_small():
    """Sizes fall with what shows of a coordinate, and are 1 on average."""
    sigma, coordinates = world(300, noise=0.03, shows=(1.0, 1.0, 0.3, 0.1, 0.0, 0.0))
    network, _ = fitted(sigma, coordinates)
    sizes = network.find(sigma).std(dim=0)
    assert sizes.mean().item() == pytest.approx(1, abs=1e-4)
    assert sizes[:2].min() > 1.05 * sizes[2]
    assert sizes[2] > 1.5 * sizes[3]
    assert sizes[3] > 1.5 * sizes[4:].max()


def test_coordinates_have_no_origin_and_no_unit():
    sigma, coordinates = world(100, noise=0.1)
    network, explained = fitted(sigma, coordinates)
    other, same = fitted(sigma, 7 * coordinates - 30)
    assert same == pytest.approx(explained, abs=1e-4)
    torch.testing.assert_close(other.projection, network.projection, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
def test_the_explained_share_is_that_of_slabs_never_seen(noise):
    _, explained = fitted(*world(150, noise))
    parts = zip(world(150, noise), world(2000, noise, seed=1), strict=True)
    sigma, coordinates = (torch.cat(part) for part in parts)
    regression, seen, target = ridge_regression(sigma, coordinates, torch.arange(150))
    wrong = (seen @ regression - target)[150:].square().mean()
    assert 1 - wrong.item() == pytest.approx(explained, abs=0.1)


def test_slabs_that_say_nothing():
    """As many free numbers as slabs: a fit explains what it has seen, and nothing else."""
    sigma, _ = world(60, noise=0.3)
    _, unrelated = world(60, noise=0.3, seed=2)
    _, explained = fitted(sigma, unrelated)
    assert explained < 0.15


def test_coordinates_are_fitted_each_by_itself():
    """But for the one factor that all have in common."""
    sigma, coordinates = world(200, noise=0.1)
    network, _ = fitted(sigma, coordinates)
    narrow, _ = fitted(sigma, coordinates[:, :2], components=2)
    assert narrow.projection.shape == (2, *SHAPE)
    factor = narrow.projection.norm() / network.projection[:2].norm()
    torch.testing.assert_close(
        narrow.projection, factor * network.projection[:2], rtol=1e-3, atol=1e-4
    )


def test_fewer_coordinates_than_components():
    """A w that varies in few directions has fewer axes: the others are found to be 0."""
    sigma, coordinates = world(100, noise=0.1)
    network, _ = fitted(sigma, coordinates)  # whose other rows a second fit must clear
    network.fit([sigma], coordinates[:, :4])
    narrow, _ = fitted(sigma, coordinates[:, :4], components=4)
    assert torch.equal(network.projection[:4], narrow.projection)
    assert (network.projection[4:] == 0).all()
    assert torch.equal(network.explained, narrow.explained)
    assert network.find(sigma).shape == (100, 6)


def test_parts_are_one_whole():
    sigma, coordinates = world(50, noise=0.1)
    network, explained = fitted(sigma, coordinates)
    in_parts = network_of(6)
    in_parts.fit(sigma.split(16), coordinates)
    assert in_parts.explained.item() == pytest.approx(explained, abs=1e-4)
    torch.testing.assert_close(in_parts.projection, network.projection, rtol=1e-3, atol=1e-5)


def test_too_many_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(inversion, "LARGEST", 50 * 60)
    inversion.check_size(50, 60, 49)
    monkeypatch.setattr(inversion, "LARGEST", 50 * 60 - 1)
    with pytest.raises(PreferenceError) as refusal:
        inversion.check_size(50, 60, 49)
    assert str(refusal.value) == (
        "50 slabs of 60 points are too many for the inversion network: lower --resolution or "
        "--inversion-slabs, or take --preset conv"
    )


def test_too_few_slabs_are_refused():
    inversion.check_size(7, 60, 6)
    with pytest.raises(PreferenceError) as refusal:
        inversion.check_size(6, 60, 6)
    assert str(refusal.value) == (
        "6 slabs are too few to find 6 coordinates of w: raise --inversion-slabs, or take "
        "--preset conv"
    )


@pytest.mark.parametrize("value", [LEVEL, -13.37, 1e9])
def test_slabs_that_are_all_alike_are_refused(value):
    _, coordinates = world(30, noise=0.1)
    with pytest.raises(PreferenceError, match="all slabs are alike"):
        network_of(6).fit([torch.full((30, *SHAPE), value)], coordinates)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_latents_that_are_all_alike_are_refused(value):
    """Though the mean of equal numbers may differ from them in the last bit."""
    sigma, coordinates = world(30, noise=0.1)
    with pytest.raises(PreferenceError, match="all slabs are alike"):
        network_of(6).fit([sigma], torch.full_like(coordinates, value))


# --- the score -----------------------------------------------------------------------------------


def test_squash_by_hand():
    squashed = network_of(2).squash(torch.tensor([10.0, 70.0, -20.0, -1e9, 1e9]))
    by_hand = [0.0, math.tanh(1), math.tanh(-0.5), -1.0, 1.0]
    torch.testing.assert_close(squashed, torch.tensor(by_hand))
    other = InversionNetwork(SHAPE, 2, level=2.0, softness=4.0)
    assert other.squash(torch.tensor(4.0)).item() == pytest.approx(math.tanh(0.5))


def test_score_by_hand():
    """bias + sum of weight * what is found of a coordinate."""
    network = random_network()
    sigma, _ = world(3, noise=0.1)
    weights = network.score.weight[0].tolist()
    by_hand = [
        network.score.bias.item() + sum(w * y for w, y in zip(weights, row, strict=True))
        for row in found(network, sigma).tolist()
    ]
    assert max(by_hand) - min(by_hand) > 0.1
    torch.testing.assert_close(network(sigma), torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_before_training_every_slab_scores_nothing():
    network, _ = fitted(*world(50, noise=0.1))
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
    weights = network.score.weight[0].detach()
    by_hand = torch.einsum("k,kxyz->xyz", weights, network.projection) / SOFTNESS
    torch.testing.assert_close(gradient[0], by_hand)
    elsewhere = world(2, noise=0.1)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(network, elsewhere)


# --- with a generator ----------------------------------------------------------------------------


def test_a_generators_own_w_is_found_in_its_slabs():
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    seeds = range(150)
    sigma = density_slab(generator, seeds, settings)
    w = ws_of_seeds(generator, seeds, settings)[:, 0]
    coordinates = LatentAxes.of(generator, 4).coordinates(w)
    network = InversionNetwork(sigma.shape[1:], 4)
    network.fit([sigma], coordinates)
    assert network.explained > 0.3
    network.fit([sigma], coordinates.roll(1, 0))
    assert network.explained < 0.1


def test_saving_and_loading(tmp_path):
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    sigma = density_slab(generator, range(20), settings)
    network = InversionNetwork(sigma.shape[1:], 3, level=6.0, softness=9.0)
    network.fit([sigma], ws_of_seeds(generator, range(20), settings)[:, 0, :3])
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
    for name, tensor in network.state_dict().items():
        assert torch.equal(copy.network.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in copy.network.parameters())
    planes = generator.planes(ws_of_seeds(generator, [3], settings))
    torch.testing.assert_close(copy.score_planes(generator, planes), network(sigma[3:4]))
