"""A field on a regular grid as tables (`frame`), and back: the kernels of csrc/cuda/tables.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Needs
from triplane_kernels.cuda import launch
from triplane_kernels.cuda.launch import NUMBERS, address, empty
from triplane_kernels.frame import (
    AxisTaps,
    FirstLayerGradients,
    Frame,
    Part,
    PlaneTaps,
    Tables,
    plane_weight,
)
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout

FARTHEST = 2**30 - 1  # offset of a pixel in its image that the kernels take


def tabulate(field: Field, grid: Grid, layout: TriplaneLayout, frame: Frame) -> Tables:
    """The tables of a field whose layout sums or concatenates; the bias is in one of them."""
    call = _Call(field, grid, layout, frame)
    bias = field.decoder.biases[0]
    assert bias is not None
    bias = bias.contiguous()
    made: dict[Part, Tensor] = {}
    for part, members in call.parts.items():
        made[part] = empty(bias, *frame.table_shape(part, call.batch, call.units))
        launch.extension.tabulate(
            table=call.tables[part],
            bias=address(bias) if _has_bias(members) else 0,
            out=address(made[part]),
            **call.queue,
        )
    return Tables(made["rows"], made["columns"], made.get("third"))


def gradients_of_first_layer(
    d_tables: Tables,
    field: Field,
    grid: Grid,
    layout: TriplaneLayout,
    frame: Frame,
    needs: Needs,
) -> FirstLayerGradients:
    """From the tables' gradients to those of the planes and of the first layer."""
    call = _Call(field, grid, layout, frame)
    planes = _PlaneGradients(call, field.planes) if needs.planes else None
    partials = _Partials(call) if needs.decoder else None
    for part, members in call.parts.items():
        if not members:
            continue
        d_table = getattr(d_tables, part).contiguous()
        d_features = [] if planes is None else call.features(part)
        addresses = [address(d) for d in d_features]
        launch.extension.table_backward(
            table=call.tables[part],
            d_table=address(d_table),
            d_features=addresses,
            **(NO_PARTIALS if partials is None else partials.of(part)),
            **call.queue,
        )
        if planes is not None:
            launch.extension.plane_gradients(
                table=call.tables[part],
                d_features=addresses,
                **planes.of(members),
                **call.queue,
            )
    return FirstLayerGradients(
        None if planes is None else planes.results(),
        None if partials is None else partials.weights.sum(dim=0),
        None if partials is None else partials.bias.sum(dim=0),
    )


# -------------------------------------------------------------------------------------- tables


class _Member(NamedTuple):
    """A plane of a table."""

    plane: int
    taps: PlaneTaps  # kept, because `rows` and `columns` are addresses
    rows: Any
    columns: Any

    def strides(self, plane: Tensor) -> tuple[int, int, int, int]:
        """Over samples, channels, and along the table's rows and columns."""
        of_batch, of_channels, *of_image = plane.stride()
        rows, columns = reversed(of_image) if self.taps.rows_are_width else of_image
        return of_batch, of_channels, rows, columns


@lru_cache(maxsize=64)  # a loop asks for the same grid at every step
def _parts(
    grid: Grid,
    layout: TriplaneLayout,
    frame: Frame,
    sizes: tuple[torch.Size, ...],
    device: torch.device,
) -> dict[Part, list[_Member]]:
    """The tables that there are, and their planes."""
    parts: dict[Part, list[_Member]] = {"rows": [], "columns": []}
    for number, (size, axes) in enumerate(zip(sizes, layout.axes, strict=True)):
        part = frame.part(axes)
        image = torch.empty(0, 0, *size, device=device)
        taps = frame.plane_taps(image, axes, grid, layout)
        members = parts.setdefault(part, [])
        members.append(_Member(number, taps, _described(taps.rows), _described(taps.columns)))
    most = max(len(members) for members in parts.values())
    if most > launch.extension.MAX_PLANES:
        raise ValueError(
            f"The CUDA kernels take at most {launch.extension.MAX_PLANES} planes over the same "
            f"two axes, got {most}."
        )
    return parts


def _described(taps: AxisTaps) -> Any:
    return launch.extension.Taps(
        index=address(taps.index),
        weight=address(taps.weight),
        reach=address(taps.reach),
        count=taps.count,
        size=taps.size,
    )


def _has_bias(members: Sequence[_Member]) -> bool:
    return bool(members) and members[0].plane == 0


class _Call:
    """The tables of a field as the extension takes them, and what keeps their memory alive."""

    def __init__(self, field: Field, grid: Grid, layout: TriplaneLayout, frame: Frame) -> None:
        weight = field.decoder.weights[0]
        self._weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._planes = _readable(field.planes)
        plane = self._planes[0]
        self.batch, self.channels = plane.shape[:2]
        self.units = weight.shape[0]
        self.concat = layout.reduce == "concat"
        self.queue = launch.queue(plane)
        self.dtype = plane.dtype
        sizes = tuple(plane.shape[2:] for plane in self._planes)
        self.parts = _parts(grid, layout, frame, sizes, plane.device)
        self._shapes = {
            part: frame.table_shape(part, self.batch, self.units) for part in self.parts
        }
        self.tables = {
            part: launch.extension.Table(
                batch=self.batch,
                channels=self.channels,
                units=self.units,
                rows=self._shapes[part][1],
                columns=frame.count(part),
                pitch=self._shapes[part][3],
                number=NUMBERS[self.dtype],
                planes=[self._plane(member, layout) for member in members],
            )
            for part, members in self.parts.items()
        }

    def _plane(self, member: _Member, layout: TriplaneLayout) -> Any:
        plane = self._planes[member.plane]
        weight = plane_weight(self._weight, member.plane, layout)
        return launch.extension.TablePlane(
            data=address(plane),
            strides=member.strides(plane),
            weight=address(weight),
            weight_stride=weight.stride(0),
            rows=member.rows,
            columns=member.columns,
        )

    def features(self, part: Part) -> list[Tensor]:
        """For every plane of a table room for the gradient by its lookups.

        Planes that are summed share it.
        """
        batch, n_rows, _, pitch = self._shapes[part]
        of_block = launch.extension.FEATURE_BLOCK
        shape = (batch, n_rows, -(-self.channels // of_block), pitch, of_block)
        count = len(self.parts[part])
        if self.concat:
            return [empty(self._planes[0], *shape) for _ in range(count)]
        return [empty(self._planes[0], *shape)] * count


def _readable(planes: Sequence[Tensor]) -> Sequence[Tensor]:
    """Planes of one dtype, in which the kernels can reach every pixel."""
    dtype = planes[0].dtype
    if any(plane.dtype != dtype for plane in planes):
        planes = [plane.float() for plane in planes]
    return [
        plane
        if (plane.shape[2] - 1) * plane.stride(2) + (plane.shape[3] - 1) * plane.stride(3)
        <= FARTHEST
        else plane.contiguous()
        for plane in planes
    ]


# ----------------------------------------------------------------------------------- gradients


class _PlaneGradients:
    """Room for the planes' gradients."""

    def __init__(self, call: _Call, planes: Sequence[Tensor]) -> None:
        self._dtypes = [plane.dtype for plane in planes]
        first = planes[0]
        if all(plane.shape == first.shape for plane in planes):
            # As parts of one tensor, which is what most callers' planes are.
            shape = (first.shape[0], len(planes), *first.shape[1:])
            self._results = torch.empty(shape, dtype=call.dtype, device=first.device).unbind(1)
        else:
            self._results = tuple(
                torch.empty(plane.shape, dtype=call.dtype, device=first.device) for plane in planes
            )

    def of(self, members: Sequence[_Member]) -> dict[str, Any]:
        """Of a table's planes, as the extension takes it."""
        return {
            "d_planes": [address(self._results[member.plane]) for member in members],
            "strides": [member.strides(self._results[member.plane]) for member in members],
        }

    def results(self) -> list[Tensor]:
        return [d.to(dtype) for d, dtype in zip(self._results, self._dtypes, strict=True)]


class _Partials:
    """Room for partial sums of the first layer's gradients; these are their sums.

    weights  [N, H, C']. Where planes are concatenated, each has its channels, and the tables write
             to the same partial sums; else every table has some of its own.
    bias     [N, H], by the table that has the bias.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        counts = {
            part: launch.extension.weight_partials(table)
            for part, table in call.tables.items()
            if call.parts[part]
        }
        if call.concat:
            counts = dict.fromkeys(counts, max(counts.values()))
        self._counts, self._first = counts, dict.fromkeys(counts, 0)
        if not call.concat:
            before = 0
            for part, count in counts.items():
                self._first[part] = before
                before += count
        total = max(self._first[part] + count for part, count in counts.items())
        width = call.channels * (sum(map(len, call.parts.values())) if call.concat else 1)
        like = call._weight
        self.weights = empty(like, total, call.units, width)
        biased = next(part for part, members in call.parts.items() if _has_bias(members))
        self.bias = empty(like, counts[biased], call.units)

    def of(self, part: Part) -> dict[str, Any]:
        """A table's, as the extension takes it."""
        members = self._call.parts[part]
        weights = self.weights[self._first[part] :]
        columns = [
            member.plane * self._call.channels if self._call.concat else 0 for member in members
        ]
        return {
            "partials": self._counts[part],
            "d_weights": [address(weights[..., column:]) for column in columns],
            "partial_stride": weights.stride(0),
            "unit_stride": weights.stride(1),
            "d_bias": address(self.bias) if _has_bias(members) else 0,
        }


NO_PARTIALS = {"partials": 0, "d_weights": [], "partial_stride": 0, "unit_stride": 0, "d_bias": 0}
