"""Density on a regular grid for the decoders and layouts that have no kernel of their own.

One layer, more than two, or a product of the lookups. Resampling, and the first layer where it is
linear in the lookups, are done on tables by the kernels; the rest in PyTorch on a bounded number
of slices at a time. Its matrix products are the vendor's, and PyTorch's setting of their precision
holds: exact float32 by default.
"""

from __future__ import annotations

from functools import reduce
from operator import add, mul

import torch
import torch.nn.functional as F
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.decoder import Output
from triplane_kernels.frame import Frame, Part, Tables
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.reference import activate, activation_slope, apply_output, autocast_off
from triplane_kernels.triton.separable import gradients_of_first_layer, tabulate
from triplane_kernels.triton.tables import feature_table, plane_gradient

ELEMENTS = 2**25  # of all activations of the slices that are processed at once: 128 MiB


class DeepField:
    """A `GridField`."""

    def __init__(
        self, field: Field, grid: Grid, layout: TriplaneLayout, needs: Needs | None = None
    ) -> None:
        self.frame = Frame.of(grid, layout)
        self._field, self._grid, self._layout, self._needs = field, grid, layout, needs
        self._product = layout.reduce == "product"
        self._tables: list[tuple[Part, Tensor]]
        if self._product:
            taps = [
                self.frame.plane_taps(plane, axes, grid, layout)
                for plane, axes in zip(field.planes, layout.axes, strict=True)
            ]
            self._tables = [
                (self.frame.part(axes), feature_table(plane, plane_taps))
                for plane, plane_taps, axes in zip(field.planes, taps, layout.axes, strict=True)
            ]
        else:
            tables = tabulate(field, grid, layout, self.frame)
            self._tables = [("rows", tables.rows), ("columns", tables.columns)]
            if tables.third is not None:
                self._tables.append(("third", tables.third))
        if needs is not None:
            self._d_tables = [torch.zeros_like(table) for _, table in self._tables]
            self._d_weights = [torch.zeros_like(weight) for weight in field.decoder.weights]
            self._d_biases = [torch.zeros_like(weight[:, 0]) for weight in field.decoder.weights]

    def slices_at_once(self) -> int:
        decoder = self._field.decoder
        width = decoder.in_channels + sum(weight.shape[0] for weight in decoder.weights)
        batch, (_, n_rows, n_columns) = self._field.planes[0].shape[0], self.frame.shape
        return max(1, ELEMENTS // (batch * n_rows * n_columns * width))

    def sigma(self, out: Tensor, first: int) -> None:
        step = self.slices_at_once()
        with autocast_off(out.device):
            for start in range(0, out.shape[1], step):
                part = out[:, start : start + step]
                raw = self._forward(part.shape[1], first + start)[-1][..., 0]
                part.copy_(apply_output(self._field.decoder.output, raw))

    def add_gradient(self, d_sigma: Tensor, sigma: Tensor | None, first: int) -> None:
        step = self.slices_at_once()
        with autocast_off(d_sigma.device):
            for start in range(0, d_sigma.shape[1], step):
                d_raw = d_sigma[:, start : start + step]
                if sigma is not None:
                    part = sigma[:, start : start + step]
                    d_raw = times_output_slope(d_raw, part, self._field.decoder.output)
                self._backward(d_raw, first + start)

    def gradients(self) -> Gradients:
        assert self._needs is not None
        decoder = self._needs.decoder
        if self._product:
            d_planes = [
                plane_gradient(
                    d_table,
                    plane,
                    self.frame.plane_taps(plane, axes, self._grid, self._layout),
                    None,
                )
                for d_table, plane, axes in zip(
                    self._d_tables, self._field.planes, self._layout.axes, strict=True
                )
                if self._needs.planes
            ]
            return Gradients(
                planes=d_planes if self._needs.planes else None,
                weights=self._d_weights if decoder else None,
                biases=self._d_biases if decoder else None,
            )
        d_rows, d_columns, *d_third = self._d_tables
        d_tables = Tables(d_rows, d_columns, d_third[0] if d_third else None)
        first = gradients_of_first_layer(
            d_tables, self._field, self._grid, self._layout, self.frame, self._needs
        )
        return first.followed_by(self._d_weights[1:], self._d_biases[1:])

    def _forward(self, count: int, first: int) -> list[Tensor]:
        """What goes into every layer's activation, [B, count, R, C, width], and the output.

        For the product of lookups, that and what the first layer makes of it come first.
        """
        terms = [self._term(part, table, count, first) for part, table in self._tables]
        batch = terms[0].shape[0]
        value = reduce(mul if self._product else add, terms)
        value = value.expand(batch, count, *self.frame.shape[1:], -1).contiguous()
        values = [value]
        decoder = self._field.decoder
        for number, (weight, bias) in enumerate(zip(decoder.weights, decoder.biases, strict=True)):
            if number > 0:
                value = F.linear(activate(decoder.hidden, value), weight, bias)
            elif self._product:
                value = F.linear(value, weight, bias)
            else:
                continue
            values.append(value)
        return values

    def _backward(self, d_raw: Tensor, first: int) -> None:
        count = d_raw.shape[1]
        decoder = self._field.decoder
        values = self._forward(count, first)[:-1]
        d_value = d_raw.unsqueeze(-1)
        for number in range(len(decoder.weights) - 1, 0, -1):
            value = values.pop()
            self._add_layer(number, d_value, activate(decoder.hidden, value))
            d_value = d_value @ decoder.weights[number]
            d_value = d_value * activation_slope(decoder.hidden, value)
        if not self._product:
            for (part, _), d_table in zip(self._tables, self._d_tables, strict=True):
                self._add_term(d_table, part, d_value, first)
            return
        self._add_layer(0, d_value, values.pop())
        d_value = d_value @ decoder.weights[0]
        terms = [self._term(part, table, count, first) for part, table in self._tables]
        for number, ((part, _), d_table) in enumerate(
            zip(self._tables, self._d_tables, strict=True)
        ):
            others = [term for other, term in enumerate(terms) if other != number]
            self._add_term(d_table, part, reduce(mul, others, d_value), first)

    def _add_layer(self, number: int, d_out: Tensor, value: Tensor) -> None:
        """Take in the gradient of one layer's parameters, given those by its output."""
        d_out = d_out.flatten(0, -2)
        self._d_weights[number] += d_out.mT @ value.flatten(0, -2)
        self._d_biases[number] += d_out.sum(dim=0)

    def _term(self, part: Part, table: Tensor, count: int, first: int) -> Tensor:
        """A table's part for some slices as [B, slices, R, C, K], 1 where it has no say."""
        table = table[..., : self.frame.count(part)]
        if part == "third":
            return table.mT.unsqueeze(1)
        return table[:, first : first + count].mT.unsqueeze(3 if part == "rows" else 2)

    def _add_term(self, d_table: Tensor, part: Part, d_value: Tensor, first: int) -> None:
        """The adjoint of `_term`, added to a table's gradient."""
        d_table = d_table[..., : self.frame.count(part)]
        if part == "third":
            d_table += d_value.sum(dim=1).mT
        else:
            d_part = d_value.sum(dim=3 if part == "rows" else 2).mT
            d_table[:, first : first + d_value.shape[1]] += d_part


def times_output_slope(d_sigma: Tensor, sigma: Tensor, output: Output) -> Tensor:
    """The gradient by the raw density; the slope of the output follows from what it gave."""
    if output == "softplus":
        return d_sigma * -torch.expm1(-sigma)
    return d_sigma * sigma if output == "exp" else d_sigma
