import dataclasses

import pytest
from kernel_cases import PRESETS

import triplane_kernels as tk


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": ()}, "at least one plane"),
        ({"axes": ((0, 0),)}, r"two different of 0, 1, 2, got \(0, 0\)"),
        ({"axes": ((0, 3),)}, r"two different of 0, 1, 2, got \(0, 3\)"),
        ({"extent": 0.0}, "extent must be positive"),
        ({"extent": (1.0, -1.0, 1.0)}, "extent must be positive"),
        ({"extent": (1.0, 1.0)}, "extent must be a finite number or three"),
        ({"extent": float("nan")}, "extent must be a finite number"),
        ({"reduce": "max"}, "reduce must be one of"),
        ({"padding": "reflection"}, "padding must be one of"),
    ],
)
def test_refuses_what_is_no_layout(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tk.EG3D, **change)


def test_extent_of_one_number_is_a_cube() -> None:
    assert tk.TRIPOSR.extents == (1.74, 1.74, 1.74)
    assert dataclasses.replace(tk.EG3D, extent=[1, 2, 3]).extents == (1.0, 2.0, 3.0)


def test_layouts_are_values() -> None:
    same = tk.TriplaneLayout([[0, 1], [0, 2], [2, 0]], 1.0)
    assert same == tk.EG3D
    assert hash(same) == hash(tk.EG3D)


@pytest.mark.parametrize(
    ("reduce", "channels"),
    [("mean", 5), ("sum", 5), ("product", 5), ("concat", 15), ("concat_channel_major", 15)],
)
def test_feature_channels(reduce: str, channels: int) -> None:
    assert dataclasses.replace(tk.EG3D, reduce=reduce).feature_channels(5) == channels


def test_only_released_eg3d_lacks_a_plane() -> None:
    covered = {name: {frozenset(pair) for pair in layout.axes} for name, layout in PRESETS.items()}
    assert [name for name, pairs in covered.items() if len(pairs) < 3] == ["eg3d"]
