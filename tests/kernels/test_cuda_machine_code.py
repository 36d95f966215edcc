"""What nvcc made of the CUDA kernels: the installed extension's code, counted without a GPU.

A register that is spilled, or an instruction more in the inner loop, is time that no test of the
numbers sees.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import cuda_code
import sass

try:
    cuda_code.extension()
    for _tool in ("cuobjdump", "nvdisasm"):
        sass.tool(_tool)
except FileNotFoundError as _error:
    pytest.skip(str(_error), allow_module_level=True)

THREADS = 256  # of a block on a grid
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def hopper() -> dict[str, sass.Function]:
    return cuda_code.kernels("sm_90")


@pytest.fixture(scope="module")
def loops() -> dict[str, dict[str, float]]:
    return cuda_code.grid_loops("sm_90")


def test_nothing_is_spilled_on_hopper(hopper: dict[str, sass.Function]) -> None:
    spilled = {name: kernel.stack_bytes for name, kernel in hopper.items() if kernel.stack_bytes}
    assert not spilled


@pytest.mark.parametrize(
    ("kernel", "blocks"),  # of a multiprocessor
    [
        ("density_kernel<TwoTables<1>>", 3),
        ("density_kernel<TwoTables<2>>", 3),
        ("density_kernel<ThreeTables>", 2),
        ("loss_kernel<TwoTables<1>>", 3),
        ("loss_kernel<TwoTables<2>>", 2),
        ("sweep_kernel<true, two, true, 8>", 2),
        ("sweep_kernel<true, two, false, 8>", 2),
        ("sweep_kernel<true, three, true, 8>", 2),
        ("sweep_kernel<true, third, false, 8>", 2),
    ],
)
def test_registers(hopper: dict[str, sass.Function], kernel: str, blocks: int) -> None:
    assert hopper[kernel].registers * THREADS * blocks <= REGISTERS


@pytest.mark.parametrize(
    ("tile", "special", "fp32", "issued"),
    [
        ("TwoTables<1>", 13 / 16, 4, 6.25),
        ("TwoTables<2>", 25 / 32, 4.1, 6.25),
        ("ThreeTables", 7 / 8, 4.25, 7),
    ],
)
def test_forward(
    loops: dict[str, dict[str, float]], tile: str, special: float, fp32: float, issued: float
) -> None:
    """Less than one special-function operation a voxel and unit; the rest on the FP32 units."""
    loop = loops[f"density_kernel<{tile}>"]
    assert loop["special"] == special
    assert loop["fp32"] <= fp32
    assert sum(loop.values()) <= issued
    assert not {"shared", "barrier", "global store", "local"} & set(loop)


@pytest.mark.parametrize(
    ("sweep", "special", "issued"),
    [
        ("two, true, 8", 21 / 16, 10.75),
        ("two, false, 8", 1 / 2, 6.75),
        ("three, true, 8", 23 / 16, 11.75),
        ("three, false, 8", 1 / 2, 8.75),
        ("third, false, 8", 1 / 2, 8.5),
    ],
)
def test_backward(
    loops: dict[str, dict[str, float]], sweep: str, special: float, issued: float
) -> None:
    """Half a reciprocal a voxel and unit; with the decoder's gradient, a logarithm as well."""
    loop = loops[f"sweep_kernel<true, {sweep}>"]
    assert loop["special"] == special
    assert sum(loop.values()) <= issued
    assert loop.get("shuffle", 0) <= 1 / 8
    assert not {"shared", "barrier", "atomic", "local"} & set(loop)


@pytest.mark.parametrize("number", ["Number 0, 4", "Number 1, 8", "Number 2, 8"])
def test_points(hopper: dict[str, sass.Function], number: str) -> None:
    """Two blocks of 256 threads a multiprocessor; the first layer on the tensor cores."""
    for kernel in ("density_kernel", "radiance_kernel"):
        code = hopper[f"{kernel}<Vectors<{number}>>"]
        assert code.registers * THREADS * 2 <= REGISTERS
        assert code.instructions["matrix"] >= 48
        assert code.shared_bytes <= 48 * 2**10
    backward = hopper[f"radiance_backward_kernel<Vectors<{number}>>"]
    assert backward.instructions["matrix"] >= 48
    assert not backward.instructions["atomic"]


def test_gradients_of_planes_are_added_four_channels_at_a_time(
    hopper: dict[str, sass.Function],
) -> None:
    for points in ("true", "false"):
        code = hopper[f"features_backward_kernel<Vectors<Number 0, 4>, {points}>"]
        # A lane has 2 vectors of 4 channels, of 4 points with 4 corners each.
        assert 0 < code.instructions["atomic"] <= 32


def test_older_gpus_are_served_too() -> None:
    """With all logarithms on the special-function unit: FP32 units are too few for polynomials."""
    assert set(cuda_code.kernels("sm_80")) == set(cuda_code.kernels("sm_90"))
    loops = cuda_code.grid_loops("sm_80")
    assert loops["density_kernel<TwoTables<2>>"]["special"] == 1
    assert loops["sweep_kernel<true, two, true, 8>"]["special"] == 3 / 2
