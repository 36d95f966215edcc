"""Time the candidate tiles of the Triton kernels on this machine's GPU, and print the best.

`python bench/tune.py --json FILE` also writes them to a file; what is worth keeping goes into
`TILES` of `triplane_kernels.triton.tiles`, the defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triplane_kernels.triton.tiles import PointTile, Tile
from triplane_kernels.triton.tune import Choice, tune


def main() -> int:
    """Times the candidate tiles of the Triton kernels on a GPU, and prints the best of each."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument(
        "--seconds", type=float, default=35.0, help="start no new candidate later than this (35)"
    )
    options = parser.parse_args()
    try:
        found = tune(options.seconds if options.seconds > 0 else math.inf)
    except RuntimeError as error:
        print(f"tune.py: {error}", file=sys.stderr)
        return 1
    for choice in found:
        print_choice(choice)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record(found), indent=1) + "\n", encoding="utf-8")
    return 0


def print_choice(choice: Choice) -> None:
    """The best tile of a kernel, and under it what was tried, the default first."""
    print(f"{choice.family} {choice.kernel}: {choice.best}, {choice.gain:.2f}x the default")
    for trial in choice.trials:
        result = trial.error if trial.ms is None else f"{trial.ms:.4f} ms"
        print(f"    {trial.tile}: {result}")


def record(found: list[Choice]) -> dict[str, Any]:
    """As JSON has it, with what it was measured on."""
    from harness import Provenance

    return {
        "provenance": asdict(Provenance.of("cuda", os.environ.get("COMMIT"))),
        "sizes": "256^3 voxels, 2^20 points, 32 x 256 x 256 planes, 64 hidden units, float32",
        "kernels": [
            {
                "family": choice.family,
                "kernel": choice.kernel,
                "best": tile_record(choice.best),
                "gain": choice.gain,
                "trials": [
                    {**tile_record(trial.tile), "ms": trial.ms, "error": trial.error}
                    for trial in choice.trials
                ],
            }
            for choice in found
        ],
    }


def tile_record(tile: Tile | PointTile) -> dict[str, int]:
    """A tile by the names of its numbers."""
    return tile._asdict()


if __name__ == "__main__":
    sys.exit(main())
