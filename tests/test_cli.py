"""The command line: every command through its files, and one sentence for what is wrong."""

import dataclasses
import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import trimesh
import typer
from PIL import Image
from tiny import CONFIG, NETWORKS, save_pairs, save_tiny, tiny_generator
from typer.testing import CliRunner

from densityrl import __version__, cli
from densityrl.cli import app, main, parse_seeds
from densityrl.config import FINETUNE_PRESETS, REWARD_PRESETS, FinetuneConfig, RewardConfig
from densityrl.errors import RunError
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
    with pytest.MonkeyPatch.context() as patch:  # small, which no option asks for
        patch.setattr(cli, "RewardConfig", partial(RewardConfig, **NETWORKS["inversion"]))
        patch.setattr(cli, "FinetuneConfig", partial(FinetuneConfig, target_seeds=8))
        said["reward-train"] = run(
            *("reward-train", "--generator", generator, "--preferences", root / "pairs.csv"),
            *("--resolution", 16, "--epochs", 2, "--anchors", 6, "--inversion-slabs", 30),
            *("--volumes", root / "volumes", "--out", root / "reward"),
        )
        said["finetune"] = run(
            *("finetune", "--generator", generator, "--reward", root / "reward", "--steps", 2),
            *("--batch", 2, "--appearance-resolution", 6, "--train", "synthesis, decoder"),
            *("--out", root / "tuned"),
        )
    said["evaluate"] = run(
        *("evaluate", "--base", generator, "--tuned", root / "tuned", "--reward", root / "reward"),
        *("--seeds", "100-103", "--pictures", 1, "--level", 6, "--annotator", "symmetric"),
        *("--out", root / "evaluation"),
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
    assert "[default: 0.0002]" in shown
    assert "[default: steering]" in shown


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
    assert config["learning_rate"] == RewardConfig(generator="", preferences="").learning_rate
    assert not (root / "reward" / "volumes").exists()
    made = list((root / "volumes").rglob("seed*.npy"))
    assert len(made) == 40 + 6 + 30


def test_finetune(world):
    root, said = world
    summary = json.loads((root / "tuned" / "summary.json").read_text())
    assert f"-> {summary['held_out_reward_after']:.3f}" in said["finetune"]
    config = json.loads((root / "tuned" / "config.json").read_text())["config"]
    assert config["train"] == ["synthesis", "decoder"]


def test_evaluate(world):
    root, said = world
    assert str(root / "evaluation" / "report.html") in said["evaluate"]
    summary = json.loads((root / "evaluation" / "evaluation.json").read_text())
    assert summary["seeds"] == 4
    judged = summary["simulated_annotator"]
    assert f"'symmetric' {judged['tuned_preferred']:.1%} are better" in said["evaluate"]


# --- presets -------------------------------------------------------------------------------------

GIVEN = {
    "reward-train": {"generator": "g", "preferences": "p.csv"},
    "finetune": {"generator": "g", "reward": "r"},
}
PRESETS = {
    "reward-train": (RewardConfig, REWARD_PRESETS),
    "finetune": (FinetuneConfig, FINETUNE_PRESETS),
}


@pytest.fixture
def configuration(monkeypatch):
    """What a command would run with, given options in any order."""
    seen = []

    def stop(config, out, **_):
        seen.append(config)
        raise RunError("this is far enough")

    monkeypatch.setattr("densityrl.reward.train.train_reward", stop)
    monkeypatch.setattr("densityrl.finetune.train.finetune", stop)

    def of(command, *arguments):
        given = [part for key, value in GIVEN[command].items() for part in (f"--{key}", value)]
        result = CliRunner().invoke(app, [command, *map(str, arguments), *given, "--out", "o"])
        assert isinstance(result.exception, RunError), result.output
        return seen.pop()

    return of


@pytest.mark.parametrize("command", PRESETS)
def test_without_options_the_defaults_are_those_of_the_configuration(configuration, command):
    expected = PRESETS[command][0](**GIVEN[command])
    assert configuration(command) == expected
    assert configuration(command, "--preset", "default") == expected


@pytest.mark.parametrize(
    ("command", "preset"),
    [("reward-train", "conv"), ("reward-train", "paper"), ("finetune", "paper")],
)
def test_a_preset_sets_what_is_not_given(configuration, command, preset):
    kind, presets = PRESETS[command]
    expected = kind(**GIVEN[command], **presets[preset])
    assert expected != kind(**GIVEN[command])
    assert configuration(command, "--preset", preset) == expected
    assert configuration(command) == kind(**GIVEN[command])  # nothing stays behind


@pytest.mark.parametrize(
    ("command", "options", "values"),
    [
        ("reward-train", ("--batch", 3), {"batch": 3}),
        # Values that are the defaults without a preset count too.
        ("reward-train", ("--no-mirror",), {"mirror": False}),
        ("reward-train", ("--mistakes", 0.1), {"mistakes": 0.1}),
        ("reward-train", ("--learning-rate", 0.01), {"learning_rate": 0.01}),
        ("reward-train", ("--resolution", 32), {"resolution": 32}),
        ("reward-train", ("--inversion-slabs", 1000), {"inversion_slabs": 1000}),
        ("finetune", ("--reward-shape", "target"), {"reward_shape": "target"}),
        ("finetune", ("--train", "early, decoder"), {"train": ("early", "decoder")}),
        ("finetune", ("--batch", 4, "--seed", 8), {"batch": 4, "seed": 8}),
    ],
)
def test_a_preset_leaves_what_is_given(configuration, command, options, values):
    kind, presets = PRESETS[command]
    expected = dataclasses.replace(kind(**GIVEN[command], **presets["paper"]), **values)
    assert configuration(command, "--preset", "paper", *options) == expected
    assert configuration(command, *options, "--preset", "paper") == expected


@pytest.mark.parametrize("command", PRESETS)
def test_presets_name_fields(command):
    kind, presets = PRESETS[command]
    names = {field.name for field in dataclasses.fields(kind)}
    assert presets["default"] == {}
    for values in presets.values():
        assert values.keys() <= names - GIVEN[command].keys()


def test_options_reach_the_configuration(configuration):
    config = configuration("reward-train", "--mirror", "--volumes", "v", "--anchors", 5)
    assert (config.mirror, config.volumes, config.anchors) == (True, "v", 5)
    assert configuration("reward-train", "--inversion-slabs", 0).inversion_slabs == 0
    assert configuration("reward-train", "--mistakes", 0.2).mistakes == 0.2
    config = configuration("finetune", "--reward-shape", "clip", "--reward-target", 0.5)
    assert (config.reward_shape, config.reward_target) == ("clip", 0.5)
    assert configuration("finetune", "--train", "styles,late").train == ("styles", "late")


def test_doctor():
    said = run("doctor")
    assert f"torch {torch.__version__}" in said
    assert "heads" in said
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
            *("reward-train", "--generator", "heads", "--preferences", tmp_path / "no.csv"),
            *out,
        ),
        "no reward in": (
            *("finetune", "--generator", "heads", "--reward", tmp_path),
            *out,
        ),
        "box of side 1.0, the generator's is 2.0": (
            *("finetune", "--generator", tmp_path / "larger", "--reward", root / "reward"),
            *out,
        ),
        "nothing to resume": (
            *("finetune", "--generator", "heads", "--reward", root / "reward", "--resume"),
            *("--out", tmp_path / "never"),
        ),
        "already holds a run; add --resume": (
            *("finetune", "--generator", "heads", "--reward", root / "reward"),
            *("--out", root / "tuned"),
        ),
        "choose from steering, mapping, synthesis, styles, early, late, decoder": (
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
    ("command", "option", "value", "message"),
    [
        ("reward-train", "--preset", "mine", "give default or conv or paper, not 'mine'"),
        ("reward-train", "--inversion-slabs", -1, "0"),
        ("finetune", "--preset", "mine", "give default or paper, not 'mine'"),
        ("finetune", "--reward-shape", "round", "give target or clip, not 'round'"),
        ("finetune", "--reward-target", 1.5, "1"),
        ("evaluate", "--annotator", "ears", "give clean, smooth, symmetric, nose, not 'ears'"),
        ("sample", "--seeds", "x", "'x' is no seed"),
        ("sample", "--slab", "nose", "give face or full, not 'nose'"),
        ("sample", "--resolution", 2, "8"),
        ("sample", "--device", "warp", "device"),
        pytest.param(
            *("sample", "--device", "cuda", "torch sees no CUDA device"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_values_that_are_refused(monkeypatch, capsys, tmp_path, command, option, value, message):
    needed = {
        "sample": {"--generator": "heads", "--seeds": 1},
        "reward-train": {"--generator": "heads", "--preferences": "p.csv"},
        "finetune": {"--generator": "heads", "--reward": "r"},
        "evaluate": {"--base": "heads", "--tuned": "heads", "--reward": "r", "--seeds": 1},
    }
    given = {**needed[command], "--out": tmp_path, option: value}
    arguments = [part for pair in given.items() for part in pair]
    shown = refused(monkeypatch, capsys, command, *arguments, code=2)
    assert message in " ".join(shown.replace("│", " ").split())
    assert f"'{option}'" in shown


def test_a_generator_without_faults_has_no_clean_twins(monkeypatch, capsys, tmp_path, world):
    root, _ = world
    generator = root / "generator"
    shown = refused(
        *(monkeypatch, capsys, "evaluate", "--base", generator, "--tuned", generator),
        *("--reward", root / "reward", "--seeds", 1, "--annotator", "clean"),
        *("--out", tmp_path / "out"),
        code=2,
    )
    assert "has no faults to leave out" in " ".join(shown.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
