"""The kernels on a GPU, through the public functions, against float64 on the CPU."""

import dataclasses

import pytest
import torch
from backend_cases import KERNELS, Problem, assert_as_accurate_as_pytorch, norm_error
from kernel_cases import LAYOUTS

import triplane_kernels as tk
from triplane_kernels import Grid

pytestmark = pytest.mark.gpu

BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"])

GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(5, 4, 7))
WIDE = Grid(lo=(-0.5, -0.4, -0.3), hi=(0.5, 0.4, 0.3), shape=(6, 50, 131))
EG3D_SIZE = {"channels": 32, "widths": (64, 1), "sizes": [(60, 75)] * 3, "points": 3001}

DECODERS = {
    "eg3d": {"widths": (6, 4)},
    "one-layer": {"widths": (3,)},
    "deep-silu-exp": {"widths": (5, 6, 4, 2), "hidden": "silu", "output": "exp"},
    "relu-softplus": {"widths": (8, 1), "hidden": "relu", "output": "softplus"},
}


@pytest.fixture(autouse=True)
def _exact_float32():
    """PyTorch's own products, for decoders that take them, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _the_backend_is_there(request: pytest.FixtureRequest) -> None:
    """A kernel that is missing is an error on a GPU machine only if it was asked for."""
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        choice = tk.available_backends("cuda")["density_grid"]
        if backend not in choice.available:
            pytest.skip(f"no {backend} backend here")


def test_auto_takes_triton() -> None:
    for choice in tk.available_backends("cuda").values():
        assert choice.chosen == "triton"


def check(problem: Problem, backend: str) -> None:
    for name in (*KERNELS[:-1], "density_grid_loss_l2"):
        assert_as_accurate_as_pytorch(problem, name, backend, slack=5, device="cuda")


@pytest.mark.parametrize(
    ("layout", "decoder"),
    [  # every kernel once: each combination is compiled anew, which takes seconds
        *((layout, "eg3d") for layout in ("eg3d", "triposr", "crm", "nerfstudio", "one-plane")),
        *(("eg3d", decoder) for decoder in DECODERS if decoder != "eg3d"),
        ("triposr", "relu-softplus"),
    ],
)
def test_small_triton(layout: str, decoder: str) -> None:
    check(Problem.random(LAYOUTS[layout], GRID, batch=2, **DECODERS[decoder]), "triton")


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("layout", [n for n, each in LAYOUTS.items() if each.reduce != "product"])
@pytest.mark.parametrize(
    "decoder", [{"widths": (6, 1)}, {"widths": (7, 4), "hidden": "silu", "output": "exp"}], ids=str
)
def test_small_cuda(layout: str, decoder: dict[str, object], backend: str) -> None:
    check(Problem.random(LAYOUTS[layout], GRID, batch=2, **decoder), backend)


@BACKENDS
@pytest.mark.parametrize("layout", ["eg3d", "eg3d-corrected"])
@pytest.mark.parametrize("change", [{}, {"scale": 30.0}, {"shift": -9.0}, {"shift": 60.0}], ids=str)
def test_eg3d_s_width(layout: str, change: dict[str, float], backend: str) -> None:
    check(Problem.random(LAYOUTS[layout], WIDE, **EG3D_SIZE, **change), backend)


@BACKENDS
@pytest.mark.parametrize("name", [*KERNELS, "density_gradient"])
def test_deterministic_results_repeat_to_the_bit(name: str, backend: str) -> None:
    problem = Problem.random(tk.EG3D, WIDE, **EG3D_SIZE)
    assert torch.are_deterministic_algorithms_enabled()
    first, second = (problem.evaluate(name, torch.float32, backend, "cuda") for _ in range(2))
    assert all(torch.equal(second[key], value) for key, value in first.items())


@BACKENDS
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_planes(half: torch.dtype, backend: str) -> None:
    problem = Problem.random(tk.EG3D, WIDE, **EG3D_SIZE)
    planes = torch.stack(problem.planes, dim=1).to("cuda", half)
    decoder = problem.decoder.to("cuda")
    for evaluate, where in ((tk.density, problem.points.cuda()), (tk.density_grid, problem.grid)):
        ours = evaluate(planes, decoder, where, tk.EG3D, backend=backend)
        exact = evaluate(
            planes.double(), decoder.to(torch.float64), where, tk.EG3D, backend="reference"
        )
        assert ours.dtype == torch.float32
        assert norm_error(ours, exact) < 5e-6


def test_another_stream() -> None:
    """What is enqueued on the caller's stream waits for what is there already."""
    problem = Problem.random(tk.EG3D, WIDE, **EG3D_SIZE)
    planes, decoder = torch.stack(problem.planes, dim=1).cuda(), problem.decoder.to("cuda")
    expected = tk.density_grid(2 * planes, decoder, problem.grid, tk.EG3D, backend="reference")
    late = torch.zeros_like(planes)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(planes).mul_(2)
        for backend in tk.available_backends("cuda")["density_grid"].available:
            sigma = tk.density_grid(late, decoder, problem.grid, tk.EG3D, backend=backend)
            assert norm_error(sigma.cpu(), expected.cpu()) < 1e-5


def test_compiles_to_one_graph() -> None:
    problem = Problem.random(tk.EG3D, WIDE, **EG3D_SIZE)
    planes = torch.stack(problem.planes, dim=1).cuda().requires_grad_()
    decoder = problem.decoder.to("cuda")

    def step(planes: torch.Tensor) -> torch.Tensor:
        sigma = tk.density_grid(planes.tanh(), decoder, problem.grid, tk.EG3D)
        return sigma.square().mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        (gradient,) = torch.autograd.grad(function(planes), planes)
        results.append(gradient)
    assert norm_error(*results) < 1e-6


@BACKENDS
def test_second_derivatives(backend: str) -> None:
    problem = Problem.random(tk.EG3D, GRID, channels=4, points=40)

    def eikonal(dtype: torch.dtype, device: str, backend: str) -> torch.Tensor:
        planes = torch.stack(problem.planes, dim=1).to(device, dtype).requires_grad_()
        decoder = problem.decoder.to(device, dtype)
        points = problem.points.to(device, dtype)
        _, slope = tk.density_gradient(planes, decoder, points, tk.EG3D, backend=backend)
        return torch.autograd.grad((slope.norm(dim=-1) - 1).square().sum(), planes)[0].cpu()

    exact = eikonal(torch.float64, "cpu", "reference")
    assert norm_error(eikonal(torch.float32, "cuda", backend), exact) < 1e-4


@BACKENDS
def test_more_than_2_31_voxels_in_a_batch(backend: str) -> None:
    # 9 samples of 640 x 640 x 600: the last voxels lie beyond what 32 bits address.
    grid = Grid(lo=(-0.5, -0.5, -0.5), hi=(0.5, 0.5, 0.5), shape=(640, 640, 600))
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    problem = Problem.random(tk.EG3D, grid, batch=9, channels=4, widths=(8, 1))
    planes, decoder = torch.stack(problem.planes, dim=1).cuda(), problem.decoder.to("cuda")
    sigma = tk.density_grid(planes, decoder, grid, tk.EG3D, backend=backend)
    end = dataclasses.replace(grid, lo=(grid.hi[0], *grid.lo[1:]), shape=(1, 640, 600))
    expected = tk.density_grid(planes, decoder, end, tk.EG3D, backend="reference")
    assert norm_error(sigma[:, -1:], expected) < 1e-5
