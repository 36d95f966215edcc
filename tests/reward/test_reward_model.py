"""The reward: its network, losses, and the file that carries slab and normalisation along."""

import json
import math

import pytest
import torch
from tiny import tiny_generator, tiny_reward

from densityrl.errors import CheckpointError
from densityrl.reward import ConvNetwork, RewardModel
from densityrl.reward.losses import (
    choice_probability,
    margin_loss,
    preference_loss,
    reward_size_loss,
)
from densityrl.volume import SlabSettings, density_slab, normalize_slab, slab_of_planes

SETTINGS = SlabSettings(resolution=16, truncation_psi=0.7)


def make_model(**values):
    return tiny_reward(SETTINGS, **values)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 7), (32, 35, 32), (8, 40, 3)])
def test_a_slab_of_any_size_gets_one_score(shape):
    network = ConvNetwork()
    scores = network(torch.rand(2, *shape) * 100)
    assert scores.shape == (2,)
    assert scores.isfinite().all()


def test_scores_do_not_depend_on_their_neighbours():
    network = ConvNetwork((8, 8)).eval()
    slabs = torch.rand(3, 12, 12, 12) * 100
    torch.testing.assert_close(network(slabs)[1:2], network(slabs[1:2]), rtol=1e-5, atol=1e-6)


def test_the_score_knows_where_mass_is():
    """The same mass in front and behind: without coordinates a mean could not tell them apart."""
    torch.manual_seed(0)
    network = ConvNetwork((8, 8))
    slab = torch.zeros(1, 16, 16, 16)
    slab[..., 11:14] = 100.0
    assert abs((network(slab) - network(slab.flip(3))).item()) > 1e-4


def test_densities_are_read_by_their_own_extremes():
    """Normalisation happens inside: density in another unit and from another zero scores alike."""
    network = ConvNetwork((8, 8)).eval()
    slabs = torch.rand(2, 12, 12, 12) * 100
    scores = network(slabs)
    torch.testing.assert_close(network(normalize_slab(slabs)), scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(slabs * 7 - 300), scores, rtol=1e-3, atol=1e-4)
    other_range = ConvNetwork((8, 8), (-1.0, 1.0)).eval()
    other_range.load_state_dict(network.state_dict())
    torch.testing.assert_close(other_range(slabs), scores, rtol=1e-4, atol=1e-5)


def test_losses_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert preference_loss(chosen, rejected).item() == pytest.approx(by_hand)
    assert reward_size_loss(chosen, rejected).item() == pytest.approx((1 + 0 + 0 + 4) / 4)
    far = preference_loss(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert far.item() == pytest.approx(2e4)


def test_losses_with_mistakes_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    chances = [0.2 + 0.6 / (1 + math.exp(-margin)) for margin in (1, -2)]
    torch.testing.assert_close(choice_probability(chosen - rejected, 0.2), torch.tensor(chances))
    by_hand = -(math.log(chances[0]) + math.log(chances[1])) / 2
    assert preference_loss(chosen, rejected, 0.2).item() == pytest.approx(by_hand)


def test_a_wrong_answer_asks_only_so_much_where_mistakes_are_reckoned_with():
    """Without, the pull of a pair grows to 1 with how wrong it looks; with, it falls again."""
    pulls = {}
    for mistakes in (0.0, 0.1):
        margins = torch.tensor([-1.0, -10.0], requires_grad=True)
        for margin in margins:
            margin_loss(margin, mistakes).backward()
        pulls[mistakes] = (-margins.grad).tolist()
    assert pulls[0.0] == pytest.approx([0.7311, 0.99995], abs=1e-4)
    assert pulls[0.1][1] < 0.001 < 0.4 < pulls[0.1][0]


def test_scores_of_planes_and_slabs_agree():
    generator, model = tiny_generator(), make_model()
    planes = generator.planes(
        generator.mapping(torch.randn(2, 8), truncation_psi=0.7, truncation_cutoff=14)
    )
    sigma = slab_of_planes(generator, planes, SETTINGS)
    torch.testing.assert_close(model.score_planes(generator, planes), model.score_slab(sigma))
    torch.testing.assert_close(model.score_slab(sigma), model.network(sigma))


def test_saving_and_loading(tmp_path):
    model = make_model()
    model.network.value_range = (0.0, 50.0)
    with torch.no_grad():
        model.network.score.bias += 0.5
    model.save(tmp_path, {"from": "a test"})
    copy = RewardModel.load(tmp_path)
    assert (copy.settings, copy.box_side) == (SETTINGS, 1.0)
    assert (copy.network.widths, copy.network.value_range) == ((8, 8), (0.0, 50.0))
    sigma = density_slab(tiny_generator(), [0, 1], copy.settings)
    assert torch.equal(copy.score_slab(sigma), model.score_slab(sigma))
    assert not torch.equal(make_model().score_slab(sigma), model.score_slab(sigma))
    assert json.loads((tmp_path / "reward.json").read_text())["provenance"] == {"from": "a test"}


def test_the_readable_description_is_not_what_counts(tmp_path):
    """Somebody edits reward.json: the weights still know what they were trained on."""
    make_model().save(tmp_path)
    (tmp_path / "reward.json").write_text("{}")
    assert RewardModel.load(tmp_path).settings == SETTINGS


def test_other_slabs_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"reads slabs of \(8, 9, 9\), not \(16, 16, 16\)"):
        model.score_slab(torch.zeros(1, 16, 16, 16))
    with pytest.raises(CheckpointError, match=r"box of side 2\.0, the generator's is 1\.0"):
        make_model(box_side=2.0).score_planes(tiny_generator(), torch.zeros(1, 3, 6, 16, 16))


def test_files_that_are_no_reward(tmp_path):
    with pytest.raises(CheckpointError, match=r"no reward in .*reward-train` writes it"):
        RewardModel.load(tmp_path)
    file = tmp_path / "reward.safetensors"
    file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        RewardModel.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="is not a densityrl-reward file"):
        RewardModel.load(tmp_path)
    for change, message in (
        ({"version": 1}, "has format version 1; this release reads version 2"),
        ({"version": 7}, "has format version 7; this release reads version 2"),
        ({"network": {"widths": [8, 8], "value_range": [0, 100]}}, "does not describe itself"),
        ({"network": {"kind": "oracle"}}, "does not describe itself"),
        ({"network": {"kind": "conv", "widths": [8, 16], "value_range": [0, 100]}}, "itself"),
        ({"network": {"kind": "inversion", "shape": [8, 9, 9]}}, "does not describe itself"),
        ({"slab": {"size": 3}}, "does not describe itself"),
    ):
        make_model().save(tmp_path)
        description = {**json.loads((tmp_path / "reward.json").read_text()), **change}
        tensors = make_model().network.state_dict()
        save_file(tensors, file, metadata={"description": json.dumps(description)})
        with pytest.raises(CheckpointError, match=message):
            RewardModel.load(tmp_path)
