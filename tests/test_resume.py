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
from tiny import NETWORKS, save_pairs, save_tiny

# The command line, with values of configurations that it has no options for.
SCRIPT = """
import json, sys
from functools import partial
from densityrl import cli

for name, values in json.loads(sys.argv.pop(1)).items():
    setattr(cli, name, partial(getattr(cli, name), **values))
cli.main()
"""
CONFIGS = {
    **{name: {"RewardConfig": values} for name, values in NETWORKS.items()},
    "finetune": {"FinetuneConfig": {"target_seeds": 8}},
    "weights": {"FinetuneConfig": {"target_seeds": 8}},
}
REWARD_TRAIN = ["reward-train", "--resolution", "16", "--epochs", "8", "--batch", "2"]
FINETUNE = ["finetune", "--steps", "10", "--batch", "2", "--checkpoint-every", "3"]
FINETUNE += ["--appearance-resolution", "8"]
RUNS = {
    "inversion": [*REWARD_TRAIN, "--anchors", "6", "--inversion-slabs", "30"],
    "conv": [*REWARD_TRAIN, "--anchors", "6", "--learning-rate", "0.001"],
    "finetune": FINETUNE,
    "weights": [*FINETUNE, "--train", "mapping"],  # and not steering, as by default
}
LOGS = ("metrics.jsonl", "summary.json")
PRODUCTS = {
    "inversion": ("reward.safetensors", "reward.json", *LOGS),
    "conv": ("reward.safetensors", "reward.json", *LOGS),
    "finetune": ("generator.safetensors", "generator.json", *LOGS),
    "weights": ("generator.safetensors", "generator.json", *LOGS),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, and one unbroken run of each kind."""
    root = tmp_path_factory.mktemp("resume")
    generator = save_tiny(root / "generator")
    save_pairs(root / "preferences.csv")
    ranked = ["--generator", generator, "--preferences", str(root / "preferences.csv")]
    judged = ["--generator", generator, "--reward", str(root / "inversion")]
    inputs = {"inversion": ranked, "conv": ranked, "finetune": judged, "weights": judged}
    for run in RUNS:
        done = start(run, inputs, root / run)
        assert done.wait() == 0, done.stderr.read()
    for network in NETWORKS:
        described = json.loads((root / network / "reward.json").read_text())
        assert described["network"]["kind"] == network
    return root, inputs


def start(run, inputs, out, *more):
    arguments = [*RUNS[run], *inputs[run], "--out", str(out), *more]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(CONFIGS[run]), *arguments],
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


def products(run, out):
    """What a run left, but for the paths inside."""
    content = {}
    for name in PRODUCTS[run]:
        path = Path(out) / name
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as handle:
                content[name] = {key: handle.get_tensor(key).tobytes() for key in handle.keys()}  # noqa: SIM118
        else:
            content[name] = path.read_text()
    return content


@pytest.mark.parametrize(
    ("run", "line"),
    # 1: before any checkpoint
    [*((run, None) for run in RUNS), ("finetune", 1), ("inversion", 1)],
)
def test_kill_9_at_a_random_step(world, tmp_path, run, line):
    root, inputs = world
    # Of 8 lines an epoch, after which a reward's state is saved; a fine-tuning has 11 in all.
    line = line or random.randrange(*((9, 24) if run in NETWORKS else (1, 8)))
    print(f"killed after {line} lines of metrics")
    process = start(run, inputs, tmp_path / "run")
    stop_at(process, tmp_path / "run", line, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = start(run, inputs, tmp_path / "run", "--resume")
    assert resumed.wait(300) == 0, resumed.stderr.read()
    assert products(run, tmp_path / "run") == products(run, root / run)


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
