"""What the Triton kernels become on GPUs: compiled here, without one, and counted.

A register that is spilled, or an instruction more in the inner loop, is time that no test of the
numbers sees. `bench/machine_code.py` compiles what the public functions launch, in a process of
its own: this one may have Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import machine_code
from machine_code import MachineCode

HOPPER = {
    "points eg3d",
    "points eg3d with colours",
    "points ssdnerf",
    "points triposr",
    "grid eg3d",
    "grid eg3d, planes only",
    "grid eg3d corrected",
}
OTHERS = {"points eg3d", "grid eg3d"}


def compiled(target: str, workloads: set[str]) -> list[MachineCode]:
    """Skips where the installed Triton does not know the target's vendor."""
    from triton.backends import backends

    if ("nvidia" if target.startswith("cuda") else "amd") not in backends:
        pytest.skip(f"this Triton does not compile for {target}")
    arguments = [argument for name in sorted(workloads) for argument in ("--workload", name)]
    process = subprocess.run(
        [sys.executable, machine_code.__file__, "--target", target, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [MachineCode(**kernel) for kernel in json.loads(process.stdout)]


@pytest.fixture(scope="module")
def hopper() -> list[MachineCode]:
    return compiled("cuda:90", HOPPER)


def find(codes: list[MachineCode], workload: str, kernel: str) -> list[MachineCode]:
    found = [code for code in codes if (code.workload, code.kernel) == (workload, kernel)]
    assert found
    return found


def assert_nothing_is_spilled(codes: list[MachineCode]) -> None:
    assert {code.workload for code in codes} >= OTHERS
    spilled = [code for code in codes if code.spills or code.stack_bytes]
    assert not spilled


def test_nothing_is_spilled_on_hopper(hopper: list[MachineCode]) -> None:
    assert_nothing_is_spilled(hopper)


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
def test_nothing_is_spilled_elsewhere(target: str) -> None:
    assert_nothing_is_spilled(compiled(target, OTHERS))


@pytest.mark.parametrize(
    ("workload", "kernel", "most"),
    [  # 65536 registers a multiprocessor
        ("grid eg3d", "density_kernel", 96),  # 5 programs of 4 warps
        ("grid eg3d corrected", "density_kernel", 128),  # 2 programs of 8 warps
        ("grid eg3d", "density_backward_kernel", 168),  # 12 programs of a warp
        ("points eg3d", "_radiance_kernel", 168),  # 3 programs of 4 warps
        ("points eg3d with colours", "_radiance_kernel", 168),  # 3
        ("points eg3d", "_decoder_backward_kernel", 255),  # 2
        ("points eg3d", "_features_backward_kernel", 64),  # 8
    ],
)
def test_registers(hopper: list[MachineCode], workload: str, kernel: str, most: int) -> None:
    assert max(code.registers for code in find(hopper, workload, kernel)) <= most


@pytest.mark.parametrize(
    ("workload", "fp32", "issued"), [("grid eg3d", 2, 4), ("grid eg3d corrected", 3, 5.5)]
)
def test_a_grid_takes_one_logarithm_a_voxel_and_unit(
    hopper: list[MachineCode], workload: str, fp32: float, issued: float
) -> None:
    (code,) = find(hopper, workload, "density_kernel")
    loop = code.grid_loop()
    assert loop["special"] == 1
    assert loop["fp32"] <= fp32
    assert sum(loop.values()) <= issued
    assert not {"shared", "barrier", "global store"} & set(loop)


def test_the_backward_of_a_grid(hopper: list[MachineCode]) -> None:
    """A reciprocal a voxel and unit, and with the decoder's gradient a logarithm as well."""

    def loop(workload: str) -> dict[str, float]:
        codes = find(hopper, workload, "density_backward_kernel")
        (code,) = (code for code in codes if code.arguments["FORM"] == "factored")
        return code.grid_loop()

    with_decoder, without = loop("grid eg3d"), loop("grid eg3d, planes only")
    assert (without["special"], with_decoder["special"]) == (1, 2)
    assert without["fp32"] <= 6.25
    assert with_decoder["fp32"] <= 7.25
    assert with_decoder["shuffle"] <= 0.65


@pytest.mark.parametrize("workload", sorted(name for name in HOPPER if name.startswith("points")))
def test_decoders_at_points_run_on_the_matrix_units(
    hopper: list[MachineCode], workload: str
) -> None:
    codes = [code for code in hopper if code.workload == workload]
    decoders = [code for code in codes if "features" not in code.kernel]
    assert decoders
    assert all(code.instructions["matrix"] for code in decoders)


def test_gradients_of_planes_are_added_four_channels_at_a_time(hopper: list[MachineCode]) -> None:
    """16 points of 32 channels are 4 numbers a thread, for each of 4 corners on 3 planes."""
    (code,) = find(hopper, "points eg3d", "_features_backward_kernel")
    assert code.arguments["BP"] == 16
    assert code.num_warps == 4
    assert code.instructions["atomic"] == 12
