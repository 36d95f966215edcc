"""Steering: what it does to w, and that a generator with it folded in does the same by itself."""

import copy
import dataclasses

import pytest
import torch
from tiny import CONFIG, tiny_generator

from densityrl.finetune.steering import SKEWED, Steering
from densityrl.generator import TriplaneGenerator, latents
from densityrl.generator.axes import LatentAxes

PULLED, PUSHED = [0, 1], [2, 3]  # axes of `axes`


@pytest.fixture(scope="module")
def axes():
    """Of the tiny generator; every axis of it is skewed, so that of two is made small."""
    found = LatentAxes.of(tiny_generator(), 4)
    skewness = torch.tensor([2.0, SKEWED + 0.01, SKEWED - 0.01, 0.0])
    return dataclasses.replace(found, skewness=skewness)


def steered(axes, pull=0.0, push=0.0):
    """Steering with these numbers, one for all axes or one for each."""
    steering = Steering(axes).requires_grad_(False)
    steering.pull.copy_(torch.as_tensor(pull))
    steering.push.copy_(torch.as_tensor(push))
    return steering


def samples(generator, count=6, **truncation):
    return generator.mapping(latents(range(count), generator.z_dim), **truncation)


def with_superresolution():
    """Random weights; its native side is 64, its image has 128."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG,
        superresolution="SuperresolutionHybrid2X",
        decoder_features=32,
        plane_channels=32,
    )
    return TriplaneGenerator(config).eval().requires_grad_(False)


# --- what it does to w ---------------------------------------------------------------------------


def test_nothing_is_moved_at_the_start(axes):
    """Bit for bit: tuning starts from the generator that it was given."""
    generator = tiny_generator()
    ws = samples(generator)
    steering = Steering(axes)
    assert torch.equal(steering(ws), ws)
    steering.fold(generator)
    assert generator.fingerprint() == tiny_generator().fingerprint()


@pytest.mark.parametrize(("pull", "left"), [(1.0, 0.0), (0.25, 0.75)])
def test_a_pull_draws_every_sample_to_the_mode_of_its_axis(axes, pull, left):
    """And changes neither other coordinates nor what no coordinate speaks of."""
    ws = samples(tiny_generator())
    moved = steered(axes, pull=[0.0, pull, 0.0, 0.0])(ws)
    before, after = axes.coordinates(ws), axes.coordinates(moved)
    missing = before[..., 1] - axes.typical[1]
    assert missing.abs().min() > 0.01  # all have something to be moved by
    torch.testing.assert_close(
        after[..., 1] - axes.typical[1], left * missing, rtol=1e-4, atol=1e-5
    )
    others = [0, 2, 3]
    torch.testing.assert_close(after[..., others], before[..., others], rtol=1e-4, atol=1e-5)
    rest = [w - y @ axes.directions.T for w, y in ((ws, before), (moved, after))]
    torch.testing.assert_close(rest[1], rest[0], rtol=1e-4, atol=1e-5)


def test_a_sample_at_the_mode_is_left_alone(axes):
    ws = samples(tiny_generator())
    missing = axes.typical - axes.coordinates(ws)
    typical = ws + missing[..., :1] * axes.directions[:, 0]
    steering = steered(axes, pull=[0.7, 0.0, 0.0, 0.0])
    torch.testing.assert_close(steering(typical), typical, rtol=1e-4, atol=1e-5)
    assert (steering(ws) - ws).norm(dim=-1).min() > 1e-3


def test_skewed_axes_are_pulled_and_the_others_pushed(axes):
    """Each kind in its own way alone, whatever the numbers of the other way are."""
    ws = samples(tiny_generator())
    push = torch.tensor([3.0, -2.0, 0.5, -0.8])
    before, after = (axes.coordinates(w) for w in (ws, steered(axes, 1.0, push)(ws)))
    typical = axes.typical[PULLED].expand_as(after[..., PULLED])
    torch.testing.assert_close(after[..., PULLED], typical, rtol=1e-4, atol=1e-5)
    pushed = before[..., PUSHED] + push[PUSHED]
    torch.testing.assert_close(after[..., PUSHED], pushed, rtol=1e-4, atol=1e-5)


def test_clip_keeps_pulls_between_none_and_whole(axes):
    steering = steered(axes, pull=[-0.2, 1.3, 0.4, 1.0], push=[-7.0, 7.0, 0.0, 1.5])
    steering.clip()
    assert steering.pull.tolist() == pytest.approx([0.0, 1.0, 0.4, 1.0])
    assert steering.push.tolist() == [-7.0, 7.0, 0.0, 1.5]


# --- folded into weights -------------------------------------------------------------------------


@pytest.fixture
def steering(axes):
    return steered(axes, pull=[0.9, 0.4, 0.7, 0.1], push=[1.0, -1.0, 0.8, -1.5])


@pytest.mark.parametrize("truncation", [{}, {"truncation_psi": 0.6, "truncation_cutoff": 3}])
def test_a_folded_generator_steers_itself(steering, truncation):
    plain, folded = tiny_generator(), tiny_generator()
    steering.fold(folded)
    ws = samples(plain, **truncation)
    assert torch.equal(samples(folded, **truncation), ws)
    planes = folded.planes(ws)
    torch.testing.assert_close(planes, plain.planes(steering(ws)), rtol=1e-4, atol=1e-4)
    change = planes - plain.planes(ws)
    assert change.square().mean() > 0.1 * planes.var()


def test_superresolution_is_folded_as_well():
    """It reads w too: without its part the image would be another one, with the same planes."""
    plain, folded, in_part = (with_superresolution() for _ in range(3))
    steering = steered(LatentAxes.of(plain, 3), pull=[0.9, 0.4, 0.7])
    steering.fold(folded)
    in_part.backbone.load_state_dict(folded.backbone.state_dict())
    ws = samples(plain, 1)
    expected, *images = (
        generator.render(w, generator.frontal_camera(), resolution=16)["image"]
        for generator, w in ((plain, steering(ws)), (folded, ws), (in_part, ws))
    )
    torch.testing.assert_close(folded.planes(ws), plain.planes(steering(ws)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images[0], expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    assert (images[1] - expected).abs().max() > 0.1 * expected.std()


def test_folding_changes_affine_layers_alone(steering):
    """Neither mapping nor its mean, so that truncation means what it meant."""
    generator = with_superresolution()
    before = copy.deepcopy(generator.state_dict())
    steering.fold(generator)
    after = generator.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if ".affine." in name}
    for start in ("backbone.synthesis.b4.", "backbone.synthesis.b16.", "superresolution."):
        assert any(name.startswith(start) for name in changed)
    assert {"backbone.mapping.w_avg", "backbone.mapping.fc0.weight"} <= before.keys() - changed


def test_folding_into_half_precision(steering):
    """Weights keep their type, and what they lose is what half precision loses anyway."""
    plain, folded = (tiny_generator().convolutions_to(torch.bfloat16) for _ in range(2))
    steering.fold(folded)
    for name, parameter in folded.backbone.synthesis.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
    ws = samples(plain)
    expected = plain.planes(steering(ws))
    exact = tiny_generator().planes(steering(ws))
    rounding = (expected - exact).square().mean()
    assert (folded.planes(ws) - expected).square().mean() < 9 * rounding
    assert (plain.planes(ws) - expected).square().mean() > 100 * rounding
