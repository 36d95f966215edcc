"""The choice of tiles: without a GPU its code, in Triton's interpreter and with invented times."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triplane_kernels.triton import tune as tuning
from triplane_kernels.triton.tiles import TILES, PointTile, Tile, device_family
from triplane_kernels.triton.tune import CANDIDATES, Choice, Size, choices, tune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Size(grid=5, points=20, channels=2, resolution=4, hidden=3)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> str:
    """The family whose tiles the kernels take, with a copy of its table for this test."""
    name = device_family(DEVICE)
    monkeypatch.setitem(TILES, name, dict(TILES[name]))
    return name


def choose(family: str, kernel: str, tile: Tile | PointTile, *times: float) -> Choice:
    """With the times that the default and the tile take, as far as they are measured."""
    left = list(times)

    def timer(run: Callable[[], Any]) -> float:
        run()
        return left.pop(0)

    (choice,) = choices(DEVICE, family, {kernel: [tile]}, SMALL, timer)
    assert not left
    return choice


@pytest.mark.parametrize("kernel", CANDIDATES)
def test_a_faster_tile_is_installed(kernel: str, family: str) -> None:
    grid = kernel.endswith((" two", " three"))
    tile = Tile(32, 4, 1) if grid else PointTile(16, 16, 2)
    default = TILES[family][kernel]
    choice = choose(family, kernel, tile, 2.0, 1.0)
    assert [trial.tile for trial in choice.trials] == [default, tile]
    assert not any(trial.error for trial in choice.trials)
    assert choice.best == TILES[family][kernel] == tile
    assert choice.gain == 2


def test_a_default_is_not_given_up_for_nothing(family: str) -> None:
    default = TILES[family]["forward two"]
    choice = choose(family, "forward two", Tile(32, 4, 1), 1.0, 0.99)
    assert choice.best == TILES[family]["forward two"] == default


def test_a_tile_with_another_result_is_not_taken(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "MAX_DIFFERENCE", -1.0)
    choice = choose(family, "forward two", Tile(32, 4, 1), 1.0)
    assert "differs" in choice.trials[1].error
    assert choice.best == choice.trials[0].tile


def test_a_tile_that_does_not_run_is_not_taken(family: str) -> None:
    choice = choose(family, "forward two", Tile(24, 12, 1), 1.0)  # no power of two
    assert choice.trials[1].ms is None
    assert choice.trials[1].error
    assert choice.best == choice.trials[0].tile


def test_no_time_no_choice(family: str) -> None:
    assert not list(choices(DEVICE, family, size=SMALL, timer=lambda run: 1.0, seconds=0))


def test_candidates_are_of_their_kernel_s_kind() -> None:
    for kernel, tiles in CANDIDATES.items():
        for family in TILES.values():
            assert {type(family[kernel])} == {type(tile) for tile in tiles}
    json.dumps(CANDIDATES)


def test_without_a_gpu_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="GPU"):
        tune()
