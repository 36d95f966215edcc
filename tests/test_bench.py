"""The arithmetic and the files of the benchmarks; no test is about how long something takes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import harness
import limits
import problem

GRID_CASE = problem.Case(op="density_grid", size="8^3", where=problem.Grid.cube(8, 1.0))

PROVENANCE = harness.Provenance(
    date="2026-01-02T03:04:05+00:00",
    device="Some CPU @ 2.0GHz",
    threads=2,
    os="Linux",
    python="3.12.0",
    torch="2.11.0",
    triton=None,
    cuda=None,
    extension_isa="avx2",
    commit="c" * 40,
    dirty=True,
)


def timing(provider: str = "eager", **changes: object) -> harness.Timing:
    row = harness.Timing(
        op="density_grid",
        size="8^3",
        direction="forward",
        provider=provider,
        dtype="float32",
        rounds=3,
        calls=1,
        p20_ms=1.0,
        p50_ms=2.0,
        p80_ms=1234.5,
        ratio=None,
        limit_ms=0.5,
        limit_share=0.25,
        peak_mib=None,
        error=1.5e-7,
    )
    return replace(row, **changes)


def test_percentiles():
    assert harness.percentiles_ms([0.005, 0.001, 0.003, 0.002, 0.004]) == pytest.approx(
        (1.8, 3.0, 4.2)
    )
    assert harness.percentiles_ms([0.25]) == pytest.approx((250, 250, 250))


@pytest.mark.parametrize(
    ("call_seconds", "expected"),
    [
        (0.1, (20, 1)),
        (5.0, (3, 1)),  # never fewer than three
        (30.0, (1, 1)),  # unless it is very slow
        (1e-4, (30, 20)),  # short calls fill a round
    ],
)
def test_rounds_fit_the_budget(call_seconds, expected):
    assert harness.plan(call_seconds, budget=2.0) == expected


def test_json_line_has_every_column_and_its_provenance():
    line = timing().to_json(PROVENANCE)
    assert "\n" not in line
    row = json.loads(line)
    assert row["p50_ms"] == 2.0
    assert row["error"] == 1.5e-7
    assert row["peak_mib"] is None
    assert (row["device"], row["commit"], row["dirty"]) == ("Some CPU @ 2.0GHz", "c" * 40, True)
    assert set(row) == set(harness.Timing.__annotations__) | set(harness.Provenance.__annotations__)


def test_rows_are_appended_to_the_file_of_the_device(tmp_path):
    run = harness.Run(device="cpu", results=tmp_path / "results", commit="abc-dirty")
    run.record(timing())
    run.record(timing("cpu"))
    name = harness.slug(harness.device_name("cpu"))
    lines = (tmp_path / "results" / f"{name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["provider"] for line in lines] == ["eager", "cpu"]
    assert json.loads(lines[0])["commit"] == "abc"
    assert json.loads(lines[0])["dirty"] is True


def test_slug():
    assert harness.slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"


def test_markdown_table():
    table = harness.markdown_table([timing(ratio=1.0), timing("cpu", ratio=12.34)], PROVENANCE)
    head, rule, eager, ours, *rest = table.splitlines()
    assert head.count("|") == rule.count("|") == eager.count("|")
    assert eager == (
        "| density_grid | 8^3 | forward | eager | 1.00 | 2.00 | 1234 | 1.00x | 25.0% | n/a "
        "| 1.5e-07 |"
    )
    assert "| cpu |" in ours
    assert "| 12.3x |" in ours
    assert "Some CPU @ 2.0GHz, 2 threads" in rest[1]
    assert "uncommitted" in rest[1]


def test_text_table_is_aligned_and_grouped():
    rows = [timing(), timing("cpu"), timing(size="16^3")]
    lines = harness.text_table(rows)
    assert [bool(line) for line in lines] == [True, False, True, True, False, True]
    assert len({len(line) for line in lines if line}) == 1


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    return tmp_path


def test_dirty_flag(repository):
    commit, dirty = harness.commit_of(repository)
    assert len(commit) == 40
    assert dirty is False
    (repository / "bench" / "results").mkdir(parents=True)
    (repository / "bench" / "results" / "cpu.jsonl").write_text("{}\n")
    assert harness.commit_of(repository) == (commit, False)
    (repository / "code.py").write_text("2\n")
    assert harness.commit_of(repository) == (commit, True)


def test_new_files_are_dirt(repository):
    (repository / "new.py").touch()
    assert harness.commit_of(repository)[1] is True


def test_no_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.commit_of(tmp_path) == (None, None)


def test_described_commit():
    assert harness.parse_commit("0123abc-dirty") == ("0123abc", True)
    assert harness.parse_commit("0123abc") == ("0123abc", False)


def test_ratio_is_to_eager_of_the_same_case():
    run = harness.Run(device="cpu")
    run.timings += [
        timing(size="16^3", p50_ms=9.0),
        timing(direction="forward+backward", p50_ms=8.0),
        timing("reference", p50_ms=7.0),
    ]
    assert run.eager_ms(GRID_CASE) is None
    run.timings.append(timing(p50_ms=6.0))
    assert run.eager_ms(GRID_CASE) == 6.0


def test_peak_memory_counts_what_was_freed_again():
    harness.malloc_maps_from(harness.MIB)
    kept = 4 * harness.MIB

    def call():
        torch.ones(32 * harness.MIB, dtype=torch.uint8)
        return torch.ones(kept, dtype=torch.uint8)

    result, peak = harness.with_peak_mib(call, "cpu")
    assert result.numel() == kept
    if peak is None:
        pytest.skip("the system does not tell the peak of the resident set")
    assert 30 <= peak <= 48


def test_operations_by_hand():
    """One voxel or point has 64 hidden units, and 12 corners of 32 channels."""
    one = replace(GRID_CASE, where=problem.Grid.cube(1, 1.0))
    both = replace(one, direction="forward+backward")
    assert limits.cpu_lane_operations(one) == 64 * limits.CPU_GRID_FORWARD
    forward, backward = 25 / 32, 21 / 16
    assert limits.gpu_special_functions(one) == 64 * forward
    assert limits.gpu_special_functions(both) == 64 * (forward + backward)
    two = replace(both, two_fields=True, batch=5)
    assert limits.gpu_special_functions(two) == 64 * 5 * (2 * forward + backward)
    point = replace(one, op="density", where=1)
    assert limits.gpu_gathered_bytes(point) == 12 * 128
    assert limits.gpu_gathered_bytes(replace(point, planes_dtype=torch.bfloat16)) == 12 * 64
    assert limits.gpu_gathered_bytes(replace(point, direction="forward+backward")) == 3 * 12 * 128


def test_ceilings_give_the_least_time():
    ceilings = limits.Ceilings(special_functions=64e3, l1_fill_bytes=12 * 128e6)
    assert ceilings.seconds(GRID_CASE) == pytest.approx(25 / 32 * 8**3 / 1e3)
    assert ceilings.seconds(replace(GRID_CASE, where=10**6)) == pytest.approx(1.0)
    assert limits.Ceilings().seconds(GRID_CASE) is None


def test_usual_path_is_the_reference():
    case = replace(GRID_CASE, where=500, batch=2)
    inputs = case.inputs("cpu").double()
    ours = problem.usual_density(inputs.planes, inputs.decoder, inputs.where)
    from triplane_kernels import EG3D, density

    exact = density(inputs.planes, inputs.decoder, inputs.where, EG3D, backend="reference")
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


def test_large_results_are_compared_at_both_ends(monkeypatch):
    import bench_density_grid

    monkeypatch.setattr(problem, "WHOLE_COMPARISON_VOXELS", 100)
    case = replace(GRID_CASE, where=problem.Grid.cube(12, 1.0))
    whole = bench_density_grid.ours(case.inputs("cpu").double(), "reference")
    exact = problem.exact_result(case, bench_density_grid.ours, "cpu")
    assert exact.shape == (1, 8, 12, 12)
    assert problem.relative_error(case, whole, exact) < 1e-12
    for layer in (0, 11):
        wrong = whole.clone()
        wrong[:, layer] += 1
        assert problem.relative_error(case, wrong, exact) > 0.01


def test_times_of_what_a_call_consists_of():
    import kernel_times

    a = torch.ones(256, 256)
    times = kernel_times.milliseconds(lambda: (a @ a).exp(), "cpu")
    assert {"aten::mm", "aten::exp"} <= set(times)
    assert list(times.values()) == sorted(times.values(), reverse=True)


def test_names_of_cuda_kernels():
    from cuda_code import short_name

    name = "void densityrl::cuda::(anonymous namespace)::"
    assert short_name(f"{name}raw_gradient_kernel(densityrl::cuda::Volume, int)") == (
        "raw_gradient_kernel"
    )
    sweep = "(densityrl::cuda::(anonymous namespace)::Sweep)2"
    assert short_name(f"{name}sweep_kernel<true, {sweep}, false, 8>(float*)") == (
        "sweep_kernel<true, third, false, 8>"
    )


def test_bench_files_make_cases_of_distinct_names():
    import bench_density
    import bench_density_grid
    import bench_density_grid_loss

    modules = (bench_density, bench_density_grid, bench_density_grid_loss)
    cases = [case for module in modules for case in module.CASES]
    assert len({(case.op, case.size, case.direction) for case in cases}) == len(cases)
