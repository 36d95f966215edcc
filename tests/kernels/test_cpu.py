"""The C++ kernels, in every instruction set that this processor runs."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from backend_cases import KERNELS, Problem, assert_as_accurate_as_pytorch, by_points, norm_error
from kernel_cases import LAYOUTS, random_decoder, random_planes, random_points

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, cpu

_cpu = pytest.importorskip("triplane_kernels._cpu", reason="built without the C++ extension")

GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(5, 4, 7))
WIDE = Grid(lo=(-0.5, -0.4, -0.3), hi=(0.5, 0.4, 0.3), shape=(3, 19, 70))
LARGE = {"sizes": [(9, 18), (20, 5), (9, 9)], "channels": 32, "widths": (64, 5), "points": 150}

DECODERS = {
    "eg3d": {"widths": (6, 4)},
    "one-layer": {"widths": (3,)},
    "deep-silu-exp": {"widths": (5, 6, 4, 2), "hidden": "silu", "output": "exp"},
    "relu-softplus": {"widths": (8, 1), "hidden": "relu", "output": "softplus"},
    "deep-softplus": {"widths": (17, 9, 2), "bias_shift": -1.0},
}


@pytest.fixture(params=_cpu.runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


def applies(name: str, problem: Problem) -> bool:
    return not (name.startswith("density_grid") and cpu.why_not_grid(problem.layout))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small(layout: str, decoder: str) -> None:
    problem = Problem.random(LAYOUTS[layout], GRID, batch=2, **DECODERS[decoder])
    for name in (*KERNELS, "density_grid_loss_l2"):
        if applies(name, problem):
            assert_as_accurate_as_pytorch(problem, name, "cpu")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["eg3d", "eg3d-corrected", "openlrm", "crm", "ssdnerf"])
def test_whole_vectors_and_rests(layout: str) -> None:
    problem = Problem.random(LAYOUTS[layout], WIDE, shared_points=True, **LARGE)
    for name in KERNELS:
        assert_as_accurate_as_pytorch(problem, name, "cpu")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["eg3d", "eg3d-corrected"])
@pytest.mark.parametrize(
    "change",
    [
        {"scale": 30.0},  # |pre-activation| beyond what a factored exponential can hold
        {"shift": 60.0},
        {"shift": -60.0},
        {"shift": -9.0},  # every softplus tiny: 1 + e^x would lose it
        {"scale": 3.0, "shift": -35.0},  # some slices within the range and some not
    ],
    ids=str,
)
def test_pre_activations_of_any_size(layout: str, change: dict[str, float]) -> None:
    problem = Problem.random(LAYOUTS[layout], WIDE, channels=16, widths=(24, 1), **change)
    without = dataclasses.replace(problem.decoder, biases=(problem.decoder.biases[0], None))
    problem = dataclasses.replace(problem, decoder=without)
    for name in ("density", "density_grid", "density_grid_loss_l2"):
        assert_as_accurate_as_pytorch(problem, name, "cpu")


@pytest.mark.usefixtures("isa")
def test_a_deep_decoder_of_triposr_s_size() -> None:
    problem = Problem.random(
        tk.TRIPOSR, GRID, channels=40, widths=(*(64,) * 9, 4), hidden="silu", output="exp"
    )
    for name in KERNELS:
        assert_as_accurate_as_pytorch(problem, name, "cpu")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 2), (9, 1, 3), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("layout", ["eg3d", "eg3d-corrected", "one-plane", "two-planes"])
def test_thin_grids(layout: str, shape: tuple[int, int, int]) -> None:
    grid = Grid(lo=(-0.3, -0.2, 0.1), hi=(0.4, 0.3, 0.6), shape=shape)
    problem = Problem.random(LAYOUTS[layout], grid)
    assert_as_accurate_as_pytorch(problem, "density_grid", "cpu")


@pytest.mark.usefixtures("isa")
def test_gradients_are_right_where_only_some_are_wanted() -> None:
    problem = Problem.random(tk.EG3D, GRID)
    planes = torch.stack(problem.planes, dim=1)

    def gradient(planes_too: bool, decoder_too: bool, points_too: bool) -> list[torch.Tensor]:
        inputs = [planes.clone().requires_grad_(planes_too)]
        decoder = problem.decoder.to(torch.float32)
        weight = decoder.weights[0].clone().requires_grad_(decoder_too)
        decoder = dataclasses.replace(decoder, weights=(weight, decoder.weights[1]))
        points = problem.points.clone().requires_grad_(points_too)
        inputs += [weight, points]
        total = tk.density(inputs[0], decoder, points, tk.EG3D).square().sum()
        if planes_too or decoder_too:
            total = total + tk.density_grid(inputs[0], decoder, GRID, tk.EG3D).square().sum()
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        return list(torch.autograd.grad(total, wanted))

    d_planes, d_weight, d_points = gradient(True, True, True)
    assert torch.equal(gradient(True, False, False)[0], d_planes)
    assert torch.equal(gradient(False, True, False)[0], d_weight)
    assert torch.equal(gradient(False, False, True)[0], d_points)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_nan_and_infinity_stay_where_they_belong(padding: str) -> None:
    layout = dataclasses.replace(tk.EG3D_CORRECTED, padding=padding)
    planes, decoder = (
        random_planes(layout, size=(8, 8), dtype=torch.float32),
        random_decoder(3, dtype=torch.float32),
    )
    spoilt = planes.clone()
    spoilt[0, 0, 0, 2, 5] = torch.nan
    grid = Grid.cube(8, 0.875)  # grid points are pixel centres
    ours = tk.density_grid(spoilt, decoder, grid, layout, backend="cpu")
    expected = tk.density_grid(spoilt, decoder, grid, layout, backend="reference")
    assert torch.equal(ours.isnan(), expected.isnan())
    assert 0 < ours.isnan().sum() < ours.numel()

    points = random_points(70, scale=0.4, dtype=torch.float32)
    points[0, 1, 0], points[0, 2, 1], points[0, 3, 2] = torch.nan, torch.inf, -torch.inf
    sigma, gradient = tk.density_gradient(planes, decoder, points, layout, backend="cpu")
    expected, slope = tk.density_gradient(planes, decoder, points, layout, backend="reference")
    assert torch.equal(sigma.isnan(), expected.isnan())
    assert torch.equal(gradient.isnan(), slope.isnan())
    finite = ~expected.isnan()
    assert norm_error(sigma[finite], expected[finite]) < 1e-6
    assert norm_error(gradient[finite], slope[finite]) < 1e-5


@pytest.mark.usefixtures("isa")
def test_the_exponential_overflows_as_it_should() -> None:
    # A density of exp(raw) with raw on both sides of what a float can hold.
    ramp = torch.tensor([-120.0, -88.0, 0.0, 88.0, 88.6, 120.0]).expand(1, 1, 1, 6, 6)
    decoder = DensityMLP([torch.ones(1, 1)], [None], output="exp")
    layout = tk.TriplaneLayout(((0, 1),), 1.0, padding="border")
    points = torch.zeros(1, 6, 3)
    points[0, :, 0] = (torch.arange(6) + 0.5) / 6 - 0.5
    sigma = tk.density(ramp, decoder, points, layout, backend="cpu")[0]
    assert sigma[0] == 0
    assert sigma[-1] == torch.inf
    expected = torch.tensor([0.0, 88.0, 88.6]).double().exp()
    assert ((sigma[2:5].double() - expected).abs() / expected).max() < 1e-5


@pytest.mark.parametrize("name", [*KERNELS, "density_gradient"])
def test_the_number_of_threads_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WORK_PER_THREAD", 1)
    problem = Problem.random(tk.EG3D_CORRECTED, WIDE, batch=2, **LARGE)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            results.append(problem.evaluate(name, torch.float32, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


def test_many_points_scatter_in_chunks() -> None:
    # More than the kernel holds at a time, all in a few pixels.
    problem = Problem.random(tk.EG3D, GRID, points=70_000, channels=2, widths=(3, 1))
    assert_as_accurate_as_pytorch(problem, "density", "cpu")


@pytest.mark.parametrize("shared", [False, True], ids=["own points", "shared points"])
@pytest.mark.parametrize("name", ["sample_features", "radiance"])
def test_many_points_in_large_images_are_sorted_and_returned_in_order(
    name: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.random(
        tk.TRIPOSR,
        GRID,
        batch=2,
        channels=4,
        sizes=[(80, 70), (90, 75), (71, 83)],
        points=33_000,
        shared_points=shared,
    )
    assert_as_accurate_as_pytorch(problem, name, "cpu")
    one = problem.evaluate(name, torch.float32, "cpu")
    monkeypatch.setattr(cpu, "WORK_PER_THREAD", 2**60)
    other = problem.evaluate(name, torch.float32, "cpu")
    assert all(torch.equal(other[key], value) for key, value in one.items())


def test_sorting_survives_points_that_are_nowhere() -> None:
    planes = random_planes(tk.EG3D, channels=16, size=(80, 80), dtype=torch.float32)
    decoder = random_decoder(16, dtype=torch.float32)
    points = random_points(40_000, scale=2.0, dtype=torch.float32)
    points[0, ::1000, 0] = torch.nan
    points[0, 1::1000, 0] = torch.inf
    points[0, 2::1000, 0] = -torch.inf
    ours = tk.density(planes, decoder, points, tk.EG3D, backend="cpu")
    expected = tk.density(planes, decoder, points, tk.EG3D, backend="reference")
    assert torch.equal(ours.isnan(), expected.isnan())
    assert norm_error(ours.nan_to_num(), expected.nan_to_num()) < 1e-6


def test_instruction_sets_agree() -> None:
    problem = Problem.random(tk.EG3D, WIDE, **LARGE)
    before, volumes = _cpu.isa(), []
    for isa in _cpu.runnable_isas():
        _cpu.use_isa(isa)
        volumes.append(problem.evaluate("density_grid", torch.float32, "cpu")["output 0"])
    _cpu.use_isa(before)
    for volume in volumes[1:]:
        assert norm_error(volume, volumes[0]) < 1e-6


def test_the_grid_is_as_exact_as_its_voxels() -> None:
    # Against the usual path proper, voxel by voxel in float32, and not the separable reference.
    problem = Problem.random(tk.EG3D, Grid.cube(23, 1.0), **LARGE)
    problem = dataclasses.replace(problem, stacked=False)
    exact = by_points(problem, torch.float64)
    planes = problem.planes
    ours = tk.density_grid(planes, problem.decoder, problem.grid, tk.EG3D, backend="cpu")
    assert (
        norm_error(ours, exact) <= 2 * norm_error(by_points(problem, torch.float32), exact) + 1e-6
    )


def test_an_instruction_set_is_named_or_refused() -> None:
    assert cpu.isa() == _cpu.isa()
    with pytest.raises(ValueError, match=r"This processor and build run .*, not 'mmx'"):
        _cpu.use_isa("mmx")
    code = "from triplane_kernels import cpu; print(cpu.isa())"
    worst = _cpu.runnable_isas()[-1]
    environment = os.environ | {"DENSITYRL_ISA": worst}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == worst


def test_without_the_extension_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_missing", "the C++ extension is not there")
    problem = Problem.random(tk.EG3D, GRID)
    choice = tk.available_backends("cpu")["density_grid"]
    assert choice.chosen == "reference"
    assert "the C++ extension is not there" in choice.why
    ours, expected = (
        problem.evaluate("density_grid", torch.float32, b)["output 0"]
        for b in ("auto", "reference")
    )
    assert torch.equal(ours, expected)
    with pytest.raises(RuntimeError, match="'cpu' cannot run density here: the C\\+\\+ extension"):
        problem.evaluate("density", torch.float32, "cpu")


def test_a_grid_needs_memory_for_its_tables_and_no_more() -> None:
    """Peak memory of a process that makes a 96^3 volume, less that of one that makes 8^3."""
    code = """
import resource, sys, torch
from triplane_kernels import EG3D, DensityMLP, Grid, density_grid
torch.manual_seed(0)
n = int(sys.argv[1])
planes = torch.randn(1, 3, 32, 64, 64, requires_grad=True)
decoder = DensityMLP([torch.randn(64, 32), torch.randn(1, 64)], [torch.randn(64), torch.randn(1)])
sigma = density_grid(planes, decoder, Grid.cube(n, 1.0), EG3D, backend="cpu")
sigma.backward(torch.ones(()).expand(sigma.shape).contiguous())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peak = {
        n: int(
            subprocess.run(
                [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True
            ).stdout
        )
        * 1024
        for n in (8, 96)
    }
    volume, table = 4 * 96**3, 4 * 96**2 * 64
    # The volume and its gradient; a few tables; a tenth of the 226 MB that all softplus would be.
    assert peak[96] - peak[8] < 2 * volume + 6 * table
