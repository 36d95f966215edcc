"""Builds csrc; everything else is in pyproject.toml. Needs a C++17 compiler, and not torch.

DENSITYRL_NO_EXT=1    installs without the compiled kernels: the CPU then runs plain PyTorch.
DENSITYRL_CUDA        The CUDA kernels are built where nvcc is found, in CUDA_HOME/bin or on the
                      PATH. With 1 its absence is an error; with 0 they are not built.
TORCH_CUDA_ARCH_LIST  The GPUs that they are built for, as for torch's own extensions.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, OptionError, PlatformError

CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")

# -ffp-contract: products and sums fuse where the processor can, in every build alike.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]

# The kernels are compiled once for every instruction set, and one is chosen at run time.
KERNELS = [str(CPU / "density_grid.cpp"), str(CPU / "points.cpp")]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
VARIANTS = {"baseline": (4, [])}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS |= {
        "avx2": (8, AVX2),
        # GCC's own header for AVX-512 sets off its warning.
        "avx512": (16, [*AVX512, "-mprefer-vector-width=512", "-Wno-maybe-uninitialized"]),
    }

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xfatbin=-compress-all",  # to a quarter
    "-DNDEBUG",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
# The CUDA runtime is linked in, and hidden from whatever other copy of it a process may have.
NVCC_LINK_FLAGS = ["-shared", "-cudart=static", "-nodlink", "-Xlinker=--exclude-libs,ALL"]
# 8.0's machine code also runs on 8.6 and 8.9; later GPUs compile the PTX.
GPUS = "8.0;9.0+PTX"
OLDEST_GPU = (8, 0)  # that has matrix instructions for tf32


def files(folder: Path, *endings: str) -> list[str]:
    """The largest first: what takes long is best begun early."""
    found = [path for path in folder.iterdir() if path.suffix in endings]
    return [str(path) for path in sorted(found, key=lambda path: (-path.stat().st_size, path))]


def pybind11_include() -> str:
    """pybind11's own headers, or those that an installed torch carries."""
    try:
        import pybind11
    except ImportError:
        torch = find_spec("torch")  # not imported: that takes seconds
        if torch is None:
            raise
        return str(Path(torch.origin).parent / "include")
    return pybind11.get_include()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def gpu_code(gpus: str) -> list[str]:
    """nvcc's flags for a list in torch's syntax; what is too old for the kernels is left out."""
    flags = []
    for name in re.findall(r"[^\s;,]+", gpus):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST: '{name}' is no compute capability like 8.0, 9.0a or 9.0+PTX"
            )
        major, minor, feature, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_GPU:
            continue
        gpu = major + minor + feature
        flags.append(f"-gencode=arch=compute_{gpu},code=sm_{gpu}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{gpu},code=compute_{gpu}")
    if not flags:
        raise OptionError(
            f"TORCH_CUDA_ARCH_LIST='{gpus}': the CUDA kernels need compute capability 8.0 or "
            "later. DENSITYRL_CUDA=0 installs without them."
        )
    return flags


def in_parallel(tasks: list[Callable[[], str]]) -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda task: task(), tasks))


class BuildKernels(build_ext):
    """Compiles in parallel, and again only what has changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # where setuptools would throw the object files away
            build = self.distribution.get_command_class("build")(self.distribution)
            build.ensure_finalized()
            self.build_temp = build.build_temp

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cpu(self, ext: Extension) -> None:
        def compiled(source: str, variant: str, flags: list[str]) -> str:
            folder = str(Path(self.build_temp, variant))
            (target,) = self.compiler.object_filenames([source], output_dir=folder)
            how = " ".join([*self.compiler.compiler_so_cxx, *flags])
            compile_it = partial(
                self.compiler.compile, [source], output_dir=folder, extra_postargs=flags
            )
            return self.made(target, [source, *ext.depends], how, compile_it)

        tasks = []
        for variant, (lanes, flags) in VARIANTS.items():
            macros = [f"-DDENSITYRL_ISA={variant}", f"-DDENSITYRL_LANES={lanes}"]
            all_flags = [*FLAGS, *flags, *macros]
            tasks += [partial(compiled, source, variant, all_flags) for source in KERNELS]
        flags = [*FLAGS, "-fvisibility=hidden", f"-I{pybind11_include()}"]
        tasks += [partial(compiled, source, "", flags) for source in ext.sources]
        try:
            objects = in_parallel(tasks)
        except CompileError as error:
            raise CompileError(
                f"{error}\nThe CPU kernels could not be compiled. They need a C++17 compiler (GCC "
                "9 or Clang 10 and later; on Debian: apt install g++). DENSITYRL_NO_EXT=1 installs "
                "without them, and density on the CPU is then computed by slower plain PyTorch."
            ) from error
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            extra_postargs=["-pthread"],
            target_lang="c++",
        )

    def build_cuda(self, ext: Extension) -> None:
        """By nvcc alone: it knows where its headers and libraries are."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise PlatformError(
                "DENSITYRL_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on the PATH. Install "
                "the CUDA toolkit, 12.1 or later, or leave DENSITYRL_CUDA unset to install without "
                "the CUDA kernels."
            )
        flags = NVCC_FLAGS + gpu_code(os.environ.get("TORCH_CUDA_ARCH_LIST") or GPUS)
        headers = [f"-I{folder}" for folder in (pybind11_include(), *self.include_dirs)]

        def compiled(source: str) -> str:
            target = str(Path(self.build_temp, f"{source}.o"))
            includes = headers if source.endswith(".cpp") else []
            command = [nvcc, *flags, *includes, "-c", source, "-o", target]
            compile_it = partial(self.spawn, command)
            return self.made(target, [source, *ext.depends], " ".join(command), compile_it)

        try:
            objects = in_parallel([partial(compiled, source) for source in ext.sources])
            module = Path(self.get_ext_fullpath(ext.name))
            module.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([nvcc, *NVCC_LINK_FLAGS, *objects, "-o", str(module)])
        except ExecError as error:
            raise CompileError(
                f"{error}\nThe CUDA kernels could not be compiled. They need CUDA 12.1 or later, "
                "with a host compiler that it takes (NVCC_PREPEND_FLAGS='-ccbin g++-12' names "
                "one). DENSITYRL_CUDA=0 installs without them: GPUs then run the Triton kernels."
            ) from error

    def made(
        self, target: str, sources: list[str], how: str, compile_it: Callable[[], object]
    ) -> str:
        """The target; compiled, unless it is newer than its sources and was made the same way."""
        note = Path(target).with_suffix(".how")
        if not self.force and note.is_file() and note.read_text() == how:
            newest = max(Path(source).stat().st_mtime for source in sources)
            if Path(target).is_file() and Path(target).stat().st_mtime > newest:
                return target
        note.unlink(missing_ok=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        began = time.time()
        compile_it()
        os.utime(target, (began, began))  # a source that changes meanwhile is newer
        note.write_text(how)
        return target


def extensions() -> list[Extension]:
    if os.environ.get("DENSITYRL_NO_EXT", "0") not in ("", "0"):
        return []
    cpu = Extension(
        "triplane_kernels._cpu",
        sources=[str(CPU / name) for name in ("bindings.cpp", "dispatch.cpp", "team.cpp")],
        depends=files(CPU, ".h"),
    )
    cuda = os.environ.get("DENSITYRL_CUDA", "")
    if cuda not in ("", "0", "1"):
        raise SystemExit(f"DENSITYRL_CUDA is 0, 1 or unset, not '{cuda}'")
    if cuda == "0" or (cuda == "" and find_nvcc() is None):
        return [cpu]
    return [
        Extension(
            "triplane_kernels._cuda",
            sources=files(CUDA, ".cu") + files(CUDA, ".cpp"),
            depends=files(CUDA, ".h", ".cuh"),
        ),
        cpu,
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
