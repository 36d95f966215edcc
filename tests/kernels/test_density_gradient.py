import dataclasses

import pytest
import torch
from kernel_cases import LAYOUTS, random_decoder, random_planes, random_points
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, TriplaneLayout, reference


def test_by_hand() -> None:
    # A ramp of one a pixel, four pixels over two world units: slope 2 along x, and the factor 3.
    ramp = torch.arange(4.0).expand(1, 1, 1, 4, 4)
    layout = TriplaneLayout(((0, 1),), extent=2.0)
    triple = DensityMLP([torch.full((1, 1), 3.0)], [None])
    sigma, gradient = tk.density_gradient(ramp, triple, torch.tensor([[[0.1, 0.0, 0.0]]]), layout)
    assert_close(sigma, torch.tensor([[3 * 1.7]]))
    assert_close(gradient, torch.tensor([[[6.0, 0.0, 0.0]]]))


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (1,)},
        {"widths": (6, 4), "hidden": "softplus"},
        {"widths": (6, 5, 1), "hidden": "silu", "output": "exp", "bias_shift": -1.0},
        {"widths": (6, 5, 2), "hidden": "relu", "output": "softplus", "bias_shift": 0.5},
    ],
    ids=["linear", "softplus", "silu-exp", "relu-softplus"],
)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_equals_autograd_without_needing_it(layout_name: str, options: dict) -> None:
    layout = LAYOUTS[layout_name]
    planes = random_planes(layout, batch=2)
    points = random_points(40, batch=2).requires_grad_()
    decoder = random_decoder(layout.feature_channels(3), **options)

    expected_sigma = tk.density(planes, decoder, points, layout)
    (expected,) = torch.autograd.grad(expected_sigma.sum(), points)
    with torch.no_grad():
        sigma, gradient = tk.density_gradient(planes, decoder, points, layout)
    assert_close(sigma, expected_sigma.detach(), rtol=1e-12, atol=1e-12)
    assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("layout_name", "hidden"),
    [("eg3d", "softplus"), ("triposr", "silu"), ("nerfstudio", "softplus")],
)
def test_can_be_differentiated(layout_name: str, hidden: str) -> None:
    layout = LAYOUTS[layout_name]
    planes = random_planes(layout, channels=2, size=(2, 3)).requires_grad_()
    points = random_points(3, scale=0.4).requires_grad_()
    decoder = random_decoder(
        layout.feature_channels(2), (3, 1), hidden=hidden, output="softplus", requires_grad=True
    )

    def evaluate(planes: Tensor, points: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ours = dataclasses.replace(decoder, weights=parameters[:2], biases=parameters[2:])
        return tk.density_gradient(planes, ours, points, layout)

    assert torch.autograd.gradcheck(evaluate, (planes, points, *decoder.parameters))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = random_planes(tk.EG3D, batch=2).requires_grad_()
    decoder = random_decoder(3, requires_grad=True)
    points = random_points(11, batch=2)

    def results() -> list[Tensor]:
        sigma, gradient = tk.density_gradient(planes, decoder, points, tk.EG3D)
        eikonal = (gradient.norm(dim=-1) - 1).square().mean()
        inputs = (planes, *decoder.weights)
        return [sigma, gradient, *torch.autograd.grad(eikonal, inputs)]

    whole = results()
    monkeypatch.setattr(reference, "POINTS_PER_CHUNK", 6)
    for ours, expected in zip(results(), whole, strict=True):
        assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(1,), (4, 1)])
def test_nan_in_nan_out(widths: tuple[int, ...]) -> None:
    planes, decoder = random_planes(tk.EG3D), random_decoder(3, widths, hidden="relu")
    points = random_points(3, scale=0.4)
    points[0, 1, 0] = torch.nan
    sigma, gradient = tk.density_gradient(planes, decoder, points, tk.EG3D)
    assert sigma.isnan().tolist() == [[False, True, False]]
    assert gradient.isnan().all(dim=-1).tolist() == [[False, True, False]]
    assert gradient.isnan().any(dim=-1).tolist() == [[False, True, False]]


def test_far_outside_nothing_changes() -> None:
    planes, decoder = random_planes(tk.CRM), random_decoder(3)
    points = torch.tensor([[[torch.inf, 50.0, -torch.inf], [9.0, 9.0, 9.0]]])
    for padding in ("zeros", "border"):
        layout = dataclasses.replace(tk.CRM, padding=padding)
        sigma, gradient = tk.density_gradient(planes, decoder, points, layout)
        assert sigma.isfinite().all()
        assert gradient.tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_no_points() -> None:
    planes, decoder = random_planes(tk.EG3D, batch=2), random_decoder(3)
    sigma, gradient = tk.density_gradient(planes, decoder, torch.zeros(1, 0, 3), tk.EG3D)
    assert (sigma.shape, gradient.shape) == ((2, 0), (2, 0, 3))
