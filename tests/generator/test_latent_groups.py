"""Latent numbers that have names, and heads without their faults."""

import dataclasses
import json

import pytest
import torch
from tiny import CONFIG, tiny_generator

from densityrl.generator import (
    GeneratorConfig,
    TriplaneGenerator,
    latents,
    load_generator,
    save_generator,
)

GROUPS = {"identity": (0, 4), "faults": (4, 6), "spare": (6, 8)}
GROUPED = dataclasses.replace(CONFIG, latent_groups=GROUPS, millimetres=300.0)


def grouped_generator():
    return TriplaneGenerator(GROUPED).eval().requires_grad_(False)


def test_a_clean_twin_keeps_everything_but_the_faults():
    z = latents(range(50), 8)
    before = z.clone()
    clean = grouped_generator().without_faults(z)
    assert torch.equal(z, before)
    assert torch.equal(clean[:, :4], z[:, :4])
    assert (clean[:, 4:6] == 0).all()
    torch.testing.assert_close(clean.norm(dim=1), z.norm(dim=1), rtol=1e-6, atol=0)
    # The spare numbers keep their direction.
    torch.testing.assert_close(
        clean[:, 6:] / clean[:, 6:].norm(dim=1, keepdim=True),
        z[:, 6:] / z[:, 6:].norm(dim=1, keepdim=True),
    )


def test_a_clean_twin_by_hand():
    z = torch.tensor([[1.0, 1, 1, 1, 4, 0, 0, 3], [1, 1, 1, 1, 3, 4, 0, 0]])
    clean = grouped_generator().without_faults(z)
    half = 5 / 2**0.5  # two spare numbers of 0 share the length of the faults
    expected = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 5], [1, 1, 1, 1, 0, 0, half, half]])
    torch.testing.assert_close(clean, expected)


def test_a_head_without_faults_is_its_own_twin():
    z = latents([1, 2], 8)
    z[:, 4:6] = 0
    assert torch.equal(grouped_generator().without_faults(z), z)


def test_no_twin_without_groups():
    with pytest.raises(ValueError, match="no latent groups named faults and spare"):
        tiny_generator().without_faults(latents([1], 8))
    with pytest.raises(ValueError, match=r"z must be \[B, 8\]"):
        grouped_generator().without_faults(torch.zeros(1, 7))


def test_groups_and_size_come_back(tmp_path):
    save_generator(grouped_generator(), tmp_path)
    assert load_generator(tmp_path).config == GROUPED


def test_files_without_groups_are_read(tmp_path):
    values = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    del values["latent_groups"], values["millimetres"]
    assert GeneratorConfig.from_json(values) == CONFIG
    assert CONFIG.latent_groups == {}
    assert CONFIG.millimetres is None


@pytest.mark.parametrize("ends", [(-1, 2), (3, 3), (4, 2), (4, 9)], ids=str)
def test_groups_outside_the_latent(ends):
    with pytest.raises(ValueError, match="'faults' must be a range within 0 to 8"):
        dataclasses.replace(CONFIG, latent_groups={"faults": ends})


@pytest.mark.parametrize("millimetres", [0.0, -1.0, float("nan")])
def test_sizes_that_are_none(millimetres):
    with pytest.raises(ValueError, match="millimetres must be a positive length"):
        dataclasses.replace(CONFIG, millimetres=millimetres)
