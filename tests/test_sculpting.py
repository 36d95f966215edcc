"""The whole loop against a simulated annotator: SculptBench, in short.

Bounds are far below what the full benchmark reaches (bench/results/sculpt.jsonl): they say that
each part does its work, not how well it can.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import sculpt

JUDGED = range(sculpt.FIRST_JUDGED, sculpt.FIRST_JUDGED + 32)


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """120 preferences for heads near to their clean twins, one in ten wrong."""
    heads = sculpt.Heads("heads", tmp_path_factory.mktemp("sculpt"))
    cell = sculpt.Cell(
        rule="clean",
        pairs=120,
        reward={"epochs": 10, "inversion_slabs": 600},
        finetune={"steps": 25, "consistency_resolution": 32, "appearance_resolution": 24},
    )
    return sculpt.run_cell(cell, heads, sculpt.Start.of(heads, JUDGED), JUDGED)


def test_the_reward_ranks_unseen_pairs(row):
    assert row["unseen_pair_accuracy"] > 0.70  # 0.5 by chance


def test_the_geometry_gets_better_by_the_annotators_own_rule(row):
    assert row["better"] > 0.70
    assert row["distance_after_mm"] < 0.9 * row["distance_before_mm"]


def test_the_appearance_stays(row):
    assert row["front_psnr_db"] > 26  # two different heads have about 15
    assert row["front_ssim"] > 0.9
    assert row["frechet_after"] < 3 * row["frechet_before"]


def test_the_table_and_the_figure(row, tmp_path):
    table = sculpt.table_of([row])
    assert table.count("\n") == 2
    assert f"{row['better']:.1%}" in table
    sculpt.figure_of([{**row, "changes": {}}], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
