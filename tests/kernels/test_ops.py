"""What all operations share: dtypes, autocast, compilation, checks, the choice of a backend."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import random_decoder, random_planes, random_points
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, ops, reference
from triplane_kernels.ops import OPERATIONS

GRID = Grid(lo=(-0.4, -0.3, -0.5), hi=(0.35, 0.4, 0.2), shape=(4, 3, 5))
LAYOUT = tk.EG3D


def call(name: str, planes: Tensor, decoder: DensityMLP, points: Tensor, **options: str) -> Tensor:
    """Any operation by its name; of several results the last."""
    if name == "sample_features":
        return tk.sample_features(planes, points, LAYOUT, **options)
    if name == "density_grid":
        return tk.density_grid(planes, decoder, GRID, LAYOUT, **options)
    if name == "density_grid_loss":
        target = (planes.flip(0), decoder)
        return tk.density_grid_loss(planes, decoder, GRID, LAYOUT, target, **options)
    result = getattr(tk, name)(planes, decoder, points, LAYOUT, **options)
    return result if isinstance(result, Tensor) else result[-1]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, DensityMLP, Tensor]:
    planes = random_planes(LAYOUT, batch=2, dtype=dtype)
    return planes, random_decoder(3, dtype=dtype), random_points(6, batch=2, dtype=dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_is_read_and_computed_with_in_float32(name: str, half: torch.dtype) -> None:
    planes, decoder, points = inputs()
    planes = planes.to(half).requires_grad_()
    result = call(name, planes, decoder.to(half), points)
    expected = call(name, planes.float(), decoder.to(half).to(torch.float32), points)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), planes)
    assert gradient.dtype == half


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_float64_input_makes_everything_float64(name: str) -> None:
    planes, decoder, points = inputs()
    result = call(name, planes.double(), decoder, points)
    assert result.dtype == torch.float64
    expected = call(name, planes.double(), decoder.to(torch.float64), points.double())
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name: str) -> None:
    arguments = inputs()
    expected = call(name, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(name, *arguments)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_to_one_graph(name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(reference, "POINTS_PER_CHUNK", 8)
        monkeypatch.setattr(reference, "GRID_ELEMENTS_PER_CHUNK", 1)
    planes, decoder, points = inputs(torch.float64)
    planes.requires_grad_()
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend="eager")
    result, expected = (run(name, planes, decoder, points) for run in (compiled, call))
    assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
    ours, theirs = (
        torch.autograd.grad((output * weights).sum(), planes)[0] for output in (result, expected)
    )
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_grad_gives_the_same_numbers(name: str) -> None:
    planes, decoder, points = inputs()
    expected = call(name, planes.requires_grad_(), decoder, points)
    with torch.no_grad():
        result = call(name, planes, decoder, points)
    assert expected.requires_grad
    assert not result.requires_grad
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backend_is_named_or_refused(name: str) -> None:
    arguments = inputs()
    chosen = tk.available_backends("cpu")[name].chosen
    named = call(name, *arguments, backend=chosen)
    assert torch.equal(named, call(name, *arguments, backend="auto"))
    with pytest.raises(RuntimeError, match=f"backend='cuds' cannot run {name}: .*'reference'"):
        call(name, *arguments, backend="cuds")
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run .*: it computes in float32"):
        call(name, *inputs(torch.float64), backend="cpu")


def test_triton_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(ops, "_TRITON_INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run density here: it computes on a G"):
        call("density", *inputs(), backend="triton")
    monkeypatch.setattr(ops, "_TRITON_INSTALLED", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        call("density", *inputs(), backend="triton")


def test_available_backends_covers_every_operation() -> None:
    report = tk.available_backends("cpu")
    assert tuple(report) == OPERATIONS
    for choice in report.values():
        assert choice.chosen in choice.available
        assert "reference" in choice.available
        assert choice.why


PLANES, DECODER, POINTS = inputs()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"planes": PLANES[0]}, ValueError, r"must be \[B, P, C, H, W\], got \[3, 3, 5, 7\]"),
        ({"planes": PLANES[:, :2]}, ValueError, "layout has 3 planes, but planes has 2"),
        ({"planes": [PLANES[:, 0]]}, ValueError, "layout has 3 planes, but planes has 1"),
        ({"planes": [PLANES] * 3}, ValueError, r"sequence of planes must be \[B, C, H, W\]"),
        (
            {"planes": [PLANES[:, 0], PLANES[:1, 1], PLANES[:, 2]]},
            ValueError,
            "same batch and channels",
        ),
        ({"planes": PLANES[..., :0]}, ValueError, "must not be empty images"),
        ({"planes": PLANES.int()}, TypeError, "planes must be floating point, got torch.int32"),
        ({"planes": PLANES.to("meta")}, ValueError, "on cpu, but the planes are on meta"),
        ({"planes": PLANES[:, :, :2]}, ValueError, "takes 3 channels, .* layout give 2"),
        ({"decoder": random_decoder(4)}, ValueError, "takes 4 channels, .* layout give 3"),
        ({"decoder": DECODER.to("meta")}, ValueError, "decoder is on meta"),
        ({"points": POINTS[0]}, ValueError, r"points must be \[B, M, 3\], got \[6, 3\]"),
        ({"points": POINTS[..., :2]}, ValueError, r"points must be \[B, M, 3\]"),
        ({"points": POINTS.repeat(2, 1, 1)}, ValueError, "batch of 2, or 1, got"),
        ({"points": POINTS.long()}, TypeError, "points must be floating point"),
        ({"points": POINTS.to("meta")}, ValueError, "points is on meta"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, error: type, message: str) -> None:
    arguments = {"planes": PLANES, "decoder": DECODER, "points": POINTS} | change
    with pytest.raises(error, match=message):
        tk.density(**arguments, layout=LAYOUT)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 5), ValueError, r"must be \[2, 4, 3, 5\], got \[2, 3, 4, 5\]"),
        (torch.zeros(2, 4, 3, 5, dtype=torch.int32), TypeError, "target must be floating point"),
        ((PLANES,), TypeError, r"a volume or a pair \(planes, decoder\)"),
        ((PLANES[:1], DECODER), ValueError, "batch of 2, got 1"),
        ((PLANES, random_decoder(4)), ValueError, "takes 4 channels"),
    ],
)
def test_refuses_a_target_that_does_not_fit(target: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tk.density_grid_loss(PLANES, DECODER, GRID, LAYOUT, target)


def test_refuses_an_unknown_kind_of_loss() -> None:
    with pytest.raises(ValueError, match="kind must be 'l1' or 'l2', got 'huber'"):
        tk.density_grid_loss(PLANES, DECODER, GRID, LAYOUT, torch.zeros(2, 4, 3, 5), "huber")
