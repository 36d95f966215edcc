"""The least time that an H200 can take, predicted from the instructions that it would run.

`python bench/roofline.py` compiles the Triton kernels for it (no GPU is needed), takes the CUDA
kernels from the installed extension, counts what their inner loops keep busy, and divides by the
hardware's rates. What it prints are predictions of a lower bound: a kernel that waits (for memory,
for other threads, for instructions) takes longer. NOTES.md among the results has them beside what
was measured.

Counted are EG3D's sizes, 32 channels -> 64 units -> density, float32. Left out: on a grid the
tables, which are of order N^2; on all the launches themselves. Points are taken to lie at random,
so that no corner is found in a level-1 cache; where points lie close together, some are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cuda_code
from machine_code import MachineCode, compiled, workloads

# An H200 (compute capability 9.0): lanes a clock and multiprocessor.
MULTIPROCESSORS = 132
CLOCK_HZ = 1.98e9
LANES = {"special": 16, "conversion": 64, "fp32": 128, "imad": 64, "alu": 64, "shuffle": 32}
ISSUED_LANES = 128
L1_FILL_BYTES = 64  # a clock and multiprocessor, from the level-2 cache or back to it
MEMORY_BYTES = 4.3e12  # a second, as measured by a copy

GRIDS = (
    "grid eg3d",
    "grid eg3d, planes only",
    "grid eg3d corrected",
    "grid eg3d corrected, planes only",
)
CUDA_SWEEPS = {
    "grid eg3d": [("two", "true")],
    "grid eg3d, planes only": [("two", "false")],
    "grid eg3d corrected": [("three", "true"), ("third", "false")],
    "grid eg3d corrected, planes only": [("three", "false"), ("third", "false")],
}
POINTS = "points eg3d"
UNITS = 64
CORNER_BYTES = 4 * 3 * 32 * 4  # a point: 4 corners on 3 planes, 32 channels, float32


@dataclass(frozen=True)
class Bound:
    """The least time, and what takes it."""

    operation: str
    size: str
    milliseconds: float
    limit: str


def bound(
    operation: str,
    size: str,
    elements: float,
    instructions: Mapping[str, float],
    cache_bytes: float = 0,
    memory_bytes: float = 0,
) -> Bound:
    """`instructions` are thread instructions an element, by class; bytes are for all elements."""
    clocks = {name: instructions.get(name, 0) / lanes for name, lanes in LANES.items()}
    clocks["issue"] = sum(instructions.values()) / ISSUED_LANES
    rate = MULTIPROCESSORS * CLOCK_HZ
    seconds = {name: elements * each / rate for name, each in clocks.items()}
    seconds["level-2 cache"] = cache_bytes / (L1_FILL_BYTES * rate)
    seconds["memory"] = memory_bytes / MEMORY_BYTES
    limit = max(seconds, key=lambda name: seconds[name])
    return Bound(operation, size, 1e3 * seconds[limit], limit)


def grid_bounds(workload: str, codes: Sequence[MachineCode], n: int) -> list[Bound]:
    """Of the forward, and of the sweeps of the backward together."""
    pairs, volume_bytes = UNITS * n**3, 4 * n**3
    (forward,) = (code for code in codes if code.kernel == "density_kernel")
    sweeps = [
        code
        for code in codes
        if code.kernel == "density_backward_kernel" and code.arguments["FORM"] == "factored"
    ]
    instructions: Counter[str] = Counter()
    read_bytes = 0.0
    for sweep in sweeps:
        instructions.update(sweep.grid_loop())
        # Every block of hidden units reads the volume's gradient, after the first from the cache.
        read_bytes += volume_bytes * UNITS / int(sweep.arguments["BLOCK_H"])
    bounds = [
        bound(
            f"Triton {workload}, backward", f"{n}^3", pairs, instructions, read_bytes, volume_bytes
        )
    ]
    if "only" not in workload:
        bounds.insert(
            0,
            bound(
                f"Triton {workload}, forward", f"{n}^3", pairs, forward.grid_loop(), 0, volume_bytes
            ),
        )
    return bounds


def cuda_grid_bounds(workload: str, n: int) -> list[Bound]:
    """Of the CUDA C++ kernels: the forward, and the sweeps of the backward together."""
    loops = cuda_code.grid_loops("sm_90")
    pairs, volume_bytes = UNITS * n**3, 4 * n**3
    columns = 2 if n <= 64 else 4 if n <= 128 else 8  # of a lane: run_sweep in density_grid.cu
    instructions: Counter[str] = Counter()
    read_bytes = 0.0
    for sweep, with_decoder in CUDA_SWEEPS[workload]:
        instructions.update(loops[f"sweep_kernel<true, {sweep}, {with_decoder}, {columns}>"])
        read_bytes += volume_bytes * UNITS / cuda_code.UNITS_OF_BLOCK
    name = f"CUDA C++ {workload}"
    bounds = [bound(f"{name}, backward", f"{n}^3", pairs, instructions, read_bytes, volume_bytes)]
    if "only" not in workload:
        tile = f"TwoTables<{1 if n <= 64 else 2}>" if "corrected" not in workload else "ThreeTables"
        forward = loops[f"density_kernel<{tile}>"]
        bounds.insert(0, bound(f"{name}, forward", f"{n}^3", pairs, forward, 0, volume_bytes))
    return bounds


def point_bounds(workload: str, codes: Sequence[MachineCode], count: int) -> list[Bound]:
    """Of the forward, and of the two kernels of the backward, one after the other."""
    code = {each.kernel: each for each in codes}
    forward, decoder, lookup = (
        code[name]
        for name in ("_radiance_kernel", "_decoder_backward_kernel", "_features_backward_kernel")
    )

    def a_point(each: MachineCode) -> dict[str, float]:
        counts = each.loops[0] if each.loops else each.instructions
        return each.per_element(counts, int(each.arguments["BP"]))

    size = f"{count / 1e6:.0f}M"
    return [
        bound(f"Triton {workload}, forward", size, count, a_point(forward), count * CORNER_BYTES),
        bound(
            f"Triton {workload}, backward: decoder",
            size,
            count,
            a_point(decoder),
            count * CORNER_BYTES,
        ),
        # Corners are read for the gradient of the points, and added to.
        bound(
            f"Triton {workload}, backward: planes",
            size,
            count,
            a_point(lookup),
            2 * count * CORNER_BYTES,
        ),
    ]


def main() -> None:
    """Prints predicted lower bounds of the time on an H200. Nothing is measured."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args()
    calls = workloads()
    bounds: list[Bound] = []
    for name in GRIDS:
        codes = compiled(calls[name], "cuda:90", name)
        for n in (128, 256, 512):
            bounds += grid_bounds(name, codes, n)
    for name in GRIDS:
        for n in (64, 128, 256, 512, 1024):
            bounds += cuda_grid_bounds(name, n)
    codes = compiled(calls[POINTS], "cuda:90", POINTS)
    for count in (10**6, 4 * 10**6):
        bounds += point_bounds(POINTS, codes, count)

    print("Predicted lower bounds on an H200, in milliseconds: nothing here was measured.")
    print(f"{'':52} {'size':>6} {'ms':>9}  limit")
    for each in bounds:
        print(f"{each.operation:52} {each.size:>6} {each.milliseconds:9.3f}  {each.limit}")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in bounds], indent=1) + "\n")


if __name__ == "__main__":
    main()
