"""The operations of the kernel backends as torch custom ops.

Every op `triplane_kernels::name` takes groups of tensors, plain values, and the name of the
backend that runs it, and returns a list of tensors. It has a fake kernel (for torch.compile and
meta tensors) and an autograd formula, whose backward is an op of its own, `name_backward`. The
formula of that one is the reference's: a kernel need not know its second derivative.

The group `planes` is one tensor [B, P, C, H, W] or P tensors [B, C, Hp, Wp]; all other arguments
have the form that `backend` describes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from triplane_kernels import reference
from triplane_kernels.backend import Backend, Field, Gradients, Needs
from triplane_kernels.decoder import DensityMLP
from triplane_kernels.grid import Grid
from triplane_kernels.layout import TriplaneLayout

Groups = Sequence[Sequence[Tensor]]
Settings = Sequence[Any]

_LAYOUT = "int[] axes, float[] extents, str combine, str padding, bool align_corners"
_ACTIVATIONS = "str hidden, str output"
_GRID = "float[] lo, float[] hi, SymInt[] shape"


def layout_settings(layout: TriplaneLayout, combine: str) -> tuple[Any, ...]:
    """A layout as plain values; `combine` is what its reduction comes to in the kernels."""
    axes = [axis for pair in layout.axes for axis in pair]
    return axes, list(layout.extents), combine, layout.padding, layout.align_corners


def grid_settings(grid: Grid) -> tuple[Any, ...]:
    """A grid as plain values."""
    return list(grid.lo), list(grid.hi), list(grid.shape)


def _layout(axes: Sequence[int], extents: Sequence[float], *options: Any) -> TriplaneLayout:
    return TriplaneLayout(
        tuple(zip(axes[::2], axes[1::2], strict=True)), cast(Any, tuple(extents)), *options
    )


def _grid(lo: Sequence[float], hi: Sequence[float], shape: Sequence[int]) -> Grid:
    return Grid(*(cast(Any, tuple(v)) for v in (lo, hi, shape)))


def _field(groups: Groups, hidden: Any, output: Any) -> Field:
    planes, weights, biases = groups
    decoder = DensityMLP(tuple(weights), tuple(biases), hidden, output)
    return Field(_separate(planes), decoder)


def _separate(planes: Sequence[Tensor]) -> Sequence[Tensor]:
    """One [B, C, H, W] a plane."""
    return planes[0].unbind(1) if planes[0].ndim == 5 else planes


def _together(planes: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the separate planes, in the form that the planes had."""
    if planes[0].ndim != 5:
        return list(parts)
    shape = planes[0].shape
    strides = torch.empty(shape, device="meta").stride()
    first = parts[0]
    already = all(
        part.stride() == (strides[0], *strides[2:])
        and part.data_ptr() == first.data_ptr() + p * strides[1] * part.element_size()
        for p, part in enumerate(parts)
    )
    if already and first.untyped_storage().nbytes() == shape.numel() * first.element_size():
        return [first.as_strided(shape, strides)]
    return [torch.stack(list(parts), dim=1)]


def _owned(results: Sequence[Tensor]) -> list[Tensor]:
    """As an op must return them: contiguous, as the fake kernels say, and sharing no memory."""
    return [
        result
        if result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes
        else result.clone(memory_format=torch.contiguous_format)
        for result in results
    ]


def _asked(groups: Groups, gradients: Gradients) -> list[Tensor]:
    """A backend's gradients as a list, without those that nobody asked for."""
    flat = _together(groups[0], gradients.planes) if gradients.planes is not None else []
    flat += [*(gradients.weights or ()), *(gradients.biases or ())]
    return flat if gradients.points is None else [*flat, gradients.points]


# --------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """What an op is made of.

    groups    the names of its groups of tensors.
    settings  the schema of its plain values.
    shapes    (groups, settings) -> the shapes of its outputs.
    run       (backend, groups, settings) -> its outputs.
    backward  (backend, d_outputs, outputs, groups, settings, needs) -> the gradients of those
              groups that `needs` names, one list.
    define    (groups, settings) -> the outputs by the reference.
    """

    name: str
    groups: tuple[str, ...]
    settings: str
    shapes: Callable[[Groups, Settings], list[tuple[int, ...]]]
    run: Callable[[Backend, Groups, Settings], list[Tensor]]
    backward: Callable[..., list[Tensor]]
    define: Callable[[Groups, Settings], tuple[Tensor, ...]]

    def __call__(self, groups: Groups, settings: Settings, backend: str) -> list[Tensor]:
        op = getattr(torch.ops.triplane_kernels, self.name).default
        return op(*groups, *settings, backend)

    def call_backward(
        self,
        d_outputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        groups: Groups,
        settings: Settings,
        backend: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """The gradients of those groups that `needs` names, one list."""
        op = getattr(torch.ops.triplane_kernels, f"{self.name}_backward").default
        return op(d_outputs, outputs, *groups, *settings, backend, needs)

    def register(self) -> Operation:
        """Makes the op known to torch."""
        groups = ", ".join(f"Tensor[] {name}" for name in self.groups)
        common = f"{groups}, {self.settings}, str backend"
        op = torch.library.custom_op(
            f"triplane_kernels::{self.name}",
            self._run,
            mutates_args=(),
            schema=f"({common}) -> Tensor[]",
        )
        op.register_fake(self._fake)
        op.register_autograd(self._formula, setup_context=self._save)
        backward = torch.library.custom_op(
            f"triplane_kernels::{self.name}_backward",
            self._run_backward,
            mutates_args=(),
            schema=f"(Tensor[] d_outputs, Tensor[] outputs, {common}, bool[] needs) -> Tensor[]",
        )
        backward.register_fake(self._fake_backward)
        backward.register_autograd(self._second_formula, setup_context=self._save_all)
        return self

    def _split(self, arguments: Sequence[Any]) -> tuple[Groups, Settings, str]:
        count = len(self.groups)
        return arguments[:count], arguments[count:-1], arguments[-1]

    def _run(self, *arguments: Any) -> list[Tensor]:
        groups, settings, backend = self._split(arguments)
        return _owned(self.run(_module(backend), groups, settings))

    def _fake(self, *arguments: Any) -> list[Tensor]:
        groups, settings, _ = self._split(arguments)
        like = groups[-1][0] if groups[-1] else groups[0][0]
        shapes = self.shapes(groups, settings)
        return [like.new_empty(shape, dtype=torch.float32) for shape in shapes]

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        groups, settings, backend = self._split(inputs)
        ctx.lengths = [len(group) for group in groups]
        ctx.settings, ctx.backend = settings, backend
        ctx.save_for_backward(*(tensor for group in groups for tensor in group), *output)

    def _formula(self, ctx: Any, d_outputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        groups = [_take(saved, length) for length in ctx.lengths]
        outputs = list(saved)
        d = [
            torch.zeros_like(o) if g is None else g for g, o in zip(d_outputs, outputs, strict=True)
        ]
        needs = [any(ctx.needs_input_grad[i]) for i in range(len(groups))]
        found = iter(self.call_backward(d, outputs, groups, ctx.settings, ctx.backend, needs))
        gradients = [
            _take(found, length) if need else [None] * length
            for length, need in zip(ctx.lengths, needs, strict=True)
        ]
        return *gradients, *(None for _ in ctx.settings), None

    def _run_backward(
        self, d_outputs: Sequence[Tensor], outputs: Sequence[Tensor], *arguments: Any
    ) -> list[Tensor]:
        groups, settings, backend = self._split(arguments[:-1])
        needs = arguments[-1]
        return _owned(self.backward(_module(backend), d_outputs, outputs, groups, settings, needs))

    def _fake_backward(self, d_outputs: Any, outputs: Any, *arguments: Any) -> list[Tensor]:
        groups, _, _ = self._split(arguments[:-1])
        needs = arguments[-1]
        asked = [t for group, need in zip(groups, needs, strict=True) if need for t in group]
        return [tensor.new_empty(tensor.shape) for tensor in asked]

    def _save_all(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        d_outputs, outputs, *arguments, ctx.needs = inputs
        groups, ctx.settings, _ = self._split(arguments)
        ctx.lengths = [len(group) for group in (d_outputs, outputs, *groups)]
        ctx.save_for_backward(*d_outputs, *outputs, *(t for group in groups for t in group))

    def _second_formula(self, ctx: Any, dd: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The gradient of <dd, first derivatives>, by the reference.

        `outputs` take none: what they were computed from is among the inputs. With create_graph
        the result can itself be differentiated.
        """
        saved = iter(ctx.saved_tensors)
        saved_d_outputs, outputs, *groups = (_take(saved, length) for length in ctx.lengths)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Derivatives by aliases: one by the tensors themselves would also follow how these
            # depend on each other.
            d_outputs = [_alias(tensor) for tensor in saved_d_outputs]
            inputs = [
                [_alias(tensor, need) for tensor in group]
                for group, need in zip(groups, ctx.needs, strict=True)
            ]
            asked = [
                t for group, need in zip(inputs, ctx.needs, strict=True) if need for t in group
            ]
            first = torch.autograd.grad(
                self.define(inputs, ctx.settings),
                asked,
                d_outputs,
                create_graph=True,
                materialize_grads=True,
            )
            # What to return a gradient for, as None or as the alias to differentiate by.
            wanted = [
                [a if t.requires_grad else None for a, t in zip(aliases, tensors, strict=True)]
                for aliases, tensors in zip(
                    (d_outputs, *inputs), (saved_d_outputs, *groups), strict=True
                )
            ]
            given = [(f, g) for f, g in zip(first, dd, strict=True) if g is not None]
            second = torch.autograd.grad(
                torch.stack([(f * g).sum() for f, g in given]).sum(),
                [alias for group in wanted for alias in group if alias is not None],
                create_graph=create_graph,
                materialize_grads=True,
            )
        found = iter(second)
        d_found, *gradients = (
            [None if alias is None else next(found) for alias in group] for group in wanted
        )
        nothing = [None] * len(outputs)
        return d_found, nothing, *gradients, *(None for _ in ctx.settings), None, None


def _alias(tensor: Tensor, differentiable: bool = False) -> Tensor:
    """The same values, by which one can differentiate."""
    if tensor.requires_grad:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_() if differentiable else tensor


def _take(values: Iterator[Any], count: int) -> list[Any]:
    return [next(values) for _ in range(count)]


def _module(backend: str) -> Backend:
    return cast(Backend, importlib.import_module(f"triplane_kernels.{backend}"))


# ------------------------------------------------------------------------------------- points


def _features_shapes(groups: Groups, settings: Settings) -> list[tuple[int, ...]]:
    planes, (points,) = _separate(groups[0]), groups[1]
    channels = _layout(*settings).feature_channels(planes[0].shape[1])
    return [(planes[0].shape[0], points.shape[1], channels)]


def _features(backend: Backend, groups: Groups, settings: Settings) -> list[Tensor]:
    return [backend.sample_features(_separate(groups[0]), groups[1][0], _layout(*settings))]


def _features_backward(
    backend: Backend,
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    groups: Groups,
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    gradients = backend.sample_features_backward(
        d_outputs[0],
        _separate(groups[0]),
        groups[1][0],
        _layout(*settings),
        Needs(planes=needs[0], decoder=False, points=needs[1]),
    )
    return _asked(groups, gradients)


def _define_features(groups: Groups, settings: Settings) -> tuple[Tensor, ...]:
    planes, (points,) = _separate(groups[0]), groups[1]
    return (reference.sample_features(planes, points, _layout(*settings)),)


sample_features = Operation(
    "sample_features",
    ("planes", "points"),
    _LAYOUT,
    _features_shapes,
    _features,
    _features_backward,
    _define_features,
).register()


def _radiance_shapes(groups: Groups, settings: Settings) -> list[tuple[int, ...]]:
    planes, weights, _, (points,) = groups
    batch, count = planes[0].shape[0], points.shape[1]
    return [(batch, count), (batch, count, weights[-1].shape[0] - 1)]


def _radiance(backend: Backend, groups: Groups, settings: Settings) -> list[Tensor]:
    hidden, output, *layout = settings
    field = _field(groups[:3], hidden, output)
    return list(backend.radiance(field, groups[3][0], _layout(*layout)))


def _radiance_backward(
    backend: Backend,
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    groups: Groups,
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    hidden, output, *layout = settings
    gradients = backend.radiance_backward(
        d_outputs[0],
        d_outputs[1],
        outputs[0],
        _field(groups[:3], hidden, output),
        groups[3][0],
        _layout(*layout),
        _field_needs(needs[:3])._replace(points=needs[3]),
    )
    return _asked(groups, _drop_unasked(gradients, needs))


def _define_radiance(groups: Groups, settings: Settings) -> tuple[Tensor, ...]:
    hidden, output, *layout = settings
    field = _field(groups[:3], hidden, output)
    return reference.radiance(*field, groups[3][0], _layout(*layout))


def _field_needs(needs: Sequence[bool]) -> Needs:
    planes, weights, biases = needs
    return Needs(planes, weights or biases)


def _drop_unasked(gradients: Gradients, needs: Sequence[bool]) -> Gradients:
    """Backends compute a decoder's weights and biases together."""
    return gradients._replace(
        weights=gradients.weights if needs[1] else None,
        biases=gradients.biases if needs[2] else None,
    )


radiance = Operation(
    "radiance",
    ("planes", "weights", "biases", "points"),
    f"{_ACTIVATIONS}, {_LAYOUT}",
    _radiance_shapes,
    _radiance,
    _radiance_backward,
    _define_radiance,
).register()


# -------------------------------------------------------------------------------------- grids


def _grid_of(settings: Settings) -> tuple[Grid, TriplaneLayout]:
    return _grid(*settings[:3]), _layout(*settings[3:])


def _grid_shapes(groups: Groups, settings: Settings) -> list[tuple[int, ...]]:
    return [(groups[0][0].shape[0], *settings[4])]


def _density_grid(backend: Backend, groups: Groups, settings: Settings) -> list[Tensor]:
    hidden, output, *where = settings
    return [backend.density_grid(_field(groups, hidden, output), *_grid_of(where))]


def _density_grid_backward(
    backend: Backend,
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    groups: Groups,
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    hidden, output, *where = settings
    gradients = backend.density_grid_backward(
        d_outputs[0],
        outputs[0],
        _field(groups, hidden, output),
        *_grid_of(where),
        _field_needs(needs),
    )
    return _asked(groups, _drop_unasked(gradients, needs))


def _define_density_grid(groups: Groups, settings: Settings) -> tuple[Tensor, ...]:
    hidden, output, *where = settings
    return (reference.density_grid(*_field(groups, hidden, output), *_grid_of(where)),)


density_grid = Operation(
    "density_grid",
    ("planes", "weights", "biases"),
    f"{_ACTIVATIONS}, {_GRID}, {_LAYOUT}",
    _grid_shapes,
    _density_grid,
    _density_grid_backward,
    _define_density_grid,
).register()


def _target(groups: Groups, settings: Settings) -> Tensor | Field:
    volume, *field = groups[3:]
    return volume[0] if volume else _field(field, settings[2], settings[3])


def _density_grid_loss(backend: Backend, groups: Groups, settings: Settings) -> list[Tensor]:
    hidden, output, _, _, kind, *where = settings
    field, target = _field(groups[:3], hidden, output), _target(groups, settings)
    return [backend.density_grid_loss(field, target, *_grid_of(where), kind)]


def _density_grid_loss_backward(
    backend: Backend,
    d_outputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    groups: Groups,
    settings: Settings,
    needs: Sequence[bool],
) -> list[Tensor]:
    hidden, output, _, _, kind, *where = settings
    ours, theirs = backend.density_grid_loss_backward(
        d_outputs[0],
        _field(groups[:3], hidden, output),
        _target(groups, settings),
        *_grid_of(where),
        kind,
        _field_needs(needs[:3]),
        Needs(planes=needs[3], decoder=False) if groups[3] else _field_needs(needs[4:]),
    )
    flat = _asked(groups, _drop_unasked(ours, needs))
    if isinstance(theirs, Gradients):
        return flat + _asked(groups[4:], _drop_unasked(theirs, needs[4:]))
    return flat if theirs is None else [*flat, theirs]


def _define_density_grid_loss(groups: Groups, settings: Settings) -> tuple[Tensor, ...]:
    hidden, output, _, _, kind, *where = settings
    field, target = _field(groups[:3], hidden, output), _target(groups, settings)
    return (reference.density_grid_loss(*field, *_grid_of(where), target, kind),)


density_grid_loss = Operation(
    "density_grid_loss",
    (
        "planes",
        "weights",
        "biases",
        "target_volume",
        "target_planes",
        "target_weights",
        "target_biases",
    ),
    f"{_ACTIVATIONS}, str target_hidden, str target_output, str kind, {_GRID}, {_LAYOUT}",
    lambda groups, settings: [(groups[0][0].shape[0],)],
    _density_grid_loss,
    _density_grid_loss_backward,
    _define_density_grid_loss,
).register()
