"""What annotators were shown and chose, in one SQLite file that survives a kill at any moment.

A *pair* is two samples of a generator, in the order in which pairs are given out. A *task* is a
pair put before one annotator on two sides, once, and for some pairs a second time with the sides
swapped. A *choice* answers a task; a task has at most one that is not undone, which the file
itself makes sure of, whoever writes to it.

Every method is one transaction, on disk when it returns (write-ahead log, synchronous=FULL).
Threads may share a store, and processes a file.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from densityrl.errors import DensityRLError, PreferenceError
from densityrl.preference.table import PreferenceTable, write_csv

Answer = Literal["first", "second", "tie", "skip"]
Source = Literal["random", "uncertain", "anchor", "imported"]

HEADER = b"SQLite format 3\0"
VERSION = 1  # of the schema, kept as SQLite's user_version
APPLICATION = 0x64726C31  # marks the file as ours, kept as SQLite's application_id
BUSY_SECONDS = 30.0  # to wait for another process's transaction
REPEAT_GAP = 10  # tasks at least between a pair and its repetition, while there are others
NAME_LENGTH = 40  # of an annotator
REASON_LENGTH = 200

SCHEMA = f"""
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE annotator (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);
CREATE TABLE pair (
    id INTEGER PRIMARY KEY,
    first_seed INTEGER NOT NULL,
    first_psi REAL NOT NULL,
    second_seed INTEGER NOT NULL,
    second_psi REAL NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('random', 'uncertain', 'anchor', 'imported')),
    probability REAL,
    UNIQUE (first_seed, first_psi, second_seed, second_psi)
);
CREATE TABLE task (
    id INTEGER PRIMARY KEY,
    annotator INTEGER NOT NULL REFERENCES annotator,
    position INTEGER NOT NULL,
    pair INTEGER NOT NULL REFERENCES pair,
    first_is_left INTEGER CHECK (first_is_left IN (0, 1)),
    repeats INTEGER UNIQUE REFERENCES task,
    UNIQUE (annotator, position)
);
CREATE UNIQUE INDEX shown_once ON task (annotator, pair) WHERE repeats IS NULL;
CREATE TABLE choice (
    id INTEGER PRIMARY KEY,
    request TEXT UNIQUE,
    task INTEGER NOT NULL REFERENCES task,
    answer TEXT NOT NULL CHECK (answer IN ('first', 'second', 'tie', 'skip')),
    reason TEXT,
    seconds REAL,
    time TEXT NOT NULL,
    undone TEXT
);
CREATE UNIQUE INDEX counted_once ON choice (task) WHERE undone IS NULL;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


class NoSuchTaskError(PreferenceError):
    """A task or choice that this annotator does not have."""


class AlreadyAnsweredError(PreferenceError):
    """The task has an answer, or the choice was undone: another window was faster."""


@dataclass(frozen=True)
class Sample:
    """What a pair has two of."""

    seed: int
    psi: float


@dataclass(frozen=True)
class Pair:
    """Two samples to compare, and why these two."""

    first: Sample
    second: Sample
    source: Source
    probability: float | None = None  # that the first is preferred, where a reward was asked


@dataclass(frozen=True)
class Task:
    """A pair on two sides before one annotator."""

    id: int
    annotator: str
    left: Sample
    right: Sample
    first_is_left: bool


@dataclass(frozen=True)
class Choice:
    """An answer with all that is known of it."""

    id: int
    annotator: str
    position: int  # of the task, among the annotator's, from 1
    pair: Pair
    pair_id: int
    first_is_left: bool | None  # None: imported, so never shown here
    repeated: bool  # the second time that this annotator was shown the pair
    answer: Answer
    reason: str | None  # why it was skipped
    seconds: float | None  # that the pair was in sight
    time: str  # UTC
    undone: str | None  # when, UTC


@dataclass(frozen=True)
class Progress:
    """How far an annotator is."""

    done: int
    total: int  # pairs and repetitions
    seconds: float | None  # median of a choice
    last_choice: int | None  # id of the last one that is not undone


class PreferenceStore:
    """A file of pairs, tasks and choices; a context manager.

    Opens `path`, or with `create` makes it where it is missing. Raises PreferenceError for
    another kind of file, or one of a newer version.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise PreferenceError(f"{path} does not exist; `densityrl annotate` makes it")
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise PreferenceError(f"cannot open {path}: {error}") from error
        try:
            self._open(create)
        except BaseException:
            self._connection.close()
            raise

    def _open(self, create: bool) -> None:
        self._connection.row_factory = sqlite3.Row
        try:
            if self._pragma("application_id") != APPLICATION:
                if not create:
                    raise PreferenceError(f"{self.path} is no store of preferences")
                with self._transaction():
                    self._make()
            if self._pragma("user_version") > VERSION:
                raise PreferenceError(
                    f"{self.path} was written by a newer release: update this one"
                )
            if (mode := self._write_ahead()) != "wal":
                raise PreferenceError(
                    f"{self.path}: this file system allows no write-ahead log ({mode}); keep the "
                    "store on a local disk"
                )
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise PreferenceError(f"{self.path} is no store of preferences: {error}") from error

    def _make(self) -> None:
        """The tables of a new file; within a transaction, so that two processes make them once."""
        if self._pragma("application_id") == APPLICATION:
            return
        if self._row("SELECT name FROM sqlite_master LIMIT 1") is not None:
            raise PreferenceError(f"{self.path} is a database, but no store of preferences")
        for statement in SCHEMA.split(";\n"):
            self._connection.execute(statement)

    def _write_ahead(self) -> str:
        """Turn the write-ahead log on; SQLite itself does not wait for a writer here."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return str(self._pragma("journal_mode = WAL"))
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _pragma(self, pragma: str) -> Any:
        return self._connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    def _row(self, query: str, *values: Any) -> sqlite3.Row | None:
        return self._connection.execute(query, values).fetchone()

    def _number(self, query: str, *values: Any) -> int:
        return int(self._connection.execute(query, values).fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; holds off other writers, of this process and of others.

        DensityRLError where the disk or another writer does not let it through.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:  # a full disk has rolled back by itself
                    self._connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise DensityRLError(f"cannot write {self.path}: {error}") from error
                raise

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> PreferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what the file is about ------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What `describe` recorded."""
        with self._lock:
            rows = self._connection.execute("SELECT key, value FROM about").fetchall()
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def check(self, about: Mapping[str, Any]) -> None:
        """PreferenceError where `describe` recorded other values.

        Samples of two generators, or surfaces at two levels, are not to be mixed in a file.
        """
        known = self.about()
        for key, value in about.items():
            if key in known and known[key] != value:
                raise PreferenceError(
                    f"{self.path} was made with {key} = {known[key]}, not {value}; give the "
                    "same, or another --db"
                )

    def describe(self, about: Mapping[str, Any]) -> None:
        """Record what everybody is shown; PreferenceError if it was something else before."""
        with self._transaction():
            self.check(about)
            for key, value in about.items():
                self._connection.execute(
                    "INSERT OR IGNORE INTO about VALUES (?, ?)", (key, json.dumps(value))
                )

    def add_annotator(self, name: str) -> str:
        """Make an annotator known; returns the name without blanks around it.

        PreferenceError for an empty, long or unprintable one.
        """
        with self._transaction():
            return self._add_annotator(name)

    def _add_annotator(self, name: str) -> str:
        name = name.strip()
        if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
            raise PreferenceError(f"a name has 1 to {NAME_LENGTH} printable characters")
        self._connection.execute("INSERT OR IGNORE INTO annotator (name) VALUES (?)", (name,))
        return name

    def annotators(self) -> list[str]:
        """Names, in the order in which they came."""
        with self._lock:
            rows = self._connection.execute("SELECT name FROM annotator ORDER BY id").fetchall()
        return [row["name"] for row in rows]

    def _annotator(self, name: str) -> int:
        row = self._row("SELECT id FROM annotator WHERE name = ?", name)
        if row is None:
            raise NoSuchTaskError(f"nobody here is called {name!r}")
        return int(row["id"])

    # --- pairs -----------------------------------------------------------------------------------

    def plan(self, position: int, pair: Pair) -> bool:
        """Add a pair to give out, as the `position`-th from 0; False if that is there already."""
        with self._transaction():
            if self.planned() != position:
                return False
            self._add_pair(pair)
        return True

    def planned(self) -> int:
        """Pairs to give out, past and future."""
        with self._lock:
            return self._number("SELECT count(*) FROM pair WHERE source != 'imported'")

    def furthest(self) -> int:
        """Pairs that were given to the annotator who is ahead of all others."""
        with self._lock:
            return self._number(
                "SELECT coalesce(max(given), 0) FROM (SELECT count(*) AS given FROM task "
                "JOIN pair ON pair.id = task.pair "
                "WHERE repeats IS NULL AND source != 'imported' GROUP BY annotator)"
            )

    def pairs(self) -> list[Pair]:
        """Every pair, imported ones included."""
        with self._lock:
            return [
                _pair(row) for row in self._connection.execute("SELECT * FROM pair ORDER BY id")
            ]

    def _add_pair(self, pair: Pair) -> int:
        cursor = self._connection.execute(
            "INSERT INTO pair (first_seed, first_psi, second_seed, second_psi, source, probability)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                pair.first.seed,
                pair.first.psi,
                pair.second.seed,
                pair.second.psi,
                pair.source,
                pair.probability,
            ),
        )
        return int(cursor.lastrowid or 0)

    # --- tasks -----------------------------------------------------------------------------------

    def upcoming(self, annotator: str, count: int, *, pairs: int, repeats: float) -> list[Task]:
        """The annotator's next open tasks, at most `count`; new ones are given out as needed.

        pairs: how many pairs an annotator is given; repeats: tasks that show one of them again,
        as a share of those. Fewer than `count` come back when these are used up, or when no more
        pairs are planned yet.
        """
        with self._transaction():
            who = self._annotator(annotator)
            while True:
                open_tasks = self._connection.execute(
                    "SELECT task.*, first_seed, first_psi, second_seed, second_psi FROM task "
                    "JOIN pair ON pair.id = task.pair WHERE annotator = ? AND NOT EXISTS "
                    "(SELECT 1 FROM choice WHERE task = task.id AND undone IS NULL) "
                    "ORDER BY position LIMIT ?",
                    (who, count),
                ).fetchall()
                if len(open_tasks) == count or not self._give(who, pairs, repeats):
                    return [_task(row, annotator) for row in open_tasks]

    def _give(self, who: int, pairs: int, repeats: float) -> bool:
        """Give an annotator one more task; False if there is none."""
        position = self._next_position(who)
        given = self._number(
            "SELECT count(*) FROM task JOIN pair ON pair.id = task.pair "
            "WHERE annotator = ? AND +repeats IS NULL AND source != 'imported'",
            who,
        )
        repeated = self._number(
            "SELECT count(*) FROM task WHERE annotator = ? AND repeats IS NOT NULL", who
        )
        new = None
        if given < pairs:
            new = self._row(
                "SELECT id FROM pair WHERE source != 'imported' AND NOT EXISTS "
                "(SELECT 1 FROM task WHERE annotator = ? AND pair = pair.id AND repeats IS NULL) "
                "ORDER BY id LIMIT 1",
                who,
            )
        # Between the pairs a repetition keeps its distance; after the last one it need not.
        draw = random.Random(f"{who}/{position}")
        gap = REPEAT_GAP if given < pairs else 1
        if repeated < _repetitions(given, repeats):
            again = self._connection.execute(
                "SELECT task.id, task.pair, first_is_left FROM task "
                "JOIN choice ON choice.task = task.id AND undone IS NULL AND answer != 'skip' "
                "WHERE annotator = ? AND repeats IS NULL AND first_is_left IS NOT NULL "
                "AND position <= ? AND NOT EXISTS "
                "(SELECT 1 FROM task AS other WHERE other.repeats = task.id) ORDER BY position",
                (who, position - gap),
            ).fetchall()
            if again:
                task = draw.choice(again)
                self._add_task(who, position, task["pair"], not task["first_is_left"], task["id"])
                return True
        if new is None:
            return False
        self._add_task(who, position, new["id"], draw.random() < 0.5, None)
        return True

    def _next_position(self, who: int) -> int:
        return self._number(
            "SELECT coalesce(max(position), 0) + 1 FROM task WHERE annotator = ?", who
        )

    def _add_task(
        self, who: int, position: int, pair: int, first_is_left: bool | None, repeats: int | None
    ) -> int:
        cursor = self._connection.execute(
            "INSERT INTO task (annotator, position, pair, first_is_left, repeats) "
            "VALUES (?, ?, ?, ?, ?)",
            (who, position, pair, first_is_left, repeats),
        )
        return int(cursor.lastrowid or 0)

    def task(self, task: int) -> Task:
        """NoSuchTaskError if there is none of this number."""
        with self._lock:
            row = self._row(
                "SELECT task.*, first_seed, first_psi, second_seed, second_psi, name FROM task "
                "JOIN pair ON pair.id = task.pair JOIN annotator ON annotator.id = task.annotator "
                "WHERE task.id = ? AND first_is_left IS NOT NULL",
                task,
            )
        if row is None:
            raise NoSuchTaskError(f"there is no task {task}")
        return _task(row, row["name"])

    # --- choices ---------------------------------------------------------------------------------

    def choose(
        self,
        annotator: str,
        task: int,
        answer: Answer,
        *,
        request: str,
        seconds: float | None = None,
        reason: str | None = None,
    ) -> int:
        """Answer a task; returns the choice's number, and is on disk by then.

        request: an identity of the click. The same one again, as after a lost reply, is the same
        choice and counted once. Raises NoSuchTaskError for a task that is not the annotator's,
        AlreadyAnsweredError for one that has an answer.
        """
        with self._transaction():
            who = self._annotator(annotator)
            if self._row("SELECT 1 FROM task WHERE id = ? AND annotator = ?", task, who) is None:
                raise NoSuchTaskError(f"{annotator!r} has no task {task}")
            same = self._row("SELECT id, task, answer FROM choice WHERE request = ?", request)
            if same is not None:
                if (same["task"], same["answer"]) != (task, answer):
                    raise AlreadyAnsweredError("this click was counted for something else")
                return int(same["id"])
            if self._row("SELECT 1 FROM choice WHERE task = ? AND undone IS NULL", task):
                raise AlreadyAnsweredError("this pair has its answer already, from another window")
            return self._add_choice(task, answer, request, reason, seconds)

    def _add_choice(
        self,
        task: int,
        answer: Answer,
        request: str | None,
        reason: str | None,
        seconds: float | None,
    ) -> int:
        cursor = self._connection.execute(
            "INSERT INTO choice (request, task, answer, reason, seconds, time) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (request, task, answer, reason, seconds, _now()),
        )
        return int(cursor.lastrowid or 0)

    def undo(self, annotator: str, choice: int) -> None:
        """Take a choice back; its task is open again and comes first.

        Raises NoSuchTaskError for one that is not the annotator's, AlreadyAnsweredError for one
        that is undone already.
        """
        with self._transaction():
            row = self._row(
                "SELECT undone FROM choice JOIN task ON task.id = choice.task "
                "WHERE choice.id = ? AND annotator = ? AND first_is_left IS NOT NULL",
                choice,
                self._annotator(annotator),
            )
            if row is None:
                raise NoSuchTaskError(f"{annotator!r} has no choice {choice}")
            if row["undone"] is not None:
                raise AlreadyAnsweredError("this choice was taken back already")
            self._connection.execute("UPDATE choice SET undone = ? WHERE id = ?", (_now(), choice))

    def progress(self, annotator: str, *, pairs: int, repeats: float) -> Progress:
        """See `upcoming` for `pairs` and `repeats`."""
        with self._lock:
            who = self._annotator(annotator)
            rows = self._connection.execute(
                "SELECT choice.id, seconds, first_is_left FROM choice "
                "JOIN task ON task.id = choice.task JOIN pair ON pair.id = task.pair "
                "WHERE annotator = ? AND undone IS NULL AND source != 'imported' "
                "ORDER BY choice.id",
                (who,),
            ).fetchall()
        total = pairs + _repetitions(pairs, repeats)
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        return Progress(
            done=len(rows),
            total=max(total, len(rows)),
            seconds=float(np.median(seconds)) if seconds else None,
            last_choice=max(
                (int(row["id"]) for row in rows if row["first_is_left"] is not None), default=None
            ),
        )

    def choices(self, *, undone: bool = False) -> list[Choice]:
        """Every choice in the order made; with `undone` also those that were taken back."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT choice.*, name, position, first_is_left, repeats, pair.id AS pair_id, "
                "first_seed, first_psi, second_seed, second_psi, source, probability FROM choice "
                "JOIN task ON task.id = choice.task JOIN pair ON pair.id = task.pair "
                "JOIN annotator ON annotator.id = task.annotator "
                "WHERE ? OR undone IS NULL ORDER BY choice.id",
                (undone,),
            ).fetchall()
        return [
            Choice(
                id=row["id"],
                annotator=row["name"],
                position=row["position"],
                pair=_pair(row),
                pair_id=row["pair_id"],
                first_is_left=_side(row),
                repeated=row["repeats"] is not None,
                answer=row["answer"],
                reason=row["reason"],
                seconds=row["seconds"],
                time=row["time"],
                undone=row["undone"],
            )
            for row in rows
        ]

    # --- tables ----------------------------------------------------------------------------------

    def decisions(self) -> list[Choice]:
        """The choices that say what an annotator prefers: one a pair and annotator.

        Ties and skips are none, nor is a pair of which an annotator said first one thing and then
        another; anchors are left out, since they test the annotator and are of another truncation.
        """
        answers: dict[tuple[str, int], list[Choice]] = {}
        for choice in self.choices():
            if choice.answer != "skip" and choice.pair.source != "anchor":
                answers.setdefault((choice.annotator, choice.pair_id), []).append(choice)
        return [
            same[0]
            for same in answers.values()
            if same[0].answer != "tie" and len({choice.answer for choice in same}) == 1
        ]

    def table(self, limit: int | None = None) -> PreferenceTable:
        """`decisions` as reward training reads them; PreferenceError where there are none."""
        decisions = self.decisions()[:limit]
        if not decisions:
            raise PreferenceError(f"{self.path} holds no decided pairs yet")
        winners, losers = zip(*(_winner_first(choice) for choice in decisions), strict=True)
        return PreferenceTable(
            np.array(winners), np.array(losers), np.array([c.annotator for c in decisions])
        )

    def add_table(self, table: PreferenceTable, annotator: str, psi: float) -> int:
        """Take over the pairs of a table, all or none; returns how many were new.

        annotator: of the pairs for which the table names nobody; psi: the truncation of all
        samples. Raises PreferenceError where an annotator said the contrary here.
        """
        names = [annotator] * len(table) if table.annotators is None else table.annotators.tolist()
        who = {}
        added = 0
        with self._transaction():
            for name in dict.fromkeys(name or annotator for name in names):
                who[name] = self._add_annotator(name)
            for name, winner, loser in zip(
                names, table.winners.tolist(), table.losers.tolist(), strict=True
            ):
                added += self._import(who[name or annotator], winner, loser, psi)
        return added

    def _import(self, name: str, winner: int, loser: int, psi: float) -> bool:
        who = self._annotator(name)
        row = self._row(
            "SELECT id, first_seed FROM pair WHERE first_psi = ? AND second_psi = ? AND "
            "(first_seed = ? AND second_seed = ? OR first_seed = ? AND second_seed = ?)",
            *(psi, psi, winner, loser, loser, winner),
        )
        if row is None:
            pair = self._add_pair(Pair(Sample(winner, psi), Sample(loser, psi), "imported"))
            answer: Answer = "first"
        else:
            pair = row["id"]
            answer = "first" if row["first_seed"] == winner else "second"
        task = self._row(
            "SELECT task.id, answer FROM task LEFT JOIN choice "
            "ON choice.task = task.id AND undone IS NULL "
            "WHERE annotator = ? AND pair = ? AND repeats IS NULL",
            who,
            pair,
        )
        if task is not None and task["answer"] is not None:
            if task["answer"] != answer:
                raise PreferenceError(
                    f"{name!r} prefers {winner} to {loser} in the table, and in {self.path} said "
                    f"{task['answer']!r} of them ({row['first_seed'] if row else winner} is first)"
                )
            return False
        if task is None:
            position = self._next_position(who)
            self._add_choice(self._add_task(who, position, pair, None, None), answer, *[None] * 3)
        else:
            self._add_choice(task["id"], answer, None, None, None)
        return True


def write_decisions(path: str | Path, store: PreferenceStore) -> int:
    """Write `PreferenceStore.decisions` as a CSV that `read_preferences` reads; returns how many.

    Columns: winner, loser, annotator, seconds, time, source. Atomic. PreferenceError where there
    are none.
    """
    decisions = store.decisions()
    if not decisions:
        raise PreferenceError(f"{store.path} holds no decided pairs yet")
    write_csv(
        path,
        ("winner", "loser", "annotator", "seconds", "time", "source"),
        [(*_winner_first(c), c.annotator, c.seconds, c.time, c.pair.source) for c in decisions],
    )
    return len(decisions)


def write_choices(path: str | Path, store: PreferenceStore) -> int:
    """Write every choice as it was made, those taken back too; returns how many. Atomic.

    Columns: id, annotator, position, time, first_seed, first_psi, second_seed, second_psi, source,
    probability (that the reward gave the first), left (seed on the left), repeated, answer, reason,
    seconds, undone (time).
    """
    rows = []
    for c in store.choices(undone=True):
        first, second = c.pair.first, c.pair.second
        left = {True: first.seed, False: second.seed, None: None}[c.first_is_left]
        rows.append(
            (
                *(c.id, c.annotator, c.position, c.time),
                *(first.seed, first.psi, second.seed, second.psi, c.pair.source),
                *(c.pair.probability, left, int(c.repeated), c.answer, c.reason),
                *(c.seconds, c.undone),
            )
        )
    header = (
        "id,annotator,position,time,first_seed,first_psi,second_seed,second_psi,source,"
        "probability,left,repeated,answer,reason,seconds,undone"
    )
    write_csv(path, header.split(","), rows)
    return len(rows)


def is_store(path: str | Path) -> bool:
    """Whether a file is SQLite's, by its first bytes."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(HEADER)) == HEADER
    except OSError:
        return False


def check_samples(path: str | Path, generator: str, psi: float) -> None:
    """PreferenceError if a store's choices are about another generator's samples, or truncation.

    generator: its fingerprint. Any other file, such as a CSV, does not say, and passes.
    """
    if not is_store(path):
        return
    with PreferenceStore(path) as store:
        about = store.about()
    if about.get("generator", generator) != generator:
        raise PreferenceError(f"the choices in {path} are about the samples of another generator")
    if about.get("truncation_psi", psi) != psi:
        raise PreferenceError(
            f"the choices in {path} are about samples at --truncation-psi "
            f"{about['truncation_psi']:g}, not {psi:g}"
        )


def _repetitions(pairs: int, share: float) -> int:
    return math.floor(share * pairs + 1e-9)  # 0.29 * 100 is below 29


def _winner_first(choice: Choice) -> tuple[int, int]:
    seeds = choice.pair.first.seed, choice.pair.second.seed
    return seeds if choice.answer == "first" else seeds[::-1]


def _side(row: sqlite3.Row) -> bool | None:
    return None if row["first_is_left"] is None else bool(row["first_is_left"])


def _pair(row: sqlite3.Row) -> Pair:
    return Pair(
        Sample(row["first_seed"], row["first_psi"]),
        Sample(row["second_seed"], row["second_psi"]),
        row["source"],
        row["probability"],
    )


def _task(row: sqlite3.Row, annotator: str) -> Task:
    first = Sample(row["first_seed"], row["first_psi"])
    second = Sample(row["second_seed"], row["second_psi"])
    left, right = (first, second) if row["first_is_left"] else (second, first)
    return Task(row["id"], annotator, left, right, bool(row["first_is_left"]))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
