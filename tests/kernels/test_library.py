"""The kernels as torch sees them: registration, compilation, second derivatives, determinism."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from backend_cases import KERNELS, Problem, norm_error
from kernel_cases import random_decoder, random_planes, random_points
from torch import Tensor
from torch.testing import assert_close

import triplane_kernels as tk
from triplane_kernels import DensityMLP, Grid, library

pytest.importorskip("triplane_kernels._cpu", reason="built without the C++ extension")

GRID = Grid(lo=(-0.4, -0.3, -0.5), hi=(0.35, 0.4, 0.2), shape=(4, 3, 5))
SMALL = dataclasses.replace(GRID, shape=(2, 3, 5))  # Triton's interpreter is slow
LAYOUT = dataclasses.replace(tk.EG3D, extent=(1.0, 1.1, 0.9))
BACKENDS = tk.available_backends("cpu")["density_grid"].available
OPS = ("sample_features", "radiance", "density_grid", "density_grid_loss")
OPERATIONS = (*KERNELS, "density_gradient")


def arguments(requires_grad: bool = True) -> tuple[Tensor, DensityMLP, Tensor]:
    planes = random_planes(LAYOUT, batch=2, dtype=torch.float32).requires_grad_(requires_grad)
    decoder = random_decoder(3, dtype=torch.float32, requires_grad=requires_grad)
    points = random_points(6, batch=2, scale=0.4, dtype=torch.float32)
    return planes, decoder, points.requires_grad_(requires_grad)


def groups_and_settings(name: str, form: str) -> tuple[library.Groups, library.Settings]:
    planes, decoder, points = arguments(requires_grad=form == "gradient")
    group = [planes]
    if form == "separate":
        group = list(planes.detach().unbind(1))  # as views, none of them contiguous
    weights, biases = list(decoder.weights), list(decoder.biases)
    layout = library.layout_settings(LAYOUT, "sum")
    if name == "sample_features":
        return (group, [points]), layout
    if name == "radiance":
        return (group, weights, biases, [points]), ("softplus", "exp", *layout)
    weights[-1], biases[-1] = weights[-1][:1], biases[-1][:1]
    where = (*library.grid_settings(SMALL), *layout)
    if name == "density_grid":
        return (group, weights, biases), ("softplus", "softplus", *where)
    activations = ("softplus", "identity", "softplus", "identity")
    if form == "separate":
        volume = torch.zeros(2, *SMALL.shape)
        return (group, weights, biases, [volume], [], [], []), (*activations, "l2", *where)
    other = [planes.detach().flip(0).requires_grad_(planes.requires_grad)]
    groups = (group, weights, biases, [], other, weights, biases)
    return groups, (*activations, "l1", *where)


@pytest.mark.parametrize("form", ["gradient", "plain", "separate"])
@pytest.mark.parametrize(
    "name", ["sample_features", "radiance", "density_grid", "density_grid_loss"]
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_opcheck(backend: str, name: str, form: str) -> None:
    operation: library.Operation = getattr(library, name)
    groups, settings = groups_and_settings(name, form)
    op = getattr(torch.ops.triplane_kernels, name).default
    torch.library.opcheck(op, (*groups, *settings, backend))

    outputs = [output.detach() for output in operation(groups, settings, backend)]
    d_outputs = [torch.ones_like(output) for output in outputs]
    needs = [bool(group) for group in groups]
    backward = getattr(torch.ops.triplane_kernels, f"{name}_backward").default
    groups = [[tensor.detach() for tensor in group] for group in groups]
    torch.library.opcheck(backward, (d_outputs, outputs, *groups, *settings, backend, needs))


def call(name: str, planes: Tensor, decoder: DensityMLP, points: Tensor, backend: str) -> Tensor:
    """Any operation, between others that a compiler could fuse with it."""
    planes = planes.tanh()
    options = {"backend": backend}
    if name == "sample_features":
        result = tk.sample_features(planes, points, LAYOUT, **options)
    elif name == "density_grid":
        result = tk.density_grid(planes, decoder, GRID, LAYOUT, **options)
    elif name == "density_grid_loss":
        target = (planes.flip(0), decoder)
        result = tk.density_grid_loss(planes, decoder, GRID, LAYOUT, target, **options)
    else:
        result = getattr(tk, name)(planes, decoder, points, LAYOUT, **options)
    return torch.cat([r.flatten() for r in result] if isinstance(result, tuple) else [result * 2])


def weighted_gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles_to_one_graph(name: str, compiler: str) -> None:
    if compiler == "inductor" and name != "density_grid":
        pytest.skip("the ops are the same to the compiler: one shows that it takes them")
    planes, decoder, points = arguments()
    torch.compiler.reset()
    compiled: Callable[..., Tensor] = torch.compile(call, fullgraph=True, backend=compiler)
    inputs = [planes, *decoder.parameters, points]
    output, expected = (run(name, planes, decoder, points, "cpu") for run in (compiled, call))
    assert_close(output, expected)
    ours, theirs = (weighted_gradients(o, inputs) for o in (output, expected))
    assert_close(ours, theirs)


def test_compiles_for_any_size() -> None:
    planes, decoder, points = arguments(requires_grad=False)
    torch.compiler.reset()
    compiled = torch.compile(tk.density, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 5, 6):
        some = points[:, :count]
        expected = tk.density(planes, decoder, some, LAYOUT)
        assert_close(compiled(planes, decoder, some, LAYOUT), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives(name: str) -> None:
    """Of a kernel in float32, against the reference in float64."""

    def second(dtype: torch.dtype, backend: str) -> list[Tensor]:
        planes, decoder, points = arguments(requires_grad=False)
        planes, points = (t.to(dtype).requires_grad_() for t in (planes, points))
        decoder = dataclasses.replace(
            decoder,
            weights=tuple(w.to(dtype).requires_grad_() for w in decoder.weights),
            biases=tuple(b.to(dtype).requires_grad_() for b in decoder.biases),
        )
        inputs = [planes, *decoder.parameters]
        if name not in ("density_grid", "density_grid_loss"):
            inputs.append(points)
        if name == "sample_features":
            inputs = [planes, points]
        output = call(name, planes, decoder, points, backend)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        penalty = sum((g - 0.3).square().sum() for g in first)
        return list(torch.autograd.grad(penalty, inputs))

    exact = second(torch.float64, "reference")
    for ours, expected in zip(second(torch.float32, "cpu"), exact, strict=True):
        assert norm_error(ours, expected) < 2e-5


def test_second_derivatives_against_differences() -> None:
    # In float64, where "auto" must find the reference.
    planes = random_planes(LAYOUT, channels=2, size=(3, 2)).requires_grad_()
    decoder = random_decoder(2, (3, 1), requires_grad=True)
    points = random_points(3, scale=0.3).requires_grad_()

    def evaluate(planes: Tensor, points: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ours = dataclasses.replace(decoder, weights=parameters[:2], biases=parameters[2:])
        return (
            tk.density(planes, ours, points, LAYOUT),
            tk.density_grid(planes, ours, Grid.cube(2, 0.7), LAYOUT),
        )

    inputs = (planes, points, *decoder.parameters)
    assert torch.autograd.gradgradcheck(evaluate, inputs)


def test_third_derivatives() -> None:
    def third(dtype: torch.dtype) -> Tensor:
        planes, decoder, points = arguments(requires_grad=False)
        points = points.to(dtype).requires_grad_()
        sigma = tk.density(planes.to(dtype), decoder.to(dtype), points, LAYOUT)
        derivative = sigma.sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(derivative, points, create_graph=True)
            derivative = gradient.pow(3).sum()
        return torch.autograd.grad(derivative, points)[0]

    assert norm_error(third(torch.float32), third(torch.float64)) < 1e-4


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_repeat_to_the_bit(name: str) -> None:
    problem = Problem.random(tk.EG3D, GRID, points=3000, channels=8)
    assert torch.are_deterministic_algorithms_enabled()
    first, second = (problem.evaluate(name, torch.float32, "cpu") for _ in range(2))
    assert all(torch.equal(second[key], value) for key, value in first.items())


@pytest.mark.parametrize("name", OPERATIONS)
def test_meta_tensors(name: str) -> None:
    planes, decoder, points = arguments(requires_grad=False)
    on_cpu = call(name, planes, decoder, points, "auto")
    on_meta = call(name, planes.to("meta"), decoder.to("meta"), points.to("meta"), "auto")
    assert on_meta.shape == on_cpu.shape


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_s_defaults_do_not_matter(name: str) -> None:
    given = arguments()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            output = call(name, *given, "cpu")
            (gradient,) = torch.autograd.grad(output.sum(), given[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert output.dtype == gradient.dtype == torch.float32
    assert output.device.type == gradient.device.type == "cpu"
    assert torch.equal(output, call(name, *given, "cpu"))


@pytest.mark.parametrize("name", ["density", "density_grid"])
def test_an_unusual_view_of_the_planes(name: str) -> None:
    """Strides of any kind, planes that are parts of one memory, and planes that are not."""
    planes, decoder, points = arguments(requires_grad=False)
    expected = call(name, planes, decoder, points, "cpu")
    reversed_memory = planes.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    channels_last = planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    every_other = planes.repeat_interleave(2, dim=0)[::2]
    for view in (reversed_memory, channels_last, every_other):
        leaf = view.detach().requires_grad_()
        assert torch.equal(call(name, leaf, decoder, points, "cpu"), expected)
        (gradient,) = weighted_gradients(call(name, leaf, decoder, points, "cpu"), [leaf])
        plain = planes.clone().requires_grad_()
        (wanted,) = weighted_gradients(call(name, plain, decoder, points, "cpu"), [plain])
        assert torch.equal(gradient, wanted)


def test_half_precision_gradients_have_the_planes_dtype() -> None:
    planes, decoder, points = arguments(requires_grad=False)
    for half in (torch.bfloat16, torch.float16):
        ours = planes.to(half).requires_grad_()
        same = ours.detach().float().requires_grad_()
        for name in ("density", "density_grid"):
            gradients = [
                weighted_gradients(call(name, p, decoder, points, "cpu"), [p])[0]
                for p in (ours, same)
            ]
            assert gradients[0].dtype == half
            assert norm_error(gradients[0], gradients[1]) < 4 * torch.finfo(half).eps


def test_gradient_checkpointing_and_hooks_work() -> None:
    planes, decoder, points = arguments()
    expected = weighted_gradients(call("density", planes, decoder, points, "cpu"), [planes])
    output = torch.utils.checkpoint.checkpoint(
        call, "density", planes, decoder, points, "cpu", use_reentrant=False
    )
    assert_close(weighted_gradients(output, [planes]), expected)
