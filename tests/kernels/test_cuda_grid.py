"""Grids by the CUDA kernels, emulated on the CPU: through the public functions, against float64."""

import sys
from dataclasses import replace

import pytest
import torch
from backend_cases import Problem, assert_as_accurate_as_pytorch, norm_error
from cuda_emulation import threads_in_reverse
from kernel_cases import LAYOUTS, random_decoder, random_planes
from torch import Tensor

import triplane_kernels as tk
from triplane_kernels import EG3D, EG3D_CORRECTED, NERFSTUDIO, DensityMLP, Grid, TriplaneLayout
from triplane_kernels.backend import Field

pytestmark = pytest.mark.usefixtures("emulated")

cuda_grid = sys.modules["triplane_kernels.cuda.density_grid"]  # its name is that of a function

GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(5, 4, 7))
WIDE = Grid(lo=(-0.5, -0.4, -0.3), hi=(0.5, 0.4, 0.3), shape=(2, 9, 131))
OPERATIONS = ("density_grid", "density_grid_loss", "density_grid_loss_l2")
TABLES = pytest.mark.parametrize(
    "layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"]
)


def check(layout: TriplaneLayout, grid: Grid, **options: object) -> None:
    problem = Problem.random(layout, grid, **{"widths": (6, 1), **options})
    for name in OPERATIONS:
        assert_as_accurate_as_pytorch(problem, name, "cuda", slack=3)


@pytest.mark.parametrize("layout", [n for n, each in LAYOUTS.items() if each.reduce != "product"])
def test_layouts(layout: str) -> None:
    check(LAYOUTS[layout], GRID, batch=2)


@TABLES
@pytest.mark.parametrize(
    "decoder",
    [
        {"hidden": "silu", "output": "exp"},
        {"hidden": "relu", "output": "softplus", "widths": (7, 4)},
        {"output": "softplus", "bias_shift": -1.0, "widths": (1, 1)},
    ],
    ids=["silu-exp", "relu-softplus", "one-unit"],
)
def test_decoders(layout: TriplaneLayout, decoder: dict[str, object]) -> None:
    check(layout, GRID, **decoder)


@TABLES
@pytest.mark.parametrize(
    "shape", [(1, 5, 2), (5, 1, 1), (16, 8, 64), (2, 70, 34), (9, 33, 36), (1, 3, 270)], ids=str
)
def test_tiles_that_fit_and_that_do_not(
    layout: TriplaneLayout, shape: tuple[int, int, int]
) -> None:
    check(layout, replace(WIDE, shape=shape), widths=(3, 1))


@TABLES
@pytest.mark.parametrize(
    "change",
    [{}, {"scale": 30.0}, {"shift": -9.0}, {"shift": 60.0}],
    ids=["factored", "some-slices-plain", "too-small", "too-large"],
)
def test_forms(layout: TriplaneLayout, change: dict[str, float]) -> None:
    check(layout, WIDE, channels=4, widths=(17, 1), sizes=[(9, 11)] * 3, **change)


@TABLES
def test_slabs(layout: TriplaneLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_grid, "SLAB_ELEMENTS", 1)
    check(layout, replace(GRID, shape=(19, 4, 5)), batch=2, output="exp")


def test_choice_of_form() -> None:
    planes = [torch.zeros(1, 2, 4, 4) for _ in EG3D.axes]
    planes[0][:, :, :, :2] = torch.tensor([60.0, 0.0])[:, None, None]  # where x is negative
    grid, layout = Grid.cube(8, 1.0), replace(EG3D, reduce="sum", padding="border")

    def plain(bias: float) -> list[int]:
        decoder = DensityMLP(
            (torch.eye(2), torch.ones(1, 2)), (torch.full((2,), bias), torch.zeros(1))
        )
        volume = cuda_grid.GridVolume(
            Field(planes, decoder), grid, layout, cuda_grid.LARGEST_FORWARD
        )
        assert volume.plain is not None
        is_plain = volume.plain[0] != 0
        rows = volume.tables.rows[0, :, 1, : grid.shape[1]]
        expected = torch.full_like(rows, bias)
        torch.testing.assert_close(rows[is_plain], expected[is_plain], equal_nan=True)
        torch.testing.assert_close(rows[~is_plain], expected[~is_plain].exp())
        return is_plain.int().tolist()

    assert plain(0.0) == [1, 1, 1, 1, 0, 0, 0, 0]  # too large on one side
    assert plain(-3.0) == [1, 1, 1, 1, 0, 1, 1, 1]  # too small on the other, but for the edge
    assert plain(float("nan")) == [1] * 8


@TABLES
@pytest.mark.parametrize("hidden", ["softplus", "silu"])
def test_nan_stays_where_it_is(layout: TriplaneLayout, hidden: str) -> None:
    planes = random_planes(layout, size=(16, 16), dtype=torch.float32)
    planes[0, 0, 1, 3, 12] = torch.nan
    decoder = random_decoder(3, (6, 1), torch.float32, hidden=hidden)
    grid = Grid.cube(12, layout.extent)
    sigma = tk.density_grid(planes, decoder, grid, layout, backend="cuda")
    exact = tk.density_grid(planes, decoder, grid, layout, backend="reference")
    assert exact.isnan().any()
    assert torch.equal(sigma.isnan(), exact.isnan())
    loss = tk.density_grid_loss(planes, decoder, grid, layout, exact, backend="cuda")
    assert loss.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_planes(dtype: torch.dtype) -> None:
    planes = random_planes(EG3D, batch=2, dtype=dtype)
    decoder = random_decoder(3, (6, 1), torch.float32)

    def evaluate(planes: Tensor, decoder: DensityMLP, backend: str) -> tuple[Tensor, Tensor]:
        leaf = planes.clone().requires_grad_()
        sigma = tk.density_grid(leaf, decoder, GRID, EG3D, backend=backend)
        return sigma.detach(), torch.autograd.grad(sigma.square().sum(), leaf)[0]

    sigma, d_planes = evaluate(planes, decoder, "cuda")
    exact, d_exact = evaluate(planes.double(), decoder.to(torch.float64), "reference")
    assert d_planes.dtype == dtype
    assert norm_error(sigma, exact) < 1e-6
    assert norm_error(d_planes, d_exact) < torch.finfo(dtype).eps


@TABLES
def test_a_volume_as_the_target(layout: TriplaneLayout) -> None:
    planes = random_planes(layout, batch=2, dtype=torch.float32)
    decoder = random_decoder(3, (6, 1), torch.float32)
    volume = torch.randn(2, *GRID.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for backend in ("cuda", "reference"):
        target = volume.clone().requires_grad_()
        leaf = planes.clone().requires_grad_()
        loss = tk.density_grid_loss(leaf, decoder, GRID, layout, target, backend=backend)
        results.append((loss, *torch.autograd.grad(loss.sum(), (leaf, target))))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_empty_batch() -> None:
    planes = torch.zeros(0, 3, 3, 5, 7, requires_grad=True)
    decoder = random_decoder(3, (6, 1), torch.float32, requires_grad=True)
    sigma = tk.density_grid(planes, decoder, GRID, EG3D, backend="cuda")
    assert sigma.shape == (0, *GRID.shape)
    loss = tk.density_grid_loss(planes, decoder, GRID, EG3D, (planes, decoder), backend="cuda")
    gradients = torch.autograd.grad(sigma.sum() + loss.sum(), [planes, *decoder.parameters])
    assert all(not gradient.any() for gradient in gradients)


@TABLES
def test_the_order_of_a_block_s_threads_does_not_matter(layout: TriplaneLayout) -> None:
    problem = Problem.random(layout, replace(WIDE, shape=(3, 9, 70)), widths=(9, 1))
    for name in OPERATIONS:
        expected = problem.evaluate(name, torch.float32, "cuda")
        with threads_in_reverse():
            found = problem.evaluate(name, torch.float32, "cuda")
        for key, value in expected.items():
            assert torch.equal(found[key], value), (name, key)


@pytest.mark.parametrize(
    ("layout", "decoder", "reason"),
    [
        (NERFSTUDIO, {}, "product reductions"),
        (EG3D, {"widths": (4, 4, 1)}, "other than two layers"),
        (EG3D, {"widths": (1025, 1)}, "more than 1024 hidden units"),
    ],
    ids=["product", "deep", "wide"],
)
def test_what_has_no_kernel(
    layout: TriplaneLayout, decoder: dict[str, object], reason: str
) -> None:
    problem = Problem.random(layout, GRID, **decoder)
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run density_grid here: .*{reason}"):
        problem.evaluate("density_grid", torch.float32, "cuda")
