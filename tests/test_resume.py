"""A run that is killed and resumed ends with the same bytes as one that never stopped."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import save_pairs, save_tiny

COMMANDS = {
    "reward-train": ["--resolution", "16", "--epochs", "4", "--batch", "2"],
    "finetune": [
        "--steps",
        "10",
        "--batch",
        "2",
        "--checkpoint-every",
        "3",
        "--appearance-resolution",
        "8",
    ],
}
PRODUCTS = {
    "reward-train": ("reward.safetensors", "reward.json", "metrics.jsonl", "summary.json"),
    "finetune": ("generator.safetensors", "generator.json", "metrics.jsonl", "summary.json"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, and one unbroken run of each command."""
    root = tmp_path_factory.mktemp("resume")
    generator = save_tiny(root / "generator")
    save_pairs(root / "preferences.csv")
    inputs = {
        "reward-train": ["--generator", generator, "--preferences", str(root / "preferences.csv")],
        "finetune": ["--generator", generator, "--reward", str(root / "reward-train")],
    }
    for command in COMMANDS:
        done = start(command, inputs, root / command).wait()
        assert done == 0
    return root, inputs


def start(command, inputs, out, *more):
    arguments = [command, *inputs[command], *COMMANDS[command], "--out", str(out), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "densityrl.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_at(process, out, line, how):
    """Send a signal once the metrics have so many lines; True if the run was still going."""
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= line:
            process.send_signal(how)
            break
        time.sleep(0.002)
    process.wait(120)


def products(command, out):
    """What a run left, but for the paths inside."""
    content = {}
    for name in PRODUCTS[command]:
        path = Path(out) / name
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as handle:
                content[name] = {key: handle.get_tensor(key).tobytes() for key in handle.keys()}  # noqa: SIM118
        else:
            content[name] = path.read_text()
    return content


@pytest.mark.parametrize(
    ("command", "line"),
    [*((command, None) for command in COMMANDS), ("finetune", 1)],  # 1: before any checkpoint
)
def test_kill_9_at_a_random_step(world, tmp_path, command, line):
    root, inputs = world
    line = line or random.randrange(1, 8)
    print(f"killed after {line} lines of metrics")
    process = start(command, inputs, tmp_path / "run")
    stop_at(process, tmp_path / "run", line, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = start(command, inputs, tmp_path / "run", "--resume")
    assert resumed.wait(300) == 0, resumed.stderr.read()
    assert products(command, tmp_path / "run") == products(command, root / command)


def test_sigterm_saves_first(world, tmp_path):
    root, inputs = world
    out = tmp_path / "run"
    process = start("finetune", inputs, out, "--checkpoint-every", "1000")
    stop_at(process, out, 3, signal.SIGTERM)
    message = process.stderr.read().strip().splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "saved at step" in message
    assert "--resume" in message
    step = int(message.split("saved at step ")[1].split(";")[0])
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
    resumed = start("finetune", inputs, out, "--resume")
    assert resumed.wait(300) == 0, resumed.stderr.read()
    assert (
        products("finetune", out)["metrics.jsonl"]
        == products("finetune", root / "finetune")["metrics.jsonl"]
    )


def test_a_run_is_not_overwritten(world):
    root, inputs = world
    again = start("finetune", inputs, root / "finetune")
    assert again.wait(120) == 1
    message = again.stderr.read().strip()
    assert message.startswith("densityrl: ")
    assert "already holds a run; add --resume" in message
    assert "\n" not in message
