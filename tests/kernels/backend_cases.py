"""One problem, evaluated and differentiated by any backend, and judged against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from kernel_cases import random_decoder, random_planes, random_points
from torch import Tensor

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, TriplaneLayout, reference

KERNELS = ("sample_features", "density", "radiance", "density_grid", "density_grid_loss")


@dataclass(frozen=True, repr=False)
class Problem:
    """Inputs whose values are floats, so that no dtype rounds them."""

    planes: list[Tensor]
    target_planes: list[Tensor]
    decoder: DensityMLP
    points: Tensor
    grid: Grid
    layout: TriplaneLayout
    stacked: bool  # whether operations get one tensor of planes

    def __repr__(self) -> str:
        planes = [list(plane.shape) for plane in self.planes]
        layers = [list(weight.shape) for weight in self.decoder.weights]
        points = list(self.points.shape)
        activations = (self.decoder.hidden, self.decoder.output, self.decoder.bias_shift)
        return f"{self.layout} {planes=} {layers=} {activations} {points=} {self.grid}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis prints

    @classmethod
    def random(
        cls,
        layout: TriplaneLayout,
        grid: Grid,
        *,
        batch: int = 1,
        channels: int = 3,
        sizes: list[tuple[int, int]] | None = None,
        widths: tuple[int, ...] = (6, 4),
        points: int = 37,
        shared_points: bool = False,
        scale: float = 1.0,
        shift: float = 0.0,
        **options: object,
    ) -> Problem:
        """`scale` multiplies the planes; `shift` is added to the first layer's bias."""
        images = sizes or [(5, 7)] * len(layout.axes)
        both = [
            [
                random_planes(layout, batch, channels, size, torch.float32, seed)[:, p] * scale
                for p, size in enumerate(images)
            ]
            for seed in (0, 5)
        ]
        # Weights as initialisations have them: outputs of deep decoders stay moderate.
        decoder = random_decoder(layout.feature_channels(channels), widths, torch.float32)
        weights = [weight / weight.shape[1] ** 0.5 for weight in decoder.weights]
        biases = [decoder.biases[0] + shift, *decoder.biases[1:]]
        return cls(
            *both,
            replace(decoder, weights=tuple(weights), biases=tuple(biases), **options),
            random_points(points, 1 if shared_points else batch, dtype=torch.float32),
            grid,
            layout,
            sizes is None,
        )

    def evaluate(
        self, name: str, dtype: torch.dtype, backend: str, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """An operation's results, and the derivatives by all its inputs of a random sum of them.

        They are returned on the CPU, whatever the device.
        """

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().to(device, dtype).requires_grad_()

        planes = [leaf(plane) for plane in self.planes]
        target_planes = [leaf(plane) for plane in self.target_planes]
        decoder = replace(
            self.decoder,
            weights=tuple(leaf(weight) for weight in self.decoder.weights),
            biases=tuple(None if bias is None else leaf(bias) for bias in self.decoder.biases),
        )
        points = leaf(self.points)
        inputs = {f"plane {p}": plane for p, plane in enumerate(planes)}
        inputs |= {f"parameter {i}": p for i, p in enumerate(decoder.parameters)}
        given, target = (
            (torch.stack(p, dim=1) if self.stacked else p) for p in (planes, target_planes)
        )
        options = {"backend": backend}
        if name == "density_grid":
            outputs = (tk.density_grid(given, decoder, self.grid, self.layout, **options),)
        elif name.startswith("density_grid_loss"):
            kind = "l2" if name.endswith("l2") else "l1"
            # A decoder of its own: gradients of a shared one largely cancel.
            weights = tuple(leaf(1.1 * weight) for weight in self.decoder.weights)
            other = replace(decoder, weights=weights)
            inputs |= {f"target plane {p}": plane for p, plane in enumerate(target_planes)}
            inputs |= {f"target parameter {i}": weight for i, weight in enumerate(weights)}
            outputs = (
                tk.density_grid_loss(
                    given, decoder, self.grid, self.layout, (target, other), kind, **options
                ),
            )
        else:
            inputs["points"] = points
            if name == "sample_features":
                inputs = {k: v for k, v in inputs.items() if not k.startswith("parameter")}
                outputs = (tk.sample_features(given, points, self.layout, **options),)
            else:
                result = getattr(tk, name)(given, decoder, points, self.layout, **options)
                outputs = result if isinstance(result, tuple) else (result,)

        generator = torch.Generator().manual_seed(11)
        weights = [torch.rand(o.shape, generator=generator).to(o) - 0.3 for o in outputs]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
        results = {f"output {i}": output.detach().cpu() for i, output in enumerate(outputs)}
        results |= {f"d {k}": g.cpu() for k, g in zip(inputs, gradients, strict=True)}
        # A decoder's gradient is one vector: a single bias can be a sum that cancels.
        parameters = [key for key in results if "parameter" in key]
        if parameters:
            together = [results.pop(key).flatten() for key in parameters]
            results["d decoder"] = torch.cat(together)
        return results


def norm_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    norm = exact.double().norm().item()
    return (ours.double() - exact.double()).norm().item() / norm if norm else ours.norm().item()


def assert_as_accurate_as_pytorch(
    problem: Problem, name: str, backend: str, slack: float = 2, device: str = "cpu"
) -> None:
    """The project's bound: twice the error of plain PyTorch in float32, plus 1e-6.

    Of a few numbers PyTorch's own error is a matter of luck, and five times it is allowed.
    """
    exact = problem.evaluate(name, torch.float64, "reference")
    usual = problem.evaluate(name, torch.float32, "reference")
    ours = problem.evaluate(name, torch.float32, backend, device)
    assert ours.keys() == exact.keys()
    for key, value in ours.items():
        assert value.dtype == torch.float32, key
        assert value.shape == exact[key].shape, key
        times = slack if value.numel() >= 64 else 5
        limit = times * norm_error(usual[key], exact[key]) + 1e-6
        error = norm_error(value, exact[key])
        assert error <= limit, f"{name}, {key}: {error:.1e} where {limit:.1e} is allowed"


def by_points(problem: Problem, dtype: torch.dtype) -> Tensor:
    """density_grid the usual way: every voxel looked up on its own."""
    planes = [plane.to(dtype) for plane in problem.planes]
    return reference.density_grid_by_points(
        planes, problem.decoder.to(dtype), problem.grid, problem.layout
    )
