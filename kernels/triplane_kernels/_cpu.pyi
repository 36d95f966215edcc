"""The C++ extension (csrc/cpu/bindings.cpp). Arrays are addresses of contiguous float32."""

from collections.abc import Sequence
from typing import Literal

def isa() -> str: ...
def runnable_isas() -> list[str]: ...
def measured_clock() -> float: ...
def use_isa(isa: str) -> None: ...

class Taps:
    def __init__(self, *, low: int, high: int, weight_low: int, weight_high: int) -> None: ...

class Decoder:
    def __init__(
        self,
        *,
        widths: Sequence[int],
        weights: Sequence[int],
        biases: Sequence[int],
        hidden: str,
        output: str,
        weight_gradients: Sequence[int],
        bias_gradients: Sequence[int],
    ) -> None: ...

class GridPlane:
    def __init__(
        self,
        *,
        data: int,
        gradient: int,
        batch_stride: int,
        gradient_stride: int,
        height: int,
        width: int,
        across: Taps,
        down: Taps,
        table: int,
        channel: int,
        width_is_slow: bool,
    ) -> None: ...

class GridField:
    def __init__(
        self,
        *,
        batch: int,
        channels: int,
        shape: Sequence[int],
        planes: Sequence[GridPlane],
        table_channels: Sequence[int],
        table_weight: Sequence[int],
        table_weight_gradient: Sequence[int],
        decoder: Decoder,
    ) -> None: ...

class PointPlane:
    def __init__(
        self,
        *,
        data: int,
        gradient: int,
        batch_stride: int,
        gradient_stride: int,
        height: int,
        width: int,
        axis_across: int,
        axis_down: int,
        extent_across: float,
        extent_down: float,
    ) -> None: ...

class PointField:
    def __init__(
        self,
        *,
        batch: int,
        channels: int,
        planes: Sequence[PointPlane],
        combine: str,
        border: bool,
        align_corners: bool,
        count: int,
        points: int,
        points_stride: int,
        points_gradient: int,
        decoder: Decoder,
    ) -> None: ...

def density_grid(field: GridField, sigma: int, threads: int) -> None: ...
def density_grid_backward(field: GridField, d_sigma: int, sigma: int, threads: int) -> None: ...
def density_grid_loss(
    field: GridField,
    target: GridField | None,
    volume: int,
    kind: Literal["l1", "l2"],
    loss: int,
    threads: int,
) -> None: ...
def density_grid_loss_backward(
    field: GridField,
    target: GridField | None,
    volume: int,
    kind: Literal["l1", "l2"],
    d_loss: int,
    d_volume: int,
    threads: int,
) -> None: ...
def points(field: PointField, sigma: int, features: int, threads: int) -> None: ...
def points_backward(
    field: PointField, d_sigma: int, sigma: int, d_features: int, threads: int
) -> None: ...
