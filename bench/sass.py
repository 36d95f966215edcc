"""NVIDIA's machine code, disassembled and counted. Needs no GPU.

`cuobjdump` and `nvdisasm` are those on the PATH, or else those that Triton's package carries.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What an instruction of NVIDIA's machine code keeps busy; the first pattern that matches counts.
CLASSES = (
    ("special", r"MUFU"),
    ("conversion", r"(I2F|F2I|F2F|FRND)"),
    ("fp32", r"(FFMA|FMUL|FADD)"),
    ("matrix", r"(HGMMA|HMMA|WGMMA|IMMA|QGMMA)"),
    ("shuffle", r"(SHFL|REDUX)"),
    ("local", r"(LDL|STL)"),
    ("global load", r"LDG"),
    ("global store", r"STG"),
    ("atomic", r"(RED|ATOM)"),
    ("shared", r"(LDS|STS|ATOMS)"),
    ("barrier", r"(BAR|SYNCS|WARPSYNC|WARPGROUP)"),
    ("imad", r"IMAD"),
    ("branch", r"(BRA|BSSY|BSYNC|EXIT|CALL|RET|NOP|YIELD)"),
    ("uniform", r"(U[A-Z0-9]+|R2UR|S2UR|LDC)"),
    ("alu", r"[A-Z]"),
)


@dataclass(frozen=True)
class Function:
    """One kernel. Instructions are those of one thread, by class: in all, and of every innermost
    loop."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter[str]
    loops: list[Counter[str]]


def tool(name: str) -> Path:
    """The path of a tool of CUDA's toolkit."""
    if found := shutil.which(name):
        return Path(found)
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        carried = Path(folder, "backends", "nvidia", "bin", name)
        if carried.exists():
            return carried
    raise FileNotFoundError(
        f"{name} is neither on the PATH nor in an installed triton (pip install triton)."
    )


def functions(cubin: Path) -> list[Function]:
    """The kernels of a file of machine code."""
    text = _output(tool("nvdisasm"), "-c", cubin)
    usage = _resource_usage(cubin)
    found = []
    for section in re.split(r"\n//-+ \.text\.", text)[1:]:
        name = section.split(maxsplit=1)[0]
        instructions, loops = _count(section)
        found.append(
            Function(
                name=name,
                registers=usage[name]["REG"],
                stack_bytes=usage[name]["STACK"] + usage[name]["LOCAL"],
                shared_bytes=usage[name]["SHARED"],
                instructions=instructions,
                loops=loops,
            )
        )
    return found


def extract(binary: Path, folder: Path) -> dict[str, list[Path]]:
    """The machine code in a library that nvcc made, by architecture ("sm_90"), into a folder."""
    _output(tool("cuobjdump"), "--extract-elf", "all", binary.resolve(), cwd=folder)
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.cubin")):
        (architecture,) = re.findall(r"\.(sm_\d+\w?)\.cubin$", path.name)
        found.setdefault(architecture, []).append(path)
    return found


def demangled(names: Sequence[str]) -> list[str]:
    """C++ names as a reader writes them (by binutils' c++filt)."""
    return _output("c++filt", stdin="\n".join(names)).splitlines()


def class_of(operation: str, classes: Sequence[tuple[str, str]] = CLASSES) -> str:
    """What an instruction keeps busy."""
    return next((name for name, pattern in classes if re.match(pattern, operation)), "other")


def innermost(jumps: list[tuple[int, int]], classes: list[str]) -> list[Counter[str]]:
    """The instructions of the loops that contain no other, given every jump backwards."""
    return [
        Counter(classes[first : last + 1])
        for first, last in jumps
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in jumps)
    ]


def _count(section: str) -> tuple[Counter[str], list[Counter[str]]]:
    operations: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line
        ):
            operations.append((found[1], found[2]))
    jumps = []
    for number, (operation, operands) in enumerate(operations):
        goal = re.search(r"`\((\.L_x_\d+)\)", operands)
        if operation.startswith("BRA") and goal and labels.get(goal[1], number) < number:
            jumps.append((labels[goal[1]], number))
    classes = [class_of(operation) for operation, _ in operations]
    return Counter(classes), innermost(jumps, classes)


def _resource_usage(cubin: Path) -> dict[str, dict[str, int]]:
    text = _output(tool("cuobjdump"), "--dump-resource-usage", cubin)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    }


def _output(*command: str | Path, stdin: str = "", cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout
