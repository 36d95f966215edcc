"""Building the extensions: what is compiled, with which flags, and what a missing compiler says.

CUDA is not compiled again here: a script stands in for nvcc, and the installed extension is looked
at where there is one.
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import triplane_kernels as tk
from triplane_kernels import cuda
from triplane_kernels.cuda import launch

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """For the CPU alone, unless the environment says otherwise."""
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    default = {"DENSITYRL_CUDA": "0", "CUDA_HOME": "", "TORCH_CUDA_ARCH_LIST": ""}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | default | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_missing_compiler_is_an_error_that_names_the_remedies(tmp_path: Path) -> None:
    result = build(tmp_path, **NO_COMPILER)
    assert result.returncode != 0
    assert "need a C++17 compiler" in result.stderr
    assert "DENSITYRL_NO_EXT=1 installs without them" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_no_code_for_one_processor_leaks_into_another_s(tmp_path: Path) -> None:
    """Functions that the linker may merge must be named after their instruction set."""
    changed = max(path.stat().st_mtime for path in (ROOT / "csrc" / "cpu").iterdir())
    # What the installation compiled, if no source has changed since.
    objects = list((ROOT / "build").glob(f"temp.*-{sys.implementation.cache_tag}/avx*/**/*.o"))
    if not objects or min(path.stat().st_mtime for path in objects) < changed:
        result = build(tmp_path)
        assert result.returncode == 0, result.stderr
        assert list((tmp_path / "lib").rglob("_cpu*.so"))
        objects = list((tmp_path / "temp").glob("avx*/**/*.o"))
    for path in objects:
        (variant,) = {"avx2", "avx512"} & set(path.parts)
        names = subprocess.run(
            ["nm", "--demangle", "--defined-only", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        weak = [line for line in names.splitlines() if " W " in line]
        assert all(f"densityrl::{variant}::" in line for line in weak), path


# ------------------------------------------------------------------------------------------- CUDA


@dataclass(frozen=True)
class Nvcc:
    """A script in nvcc's place, which notes how it is called."""

    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """There is no C++ compiler: a build ends where the CPU's kernels begin."""
        return {"CUDA_HOME": str(self.home), "DENSITYRL_CUDA": "", **NO_COMPILER, **more}

    def calls(self) -> list[list[str]]:
        """Since it was last asked."""
        log = self.home / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split() for line in lines]


@pytest.fixture
def nvcc(tmp_path: Path) -> Nvcc:
    home = tmp_path / "cuda"
    script = home / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(
        f"#!/bin/sh\necho $* >> {home}/calls\n"
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done\n'
    )
    script.chmod(0o755)
    return Nvcc(home)


def sources(calls: list[list[str]]) -> set[str]:
    return {call[call.index("-c") + 1] for call in calls if "-c" in call}


ALL = {str(path.relative_to(ROOT)) for path in CUDA.iterdir() if path.suffix in (".cu", ".cpp")}


@pytest.mark.parametrize(
    ("gpus", "code"),
    [
        ("", ["80,code=sm_80", "90,code=sm_90", "90,code=compute_90"]),
        ("8.6", ["86,code=sm_86"]),
        ("7.5 9.0a;12.0+PTX", ["90a,code=sm_90a", "120,code=sm_120", "120,code=compute_120"]),
    ],
)
def test_nvcc_s_flags(tmp_path: Path, nvcc: Nvcc, gpus: str, code: list[str]) -> None:
    """A GPU older than the kernels can use is left out."""
    build(tmp_path, **nvcc.environment(TORCH_CUDA_ARCH_LIST=gpus))
    calls = nvcc.calls()
    assert sources(calls) == ALL
    for call in calls[:-1]:
        assert [flag for flag in call if "arch=" in flag] == [
            f"-gencode=arch=compute_{each}" for each in code
        ]
        assert "-O3" in call
        assert not re.search("fast.?math|ftz|prec-", " ".join(call))
    assert "-shared" in calls[-1]
    assert "-cudart=static" in calls[-1]


def test_only_what_has_changed_is_compiled_again(tmp_path: Path, nvcc: Nvcc) -> None:
    build(tmp_path, **nvcc.environment())
    assert sources(nvcc.calls()) == ALL
    build(tmp_path, **nvcc.environment())
    assert not sources(nvcc.calls())
    (tmp_path / "temp" / "csrc" / "cuda" / "bindings.cpp.o").unlink()
    build(tmp_path, **nvcc.environment())
    assert sources(nvcc.calls()) == {"csrc/cuda/bindings.cpp"}
    build(tmp_path, **nvcc.environment(TORCH_CUDA_ARCH_LIST="9.0"))
    assert sources(nvcc.calls()) == ALL


@pytest.mark.parametrize("switch", ["DENSITYRL_CUDA", "DENSITYRL_NO_EXT"])
def test_cuda_can_be_left_out(tmp_path: Path, nvcc: Nvcc, switch: str) -> None:
    value = {"DENSITYRL_CUDA": "0", "DENSITYRL_NO_EXT": "1"}[switch]
    result = build(tmp_path, **nvcc.environment(**{switch: value}))
    assert not nvcc.calls()
    assert not list(tmp_path.rglob("*.so"))
    if switch == "DENSITYRL_NO_EXT":
        assert result.returncode == 0, result.stderr
    else:
        assert "The CPU kernels could not be compiled" in result.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"DENSITYRL_CUDA": "yes"}, "DENSITYRL_CUDA is 0, 1 or unset, not 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "'Hopper' is no compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "sm_90"}, "'sm_90' is no compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5+PTX"}, "need compute capability 8.0 or later"),
    ],
)
def test_a_setting_that_cannot_be(
    tmp_path: Path, nvcc: Nvcc, setting: dict[str, str], message: str
) -> None:
    result = build(tmp_path, **nvcc.environment(**setting))
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not nvcc.calls()


def test_a_missing_nvcc(tmp_path: Path) -> None:
    """An error only if the CUDA kernels were asked for."""
    nowhere = {"PATH": str(tmp_path), **NO_COMPILER}
    result = build(tmp_path, DENSITYRL_CUDA="1", **nowhere)
    assert result.returncode != 0
    assert "Install the CUDA toolkit" in result.stderr
    assert "leave DENSITYRL_CUDA unset" in result.stderr
    assert "CPU kernels" not in result.stderr
    result = build(tmp_path, DENSITYRL_CUDA="", **nowhere)
    assert "CUDA" not in result.stderr


def test_what_nvcc_refuses_can_be_left_out(tmp_path: Path, nvcc: Nvcc) -> None:
    (nvcc.home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    result = build(tmp_path, **nvcc.environment())
    assert result.returncode != 0
    assert "The CUDA kernels could not be compiled" in result.stderr
    assert "DENSITYRL_CUDA=0 installs without them" in result.stderr


@pytest.fixture(scope="module")
def installed() -> Path:
    if launch.extension is None:
        pytest.skip("built without the CUDA extension")
    return Path(launch.extension.__file__)


def test_no_library_of_cuda_is_needed(installed: Path) -> None:
    linked = subprocess.run(["ldd", installed], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked
    assert "libcuda" not in linked


def test_machine_code_for_every_gpu(installed: Path) -> None:
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST chooses the GPUs")
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("cuobjdump comes with triton")
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def listed(kind: str) -> set[str]:
        call = [cuobjdump, f"--list-{kind}", installed]
        out = subprocess.run(call, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"(\w+\.sm_\w+)\.\w+", out))

    kernels = [path.stem for path in CUDA.glob("*.cu")]
    assert listed("elf") == {f"{name}.sm_{gpu}" for name in kernels for gpu in (80, 90)}
    assert listed("ptx") == {f"{name}.sm_90" for name in kernels}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    monkeypatch.setattr(launch, "queue", lambda tensor: {"device": 0, "stream": 0})
    planes = torch.zeros(1, 3, 2, 4, 4)
    decoder = tk.DensityMLP(
        [torch.zeros(4, 2), torch.zeros(1, 4)], [torch.zeros(4), torch.zeros(1)]
    )
    with pytest.raises(RuntimeError, match=r"on CUDA device 0: .* \(cudaError\w+\)$"):
        tk.density_grid(planes, decoder, tk.Grid.cube(8, 1.0), tk.EG3D, backend="cuda")
