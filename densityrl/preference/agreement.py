"""What a store of choices says of its annotators: how many, how fast, how consistent."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from densityrl.preference.store import Choice, PreferenceStore
from densityrl.statistics import cohen_kappa, krippendorff_alpha, wilson_interval


def agreement(store: PreferenceStore) -> dict[str, Any]:
    """The figures of `densityrl preferences stats`, as JSON values; null for what is undefined.

    Agreement is over the answers first, second and tie, by pair and not by side; a skipped pair
    has none, and of a repeated pair the first answer counts. "itself" compares an annotator's two
    answers to the same pair.
    """
    choices = store.choices()
    undone = Counter(c.annotator for c in store.choices(undone=True) if c.undone is not None)
    rated = _first_answers(choices)
    names = store.annotators()
    pairs = Counter(pair.source for pair in store.pairs())
    units = _by_pair(rated).values()
    return {
        "pairs": dict(sorted(pairs.items())),
        "decided": len(store.decisions()),
        "annotators": {
            name: _one(name, [c for c in choices if c.annotator == name], undone[name])
            for name in names
        },
        "between": [_two(a, b, rated) for a, b in itertools.combinations(names, 2)],
        "krippendorff_alpha": _finite(krippendorff_alpha([list(u.values()) for u in units])),
        "krippendorff_pairs": sum(len(unit) > 1 for unit in units),
    }


def _first_answers(choices: Sequence[Choice]) -> dict[tuple[str, int], str]:
    answers: dict[tuple[str, int], str] = {}
    for choice in choices:
        if choice.answer != "skip" and not choice.repeated:
            answers[choice.annotator, choice.pair_id] = choice.answer
    return answers


def _by_pair(rated: dict[tuple[str, int], str]) -> dict[int, dict[str, str]]:
    units: dict[int, dict[str, str]] = {}
    for (name, pair), answer in rated.items():
        units.setdefault(pair, {})[name] = answer
    return units


def _one(name: str, choices: list[Choice], undone: int) -> dict[str, Any]:
    decided = [c for c in choices if c.answer in ("first", "second")]
    shown = [c for c in decided if c.first_is_left is not None]
    left = sum((c.answer == "first") == c.first_is_left for c in shown)
    anchors = [c for c in decided if c.pair.source == "anchor" and not c.repeated]
    passed = sum((c.answer == "first") == (c.pair.first.psi < c.pair.second.psi) for c in anchors)
    first = _first_answers(choices)
    again = {c.pair_id: c.answer for c in choices if c.repeated and c.answer != "skip"}
    twice = [(first[name, pair], answer) for pair, answer in again.items() if (name, pair) in first]
    seconds = [c.seconds for c in choices if c.seconds is not None]
    skips = Counter(c.reason or "no reason given" for c in choices if c.answer == "skip")
    return {
        "choices": len(choices),
        "decided": len(decided),
        "ties": sum(c.answer == "tie" for c in choices),
        "skips": sum(skips.values()),
        "skip_reasons": dict(skips.most_common()),
        "undone": undone,
        "sources": dict(sorted(Counter(c.pair.source for c in choices).items())),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "left": _share(left, len(shown)),
        "anchors_preferred": _share(passed, len(anchors)),
        "itself": {
            **_share(sum(a == b for a, b in twice), len(twice)),
            "kappa": _finite(cohen_kappa(*_columns(twice))),
        },
    }


def _two(a: str, b: str, rated: dict[tuple[str, int], str]) -> dict[str, Any]:
    both = [
        (answer, rated[b, pair])
        for (name, pair), answer in rated.items()
        if name == a and (b, pair) in rated
    ]
    return {
        "annotators": [a, b],
        **_share(sum(x == y for x, y in both), len(both)),
        "kappa": _finite(cohen_kappa(*_columns(both))),
    }


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _share(part: int, of: int) -> dict[str, Any]:
    return {"share": part / of if of else None, "interval": wilson_interval(part, of), "of": of}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def describe_agreement(figures: dict[str, Any]) -> str:
    """The same as several lines of plain text."""
    sources = ", ".join(f"{count} {source}" for source, count in figures["pairs"].items())
    lines = [f"pairs: {sources or 'none'}", f"decided, for training: {figures['decided']}"]
    for name, one in figures["annotators"].items():
        of_sources = ", ".join(f"{count} {source}" for source, count in one["sources"].items())
        lines += [
            f"{name}: {one['choices']} choices ({of_sources or 'none yet'}), {one['decided']} "
            f"decided, {one['ties']} ties, {one['skips']} skipped, {one['undone']} undone",
        ]
        for reason, count in one["skip_reasons"].items():
            lines.append(f"  skipped {count}: {reason}")
        if one["median_seconds"] is not None:
            lines.append(f"  median time of a choice: {one['median_seconds']:.1f} s")
        lines.append(f"  chose the left side: {_percent(one['left'])}")
        if one["anchors_preferred"]["of"]:
            lines.append(f"  preferred the known-good sample: {_percent(one['anchors_preferred'])}")
        itself = one["itself"]
        lines.append(f"  agrees with itself: {_percent(itself)}{_kappa(itself['kappa'])}")
    for two in figures["between"]:
        a, b = two["annotators"]
        lines.append(f"{a} and {b} agree: {_percent(two)}{_kappa(two['kappa'])}")
    if figures["krippendorff_pairs"]:
        alpha = figures["krippendorff_alpha"]
        lines.append(
            f"Krippendorff's alpha {'undefined' if alpha is None else f'{alpha:.3f}'} over "
            f"{figures['krippendorff_pairs']} pairs that two or more annotators judged"
        )
    return "\n".join(lines)


def _percent(part: dict[str, Any]) -> str:
    if part["share"] is None:
        return "no pairs to tell from"
    low, high = part["interval"]
    return f"{part['share']:.0%} of {part['of']} (95 % interval {low:.0%} to {high:.0%})"


def _kappa(kappa: float | None) -> str:
    return "" if kappa is None else f", Cohen's kappa {kappa:.2f}"
