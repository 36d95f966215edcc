"""The Triton kernels for regular grids; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from backend_cases import Problem, assert_as_accurate_as_pytorch, norm_error
from kernel_cases import LAYOUTS, random_decoder, random_planes
from torch import Tensor

import triplane_kernels as tk
from triplane_kernels import EG3D, EG3D_CORRECTED, NERFSTUDIO, TRIPOSR, Grid, TriplaneLayout
from triplane_kernels.backend import Field
from triplane_kernels.frame import padded

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triplane_kernels.triton import elementary  # noqa: E402
from triplane_kernels.triton.density_grid import (  # noqa: E402
    LARGEST_OF_TWO,
    TwoLayerField,
    backward_launch,
    forward_launch,
    forward_programs,
)
from triplane_kernels.triton.tiles import TILES, Tile, device_family  # noqa: E402

# Modules whose names the package gives to their functions.
density_grid = sys.modules["triplane_kernels.triton.density_grid"]
deep = sys.modules["triplane_kernels.triton.deep"]
tables = sys.modules["triplane_kernels.triton.tables"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(2, 4, 5))
INSIDE = Grid(lo=(-0.4, -0.3, -0.45), hi=(0.35, 0.4, 0.3), shape=(3, 4, 5))

DECODERS = {
    "relu-softplus": {"widths": (6, 2), "hidden": "relu", "output": "softplus"},
    "silu-exp": {"widths": (5, 1), "hidden": "silu", "output": "exp"},
    "shifted": {"widths": (7, 1), "output": "softplus", "bias_shift": -1.0},
    "one-layer": {"widths": (3,), "output": "softplus"},
    "deep": {"widths": (6, 5, 4, 2)},
}


def on_device(problem: Problem) -> Problem:
    return replace(
        problem,
        planes=[plane.to(DEVICE) for plane in problem.planes],
        target_planes=[plane.to(DEVICE) for plane in problem.target_planes],
        decoder=problem.decoder.to(DEVICE),
        points=problem.points.to(DEVICE),
    )


def check(layout: TriplaneLayout, grid: Grid, *names: str, **options: object) -> None:
    problem = on_device(Problem.random(layout, grid, **options))
    for name in names or ("density_grid",):
        assert_as_accurate_as_pytorch(problem, name, "triton")


# ---------------------------------------------------------------------------------- the volume


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(LAYOUTS[layout], GRID, batch=2)


@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders(layout: TriplaneLayout, decoder: str) -> None:
    check(layout, GRID, **DECODERS[decoder])


def test_deep_decoder_of_a_product() -> None:
    check(NERFSTUDIO, INSIDE, widths=(6, 5, 1), hidden="silu")


@pytest.mark.parametrize("layout", [EG3D, TRIPOSR], ids=["two-tables", "three-tables"])
def test_sizes_of_real_models(layout: TriplaneLayout) -> None:
    check(layout, INSIDE, sizes=[(9, 18), (20, 5), (9, 9)], channels=32, widths=(64, 5))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (EG3D, (1, 5, 2)),
        (EG3D_CORRECTED, (5, 1, 2)),
        (EG3D, (2, 5, 1)),
        (EG3D_CORRECTED, (1, 1, 1)),
    ],
    ids=str,
)
def test_axes_of_one_point(layout: TriplaneLayout, shape: tuple[int, int, int]) -> None:
    check(layout, replace(INSIDE, shape=shape))


@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
def test_more_than_one_tile(layout: TriplaneLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    family = device_family(torch.device(DEVICE))
    small = {"forward": Tile(16, 8, 1), "backward": Tile(8, 8, 1)}
    tiles = {f"{way} {count}": small[way] for way in small for count in ("two", "three")}
    monkeypatch.setitem(TILES, family, {**TILES[family], **tiles})
    grid = replace(INSIDE, shape=(2, 3, 11))
    launch = forward_launch((1, *grid.shape), 3, False, family)
    assert forward_programs((1, *grid.shape), launch) > 2
    check(layout, grid, widths=(3, 1))


def test_more_than_one_block_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "block", lambda size, most, least=16: least)
    check(LAYOUTS["one-plane"], replace(INSIDE, shape=(1, 2, 18)), channels=17, widths=(18, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_planes(dtype: torch.dtype) -> None:
    planes = random_planes(EG3D, batch=2, dtype=dtype).to(DEVICE)
    decoder = random_decoder(3, (6, 1), torch.float32).to(DEVICE)

    def evaluate(planes: Tensor, double: bool, backend: str) -> tuple[Tensor, Tensor]:
        leaf = planes.clone().requires_grad_()
        model = decoder.to(torch.float64) if double else decoder
        sigma = tk.density_grid(leaf, model, INSIDE, EG3D, backend=backend)
        return sigma.detach(), torch.autograd.grad(sigma.square().sum(), leaf)[0]

    sigma, d_planes = evaluate(planes, False, "triton")
    exact, d_exact = evaluate(planes.double(), True, "reference")
    assert sigma.dtype == torch.float32
    assert d_planes.dtype == dtype
    assert norm_error(sigma, exact) < 1e-6  # nothing but the planes' own rounding
    assert norm_error(d_planes, d_exact.to(dtype).double()) < torch.finfo(dtype).eps / 4


def test_planes_of_any_strides() -> None:
    planes = random_planes(EG3D, batch=2, dtype=torch.float32).to(DEVICE)
    decoder = random_decoder(3, (6, 1), torch.float32).to(DEVICE)
    expected = tk.density_grid(planes, decoder, INSIDE, EG3D, backend="triton")
    for order in ((0, 1, 3, 4, 2), (2, 4, 3, 1, 0)):  # channels last, batch last
        inverse = [order.index(dimension) for dimension in range(5)]
        strided = planes.permute(order).contiguous().permute(inverse)
        sigma = tk.density_grid(strided, decoder, INSIDE, EG3D, backend="triton")
        torch.testing.assert_close(sigma, expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------- where the factored form would not do


def plain_slices(problem: Problem) -> list[bool]:
    weights = list(problem.decoder.weights)
    weights[0] = weights[0] / len(problem.layout.axes)
    field = Field(problem.planes, replace(problem.decoder, weights=tuple(weights)))
    layout = replace(problem.layout, reduce="sum")
    plain = TwoLayerField(field, problem.grid, layout).plain
    assert plain is not None
    return plain.flatten().bool().tolist()


@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
@pytest.mark.parametrize(
    ("scale", "shift", "plain"),
    [(0.3, 0.0, False), (200.0, 0.0, True), (0.3, -3.0, True), (0.3, -60.0, True)],
)
def test_extreme_values(layout: TriplaneLayout, scale: float, shift: float, plain: bool) -> None:
    problem = on_device(Problem.random(layout, INSIDE, scale=scale, shift=shift, widths=(6, 1)))
    # What is far below zero must count: without the last bias sigma is as small as softplus.
    weights, biases = problem.decoder.weights, problem.decoder.biases
    problem = replace(problem, decoder=replace(problem.decoder, biases=(biases[0], 0 * biases[1])))
    assert len(weights) == 2
    assert set(plain_slices(problem)) == {plain}
    assert_as_accurate_as_pytorch(problem, "density_grid", "triton")


@pytest.mark.parametrize("shift", [-0.5, -1.0, -1.45, -2.0])
def test_below_zero_in_the_factored_form(shift: float) -> None:
    """Down to where it is given up, the factored form is accurate."""
    problem = on_device(Problem.random(EG3D, INSIDE, scale=0.2, widths=(64, 1)))
    weights, biases = problem.decoder.weights, problem.decoder.biases
    biases = (torch.full_like(biases[0], shift), torch.zeros_like(biases[1]))
    problem = replace(problem, decoder=replace(problem.decoder, weights=weights, biases=biases))
    assert set(plain_slices(problem)) == {shift < -1.5}
    assert_as_accurate_as_pytorch(problem, "density_grid", "triton")


def test_both_forms_in_one_volume() -> None:
    problem = on_device(Problem.random(EG3D, INSIDE, widths=(6, 1)))
    planes = list(problem.planes)
    # The xy plane's left part, which only the first slice touches.
    planes[0] = torch.cat([3 * LARGEST_OF_TWO * planes[0][..., :2], planes[0][..., 2:]], dim=-1)
    problem = replace(problem, planes=planes)
    assert plain_slices(problem) == [True, False, False]
    assert_as_accurate_as_pytorch(problem, "density_grid", "triton")


@pytest.mark.parametrize("hidden", ["softplus", "relu", "silu"])
@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
def test_nan_in_nan_out(layout: TriplaneLayout, hidden: str) -> None:
    planes = random_planes(layout, dtype=torch.float32).to(DEVICE)
    planes[0, 1, 2, 3, 3] = torch.nan
    decoder = random_decoder(3, (4, 1), torch.float32, hidden=hidden).to(DEVICE)
    expected = tk.density_grid(planes, decoder, INSIDE, layout, backend="reference")
    sigma = tk.density_grid(planes, decoder, INSIDE, layout, backend="triton")
    assert 0 < expected.isnan().sum() < expected.numel()
    torch.testing.assert_close(sigma, expected, equal_nan=True)


# ------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("layout", ["eg3d", "eg3d-corrected", "one-plane", "nerfstudio"])
def test_loss_of_two_fields(layout: str) -> None:
    check(LAYOUTS[layout], INSIDE, "density_grid_loss", widths=(5, 1), output="softplus")


def test_squared_loss_of_two_fields() -> None:
    check(EG3D, INSIDE, "density_grid_loss_l2", widths=(5, 1), output="exp")


@pytest.mark.parametrize(
    ("layout", "kind", "slab"),
    [
        ("eg3d", "l1", None),
        ("eg3d", "l2", 40),
        ("eg3d-corrected", "l1", 40),
        ("two-planes", "l2", None),
        ("nerfstudio", "l1", 40),
    ],
)
def test_loss_of_a_volume(
    layout: str, kind: str, slab: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slab is not None:
        monkeypatch.setattr(density_grid, "SLAB_ELEMENTS", slab)
        monkeypatch.setattr(deep, "ELEMENTS", slab)
    planes = random_planes(LAYOUTS[layout], batch=2, dtype=torch.float32)
    decoder = random_decoder(3, (5, 1), torch.float32, output="softplus")
    volume = torch.rand(2, *reversed(INSIDE.shape), generator=torch.Generator().manual_seed(4))
    volume = volume.transpose(1, 3)
    weight = torch.tensor([0.7, -1.3])

    def evaluate(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in (planes, volume)]
        model = decoder.to(DEVICE, dtype)
        loss = tk.density_grid_loss(
            leaves[0], model, INSIDE, LAYOUTS[layout], leaves[1], kind, backend=backend
        )
        gradients = torch.autograd.grad((loss * weight.to(loss)).sum(), leaves)
        return [loss.detach(), *gradients]

    exact, usual = (evaluate(dtype, "reference") for dtype in (torch.float64, torch.float32))
    for ours, theirs, truth in zip(evaluate(torch.float32, "triton"), usual, exact, strict=True):
        assert norm_error(ours, truth) <= 2 * norm_error(theirs, truth) + 1e-6


@pytest.mark.parametrize("widths", [(9, 1), (4, 5, 1)], ids=["other-width", "deep"])
def test_loss_against_a_field_of_another_shape(widths: tuple[int, ...]) -> None:
    ours, theirs = (
        random_planes(EG3D_CORRECTED, dtype=torch.float64, seed=seed).to(DEVICE) for seed in (1, 2)
    )
    decoder = random_decoder(3, (6, 1)).to(DEVICE)
    other = random_decoder(3, widths, seed=8, hidden="silu").to(DEVICE)

    def evaluate(dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (ours, theirs)]
        loss = tk.density_grid_loss(
            leaves[0],
            decoder.to(dtype),
            INSIDE,
            EG3D_CORRECTED,
            (leaves[1], other.to(dtype)),
            backend=backend,
        )
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    for ours_, exact in zip(
        evaluate(torch.float32, "triton"), evaluate(torch.float64, "reference"), strict=True
    ):
        assert norm_error(ours_, exact) < 2e-6


def test_equal_volumes_have_no_gradient() -> None:
    planes = random_planes(EG3D, dtype=torch.float32).to(DEVICE).requires_grad_()
    decoder = random_decoder(3, (5, 1), torch.float32).to(DEVICE)
    target = (planes.detach(), decoder)
    loss = tk.density_grid_loss(planes, decoder, INSIDE, EG3D, target, backend="triton")
    assert loss.item() == 0
    assert not torch.autograd.grad(loss.sum(), planes)[0].any()


# --------------------------------------------------------------- the backend and its launches


def test_empty_batch() -> None:
    planes = random_planes(EG3D, batch=0, dtype=torch.float32).to(DEVICE).requires_grad_()
    decoder = random_decoder(3, (5, 1), torch.float32, requires_grad=True).to(DEVICE)
    sigma = tk.density_grid(planes, decoder, INSIDE, EG3D, backend="triton")
    assert sigma.shape == (0, *INSIDE.shape)
    target = torch.zeros_like(sigma)
    loss = tk.density_grid_loss(planes, decoder, INSIDE, EG3D, target, backend="triton")
    assert loss.shape == (0,)
    gradients = torch.autograd.grad(sigma.sum() + loss.sum(), [planes, *decoder.weights])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("family", TILES)
@pytest.mark.parametrize("size", [1, 3, 64, 96, 100, 128, 192, 256, 320, 512])
def test_launches_cover_a_volume(family: str, size: int) -> None:
    shape = (2, 7, size, size)
    for has_third in (False, True):
        launch = forward_launch(shape, 64, has_third, family)
        c = launch.constants
        rows, columns = (-(-size // c[name]) for name in ("BLOCK_R", "BLOCK_C"))
        assert forward_programs(shape, launch) == 2 * -(-7 // c["SLICES"]) * rows * columns
        # Blocks that are loaded without masks must lie within the tables' padding.
        assert not c["EVEN"] or max(rows * c["BLOCK_R"], columns * c["BLOCK_C"]) <= padded(size)
        assert 64 % c["UNROLL"] == 0
        c = backward_launch(size, 6, has_third, family).constants
        assert not c["EVEN"] or (6 % c["BLOCK_H"] == 0 and padded(size) % c["BLOCK_C"] == 0)
        assert c["EVEN_VOLUME"] == (size % c["BLOCK_C"] == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
def test_the_same_bits_at_every_run(layout: TriplaneLayout) -> None:
    planes = random_planes(layout, 2, 32, (64, 64), torch.float32).cuda().requires_grad_()
    decoder = random_decoder(32, (64, 1), torch.float32).to("cuda")
    grid = Grid.cube(70, 1.0)

    def gradient() -> Tensor:
        sigma = tk.density_grid(planes, decoder, grid, layout, backend="triton")
        return torch.autograd.grad(sigma.square().sum(), planes)[0]

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(3))


# ------------------------------------------------------------------------ elementary functions


@triton.jit
def _apply(x, y, COUNT: tl.constexpr, NAME: tl.constexpr):
    at = tl.arange(0, COUNT)
    value = tl.load(x + at)
    if NAME == "exp":
        value = elementary.exp(value)
    elif NAME == "sigmoid":
        value = elementary.sigmoid(value)
    elif NAME == "output slope":
        value = elementary.times_output_slope(1.0, value, "softplus")
    else:
        value = elementary.activate(value, NAME)
    tl.store(y + at, value)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("exp", torch.exp),
        ("sigmoid", torch.sigmoid),
        ("softplus", lambda x: F.softplus(x, threshold=50)),
        ("relu", torch.relu),
        ("silu", F.silu),
        ("output slope", lambda x: -torch.expm1(-x)),
    ],
)
def test_elementary_functions(name: str, exact: object) -> None:
    lowest = 0.0 if name == "output slope" else -87.0
    x = torch.linspace(lowest, 88.0, 4096, device=DEVICE)
    x[:3] = torch.tensor([torch.nan, torch.inf, 1e-6])
    y = torch.empty_like(x)
    _apply[(1,)](x, y, 4096, name)
    expected = exact(x.double())
    assert torch.equal(y.isnan(), expected.isnan())
    finite = expected.isfinite() & (expected.abs() > 1e-36)
    torch.testing.assert_close(y[finite].double(), expected[finite], rtol=1e-6, atol=0)
