"""What was chosen is kept, once: through kills, lost replies, second windows and processes."""

import contextlib
import csv
import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from densityrl.errors import DensityRLError, PreferenceError
from densityrl.preference import PreferenceTable, read_preferences
from densityrl.preference.store import (
    NAME_LENGTH,
    REPEAT_GAP,
    AlreadyAnsweredError,
    NoSuchTaskError,
    Pair,
    PreferenceStore,
    Progress,
    Sample,
    check_samples,
    is_store,
    write_choices,
    write_decisions,
)


def pair(number: int, source="random", psi: float = 1.0) -> Pair:
    """Of the seeds 2n and 2n + 1; the first of an anchor is truncated."""
    first_psi = 0.5 if source == "anchor" else psi
    return Pair(Sample(2 * number, first_psi), Sample(2 * number + 1, psi), source)


def make(path: Path, pairs: int, *names: str) -> PreferenceStore:
    store = PreferenceStore(path, create=True)
    for number in range(pairs):
        assert store.plan(number, pair(number))
    for name in names or ("ann",):
        store.add_annotator(name)
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "choices.db"


@pytest.fixture
def store(path: Path):
    """Five pairs and the annotators ann and bob."""
    with make(path, 5, "ann", "bob") as store:
        yield store


def tasks_of(store: PreferenceStore, name="ann", count=1000, pairs=5, repeats=0.0):
    return store.upcoming(name, count, pairs=pairs, repeats=repeats)


def number_of(task) -> int:
    return min(task.left.seed, task.right.seed) // 2


def session(store: PreferenceStore, name="ann", *, pairs: int, repeats: float, answer=None):
    """Answer everything, four tasks ahead as the page does; the tasks in the order answered."""
    done = []
    while tasks := store.upcoming(name, 4, pairs=pairs, repeats=repeats):
        task = tasks[0]
        said = "first" if answer is None else answer(task)
        store.choose(name, task.id, said, request=f"{name}/{task.id}")
        done.append(task)
    return done


def say(store: PreferenceStore, name: str, *answers: str) -> list[int]:
    """Answer the annotator's next tasks; the choices' numbers."""
    tasks = tasks_of(store, name, len(answers))
    return [
        store.choose(name, task.id, answer, request=f"{name}/{task.id}")
        for task, answer in zip(tasks, answers, strict=True)
    ]


def decided(store: PreferenceStore) -> list[tuple[str, int, str]]:
    return [(c.annotator, c.pair.first.seed // 2, c.answer) for c in store.decisions()]


def rows(table: PreferenceTable) -> list[tuple[int, int, str]]:
    return list(
        zip(table.winners.tolist(), table.losers.tolist(), table.annotators.tolist(), strict=True)
    )


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- giving out ----------------------------------------------------------------------------------


def test_pairs_are_given_in_the_order_of_the_plan(store) -> None:
    assert [number_of(task) for task in tasks_of(store)] == [0, 1, 2, 3, 4]
    assert [number_of(task) for task in tasks_of(store, "bob")] == [0, 1, 2, 3, 4]
    assert not {t.id for t in tasks_of(store)} & {t.id for t in tasks_of(store, "bob")}


def test_open_tasks_are_given_again_and_answered_ones_never(store) -> None:
    first = tasks_of(store, count=2)
    assert tasks_of(store, count=2) == first
    assert tasks_of(store, count=3)[:2] == first
    say(store, "ann", "first")
    assert [number_of(task) for task in tasks_of(store, count=2)] == [1, 2]
    assert len(session(store, pairs=5, repeats=0)) == 4
    assert tasks_of(store) == []


def test_no_more_than_asked_for(store) -> None:
    assert len(tasks_of(store, count=1)) == 1
    assert len(tasks_of(store, pairs=3)) == 3
    assert len(tasks_of(store, pairs=8)) == 5
    store.plan(5, pair(5))
    assert [number_of(task) for task in tasks_of(store, pairs=8)][5:] == [5]


def test_a_task_by_its_number(store) -> None:
    (task,) = tasks_of(store, count=1)
    assert store.task(task.id) == task
    assert task.annotator == "ann"
    with pytest.raises(NoSuchTaskError, match="no task 99"):
        store.task(99)


def test_a_plan_is_made_once(store) -> None:
    assert store.planned() == 5
    assert not store.plan(4, pair(9))
    assert not store.plan(6, pair(9))
    assert store.pairs() == [pair(number) for number in range(5)]
    likely = Pair(Sample(20, 0.7), Sample(4294967295, 0.7), "uncertain", 0.25)
    assert store.plan(5, likely)
    assert store.pairs()[5] == likely


def test_the_furthest(store) -> None:
    assert store.furthest() == 0
    tasks_of(store, "bob", 2)
    tasks_of(store, "ann", 1)
    assert store.furthest() == 2
    store.add_table(PreferenceTable(np.arange(100, 110), np.arange(200, 210)), "cy", 1.0)
    assert store.furthest() == 2


@pytest.mark.parametrize(("pairs", "repeats", "total"), [(30, 0.1, 33), (30, 0.5, 45), (9, 0.1, 9)])
def test_share_of_repeats(path, pairs: int, repeats: float, total: int) -> None:
    with make(path, pairs) as store:
        shown = Counter(number_of(t) for t in session(store, pairs=pairs, repeats=repeats))
        assert shown.total() == total
        assert sorted(shown) == list(range(pairs))
        assert max(shown.values()) <= 2
        assert store.progress("ann", pairs=pairs, repeats=repeats).done == total


def test_a_share_of_29_hundredths_is_29_of_100(path) -> None:
    assert 0.29 * 100 < 29  # in floating point
    with make(path, 100) as store:
        assert len(session(store, pairs=100, repeats=0.29)) == 129
        assert store.progress("ann", pairs=100, repeats=0.29).total == 129


@pytest.mark.parametrize("repeats", [0.1, 0.3])
def test_repeats_keep_their_distance_while_pairs_are_left(path, repeats: float) -> None:
    with make(path, 60) as store:
        order = [number_of(task) for task in session(store, pairs=60, repeats=repeats)]
    last_new = order.index(59)
    early = 0
    for place, number in enumerate(order[:last_new]):
        before = order.index(number)
        if before < place:
            early += 1
            assert place - before >= REPEAT_GAP
            assert early <= repeats * len(set(order[:place]))
    assert early >= 0.8 * repeats * 60  # spread over the session, not heaped at its end


def test_a_repeat_has_its_sides_swapped(path) -> None:
    with make(path, 40) as store:
        tasks = session(store, pairs=40, repeats=0.5)
        choices = store.choices()
    shown: dict[int, list] = {}
    for task in tasks:
        shown.setdefault(number_of(task), []).append((task.left, task.right))
    twice = [sides for sides in shown.values() if len(sides) == 2]
    assert len(twice) == 20
    assert all(again == before[::-1] for before, again in twice)
    assert sum(choice.repeated for choice in choices) == 20
    seen: set[int] = set()
    for choice in choices:
        assert choice.repeated == (choice.pair_id in seen)
        seen.add(choice.pair_id)


def test_only_what_was_answered_is_repeated(path) -> None:
    with make(path, 20) as store:
        skipped = range(0, 20, 2)
        tasks = session(
            *(store,),
            pairs=20,
            repeats=1.0,
            answer=lambda task: "skip" if number_of(task) in skipped else "tie",
        )
    shown = Counter(map(number_of, tasks))
    assert {number for number, count in shown.items() if count == 2} == set(range(1, 20, 2))


def test_no_repeat_of_what_is_open_or_was_taken_back(path) -> None:
    with make(path, 12) as store:
        tasks = tasks_of(store, pairs=12, repeats=1.0)
        assert [number_of(task) for task in tasks] == list(range(12))
        store.undo("ann", store.choose("ann", tasks[0].id, "first", request="a"))
        assert tasks_of(store, pairs=12, repeats=1.0) == tasks
        store.choose("ann", tasks[3].id, "first", request="b")
        assert [number_of(t) for t in tasks_of(store, pairs=12, repeats=1.0)[11:]] == [3]


def test_sides_are_random_and_kept(path) -> None:
    with make(path, 400, "ann", "bob") as store:
        tasks = store.upcoming("ann", 400, pairs=400, repeats=0)
        others = store.upcoming("bob", 400, pairs=400, repeats=0)
    sides = [task.first_is_left for task in tasks]
    assert 160 < sum(sides) < 240  # four standard deviations
    assert 160 < sum(a == b.first_is_left for a, b in zip(sides, others, strict=True)) < 240
    assert 160 < sum(a == b for a, b in itertools.pairwise(sides)) < 240
    for number, task in enumerate(tasks):
        seeds = (2 * number, 2 * number + 1)
        assert (task.left.seed, task.right.seed) == (seeds if task.first_is_left else seeds[::-1])
    with PreferenceStore(path) as store:
        assert store.upcoming("ann", 400, pairs=400, repeats=0) == tasks


# --- choosing ------------------------------------------------------------------------------------


def test_a_choice_with_all_that_is_known(store) -> None:
    (task,) = tasks_of(store, count=1)
    number = store.choose("ann", task.id, "skip", request="a", seconds=2.5, reason="a hole")
    (choice,) = store.choices()
    assert (choice.id, choice.annotator, choice.position) == (number, "ann", 1)
    assert (choice.pair, choice.first_is_left) == (pair(0), task.first_is_left)
    assert (choice.answer, choice.reason, choice.seconds) == ("skip", "a hole", 2.5)
    assert (choice.repeated, choice.undone) == (False, None)
    assert choice.time.endswith("+00:00")


def test_one_click_counts_once(store) -> None:
    (task,) = tasks_of(store, count=1)
    number = store.choose("ann", task.id, "first", request="a")
    assert store.choose("ann", task.id, "first", request="a") == number
    store.undo("ann", number)
    assert store.choose("ann", task.id, "first", request="a") == number  # late, and still that one
    assert len(store.choices(undone=True)) == 1


def test_an_answered_task_takes_no_second_answer(store) -> None:
    (task,) = tasks_of(store, count=1)
    store.choose("ann", task.id, "first", request="a")
    for answer in ("first", "second"):
        with pytest.raises(AlreadyAnsweredError, match="from another window"):
            store.choose("ann", task.id, answer, request=f"b{answer}")
    assert [choice.answer for choice in store.choices(undone=True)] == ["first"]


def test_one_click_is_not_for_two_answers(store) -> None:
    one, two = tasks_of(store, count=2)
    store.choose("ann", one.id, "first", request="a")
    for task, answer in ((one, "second"), (two, "first")):
        with pytest.raises(AlreadyAnsweredError, match="counted for something else"):
            store.choose("ann", task.id, answer, request="a")
    assert [choice.answer for choice in store.choices(undone=True)] == ["first"]


def test_only_ones_own_tasks(store) -> None:
    (task,) = tasks_of(store, count=1)
    with pytest.raises(NoSuchTaskError, match=f"'bob' has no task {task.id}"):
        store.choose("bob", task.id, "first", request="a")
    with pytest.raises(NoSuchTaskError, match="'ann' has no task 99"):
        store.choose("ann", 99, "first", request="a")
    assert store.choices() == []


def test_only_who_is_known(store) -> None:
    for call in (
        lambda: store.choose("eve", 1, "first", request="a"),
        lambda: store.undo("eve", 1),
        lambda: tasks_of(store, "eve"),
        lambda: store.progress("eve", pairs=5, repeats=0),
    ):
        with pytest.raises(NoSuchTaskError, match="nobody here is called 'eve'"):
            call()


def test_a_task_that_was_taken_back_comes_first(store) -> None:
    tasks = tasks_of(store)
    first, second, _ = say(store, "ann", "first", "second", "tie")
    store.undo("ann", second)
    assert tasks_of(store) == [tasks[1], *tasks[3:]]
    store.undo("ann", first)
    assert tasks_of(store) == [*tasks[:2], *tasks[3:]]
    again = store.choose("ann", tasks[0].id, "second", request="again")
    assert again not in (first, second)
    assert [(c.id, c.answer) for c in store.choices()] == [(again - 1, "tie"), (again, "second")]


def test_the_log_keeps_what_was_taken_back(store) -> None:
    (number,) = say(store, "ann", "first")
    store.undo("ann", number)
    assert store.choices() == []
    (choice,) = store.choices(undone=True)
    assert (choice.id, choice.answer) == (number, "first")
    assert choice.undone is not None
    assert choice.undone >= choice.time


def test_what_cannot_be_taken_back(store) -> None:
    (number,) = say(store, "ann", "first")
    with pytest.raises(NoSuchTaskError, match=f"'bob' has no choice {number}"):
        store.undo("bob", number)
    with pytest.raises(NoSuchTaskError, match="'ann' has no choice 99"):
        store.undo("ann", 99)
    assert store.choices()[0].undone is None
    store.undo("ann", number)
    when = store.choices(undone=True)[0].undone
    with pytest.raises(AlreadyAnsweredError, match="taken back already"):
        store.undo("ann", number)
    assert store.choices(undone=True)[0].undone == when


def test_progress(store) -> None:
    assert store.progress("ann", pairs=5, repeats=0.4) == Progress(0, 7, None, None)
    tasks = tasks_of(store)
    numbers = [
        store.choose("ann", task.id, "first", request=str(task.id), seconds=seconds)
        for task, seconds in zip(tasks[:4], (1.0, 9.0, 3.0, None), strict=True)
    ]
    assert store.progress("ann", pairs=5, repeats=0.4) == Progress(4, 7, 3.0, numbers[3])
    store.undo("ann", numbers[3])
    store.undo("ann", numbers[2])
    assert store.progress("ann", pairs=5, repeats=0.4) == Progress(2, 7, 5.0, numbers[1])
    assert store.progress("bob", pairs=5, repeats=0.4).done == 0
    assert store.progress("ann", pairs=1, repeats=0).total == 2  # never less than was done


def test_progress_ends_where_the_tasks_do_after_an_import(store) -> None:
    store.add_table(PreferenceTable(np.array([4]), np.array([5])), "ann", 1.0)  # pair 2
    assert [number_of(task) for task in session(store, pairs=5, repeats=0)] == [0, 1, 3, 4]
    progress = store.progress("ann", pairs=5, repeats=0)
    assert progress.done == progress.total


def test_an_imported_choice_is_not_taken_back_or_can_be_shown(store) -> None:
    store.add_table(PreferenceTable(np.array([0]), np.array([1])), "ann", 1.0)
    with contextlib.suppress(NoSuchTaskError):
        store.undo("ann", store.choices()[0].id)
    assert tasks_of(store)
    for task in tasks_of(store):
        assert store.task(task.id) == task


# --- more than one window ------------------------------------------------------------------------


def test_two_windows_see_each_other_and_cannot_double(store, path) -> None:
    with PreferenceStore(path) as other:
        tasks = tasks_of(store)
        assert tasks_of(other) == tasks
        number = store.choose("ann", tasks[0].id, "first", request="a")
        with pytest.raises(AlreadyAnsweredError):
            other.choose("ann", tasks[0].id, "first", request="b")
        assert other.choose("ann", tasks[0].id, "first", request="a") == number
        assert other.choices() == store.choices()
        assert tasks_of(other) == tasks[1:]
        other.undo("ann", number)
        assert tasks_of(store) == tasks
        with pytest.raises(AlreadyAnsweredError):
            store.undo("ann", number)
        assert other.plan(5, pair(5))
        assert not store.plan(5, pair(6))
        other.add_annotator("cy")
        assert store.annotators() == ["ann", "bob", "cy"]


def test_threads_share_a_store(path) -> None:
    with make(path, 40) as store:
        tasks = store.upcoming("ann", 40, pairs=40, repeats=0)

        def window(worker: int) -> int:
            won = 0
            for task in tasks:
                try:
                    store.choose("ann", task.id, "first", request=f"{worker}/{task.id}")
                    won += 1
                except AlreadyAnsweredError:
                    pass
            return won

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(window, range(8))) == 40
        assert sorted(choice.position for choice in store.choices()) == list(range(1, 41))


def test_the_file_itself_refuses_doubles(store, path) -> None:
    (task,) = tasks_of(store, count=1)
    store.choose("ann", task.id, "first", request="a")
    other = sqlite3.connect(path)
    for statement in (
        "INSERT INTO choice (task, answer, time) VALUES (1, 'second', '')",
        "INSERT INTO choice (task, answer, time) VALUES (1, 'left', '')",
        "INSERT INTO task (annotator, position, pair, first_is_left) VALUES (1, 9, 1, 1)",
        "INSERT INTO task (annotator, position, pair, first_is_left) VALUES (1, 1, 2, 1)",
        "INSERT INTO annotator (name) VALUES ('ann')",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            other.execute(statement)
    other.close()


def test_opening_waits_for_who_is_making_the_file(store, path) -> None:
    """One process has made the tables, another is about to look: the third finds it locked."""
    store.close()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    assert other.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, other.execute, ["COMMIT"])
    release.start()
    try:
        with PreferenceStore(path) as opened:
            assert opened.planned() == 5
    finally:
        release.join()
        other.close()


# --- what the file is about ----------------------------------------------------------------------


def test_another_setting_is_refused(store, path) -> None:
    store.describe({"generator": "abc", "truncation_psi": 0.7})
    store.describe({"truncation_psi": 0.7, "level": None})
    with pytest.raises(PreferenceError) as caught:
        store.describe({"new": 1, "truncation_psi": 1.0})
    assert one_sentence(caught) == (
        f"{path} was made with truncation_psi = 0.7, not 1.0; give the same, or another --db"
    )
    with PreferenceStore(path) as other:
        assert other.about() == {"generator": "abc", "truncation_psi": 0.7, "level": None}


def test_choices_about_other_samples(store, path, tmp_path) -> None:
    check_samples(path, "abc", 0.7)  # nothing is known of them yet
    store.describe({"generator": "abc", "truncation_psi": 0.7})
    check_samples(path, "abc", 0.7)
    with pytest.raises(PreferenceError, match="samples of another generator"):
        check_samples(path, "xyz", 0.7)
    with pytest.raises(PreferenceError, match=r"at --truncation-psi 0\.7, not 1$"):
        check_samples(path, "abc", 1.0)
    (tmp_path / "pairs.csv").write_text("winner,loser\n1,2\n")
    check_samples(tmp_path / "pairs.csv", "xyz", 1.0)


def test_names(store) -> None:
    assert store.add_annotator("  Zoë von X ") == "Zoë von X"
    assert store.add_annotator("Zoë von X") == "Zoë von X"
    longest = "x" * NAME_LENGTH
    store.add_annotator(longest)
    assert store.annotators() == ["ann", "bob", "Zoë von X", longest]


@pytest.mark.parametrize("name", ["", "  ", "x" * (NAME_LENGTH + 1), "a\nb", "a\tb", "a\0"])
def test_what_is_no_name(store, name: str) -> None:
    with pytest.raises(PreferenceError, match="1 to 40 printable characters"):
        store.add_annotator(name)
    assert store.annotators() == ["ann", "bob"]


# --- files ---------------------------------------------------------------------------------------


def test_no_file(tmp_path) -> None:
    with pytest.raises(PreferenceError, match="does not exist") as caught:
        PreferenceStore(tmp_path / "absent.db")
    assert "densityrl annotate" in one_sentence(caught)
    for place in (tmp_path, tmp_path / "nowhere" / "choices.db"):
        with pytest.raises(PreferenceError, match="cannot open"):
            PreferenceStore(place, create=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("text", ["winner,loser\n1,2\n", "winner,loser\n" + "1,2\n" * 500])
def test_a_file_that_is_no_database_is_left_alone(path, text: str, create: bool) -> None:
    path.write_text(text)
    with pytest.raises(PreferenceError, match="is no store of preferences") as caught:
        PreferenceStore(path, create=create)
    one_sentence(caught)
    assert path.read_text() == text
    assert not is_store(path)


@pytest.mark.parametrize("create", [False, True])
def test_another_database_is_left_alone(path, create: bool) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (a)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(PreferenceError, match="no store of preferences") as caught:
        PreferenceStore(path, create=create)
    one_sentence(caught)
    assert path.read_bytes() == before


def test_a_newer_version_is_left_alone(store, path) -> None:
    store.close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 2")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(PreferenceError, match="newer release: update this one") as caught:
        PreferenceStore(path)
    one_sentence(caught)
    assert path.read_bytes() == before


def test_half_a_file(store, path) -> None:
    store.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(PreferenceError, match="is no store of preferences") as caught:
        PreferenceStore(path)
    one_sentence(caught)


def test_what_a_store_looks_like(store, path, tmp_path) -> None:
    assert is_store(path)
    assert not is_store(tmp_path)
    assert not is_store(tmp_path / "absent.db")


def test_choices_are_on_disk_before_the_reply(store) -> None:
    assert store._pragma("journal_mode") == "wal"
    assert store._pragma("synchronous") == 2  # FULL: a commit waits for the disk


def test_a_full_disk_is_said_and_costs_nothing(store) -> None:
    task, later = tasks_of(store, count=2)
    store._pragma("max_page_count = 1")  # of what is there already, no page more
    saved = []

    def fill() -> None:
        for number in range(1000):
            saved.append(
                store.choose("ann", task.id, "skip", request=str(number), reason="x" * 200)
            )
            store.undo("ann", saved[-1])

    with pytest.raises(DensityRLError, match="full"):
        fill()
    assert saved
    assert [choice.id for choice in store.choices(undone=True)] == saved
    store._pragma("max_page_count = 1000000")
    store.choose("ann", later.id, "first", request="after")
    assert len(store.choices(undone=True)) == len(saved) + 1


# --- tables --------------------------------------------------------------------------------------


def mixed(path: Path) -> PreferenceStore:
    """ann: 0 first, 1 contradicted, 2 tie, 3 skip, 4 second, 5 an anchor; bob: 0 second."""
    store = PreferenceStore(path, create=True)
    for number in range(6):
        store.plan(number, pair(number, "anchor" if number == 5 else "random"))
    for name in ("ann", "bob"):
        store.add_annotator(name)
    said = {0: ["first"] * 2, 1: ["first", "second"], 2: ["tie"] * 2, 3: ["skip"]}
    said |= {4: ["second"] * 2, 5: ["first"] * 2}
    session(store, pairs=6, repeats=1.0, answer=lambda task: said[number_of(task)].pop(0))
    assert sorted(said.items()) == [(number, []) for number in range(6)]
    (task,) = store.upcoming("bob", 1, pairs=6, repeats=0)
    store.choose("bob", task.id, "second", request="bob", seconds=1.5)
    return store


def test_decisions(path) -> None:
    with mixed(path) as store:
        assert len(store.choices()) == 12
        assert decided(store) == [("ann", 0, "first"), ("ann", 4, "second"), ("bob", 0, "second")]
        assert not any(choice.repeated for choice in store.decisions())


def test_what_was_taken_back_decides_nothing(store) -> None:
    numbers = say(store, "ann", "first", "second")
    store.undo("ann", numbers[0])
    assert decided(store) == [("ann", 1, "second")]


@pytest.mark.parametrize("again", ["tie", "skip"])
def test_a_repeat_that_is_not_the_same_answer(path, again: str) -> None:
    """A tie contradicts; a skip says nothing."""
    with make(path, 1) as store:
        answers = ["first", again]
        session(store, pairs=1, repeats=1.0, answer=lambda task: answers.pop(0))
        assert len(store.choices()) == 2
        assert len(store.decisions()) == (again == "skip")


def test_table(path) -> None:
    with mixed(path) as store:
        whole = [(0, 1, "ann"), (9, 8, "ann"), (1, 0, "bob")]
        assert rows(store.table()) == whole
        assert rows(store.table(2)) == whole[:2]
        assert rows(read_preferences(path)) == whole  # while it is open
    assert rows(read_preferences(str(path))) == whole
    assert rows(read_preferences(path, limit=1)) == whole[:1]
    assert rows(read_preferences(path, limit=9)) == whole
    with pytest.raises(PreferenceError, match="a limit of 0 keeps no preferences"):
        read_preferences(path, limit=0)


def test_nothing_decided_yet(store, path, tmp_path) -> None:
    say(store, "ann", "tie", "skip")
    for call in (
        store.table,
        lambda: write_decisions(tmp_path / "out.csv", store),
        lambda: read_preferences(path),
    ):
        with pytest.raises(PreferenceError, match="holds no decided pairs yet") as caught:
            call()
        assert one_sentence(caught).startswith(str(path))
    assert not (tmp_path / "out.csv").exists()


def test_a_csv_goes_out_and_in_again(path, tmp_path) -> None:
    out = tmp_path / "out.csv"
    with mixed(path) as store:
        assert write_decisions(out, store) == 3
        table = read_preferences(out)
        assert rows(table) == rows(store.table())
        before = store.choices()
        assert store.add_table(table, "nobody", 1.0) == 0
        assert store.choices() == before
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["source"] for row in written] == ["random"] * 3
    assert [row["seconds"] for row in written] == ["", "", "1.5"]
    assert [row["time"] for row in written] == [
        before[0].time,
        next(c.time for c in before if c.pair.first.seed == 8),
        before[-1].time,
    ]
    with PreferenceStore(tmp_path / "new.db", create=True) as new:
        assert new.add_table(table, "nobody", 1.0) == 3
        assert rows(new.table()) == rows(table)
        assert new.annotators() == ["ann", "bob"]
        assert [pair.source for pair in new.pairs()] == ["imported"] * 2
        assert {choice.first_is_left for choice in new.choices()} == {None}
        assert new.planned() == 0


def test_who_is_not_named(store) -> None:
    assert store.add_table(PreferenceTable(np.array([7]), np.array([90])), " cy ", 1.0) == 1
    named = PreferenceTable(np.array([7, 8]), np.array([90, 91]), np.array(["", "dee"]))
    assert store.add_table(named, "ann", 1.0) == 2
    assert rows(store.table()) == [(7, 90, "cy"), (7, 90, "ann"), (8, 91, "dee")]


def test_a_planned_pair_that_was_imported_is_not_shown(store) -> None:
    say(store, "ann", "first")
    tasks_of(store, count=1)  # pair 1 is before ann
    table = PreferenceTable(np.array([0, 3, 5]), np.array([1, 2, 4]))
    assert store.add_table(table, "ann", 1.0) == 2
    assert decided(store) == [("ann", 0, "first"), ("ann", 1, "second"), ("ann", 2, "second")]
    assert len(store.pairs()) == 5
    assert [number_of(task) for task in tasks_of(store)] == [3, 4]
    assert [number_of(task) for task in tasks_of(store, "bob")] == [0, 1, 2, 3, 4]


def test_the_same_seeds_at_another_truncation_are_another_pair(store) -> None:
    say(store, "ann", "first")
    assert store.add_table(PreferenceTable(np.array([1]), np.array([0])), "ann", 0.5) == 1
    assert store.pairs()[-1] == Pair(Sample(1, 0.5), Sample(0, 0.5), "imported")


@pytest.mark.parametrize("said", ["second", "tie"])
def test_a_contradicting_table_changes_nothing(store, path, said: str) -> None:
    say(store, "ann", said)
    before = store.pairs(), store.choices()
    with pytest.raises(PreferenceError) as caught:
        store.add_table(PreferenceTable(np.array([70, 0]), np.array([71, 1])), "ann", 1.0)
    message = one_sentence(caught)
    assert "'ann' prefers 0 to 1 in the table" in message
    assert f"said {said!r}" in message
    assert (store.pairs(), store.choices()) == before


def test_a_contradicting_table_makes_nobody_known(store) -> None:
    table = PreferenceTable(np.array([0, 1]), np.array([1, 0]), np.array(["cy", "cy"]))
    with pytest.raises(PreferenceError, match="'cy' prefers 1 to 0"):
        store.add_table(table, "ann", 1.0)
    assert store.annotators() == ["ann", "bob"]


def test_the_log_has_a_row_a_choice(tmp_path, store) -> None:
    store.plan(5, Pair(Sample(90, 0.7), Sample(91, 0.7), "uncertain", 0.25))
    tasks = tasks_of(store, pairs=6)
    number = store.choose("ann", tasks[0].id, "skip", request="a", seconds=1.5, reason="a, hole")
    store.undo("ann", number)
    store.choose("ann", tasks[0].id, "first", request="b")
    store.choose("ann", tasks[5].id, "second", request="c")
    store.add_table(PreferenceTable(np.array([50]), np.array([51])), "cy", 1.0)
    assert write_choices(tmp_path / "log.csv", store) == 4
    with (tmp_path / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))

    def column(name: str) -> list[str]:
        return [row[name] for row in log]

    choices = store.choices(undone=True)
    assert column("id") == ["1", "2", "3", "4"]
    assert column("annotator") == ["ann", "ann", "ann", "cy"]
    assert column("position") == ["1", "1", "6", "1"]
    assert column("time") == [choice.time for choice in choices]
    assert column("undone") == [choices[0].undone, "", "", ""]
    assert column("first_seed") == ["0", "0", "90", "50"]
    assert column("second_seed") == ["1", "1", "91", "51"]
    assert column("first_psi") == column("second_psi") == ["1.0", "1.0", "0.7", "1.0"]
    assert column("source") == ["random", "random", "uncertain", "imported"]
    assert column("probability") == ["", "", "0.25", ""]
    shown = [str(tasks[0].left.seed)] * 2 + [str(tasks[5].left.seed), ""]
    assert column("left") == shown
    assert column("repeated") == ["0"] * 4
    assert column("answer") == ["skip", "first", "second", "first"]
    assert column("reason") == ["a, hole", "", "", ""]
    assert column("seconds") == ["1.5", "", "", ""]


def test_the_log_marks_repeats(tmp_path) -> None:
    with make(tmp_path / "choices.db", 4) as store:
        tasks = session(store, pairs=4, repeats=0.5)
        assert write_choices(tmp_path / "log.csv", store) == 6
    with (tmp_path / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    assert sum(int(row["repeated"]) for row in log) == 2
    assert [int(row["left"]) for row in log] == [task.left.seed for task in tasks]


# --- processes -----------------------------------------------------------------------------------


def start(program: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def race(program: str, *arguments) -> list[str]:
    """What four processes print that set off at one time, each told its number first."""
    processes = [start(program, worker, *arguments) for worker in range(4)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        printed = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * 4
    return printed


def assert_whole(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


WITHOUT_END = """
import itertools, sys
from densityrl.preference.store import PreferenceStore
store = PreferenceStore(sys.argv[1])
(task,) = store.upcoming("ann", 1, pairs=1, repeats=0)
for click in itertools.count():
    number = store.choose("ann", task.id, "first", request=f"{sys.argv[2]}/{click}")
    print(number, flush=True)
    store.undo("ann", number)
"""


def test_a_kill_loses_nothing_that_was_confirmed(path) -> None:
    make(path, 1).close()
    confirmed: list[int] = []
    unconfirmed = 0
    for wanted in (1, 20, 150):
        with start(WITHOUT_END, path, wanted) as process:
            lines = [process.stdout.readline() for _ in range(wanted)]
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode < 0
        confirmed += [int(line) for line in lines if line.endswith("\n")]
        with PreferenceStore(path) as store:
            kept = [choice.id for choice in store.choices(undone=True)]
            assert set(confirmed) <= set(kept)
            assert len(kept) == len(set(kept))
            assert len(kept) - len(confirmed) <= unconfirmed + 1
            unconfirmed = len(kept) - len(confirmed)
            for choice in store.choices():  # one the kill came before the taking back of
                store.undo("ann", choice.id)
        assert_whole(path)
    assert len(confirmed) >= 171


EACH_FOR_ITSELF = """
import sys
from densityrl.preference.store import PreferenceStore
worker, path, pairs = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = PreferenceStore(path)
name = store.add_annotator(f"annotator {worker}")
print("ready", flush=True)
sys.stdin.readline()
while tasks := store.upcoming(name, 25, pairs=pairs, repeats=0):
    for task in tasks:
        store.choose(name, task.id, "first", request=f"{name}/{task.id}")
        print(task.id)
store.close()
"""


def test_four_processes_for_themselves(path) -> None:
    make(path, 500).close()
    printed = race(EACH_FOR_ITSELF, path, 500)
    answered = [int(number) for text in printed for number in text.split()]
    assert len(answered) == len(set(answered)) == 2000
    assert_whole(path)
    with sqlite3.connect(path) as connection:
        tasks = connection.execute("SELECT task FROM choice WHERE undone IS NULL").fetchall()
    connection.close()
    assert sorted(tasks) == sorted((task,) for task in answered)
    with PreferenceStore(path) as store:
        assert len(store.choices(undone=True)) == 2000
        assert Counter((c.annotator, c.pair.first.seed) for c in store.decisions()) == Counter(
            (f"annotator {worker}", 2 * number) for worker in range(4) for number in range(500)
        )


ALL_FOR_ONE = """
import sys
from densityrl.preference.store import AlreadyAnsweredError, PreferenceStore
worker, path, ahead = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = PreferenceStore(path)
given = store.upcoming("ann", ahead, pairs=200, repeats=0)
print("ready", flush=True)
sys.stdin.readline()
while given:
    for task in given:
        try:
            number = store.choose("ann", task.id, "second", request=f"{worker}/{task.id}")
            print(task.id, number)
        except AlreadyAnsweredError:
            print(task.id, "late")
    given = store.upcoming("ann", ahead, pairs=200, repeats=0)
store.close()
"""


@pytest.mark.parametrize("ahead", [200, 3])
def test_four_processes_race_for_the_same_tasks(path, ahead: int) -> None:
    """All at once, and as the page takes them."""
    make(path, 200).close()
    lines = [line.split() for text in race(ALL_FOR_ONE, path, ahead) for line in text.splitlines()]
    won = {int(task): int(number) for task, number in lines if number != "late"}
    late = sum(number == "late" for _, number in lines)
    assert len(won) == len(lines) - late == 200
    assert late == 600 or ahead < 200
    assert_whole(path)
    with PreferenceStore(path) as store:
        kept = store.choices(undone=True)
    assert sorted(choice.id for choice in kept) == sorted(won.values()) == list(range(1, 201))
    assert sorted(choice.pair.first.seed for choice in kept) == list(range(0, 400, 2))
    assert sorted(choice.position for choice in kept) == list(range(1, 201))


MAKE = """
import sys
from densityrl.preference.store import PreferenceStore
worker, path = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with PreferenceStore(path, create=True) as store:
    print(store.add_annotator(worker))
"""


def test_four_processes_make_one_file(path) -> None:
    assert race(MAKE, path) == [f"{worker}\n" for worker in range(4)]
    assert_whole(path)
    with PreferenceStore(path) as store:
        assert sorted(store.annotators()) == ["0", "1", "2", "3"]


def test_an_empty_file_is_not_made_a_store_by_reading(path) -> None:
    path.touch()
    with pytest.raises(PreferenceError, match="is no store of preferences"):
        PreferenceStore(path)
    assert path.read_bytes() == b""
