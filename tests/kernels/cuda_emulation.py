"""The CUDA kernels on a CPU: csrc/cuda, compiled by g++ against the headers in cuda_emulator.

A test that asks for `emulated` can call the functions of `triplane_kernels.cuda` with tensors on
the CPU. A broken rule ends the process (`pytest -s` shows which): a misaligned access, an index
outside a shared array, a barrier that some threads do not reach.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch

from triplane_kernels import cuda
from triplane_kernels.cuda import launch

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
EMULATOR = Path(__file__).resolve().parent / "cuda_emulator"
CHECKS = "alignment,bounds"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # which takes a jump to another fiber's stack for an error
    "-Ddensityrl=densityrl_emulated",  # pybind11 takes equal names for one type, module or not
    f"-I{EMULATOR}",
    f"-I{CUDA}",
    f"-I{Path(torch.__file__).parent / 'include'}",  # pybind11
    f"-I{sysconfig.get_path('include')}",
    "-x",
    "c++",
]
KERNEL_FLAGS = ["-O2", f"-fsanitize={CHECKS}", f"-fno-sanitize-recover={CHECKS}"]
LINK_FLAGS = ["-shared", "-static-libubsan", f"-fsanitize={CHECKS}"]


def gcc(*arguments: str | Path) -> str:
    """What it says; a test that needs it fails with its errors."""
    process = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        pytest.fail(process.stderr, pytrace=False)
    return process.stdout


def why_not() -> str:
    """Why the emulator cannot be built; empty if it can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if shutil.which("g++") is None:
        return "it needs g++"
    if not (Path(torch.__file__).parent / "include" / "pybind11").is_dir():
        return "this torch comes without pybind11's headers"
    probe = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(probe, input="_Float16 half;", capture_output=True, text=True)
    return "it needs g++ 12 or later" if done.returncode else ""


def key(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def build(folder: Path) -> Path:
    """The module, in a folder that keeps the object files for the next time."""
    sources = sorted(path for path in CUDA.iterdir() if path.suffix in (".cu", ".cpp"))
    sources += sorted(EMULATOR.glob("*.cpp"))
    headers = sorted(path for path in CUDA.iterdir() if path.suffix in (".h", ".cuh"))
    headers += sorted(EMULATOR.glob("*.h"))
    common = gcc("--version") + "".join(path.read_text() for path in headers)

    def compiled(source: Path) -> Path:
        binding = source.parent == CUDA and source.suffix == ".cpp"
        flags = FLAGS + ([] if binding else KERNEL_FLAGS)
        content = f"{common} {flags} {source.read_text()}"
        target = folder / f"{source.stem}-{key(content)}.o"
        if not target.exists():
            half = target.with_suffix(".half")
            gcc(*flags, "-c", source, "-o", half)
            half.replace(target)
        return target

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of pytest may need it too
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, sources))
        module = folder / f"_cuda-{key(f'{LINK_FLAGS} {objects}')}.so"
        if not module.exists():
            half = module.with_suffix(".half")
            gcc(*LINK_FLAGS, *objects, "-o", half)
            half.replace(module)
        for path in set(folder.iterdir()) - {*objects, module, folder / "lock"}:
            path.unlink()
    return module


@pytest.fixture(scope="session")
def emulated_module(pytestconfig: pytest.Config) -> ModuleType:
    """The extension `_cuda`, taking the addresses of tensors on the CPU."""
    if reason := why_not():
        pytest.skip(f"no CUDA emulator: {reason}")
    path = build(pytestconfig.cache.mkdir("cuda_emulator"))
    spec = spec_from_loader("_cuda", ExtensionFileLoader("_cuda", str(path)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, emulated_module: ModuleType) -> None:
    """Makes the CUDA backend compute in the emulator."""
    monkeypatch.setattr(launch, "extension", emulated_module)
    monkeypatch.setattr(launch, "queue", lambda tensor: {"device": 0, "stream": 0})
    for module in (launch, cuda):
        monkeypatch.setattr(module, "why_not", lambda device: "")


@contextmanager
def threads_in_reverse() -> Iterator[None]:
    """Runs the threads of a block from the last to the first: what changes then was a race."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_EMULATOR_ORDER", "reversed")
        yield
