"""Measure a case with a provider; know where the number is from; print and keep it.

A case is called once to warm up where that is cheap, once for its memory, and then for as many
rounds as `TIME_PER_PROVIDER` has room for. Times are recorded, never asserted; errors are.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import problem
import pytest
import torch
from limits import Ceilings
from problem import Case, Ours, Usual
from torch import Tensor

from triplane_kernels import Grid, available_backends

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"

MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
MALLOC_TIMED = 32 * MIB  # where glibc settles by itself in a program with large tensors
MALLOC_ELSE = MIB  # so that the resident set is what is in use
TIME_PER_PROVIDER = {"cpu": 2.0, "cuda": 0.5}  # seconds of timed rounds that are aimed at
ROUND_SECONDS = 2e-3  # shorter calls are repeated within a round
CHEAP_SECONDS = 1.0  # a call of plain PyTorch up to this long is made twice before it is timed
SLOW_SECONDS = 10.0  # a longer one gets one round
MOST_ROUNDS, FEWEST_ROUNDS = 30, 3

# What autograd keeps of a point on the usual path, and a share of one chunk's intermediates.
USUAL_BACKWARD_BYTES_PER_POINT = 1000


# ---------------------------------------------------------------------------------- provenance


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where numbers are from."""

    date: str  # UTC, of the run
    device: str  # model name
    threads: int
    os: str
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    extension_isa: str | None  # instruction set that the C++ backend takes; None where not built
    commit: str | None
    dirty: bool | None  # changes that are not committed, results of benchmarks aside

    @classmethod
    def of(cls, device: str, commit: str | None = None) -> Provenance:
        """Of a run on "cpu" or "cuda"; `commit` as `commit_of` gives it, where git cannot tell."""
        name, dirty = parse_commit(commit) if commit else commit_of(REPOSITORY)
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            device=device_name(device),
            threads=torch.get_num_threads(),
            os=platform.platform(),
            python=platform.python_version(),
            torch=torch.__version__,
            triton=_version("triton"),
            cuda=torch.version.cuda,
            extension_isa=_extension_isa(),
            commit=name,
            dirty=dirty,
        )

    def sentence(self) -> str:
        """One line for people."""
        commit = self.commit[:12] if self.commit else "unknown commit"
        parts = [
            f"{self.device}, {self.threads} threads",
            f"torch {self.torch}",
            f"triton {self.triton}" if self.triton else "no triton",
            f"extension {self.extension_isa or 'not built'}",
            commit + (" with uncommitted changes" if self.dirty else ""),
            self.date,
        ]
        return "; ".join(parts)


def device_name(device: str) -> str:
    """The model name of the CPU or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit_of(repository: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether the tree differs from it; None if unknown."""
    results = RESULTS.relative_to(REPOSITORY).as_posix()
    try:
        commit = _git(repository, "rev-parse", "HEAD")
        changes = _git(repository, "status", "--porcelain", "--", ".", f":(exclude){results}")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changes)


def parse_commit(described: str) -> tuple[str, bool]:
    """Commit and dirty flag of what `git describe --always --dirty --abbrev=40` says."""
    return described.removesuffix("-dirty"), described.endswith("-dirty")


def _git(repository: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["git", *arguments], cwd=repository, capture_output=True, text=True, check=True, timeout=60
    )
    return answer.stdout.strip()


def _version(module: str) -> str | None:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return None


def _extension_isa() -> str | None:
    try:
        return importlib.import_module("triplane_kernels.cpu").isa()
    except (ImportError, AttributeError):
        return None


# ------------------------------------------------------------------------------- measurements


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A row of the table."""

    op: str
    size: str
    direction: str
    provider: str
    dtype: str  # of the planes
    rounds: int
    calls: int  # in each round
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio: float | None  # of eager's median to this one, of the same run
    limit_ms: float | None  # see limits.py
    limit_share: float | None  # limit_ms / p50_ms
    peak_mib: float | None  # above the inputs, the result included
    error: float  # relative, in the norm, against float64: the result or the planes' gradient

    def to_json(self, provenance: Provenance) -> str:
        """One line, with everything that is known about the number."""
        return json.dumps(asdict(provenance) | asdict(self))


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated linearly."""
    p20, p50, p80 = 1e3 * np.percentile(seconds, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def plan(call_seconds: float, budget: float) -> tuple[int, int]:
    """Rounds, and calls in each, for a call that takes so long."""
    calls = max(1, math.ceil(ROUND_SECONDS / call_seconds))
    fewest = 1 if call_seconds > SLOW_SECONDS else FEWEST_ROUNDS
    return min(MOST_ROUNDS, max(fewest, int(budget / (calls * call_seconds)))), calls


def synchronised_clock() -> float:
    """Seconds, once the GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def with_peak_mib(function: Callable[[], Tensor], device: str) -> tuple[Tensor, float | None]:
    """What a function returns, and the most memory it held above what was held before.

    On a CPU that is the resident set; None where the system does not tell.
    """
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
        before_kib = _resident_anonymous_kib("VmRSS")
    except (OSError, AttributeError):
        return function(), None  # not Linux, or not glibc
    result = function()
    return result, (_resident_anonymous_kib("VmHWM") - before_kib) / 1024


def malloc_maps_from(size: int) -> None:
    """Let malloc give every block of `size` bytes or more pages of its own, where it is glibc's.

    Such a block leaves the resident set when it is freed. Smaller ones leave holes that later
    calls fill, and then seem to need nothing; but they cost no page faults when used again.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def _resident_anonymous_kib(total: str) -> int:
    return _resident_kib(total) - _resident_kib("RssFile")  # without code, which comes and goes


def _resident_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{name}:\s*(\d+) kB$", status, re.M)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(match[1])


# ---------------------------------------------------------------------------------- providers


def providers(case: Case, device: str, full: bool) -> list[str]:
    """Whom to measure, the one that ratios refer to first."""
    names = ["eager"]
    if device == "cuda" or (full and shutil.which(os.environ.get("CXX", "c++"))):
        names.append("compiled")
    if isinstance(case.where, Grid):
        names.append("reference")  # the separable form; at points it is the usual path again
    not_ours = {"reference"}
    if device == "cpu":
        not_ours.add("triton")  # there it is Triton's interpreter, for tests
    available = available_backends(device)[case.op].available
    return names + [name for name in available if name not in not_ours]


def why_skip(case: Case, provider: str, device: str) -> str:
    """Why a provider cannot be measured; empty if it can."""
    if provider not in problem.USUAL_PROVIDERS or not case.backward:
        return ""
    needed = case.points * USUAL_BACKWARD_BYTES_PER_POINT
    available = _available_bytes(device)
    if available is None or needed <= available:
        return ""
    return f"the usual path needs {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are free"


def _available_bytes(device: str) -> int | None:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


# ------------------------------------------------------------------------------------ the run


@dataclass
class Run:
    """One run of the benchmarks on one device."""

    device: str
    full: bool = False
    results: Path | None = None  # folder that lines are appended in
    commit: str | None = None
    timings: list[Timing] = field(default_factory=list)

    def __post_init__(self) -> None:
        malloc_maps_from(MALLOC_ELSE)

    @cached_property
    def provenance(self) -> Provenance:
        return Provenance.of(self.device, self.commit)

    @cached_property
    def ceilings(self) -> Ceilings:
        return Ceilings.of(self.device)

    def measure(
        self,
        benchmark: Any,
        case: Case,
        provider: str,
        usual: Usual,
        ours: Ours,
    ) -> None:
        """Check what a provider computes, and unless benchmarks are disabled, time it.

        `usual` is given how to evaluate points, `ours` the backend's name.
        """
        if reason := why_skip(case, provider, self.device):
            pytest.skip(reason)
        if provider == "eager":
            operation = partial(usual, path=problem.usual_density)
        elif provider == "compiled":
            operation = partial(usual, path=problem.compiled_usual_density())
        else:
            operation = partial(ours, backend=provider)
        exact = problem.exact_result(case, ours, self.device)
        call = partial(problem.call, operation, case.inputs(self.device))
        try:
            if benchmark.disabled:
                check(case, provider, benchmark.pedantic(call), exact)
            else:
                self.record(self._time(benchmark, case, provider, call, exact))
        except torch.cuda.OutOfMemoryError as error:
            pytest.skip(f"out of memory: {error}")

    def _time(
        self, benchmark: Any, case: Case, provider: str, call: Callable[[], Tensor], exact: Tensor
    ) -> Timing:
        ceilings = self.ceilings  # measured before the call, not between its rounds
        start = synchronised_clock()
        result, peak_mib = with_peak_mib(call, self.device)
        first = synchronised_clock() - start
        error = check(case, provider, result, exact)
        del result
        prepared = provider in ("eager", "reference") and self.device == "cpu"
        if first <= CHEAP_SECONDS or not prepared:  # others load or compile at their first call
            start = synchronised_clock()
            _, peak_mib = with_peak_mib(call, self.device)
            first = synchronised_clock() - start
        rounds, calls = plan(first, TIME_PER_PROVIDER[self.device])
        benchmark.group = f"{case.op} {case.size} {case.direction}"
        malloc_maps_from(MALLOC_TIMED)
        benchmark.pedantic(call, rounds=rounds, iterations=calls)
        malloc_maps_from(MALLOC_ELSE)
        p20_ms, p50_ms, p80_ms = percentiles_ms(benchmark.stats.stats.data)
        limit = ceilings.seconds(case)
        eager_ms = p50_ms if provider == "eager" else self.eager_ms(case)
        return Timing(
            op=case.op,
            size=case.size,
            direction=case.direction,
            provider=provider,
            dtype=str(case.planes_dtype).removeprefix("torch."),
            rounds=rounds,
            calls=calls,
            p20_ms=p20_ms,
            p50_ms=p50_ms,
            p80_ms=p80_ms,
            ratio=None if eager_ms is None else eager_ms / p50_ms,
            limit_ms=None if limit is None else 1e3 * limit,
            limit_share=None if limit is None else 1e3 * limit / p50_ms,
            peak_mib=peak_mib,
            error=error,
        )

    def eager_ms(self, case: Case) -> float | None:
        """The median of the usual path in this run, if it was measured."""
        rows = (
            timing.p50_ms
            for timing in self.timings
            if timing.provider == "eager"
            and (timing.op, timing.size, timing.direction) == (case.op, case.size, case.direction)
        )
        return next(rows, None)

    def record(self, timing: Timing) -> None:
        """Keep a row; at once, so that an interrupted run leaves what it has measured."""
        self.timings.append(timing)
        if self.results is not None:
            self.results.mkdir(parents=True, exist_ok=True)
            file = self.results / f"{slug(self.provenance.device)}.jsonl"
            with file.open("a", encoding="utf-8") as lines:
                lines.write(timing.to_json(self.provenance) + "\n")


def check(case: Case, provider: str, result: Tensor, exact: Tensor) -> float:
    """The error of a result, which must be within the provider's bound."""
    error, bound = problem.relative_error(case, result, exact), case.max_error(provider)
    assert error <= bound, f"relative error {error:.1e}, allowed {bound:.0e}"
    return error


# ---------------------------------------------------------------------------------- the table

HEADINGS = (
    *("op", "size", "direction", "provider", "p20 ms", "p50 ms", "p80 ms"),
    *("ratio", "of limit", "peak MiB", "error"),
)
NAMES = 4  # columns that are words

LEGEND = (
    "ratio: median of eager (grid_sample and decoder in chunks of 10^6 points) to this one's; "
    "of limit: the least time by bench/limits.py over the median; peak: memory above the inputs, "
    "the result included; error: of the result, or with backward of the planes' gradient, "
    "relative in the norm, against float64."
)


def cells(timing: Timing) -> list[str]:
    """A row of the table."""
    return [
        timing.op,
        timing.size,
        timing.direction,
        timing.provider,
        *(_digits(ms) for ms in (timing.p20_ms, timing.p50_ms, timing.p80_ms)),
        "n/a" if timing.ratio is None else f"{_digits(timing.ratio)}x",
        "n/a" if timing.limit_share is None else f"{timing.limit_share:.1%}",
        "n/a" if timing.peak_mib is None else f"{timing.peak_mib:.1f}",
        f"{timing.error:.1e}",
    ]


def text_table(timings: Iterable[Timing]) -> list[str]:
    """Aligned lines, with an empty one between rows that do not compare."""
    timings = list(timings)
    rows = [list(HEADINGS), *map(cells, timings)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < NAMES else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    table, previous = [lines[0]], None
    for line, timing in zip(lines[1:], timings, strict=True):
        group = (timing.op, timing.size, timing.direction)
        if group != previous:
            table.append("")
        table.append(line)
        previous = group
    return table


def markdown_table(timings: Iterable[Timing], provenance: Provenance) -> str:
    """The table as Markdown, and under it what it was measured on."""
    alignment = ["---"] * NAMES + ["---:"] * (len(HEADINGS) - NAMES)
    rows = [HEADINGS, alignment, *map(cells, timings)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{provenance.sentence()}.", "", LEGEND, ""])


def _digits(value: float) -> str:
    """Three digits or more, and no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    decimals = 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"
