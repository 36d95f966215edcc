"""`pytest bench` measures and prints one table; harness.py says how."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

RUN = pytest.StashKey[harness.Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("bench", "benchmarks of densityrl")
    options.addoption("--bench-full", action="store_true", help="large sizes too")
    options.addoption(
        "--bench-device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where torch sees one",
    )
    options.addoption(
        "--bench-save",
        action="store_true",
        help="append one JSON line a row to the device's file among the results",
    )
    options.addoption(
        "--bench-results",
        type=Path,
        default=harness.RESULTS,
        metavar="DIR",
        help="where --bench-save keeps its files (default: bench/results)",
    )
    options.addoption("--bench-table", type=Path, metavar="FILE", help="the table as Markdown")
    options.addoption(
        "--bench-commit",
        metavar="COMMIT",
        help="what `git describe --always --dirty --abbrev=40` says, for a tree without .git",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True  # its table; the summary below is the only one
    config.stash[RUN] = harness.Run(
        device=config.option.bench_device,
        full=config.option.bench_full,
        results=config.option.bench_results if config.option.bench_save else None,
        commit=config.option.bench_commit,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark is run for every case of its module's CASES and every provider of the case."""
    if "case" not in metafunc.fixturenames:
        return
    run = metafunc.config.stash[RUN]
    timed = pytest.mark.benchmark(timer=harness.synchronised_clock, disable_gc=True)
    metafunc.parametrize(
        ("case", "provider"),
        [
            pytest.param(case, provider, id=f"{case.size}-{case.direction}-{provider}", marks=timed)
            for case in metafunc.module.CASES
            if run.device in case.devices and (run.full or not case.full)
            for provider in harness.providers(case, run.device, run.full)
        ],
    )


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Run.measure of this run."""
    return partial(request.config.stash[RUN].measure, benchmark)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    run = config.stash[RUN]
    if not run.timings:
        return
    terminalreporter.section("benchmarks")
    for line in (run.provenance.sentence(), "", *harness.text_table(run.timings), ""):
        terminalreporter.write_line(line)
    terminalreporter.write_line(harness.LEGEND)
    if table := config.option.bench_table:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(harness.markdown_table(run.timings, run.provenance), encoding="utf-8")
