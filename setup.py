"""Builds csrc; everything else is in pyproject.toml. Needs a C++17 compiler, and not torch.

DENSITYRL_NO_EXT=1 installs without the compiled kernels: the CPU then runs plain PyTorch.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPU = Path("csrc/cpu")
HEADERS = sorted(str(path) for path in CPU.glob("*.h"))

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


def pybind11_include() -> str:
    """pybind11's own headers, or those that an installed torch carries."""
    try:
        import pybind11
    except ImportError:
        import torch

        return str(Path(torch.__file__).parent / "include")
    return pybind11.get_include()


class BuildKernels(build_ext):
    """Compiles the kernels' sources once for each variant, with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        ext.include_dirs.append(pybind11_include())
        try:
            for variant, (lanes, flags) in VARIANTS.items():
                ext.extra_objects += self.compiler.compile(
                    KERNELS,
                    output_dir=str(Path(self.build_temp) / variant),
                    macros=[("DENSITYRL_ISA", variant), ("DENSITYRL_LANES", str(lanes))],
                    depends=HEADERS,
                    extra_postargs=[*FLAGS, *flags],
                )
            super().build_extension(ext)
        except CompileError as error:
            raise CompileError(
                f"{error}\nThe CPU kernels could not be compiled. They need a C++17 compiler (GCC "
                "9 or Clang 10 and later; on Debian: apt install g++). DENSITYRL_NO_EXT=1 installs "
                "without them, and density on the CPU is then computed by slower plain PyTorch."
            ) from error


def extensions() -> list[Extension]:
    if os.environ.get("DENSITYRL_NO_EXT", "0") not in ("", "0"):
        return []
    return [
        Extension(
            "triplane_kernels._cpu",
            sources=[str(CPU / name) for name in ("bindings.cpp", "dispatch.cpp", "team.cpp")],
            depends=HEADERS,
            language="c++",
            extra_compile_args=[*FLAGS, "-fvisibility=hidden"],
            extra_link_args=["-pthread"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
