"""sample_features, density and radiance: everything that is evaluated at single points."""

import dataclasses
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import LAYOUTS, random_decoder, random_planes, random_points, relative_error
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, TriplaneLayout, reference

ONE_PLANE = TriplaneLayout(((0, 1),), extent=2.0)
SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 1, 2, 2)  # rows are y, columns x


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.0, 0.0, 2.5),  # the image's centre
        (-0.5, -0.5, 1.0),  # a pixel's centre
        (0.5, -0.5, 2.0),  # x runs along the width
        (-0.5, 0.25, 2.5),  # row 0.75 of column 0: 1/4 * 1 + 3/4 * 3
        (-1.0, -1.0, 0.25),  # on the corner a quarter of the weight is inside
        (-1.5, 0.0, 0.0),  # pixel -1 counts nothing any more
    ],
)
def test_bilinear_lookup_by_hand(x: float, y: float, expected: float) -> None:
    feature = tk.sample_features(SQUARE, torch.tensor([[[x, y, 9.0]]]), ONE_PLANE)
    assert feature.tolist() == [[[expected]]]


@pytest.mark.parametrize(
    ("hidden", "raw"), [("softplus", 2.8132617), ("relu", 2.5), ("silu", 2.2310586)]
)
@pytest.mark.parametrize("output", ["identity", "softplus", "exp"])
def test_decoder_by_hand(hidden: str, raw: float, output: str) -> None:
    # The feature is (1, 2), so the hidden layer sees (1, -1).
    planes = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
    weights = [torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[2.0, -1.0], [1.0, 0.0]])]
    biases = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 7.0])]
    decoder = DensityMLP(weights, biases, hidden, output, bias_shift=-1.0)

    sigma, features = tk.radiance(planes, decoder, torch.zeros(1, 1, 3), ONE_PLANE)

    shifted = torch.tensor(raw - 1.0)
    expected = {"identity": shifted, "softplus": F.softplus(shifted), "exp": shifted.exp()}
    assert_close(sigma, expected[output].reshape(1, 1), rtol=1e-6, atol=0)
    first_hidden = {"softplus": 1.3132617, "relu": 1.0, "silu": 0.7310586}[hidden]
    assert_close(features, torch.tensor([[[first_hidden + 7]]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", [2.0, 30.0]),
        ("sum", [6.0, 90.0]),
        ("product", [6.0, 10.0 * 30.0 * 50.0]),
        ("concat", [1.0, 10.0, 2.0, 30.0, 3.0, 50.0]),
        ("concat_channel_major", [1.0, 2.0, 3.0, 10.0, 30.0, 50.0]),
    ],
)
def test_reduction_by_hand(reduce: str, expected: list[float]) -> None:
    planes = torch.tensor([[1.0, 10.0], [2.0, 30.0], [3.0, 50.0]]).reshape(1, 3, 2, 1, 1)
    layout = dataclasses.replace(tk.EG3D, reduce=reduce)
    assert tk.sample_features(planes, torch.zeros(1, 1, 3), layout).flatten().tolist() == expected


def usual_features(planes: Tensor, points: Tensor, layout: TriplaneLayout) -> list[Tensor]:
    """The lookup on each plane by grid_sample, [B, M, C] each."""
    u = 2 * points / torch.tensor(layout.extents, dtype=points.dtype)
    options = {"padding_mode": layout.padding, "align_corners": layout.align_corners}
    return [
        F.grid_sample(planes[:, p], u[:, :, None, list(axes)], **options)[..., 0].transpose(1, 2)
        for p, axes in enumerate(layout.axes)
    ]


def points_inside_outside_and_on_faces(extent: float) -> Tensor:
    on_faces = torch.tensor(list(product([-extent / 2, 0.0, extent / 2], repeat=3)))
    far = torch.tensor([[50.0, 0.0, 0.0], [-50.0, 50.0, -50.0]])
    fixed = torch.cat([on_faces, far]).double().expand(2, -1, -1)
    return torch.cat([random_points(60, batch=2, scale=0.8 * extent), fixed], dim=1)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (6, 1)], ids=str)
def test_lookup_is_that_of_grid_sample(padding: str, align_corners: bool, size: tuple) -> None:
    layout = TriplaneLayout(((0, 1), (2, 1), (2, 0)), 1.4, "concat", padding, align_corners)
    planes = random_planes(layout, batch=2, size=size).requires_grad_()
    points = points_inside_outside_and_on_faces(1.4)

    ours = tk.sample_features(planes, points, layout)
    usual = torch.cat(usual_features(planes, points, layout), dim=-1)
    assert_close(ours, usual, rtol=0, atol=1e-13)

    weights = torch.randn(ours.shape, dtype=torch.float64)
    (ours_gradient,) = torch.autograd.grad((ours * weights).sum(), planes)
    (usual_gradient,) = torch.autograd.grad((usual * weights).sum(), planes)
    assert_close(ours_gradient, usual_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_gradient_by_points_is_that_of_grid_sample(padding: str, align_corners: bool) -> None:
    layout = TriplaneLayout(((0, 1), (2, 1)), 1.4, "sum", padding, align_corners)
    planes = random_planes(layout, batch=2)
    points = random_points(200, batch=2, scale=1.0).requires_grad_()
    ours = tk.sample_features(planes, points, layout)
    usual = sum(usual_features(planes, points, layout))
    (ours_gradient,) = torch.autograd.grad(ours.sum(), points)
    (usual_gradient,) = torch.autograd.grad(usual.sum(), points)
    assert_close(ours_gradient, usual_gradient, rtol=0, atol=1e-11)


def test_as_accurate_as_the_usual_path_in_float32() -> None:
    planes = random_planes(tk.EG3D, channels=8, size=(32, 32))
    decoder = random_decoder(8, widths=(16, 3))
    points = random_points(500, scale=0.6).float()
    exact = tk.density(planes, decoder, points, tk.EG3D)

    planes, decoder = planes.float(), decoder.to(torch.float32)
    ours = tk.density(planes, decoder, points, tk.EG3D)
    feature = sum(usual_features(planes, points, tk.EG3D)) / 3
    hidden = F.softplus(F.linear(feature, decoder.weights[0], decoder.biases[0]))
    usual = F.linear(hidden, decoder.weights[1], decoder.biases[1])[..., 0]
    assert relative_error(ours, exact) <= 2 * relative_error(usual, exact) + 1e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_density_is_row_0_of_radiance(name: str) -> None:
    layout = LAYOUTS[name]
    planes, points = random_planes(layout, batch=2), random_points(20, batch=2)
    decoder = random_decoder(layout.feature_channels(3), (6, 5, 4), hidden="silu", output="exp")
    sigma, features = tk.radiance(planes, decoder, points, layout)
    assert_close(sigma, tk.density(planes, decoder, points, layout), rtol=1e-13, atol=0)
    assert features.shape == (2, 20, 3)


@pytest.mark.parametrize(
    ("name", "hidden"), [("eg3d", "softplus"), ("ssdnerf", "silu"), ("nerfstudio", "softplus")]
)
def test_first_and_second_derivatives(name: str, hidden: str) -> None:
    layout = LAYOUTS[name]
    planes = random_planes(layout, channels=2, size=(2, 3)).requires_grad_()
    points = random_points(3, scale=0.4).requires_grad_()
    decoder = random_decoder(
        layout.feature_channels(2), (3, 1), hidden=hidden, output="softplus", requires_grad=True
    )

    def evaluate(planes: Tensor, points: Tensor, *parameters: Tensor) -> Tensor:
        ours = dataclasses.replace(decoder, weights=parameters[:2], biases=parameters[2:])
        return tk.density(planes, ours, points, layout)

    inputs = (planes, points, *decoder.parameters)
    assert torch.autograd.gradcheck(evaluate, inputs)
    assert torch.autograd.gradgradcheck(evaluate, inputs)


def test_chunks_change_nothing_up_to_the_second_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planes = random_planes(tk.EG3D, batch=2).requires_grad_()
    points = random_points(11, batch=2).requires_grad_()
    decoder = random_decoder(3, requires_grad=True)
    inputs = (planes, points, *decoder.parameters)

    def derivatives() -> list[Tensor]:
        sigma, features = tk.radiance(planes, decoder, points, tk.EG3D)
        loss = sigma.square().sum() + features.square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        norm = sum(gradient.square().sum() for gradient in first)
        return [sigma, features, *first, *torch.autograd.grad(norm, inputs)]

    whole = derivatives()
    monkeypatch.setattr(reference, "POINTS_PER_CHUNK", 6)
    for ours, expected in zip(derivatives(), whole, strict=True):
        assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_chunks_bound_what_the_backward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = random_planes(tk.EG3D).requires_grad_()
    decoder, points = random_decoder(3, widths=(32, 1)), random_points(512)

    def kept_elements() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            tk.density(planes, decoder, points, tk.EG3D)
        return sum(sizes)

    whole = kept_elements()
    monkeypatch.setattr(reference, "POINTS_PER_CHUNK", 16)
    assert kept_elements() < whole / 10


def test_points_of_batch_one_serve_every_sample() -> None:
    planes, points = random_planes(tk.EG3D, batch=3), random_points(9)
    decoder = random_decoder(3)
    ours = tk.density(planes, decoder, points, tk.EG3D)
    assert torch.equal(ours, tk.density(planes, decoder, points.repeat(3, 1, 1), tk.EG3D))


def test_samples_do_not_see_each_other() -> None:
    planes, points = random_planes(tk.EG3D, batch=3), random_points(9, batch=3)
    decoder = random_decoder(3)
    together = tk.density(planes, decoder, points, tk.EG3D)
    for i in range(3):
        alone = tk.density(planes[i : i + 1], decoder, points[i : i + 1], tk.EG3D)
        assert_close(together[i : i + 1], alone, rtol=1e-13, atol=1e-13)


def test_planes_of_unequal_size() -> None:
    layout = dataclasses.replace(tk.EG3D_CORRECTED, reduce="concat")
    sizes = [(4, 5), (7, 3), (2, 2)]
    planes = [
        random_planes(TriplaneLayout((axes,), 1.0), batch=2, size=size)[:, 0]
        for axes, size in zip(layout.axes, sizes, strict=True)
    ]
    points = random_points(30, batch=2, scale=0.6)
    ours = tk.sample_features(planes, points, layout)
    each = [
        tk.sample_features(plane[:, None], points, TriplaneLayout((axes,), 1.0))
        for plane, axes in zip(planes, layout.axes, strict=True)
    ]
    assert torch.equal(ours, torch.cat(each, dim=-1))


def test_a_box_with_three_different_sides() -> None:
    sides = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    layout = dataclasses.replace(tk.EG3D_CORRECTED, extent=tuple(sides.tolist()))
    planes, points = random_planes(layout), random_points(30, scale=0.6)
    expected = tk.sample_features(planes, points, tk.EG3D_CORRECTED)
    assert_close(tk.sample_features(planes, points * sides, layout), expected)


def test_memory_layout_does_not_matter() -> None:
    planes, points = random_planes(tk.EG3D, batch=2), random_points(8, batch=2)
    scattered = planes.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    every_other = points.repeat_interleave(2, dim=1)[:, ::2]
    assert not scattered.is_contiguous()
    assert not every_other.is_contiguous()
    decoder = random_decoder(3)
    ours = tk.density(scattered, decoder, every_other, tk.EG3D)
    assert torch.equal(ours, tk.density(planes, decoder, points, tk.EG3D))


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_a_nan_coordinate_gives_nan_and_spoils_no_other_point(padding: str) -> None:
    layout = dataclasses.replace(tk.EG3D, padding=padding)
    planes, decoder = random_planes(layout), random_decoder(3, hidden="relu")
    points = random_points(4, scale=0.4)
    clean = tk.density(planes, decoder, points, layout)
    for axis in range(3):
        spoilt = points.clone()
        spoilt[0, 1, axis] = torch.nan
        sigma = tk.density(planes, decoder, spoilt, layout)
        assert sigma.isnan().tolist() == [[False, True, False, False]]
        assert torch.equal(sigma[0, [0, 2, 3]], clean[0, [0, 2, 3]])


@pytest.mark.parametrize("align_corners", [False, True])
def test_infinity_is_far_outside(align_corners: bool) -> None:
    layout = TriplaneLayout(((0, 1), (2, 1)), 1.0, "sum", "border", align_corners)
    for padding, size in product(["zeros", "border"], [(5, 7), (1, 1)]):
        layout = dataclasses.replace(layout, padding=padding)
        planes = random_planes(layout, size=size)
        infinite = torch.tensor([[[torch.inf, 0.1, 0.2], [0.0, -torch.inf, torch.inf]]]).double()
        far = infinite.clamp(-1e3, 1e3)
        ours = tk.sample_features(planes, infinite, layout)
        assert torch.equal(ours, tk.sample_features(planes, far, layout))


def test_nothing_in_nothing_out() -> None:
    decoder = random_decoder(3, requires_grad=True)
    planes = random_planes(tk.EG3D, batch=2).requires_grad_()
    sigma, features = tk.radiance(planes, decoder, torch.zeros(2, 0, 3), tk.EG3D)
    assert (sigma.shape, features.shape) == ((2, 0), (2, 0, 3))
    sigma.sum().backward()
    assert planes.grad is not None
    assert not planes.grad.any()
    no_sample = tk.density(planes[:0], decoder, torch.zeros(0, 5, 3), tk.EG3D)
    assert no_sample.shape == (0, 5)
