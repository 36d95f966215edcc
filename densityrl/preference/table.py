"""Preference tables: reading, checking, writing and splitting pairs of latent seeds."""

import csv
import io
import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densityrl.errors import PreferenceError
from densityrl.run import atomic_write

MAX_SEED = 2**32 - 1  # the largest that numpy's RandomState takes


@dataclass(frozen=True, eq=False)
class PreferenceTable:
    """P pairs of seeds; of pair i, winners[i] was preferred over losers[i].

    winners, losers int64 [P]; annotators str [P], or None where nobody was named.
    """

    winners: np.ndarray
    losers: np.ndarray
    annotators: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "winners", np.asarray(self.winners, dtype=np.int64))
        object.__setattr__(self, "losers", np.asarray(self.losers, dtype=np.int64))
        if self.annotators is not None:
            object.__setattr__(self, "annotators", np.asarray(self.annotators, dtype=np.str_))
        columns = [c for c in (self.winners, self.losers, self.annotators) if c is not None]
        if any(column.shape != (len(self.winners),) for column in columns):
            shapes = ", ".join(str(column.shape) for column in columns)
            raise ValueError(f"columns of a preference table must be of one length, not {shapes}")

    def __len__(self) -> int:
        return len(self.winners)

    @property
    def seeds(self) -> np.ndarray:
        """Every seed of the table once, ascending, int64."""
        return np.union1d(self.winners, self.losers)

    def select(self, pairs: np.ndarray | slice) -> "PreferenceTable":
        """The pairs at these positions (indices, a mask or a slice), in that order."""
        annotators = None if self.annotators is None else self.annotators[pairs]
        return PreferenceTable(self.winners[pairs], self.losers[pairs], annotators)


@dataclass(frozen=True)
class Split:
    """Three tables that share no seed, and how many pairs had to be left out for that."""

    train: PreferenceTable
    validation: PreferenceTable
    test: PreferenceTable
    dropped: int


def read_preferences(path: Path | str, limit: int | None = None) -> PreferenceTable:
    """Read and check a CSV table, or a store of annotators' choices; keep the first `limit` pairs.

    Of a store (SQLite) these are its decisions, see `PreferenceStore.decisions`.

    A CSV's header names `winner` and `loser`, or `rank1`, `rank2`, ... `rankN` (best first: a row
    means all its N (N - 1) / 2 ordered pairs, and may leave its last ranks empty). An `annotator`
    column is kept, other columns are ignored, blank rows skipped. The whole file is checked
    whatever the limit. An annotator who ranks a pair twice is an error, in either order; two
    annotators may disagree.

    Raises PreferenceError with the file, the line and the number of further problems.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise PreferenceError(f"a limit of {limit} keeps no preferences; give 1 or more")
    from densityrl.preference.store import PreferenceStore, is_store  # which needs this module

    if is_store(path):
        with PreferenceStore(path) as store:
            return store.table(limit)
    rows = _read_rows(path)
    if not rows:
        raise PreferenceError(f"{path} is empty; expected a header and pairs of seeds")
    (header_line, header), *body = rows
    try:
        ranked, annotator_column = _find_columns(header)
    except ValueError as error:
        raise PreferenceError(f"{path}, line {header_line}: {error}") from error

    line_of: dict[tuple[str, int, int], int] = {}  # (annotator, winner, loser), in table order
    problems = []
    for line, cells in body:
        cells += [""] * (len(header) - len(cells))
        try:
            ranking = _read_ranking(cells, header, ranked)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        annotator = "" if annotator_column is None else cells[annotator_column]
        for winner, loser in itertools.combinations(ranking, 2):
            if earlier := line_of.get((annotator, winner, loser)):
                problems.append(
                    f"line {line}: {winner} over {loser} is already there, on line {earlier}"
                )
            elif earlier := line_of.get((annotator, loser, winner)):
                problems.append(
                    f"line {line}: {winner} over {loser} contradicts line {earlier}, "
                    f"which prefers {loser}"
                )
            else:
                line_of[annotator, winner, loser] = line

    if problems:
        more = len(problems) - 1
        tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
        raise PreferenceError(f"{path}, {problems[0]}{tail}")
    if not line_of:
        raise PreferenceError(f"{path} has a header but no pairs")
    annotators, winners, losers = zip(*list(line_of)[:limit], strict=True)
    return PreferenceTable(
        np.array(winners),
        np.array(losers),
        None if annotator_column is None else np.array(annotators),
    )


def write_preferences(path: Path | str, table: PreferenceTable) -> None:
    """Write `winner,loser` CSV, with an `annotator` column where the table has one; atomic."""
    columns = {"winner": table.winners.tolist(), "loser": table.losers.tolist()}
    if table.annotators is not None:
        columns["annotator"] = table.annotators.tolist()
    write_csv(path, list(columns), zip(*columns.values(), strict=True))


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV whole or not at all; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def split_preferences(
    table: PreferenceTable,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> Split:
    """Split pairs into train, validation and test so that no seed is on two sides.

    Seeds that are linked by pairs stay together: groups, largest first and in an order shuffled
    by `seed` among equals, go to the side that lacks most of its share of pairs. A group larger
    than the train share is broken up seed by seed, and its pairs across two sides are dropped.
    Depends on the set of pairs, `fractions` and `seed` alone; each side keeps the table's order.

    fractions: shares of the pairs, sum 1; only the test share may be 0.
    Raises PreferenceError when train or validation would be empty.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise PreferenceError(
            f"a split takes three fractions of sum 1 (train, validation, test), not {fractions}"
        )
    smallest = min(fractions[:2])
    if smallest == 0:
        raise PreferenceError("the train and validation fractions of a split must be above 0")

    seeds = table.seeds
    ends = np.searchsorted(seeds, np.stack([table.winners, table.losers]))  # [2, P] into seeds
    degree = np.bincount(ends.ravel(), minlength=len(seeds))  # pairs that a seed is in
    group = _connected(ends, len(seeds))
    group_degree = np.bincount(group, weights=degree, minlength=len(seeds))
    too_big = group_degree[group] > fractions[0] * degree.sum() + 1e-9
    unit = np.where(too_big, np.arange(len(seeds)), group)  # a label is one of the unit's seeds

    unit_degree = np.bincount(unit, weights=degree, minlength=len(seeds))
    shuffle = random.Random(seed)  # its random() is the same in every Python version
    order = sorted(np.unique(unit).tolist(), key=lambda u: (-unit_degree[u], shuffle.random()))
    room = [fraction * degree.sum() for fraction in fractions]
    side_of_unit = np.zeros(len(seeds), dtype=np.int64)
    for label in order:
        side = room.index(max(room))
        side_of_unit[label] = side
        room[side] -= unit_degree[label]

    winner_side, loser_side = side_of_unit[unit][ends]
    kept = winner_side == loser_side
    train, validation, test = (table.select(kept & (winner_side == side)) for side in range(3))
    if not len(train) or not len(validation):
        count = "1 pair" if len(table) == 1 else f"{len(table)} pairs"
        raise PreferenceError(
            f"{count} cannot fill train and validation with no seed on both sides; "
            f"collect at least {math.ceil(1 / smallest)} pairs whose seeds are in no other pair, "
            "or change the fractions"
        )
    return Split(train, validation, test, dropped=int(len(table) - kept.sum()))


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and stripped cells of every row that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise PreferenceError(f"cannot read {path}: {error.strerror}") from error
    if "\0" in text:
        raise PreferenceError(f"{path} is not a text file")
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    rows = []
    line = 1  # where the next row starts; a quoted cell may span lines
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise PreferenceError(f"{path}, line {line}: not CSV: {error}") from error
    return rows


def _find_columns(header: list[str]) -> tuple[list[int], int | None]:
    """Positions of the seeds' columns, best first, and of the annotator's, if any."""
    names = [name.lower() for name in header]
    wanted = ["winner", "loser"]
    if not set(wanted) <= set(names):
        ranks = sum(re.fullmatch(r"rank[0-9]+", name) is not None for name in names)
        wanted = [f"rank{rank}" for rank in range(1, max(ranks, 2) + 1)]
    if not set(wanted) <= set(names):
        found = ", ".join(map(repr, header))[:200]
        raise ValueError(f"expected columns winner,loser or rank1,rank2,... but found {found}")
    for name in (*wanted, "annotator"):
        if names.count(name) > 1:
            raise ValueError(f"column {name!r} is there twice")
    annotator = names.index("annotator") if "annotator" in names else None
    return [names.index(name) for name in wanted], annotator


def _read_ranking(cells: list[str], header: list[str], ranked: list[int]) -> list[int]:
    """Seeds of one row, best first; ValueError says what is wrong with the row."""
    if any(cells[len(header) :]):
        raise ValueError(f"{len(cells)} cells under {len(header)} columns")
    filled = [column for column in ranked if cells[column]]
    last = ranked.index(filled[-1]) if filled else 0
    seeds = []
    for column in ranked[: max(last + 1, 2)]:
        cell = cells[column]
        if not cell:
            raise ValueError(f"no seed under {header[column]!r}")
        if not re.fullmatch(r"0*[0-9]{1,10}", cell) or int(cell) > MAX_SEED:
            raise ValueError(f"{cell[:40]!r} is not a seed, a whole number from 0 to {MAX_SEED}")
        if int(cell) in seeds:
            raise ValueError(f"seed {int(cell)} is compared with itself")
        seeds.append(int(cell))
    return seeds


def _connected(ends: np.ndarray, nodes: int) -> np.ndarray:
    """Label [nodes] of each node's connected component, by union-find over edges ends [2, P].

    The label is the smallest node of the component.
    """
    parent = list(range(nodes))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in ends.T.tolist():
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return np.array([root(node) for node in range(nodes)], dtype=np.int64)
