"""Preference tables: what is read, what is refused and why, and splits without shared seeds."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from densityrl.errors import PreferenceError
from densityrl.preference import (
    PreferenceTable,
    Split,
    read_preferences,
    split_preferences,
    write_preferences,
)

PINNED_VALIDATION = "[8, 34, 38]\n"


def pairs(table: PreferenceTable) -> list[tuple[int, int]]:
    return list(zip(table.winners.tolist(), table.losers.tolist(), strict=True))


def table_of(*rows: tuple[int, int]) -> PreferenceTable:
    winners, losers = zip(*rows, strict=True)
    return PreferenceTable(np.array(winners), np.array(losers))


@pytest.fixture
def read(tmp_path: Path):
    """Reads a table from its text or bytes."""

    def read(content: str | bytes, limit: int | None = None) -> PreferenceTable:
        path = tmp_path / "pairs.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_preferences(path, limit)

    return read


# --- reading -------------------------------------------------------------------------------------


def test_winner_is_first(read) -> None:
    table = read("winner,loser\n3,1\n2,5\n")
    assert pairs(table) == [(3, 1), (2, 5)]
    assert table.winners.dtype == table.losers.dtype == np.int64
    assert table.annotators is None
    assert len(table) == 2
    assert table.seeds.tolist() == [1, 2, 3, 5]


def test_columns_are_found_by_name(read) -> None:
    assert pairs(read("time,loser,note,winner\n12:00,1,nice,3\n")) == [(3, 1)]


def test_the_papers_form(read) -> None:
    assert pairs(read(",rank1,rank2\n0,35539,23763\n1,36390,34268\n")) == [
        (35539, 23763),
        (36390, 34268),
    ]


def test_the_papers_table(shared_data: Path) -> None:
    table = read_preferences(shared_data / "paper_preferences.csv")
    assert len(table) == 4346
    assert len(table.seeds) == 8692
    assert pairs(table)[0] == (35539, 23763)
    split = split_preferences(table)
    assert split.dropped == 0
    assert [len(part) for part in (split.train, split.validation, split.test)] == [3042, 652, 652]


def test_a_ranking_means_all_its_pairs(read) -> None:
    text = "rank1,rank2,rank3,rank4\n4,3,2,1\n8,7,6,\n10,9\n"
    assert pairs(read(text)) == [
        *((4, 3), (4, 2), (4, 1), (3, 2), (3, 1), (2, 1)),
        *((8, 7), (8, 6), (7, 6)),
        (10, 9),
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"winner,loser\r\n3,1\r\n2,5\r\n",
        b"winner,loser\r3,1\r2,5",
        b"\xef\xbb\xbfwinner,loser\n3,1\n2,5\n",
        b"  Winner , loser\n 3 ,\t1\n2, 5 \n",
        b'"winner","loser"\n"3","1"\n"2", "5"\n',
        b"\nwinner,loser\n\n3,1\n,\n  \n2,5\n,\n",
        b"winner,loser\n3,1,\n2,5,,\n",
        b"winner,loser\n003,01\n2,5",
    ],
    ids=["crlf", "cr", "bom", "spaces", "quotes", "blank rows", "trailing commas", "zeros"],
)
def test_harmless_variety(read, content: bytes) -> None:
    assert pairs(read(content)) == [(3, 1), (2, 5)]


def test_seed_range(read) -> None:
    assert pairs(read("winner,loser\n0,4294967295\n")) == [(0, 4294967295)]


def test_limit_keeps_the_first(read) -> None:
    text = "rank1,rank2,rank3\n3,2,1\n6,5,4\n"
    assert pairs(read(text, limit=4)) == [(3, 2), (3, 1), (2, 1), (6, 5)]
    assert len(read(text, limit=100)) == 6
    for limit in (0, -1):
        with pytest.raises(PreferenceError, match=f"a limit of {limit} keeps no preferences"):
            read(text, limit=limit)


def test_annotators_may_disagree_and_agree(read) -> None:
    table = read("winner,loser,annotator\n1,2,ann\n2,1,bob\n1,2,cy\n3,4,\n", limit=3)
    assert pairs(table) == [(1, 2), (2, 1), (1, 2)]
    assert table.annotators.tolist() == ["ann", "bob", "cy"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("winner,loser\n1,2\n3,x\n", "line 3: 'x' is not a seed"),
        ("winner,loser\n1.0,2\n", "line 2: '1.0' is not a seed"),
        ("winner,loser\n1_0,2\n", "line 2: '1_0' is not a seed"),
        ("winner,loser\n\u0661,2\n", "line 2: '\u0661' is not a seed"),
        ("winner,loser\n-1,2\n", "line 2: '-1' is not a seed, a whole number from 0 to 4294967295"),
        ("winner,loser\n1,4294967296\n", "line 2: '4294967296' is not a seed"),
        ("winner,loser\n1," + "9" * 6000, "line 2: '" + "9" * 40 + "' is not a seed"),
        ("winner,loser\n1,2\n7,7\n", "line 3: seed 7 is compared with itself"),
        ("rank1,rank2,rank3\n5,6,5\n", "line 2: seed 5 is compared with itself"),
        (
            "winner,loser\n1,2\n3,4\n1,2\n",
            "line 4: 1 over 2 is already there, on line 2",
        ),
        (
            "winner,loser\n1,2\n3,4\n2,1\n",
            "line 4: 2 over 1 contradicts line 2, which prefers 1",
        ),
        (
            "rank1,rank2,rank3\n1,2,3\n3,4,1\n",
            "line 3: 3 over 1 contradicts line 2, which prefers 1",
        ),
        (
            "winner,loser,annotator\n1,2,ann\n1,2,bob\n2,1,ann\n",
            "line 4: 2 over 1 contradicts line 2, which prefers 1",
        ),
        ("winner,loser\n1,2\n3\n", "line 3: no seed under 'loser'"),
        ("winner,loser\n,2\n", "line 2: no seed under 'winner'"),
        ("rank1,rank2,rank3\n1,,3\n", "line 2: no seed under 'rank2'"),
        ("rank1,rank2,rank3\n1,,\n", "line 2: no seed under 'rank2'"),
        ("winner,loser,note\n1,2,a,b\n", "line 2: 4 cells under 3 columns"),
        ('winner,loser,note\n1,2,"a\nb"\n3,3,c\n', "line 4: seed 3 is compared with itself"),
        ('winner,loser\n1,2\n"3,4\n', "line 3: not CSV: unexpected end of data"),
        (
            "1,2\n3,4\n",
            "line 1: expected columns winner,loser or rank1,rank2,... but found '1', '2'",
        ),
        ("a;b\n1;2\n", "but found 'a;b'"),
        ("rank1,rank3\n1,2\n", "but found 'rank1', 'rank3'"),
        ("rank1\n1\n", "but found 'rank1'"),
        ("winner,winner,loser\n1,2,3\n", "line 1: column 'winner' is there twice"),
        ("winner,loser\n", "has a header but no pairs"),
        ("", "is empty"),
        (" \n\n", "is empty"),
    ],
)
def test_what_is_refused(read, tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PreferenceError) as caught:
        read(text)
    message = str(caught.value)
    assert complaint in message
    assert message.startswith(str(tmp_path / "pairs.csv"))
    assert "\n" not in message
    assert "more problem" not in message


def test_further_problems_are_counted(read) -> None:
    with pytest.raises(PreferenceError, match=r"line 2: 'x' is .*\(and 1 more problem\)$"):
        read("winner,loser\nx,1\n2,2\n")
    with pytest.raises(PreferenceError, match=r"line 2: 'x' is .*\(and 3 more problems\)$"):
        read("winner,loser\nx,1\n2,2\n3,4\n4,3\n3,4\n")


def test_a_limit_does_not_hide_problems(read) -> None:
    with pytest.raises(PreferenceError, match="line 3"):
        read("winner,loser\n1,2\n3,3\n", limit=1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x89PNG\r\n\x1a\n", "is not UTF-8 text"),
        ("winner,loser\n1,2\n".encode("utf-16"), "is not UTF-8 text"),
        (b"winner,loser\n1,2\n\0\0", "is not a text file"),
    ],
    ids=["png", "utf-16", "nul"],
)
def test_binary_files(read, content: bytes, complaint: str) -> None:
    with pytest.raises(PreferenceError, match=complaint):
        read(content)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PreferenceError, match=r"cannot read .*absent\.csv: No such file"):
        read_preferences(tmp_path / "absent.csv")
    with pytest.raises(PreferenceError, match="Is a directory"):
        read_preferences(tmp_path)


def test_columns_of_unequal_length() -> None:
    with pytest.raises(ValueError, match=r"one length, not \(2,\), \(1,\)"):
        PreferenceTable(np.array([1, 2]), np.array([3]))
    with pytest.raises(ValueError, match="one length"):
        PreferenceTable(np.array([1]), np.array([3]), np.array(["a", "b"]))


def test_select() -> None:
    table = PreferenceTable(np.array([1, 2, 3]), np.array([4, 5, 6]), np.array(["a", "b", "c"]))
    chosen = table.select(np.array([2, 0]))
    assert pairs(chosen) == [(3, 6), (1, 4)]
    assert chosen.annotators.tolist() == ["c", "a"]
    assert pairs(table.select(slice(1))) == [(1, 4)]


# --- writing -------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_preferences(path, table_of((3, 1), (4294967295, 0)))
    assert path.read_bytes() == b"winner,loser\n3,1\n4294967295,0\n"
    assert pairs(read_preferences(path)) == [(3, 1), (4294967295, 0)]

    named = PreferenceTable(np.array([1, 2]), np.array([2, 1]), np.array(['a "b", c', "Zoë"]))
    write_preferences(path, named)
    back = read_preferences(path)
    assert pairs(back) == [(1, 2), (2, 1)]
    assert back.annotators.tolist() == ['a "b", c', "Zoë"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]


# --- splitting -----------------------------------------------------------------------------------


def sides(split: Split) -> list[PreferenceTable]:
    return [split.train, split.validation, split.test]


def assert_sound(split: Split, table: PreferenceTable) -> None:
    """No seed on two sides, every pair on one side or dropped, the table's order kept."""
    for one, other in itertools.combinations(sides(split), 2):
        assert not set(one.seeds.tolist()) & set(other.seeds.tolist())
    everything = pairs(table)
    positions = [[everything.index(pair) for pair in pairs(side)] for side in sides(split)]
    assert all(side == sorted(side) for side in positions)
    assert len(set(itertools.chain(*positions))) == len(everything) - split.dropped


def test_pairs_without_common_seeds_reach_the_fractions() -> None:
    table = table_of(*((2 * i, 2 * i + 1) for i in range(100)))
    split = split_preferences(table)
    assert_sound(split, table)
    assert [len(side) for side in sides(split)] == [70, 15, 15]
    assert split.dropped == 0
    assert pairs(split.train) != pairs(table)[:70]


def test_the_split_depends_on_the_seed_alone() -> None:
    table = table_of(*((2 * i, 2 * i + 1) for i in range(100)))
    again = split_preferences(table)
    assert [pairs(s) for s in sides(again)] == [pairs(s) for s in sides(split_preferences(table))]
    other = split_preferences(table, seed=1)
    assert set(pairs(other.test)) != set(pairs(again.test))
    order = list(range(100))
    random.Random(5).shuffle(order)
    shuffled = split_preferences(table.select(np.array(order)))
    assert [set(pairs(s)) for s in sides(shuffled)] == [set(pairs(s)) for s in sides(again)]


def test_a_split_is_the_same_in_every_process() -> None:
    """Pinned: another split would mix seeds of train and test when an old run is resumed."""
    program = (
        "import numpy as np\n"
        "from densityrl.preference import PreferenceTable, split_preferences\n"
        "table = PreferenceTable(np.arange(0, 40, 2), np.arange(1, 40, 2))\n"
        "print(split_preferences(table, seed=3).validation.winners.tolist())\n"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert output == PINNED_VALIDATION


def test_linked_seeds_stay_together() -> None:
    # ten groups of a chain 0-1-2-3 and a pair 4-5
    rows = []
    for start in range(0, 100, 10):
        rows += [(start, start + 1), (start + 2, start + 1), (start + 2, start + 3)]
        rows += [(start + 5, start + 4)]
    table = table_of(*rows)
    split = split_preferences(table, (0.6, 0.2, 0.2), seed=7)
    assert_sound(split, table)
    assert split.dropped == 0
    assert [len(side) for side in sides(split)] == [24, 8, 8]


def test_one_large_group_is_broken_up() -> None:
    table = table_of(*itertools.combinations(range(40), 2))  # 780 pairs, all linked
    split = split_preferences(table)
    assert_sound(split, table)
    # 28, 6 and 6 seeds: 28 * 27 / 2 and 6 * 5 / 2 pairs remain
    assert [len(side) for side in sides(split)] == [378, 15, 15]
    assert split.dropped == 780 - 408


def test_small_groups_stay_whole_beside_a_large_one() -> None:
    clique = list(itertools.combinations(range(20), 2))  # 190 pairs
    lone = [(100 + 2 * i, 101 + 2 * i) for i in range(10)]
    table = table_of(*clique, *lone)
    split = split_preferences(table)
    assert_sound(split, table)
    kept = {pair for side in sides(split) for pair in pairs(side)}
    assert set(lone) <= kept
    assert 0 < split.dropped < 190


def test_the_largest_group_that_fits_is_kept_whole() -> None:
    chain = [(i, i + 1) for i in range(57)]
    lone = [(100 + 2 * i, 101 + 2 * i) for i in range(43)]
    table = table_of(*chain, *lone)
    split = split_preferences(table, (0.57, 0.23, 0.2))  # 0.57 * 200 rounds to below 114
    assert pairs(split.train) == chain
    assert split.dropped == 0


def test_no_test_side() -> None:
    table = table_of(*((2 * i, 2 * i + 1) for i in range(10)))
    split = split_preferences(table, (0.8, 0.2, 0.0))
    assert [len(side) for side in sides(split)] == [8, 2, 0]
    assert split.test.seeds.tolist() == []


def test_annotators_are_split_too() -> None:
    names = np.array([f"n{i}" for i in range(10)])
    table = PreferenceTable(np.arange(10) * 2, np.arange(10) * 2 + 1, names)
    validation = split_preferences(table, (0.8, 0.2, 0.0)).validation
    assert validation.annotators.tolist() == [f"n{w // 2}" for w in validation.winners.tolist()]


@pytest.mark.parametrize(
    "rows",
    [[(1, 2)], [(1, 2), (3, 4)], [(0, i) for i in range(1, 50)]],
    ids=["one pair", "two pairs", "a star"],
)
def test_too_little_to_split(rows: list[tuple[int, int]]) -> None:
    with pytest.raises(PreferenceError, match=rf"^{len(rows)} pairs? cannot .* at least 7 pairs"):
        split_preferences(table_of(*rows))


def test_the_number_asked_for_is_enough() -> None:
    split = split_preferences(table_of(*((2 * i, 2 * i + 1) for i in range(7))))
    assert len(split.validation) >= 1


def test_an_empty_table_cannot_be_split() -> None:
    with pytest.raises(PreferenceError, match=r"^0 pairs cannot"):
        split_preferences(PreferenceTable(np.array([]), np.array([])))


@pytest.mark.parametrize(
    "fractions",
    [(0.5, 0.5), (0.8, 0.3, 0.1), (1.2, -0.1, -0.1), (0.8, 0.0, 0.2), (0.0, 0.8, 0.2)],
)
def test_fractions_that_make_no_split(fractions: tuple[float, ...]) -> None:
    table = table_of(*((2 * i, 2 * i + 1) for i in range(20)))
    with pytest.raises(PreferenceError, match="fractions"):
        split_preferences(table, fractions)


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_split_soundly(seed: int) -> None:
    rng = random.Random(seed)
    seeds = rng.randrange(30, 300)
    possible = list(itertools.combinations(range(seeds), 2))
    table = table_of(*rng.sample(possible, 200))
    assert_sound(split_preferences(table, seed=seed), table)


def test_reading_preferences_needs_no_torch() -> None:
    program = (
        "import sys, densityrl.preference.table, densityrl.run; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
