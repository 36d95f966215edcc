"""Building the extension: what a missing compiler says, and what is built without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_missing_compiler_is_an_error_that_names_the_remedies(tmp_path: Path) -> None:
    pytest.importorskip("pybind11", reason="the build's own requirement")
    result = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "need a C++17 compiler" in result.stderr
    assert "DENSITYRL_NO_EXT=1 installs without them" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_the_extension_nothing_is_compiled(tmp_path: Path) -> None:
    result = build(tmp_path, DENSITYRL_NO_EXT="1", CC="no-such-compiler", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_no_code_for_one_processor_leaks_into_another_s(tmp_path: Path) -> None:
    """Functions that the linker may merge must be named after their instruction set."""
    pytest.importorskip("pybind11", reason="the build's own requirement")
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "lib").rglob("_cpu*.so"))
    for variant in ("avx2", "avx512"):
        objects = list((tmp_path / "temp" / variant).rglob("*.o"))
        for path in objects:
            names = subprocess.run(
                ["nm", "--demangle", "--defined-only", str(path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            weak = [line for line in names.splitlines() if " W " in line]
            assert all(f"densityrl::{variant}::" in line for line in weak), path
