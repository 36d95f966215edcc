"""Points by the CUDA kernels, emulated on the CPU: against the reference in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from backend_cases import norm_error
from cuda_emulation import threads_in_reverse
from kernel_cases import LAYOUTS, random_decoder, random_planes, random_points
from torch import Tensor

from triplane_kernels import DensityMLP, TriplaneLayout, lookup, reference
from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.cuda import launch
from triplane_kernels.cuda import points as cuda_points

pytestmark = pytest.mark.usefixtures("emulated")

EVERYTHING = Needs(planes=True, decoder=True, points=True)
HALVES = [torch.bfloat16, torch.float16]


def canonical(layout: TriplaneLayout) -> TriplaneLayout:
    """The layout with a reduction that backends know."""
    reduce = {"mean": "sum", "concat_channel_major": "concat"}.get(layout.reduce, layout.reduce)
    return replace(layout, reduce=reduce, extent=layout.extents)


CASES = {name: canonical(layout) for name, layout in LAYOUTS.items()}
EG3D, CONCAT, PRODUCT = CASES["eg3d"], CASES["openlrm"], CASES["nerfstudio"]


@pytest.fixture(autouse=True)
def _atomic_additions() -> None:
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _fixed_order() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def random_field(
    layout: TriplaneLayout = EG3D,
    channels: int = 3,
    widths: tuple[int, int] = (6, 4),
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
    return Field(
        [plane.to(dtype) for plane in planes],
        replace(decoder, weights=tuple(weights)).to(torch.float32),
    )


def leaves(field: Field, dtype: torch.dtype) -> Field:
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


def assert_as_accurate(ours: list[Tensor], by_reference: Callable[..., list[Tensor]]) -> None:
    """The project's bound: twice the error of plain PyTorch in float32, plus 1e-6."""
    exact = by_reference(torch.float64)
    for result, usual, expected in zip(ours, by_reference(torch.float32), exact, strict=True):
        assert result.shape == expected.shape
        if result.dtype != torch.float32:  # the gradient of a plane, rounded to its dtype
            usual = usual.to(result.dtype)
        error, allowed = norm_error(result, expected), 2 * norm_error(usual, expected) + 1e-6
        assert error <= allowed, f"{error:.1e} where {allowed:.1e} is allowed"


def weights_like(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def everything(
    field: Field, points: Tensor, layout: TriplaneLayout
) -> tuple[Tensor, Tensor, Gradients]:
    """sigma, features, and the gradients of a random sum of them."""
    sigma, features = cuda_points.radiance(field, points, layout)
    d_sigma, d_features = weights_like(*sigma.shape), weights_like(*features.shape)
    gradients = cuda_points.radiance_backward(
        d_sigma, d_features, sigma, field, points, layout, EVERYTHING
    )
    return sigma, features, gradients


def check_radiance(field: Field, points: Tensor, layout: TriplaneLayout = EG3D) -> None:
    points = points.to(torch.float32)
    sigma, features, gradients = everything(field, points, layout)

    def by_reference(dtype: torch.dtype) -> list[Tensor]:
        copy, x = leaves(field, dtype), points.to(dtype).requires_grad_()
        outputs = reference.radiance(copy.planes, copy.decoder, x, layout)
        inputs = [*copy.planes, *copy.decoder.parameters, x]
        d_outputs = [weights_like(*output.shape).to(dtype) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]

    ours = [*gradients.planes, *gradients.weights, *gradients.biases, gradients.points]
    assert all(d.dtype == plane.dtype for d, plane in zip(ours, field.planes, strict=False))
    assert_as_accurate([sigma, features, *ours], by_reference)


def check_features(field: Field, points: Tensor, layout: TriplaneLayout) -> None:
    points = points.to(torch.float32)
    features = cuda_points.sample_features(field.planes, points, layout)
    gradients = cuda_points.sample_features_backward(
        weights_like(*features.shape), field.planes, points, layout, EVERYTHING
    )

    def by_reference(dtype: torch.dtype) -> list[Tensor]:
        planes, x = leaves(field, dtype).planes, points.to(dtype).requires_grad_()
        exact = reference.sample_features(planes, x, layout)
        d_features = weights_like(*exact.shape).to(dtype)
        return [exact, *torch.autograd.grad(exact, [*planes, x], d_features)]

    assert_as_accurate([features, *gradients.planes, gradients.points], by_reference)


@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_radiance_of_layouts(layout: TriplaneLayout) -> None:
    check_radiance(random_field(layout), random_points(37, batch=2), layout)


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_features_of_layouts(layout: TriplaneLayout, channels: int) -> None:
    check_features(random_field(layout, channels), random_points(37, batch=2), layout)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", [EG3D, CONCAT, PRODUCT], ids=["sum", "concat", "product"])
@pytest.mark.parametrize("channels", [3, 8, 32, 40, 70])
def test_features_of_numbers(layout: TriplaneLayout, channels: int, dtype: torch.dtype) -> None:
    check_features(random_field(layout, channels, dtype=dtype), random_points(33), layout)


@pytest.mark.parametrize(
    ("channels", "widths"),
    [(32, (64, 1)), (32, (64, 33)), (8, (64, 65)), (6, (7, 18)), (96, (64, 1)), (1, (1, 1))],
    ids=str,
)
def test_radiance_of_sizes(channels: int, widths: tuple[int, int]) -> None:
    check_radiance(random_field(channels=channels, widths=widths), random_points(33))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("layout", "channels", "widths"),
    [
        (EG3D, 32, (64, 1)),
        (EG3D, 40, (64, 4)),
        (CONCAT, 32, (64, 3)),
        (CONCAT, 17, (9, 1)),
        (PRODUCT, 16, (64, 1)),
    ],
    ids=["one-part", "two-parts", "a-part-a-plane", "odd", "product"],
)
def test_radiance_of_numbers(
    layout: TriplaneLayout, channels: int, widths: tuple[int, int], dtype: torch.dtype
) -> None:
    check_radiance(random_field(layout, channels, widths, dtype=dtype), random_points(20), layout)


@pytest.mark.parametrize("widths", [(6, 4), (64, 1)], ids=["features", "density"])
@pytest.mark.parametrize(
    ("hidden", "output"), [("softplus", "exp"), ("relu", "identity"), ("silu", "softplus")]
)
def test_radiance_of_activations(hidden: str, output: str, widths: tuple[int, int]) -> None:
    field = random_field(channels=4, widths=widths, hidden=hidden, output=output)
    check_radiance(field, random_points(33, batch=2))


@pytest.mark.parametrize("shift", [-12.0, 40.0])
def test_units_far_from_zero(shift: float) -> None:
    """Where all units are far below zero, softplus must keep its relative accuracy."""
    field = random_field(channels=16, widths=(64, 1))
    first, last = field.decoder.biases
    check_radiance(
        Field(field.planes, replace(field.decoder, biases=(first + shift, 0 * last))),
        random_points(40, batch=2),
    )


@pytest.mark.parametrize("count", [1, 16, 32, 65])
def test_tiles_that_fit_and_that_do_not(count: int) -> None:
    for widths in [(8, 1), (8, 2)]:
        check_radiance(random_field(channels=4, widths=widths), random_points(count, batch=2))


@pytest.mark.parametrize("name", ["eg3d", "crm", "nerfstudio"])
def test_one_set_of_points_for_all_samples(name: str) -> None:
    check_radiance(random_field(CASES[name]), random_points(21), CASES[name])
    check_features(random_field(CASES[name]), random_points(21), CASES[name])


def test_blocks_that_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.extension, "radiance_partials", lambda field: 2)
    check_radiance(random_field(channels=4, widths=(8, 3)), random_points(150, batch=2))
    points = random_points(1500).to(torch.float32)  # more than all the emulated blocks at once
    field = random_field(channels=4, widths=(8, 1), batch=1)
    sigma, _ = cuda_points.radiance(field, points, EG3D)
    exact, _ = reference.radiance(field.planes, field.decoder, points, EG3D)
    torch.testing.assert_close(sigma, exact, rtol=1e-5, atol=1e-5)


def test_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "CHUNK_BYTES", 1)  # 32 points of both samples
    check_radiance(random_field(), random_points(70))
    check_features(random_field(), random_points(70, batch=2), EG3D)


@pytest.mark.parametrize("name", ["eg3d", "ssdnerf", "crm", "nerfstudio"])
def test_points_on_and_beyond_the_faces(name: str) -> None:
    layout = CASES[name]
    steps = torch.tensor([-1e9, -2.5, -1.0, -0.4, 0.0, 0.7, 1.0, 2.5, float("inf")])
    lattice = torch.cartesian_prod(steps, steps, steps[1:])
    points = (lattice * torch.tensor(layout.extents) / 2)[None]
    field = random_field(layout, batch=1, widths=(6, 1))
    exact = reference.radiance(
        [plane.double() for plane in field.planes],
        field.decoder.to(torch.float64),
        points.double(),
        layout,
    )
    sigma, features = cuda_points.radiance(field, points, layout)
    torch.testing.assert_close(sigma.double(), exact[0], rtol=1e-5, atol=1e-5)
    gradients = cuda_points.radiance_backward(
        torch.ones_like(sigma), features, sigma, field, points, layout, EVERYTHING
    )
    assert all(plane.isfinite().all() for plane in gradients.planes)
    assert gradients.points.isfinite().all()


def test_sides_of_one_pixel() -> None:
    for padding in ("zeros", "border"):
        for align_corners in (False, True):
            layout = replace(EG3D, padding=padding, align_corners=align_corners)
            field = random_field(layout)
            planes = [plane[..., :1, :] for plane in field.planes]
            check_radiance(Field(planes, field.decoder), random_points(20), layout)


@pytest.mark.parametrize("name", ["eg3d", "triposr", "crm", "nerfstudio"])
def test_a_nan_coordinate_spoils_its_own_point_only(name: str) -> None:
    layout = CASES[name]
    field, points = random_field(layout), random_points(20, batch=2).to(torch.float32)
    sigma, features = cuda_points.radiance(field, points, layout)
    for axis in range(3):
        points[0, 3 + axis, axis] = torch.nan
    spoilt = torch.zeros(2, 20, dtype=torch.bool)
    spoilt[0, 3:6] = True
    their_sigma, their_features = cuda_points.radiance(field, points, layout)
    torch.testing.assert_close(their_sigma, sigma.masked_fill(spoilt, torch.nan), equal_nan=True)
    assert their_features[spoilt].isnan().all()
    torch.testing.assert_close(their_features[~spoilt], features[~spoilt])
    torch.testing.assert_close(
        cuda_points.sample_features(field.planes, points, layout),
        reference.sample_features(field.planes, points, layout),
        equal_nan=True,
    )

    x = points.clone().requires_grad_()
    outputs = reference.radiance(field.planes, field.decoder, x, layout)
    (expected,) = torch.autograd.grad(outputs[0].sum(), x)
    gradients = cuda_points.radiance_backward(
        torch.ones_like(sigma),
        torch.zeros_like(features),
        their_sigma,
        field,
        points,
        layout,
        Needs(planes=False, decoder=False, points=True),
    )
    torch.testing.assert_close(gradients.points, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("hidden", ["softplus", "relu", "silu"])
@pytest.mark.parametrize("widths", [(64, 1), (6, 4)], ids=["density", "features"])
def test_a_nan_in_a_plane_reaches_sigma(hidden: str, widths: tuple[int, int]) -> None:
    field = random_field(channels=4, widths=widths, hidden=hidden)
    field.planes[0][0] = torch.nan
    sigma, _ = cuda_points.radiance(field, torch.zeros(1, 5, 3), EG3D)
    assert sigma[0].isnan().all()
    assert sigma[1].isfinite().all()


def test_points_that_do_not_exist_are_not_looked_up() -> None:
    field, points = random_field(), torch.full((1, 5, 3), 0.4)
    for plane in field.planes:
        plane[..., plane.shape[-2] // 2, :] = torch.nan  # where a padding of zeros would look
        plane[..., :, plane.shape[-1] // 2] = torch.nan
    _, _, gradients = everything(field, points, EG3D)
    assert all(weight.isfinite().all() for weight in gradients.weights)


def test_no_points() -> None:
    field, points = random_field(), torch.empty(1, 0, 3)
    sigma, features, gradients = everything(field, points, EG3D)
    assert sigma.shape == (2, 0)
    assert features.shape == (2, 0, 3)
    assert cuda_points.sample_features(field.planes, points, EG3D).shape == (2, 0, 3)
    assert all(plane.eq(0).all() for plane in gradients.planes)
    assert all(weight.eq(0).all() for weight in gradients.weights)
    assert gradients.points.shape == points.shape


@pytest.mark.usefixtures("_fixed_order")
@pytest.mark.parametrize(
    ("layout", "channels", "widths"),
    [(EG3D, 32, (64, 1)), (CONCAT, 32, (64, 35)), (PRODUCT, 5, (9, 4))],
    ids=["sum", "concat", "product"],
)
def test_nothing_depends_on_the_order_of_threads(
    layout: TriplaneLayout, channels: int, widths: tuple[int, int]
) -> None:
    field = random_field(layout, channels, widths)
    points = random_points(70, batch=2).to(torch.float32)

    def results() -> list[Tensor]:
        sigma, features, gradients = everything(field, points, layout)
        d_field = [*gradients.planes, *gradients.weights, *gradients.biases]
        looked_up = cuda_points.sample_features(field.planes, points, layout)
        return [sigma, features, *d_field, gradients.points, looked_up]

    first = results()
    with threads_in_reverse():
        second = results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("_fixed_order")
@pytest.mark.parametrize("layout", [EG3D, CONCAT, PRODUCT], ids=["sum", "concat", "product"])
def test_gradients_in_a_fixed_order(layout: TriplaneLayout) -> None:
    check_radiance(random_field(layout), random_points(37), layout)


def test_the_emulated_additions_do_not_lose_each_other() -> None:
    """Many points on one pixel, in either order of the threads."""
    field, points = random_field(channels=8, widths=(8, 1)), torch.full((2, 100, 3), 0.01)
    _, _, first = everything(field, points, EG3D)
    with threads_in_reverse():
        _, _, second = everything(field, points, EG3D)
    for a, b in zip(first.planes, second.planes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "needs", [Needs(True, False), Needs(False, True), Needs(False, False, True)], ids=str
)
def test_only_what_is_needed(needs: Needs) -> None:
    field, points = random_field(), random_points(20).to(torch.float32)
    sigma, features = cuda_points.radiance(field, points, EG3D)
    arguments = sigma, features, sigma, field, points, EG3D
    every = cuda_points.radiance_backward(*arguments, EVERYTHING)
    some = cuda_points.radiance_backward(*arguments, needs)
    wanted = {
        "planes": needs.planes,
        "weights": needs.decoder,
        "biases": needs.decoder,
        "points": needs.points,
    }
    for name, needed in wanted.items():
        if needed:
            torch.testing.assert_close(getattr(some, name), getattr(every, name))
        else:
            assert getattr(some, name) is None


def test_planes_that_lie_channels_last_are_not_copied() -> None:
    together = torch.randn(2, 3, 5, 7, 32, generator=torch.Generator().manual_seed(0))
    planes = list(together.permute(0, 1, 4, 2, 3).unbind(1))
    found = cuda_points._Lookup.of(planes, torch.empty(1, 1, 3), EG3D)
    for plane, image in zip(planes, found.images, strict=True):
        assert image.data_ptr() == plane.data_ptr()
    check_radiance(Field(planes, random_field(channels=32).decoder), random_points(9))


def test_planes_that_are_not_aligned() -> None:
    memory = torch.randn(2 * 5 * 7 * 32 + 1, generator=torch.Generator().manual_seed(0))
    plane = memory[1:].view(2, 5, 7, 32).permute(0, 3, 1, 2)
    field = Field([plane] * 3, random_field(channels=32).decoder)
    check_radiance(field, random_points(9))
    check_features(field, random_points(9), EG3D)


def test_exact_numbers() -> None:
    """By hand: in the middle of two pixels the feature is their mean; relu keeps it."""
    plane = torch.tensor([[1.0, 3.0], [5.0, 7.0]])[None, None]
    layout = TriplaneLayout(((0, 1),), (2.0, 2.0, 2.0), "sum")
    decoder = DensityMLP([torch.eye(1), torch.full((1, 1), 10.0)], [torch.zeros(1)] * 2, "relu")
    points = torch.tensor([[[0.0, -0.5, 9.0], [0.5, 0.0, 9.0]]])
    sigma, features = cuda_points.radiance(Field([plane], decoder), points, layout)
    assert sigma.tolist() == [[20.0, 50.0]]
    assert features.shape == (1, 2, 0)


def test_what_the_kernels_take() -> None:
    taken = cuda_points.MOST_PLANES, cuda_points.MOST_WIDTH
    taken += cuda_points.MOST_UNITS, cuda_points.MOST_REST
    extension = launch.extension
    assert taken == (
        extension.MAX_POINT_PLANES,
        extension.MAX_WIDTH,
        extension.MAX_UNITS,
        extension.MAX_REST,
    )


@pytest.mark.parametrize(
    ("layout", "width", "widths", "taken"),
    [
        (EG3D, 96, (64, 65), True),
        (EG3D, 97, (64, 1), False),
        (EG3D, 32, (65, 1), False),
        (EG3D, 32, (64, 66), False),
        (EG3D, 32, (16, 16, 1), False),
        (CONCAT, 96, (64, 1), True),
        (CASES["all-six-pairs"], 96, (64, 1), True),
        (replace(CONCAT, axes=CONCAT.axes * 2), 17 * 6, (64, 1), False),
        (replace(EG3D, axes=EG3D.axes * 3), 32, (64, 1), False),
    ],
)
def test_why_not(layout: TriplaneLayout, width: int, widths: tuple[int, ...], taken: bool) -> None:
    decoder = random_decoder(width, widths, torch.float32)
    reason = cuda_points.why_not_points(decoder, layout)
    assert (reason == "") == taken
    assert taken or "no CUDA point kernel" in reason
    if taken:
        planes = len(layout.axes) if layout.reduce == "concat" else 1
        check_radiance(random_field(layout, width // planes, widths), random_points(5), layout)


def test_why_not_without_a_decoder_or_its_other_rows() -> None:
    assert cuda_points.why_not_points(None, EG3D) == ""
    assert cuda_points.why_not_points(None, replace(EG3D, axes=EG3D.axes * 3)) != ""
    decoder = random_decoder(32, (64, 100), torch.float32)
    assert cuda_points.why_not_points(decoder, EG3D, all_rows=False) == ""


def test_what_the_kernels_do_not_take_is_an_error() -> None:
    field = random_field(channels=32, widths=(65, 1))
    with pytest.raises(RuntimeError, match="invalid argument"):
        cuda_points.radiance(field, random_points(3).to(torch.float32), EG3D)
    deep = Field(field.planes, random_decoder(32, (4, 4, 1), torch.float32))
    with pytest.raises(ValueError, match="two layers"):
        cuda_points.radiance(deep, random_points(3).to(torch.float32), EG3D)
