"""A run and its directory: metrics, atomic checkpoints, resuming, signals, progress.

    DIR/config.json          command, version and resolved configuration
    DIR/state.safetensors    everything needed to go on: weights, optimizer, random states, step
    DIR/metrics.jsonl        one JSON object a line
    DIR/.lock                held while a process writes the run

A kill at any moment leaves each file old or new, never half; torch is imported when first used.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from densityrl import __version__
from densityrl.errors import NonFiniteError, RunError

if TYPE_CHECKING:
    import rich.console
    import torch

STATE_FORMAT = "densityrl-state-1"
PLAIN_PROGRESS_SECONDS = 30.0  # between progress lines in a log file


class Interrupted(Exception):
    """A run stopped at a signal, after saving; `exit_code` is what a shell expects of it."""

    def __init__(self, signal_name: str, step: int) -> None:
        super().__init__(f"{signal_name}: saved at step {step}; add --resume to go on")
        self.exit_code = 128 + signal.Signals[signal_name].value


# --- files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` when the block succeeds.

    The temporary name ends in .partial; it is removed on an exception, and left by a kill.
    Raises RunError where the file system refuses.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        if sys.platform != "win32":  # where a directory cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replace `path` by `content` (text as UTF-8) in one step; see `atomic_path`."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def name_of(settings: Mapping[str, Any]) -> str:
    """16 hex digits that are others for other JSON values: a folder's name for what is cached."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_summary(path: Path | str, summary: Mapping[str, Any]) -> None:
    """Write a mapping of JSON values for people to read; atomic. NonFiniteError for NaN."""
    atomic_write(path, _to_json(summary, str(path), indent=2) + "\n")


def _to_json(value: Mapping[str, Any], what: str, indent: int | None = None) -> str:
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except ValueError as error:
        bad = [k for k, v in value.items() if isinstance(v, float) and not math.isfinite(v)]
        raise NonFiniteError(f"{what}: {', '.join(bad) or 'a value'} is not finite") from error


# --- state ---------------------------------------------------------------------------------------


def save_state(path: Path | str, state: Mapping[Any, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values to one safetensors file.

    Tensors of any device are stored under slash-joined names, the rest as JSON in the file's
    metadata; dict keys are strings or integers. Atomic. Raises TypeError for other values,
    RunError where the file system refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_flatten(state, "", tensors, set()))
    try:
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata={"format": STATE_FORMAT, "state": tree})
    except SafetensorError as error:
        raise RunError(f"cannot write {path}: {error}") from error


def load_state(path: Path | str) -> dict[Any, Any]:
    """Read what `save_state` wrote: equal values and types, tensors on the CPU.

    Raises RunError for a file that is missing, damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != STATE_FORMAT:
                raise RunError(f"{path} is not the saved state of a run")
            return _unflatten(json.loads(metadata["state"]), file.get_tensor)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged or not the saved state of a run") from error


def _flatten(value: Any, name: str, tensors: dict[str, "torch.Tensor"], storages: set[int]) -> Any:
    """JSON form of a tree: lists and plain values as they are, the rest as {kind: content}.

    Moves the tensors to `tensors`; `storages` are the memory addresses already there, which
    safetensors would refuse a second time.
    """
    import torch

    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        if address in storages:
            tensor = tensor.clone()
        storages.add(address)
        while name in tensors:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = tensor
        return {"tensor": name}
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, (str, int))]:
            raise TypeError(f"state {name!r}: cannot save the key {odd[0]!r}")
        prefix = f"{name}/" if name else ""
        items = value.items()
        return {"dict": [[k, _flatten(v, f"{prefix}{k}", tensors, storages)] for k, v in items]}
    if isinstance(value, (list, tuple)):
        parts = [_flatten(v, f"{name}/{i}", tensors, storages) for i, v in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state {name!r}: cannot save a {type(value).__name__}")


def _unflatten(node: Any, tensor: Callable[[str], "torch.Tensor"]) -> Any:
    if isinstance(node, list):
        return [_unflatten(part, tensor) for part in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "tuple":
        return tuple(_unflatten(part, tensor) for part in content)
    return {key: _unflatten(part, tensor) for key, part in content}


# --- the directory -------------------------------------------------------------------------------


class RunDirectory:
    """A directory that one process at a time writes a run to; a context manager.

    path; config: the resolved configuration as JSON reads it; resumed: whether the run goes on.
    """

    def __init__(self, path: Path, config: dict[str, Any], resumed: bool, lock: IO[str]) -> None:
        self.path = path
        self.config = config
        self.resumed = resumed
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path | str,
        command: str,
        config: Mapping[str, Any],
        resume: bool = False,
        may_change: Set[str] = frozenset(),
    ) -> "RunDirectory":
        """Start a run in a directory without one, or go on with the one that is there.

        config: JSON values, mappings and paths. Resuming needs the same command and the same
        values, save for the keys in `may_change` (nested ones dotted: "reward.steps").
        Raises RunError, having written nothing, where that is not so or another process is at it.
        """
        path = Path(path)
        config_path = path / "config.json"
        resolved = json.loads(json.dumps(config, default=os.fspath))
        if resume and not config_path.is_file():
            raise RunError(f"{path} holds no run, so there is nothing to resume; omit --resume")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a")
        except OSError as error:
            raise RunError(f"cannot write to {path}: {error.strerror}") from error
        try:
            _lock(lock, path)
            if resume:
                _check_same_run(path, config_path, command, resolved, may_change)
                for leftover in path.glob("*.partial"):
                    leftover.unlink()
            elif config_path.exists() or (path / "state.safetensors").exists():
                raise RunError(
                    f"{path} already holds a run; add --resume to go on, or choose another --out"
                )
            about = {"command": command, "version": __version__, "config": resolved}
            atomic_write(config_path, json.dumps(about, indent=2) + "\n")
        except BaseException:
            lock.close()
            raise
        return cls(path, resolved, resume, lock)

    def save_state(self, state: Mapping[Any, Any]) -> None:
        """Replace the run's saved state; see `save_state`."""
        save_state(self.path / "state.safetensors", state)

    def load_state(self) -> dict[Any, Any] | None:
        """The saved state of a resumed run; None where it starts at step 0."""
        path = self.path / "state.safetensors"
        return load_state(path) if self.resumed and path.exists() else None

    def close(self) -> None:
        """Let other processes write the run."""
        self._lock.close()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: IO[str], path: Path) -> None:
    """Lock an open file until it is closed or the process dies; RunError if it is locked.

    Warns where the file system has no locks.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process is using {path}") from error
    except OSError as error:
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): let no other process write it",
            stacklevel=2,
        )


def _check_same_run(
    path: Path, config_path: Path, command: str, config: dict[str, Any], may_change: Set[str]
) -> None:
    try:
        about = json.loads(config_path.read_text(encoding="utf-8"))
        old_command, old_config = about["command"], about["config"]
        old, new = _dotted(old_config), _dotted(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{config_path} cannot be read as a run's configuration") from error
    if old_command != command:
        raise RunError(f"{path} holds a run of {old_command!r}, which {command!r} cannot resume")
    for key in (*old, *(key for key in new if key not in old)):
        if key not in may_change and old.get(key, "unset") != new.get(key, "unset"):
            raise RunError(
                f"{path} was started with {key} = {old.get(key, 'unset')}, not "
                f"{new.get(key, 'unset')}; resume with the old value or choose another --out"
            )


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_dotted(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# --- metrics -------------------------------------------------------------------------------------


class Metrics:
    """A JSON-lines file, {"step": 3, "loss": 0.25} a line; a context manager.

    Opens `path` anew, or with `resume_step` keeps the lines up to that step: log what belongs to
    a step before saving its state, and a killed and resumed run has the metrics of an unbroken
    one. Where tensorboard is installed its numbers also go to a folder `tensorboard` beside it.
    Raises RunError for a file that is not of this form; a torn last line is dropped.
    """

    def __init__(self, path: Path | str, resume_step: int | None = None) -> None:
        path = Path(path)
        kept = b"" if resume_step is None else _lines_up_to(path, resume_step)
        atomic_write(path, kept)
        self._file = path.open("ab")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            purge_step = 0 if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, **values: float | str | bool | None) -> None:
        """Append one line; floats read back to the same bits. NonFiniteError for NaN, infinity."""
        line = _to_json({"step": step, **values}, f"step {step}")
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines_up_to(path: Path, step: int) -> bytes:
    """The whole lines of a metrics file whose step is at most `step`; none without a file."""
    if not path.exists():
        return b""
    *lines, _torn = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}, line {number}: not a line of metrics") from error
    return b"".join(kept)


# --- signals and progress ------------------------------------------------------------------------


class InterruptGuard:
    """Turns the first SIGINT or SIGTERM within the block into `requested`, its name.

    The caller finishes its step, saves and raises `Interrupted`. Once something is requested a
    SIGINT raises KeyboardInterrupt as usual. Does nothing outside the main thread, where Python
    delivers no signals.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python, which Python cannot set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class Progress:
    """Step, rate, time left and a few figures; made by `progress`."""

    def __init__(self, total: int, description: str, start: int, show: Callable[[int, str], None]):
        self._total = total
        self._start = start
        self._description = description
        self._show = show
        self._began = time.monotonic()

    def update(self, step: int, **figures: float) -> None:
        """`step` of the total is done."""
        parts = [f"{self._description} {step}/{self._total}"]
        elapsed = time.monotonic() - self._began
        if step > self._start and elapsed > 0:
            rate = (step - self._start) / elapsed
            parts.append(f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step")
            parts.append(f"{timedelta(seconds=round((self._total - step) / rate))} left")
        parts += [f"{name} {value:.4g}" for name, value in figures.items()]
        self._show(step, ", ".join(parts))


@contextlib.contextmanager
def progress(
    total: int,
    description: str,
    start: int = 0,
    console: "rich.console.Console | None" = None,
) -> Iterator[Progress]:
    """Show how far a loop of `total` steps is, on standard error unless `console` says otherwise.

    A live bar on a terminal; elsewhere the first line at once, then one every 30 s, and the last.
    start: steps that were done before, which say nothing about the rate.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    console = console or Console(stderr=True)
    if console.is_terminal:
        with RichProgress(
            BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=console
        ) as bar:
            task = bar.add_task(f"{description} {start}/{total}", total=total, completed=start)
            yield Progress(
                total,
                description,
                start,
                lambda step, text: bar.update(task, completed=step, description=text),
            )
        return

    printed = -math.inf
    waiting = ""

    def show(_step: int, text: str) -> None:
        nonlocal printed, waiting
        waiting = text
        if time.monotonic() - printed >= PLAIN_PROGRESS_SECONDS:
            flush()

    def flush() -> None:
        nonlocal printed, waiting
        if waiting:
            print(waiting, file=console.file, flush=True)
            printed, waiting = time.monotonic(), ""

    try:
        yield Progress(total, description, start, show)
    finally:
        flush()
