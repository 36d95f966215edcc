import pytest
import torch
from kernel_cases import LAYOUTS, random_decoder, random_planes
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, reference

GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(5, 4, 3))


def test_by_hand() -> None:
    planes = torch.tensor([2.0, -1.0]).reshape(2, 1, 1, 1, 1)
    layout = tk.TriplaneLayout(((0, 1),), 1.0, padding="border")
    hand_on = DensityMLP([torch.ones(1, 1)], [None])
    grid = Grid.cube(2, 1.0)
    target = torch.zeros(2, 2, 2, 2)
    target[:, 0] = 1.0
    arguments = (planes, hand_on, grid, layout, target)
    assert tk.density_grid_loss(*arguments, kind="l1").tolist() == [1.5, 1.5]
    assert tk.density_grid_loss(*arguments, kind="l2").tolist() == [2.5, 2.5]


@pytest.mark.parametrize("chunk", [1, 300, 2**24])
@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("target_kind", ["volume", "planes"])
@pytest.mark.parametrize("layout_name", ["eg3d", "one-plane", "triposr"])
def test_equals_the_difference_of_two_volumes(
    layout_name: str, target_kind: str, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[layout_name]
    channels = layout.feature_channels(3)
    planes = random_planes(layout, batch=2, seed=5).requires_grad_()
    base_planes = random_planes(layout, batch=2, size=(3, 4), seed=6).requires_grad_()
    decoder = random_decoder(channels, (6, 4), requires_grad=True)
    base_decoder = random_decoder(channels, (5, 5, 1), seed=7, requires_grad=True)
    inputs = (planes, base_planes, *decoder.parameters, *base_decoder.parameters)

    def volume(planes: Tensor, decoder: DensityMLP) -> Tensor:
        return reference.density_grid_by_points(planes, decoder, GRID, layout)

    difference = volume(planes, decoder) - volume(base_planes, base_decoder)
    error = difference.abs() if kind == "l1" else difference.square()
    expected = error.mean(dim=(1, 2, 3))

    monkeypatch.setattr(reference, "GRID_ELEMENTS_PER_CHUNK", chunk)
    target = (base_planes, base_decoder)
    if target_kind == "volume":
        target = volume(*target)
    ours = tk.density_grid_loss(planes, decoder, GRID, layout, target, kind)
    assert_close(ours, expected, rtol=1e-12, atol=0)

    weights = torch.tensor([1.0, -0.3], dtype=torch.float64)
    ours_gradient = torch.autograd.grad((ours * weights).sum(), inputs)
    expected_gradient = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, theirs in zip(ours_gradient, expected_gradient, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_volume_against_itself_is_nothing() -> None:
    planes, decoder = random_planes(tk.EG3D, batch=2), random_decoder(3)
    loss = tk.density_grid_loss(planes, decoder, GRID, tk.EG3D, (planes, decoder))
    assert loss.tolist() == [0, 0]


def test_no_sample() -> None:
    planes, decoder = random_planes(tk.EG3D, batch=0), random_decoder(3)
    loss = tk.density_grid_loss(planes, decoder, GRID, tk.EG3D, (planes, decoder))
    assert loss.shape == (0,)
