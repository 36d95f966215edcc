"""Points on Triton: as accurate as float32 PyTorch, on a GPU or in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import LAYOUTS, random_decoder, random_planes, random_points
from torch import Tensor

from triplane_kernels import NERFSTUDIO, DensityMLP, TriplaneLayout, lookup, reference
from triplane_kernels.backend import Field, Needs

pytest.importorskip("triton")

from triplane_kernels.triton import points as triton_points

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = Needs(planes=True, decoder=True, points=True)


def canonical(layout: TriplaneLayout) -> TriplaneLayout:
    """The layout with a reduction that backends know."""
    reduce = {"mean": "sum", "concat_channel_major": "concat"}.get(layout.reduce, layout.reduce)
    return replace(layout, reduce=reduce, extent=layout.extents)


CASES = {name: canonical(layout) for name, layout in LAYOUTS.items()}
EG3D_SUM = CASES["eg3d"]


def assert_as_accurate(ours: Tensor, float32: Tensor, exact: Tensor) -> None:
    """Judged by the norm of the error, relative to that of the exact result."""
    assert ours.shape == exact.shape
    scale = exact.norm().clamp_min(1e-30)
    error, usual = (((x.double() - exact).norm() / scale).item() for x in (ours, float32))
    assert error <= 2 * usual + 1e-6, f"{error:.1e}, and float32 PyTorch {usual:.1e}"


def random_field(
    layout: TriplaneLayout,
    channels: int = 3,
    widths: tuple[int, ...] = (6, 4),
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Field:
    """Planes of a size of their own each, and a decoder whose values stay of order 1."""
    planes = [
        random_planes(replace(layout, axes=(axes,)), batch, channels, (5 + n, 8 - n), seed=n)[:, 0]
        for n, axes in enumerate(layout.axes)
    ]
    decoder = random_decoder(layout.feature_channels(channels), widths, **options)
    weights = [weight / weight.shape[1] ** 0.5 for weight in decoder.weights]
    decoder = replace(decoder, weights=tuple(weights)).to(DEVICE, torch.float32)
    return Field([plane.to(DEVICE, dtype) for plane in planes], decoder)


def in_dtype(field: Field, dtype: torch.dtype) -> Field:
    """A copy that takes gradients."""
    decoder = field.decoder
    return Field(
        [plane.detach().to(dtype).requires_grad_() for plane in field.planes],
        replace(
            decoder,
            weights=tuple(w.detach().to(dtype).requires_grad_() for w in decoder.weights),
            biases=tuple(b.detach().to(dtype).requires_grad_() for b in decoder.biases),
        ),
    )


def check_radiance(field: Field, points: Tensor, layout: TriplaneLayout) -> None:
    """sigma, features and every gradient against the reference in float64."""
    points = points.to(DEVICE, torch.float32)
    batch, count = field.planes[0].shape[0], points.shape[1]
    generator = torch.Generator().manual_seed(5)
    d_sigma = torch.randn(batch, count, generator=generator).to(DEVICE)
    rows = field.decoder.out_channels - 1
    d_features = torch.randn(batch, count, rows, generator=generator).to(DEVICE)

    def by_reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        copy, x = in_dtype(field, dtype), points.to(dtype).requires_grad_()
        outputs = reference.radiance(copy.planes, copy.decoder, x, layout)
        d_outputs = [d_sigma.to(dtype), d_features.to(dtype)]
        inputs = [*copy.planes, *copy.decoder.weights, *copy.decoder.biases, x]
        return *outputs, *torch.autograd.grad(outputs, inputs, d_outputs)

    sigma, features = triton_points.radiance(field, points, layout)
    gradients = triton_points.radiance_backward(
        d_sigma, d_features, sigma, field, points, layout, EVERYTHING
    )
    ours = [sigma, features, *gradients.planes, *gradients.weights, *gradients.biases]
    planes = range(2, 2 + len(field.planes))
    ours.append(gradients.points)
    references = by_reference(torch.float32), by_reference(torch.float64)
    for number, (result, float32, exact) in enumerate(zip(ours, *references, strict=True)):
        if number in planes:
            dtype = field.planes[0].dtype
            assert result.dtype == dtype
            float32 = float32.to(dtype)  # the gradient is rounded to the planes' dtype
        assert_as_accurate(result, float32, exact)


@pytest.fixture(autouse=True)
def _atomic_additions() -> None:
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_radiance_of_layouts(layout: TriplaneLayout) -> None:
    check_radiance(random_field(layout), random_points(15, batch=2), layout)


@pytest.mark.parametrize(
    ("hidden", "output"), [("softplus", "exp"), ("relu", "identity"), ("silu", "softplus")]
)
def test_radiance_of_activations(hidden: str, output: str) -> None:
    field = random_field(EG3D_SUM, hidden=hidden, output=output)
    check_radiance(field, random_points(15, batch=2), EG3D_SUM)


@pytest.mark.parametrize(
    ("channels", "widths"),
    [(32, (64, 33)), (6, (64, 1)), (70, (20, 1)), (3, (100, 2)), (3, (6, 80))],
    ids=str,
)
def test_radiance_of_sizes(channels: int, widths: tuple[int, ...]) -> None:
    check_radiance(random_field(EG3D_SUM, channels, widths), random_points(33), EG3D_SUM)


@pytest.mark.parametrize(
    ("widths", "hidden"),
    [
        ((1,), "relu"),
        ((4,), "relu"),
        ((16, 16, 16, 3), "silu"),
        ((16, 16, 1), "softplus"),
        ((16, 8, 3), "relu"),
        ((130, 1), "silu"),
    ],
    ids=str,
)
def test_radiance_of_depths(widths: tuple[int, ...], hidden: str) -> None:
    field = random_field(CASES["openlrm"], widths=widths, hidden=hidden)
    check_radiance(field, random_points(20), CASES["openlrm"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [EG3D_SUM, CASES["nerfstudio"]], ids=["sum", "product"])
def test_planes_of_half_precision(dtype: torch.dtype, layout: TriplaneLayout) -> None:
    check_radiance(random_field(layout, dtype=dtype), random_points(20), layout)


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_sample_features(layout: TriplaneLayout, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    field, points = random_field(layout, channels=20), random_points(15, batch=2)
    points = points.to(DEVICE, torch.float32)

    def by_reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        planes, x = in_dtype(field, dtype).planes, points.to(dtype).requires_grad_()
        features = reference.sample_features(planes, x, layout)
        d_features = torch.ones_like(features).cumsum(dim=-1)
        return features, *torch.autograd.grad(features, [*planes, x], d_features)

    features = triton_points.sample_features(field.planes, points, layout)
    gradients = triton_points.sample_features_backward(
        torch.ones_like(features).cumsum(dim=-1), field.planes, points, layout, EVERYTHING
    )
    ours = [features, *gradients.planes, gradients.points]
    for triple in zip(ours, by_reference(torch.float32), by_reference(torch.float64), strict=True):
        assert_as_accurate(*triple)


@pytest.mark.parametrize("name", ["eg3d", "ssdnerf", "crm", "nerfstudio"])
def test_points_on_and_beyond_the_faces(name: str) -> None:
    layout = CASES[name]
    steps = torch.tensor([-1e9, -2.5, -1.0, -0.4, 0.0, 0.7, 1.0, 2.5, float("inf")])
    lattice = torch.cartesian_prod(steps, steps, steps)
    points = (lattice * torch.tensor(layout.extents) / 2)[None]
    field = random_field(layout, batch=1)
    exact = reference.radiance(
        [plane.double() for plane in field.planes],
        field.decoder.to(torch.float64),
        points.to(DEVICE, torch.float64),
        layout,
    )
    ours = triton_points.radiance(field, points.to(DEVICE), layout)
    for result, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eg3d", "triposr", "crm", "nerfstudio"])
def test_a_nan_coordinate_spoils_its_own_point_only(name: str) -> None:
    layout = CASES[name]
    field, points = random_field(layout), random_points(20, batch=2).to(DEVICE, torch.float32)
    sigma, features = triton_points.radiance(field, points, layout)
    for axis in range(3):
        points[0, 3 + axis, axis] = torch.nan
    spoilt = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    spoilt[0, 3:6] = True
    their_sigma, their_features = triton_points.radiance(field, points, layout)
    torch.testing.assert_close(their_sigma, sigma.masked_fill(spoilt, torch.nan), equal_nan=True)
    assert their_features[spoilt].isnan().all()
    torch.testing.assert_close(their_features[~spoilt], features[~spoilt])

    torch.testing.assert_close(
        triton_points.sample_features(field.planes, points, layout),
        reference.sample_features(field.planes, points, layout),
        equal_nan=True,
    )

    x = points.clone().requires_grad_()
    outputs = reference.radiance(field.planes, field.decoder, x, layout)
    (expected,) = torch.autograd.grad(outputs[0].sum(), x)
    gradients = triton_points.radiance_backward(
        torch.ones_like(sigma),
        torch.zeros_like(features),
        their_sigma,
        field,
        points,
        layout,
        Needs(planes=False, decoder=False, points=True),
    )
    torch.testing.assert_close(gradients.points, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert gradients.planes is None
    assert gradients.weights is None


def test_points_that_do_not_exist_are_not_looked_up() -> None:
    field, points = random_field(EG3D_SUM), torch.full((1, 5, 3), 0.4, device=DEVICE)
    for plane in field.planes:
        plane[..., plane.shape[-2] // 2, :] = torch.nan  # where a padding of zeros would look
        plane[..., :, plane.shape[-1] // 2] = torch.nan
    sigma, features = triton_points.radiance(field, points, EG3D_SUM)
    gradients = triton_points.radiance_backward(
        sigma, features, sigma, field, points, EG3D_SUM, EVERYTHING
    )
    assert all(weight.isfinite().all() for weight in gradients.weights)


def test_one_set_of_points_for_all_samples() -> None:
    layout = canonical(replace(NERFSTUDIO, reduce="sum"))
    check_radiance(random_field(layout), random_points(21), layout)


@pytest.mark.parametrize(("batch", "widths"), [(1, (6, 4)), (2, (6,))], ids=str)
def test_no_points(batch: int, widths: tuple[int, ...]) -> None:
    field, points = random_field(EG3D_SUM, widths=widths), torch.empty(batch, 0, 3, device=DEVICE)
    sigma, features = triton_points.radiance(field, points, EG3D_SUM)
    assert sigma.shape == (2, 0)
    assert features.shape == (2, 0, widths[-1] - 1)
    assert triton_points.sample_features(field.planes, points, EG3D_SUM).shape == (2, 0, 3)
    gradients = triton_points.radiance_backward(
        sigma, features, sigma, field, points, EG3D_SUM, EVERYTHING
    )
    assert all(plane.eq(0).all() for plane in gradients.planes)
    assert all(weight.eq(0).all() for weight in gradients.weights)
    assert gradients.points.shape == points.shape


@pytest.mark.parametrize("widths", [(6, 4), (6, 5, 4)], ids=["fused", "unfused"])
def test_in_many_parts(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]) -> None:
    monkeypatch.setattr(lookup, "CHUNK_BYTES", 400)  # 16 points of 2 samples, and 2 points
    check_radiance(random_field(EG3D_SUM, widths=widths), random_points(33), EG3D_SUM)


def test_programs_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_points, "PROGRAMS", 2)
    check_radiance(random_field(EG3D_SUM), random_points(40, batch=2), EG3D_SUM)


def test_deterministic_gradients_repeat_to_the_bit() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    field = random_field(EG3D_SUM)
    points = random_points(500 if DEVICE == "cuda" else 40, batch=2).to(DEVICE, torch.float32)
    sigma, features = triton_points.radiance(field, points, EG3D_SUM)
    first, second = (
        triton_points.radiance_backward(sigma, features, sigma, field, points, EG3D_SUM, EVERYTHING)
        for _ in range(2)
    )
    for group in ("planes", "weights", "biases"):
        pairs = zip(getattr(first, group), getattr(second, group), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(first.points, second.points)


@pytest.mark.parametrize("needs", [Needs(True, False), Needs(False, True)], ids=str)
def test_only_what_is_needed(needs: Needs) -> None:
    field, points = random_field(EG3D_SUM), random_points(20).to(DEVICE, torch.float32)
    sigma, features = triton_points.radiance(field, points, EG3D_SUM)
    arguments = sigma, features, sigma, field, points, EG3D_SUM
    every = triton_points.radiance_backward(*arguments, EVERYTHING)
    some = triton_points.radiance_backward(*arguments, needs)
    assert some.points is None
    for name, needed in (("planes", needs.planes), ("weights", needs.decoder)):
        if needed:
            torch.testing.assert_close(getattr(some, name), getattr(every, name))
        else:
            assert getattr(some, name) is None


def test_planes_that_lie_channels_last_are_not_copied() -> None:
    together = torch.empty(2, 3, 5, 7, 4)
    planes = together.permute(0, 1, 4, 2, 3).unbind(1)
    found = triton_points._Lookup.of(planes, torch.empty(1, 1, 3), EG3D_SUM)
    for plane, image in zip(planes, found.images, strict=True):
        assert image.data_ptr() == plane.data_ptr()


def test_a_decoder_without_features_and_exact_numbers() -> None:
    """By hand: in the middle of two pixels the feature is their mean; relu keeps it."""
    plane = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None].to(DEVICE)
    layout = TriplaneLayout(((0, 1),), (2.0, 2.0, 2.0), "sum")
    decoder = DensityMLP([torch.eye(1), torch.full((1, 1), 10.0)], [torch.zeros(1)] * 2, "relu")
    points = torch.tensor([[[0.0, -0.5, 9.0], [0.5, 0.0, 9.0]]]).to(DEVICE)
    sigma, features = triton_points.radiance(Field([plane], decoder.to(DEVICE)), points, layout)
    assert sigma.tolist() == [[20.0, 50.0]]
    assert features.shape == (1, 2, 0)
