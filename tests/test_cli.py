"""The command line: every command through its files, and one sentence for what is wrong."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import trimesh
import typer
from PIL import Image
from tiny import CONFIG, save_pairs, save_tiny, tiny_generator
from typer.testing import CliRunner

from densityrl import __version__
from densityrl.cli import app, main, parse_seeds
from densityrl.generator import TriplaneGenerator, save_generator
from densityrl.volume import SlabSettings, density_slab

COMMANDS = ("sample", "reward-train", "finetune", "evaluate", "demo", "doctor")


def run(*arguments):
    """Output of a command that ends well."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(monkeypatch, capsys, *arguments, code=1):
    """The message of a command that does not."""
    monkeypatch.setattr(sys, "argv", ["densityrl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    return capsys.readouterr().err.strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A generator, preferences, and one run of each command after the other."""
    root = tmp_path_factory.mktemp("cli")
    generator = save_tiny(root / "generator")
    save_pairs(root / "pairs.csv")
    said = {}
    said["reward-train"] = run(
        *("reward-train", "--generator", generator, "--preferences", root / "pairs.csv"),
        *("--resolution", 16, "--epochs", 2, "--out", root / "reward"),
    )
    said["finetune"] = run(
        *("finetune", "--generator", generator, "--reward", root / "reward", "--steps", 2),
        *("--batch", 2, "--appearance-resolution", 6, "--train", "synthesis, decoder"),
        *("--out", root / "tuned"),
    )
    said["evaluate"] = run(
        *("evaluate", "--base", generator, "--tuned", root / "tuned", "--reward", root / "reward"),
        *("--seeds", "100-103", "--pictures", 1, "--level", 6, "--out", root / "evaluation"),
    )
    return root, said


# --- help ----------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    """Heavy imports stand inside the commands, which is what keeps --help under half a second."""
    script = (
        "import sys, densityrl.cli\n"
        "try: densityrl.cli.main()\n"
        "finally: print(sorted({'torch', 'numpy', 'skimage', 'PIL'} & set(sys.modules)))"
    )
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        shown = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        ).stdout
        assert shown.rstrip().endswith("[]")


def test_help_names_every_command():
    shown = run("--help")
    assert all(command in shown for command in COMMANDS)
    assert run("--version").strip() == f"densityrl {__version__}"


def test_defaults_stand_in_the_help():
    shown = re.sub(r"\s+", " ", run("finetune", "--help"))
    assert "0.0005" in shown
    assert "synthesis" in shown


# --- commands ------------------------------------------------------------------------------------


def test_sample(tmp_path):
    generator = save_tiny(tmp_path / "generator")
    out = tmp_path / "out"
    said = run(
        *("sample", "--generator", generator, "--seeds", "3,5", "--resolution", 16),
        *("--level", 6, "--out", out),
    )
    assert str(out / "sheet.png") in said
    settings = SlabSettings(resolution=16, slab="full")
    volumes = density_slab(tiny_generator(), [3, 5], settings)
    for seed, volume in zip((3, 5), volumes, strict=True):
        with np.load(out / "volumes" / f"seed{seed:06d}.npz") as file:
            torch.testing.assert_close(torch.from_numpy(file["sigma"]), volume)
            assert file["lo"].tolist() == [-0.5, -0.5, -0.5]
        assert len(trimesh.load_mesh(out / "meshes" / f"seed{seed:06d}.ply").faces) > 10
        assert Image.open(out / "images" / f"seed{seed:06d}.png").size == (12, 12)
    assert Image.open(out / "sheet.png").width > 4 * 192


def test_sample_says_where_there_is_no_surface(tmp_path):
    generator = save_tiny(tmp_path / "generator")
    said = run(
        *("sample", "--generator", generator, "--seeds", 3, "--resolution", 16),
        *("--level", 1e6, "--out", tmp_path / "out"),
    )
    assert "no mesh for 3: the density never crosses --level 1e+06" in said
    assert list((tmp_path / "out" / "meshes").iterdir()) == []


def test_reward_train(world):
    root, said = world
    summary = json.loads((root / "reward" / "summary.json").read_text())
    assert f"held-out accuracy {summary['accuracy']:.1%}" in said["reward-train"]
    config = json.loads((root / "reward" / "config.json").read_text())["config"]
    assert config["resolution"] == 16
    assert config["learning_rate"] == 1e-3


def test_finetune(world):
    root, said = world
    summary = json.loads((root / "tuned" / "summary.json").read_text())
    assert f"-> {summary['held_out_reward_after']:.3f}" in said["finetune"]
    config = json.loads((root / "tuned" / "config.json").read_text())["config"]
    assert config["train"] == ["synthesis", "decoder"]


def test_evaluate(world):
    root, said = world
    assert str(root / "evaluation" / "report.html") in said["evaluate"]
    assert json.loads((root / "evaluation" / "evaluation.json").read_text())["seeds"] == 4


def test_doctor():
    said = run("doctor")
    assert f"torch {torch.__version__}" in said
    assert "busts" in said
    assert re.search(r"CPU kernels: (compiled, \w+ in use|.+ takes .+ times)", said)
    assert re.search(r"CUDA kernels: (compiled|the CUDA extension is not there .*nvcc)", said)
    for operation in ("density_grid", "radiance", "density_gradient"):
        assert re.search(rf"{operation}: \w+ \(.+\)", said)


# --- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("5, 1-2,5", [5, 1, 2]), ("4294967295", [2**32 - 1])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "4294967296", "0-9999999", "1.5"])
def test_no_seeds(text):
    with pytest.raises(typer.BadParameter):
        parse_seeds(text)


def test_one_sentence_each(monkeypatch, capsys, tmp_path, world):
    root, _ = world
    larger = dataclasses.replace(CONFIG, rendering={**CONFIG.rendering, "box_warp": 2.0})
    save_generator(TriplaneGenerator(larger), tmp_path / "larger")
    out = ("--out", tmp_path / "out")
    wrong = {
        "no generator at nowhere": (
            *("sample", "--generator", "nowhere", "--seeds", 1),
            *out,
        ),
        "cannot read": (
            *("reward-train", "--generator", "busts", "--preferences", tmp_path / "no.csv"),
            *out,
        ),
        "no reward in": (
            *("finetune", "--generator", "busts", "--reward", tmp_path),
            *out,
        ),
        "box of side 1.0, the generator's is 2.0": (
            *("finetune", "--generator", tmp_path / "larger", "--reward", root / "reward"),
            *out,
        ),
        "nothing to resume": (
            *("finetune", "--generator", "busts", "--reward", root / "reward", "--resume"),
            *("--out", tmp_path / "never"),
        ),
        "already holds a run; add --resume": (
            *("finetune", "--generator", "busts", "--reward", root / "reward"),
            *("--out", root / "tuned"),
        ),
        "choose from mapping, synthesis, decoder": (
            *("finetune", "--generator", root / "generator", "--reward", root / "reward"),
            *("--train", "everything", *out),
        ),
    }
    for part, arguments in wrong.items():
        message = refused(monkeypatch, capsys, *arguments)
        assert message.startswith("densityrl: ")
        assert part in message
        assert "\n" not in message
    assert not (tmp_path / "out").exists()  # the corrected command may use it


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "x", "'x' is no seed"),
        ("--slab", "nose", "give face or full, not 'nose'"),
        ("--resolution", 2, "8"),
        ("--device", "warp", "device"),
        pytest.param(
            *("--device", "cuda", "torch sees no CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_values_that_are_refused(monkeypatch, capsys, tmp_path, option, value, message):
    given = {"--generator": "busts", "--seeds": 1, "--out": tmp_path, option: value}
    arguments = [part for pair in given.items() for part in pair]
    shown = refused(monkeypatch, capsys, "sample", *arguments, code=2)
    assert message in " ".join(shown.replace("│", " ").split())
    assert f"'{option}'" in shown
