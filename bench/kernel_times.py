"""The time that every kernel of a call takes on a GPU, by PyTorch's profiler.

`python bench/kernel_times.py --json FILE` looks at the density on a grid of 256 a side, forward and
with its backward, and at 4 million points, for every backend that is there: what the predictions of
roofline.py, kernel by kernel, are to be compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import bench_density
import bench_density_grid
import problem
import torch
from harness import Provenance
from torch.profiler import ProfilerActivity, profile

from triplane_kernels import available_backends

CALLS = 5


def workloads() -> list[tuple[problem.Case, problem.Ours]]:
    grid = bench_density_grid.cube(256)
    points = next(c for c in bench_density.CASES if c.planes_dtype == torch.bfloat16)
    return [
        *((case, bench_density_grid.ours) for case in problem.both_directions(grid)),
        *((case, bench_density.ours) for case in problem.both_directions(points)),
    ]


def milliseconds(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Of every kernel (on the CPU, of every operator) of a call, the mean of some calls."""
    on_gpu = device == "cuda"
    call()
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if time > 0:
            name = re.sub(r"\(anonymous namespace\)::|^void ", "", event.key)
            times[name] = times.get(name, 0) + time / 1e3 / CALLS
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def main() -> int:
    """Prints the time of every kernel on this machine's GPU."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there as well")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernel_times.py: torch sees no GPU", file=sys.stderr)
        return 1
    rows = []
    for case, ours in workloads():
        inputs = case.inputs("cuda")
        for backend in available_backends("cuda")[case.op].available:
            if backend == "reference":
                continue
            operation = partial(ours, backend=backend)
            times = milliseconds(partial(problem.call, operation, inputs), "cuda")
            total = sum(times.values())
            print(f"\n{case.op} {case.size} {case.direction}, {backend}: {total:.3f} ms")
            for name, time in times.items():
                print(f"    {time:9.4f} ms  {name[:100]}")
            about = {"op": case.op, "size": case.size, "direction": case.direction}
            rows.append({**about, "backend": backend, "milliseconds": times})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        provenance = asdict(Provenance.of("cuda", os.environ.get("COMMIT")))
        document = {"provenance": provenance, "calls": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
