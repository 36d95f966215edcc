"""The machine code that a GPU would run, compiled and counted without one.

`python bench/machine_code.py --target cuda:90` compiles every kernel of the Triton backend as the
public functions launch it, for the models in `WORKLOADS`, and prints what it finds as JSON.

It calls the very functions that a user calls, with Triton told that the device is the target and
every launch turned into a compilation: what is counted is what would run. Nothing is computed, so
the tensors' values mean nothing. Needs TRITON_INTERPRET unset; an AMD target needs a process of
its own, because the kernels choose between the vendors when they are imported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import sass
from sass import class_of, innermost

GCN_CLASSES = (
    ("special", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("fp32", r"v_(pk_)?(fma|fmac|mul|add|sub)(ak|mk)?_f32"),
    ("matrix", r"v_mfma"),
    ("global load", r"(global|buffer|flat)_load"),
    ("atomic", r"(global|buffer|flat)_atomic"),
    ("global store", r"(global|buffer|flat)_store"),
    ("local", r"scratch_"),
    ("shared", r"ds_"),
    ("barrier", r"s_barrier"),
    ("branch", r"s_c?branch"),
    ("scalar", r"s_"),
    ("alu", r"v_"),
)


GRID_LOOP_SIZES = ("BLOCK_R", "BLOCK_C", "BLOCK_H", "SLICES", "UNROLL")


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    arguments     its compile-time arguments, such as the tile's sizes.
    spills        NVIDIA: instructions that move registers to and from memory; AMD: registers.
    instructions  of one thread, by class, of the whole kernel.
    loops         the same of every innermost loop.
    """

    workload: str
    kernel: str
    target: str
    arguments: dict[str, int | str]
    num_warps: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: dict[str, int]
    loops: list[dict[str, int]]

    def per_element(self, counts: dict[str, int], elements: float) -> dict[str, float]:
        """Thread instructions an element, where all threads together do `elements` in `counts`."""
        threads = self.num_warps * (32 if self.target.startswith("cuda") else 64)
        return {name: count * threads / elements for name, count in counts.items()}

    def grid_loop(self) -> dict[str, float]:
        """Of a kernel on a grid: thread instructions a (voxel, hidden unit) in the inner loop.

        Of the forward's two loops, that of the factored form.
        """
        size = {name: int(self.arguments.get(name, 1)) for name in GRID_LOOP_SIZES}
        loop = min(self.loops, key=lambda loop: loop["fp32"])
        if self.kernel == "density_kernel":
            unroll = size["UNROLL"] if size["SLICES"] == 1 else 1
            pairs = size["BLOCK_R"] * size["BLOCK_C"] * size["SLICES"] * unroll
        else:
            pairs = size["BLOCK_H"] * size["BLOCK_C"]
        return self.per_element(loop, pairs)


def compiled(call: Callable[[], Any], target: str, workload: str = "") -> list[MachineCode]:
    """Every kernel that a call launches, compiled for "cuda:90" or "hip:gfx942"."""
    found: dict[str, MachineCode] = {}
    with _launches_compile_for(target) as launches:
        call()
    for name, kernel, arguments in launches:
        if kernel.hash not in found:
            constants = {
                key: value
                for key, value in arguments.items()
                if key.isupper() and isinstance(value, int | str)
            }
            found[kernel.hash] = _inspect(workload, name, kernel, target, constants)
    return list(found.values())


class _Target:
    """In place of Triton's driver: a device that can only be compiled for."""

    devices: tuple[str, ...] = ()  # Triton keeps its compilations by the device's number

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        backend, arch = target.split(":")
        self.target = GPUTarget(
            backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64
        )
        if target not in _Target.devices:
            _Target.devices += (target,)
        self.number = _Target.devices.index(target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _launches_compile_for(target: str) -> Iterator[list[tuple[str, Any, dict[str, Any]]]]:
    """While this lasts, a launch is compiled and recorded: name, compilation, arguments."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, Any, dict[str, Any]]] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = (parameter.name for parameter in self.params)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        launches.append((self.__name__, kernel, arguments))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Target(target))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active


def _inspect(
    workload: str, name: str, kernel: Any, target: str, arguments: dict[str, int | str]
) -> MachineCode:
    parse = _parse_sass if target.startswith("cuda") else _parse_gcn
    resources, instructions, loops = parse(kernel.asm)
    return MachineCode(
        workload=workload,
        kernel=name,
        target=target,
        arguments=arguments,
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        instructions=dict(instructions),
        loops=[dict(loop) for loop in loops],
        **resources,
    )


def _parse_sass(asm: dict[str, Any]) -> tuple[dict[str, int], Counter[str], list[Counter[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        (code,) = sass.functions(cubin)
    resources = {
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "spills": code.instructions["local"],
    }
    return resources, code.instructions, code.loops


def _parse_gcn(asm: dict[str, Any]) -> tuple[dict[str, int], Counter[str], list[Counter[str]]]:
    operations: list[str] = []
    labels: dict[str, int] = {}
    jumps = []
    for line in asm["amdgcn"].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\t([a-z]+_\w+)(?:\s+(.*))?", line):
            if found[1].startswith(("s_branch", "s_cbranch")):
                goal = (found[2] or "").split()[0]
                if goal in labels:
                    jumps.append((labels[goal], len(operations)))
            operations.append(found[1])
    classes = [class_of(operation, GCN_CLASSES) for operation in operations]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", asm["amdgcn"])[-1])

    resources = {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "spills": metadata("vgpr_spill_count"),  # scalar registers are spilled to vector ones
    }
    return resources, Counter(classes), innermost(jumps, classes)


# ---------------------------------------------------------------------------------- workloads


def workloads() -> dict[str, Callable[[], Any]]:
    """Calls whose kernels are looked at, of the models that the layouts' presets are for.

    Forward and backward, of 64 x 64 planes: at 4096 points, or on a grid of 256 a side. All
    gradients, unless the name tells another story.
    """
    import torch

    from triplane_kernels import (
        CRM,
        EG3D,
        EG3D_CORRECTED,
        NERFSTUDIO,
        OPENLRM,
        SSDNERF,
        TRIPOSR,
        DensityMLP,
        Grid,
        TriplaneLayout,
    )
    from triplane_kernels import triton as backend
    from triplane_kernels.backend import Field, Needs

    # The tensors are the CPU's, but the tiles are to be those for the target.
    family = "nvidia" if torch.version.hip is None else "amd"
    grids = cast(Any, importlib.import_module("triplane_kernels.triton.density_grid"))
    grids.device_family = lambda device: family

    def field(
        layout: TriplaneLayout,
        channels: int,
        widths: Sequence[int],
        hidden: Any = "softplus",
        dtype: torch.dtype = torch.float32,
    ) -> Field:
        planes = [torch.zeros(1, channels, 64, 64, dtype=dtype) for _ in layout.axes]
        sizes = [layout.feature_channels(channels), *widths]
        weights = [torch.zeros(n, m) for m, n in zip(sizes, widths, strict=False)]
        return Field(planes, DensityMLP(tuple(weights), tuple(map(torch.zeros, widths)), hidden))

    def canonical(layout: TriplaneLayout) -> TriplaneLayout:
        reduce = {"mean": "sum", "concat_channel_major": "concat"}.get(layout.reduce)
        return replace(layout, reduce=cast(Any, reduce)) if reduce else layout

    def at_points(layout: TriplaneLayout, *decoder: Any) -> Callable[[], Any]:
        def call() -> None:
            layout_ = canonical(layout)
            field_ = field(layout_, *decoder)
            x = torch.zeros(1, 4096, 3)
            sigma, rest = backend.radiance(field_, x, layout_)
            needs = Needs(planes=True, decoder=True, points=True)
            with _deterministic_algorithms(False):
                backend.radiance_backward(sigma, rest, sigma, field_, x, layout_, needs)

        return call

    def on_grid(
        layout: TriplaneLayout, channels: int, widths: Sequence[int], decoder_too: bool = True
    ) -> Callable[[], Any]:
        def call() -> None:
            layout_ = canonical(layout)
            field_, grid = field(layout_, channels, widths), Grid.cube(256, layout.extent)
            sigma = backend.density_grid(field_, grid, layout_)
            needs = Needs(planes=True, decoder=decoder_too)
            backend.density_grid_backward(sigma, sigma, field_, grid, layout_, needs)

        return call

    half = torch.bfloat16
    return {
        "points eg3d": at_points(EG3D, 32, (64, 1)),
        "points eg3d with colours": at_points(EG3D, 32, (64, 33)),
        "points eg3d bfloat16": at_points(EG3D, 32, (64, 1), "softplus", half),
        "points ssdnerf": at_points(SSDNERF, 6, (64, 1), "silu"),
        "points nerfstudio": at_points(NERFSTUDIO, 32, (64, 1), "relu"),
        "points crm": at_points(CRM, 32, (64, 64, 1), "relu"),
        "points openlrm": at_points(OPENLRM, 80, (64, 64, 64, 4), "relu"),
        "points triposr": at_points(TRIPOSR, 40, (64,) * 9 + (4,), "silu"),
        "grid eg3d": on_grid(EG3D, 32, (64, 1)),
        "grid eg3d, planes only": on_grid(EG3D, 32, (64, 1), decoder_too=False),
        "grid eg3d corrected": on_grid(EG3D_CORRECTED, 32, (64, 1)),
        "grid eg3d corrected, planes only": on_grid(EG3D_CORRECTED, 32, (64, 1), False),
    }


@contextmanager
def _deterministic_algorithms(enabled: bool) -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def main() -> None:
    """Prints the machine code's figures as JSON: one object a kernel."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--target", action="append", required=True, help="cuda:90, hip:gfx942; can be repeated"
    )
    parser.add_argument("--workload", action="append", help="all, if not given")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("Triton's interpreter compiles nothing: unset TRITON_INTERPRET.")
    if any(target.startswith("hip") for target in options.target):
        import torch

        if not all(target.startswith("hip") for target in options.target):
            parser.error("An AMD target needs a process of its own.")
        torch.version.hip = "compiled for, not run on"  # what the kernels look at when imported
    calls = workloads()
    found = [
        asdict(code)
        for target in options.target
        for name in options.workload or calls
        for code in compiled(calls[name], target, name)
    ]
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
