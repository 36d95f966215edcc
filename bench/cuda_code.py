"""The machine code of the CUDA C++ kernels: that of the installed extension, counted.

`python bench/cuda_code.py` prints every kernel's registers, spills and shared memory, and what a
(voxel, hidden unit) takes in the inner loops of the grid kernels. Needs no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import sass
from sass import Function

# Of a thread in the factored form's loop: voxels a hidden unit, and loads for them.
FORWARD_TILES = {
    "TwoTables<1>": (16, 3),
    "TwoTables<2>": (32, 4),
    "ThreeTables": (32, 9),
}
# Of a sweep's loop: rows; of a warp and of a block: hidden units.
ROWS_IN_LOOP = {"two": 8, "three": 8, "third": 4}
UNITS_OF_WARP, UNITS_OF_BLOCK = 2, 16


def extension() -> Path:
    """The file of the extension; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec("triplane_kernels._cuda")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "triplane_kernels._cuda is not installed: reinstall with nvcc on the PATH and "
            "DENSITYRL_CUDA=1."
        )
    return Path(spec.origin)


@lru_cache
def kernels(architecture: str) -> dict[str, Function]:
    """The kernels of the extension that have machine code for "sm_90", say, by short names."""
    with tempfile.TemporaryDirectory() as folder:
        files = sass.extract(extension(), Path(folder)).get(architecture, [])
        found = [function for path in files for function in sass.functions(path)]
    if not found:
        raise LookupError(f"The extension was not built for {architecture} (TORCH_CUDA_ARCH_LIST).")
    names = sass.demangled([function.name for function in found])
    return {short_name(name): each for name, each in zip(names, found, strict=True)}


def short_name(demangled: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"densityrl::cuda::|\(anonymous namespace\)::|^void ", "", demangled)
    for number, sweep in enumerate(("two", "three", "third")):
        name = name.replace(f"(Sweep){number}", sweep)
    name = re.sub(r"\((Number|Hidden|Combine)\)(\d)", r"\1 \2", name)
    return re.sub(r"\s*\(.*\)$", "", name).replace(" >", ">")


def forward_loop(kernel: Function, tile: str) -> dict[str, float]:
    """Thread instructions a (voxel, hidden unit) in the factored form's loop of a forward."""
    voxels, loads = FORWARD_TILES[tile]
    # relu's loop has no special functions, and the other plain forms take far more instructions.
    loops = [loop for loop in kernel.loops if loop["special"]]
    loop = min(loops, key=lambda loop: loop["fp32"])
    return per_pair(loop, voxels * loop["global load"] // loads)


def sweep_loop(kernel: Function, sweep: str, columns: int) -> dict[str, float]:
    """Thread instructions a (voxel, hidden unit) in a factored sweep of so many columns a lane."""
    (loop,) = kernel.loops
    return per_pair(loop, ROWS_IN_LOOP[sweep] * UNITS_OF_WARP * columns)


def per_pair(loop: Counter[str], pairs: int) -> dict[str, float]:
    return {name: count / pairs for name, count in loop.items()}


def grid_loops(architecture: str) -> dict[str, dict[str, float]]:
    """Of every factored kernel on a grid, thread instructions a (voxel, hidden unit)."""
    found = {}
    for name, kernel in kernels(architecture).items():
        if tile := re.fullmatch(r"density_kernel<(\w+Tables.*)>", name):
            found[name] = forward_loop(kernel, tile[1])
        elif sweep := re.fullmatch(r"sweep_kernel<true, (\w+), \w+, (\d)>", name):
            found[name] = sweep_loop(kernel, sweep[1], int(sweep[2]))
    return found


def main() -> None:
    """Prints what the CUDA kernels need and what their inner loops consist of."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args()
    print(f"{'kernel':64} registers  stack  spills  shared")
    for name, kernel in kernels(options.architecture).items():
        print(
            f"{name:64} {kernel.registers:9} {kernel.stack_bytes:6} "
            f"{kernel.instructions['local']:7} {kernel.shared_bytes:7}"
        )
    print("\nThread instructions a (voxel, hidden unit)")
    for name, loop in grid_loops(options.architecture).items():
        counts = ", ".join(f"{count:.2f} {kind}" for kind, count in sorted(loop.items()) if count)
        print(f"{name:64} {sum(loop.values()):.2f}: {counts}")


if __name__ == "__main__":
    main()
