import dataclasses
from collections.abc import Sequence

import pytest
import torch
from kernel_cases import LAYOUTS, random_decoder, random_planes, relative_error
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, TriplaneLayout, reference

# Odd shape, a face outside every box, no symmetry.
GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(5, 4, 7))

DECODERS = {
    "one-layer": {"widths": (3,)},
    "eg3d": {"widths": (6, 4)},
    "deep-silu-exp": {"widths": (5, 6, 4, 2), "hidden": "silu", "output": "exp"},
    "relu-softplus": {"widths": (8, 1), "hidden": "relu", "output": "softplus"},
}


def assert_equals_point_path(
    planes: Tensor | Sequence[Tensor], decoder: DensityMLP, grid: Grid, layout: TriplaneLayout
) -> None:
    """Values and first derivatives, to 1e-12 of the largest."""
    inputs = [*([planes] if isinstance(planes, Tensor) else planes), *decoder.parameters]
    ours = tk.density_grid(planes, decoder, grid, layout)
    exact = reference.density_grid_by_points(planes, decoder, grid, layout)
    assert ours.shape == exact.shape
    assert relative_error(ours, exact) < 1e-12

    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    ours_gradient = torch.autograd.grad((ours * weights).sum(), inputs)
    exact_gradient = torch.autograd.grad((exact * weights).sum(), inputs)
    for mine, theirs in zip(ours_gradient, exact_gradient, strict=True):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("decoder_name", DECODERS)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_equals_the_point_path(layout_name: str, decoder_name: str) -> None:
    layout = LAYOUTS[layout_name]
    planes = random_planes(layout, batch=2).requires_grad_()
    options = {"bias_shift": -1.0, "requires_grad": True} | DECODERS[decoder_name]
    decoder = random_decoder(layout.feature_channels(3), **options)
    assert_equals_point_path(planes, decoder, GRID, layout)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 2), (9, 1, 3), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("layout_name", ["eg3d", "one-plane", "nerfstudio"])
def test_thin_grids(layout_name: str, shape: tuple[int, int, int]) -> None:
    layout = LAYOUTS[layout_name]
    planes = random_planes(layout).requires_grad_()
    decoder = random_decoder(layout.feature_channels(3), requires_grad=True)
    grid = Grid(lo=(-0.3, -0.2, 0.1), hi=(0.4, 0.3, 0.6), shape=shape)
    assert_equals_point_path(planes, decoder, grid, layout)


@pytest.mark.parametrize("layout_name", ["eg3d", "openlrm", "crm", "nerfstudio"])
def test_planes_of_unequal_size(layout_name: str) -> None:
    layout = LAYOUTS[layout_name]
    sizes = [(4, 5), (1, 3), (6, 2)]
    planes = [
        random_planes(layout, batch=2, size=size, seed=p)[:, p].requires_grad_()
        for p, size in enumerate(sizes)
    ]
    decoder = random_decoder(layout.feature_channels(3), requires_grad=True)
    assert_equals_point_path(planes, decoder, GRID, layout)


def test_a_layer_without_bias() -> None:
    planes = random_planes(tk.EG3D).requires_grad_()
    full = random_decoder(3, requires_grad=True)
    for biases in [(None, full.biases[1]), (full.biases[0], None), (None, None)]:
        decoder = dataclasses.replace(full, biases=biases)
        assert_equals_point_path(planes, decoder, GRID, tk.EG3D)


@pytest.mark.parametrize("layout_name", ["eg3d", "one-plane", "all-six-pairs", "nerfstudio"])
@pytest.mark.parametrize("elements", [1, 500])
def test_slabs_change_nothing_up_to_the_second_derivative(
    layout_name: str, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[layout_name]
    planes = random_planes(layout, batch=2).requires_grad_()
    decoder = random_decoder(layout.feature_channels(3), requires_grad=True)
    inputs = (planes, *decoder.parameters)

    def derivatives() -> list[Tensor]:
        sigma = tk.density_grid(planes, decoder, GRID, layout)
        first = torch.autograd.grad(sigma.square().sum(), inputs, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        return [sigma, *first, *torch.autograd.grad(norm, inputs)]

    whole = derivatives()
    monkeypatch.setattr(reference, "GRID_ELEMENTS_PER_CHUNK", elements)
    for ours, expected in zip(derivatives(), whole, strict=True):
        assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_slabs_bound_what_the_backward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    planes, decoder = random_planes(tk.EG3D).requires_grad_(), random_decoder(3, widths=(32, 1))
    grid = Grid.cube(16, 1.0)

    def largest_kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            tk.density_grid(planes, decoder, grid, tk.EG3D)
        return max(sizes)

    assert largest_kept() == grid.numel * 32
    monkeypatch.setattr(reference, "GRID_ELEMENTS_PER_CHUNK", 1)
    assert largest_kept() <= 16 * 16 * 32


def test_derivatives_against_differences() -> None:
    planes = random_planes(tk.EG3D, channels=2, size=(3, 2)).requires_grad_()
    decoder = random_decoder(2, (3, 1), requires_grad=True)
    grid = Grid.cube(2, 0.9)

    def evaluate(planes: Tensor, *parameters: Tensor) -> Tensor:
        ours = dataclasses.replace(decoder, weights=parameters[:2], biases=parameters[2:])
        return tk.density_grid(planes, ours, grid, tk.EG3D)

    inputs = (planes, *decoder.parameters)
    assert torch.autograd.gradcheck(evaluate, inputs)
    assert torch.autograd.gradgradcheck(evaluate, inputs)


def test_a_slab_is_a_part_of_the_cube() -> None:
    planes, decoder = random_planes(tk.EG3D), random_decoder(3)
    cube = tk.density_grid(planes, decoder, Grid.cube(10, 1.0), tk.EG3D)
    slab = Grid.slab(10, 1.0, ((0.2, 0.1), (0.0, 0.3), (0.4, 0.0)))
    ours = tk.density_grid(planes, decoder, slab, tk.EG3D)
    assert_close(ours, cube[:, 2:9, 0:7, 4:10], rtol=1e-12, atol=1e-12)


def test_volumes_are_indexed_xyz() -> None:
    # One plane whose only channel grows along its width; the decoder hands it on.
    ramp = torch.arange(4.0).expand(1, 1, 1, 4, 4)
    hand_on = DensityMLP([torch.ones(1, 1)], [None])
    grid = Grid.cube(3, 0.5)
    for axis in range(3):
        layout = TriplaneLayout(((axis, (axis + 1) % 3),), extent=1.0, padding="border")
        volume = tk.density_grid(ramp, hand_on, grid, layout)[0]
        along = volume.movedim(axis, 0)
        assert torch.equal(along, torch.tensor([0.5, 1.5, 2.5])[:, None, None].expand(3, 3, 3))


def test_nan_stays_where_it_belongs() -> None:
    planes, decoder = random_planes(tk.EG3D_CORRECTED, size=(8, 8)), random_decoder(3)
    planes[0, 0, 0, 2, 5] = torch.nan
    grid = Grid.cube(8, 0.875)  # grid points are pixel centres
    ours = tk.density_grid(planes, decoder, grid, tk.EG3D_CORRECTED)
    exact = reference.density_grid_by_points(planes, decoder, grid, tk.EG3D_CORRECTED)
    assert torch.equal(ours.isnan(), exact.isnan())
    assert ours.isnan().any()
    assert not ours.isnan().all()


def test_no_sample() -> None:
    planes, decoder = random_planes(tk.EG3D, batch=0), random_decoder(3)
    assert tk.density_grid(planes, decoder, GRID, tk.EG3D).shape == (0, *GRID.shape)


def test_as_accurate_in_float32_as_the_point_path() -> None:
    planes = random_planes(tk.EG3D, channels=8, size=(32, 32))
    decoder = random_decoder(8, widths=(16, 1))
    grid = Grid.cube(17, 1.1)
    exact = reference.density_grid_by_points(planes, decoder, grid, tk.EG3D)
    planes, decoder = planes.float(), decoder.to(torch.float32)
    ours = tk.density_grid(planes, decoder, grid, tk.EG3D)
    points = reference.density_grid_by_points(planes, decoder, grid, tk.EG3D)
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 2 * relative_error(points, exact) + 1e-6
