"""Any layout, any sizes: every backend against float64.

What is looked for is a wrong number, not the last bit of a right one: sums that cancel may have
five times the error that plain PyTorch happens to have.
"""

import dataclasses

import pytest
import torch
from backend_cases import KERNELS, Problem, assert_as_accurate_as_pytorch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import triplane_kernels as tk
from triplane_kernels import Grid, TriplaneLayout

# Not l1: where the difference is next to nothing its gradient depends on the last bit.
OPERATIONS = [*KERNELS[:-1], "density_grid_loss_l2"]
BACKENDS = tk.available_backends("cpu")["density_grid"].available


# No shrinking: a failure already prints its sizes. Derandomised: CI sees the same cases each run.
def cases(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


AXES = st.sampled_from([(a, b) for a in range(3) for b in range(3) if a != b])
LAYOUTS = st.builds(
    TriplaneLayout,
    axes=st.lists(AXES, min_size=1, max_size=4).map(tuple),
    extent=st.tuples(*(st.sampled_from([0.7, 1.0, 1.6]) for _ in range(3))),
    reduce=st.sampled_from(["mean", "sum", "product", "concat", "concat_channel_major"]),
    padding=st.sampled_from(["zeros", "border"]),
    align_corners=st.booleans(),
)


@st.composite
def problems(draw: st.DrawFn, largest: int = 40, hidden_layers: int | None = None) -> Problem:
    """Sizes around those at which vectors, blocks and tiles begin and end."""
    layout = draw(LAYOUTS)
    side = st.integers(1, largest)
    lo = draw(st.tuples(*(st.floats(-0.75, 0.125, width=16) for _ in range(3))))
    size = draw(st.tuples(*(st.sampled_from([0.25, 0.75, 1.5]) for _ in range(3))))
    grid = Grid(
        lo=lo,
        hi=tuple(a + b for a, b in zip(lo, size, strict=True)),
        shape=draw(st.tuples(st.integers(1, 6), side, side)),
    )
    image = st.tuples(st.integers(1, 20), st.integers(1, 20))
    sizes = None
    if draw(st.booleans()):
        sizes = draw(st.lists(image, min_size=len(layout.axes), max_size=len(layout.axes)))
    fewest, most = (0, 3) if hidden_layers is None else (hidden_layers, hidden_layers)
    hidden = draw(st.lists(st.integers(1, largest), min_size=fewest, max_size=most))
    return Problem.random(
        layout,
        grid,
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 20)),
        sizes=sizes,
        widths=(*hidden, draw(st.integers(1, 4))),
        points=draw(st.integers(1, 2 * largest)),
        shared_points=draw(st.booleans()),
        hidden=draw(st.sampled_from(["softplus", "softplus", "relu", "silu"])),
        output=draw(st.sampled_from(["identity", "softplus", "exp"])),
        bias_shift=draw(st.sampled_from([0.0, -1.0])),
    )


def without_product(problem: Problem, name: str) -> Problem:
    """For a backend whose grids cannot multiply."""
    if name.startswith("density_grid") and problem.layout.reduce == "product":
        return dataclasses.replace(
            problem, layout=dataclasses.replace(problem.layout, reduce="sum")
        )
    return problem


@pytest.mark.skipif("cpu" not in BACKENDS, reason="without the C++ extension")
@cases(80)
@given(problem=problems(), name=st.sampled_from(OPERATIONS))
def test_cpu(problem: Problem, name: str) -> None:
    assert_as_accurate_as_pytorch(without_product(problem, name), name, "cpu", slack=5)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton runs neither here nor interpreted")
@cases(8)
@given(problem=problems(largest=9), name=st.sampled_from(OPERATIONS))
def test_triton(problem: Problem, name: str) -> None:
    assert_as_accurate_as_pytorch(problem, name, "triton", slack=5)


@pytest.mark.usefixtures("emulated")
@cases(60)
@given(problem=problems(hidden_layers=1), name=st.sampled_from(OPERATIONS))
def test_cuda(problem: Problem, name: str) -> None:
    assert_as_accurate_as_pytorch(without_product(problem, name), name, "cuda", slack=5)


@cases(60)
@given(problem=problems(largest=12))
def test_reference_grid(problem: Problem) -> None:
    """The separable form is a rearrangement of the point path, in float64 to rounding."""
    ours = problem.evaluate("density_grid", torch.float64, "reference")
    planes = [plane.double() for plane in problem.planes]
    points = problem.grid.points(torch.float64).reshape(1, -1, 3)
    sigma = tk.density(planes, problem.decoder.to(torch.float64), points, problem.layout)
    expected = sigma.unflatten(1, problem.grid.shape)
    largest = expected.abs().max()
    assert (ours["output 0"] - expected).abs().max() <= 1e-11 * largest + 1e-300
