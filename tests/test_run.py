"""Run directories: what a kill, a second process, a signal or a wrong option may not break."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import densityrl.run
from densityrl.errors import NonFiniteError, RunError
from densityrl.run import (
    Interrupted,
    InterruptGuard,
    Metrics,
    RunDirectory,
    atomic_path,
    atomic_write,
    load_state,
    progress,
    save_state,
    write_summary,
)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# --- atomic files --------------------------------------------------------------------------------


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_written_with_the_usual_permissions(tmp_path: Path) -> None:
    atomic_write(tmp_path / "ours", "")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def write_half() -> None:
        with atomic_path(path) as partial:
            assert partial.parent == tmp_path
            assert partial.name.endswith(".partial")
            partial.write_text("ha")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("moment", ["while writing", "before renaming"])
def test_a_kill_keeps_the_old_file(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")
    program = """
import os, pathlib, signal, sys
from densityrl.run import atomic_path
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
with atomic_path(sys.argv[1]) as partial:
    partial.write_text("new")
    if sys.argv[2] == "while writing":
        die()
    pathlib.Path.replace = die
"""
    assert start(program, path, moment).wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    (leftover,) = set(names(tmp_path)) - {"a.txt"}
    assert leftover.endswith(".partial")


def test_kills_at_any_time_leave_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    program = """
import sys
from densityrl.run import atomic_write
print("ready", flush=True)
for i in range(10**9):
    atomic_write(sys.argv[1], bytes([i % 251]) * 2_000_000)
"""
    seen = set()
    for trial in range(6):
        process = start(program, path)
        process.stdout.readline()
        time.sleep(random.Random(trial).uniform(0.02, 0.15))
        process.kill()
        process.communicate()
        if path.exists():
            content = path.read_bytes()
            assert content == content[:1] * 2_000_000
            seen.add(content[0])
    assert seen


def test_refused_writes_are_run_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*absent/a\.txt: No such file"):
        atomic_write(tmp_path / "absent" / "a.txt", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="Is a directory"):
        atomic_write(tmp_path / "folder", "")
    assert names(tmp_path) == ["folder"]


FULL_DISK = """
import resource, signal, sys, torch
from densityrl.errors import RunError
from densityrl.run import atomic_write, save_state
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (lambda: atomic_write(sys.argv[1], bytes(20_000)),
              lambda: save_state(sys.argv[1], {"x": torch.zeros(20_000)})):
    try:
        write()
    except RunError as error:
        print(error)
"""


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    atomic_write(path, "old")
    output, _ = start(FULL_DISK, path).communicate()
    first, second = output.splitlines()
    assert first == f"cannot write {path}: File too large"
    assert second.startswith(f"cannot write {path}: ")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["state"]


def test_summary(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 3, "win_rate": 0.744})
    assert path.read_text() == '{\n  "steps": 3,\n  "win_rate": 0.744\n}\n'
    with pytest.raises(NonFiniteError, match=r"summary\.json: loss is not finite"):
        write_summary(path, {"loss": float("nan")})
    assert json.loads(path.read_text())["steps"] == 3


# --- state ---------------------------------------------------------------------------------------


def assert_same(one: Any, other: Any) -> None:
    """Equal in value, type, dtype and shape all the way down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert repr(one) == repr(other)  # repr, because NaN is not NaN, and 0.0 is -0.0


def round_trip(path: Path, state: dict) -> dict:
    save_state(path, state)
    return load_state(path)


def test_plain_values_come_back(tmp_path: Path) -> None:
    state = {
        "step": 7,
        "flag": True,
        "none": None,
        "text": 'a "quoted" line\n\u2028 \U0001f600',
        "floats": [0.1, 1e-300, -0.0, 1 / 3, float("inf"), float("nan"), 5.0],
        "betas": (0.9, (0.999,)),
        "nested": {0: {"a": []}, "0": {}, -1: ()},
        "python": random.Random(3).getstate(),
        "big": 2**127 + 1,
        "looks like a tag": {"tensor": "step", "dict": [], "tuple": [1]},
        "": 0,
    }
    assert_same(round_trip(tmp_path / "s", state), state)
    assert round_trip(tmp_path / "s", {}) == {}


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 0], [5, 0, 7]]).to(dtype)
    state = {"x": values, "list": [values[0, 1], values[:, :0]], "t": (values[1, 2],)}
    assert_same(round_trip(tmp_path / "s", state), state)


def test_bfloat16_and_special_values_come_back(tmp_path: Path) -> None:
    back = round_trip(tmp_path / "s", {"x": torch.tensor([1 / 3, -0.0]).bfloat16()})["x"]
    assert back.dtype == torch.bfloat16
    assert back.view(torch.int16).tolist() == [16043, -32768]
    special = {"x": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])}
    assert_same(round_trip(tmp_path / "s", special), special)


def test_views_ties_and_strides(tmp_path: Path) -> None:
    base = torch.arange(100_000.0)
    parameter = torch.nn.Parameter(base[:3])
    state = {
        "column": base.view(-1, 10)[:3, 1],
        "transposed": base[:6].view(2, 3).T,
        "expanded": base[1:2].expand(4),
        "parameter": parameter,
        "tied": parameter,
        "tail": base[-2:],
    }
    back = round_trip(tmp_path / "s", state)
    assert (tmp_path / "s").stat().st_size < 2000  # a view is not stored with its whole base
    assert back["column"].tolist() == [1.0, 11.0, 21.0]
    assert back["transposed"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert back["expanded"].tolist() == [1.0] * 4
    assert back["parameter"].tolist() == back["tied"].tolist() == [0.0, 1.0, 2.0]
    assert back["tail"].tolist() == [99998.0, 99999.0]
    assert not back["parameter"].requires_grad


def test_names_that_flatten_alike(tmp_path: Path) -> None:
    zero, one, two, three = torch.arange(4)
    state = {"a/b": zero, "a": {"b": one}, 0: two, "0": three}
    assert_same(round_trip(tmp_path / "s", state), state)


def test_changing_what_was_loaded_does_not_change_the_file(tmp_path: Path) -> None:
    back = round_trip(tmp_path / "s", {"x": torch.ones(3)})
    back["x"].zero_()
    assert load_state(tmp_path / "s")["x"].tolist() == [1.0, 1.0, 1.0]


def test_state_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_state(tmp_path / "s", {"model": {"weight": torch.ones(2)}, "list": [torch.zeros(1)]})
    assert sorted(load_file(tmp_path / "s")) == ["list/0", "model/weight"]


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", 1j], ids=lambda value: type(value).__name__
)
def test_values_that_cannot_be_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="state 'a/b': cannot save a "):
        save_state(tmp_path / "s", {"a": {"b": value}})
    with pytest.raises(TypeError, match=r"cannot save the key \(1, 2\)"):
        save_state(tmp_path / "s", {(1, 2): 0})
    assert names(tmp_path) == []


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_training_goes_on_bit_equal(tmp_path: Path, optimizer_class: type) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.1}]
        return model, optimizer_class(groups, lr=0.01, betas=(0.8, 0.95), amsgrad=True)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            loss = model(torch.randn(5, 4)).square().sum() + model[0].weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, 3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_state(tmp_path / "s", {**state, "rng": torch.get_rng_state()})
    train(model, optimizer, 4)

    again, optimizer_again = build()
    back = load_state(tmp_path / "s")
    assert list(back["optimizer"]["state"]) == [0, 1, 2, 3]
    assert back["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.95)
    again.load_state_dict(back["model"])
    optimizer_again.load_state_dict(back["optimizer"])
    torch.set_rng_state(back["rng"])
    train(again, optimizer_again, 4)

    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert_same(optimizer_again.state_dict(), optimizer.state_dict())


def test_state_that_is_not_ours(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "s"
    with pytest.raises(RunError, match="s does not exist"):
        load_state(path)
    save_state(path, {"x": torch.arange(1000), "y": [1, 2]})
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 a zip", whole[:-1], whole[:100], whole + b"\0", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(RunError, match="s is damaged or not the saved state"):
            load_state(path)
    assert whole.count(b"dict") == 1
    path.write_bytes(whole.replace(b"dict", b"dics").replace(b'[\\"y\\"', b"[[ 1 ]"))
    with pytest.raises(RunError, match="s is damaged or not the saved state"):
        load_state(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(RunError, match="s is not the saved state of a run"):
        load_state(path)
    with pytest.raises(RunError, match="damaged or not"):
        load_state(tmp_path)


# --- run directories -----------------------------------------------------------------------------

CONFIG = {"lr": 1e-5, "steps": 10, "slab": {"left": 0.25}, "out": Path("x"), "betas": (0.9, 0.99)}


def create(path: Path, resume: bool = False, **changes: object) -> RunDirectory:
    config = {**CONFIG, **changes}
    return RunDirectory.create(path, "finetune", config, resume, may_change={"steps"})


def test_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with create(path) as run:
        assert run.path == path
        assert not run.resumed
        assert run.load_state() is None
        assert run.config["slab"] == {"left": 0.25}
        assert run.config["out"] == "x"
        about = json.loads((path / "config.json").read_text())
        assert about["command"] == "finetune"
        assert about["config"] == run.config
        run.save_state({"step": 3})
        assert run.load_state() is None  # what this process saved is no run to go on with
    assert names(path) == [".lock", "config.json", "state.safetensors"]


def test_a_run_goes_on(tmp_path: Path) -> None:
    with create(tmp_path) as run:
        run.save_state({"step": 3})
    (tmp_path / "state.safetensors.0123abcd.partial").write_text("half")
    with create(tmp_path, resume=True, steps=20) as run:
        assert run.resumed
        assert run.load_state() == {"step": 3}
        assert run.config["steps"] == 20
    assert json.loads((tmp_path / "config.json").read_text())["config"]["steps"] == 20
    assert names(tmp_path) == [".lock", "config.json", "state.safetensors"]


def test_a_run_without_a_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    create(tmp_path).close()
    with create(tmp_path, resume=True) as run:
        assert run.resumed
        assert run.load_state() is None


def test_a_folder_with_other_files_may_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    create(tmp_path).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mark", ["config.json", "state.safetensors"])
def test_a_run_is_not_overwritten(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).write_text("old")
    with pytest.raises(RunError, match="already holds a run; add --resume to go on, or choose"):
        create(tmp_path)
    assert (tmp_path / mark).read_text() == "old"


def test_nothing_to_resume(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(RunError, match="nothing to resume; omit --resume"):
            create(path, resume=True)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lr": 1e-4}, "started with lr = 1e-05, not 0.0001; resume with the old value"),
        ({"slab": {"left": 0.3}}, "started with slab.left = 0.25, not 0.3"),
        ({"betas": (0.9, 0.9)}, r"started with betas = \[0.9, 0.99\], not \[0.9, 0.9\]"),
        ({"new": 1}, "started with new = unset, not 1"),
        ({"lr": 1e-4, "steps": 11}, "started with lr = 1e-05"),
    ],
)
def test_a_run_keeps_its_configuration(tmp_path: Path, changes: dict, complaint: str) -> None:
    create(tmp_path).close()
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunError, match=complaint):
        create(tmp_path, resume=True, **changes)
    assert (tmp_path / "config.json").read_bytes() == before
    create(tmp_path, resume=True).close()  # the refusal let go of the lock


def test_a_removed_option_is_named(tmp_path: Path) -> None:
    create(tmp_path, old=2).close()
    with pytest.raises(RunError, match="started with old = 2, not unset"):
        create(tmp_path, resume=True)


def test_another_command_cannot_resume(tmp_path: Path) -> None:
    create(tmp_path).close()
    with pytest.raises(RunError, match="holds a run of 'finetune', which 'reward-train' cannot"):
        RunDirectory.create(tmp_path, "reward-train", CONFIG, resume=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"command": "finetune", "config": 3}'])
def test_a_damaged_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json cannot be read as a run's configuration"):
        create(tmp_path, resume=True)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write to .*file: File exists"):
        create(tmp_path / "file")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    program = """
import sys, time
from densityrl.run import RunDirectory
run = RunDirectory.create(sys.argv[1], "finetune", {"lr": 1})
print("ready", flush=True)
time.sleep(60)
"""
    holder = start(program, tmp_path)
    assert holder.stdout.readline() == "ready\n"
    try:
        for resume in (False, True):
            with pytest.raises(RunError, match="another process is using"):
                RunDirectory.create(tmp_path, "finetune", {"lr": 1}, resume)
    finally:
        holder.kill()
        holder.communicate()
    RunDirectory.create(tmp_path, "finetune", {"lr": 1}, resume=True).close()


# --- metrics -------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_disk_at_once_and_exact(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, torch.tensor(0.1).item()]
    with Metrics(path) as metrics:
        for step, value in enumerate(values):
            metrics.log(step, loss=value)
            assert len(path.read_text().splitlines()) == step + 1
        metrics.log(9, phase="validation", best=True, note=None, count=3)
    *lines, last = read_lines(path)
    assert [line["loss"].hex() for line in lines] == [value.hex() for value in values]
    assert last == {"step": 9, "phase": "validation", "best": True, "note": None, "count": 3}
    assert path.read_text().startswith('{"step": 0, "loss": 0.1}\n')


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_metrics_refuse_what_is_not_a_number(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.log(1, loss=0.5)
        with pytest.raises(NonFiniteError, match=r"^step 2: loss, gap is not finite$"):
            metrics.log(2, ok=1.0, loss=value, gap=value)
    assert read_lines(path) == [{"step": 1, "loss": 0.5}]


def test_a_resumed_run_has_the_metrics_of_an_unbroken_one(tmp_path: Path) -> None:
    def log(metrics: Metrics, steps: range) -> None:
        for step in steps:
            metrics.log(step, loss=1 / step)
            if step % 2 == 0:
                metrics.log(step, validation=step / 3)

    with Metrics(tmp_path / "unbroken.jsonl") as metrics:
        log(metrics, range(1, 11))
    broken = tmp_path / "broken.jsonl"
    with Metrics(broken) as metrics:
        log(metrics, range(1, 9))  # the state was saved at step 6
    with broken.open("ab") as file:
        file.write(b'{"step": 9, "lo')
    with Metrics(broken, resume_step=6) as metrics:
        assert [line["step"] for line in read_lines(broken)] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
        log(metrics, range(7, 11))
    assert broken.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert names(tmp_path) == ["broken.jsonl", "unbroken.jsonl"]


def test_metrics_of_a_new_start_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.log(0, loss=1.0)
    Metrics(path, resume_step=0).close()
    assert read_lines(path) == [{"step": 0, "loss": 1.0}]
    Metrics(path).close()
    assert path.read_bytes() == b""
    Metrics(tmp_path / "absent.jsonl", resume_step=5).close()
    assert (tmp_path / "absent.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", ["what", "{}", "[1]", '{"step": "a"}', ""])
def test_damaged_metrics(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n' + line + '\n{"step": 2}\n'
    path.write_text(content)
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: not a line of metrics"):
        Metrics(path, resume_step=2)
    assert path.read_text() == content


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, *arguments: object) -> None:
            calls.append(arguments)

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(densityrl.run.importlib.util, "find_spec", lambda name: name)
    with Metrics(tmp_path / "metrics.jsonl", resume_step=4) as metrics:
        metrics.log(5, loss=0.5, count=2, best=True, phase="train", none=None)
    folder = str(tmp_path / "tensorboard")
    assert calls == [(folder, 5), ("loss", 0.5, 5), ("count", 2, 5), ("close",)]


# --- signals -------------------------------------------------------------------------------------

LOOP = """
import sys, time
from densityrl.run import Interrupted, InterruptGuard
step = 0
try:
    with InterruptGuard() as guard:
        while True:
            print("working", flush=True)
            deadline = time.monotonic() + float(sys.argv[1])
            while time.monotonic() < deadline:
                time.sleep(0.05)
            step += 1
            if guard.requested:
                raise Interrupted(guard.requested, step)
except Interrupted as stop:
    print(stop, flush=True)
    sys.exit(stop.exit_code)
except KeyboardInterrupt:
    print("at once", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_finish(number: signal.Signals, code: int) -> None:
    process = start(LOOP, 0.5)
    process.stdout.readline()
    process.send_signal(number)
    output, error = process.communicate(timeout=20)
    assert output == f"{number.name}: saved at step 1; add --resume to go on\n"
    assert error == ""
    assert process.returncode == code


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_after_a_signal_stops_at_once(first: signal.Signals) -> None:
    process = start(LOOP, 10)
    process.stdout.readline()
    process.send_signal(first)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert output == "at once\n"


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with InterruptGuard() as guard:
        assert guard.requested is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # `timeout` and schedulers send it again
        assert guard.requested == "SIGTERM"
    with InterruptGuard() as second:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert second.requested == "SIGINT"  # the first decides the exit code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert guard.requested == "SIGTERM"


def test_handlers_are_restored_after_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)

    def fail() -> None:
        with InterruptGuard():
            assert signal.getsignal(signal.SIGINT) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(signal.SIGINT) == before


def test_the_guard_does_nothing_in_a_thread() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with InterruptGuard() as guard:
            seen.append((guard.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_interrupted_says_where_it_stopped() -> None:
    stop = Interrupted("SIGTERM", 12)
    assert str(stop) == "SIGTERM: saved at step 12; add --resume to go on"
    assert stop.exit_code == 143
    assert Interrupted("SIGINT", 1).exit_code == 130


# --- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that densityrl.run sees, in seconds, as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(densityrl.run.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then(clock: list[float]) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=False)
    with progress(1000, "tuning", start=100, console=console) as bar:
        for step in range(101, 131):
            clock[0] += 4
            bar.update(step, loss=step / 3, gap=2)
    assert output.getvalue().splitlines() == [
        "tuning 101/1000, 4.0 s/step, 0:59:56 left, loss 33.67, gap 2",
        "tuning 109/1000, 4.0 s/step, 0:59:24 left, loss 36.33, gap 2",
        "tuning 117/1000, 4.0 s/step, 0:58:52 left, loss 39, gap 2",
        "tuning 125/1000, 4.0 s/step, 0:58:20 left, loss 41.67, gap 2",
        "tuning 130/1000, 4.0 s/step, 0:58:00 left, loss 43.33, gap 2",
    ]


def test_the_last_line_is_printed_once_and_on_errors_too(clock: list[float]) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=False)
    with progress(1, "one", console=console) as bar:
        clock[0] += 0.1
        bar.update(1)
    assert output.getvalue() == "one 1/1, 10.0 steps/s, 0:00:00 left\n"

    def fail() -> None:
        with progress(9, "two", console=console) as bar:
            bar.update(1)
            bar.update(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert output.getvalue().endswith("two 1/9\ntwo 2/9\n")
    with progress(9, "three", console=console):
        pass
    assert "three" not in output.getvalue()


def test_a_terminal_gets_a_live_bar() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, legacy_windows=False)
    with progress(4, "tuning [x]", start=2, console=console) as bar:
        time.sleep(0.01)
        bar.update(4, loss=0.25)
    assert "tuning [x] 4/4" in output.getvalue()
    assert "0:00:00 left, loss 0.25" in output.getvalue()
    assert "\x1b[" in output.getvalue()
