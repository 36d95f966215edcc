"""The C++ kernels for the CPU (csrc/cpu), behind the functions of `backend.Backend`.

Multi-threaded by torch.get_num_threads(), on whose number results do not depend; vectorised for
AVX-512, AVX2, SSE2 or NEON, whichever is best of what the processor has (the environment variable
DENSITYRL_ISA names another). Every result repeats to the bit on the same instruction set.

`density_grid` is fastest for decoders of one hidden softplus layer (EG3D); other activations and
deeper decoders are computed voxel block by voxel block after the tables, and product reductions
are left to the reference.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triplane_kernels.backend import Field, Gradients, Needs
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout
from triplane_kernels.reference import Taps

try:
    import triplane_kernels._cpu as _cpu
except ImportError as error:
    _missing = f"the C++ extension is not there ({error}); reinstall with a C++17 compiler"
else:
    _missing = ""
    if os.environ.get("DENSITYRL_ISA"):
        _cpu.use_isa(os.environ["DENSITYRL_ISA"])

WORK_PER_THREAD = 2**16  # products or activations; starting a thread costs about as much


def why_not(device: torch.device) -> str:
    """Why these kernels cannot run on a device; empty if they can."""
    if device.type != "cpu":
        return "it computes on the CPU only"
    return _missing


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "sse2" or "neon"."""
    return _cpu.isa()


# ------------------------------------------------------------------------------------- points


def sample_features(planes: Sequence[Tensor], points: Tensor, layout: TriplaneLayout) -> Tensor:
    call = _Points(planes, None, points, layout, Needs(False, False, False))
    channels = layout.feature_channels(planes[0].shape[1])
    features = _empty(call.batch, points.shape[1], channels)
    _cpu.points(call.field, 0, features.data_ptr(), call.threads)
    return features


def sample_features_backward(
    d_features: Tensor,
    planes: Sequence[Tensor],
    points: Tensor,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    call = _Points(planes, None, points, layout, needs)
    d_features = d_features.contiguous()
    _cpu.points_backward(call.field, 0, 0, d_features.data_ptr(), call.threads)
    return call.gradients()


def radiance(field: Field, points: Tensor, layout: TriplaneLayout) -> tuple[Tensor, Tensor]:
    call = _Points(field.planes, field.decoder, points, layout, Needs(False, False, False))
    sigma = _empty(call.batch, points.shape[1])
    features = _empty(call.batch, points.shape[1], field.decoder.out_channels - 1)
    _cpu.points(call.field, sigma.data_ptr(), features.data_ptr(), call.threads)
    return sigma, features


def radiance_backward(
    d_sigma: Tensor,
    d_features: Tensor,
    sigma: Tensor,
    field: Field,
    points: Tensor,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    call = _Points(field.planes, field.decoder, points, layout, needs)
    d_sigma, sigma, d_features = (t.contiguous() for t in (d_sigma, sigma, d_features))
    _cpu.points_backward(
        call.field, d_sigma.data_ptr(), sigma.data_ptr(), d_features.data_ptr(), call.threads
    )
    return call.gradients()


class _Points:
    """Arguments of a call as the extension takes them, and what keeps their memory alive."""

    def __init__(
        self,
        planes: Sequence[Tensor],
        decoder: DensityMLP | None,
        points: Tensor,
        layout: TriplaneLayout,
        needs: Needs,
    ) -> None:
        self.batch = planes[0].shape[0]
        self._points = points.contiguous()
        self._shared = points.shape[0] == 1
        self._d_points = _empty(self.batch, *points.shape[1:]) if needs.points else _empty(0)
        self._images = _Images(planes, needs.planes)
        self._decoder = _Decoder(decoder, needs.decoder)
        self._needs = needs
        widest = max((weight.numel() for weight in self._decoder.weights), default=64)
        self.threads = _threads(self.batch * points.shape[1] * widest)
        self.field = _cpu.PointField(
            batch=self.batch,
            channels=planes[0].shape[1],
            planes=[
                _cpu.PointPlane(
                    **image,
                    axis_across=axes[0],
                    axis_down=axes[1],
                    extent_across=layout.extents[axes[0]],
                    extent_down=layout.extents[axes[1]],
                )
                for image, axes in zip(self._images.described, layout.axes, strict=True)
            ],
            combine=layout.reduce,
            border=layout.padding == "border",
            align_corners=layout.align_corners,
            count=points.shape[1],
            points=self._points.data_ptr(),
            points_stride=0 if self._shared else 3 * points.shape[1],
            points_gradient=self._d_points.data_ptr() if needs.points else 0,
            decoder=self._decoder.handle,
        )

    def gradients(self) -> Gradients:
        points = None
        if self._needs.points:
            points = self._d_points.sum(dim=0, keepdim=True) if self._shared else self._d_points
        weights, biases = self._decoder.gradients()
        return Gradients(self._images.gradients(), weights, biases, points)


# -------------------------------------------------------------------------------------- grids


def why_not_grid(layout: TriplaneLayout) -> str:
    """Why grids of a layout cannot be computed; empty if they can."""
    return "product reductions have no C++ grid kernel" if layout.reduce == "product" else ""


def density_grid(field: Field, grid: Grid, layout: TriplaneLayout) -> Tensor:
    call = _GridField(field, grid, layout, Needs(False, False))
    sigma = _empty(call.batch, *grid.shape)
    _cpu.density_grid(call.field, sigma.data_ptr(), call.threads)
    return sigma


def density_grid_backward(
    d_sigma: Tensor,
    sigma: Tensor,
    field: Field,
    grid: Grid,
    layout: TriplaneLayout,
    needs: Needs,
) -> Gradients:
    call = _GridField(field, grid, layout, needs)
    d_sigma, sigma = d_sigma.contiguous(), sigma.contiguous()
    _cpu.density_grid_backward(call.field, d_sigma.data_ptr(), sigma.data_ptr(), call.threads)
    return call.gradients()


def density_grid_loss(
    field: Field,
    target: Tensor | Field,
    grid: Grid,
    layout: TriplaneLayout,
    kind: Literal["l1", "l2"],
) -> Tensor:
    nothing = Needs(False, False)
    call = _GridField(field, grid, layout, nothing)
    other = _GridField(target, grid, layout, nothing) if isinstance(target, Field) else None
    volume = _empty(0) if isinstance(target, Field) else target.contiguous()
    loss = _empty(call.batch)
    _cpu.density_grid_loss(
        call.field,
        None if other is None else other.field,
        volume.data_ptr(),
        kind,
        loss.data_ptr(),
        call.threads,
    )
    return loss


def density_grid_loss_backward(
    d_loss: Tensor,
    field: Field,
    target: Tensor | Field,
    grid: Grid,
    layout: TriplaneLayout,
    kind: Literal["l1", "l2"],
    needs: Needs,
    target_needs: Needs,
) -> tuple[Gradients, Gradients | Tensor | None]:
    call = _GridField(field, grid, layout, needs)
    other = _GridField(target, grid, layout, target_needs) if isinstance(target, Field) else None
    volume = _empty(0) if isinstance(target, Field) else target.contiguous()
    d_volume = torch.empty_like(volume) if other is None and target_needs.planes else None
    d_loss = d_loss.contiguous()
    _cpu.density_grid_loss_backward(
        call.field,
        None if other is None else other.field,
        volume.data_ptr(),
        kind,
        d_loss.data_ptr(),
        0 if d_volume is None else d_volume.data_ptr(),
        call.threads,
    )
    return call.gradients(), other.gradients() if other is not None else d_volume


class _Table(NamedTuple):
    """The planes that share a table, and their columns of the decoder's first layer."""

    planes: list[int]
    columns: Tensor


class _GridField:
    """A field on a grid as the extension takes it, and what keeps its memory alive."""

    def __init__(self, field: Field, grid: Grid, layout: TriplaneLayout, needs: Needs) -> None:
        planes, decoder = field
        self.batch, channels = planes[0].shape[:2]
        self._layout = layout
        self._images = _Images(planes, needs.planes)
        self._decoder = _Decoder(decoder, needs.decoder)
        first = self._decoder.weights[0]
        concat = layout.reduce == "concat"
        self._tables: list[_Table] = []
        for table in range(3):
            members = [p for p, axes in enumerate(layout.axes) if sum(axes) - 1 == table]
            parts = [first.chunk(len(layout.axes), dim=1)[p] for p in members] if concat else []
            columns = torch.cat(parts, dim=1) if parts else first[:, : channels * bool(members)]
            self._tables.append(_Table(members, columns.contiguous()))
        self._d_columns = [
            torch.empty_like(table.columns) if needs.decoder else _empty(0)
            for table in self._tables
        ]
        self._taps: list[Tensor] = []
        self.threads = _threads(self.batch * grid.numel * decoder.weights[0].shape[0])
        self.field = _cpu.GridField(
            batch=self.batch,
            channels=channels,
            shape=grid.shape,
            planes=[
                _cpu.GridPlane(
                    **image,
                    across=self._tap(grid, axes[0], image["width"]),
                    down=self._tap(grid, axes[1], image["height"]),
                    table=sum(axes) - 1,
                    channel=self._tables[sum(axes) - 1].planes.index(p) * channels * concat,
                    width_is_slow=axes[0] < axes[1],
                )
                for p, (image, axes) in enumerate(
                    zip(self._images.described, layout.axes, strict=True)
                )
            ],
            table_channels=[table.columns.shape[1] for table in self._tables],
            table_weight=[table.columns.data_ptr() for table in self._tables],
            table_weight_gradient=[d.data_ptr() if needs.decoder else 0 for d in self._d_columns],
            decoder=self._decoder.handle,
        )

    def _tap(self, grid: Grid, axis: int, size: int) -> _cpu.Taps:
        tensors = _taps(grid, axis, size, self._layout)
        self._taps += tensors
        low, high, weight_low, weight_high = (tensor.data_ptr() for tensor in tensors)
        return _cpu.Taps(low=low, high=high, weight_low=weight_low, weight_high=weight_high)

    def gradients(self) -> Gradients:
        weights, biases = self._decoder.gradients()
        if weights is not None:
            present = [
                (table.planes, d)
                for table, d in zip(self._tables, self._d_columns, strict=True)
                if table.planes
            ]
            if self._layout.reduce == "concat":
                parts = {
                    p: part
                    for members, d in present
                    for p, part in zip(members, d.chunk(len(members), dim=1), strict=True)
                }
                weights[0] = torch.cat([parts[p] for p in sorted(parts)], dim=1)
            else:
                weights[0] = torch.stack([d for _, d in present]).sum(dim=0)
        return Gradients(self._images.gradients(), weights, biases)


@lru_cache(maxsize=64)  # a loop asks for the same grid at every step
def _taps(grid: Grid, axis: int, size: int, layout: TriplaneLayout) -> tuple[Tensor, ...]:
    """Where a grid's coordinates lie on an image axis: pixels low, high; weights low, high."""
    coordinates = grid.coordinates(axis, torch.float64, "cpu")
    taps = Taps.at(coordinates, layout.extents[axis], size, layout)
    return (*(i.to(torch.int32) for i in taps.index), *(w.to(torch.float32) for w in taps.weight))


# ------------------------------------------------------------------------------------- shared


class _Images:
    """Planes as float32 images, contiguous sample by sample, and room for their gradients."""

    def __init__(self, planes: Sequence[Tensor], needs_gradient: bool) -> None:
        self._dtypes = [plane.dtype for plane in planes]
        self._planes = [_contiguous_images(plane.float()) for plane in planes]
        self._gradients: list[Tensor] | None = None
        if needs_gradient:
            first, count = planes[0], len(planes)
            if all(plane.shape == first.shape for plane in planes):
                # As parts of one tensor, which is what most callers' planes are.
                together = _empty(first.shape[0], count, *first.shape[1:])
                self._gradients = list(together.unbind(1))
            else:
                self._gradients = [_empty(*plane.shape) for plane in planes]

        self.described: list[dict[str, int]] = [
            {
                "data": plane.data_ptr(),
                "batch_stride": plane.stride(0),
                "gradient": self._gradients[p].data_ptr() if self._gradients else 0,
                "gradient_stride": self._gradients[p].stride(0) if self._gradients else 0,
                "height": plane.shape[2],
                "width": plane.shape[3],
            }
            for p, plane in enumerate(self._planes)
        ]

    def gradients(self) -> list[Tensor] | None:
        if self._gradients is None:
            return None
        return [d.to(dtype) for d, dtype in zip(self._gradients, self._dtypes, strict=True)]


def _contiguous_images(plane: Tensor) -> Tensor:
    """[B, C, H, W] whose [C, H, W] are contiguous; without a copy where they already are."""
    _, _, height, width = plane.shape
    return plane if plane.stride()[1:] == (height * width, width, 1) else plane.contiguous()


class _Decoder:
    """A decoder as the extension takes it, and room for its gradients."""

    def __init__(self, decoder: DensityMLP | None, needs_gradient: bool) -> None:
        weights, biases = (decoder.weights, decoder.biases) if decoder else ((), ())
        self.weights = [weight.contiguous() for weight in weights]
        self._biases = [bias.contiguous() for bias in biases if bias is not None]
        self._needs = needs_gradient and decoder is not None
        self._d_weights = [torch.empty_like(weight) for weight in self.weights if self._needs]
        self._d_biases = [torch.empty_like(bias) for bias in self._biases if self._needs]
        self.handle = _cpu.Decoder(
            widths=[decoder.in_channels if decoder else 0, *(len(w) for w in self.weights)],
            weights=[weight.data_ptr() for weight in self.weights],
            biases=[bias.data_ptr() for bias in self._biases],
            hidden=decoder.hidden if decoder else "softplus",
            output=decoder.output if decoder else "identity",
            weight_gradients=[d.data_ptr() for d in self._d_weights],
            bias_gradients=[d.data_ptr() for d in self._d_biases],
        )

    def gradients(self) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        return (self._d_weights, self._d_biases) if self._needs else (None, None)


def _empty(*shape: int) -> Tensor:
    """Uninitialised, whatever torch's defaults of dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))
