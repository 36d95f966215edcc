"""The inversion network: w found again from slabs, and a score of what was found."""

import math

import numpy as np
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


def network_of(components, units=3):
    return InversionNetwork(SHAPE, components, units, LEVEL, SOFTNESS)


def fitted(sigma, w, components=6):
    """A network and the share of w that it says it explains."""
    network = network_of(components)
    assert network.fit([sigma], w) is None
    return network, network.explained.item()


def found(network, sigma):
    """[B, K]: what the network sees of w, by its definition."""
    seen = torch.tanh((sigma - LEVEL) / SOFTNESS) - network.mean
    return torch.einsum("bxyz,kxyz->bk", seen, network.projection)


def random_network(components=2):
    """One whose every weight takes part."""
    torch.manual_seed(0)
    network = network_of(components)
    with torch.no_grad():
        for tensor in (*network.buffers(), *network.parameters()):
            tensor.normal_()
        network.projection.mul_(0.05)  # found components and floors of about the same size
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


def whitened(regression, seen):
    """What it finds, uncorrelated and of variance 1, turned no further than that needs."""
    left, sizes, right = torch.linalg.svd(seen @ regression, full_matrices=False)
    polar = left @ right * (len(seen) - 1) ** 0.5  # the nearest matrix with such columns
    turned = right.T @ torch.diag((len(seen) - 1) ** 0.5 / sizes) @ right
    torch.testing.assert_close(seen @ regression @ turned, polar)
    return regression @ turned


def assert_same_map(network, regression):
    """Up to signs: an axis of w and its opposite are the same."""
    ours = network.projection.flatten(1).T.double()
    signs = (ours * regression).sum(dim=0).sign()
    torch.testing.assert_close(ours * signs, regression, rtol=1e-3, atol=1e-4)


def test_the_fit_by_hand():
    """By the normal equations over points, where the network solves for weights of slabs."""
    sigma, w, _ = world(100, noise=0.2)
    network, explained = fitted(sigma, w)
    regression, seen, _ = ridge_regression(sigma, w, torch.arange(100))
    assert_same_map(network, whitened(regression, seen))
    torch.testing.assert_close(network.find(sigma), found(network, sigma))
    torch.testing.assert_close(torch.cov(network.find(sigma).T), torch.eye(6), rtol=0, atol=1e-3)

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
    narrow, _ = fitted(sigma, w, components=2)
    assert narrow.projection.shape == (2, *SHAPE)
    regression, seen, _ = ridge_regression(sigma, w, torch.arange(200))
    assert_same_map(narrow, whitened(regression[:, :2], seen))
    assert narrow.mean.shape == SHAPE
    torch.testing.assert_close(narrow.mean, torch.tanh((sigma - LEVEL) / SOFTNESS).mean(dim=0))


def test_parts_are_one_whole():
    sigma, w, _ = world(50, noise=0.1)
    network, explained = fitted(sigma, w)
    in_parts = network_of(6)
    in_parts.fit(sigma.split(16), w)
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
        "6 slabs are too few to find 6 components of w: raise --inversion-slabs, or take "
        "--preset conv"
    )


@pytest.mark.parametrize("value", [LEVEL, -13.37, 1e9])
def test_slabs_that_are_all_alike_are_refused(value):
    _, w, _ = world(30, noise=0.1)
    with pytest.raises(PreferenceError, match="all slabs are alike"):
        network_of(4).fit([torch.full((30, *SHAPE), value)], w)


def test_latents_that_are_all_alike_are_refused():
    sigma, w, _ = world(30, noise=0.1)
    with pytest.raises(PreferenceError, match="all slabs are alike"):
        network_of(4).fit([sigma], torch.zeros_like(w))


# --- the units -----------------------------------------------------------------------------------


def mixture(count=20_000):
    """(found [N, 8], mixing matrix, winners, losers) of a made population.

    Parts are independent, of variance 1. Faults: the first has its tail to the right, the second
    to the left, and heads in either tail lose. The third is one-sided as well, but liked; nobody
    minds the fourth; the others are symmetric, of which one is disliked to one side.
    """
    drawn = torch.Generator().manual_seed(5)
    parts = torch.randn(count, 8, generator=drawn)
    parts[:, :4] = -torch.rand(count, 4, generator=drawn).log() - 1
    parts[:, 1] *= -1
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=drawn))[0]
    found = parts @ mixing.T
    score = parts @ torch.tensor([-1.0, 0.6, 0.5, 0.0, -0.7, 0.0, 0.0, 0.0])
    left, right = torch.randint(count, (2, 4000), generator=drawn)
    better = (score[left] > score[right])[:, None]
    winners = torch.where(better, found[left], found[right])
    losers = torch.where(better, found[right], found[left])
    return found, mixing, winners, losers


def bent(units=2):
    found, mixing, winners, losers = mixture()
    network = InversionNetwork(SHAPE, 8, units)
    network.bend(found, winners, losers)
    return network, found, mixing


def test_one_sided_faults_are_the_axes():
    """Up to their order, and pointing to where the fault is."""
    network, found, mixing = bent()
    faults = mixing[:, :2] * torch.tensor([1.0, -1.0])
    cosines = network.axes.T @ faults
    assert network.axes.shape == (8, 2)
    order = cosines.argmax(dim=1)
    assert sorted(order.tolist()) == [0, 1]
    assert (cosines.amax(dim=1) > 0.9).all()
    torch.testing.assert_close(network.axes.T @ network.axes, torch.eye(2))
    along = (found @ network.axes).numpy()
    assert (np.mean(along**3, axis=0) > 1).all()
    np.testing.assert_allclose(network.floors, np.quantile(along, 0.25, axis=0), rtol=1e-4)
    # The lower quartile of an exponential's draws less 1.
    np.testing.assert_allclose(network.floors, -math.log(0.75) - 1, atol=0.1)


def test_more_units_keep_the_first_faults():
    """As many as there are components: every axis is there once, the strongest ones last."""
    few, *_ = bent(2)
    many, *_ = bent(8)
    torch.testing.assert_close(many.axes.T @ many.axes, torch.eye(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(many.axes[:, -2:], few.axes)
    torch.testing.assert_close(many.floors[-2:], few.floors)


def test_axes_by_hand():
    """The slice of third moments, in loops, for few heads."""
    drawn = torch.Generator().manual_seed(1)
    found = torch.rand(40, 3, generator=drawn).double() ** 3
    found = found - found.mean(dim=0)
    winners, losers = found[:10] - 0.2, found[10:20]
    direction = (winners - losers).mean(dim=0)
    direction = direction / direction.square().sum().sqrt()
    slice_ = torch.zeros(3, 3, dtype=torch.float64)
    for head in found:
        slice_ -= (head @ direction) * torch.outer(head, head) / 40
    network = InversionNetwork(SHAPE, 3, 1).double()
    network.bend(found, winners, losers)
    axis = network.axes[:, 0]
    strongest = torch.linalg.eigvalsh(slice_)[-1]
    torch.testing.assert_close(slice_ @ axis, strongest * axis)
    assert (found @ axis).pow(3).sum() > 0


def slab_of(network, found):
    """A slab in which a network, made for it, finds these components."""
    return network.level + network.softness * torch.atanh(found / 20)[:, :, None, None]


def test_a_fault_that_is_not_there_pulls_at_nothing():
    """Below a unit's floor the score is flat along its axis; in the tail it is not."""
    axes, floors = bent()[0].axes, bent()[0].floors
    network = InversionNetwork((8, 1, 1), 8, 2)
    network.projection.copy_(20 * torch.eye(8).reshape(8, 8, 1, 1))
    network.axes.copy_(axes)
    network.floors.copy_(floors)
    with torch.no_grad():
        network.score.weight[0, 8:] = torch.tensor([-1.0, -1.0])
    for unit in range(2):
        pull = []
        for above in (-1.5, 0.0, 2.5):
            # The other unit's fault is not there.
            along = floors - 3 + torch.nn.functional.one_hot(torch.tensor(unit), 2) * (3 + above)
            found = (axes @ along)[None].requires_grad_()
            torch.testing.assert_close(network.find(slab_of(network, found)), found)
            (gradient,) = torch.autograd.grad(network(slab_of(network, found)).sum(), found)
            pull.append((gradient[0] @ axes[:, unit]).item())
        assert -0.01 < pull[0] <= 0
        assert pull[1] == pytest.approx(-0.5, abs=1e-3)
        assert pull[2] == pytest.approx(-1, abs=1e-3)


# --- the score -----------------------------------------------------------------------------------


def test_squash_by_hand():
    squashed = network_of(2).squash(torch.tensor([10.0, 70.0, -20.0, -1e9, 1e9]))
    by_hand = [0.0, math.tanh(1), math.tanh(-0.5), -1.0, 1.0]
    torch.testing.assert_close(squashed, torch.tensor(by_hand))
    other = InversionNetwork(SHAPE, 2, level=2.0, softness=4.0)
    assert other.squash(torch.tensor(4.0)).item() == pytest.approx(math.tanh(0.5))


def test_score_by_hand():
    """bias + sum of weight * component / 2 + sum of weight * softplus(4 (y - floor)) / 4."""
    network = random_network()
    sigma, _, _ = world(3, noise=0.1)
    weights = network.score.weight[0].tolist()
    assert len(weights) == 2 + 3
    by_hand, bends = [], []
    for components in found(network, sigma).tolist():
        total = network.score.bias.item()
        for weight, component in zip(weights[:2], components, strict=True):
            total += weight * component / 2
        for unit, weight in enumerate(weights[2:]):
            y = sum(c * network.axes[k, unit].item() for k, c in enumerate(components))
            above = 4 * (y - network.floors[unit].item())
            bends.append(above)
            total += weight * math.log1p(math.exp(above)) / 4
        by_hand.append(total)
    assert min(abs(above) for above in bends) < 3  # the bend itself is seen, not its ends alone
    torch.testing.assert_close(network(sigma), torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_before_training_every_slab_scores_nothing():
    network, _ = fitted(*world(50, noise=0.1)[:2])
    seen = network.find(world(50, noise=0.1)[0])
    network.bend(seen, seen[:9], seen[9:18])
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
    components = found(network, sigma.detach())[0]
    weights = network.score.weight[0].detach()
    open_ = torch.sigmoid(4 * (components @ network.axes - network.floors))
    of_components = weights[:2] / 2 + network.axes @ (weights[2:] * open_)
    by_hand = torch.einsum("k,kxyz->xyz", of_components, network.projection) / SOFTNESS
    torch.testing.assert_close(gradient[0], by_hand)
    elsewhere = world(2, noise=0.1)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(network, elsewhere)


# --- with a generator ----------------------------------------------------------------------------


def test_a_generators_own_w_is_found_in_its_slabs():
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    seeds = range(150)
    sigma = density_slab(generator, seeds, settings)
    w = ws_of_seeds(generator, seeds, settings)[:, 0]
    network = InversionNetwork(sigma.shape[1:], 4)
    network.fit([sigma], w)
    assert network.explained > 0.3
    network.fit([sigma], w.roll(1, 0))
    assert network.explained < 0.1


def test_saving_and_loading(tmp_path):
    generator, settings = tiny_generator(), SlabSettings(resolution=16)
    sigma = density_slab(generator, range(20), settings)
    network = InversionNetwork(sigma.shape[1:], 3, units=2, level=6.0, softness=9.0)
    network.fit([sigma], ws_of_seeds(generator, range(20), settings)[:, 0])
    seen = network.find(sigma)
    network.bend(seen, seen[:10], seen[10:])
    with torch.no_grad():
        network.score.weight.normal_()
        network.score.bias.fill_(0.25)
    RewardModel(network.requires_grad_(False), settings, 1.0).save(tmp_path)
    copy = RewardModel.load(tmp_path)
    assert isinstance(copy.network, InversionNetwork)
    assert copy.network.describe() == {
        "shape": [8, 9, 9],
        "components": 3,
        "units": 2,
        "level": 6.0,
        "softness": 9.0,
    }
    assert torch.equal(copy.score_slab(sigma), network(sigma))
    for name, tensor in network.state_dict().items():
        assert torch.equal(copy.network.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in copy.network.parameters())
    planes = generator.planes(ws_of_seeds(generator, [3], settings))
    torch.testing.assert_close(copy.score_planes(generator, planes), network(sigma[3:4]))
