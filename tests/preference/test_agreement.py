"""Figures about annotators, of stores small enough to count by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from densityrl.preference import PreferenceTable
from densityrl.preference.agreement import agreement, describe_agreement
from densityrl.preference.store import Pair, PreferenceStore, Sample
from densityrl.statistics import wilson_interval


@pytest.fixture
def store(tmp_path: Path):
    with PreferenceStore(tmp_path / "choices.db", create=True) as store:
        yield store


def plan(store: PreferenceStore, *sources) -> None:
    """A pair of the seeds 2n, 2n + 1 for each source; the better one of an anchor is first."""
    for number, source in enumerate(sources):
        first_psi = 0.5 if source == "anchor" else 1.0
        store.plan(number, Pair(Sample(2 * number, first_psi), Sample(2 * number + 1, 1.0), source))


def answer(store: PreferenceStore, name: str, *answers, repeats: float = 0.0) -> list[int]:
    """Answer the annotator's tasks one after the other; the choices' numbers.

    An answer is of a task, or of pair n where the tasks are out of order: {n: [first time, again]};
    left and right stand for whichever sample is there.
    """
    store.add_annotator(name)
    by_pair = dict(enumerate([one] if isinstance(one, str) else list(one) for one in answers))
    numbers = []
    while tasks := store.upcoming(name, 1, pairs=len(answers), repeats=repeats):
        (task,) = tasks
        said = by_pair[min(task.left.seed, task.right.seed) // 2].pop(0)
        reason = None
        if said.startswith("skip"):
            said, _, reason = said.partition(": ")
        if said in ("left", "right"):
            said = "first" if (said == "left") == task.first_is_left else "second"
        seconds = float(len(numbers) + 1)
        numbers.append(
            store.choose(
                *(name, task.id, said),
                request=f"{name}/{task.id}",
                seconds=seconds,
                reason=reason or None,
            )
        )
    assert not any(by_pair.values())
    return numbers


def figures_of(store: PreferenceStore) -> dict:
    """As whoever reads the JSON sees them."""
    return json.loads(json.dumps(agreement(store), allow_nan=False))


def share(part: int, of: int) -> dict:
    return {"share": part / of, "interval": list(wilson_interval(part, of)), "of": of}


NONE = {"share": None, "interval": [0.0, 1.0], "of": 0}


def test_an_empty_store(store) -> None:
    assert figures_of(store) == {
        "pairs": {},
        "decided": 0,
        "annotators": {},
        "between": [],
        "krippendorff_alpha": None,
        "krippendorff_pairs": 0,
    }
    assert describe_agreement(agreement(store)) == "pairs: none\ndecided, for training: 0"


def test_what_is_undefined_is_null(store) -> None:
    plan(store, "random")
    store.add_annotator("ann")
    store.add_annotator("bob")
    figures = figures_of(store)
    for name in ("ann", "bob"):
        assert figures["annotators"][name] == {
            "choices": 0,
            "decided": 0,
            "ties": 0,
            "skips": 0,
            "skip_reasons": {},
            "undone": 0,
            "sources": {},
            "median_seconds": None,
            "left": NONE,
            "anchors_preferred": NONE,
            "itself": {**NONE, "kappa": None},
        }
    assert figures["between"] == [{"annotators": ["ann", "bob"], **NONE, "kappa": None}]
    text = describe_agreement(figures)
    assert "ann: 0 choices (none yet), 0 decided, 0 ties, 0 skipped, 0 undone" in text
    assert "chose the left side: no pairs to tell from" in text
    assert "None" not in text
    assert "Krippendorff" not in text


def test_counts(store) -> None:
    plan(store, "random", "random", "uncertain", "anchor", "random")
    answer(store, "ann", "first", "tie", "second", "first", "skip")
    (number,) = answer(store, "bob", "first")
    store.undo("bob", number)
    figures = figures_of(store)
    assert figures["pairs"] == {"anchor": 1, "random": 3, "uncertain": 1}
    assert figures["decided"] == 2  # neither the tie nor the anchor nor the skip
    ann, bob = figures["annotators"].values()
    assert (ann["choices"], ann["decided"], ann["ties"], ann["skips"]) == (5, 3, 1, 1)
    assert ann["sources"] == {"anchor": 1, "random": 3, "uncertain": 1}
    assert (ann["undone"], ann["median_seconds"]) == (0, 3.0)
    assert (bob["choices"], bob["undone"], bob["median_seconds"]) == (0, 1, None)


def test_skip_reasons(store) -> None:
    plan(store, *["random"] * 5)
    answer(store, "ann", "skip: a hole", "skip: too alike", "skip", "first", "skip: a hole")
    ann = agreement(store)["annotators"]["ann"]
    assert ann["skips"] == 4
    assert sorted(ann["skip_reasons"].values()) == [1, 1, 2]
    assert next(iter(ann["skip_reasons"].items())) == ("a hole", 2)  # the commonest first
    figures_of(store)
    lines = describe_agreement(agreement(store)).splitlines()
    assert "  skipped 2: a hole" in lines
    assert "  skipped 1: too alike" in lines
    assert "  skipped 1: no reason given" in lines


def test_side_bias(store) -> None:
    plan(store, *["random"] * 7)
    answer(store, "ann", "left", "left", "right", "left", "left", "tie", "skip")
    assert figures_of(store)["annotators"]["ann"]["left"] == share(4, 5)


def test_who_decides_by_the_shape_has_no_side(store) -> None:
    plan(store, *["random"] * 60)
    answer(store, "ann", *["first"] * 60)
    sides = [choice.first_is_left for choice in store.choices()]
    left = figures_of(store)["annotators"]["ann"]["left"]
    assert left == share(sum(sides), 60)
    assert 0.3 < left["share"] < 0.7


def test_imported_choices_have_no_side(store) -> None:
    store.add_table(PreferenceTable(np.arange(3), np.arange(10, 13)), "ann", 1.0)
    ann = figures_of(store)["annotators"]["ann"]
    assert (ann["decided"], ann["sources"]) == (3, {"imported": 3})
    assert ann["left"] == NONE
    assert ann["median_seconds"] is None


def test_itself(store) -> None:
    plan(store, *["random"] * 5)
    # f f, f s, s s, s s: 3 of 4; by chance (2 * 1 + 2 * 3) / 16 = 1 / 2
    twice = [["first", "first"], ["first", "second"], ["second", "second"], ["second", "second"]]
    answer(store, "ann", *twice, ["skip"], repeats=1.0)
    itself = figures_of(store)["annotators"]["ann"]["itself"]
    assert itself == {**share(3, 4), "kappa": pytest.approx(0.5)}


def test_itself_is_by_pair_and_counts_ties_but_no_skips(store) -> None:
    plan(store, *["random"] * 4)
    # the left side, both times: another sample, since the sides are swapped
    twice = [["left", "left"], ["tie", "tie"], ["tie", "first"], ["first", "skip"]]
    answer(store, "ann", *twice, repeats=1.0)
    itself = figures_of(store)["annotators"]["ann"]["itself"]
    assert {k: itself[k] for k in ("share", "of")} == {"share": 1 / 3, "of": 3}


def test_anchors(store) -> None:
    plan(store, "anchor", "anchor", "anchor", "anchor", "random")
    store.plan(5, Pair(Sample(10, 1.0), Sample(11, 0.5), "anchor"))  # the better one is second
    said = [["first"] * 2, ["first"] * 2, ["second", "first"], ["tie"] * 2, ["first"] * 2]
    answer(store, "ann", *said, ["second"] * 2, repeats=1.0)
    figures = figures_of(store)
    assert figures["annotators"]["ann"]["anchors_preferred"] == share(3, 4)
    assert "  preferred the known-good sample: 75% of 4 (" in describe_agreement(figures)


def test_two_annotators(store) -> None:
    plan(store, *["random"] * 6)
    # of four pairs that both answered three alike; by chance (2 * 3 + 2 * 1) / 16
    answer(store, "ann", "first", "first", "second", "second", "skip", "first")
    answer(store, "bob", "first", "first", "first", "second", "first", "skip")
    (between,) = figures_of(store)["between"]
    assert between == {"annotators": ["ann", "bob"], **share(3, 4), "kappa": pytest.approx(0.5)}


def test_agreement_is_by_pair_and_not_by_side(store) -> None:
    plan(store, *["random"] * 40)
    answer(store, "ann", *["first"] * 20, *["second"] * 20)
    answer(store, "bob", *["first"] * 20, *["second"] * 20)
    answer(store, "cy", *["left"] * 40)
    answer(store, "dee", *["left"] * 40)
    sides = {
        name: [c.first_is_left for c in store.choices() if c.annotator == name]
        for name in ("ann", "bob", "cy", "dee")
    }
    swapped = {
        other: sum(a != b for a, b in zip(sides[name], sides[other], strict=True))
        for name, other in (("ann", "bob"), ("cy", "dee"))
    }
    assert swapped["bob"] > 0
    assert 0 < swapped["dee"] < 40
    between = {tuple(two["annotators"]): two for two in figures_of(store)["between"]}
    assert len(between) == 6
    assert (between["ann", "bob"]["share"], between["ann", "bob"]["kappa"]) == (1.0, 1.0)
    assert between["cy", "dee"]["share"] == (40 - swapped["dee"]) / 40


def test_the_first_answer_to_a_repeated_pair_counts(store) -> None:
    plan(store, "random", "random")
    answer(store, "ann", ["first", "second"], ["second", "first"], repeats=1.0)
    answer(store, "bob", "first", "second")
    figures = figures_of(store)
    assert figures["between"][0]["share"] == 1.0
    assert figures["annotators"]["ann"]["itself"]["share"] == 0.0
    assert figures["annotators"]["ann"]["itself"]["kappa"] == -1.0
    assert figures["krippendorff_alpha"] == 1.0


def test_krippendorff_of_three_annotators(store) -> None:
    plan(store, *["random"] * 4)
    # fff, fs, sss and a lone s: n = 8, 4 of each; 1 - 7 * 2 / (64 - 32)
    answer(store, "ann", "first", "first", "second", "second")
    answer(store, "bob", "first", "second", "second", "skip")
    answer(store, "cy", "first", "skip", "second")
    figures = figures_of(store)
    assert figures["krippendorff_alpha"] == pytest.approx(0.5625)
    assert figures["krippendorff_pairs"] == 3
    assert [two["of"] for two in figures["between"]] == [3, 2, 2]


def test_krippendorff_of_one_same_answer_is_undefined(store) -> None:
    plan(store, "random")
    answer(store, "ann", "first")
    answer(store, "bob", "first")
    figures = figures_of(store)
    assert figures["krippendorff_alpha"] is None
    assert figures["between"][0]["share"] == 1.0
    assert figures["between"][0]["kappa"] is None
    lines = describe_agreement(figures).splitlines()
    assert lines[-1] == (
        "Krippendorff's alpha undefined over 1 pairs that two or more annotators judged"
    )
    assert lines[-2].startswith("ann and bob agree: 100% of 1 (95 % interval 21% to 100%)")
    assert "kappa" not in lines[-2]


def test_the_whole_text(store) -> None:
    plan(store, "random", "random", "random", "anchor")
    answer(store, "ann", ["left"] * 2, ["first"] * 2, ["skip: a hole"], ["first"] * 2, repeats=1.0)
    answer(store, "bob", "right", "first", "tie", "second")
    first = store.choices()[0].answer
    store.undo("bob", store.choices()[-1].id)
    figures = figures_of(store)
    left = {name: one["left"] for name, one in figures["annotators"].items()}
    assert (left["ann"]["of"], left["bob"]["of"]) == (6, 2)
    agreed = figures["between"][0]["share"] * 2
    bobs = next(c.answer for c in store.choices() if c.annotator == "bob")
    assert agreed == 1 + (first == bobs)
    lines = describe_agreement(figures).splitlines()
    assert lines[:2] == [
        "pairs: 1 anchor, 3 random",
        f"decided, for training: {figures['decided']}",
    ]
    assert figures["decided"] == 3  # ann's contradicted pair is none
    assert lines[2:5] == [
        "ann: 7 choices (2 anchor, 5 random), 6 decided, 0 ties, 1 skipped, 0 undone",
        "  skipped 1: a hole",
        "  median time of a choice: 4.0 s",
    ]
    assert lines[5].startswith(f"  chose the left side: {left['ann']['share']:.0%} of 6 (95 % int")
    assert lines[6].startswith("  preferred the known-good sample: 100% of 1 (95 % interval 21% ")
    assert lines[7].startswith("  agrees with itself: 67% of 3 (95 % interval 21% to 94%), Cohen's")
    assert lines[8] == "bob: 3 choices (3 random), 2 decided, 1 ties, 0 skipped, 1 undone"
    assert lines[9] == "  median time of a choice: 2.0 s"
    assert lines[11] == "  agrees with itself: no pairs to tell from"
    assert lines[12].startswith(f"ann and bob agree: {agreed / 2:.0%} of 2 (")
    assert lines[13].startswith("Krippendorff's alpha ")
    assert lines[13].endswith(" over 2 pairs that two or more annotators judged")
    assert len(lines) == 14
