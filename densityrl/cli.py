"""The command line: parse, build one configuration, call one function, print.

Heavy imports stand inside the commands, so that `densityrl --help` answers at once.
"""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from densityrl import __version__
from densityrl.config import (
    FINETUNE_PRESETS,
    REWARD_PRESETS,
    AnnotationConfig,
    FinetuneConfig,
    MeshSettings,
    RewardConfig,
)
from densityrl.errors import DensityRLError
from densityrl.run import Interrupted

app = typer.Typer(
    name="densityrl",
    help="Sculpt the geometry of a 3D-aware GAN by preference: read densities, train a reward, "
    "fine-tune the generator, compare.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
preferences_app = typer.Typer(
    help="What annotators chose: figures, and tables in and out.", no_args_is_help=True
)
app.add_typer(preferences_app, name="preferences")


def parse_seeds(text: str) -> list[int]:
    """'0-7,12' to [0, ..., 7, 12]; each once, in the order given."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise typer.BadParameter(
                f"{part.strip()!r} is no seed; write for example 0-7,12"
            ) from None
        if not 0 <= low <= high < 2**32:
            raise typer.BadParameter(f"{part.strip()!r} must rise, within 0 to 2**32 - 1")
        if high - low > 1_000_000:
            raise typer.BadParameter(f"{part.strip()!r} is more than a million seeds")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def _usable_device(name: str) -> str:
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device; see `densityrl doctor`")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0]) from None
    return name


def _known_slab(value: str) -> str:
    if value not in ("face", "full"):
        raise typer.BadParameter(f"give face or full, not {value!r}")
    return value


def _known_rule(value: str | None) -> str | None:
    if value is not None:
        from densityrl.preference.oracle import RULES

        if value not in RULES:
            raise typer.BadParameter(f"give {', '.join(RULES)}, not {value!r}")
    return value


def _known_shape(value: str) -> str:
    if value not in ("target", "clip"):
        raise typer.BadParameter(f"give target or clip, not {value!r}")
    return value


def _level_or_auto(value: str) -> float | None:
    if value == "auto":
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(float(value)):
            return float(value)
    raise typer.BadParameter(f"give a raw density or auto, not {value!r}")


GeneratorOption = Annotated[
    str, typer.Option(help="A bundled generator (heads), an EG3D .pkl, or a directory.")
]
SeedsOption = Annotated[
    Any, typer.Option(help="Such as 0-7,12.", parser=parse_seeds, metavar="TEXT")
]
OutOption = Annotated[Path, typer.Option(help="Directory to write.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, ...", callback=_usable_device)]
SlabOption = Annotated[
    Any, typer.Option(help="face (the paper's crop) or full.", parser=_known_slab, metavar="TEXT")
]
LevelOption = Annotated[float, typer.Option(help="Raw density of the surface.")]
StoreOption = Annotated[Path, typer.Option("--db", help="File that annotate writes (SQLite).")]


def _default(config: type, name: str) -> Any:
    """The default of a configuration's field: stated once, shown in --help."""
    return next(field.default for field in fields(config) if field.name == name)


def _preset_option(presets: dict[str, dict[str, Any]]) -> Any:
    """`--preset`: its values become the defaults of the options that come after it."""

    def take(context: typer.Context, name: str) -> str:
        if name not in presets:
            raise typer.BadParameter(f"give {' or '.join(presets)}, not {name!r}")
        context.default_map = {
            key: ",".join(value) if key == "train" else value
            for key, value in presets[name].items()
        }
        return name

    names = ", ".join(presets)
    return typer.Option(
        "--preset", callback=take, is_eager=True, help=f"What options are by default: {names}."
    )


@app.command()
def sample(
    generator: GeneratorOption,
    seeds: SeedsOption,
    out: OutOption,
    resolution: Annotated[int, typer.Option(min=8, help="Points a side of the whole box.")] = 64,
    slab: SlabOption = "full",
    truncation_psi: float = 1.0,
    level: LevelOption = 10.0,
    device: DeviceOption = "cpu",
) -> None:
    """Seeds to density volumes (.npz), meshes (.ply), images and a contact sheet."""
    from densityrl.generator import load_generator
    from densityrl.sample import sample as run
    from densityrl.volume import SlabSettings

    settings = SlabSettings(resolution=resolution, slab=slab, truncation_psi=truncation_psi)
    without_surface = run(load_generator(generator, device), seeds, out, settings, level)
    print(f"{len(seeds)} seeds in {out}; look at {out / 'sheet.png'}")
    if without_surface:
        listed = ", ".join(map(str, without_surface))
        print(f"no mesh for {listed}: the density never crosses --level {level:g}")


@app.command()
def annotate(
    generator: GeneratorOption,
    database: Annotated[
        Path, typer.Option("--db", help="File of choices (SQLite), made or gone on with.")
    ],
    pairs: Annotated[int, typer.Option(min=1, help="Pairs that an annotator is given.")] = _default(
        AnnotationConfig, "pairs"
    ),
    repeats: Annotated[
        float,
        typer.Option(min=0, max=1, help="Further ones, as a share: shown again, sides swapped."),
    ] = _default(AnnotationConfig, "repeats"),
    anchors: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share that compares with a known-good sample (psi 0.25)."),
    ] = _default(AnnotationConfig, "anchors"),
    reward: Annotated[
        Path | None, typer.Option(help="Reward that chooses the pairs it is least sure about.")
    ] = None,
    uncertain: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pairs that --reward chooses.")
    ] = _default(AnnotationConfig, "uncertain"),
    annotator: Annotated[str, typer.Option(help="Name that the page proposes.")] = "",
    first_seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of the samples shown.")
    ] = _default(AnnotationConfig, "first_seed"),
    truncation_psi: float = _default(AnnotationConfig, "truncation_psi"),
    resolution: Annotated[
        int, typer.Option(min=8, help="Points a side of the whole box.")
    ] = _default(MeshSettings, "resolution"),
    slab: SlabOption = _default(MeshSettings, "slab"),
    level: Annotated[
        Any,
        typer.Option(
            help="Raw density of the surface; auto takes it from the histogram.",
            parser=_level_or_auto,
            metavar="FLOAT|auto",
        ),
    ] = _default(MeshSettings, "level"),
    triangles: Annotated[
        int, typer.Option(min=1000, help="Of a surface at most; finer ones are simplified.")
    ] = _default(MeshSettings, "triangles"),
    cache: Annotated[
        Path | None, typer.Option(help="Folder of surfaces; by default beside --db.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    i_know: Annotated[
        bool,
        typer.Option("--i-know", help="Let other machines in, by --host: who has the URL, has it."),
    ] = False,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    device: DeviceOption = "cpu",
) -> None:
    """The local page on which people compare shapes; needs the extra annotate."""
    try:
        from densityrl.annotation.server import is_loopback, serve
    except ModuleNotFoundError as error:
        raise DensityRLError(
            f"the annotation page needs {error.name}: pip install 'densityrl[annotate]'"
        ) from None
    if not is_loopback(host) and not i_know:
        raise typer.BadParameter(
            f"--host {host} lets other machines reach the page, unencrypted; add --i-know if "
            "that is meant, or use an SSH tunnel"
        )
    if not math.isfinite(truncation_psi):
        raise typer.BadParameter(f"--truncation-psi takes a finite number, not {truncation_psi}")
    settings = AnnotationConfig(
        generator=generator,
        pairs=pairs,
        repeats=repeats,
        anchors=anchors,
        reward=None if reward is None else str(reward),
        uncertain=uncertain,
        first_seed=first_seed,
        truncation_psi=truncation_psi,
        mesh=MeshSettings(resolution=resolution, slab=slab, level=level, triangles=triangles),
        device=device,
    )

    def ready(address: str, shown_level: float, suggested: float, saved: int) -> None:
        print(
            f"surfaces at the raw density {shown_level:.4g}; the histogram suggests "
            f"{suggested:.4g} (--level auto)"
        )
        print(f"{saved} choices in {database}; each is saved before the next pair appears")
        print(f"open {address} (Ctrl-C ends)", flush=True)
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve(
        settings,
        database,
        host=host,
        port=port,
        cache=cache,
        suggested_name=annotator,
        on_ready=ready,
    )
    print(f"look at `densityrl preferences stats --db {database}`")


@preferences_app.command()
def stats(
    database: StoreOption,
    as_json: Annotated[bool, typer.Option("--json", help="Figures for programs.")] = False,
) -> None:
    """How many pairs, how fast, and how far annotators agree, with each other and themselves."""
    import json

    from densityrl.preference.agreement import agreement, describe_agreement
    from densityrl.preference.store import PreferenceStore

    with PreferenceStore(database) as store:
        figures = agreement(store)
    print(json.dumps(figures, indent=2) if as_json else describe_agreement(figures))


@preferences_app.command("export")
def export_preferences(
    database: StoreOption,
    out: Annotated[Path, typer.Option(help="CSV to write.")],
    log: Annotated[
        bool, typer.Option("--log", help="Every choice as it was made, and not the decided pairs.")
    ] = False,
) -> None:
    """Decided pairs as reward-train reads them, or every choice, to a CSV."""
    from densityrl.preference.store import PreferenceStore, write_choices, write_decisions

    with PreferenceStore(database) as store:
        count = (write_choices if log else write_decisions)(out, store)
    print(f"{count} {'choices' if log else 'decided pairs'} in {out}")


@preferences_app.command("import")
def import_preferences(
    database: StoreOption,
    preferences: Annotated[
        Path, typer.Option(help="CSV with winner,loser, or rank1,rank2,...: seeds, better first.")
    ],
    annotator: Annotated[
        str, typer.Option(help="Of pairs for which the CSV names nobody.")
    ] = "imported",
    truncation_psi: Annotated[
        float, typer.Option(help="Truncation the ranked samples were made with.")
    ] = 1.0,
) -> None:
    """Pairs of a CSV into a file of choices, which is made if need be."""
    from densityrl.preference import read_preferences
    from densityrl.preference.store import PreferenceStore

    if not math.isfinite(truncation_psi):
        raise DensityRLError(f"a truncation is a finite number, not {truncation_psi}")
    table = read_preferences(preferences)
    with PreferenceStore(database, create=True) as store:
        store.describe({"truncation_psi": truncation_psi})
        added = store.add_table(table, annotator, truncation_psi)
    print(f"{added} pairs added to {database}; {len(table) - added} were there already")


@app.command()
def reward_train(
    generator: GeneratorOption,
    preferences: Annotated[
        Path,
        typer.Option(
            help="CSV with winner,loser, or rank1,rank2,...: seeds, better first; or the file that "
            "annotate writes."
        ),
    ],
    out: OutOption,
    preset: Annotated[str, _preset_option(REWARD_PRESETS)] = "default",
    volumes: Annotated[
        Path | None, typer.Option(help="Folder of volumes that several runs share.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first pairs.")] = None,
    resolution: Annotated[
        int, typer.Option(min=8, help="Points a side of the whole box; the paper has 256.")
    ] = _default(RewardConfig, "resolution"),
    slab: SlabOption = _default(RewardConfig, "slab"),
    truncation_psi: Annotated[
        float, typer.Option(help="Truncation the ranked samples were made with.")
    ] = _default(RewardConfig, "truncation_psi"),
    mirror: Annotated[
        bool, typer.Option(help="Show pairs left-right mirrored half of the time.")
    ] = _default(RewardConfig, "mirror"),
    mistakes: Annotated[
        float, typer.Option(min=0, help="Share of wrong answers to reckon with, below 0.5.")
    ] = _default(RewardConfig, "mistakes"),
    epochs: Annotated[int, typer.Option(min=1)] = _default(RewardConfig, "epochs"),
    patience: Annotated[
        int, typer.Option(min=1, help="Epochs without improvement before stopping.")
    ] = _default(RewardConfig, "patience"),
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step.")] = _default(
        RewardConfig, "batch"
    ),
    learning_rate: float = _default(RewardConfig, "learning_rate"),
    inversion_slabs: Annotated[
        int, typer.Option(min=0, help="Without labels, that the inversion network is fitted on.")
    ] = _default(RewardConfig, "inversion_slabs"),
    anchors: Annotated[
        int, typer.Option(min=0, help="Known-good samples (psi 0.25); the paper has 1000.")
    ] = _default(RewardConfig, "anchors"),
    seed: int = _default(RewardConfig, "seed"),
    resume: ResumeOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Preferences to a reward model over density volumes."""
    options = {
        "generator": generator,
        "preferences": str(preferences),
        "volumes": None if volumes is None else str(volumes),
        "limit": limit,
        "resolution": resolution,
        "slab": slab,
        "truncation_psi": truncation_psi,
        "mirror": mirror,
        "mistakes": mistakes,
        "epochs": epochs,
        "patience": patience,
        "batch": batch,
        "learning_rate": learning_rate,
        "inversion_slabs": inversion_slabs,
        "anchors": anchors,
        "seed": seed,
    }
    config = RewardConfig(**{**REWARD_PRESETS[preset], **options})
    from densityrl.reward.train import train_reward

    summary = train_reward(config, out, resume=resume, device=device)
    low, high = summary["accuracy_interval"]
    pairs = summary["pairs"]
    print(
        f"held-out accuracy {summary['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}) on "
        f"{pairs[summary['held_out']]} pairs; calibration error "
        f"{summary['calibration']['expected_calibration_error']:.3f}; reward in {out}"
    )
    if pairs["dropped"]:
        print(f"{pairs['dropped']} pairs left out, so that no seed is on two sides of the split")


@app.command()
def finetune(
    generator: GeneratorOption,
    reward: Annotated[Path, typer.Option(help="Directory that reward-train wrote.")],
    out: OutOption,
    preset: Annotated[str, _preset_option(FINETUNE_PRESETS)] = "default",
    steps: Annotated[int, typer.Option(min=1)] = _default(FinetuneConfig, "steps"),
    batch: Annotated[int, typer.Option(min=1, help="Latents at a time.")] = _default(
        FinetuneConfig, "batch"
    ),
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = _default(
        FinetuneConfig, "accumulate"
    ),
    learning_rate: float = _default(FinetuneConfig, "learning_rate"),
    train: Annotated[
        str,
        typer.Option(
            help="What moves, comma-separated: steering, mapping, synthesis, styles, early, late, "
            "decoder."
        ),
    ] = ",".join(_default(FinetuneConfig, "train")),
    reward_weight: float = _default(FinetuneConfig, "reward_weight"),
    reward_shape: Annotated[
        str,
        typer.Option(
            help="target: raise rewards below a target; clip: all of them.",
            callback=_known_shape,
        ),
    ] = _default(FinetuneConfig, "reward_shape"),
    reward_target: Annotated[
        float, typer.Option(min=0, max=1, help="Quantile of the rewards before tuning to reach.")
    ] = _default(FinetuneConfig, "reward_target"),
    reward_clip: float = _default(FinetuneConfig, "reward_clip"),
    consistency_weight: float = _default(FinetuneConfig, "consistency_weight"),
    appearance_weight: float = _default(FinetuneConfig, "appearance_weight"),
    appearance_resolution: Annotated[
        int, typer.Option(min=4, help="Side of the images compared.")
    ] = _default(FinetuneConfig, "appearance_resolution"),
    ema_decay: Annotated[float, typer.Option(min=0, max=1)] = _default(FinetuneConfig, "ema_decay"),
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps.")] = _default(
        FinetuneConfig, "checkpoint_every"
    ),
    seed: int = _default(FinetuneConfig, "seed"),
    resume: ResumeOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Generator and reward to a generator with better geometry."""
    options = {
        "generator": generator,
        "reward": str(reward),
        "steps": steps,
        "batch": batch,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "train": tuple(word.strip() for word in train.split(",")),
        "reward_weight": reward_weight,
        "reward_shape": reward_shape,
        "reward_target": reward_target,
        "reward_clip": reward_clip,
        "consistency_weight": consistency_weight,
        "appearance_weight": appearance_weight,
        "appearance_resolution": appearance_resolution,
        "ema_decay": ema_decay,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
    }
    config = FinetuneConfig(**{**FINETUNE_PRESETS[preset], **options})
    from densityrl.finetune.train import finetune as run

    summary = run(config, out, resume=resume, device=device)
    print(
        f"held-out reward {summary['held_out_reward_before']:.3f} -> "
        f"{summary['held_out_reward_after']:.3f}, better on "
        f"{summary['held_out_share_better']:.0%} of {len(summary['held_out_seeds'])} seeds; "
        f"tuned generator in {out}"
    )


@app.command()
def evaluate(
    base: GeneratorOption,
    tuned: GeneratorOption,
    reward: Annotated[Path, typer.Option(help="Directory that reward-train wrote.")],
    seeds: SeedsOption,
    out: OutOption,
    level: LevelOption = 10.0,
    annotator: Annotated[
        str | None,
        typer.Option(
            help="Judge also by a simulated annotator's rule: clean, smooth, symmetric, nose.",
            callback=_known_rule,
            metavar="RULE",
        ),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Seeds shown on the page.")] = 8,
    device: DeviceOption = "cpu",
) -> None:
    """Base against tuned: share preferred, appearance, one page with pictures."""
    from densityrl.evaluation import evaluate as run
    from densityrl.generator import load_generator
    from densityrl.preference.oracle import SimulatedAnnotator
    from densityrl.reward import RewardModel

    base_generator = load_generator(base, device)
    groups = base_generator.config.latent_groups
    if annotator == "clean" and not {"faults", "spare"} <= groups.keys():
        raise typer.BadParameter(
            f"the latent of {base} has no faults to leave out: give another --annotator than clean"
        )
    summary = run(
        base_generator,
        load_generator(tuned, device),
        RewardModel.load(reward, device),
        seeds,
        out,
        level=level,
        annotator=None if annotator is None else SimulatedAnnotator(rule=annotator, level=level),
        pictures=pictures,
        about={"base": base, "tuned": tuned, "reward": str(reward)},
    )
    low, high = summary["tuned_preferred_interval"]
    print(
        f"tuned preferred on {summary['tuned_preferred']:.1%} of {len(seeds)} seeds "
        f"(95 % interval {low:.1%} to {high:.1%}); look at {out / 'report.html'}"
    )
    if judged := summary.get("simulated_annotator"):
        low, high = judged["tuned_preferred_interval"]
        print(
            f"by a simulated annotator's rule {judged['rule']!r} {judged['tuned_preferred']:.1%} "
            f"are better (95 % interval {low:.1%} to {high:.1%})"
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/demo"),
    pairs: Annotated[int, typer.Option(min=20, help="Preferences to simulate.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Steps of fine-tuning.")] = _default(
        FinetuneConfig, "steps"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a demo that was interrupted.")
    ] = False,
) -> None:
    """The whole loop on the bundled generator with a simulated annotator, in minutes."""
    from densityrl.demo import demo as run

    for line in run(out, pairs=pairs, steps=steps, resume=resume):
        print(line, flush=True)


@app.command()
def doctor() -> None:
    """What is installed, and which backend each operation takes and why."""
    from densityrl.doctor import report

    print(report())


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"densityrl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: an error that a user can act on is one line, a signal its usual exit code."""
    try:
        app()
    except DensityRLError as error:
        print(f"densityrl: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as stop:
        print(f"densityrl: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None


if __name__ == "__main__":
    main()
