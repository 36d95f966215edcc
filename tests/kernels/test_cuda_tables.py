"""The CUDA kernels that make tables of planes, in the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backend_cases import norm_error
from cuda_emulation import threads_in_reverse
from kernel_cases import LAYOUTS, random_decoder, random_planes
from torch import Tensor

from triplane_kernels import EG3D, EG3D_CORRECTED, DensityMLP, Grid, TriplaneLayout
from triplane_kernels.backend import Field, Needs
from triplane_kernels.cuda import tables as module
from triplane_kernels.cuda.tables import gradients_of_first_layer, tabulate
from triplane_kernels.frame import FirstLayerGradients, Frame, Tables, padded, plane_weight
from triplane_kernels.reference import Taps

pytestmark = pytest.mark.usefixtures("emulated")

GRID = Grid(lo=(-0.9, -0.3, -0.55), hi=(0.35, 0.8, 1.2), shape=(3, 18, 5))
INSIDE = Grid(lo=(-0.4, -0.3, -0.45), hi=(0.35, 0.4, 0.3), shape=(3, 4, 5))
BOTH = Needs(planes=True, decoder=True)
PARTS = ("rows", "columns", "third")


def summed(layout: TriplaneLayout) -> TriplaneLayout:
    """As a backend gets it: a mean is a sum."""
    return replace(layout, reduce="concat" if layout.reduce.startswith("concat") else "sum")


def random_field(
    layout: TriplaneLayout,
    channels: int = 3,
    units: int = 6,
    batch: int = 1,
    sizes: list[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Field:
    images = sizes or [(5, 7)] * len(layout.axes)
    planes = [
        random_planes(layout, batch, channels, size, dtype)[:, p] for p, size in enumerate(images)
    ]
    decoder = random_decoder(layout.feature_channels(channels), (units, 1), torch.float32)
    return Field(planes, decoder)


def resampling(grid: Grid, axis: int, layout: TriplaneLayout, size: int) -> Tensor:
    """[grid points, pixels], float64."""
    coordinates = grid.coordinates(axis, torch.float64, "cpu")
    taps = Taps.at(coordinates, layout.extents[axis], size, layout)
    matrix = torch.zeros(len(coordinates), size, dtype=torch.float64)
    for index, weight in zip(taps.index, taps.weight, strict=True):
        matrix[torch.arange(len(index)), index] += weight
    return matrix


def defined(field: Field, grid: Grid, layout: TriplaneLayout, frame: Frame) -> dict[str, Tensor]:
    """The tables without padding, in the planes' dtype and by autograd's rules."""
    weight, bias = field.decoder.weights[0], field.decoder.biases[0]
    found: dict[str, Tensor] = {}
    for number, (plane, axes) in enumerate(zip(field.planes, layout.axes, strict=True)):
        part = frame.part(axes)
        across, down = (
            resampling(grid, axis, layout, size).to(plane.dtype)
            for axis, size in zip(axes, (plane.shape[3], plane.shape[2]), strict=True)
        )
        features = torch.einsum("px,qy,bcyx->bpqc", across, down, plane)
        if axes[0] != frame.rows_axis(part):
            features = features.transpose(1, 2)
        table = features @ plane_weight(weight, number, layout).T
        if number == 0:
            table = table + bias
        table = table.transpose(2, 3)
        found[part] = found[part] + table if part in found else table
    return found


def random_gradients(tables: Tables) -> Tables:
    """Of tables; the padding is NaN."""
    generator = torch.Generator().manual_seed(3)
    return Tables(
        *(
            None if table is None else torch.randn(table.shape, generator=generator)
            for table in tables
        )
    )


def with_padding_of(gradients: Tables, frame: Frame, value: float) -> Tables:
    for part, gradient in zip(PARTS, gradients, strict=True):
        if gradient is not None:
            gradient[..., frame.count(part) :] = value
    return gradients


def gradients_by_autograd(
    field: Field,
    grid: Grid,
    layout: TriplaneLayout,
    frame: Frame,
    d_tables: Tables,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Of the planes, of the weight and of the bias."""
    planes = [plane.to(dtype).requires_grad_() for plane in field.planes]
    weight, bias = (
        p.detach().to(dtype).requires_grad_()
        for p in (field.decoder.weights[0], field.decoder.biases[0])
    )
    decoder = DensityMLP((weight, *field.decoder.weights[1:]), (bias, *field.decoder.biases[1:]))
    found = defined(Field(planes, decoder), grid, layout, frame)
    d_found = [getattr(d_tables, part)[..., : frame.count(part)].to(dtype) for part in found]
    return list(torch.autograd.grad(list(found.values()), [*planes, weight, bias], d_found))


def flat(gradients: FirstLayerGradients) -> list[Tensor]:
    assert gradients.planes is not None
    assert gradients.weight is not None
    assert gradients.bias is not None
    return [*gradients.planes, gradients.weight, gradients.bias]


def check(field: Field, grid: Grid, layout: TriplaneLayout) -> None:
    """Tables and gradients are as exact as PyTorch's, and the same in another order of threads."""
    layout = summed(layout)
    frame = Frame.of(grid, layout)
    tables = tabulate(field, grid, layout, frame)
    d_tables = with_padding_of(random_gradients(tables), frame, torch.nan)
    gradients = flat(gradients_of_first_layer(d_tables, field, grid, layout, frame, BOTH))

    exact_field = Field([p.double() for p in field.planes], field.decoder.to(torch.float64))
    usual_field = Field([p.float() for p in field.planes], field.decoder)
    exact, usual = (defined(f, grid, layout, frame) for f in (exact_field, usual_field))
    batch, units = field.planes[0].shape[0], field.decoder.weights[0].shape[0]
    for part, table in zip(PARTS, tables, strict=True):
        if table is None:
            assert part not in exact
            continue
        assert table.shape == frame.table_shape(part, batch, units)
        assert table.dtype == torch.float32
        count = frame.count(part)
        assert not table[..., count:].any()
        if part not in exact:
            assert not table.any()
            continue
        bound = 2 * norm_error(usual[part], exact[part]) + 1e-6
        assert norm_error(table[..., :count], exact[part]) <= bound, part

    exact_gradients, usual_gradients = (
        gradients_by_autograd(field, grid, layout, frame, d_tables, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    inputs = [*field.planes, field.decoder.weights[0], field.decoder.biases[0]]
    for number, (ours, of, truth, theirs) in enumerate(
        zip(gradients, inputs, exact_gradients, usual_gradients, strict=True)
    ):
        assert ours.dtype == of.dtype
        assert ours.shape == of.shape
        rounding = 0.0 if of.dtype == torch.float32 else torch.finfo(of.dtype).eps / 2
        bound = 2 * norm_error(theirs, truth) + 1e-6 + rounding
        assert norm_error(ours, truth) <= bound, number

    with threads_in_reverse():
        again = tabulate(field, grid, layout, frame)
        more = flat(gradients_of_first_layer(d_tables, field, grid, layout, frame, BOTH))
    pairs = [*zip(tables, again, strict=True), *zip(gradients, more, strict=True)]
    for first, second in pairs:
        if first is not None and second is not None:
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    "layout", ["eg3d", "eg3d-corrected", "crm", "triposr", "ssdnerf", "one-plane", "all-six-pairs"]
)
def test_layouts(layout: str) -> None:
    check(random_field(LAYOUTS[layout], batch=2), GRID, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_planes(dtype: torch.dtype) -> None:
    check(random_field(EG3D, batch=2, dtype=dtype), GRID, EG3D)


def test_planes_of_several_sizes_and_types() -> None:
    field = random_field(EG3D_CORRECTED, sizes=[(9, 18), (20, 5), (1, 3)])
    planes = [field.planes[0].bfloat16(), *field.planes[1:]]
    check(Field(planes, field.decoder), GRID, EG3D_CORRECTED)


def test_sizes_of_real_models() -> None:
    """More than one tile of points, one chunk of channels and one tile of units."""
    grid = replace(INSIDE, shape=(2, 17, 35))
    layout = replace(EG3D, reduce="concat")
    field = random_field(layout, channels=35, units=67, sizes=[(9, 18), (20, 5), (9, 9)])
    check(field, grid, layout)


@pytest.mark.parametrize("size", [(64, 40), (4, 3)], ids=["more-pixels", "more-points"])
def test_more_pixels_than_points_and_fewer(size: tuple[int, int]) -> None:
    """Several blocks of pixels, and more points of a pixel than are in shared memory at once."""
    grid = Grid((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5), (50, 19, 5))
    check(random_field(EG3D, sizes=[size] * 3), grid, EG3D)


def test_a_grid_as_fine_as_the_image() -> None:
    """Where the upper pixel of a point is the next point's lower."""
    grid = Grid((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5), (33, 34, 3))
    check(random_field(EG3D, sizes=[(32, 33)] * 3), grid, EG3D)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 2), (5, 1, 2), (2, 5, 1)], ids=str)
def test_axes_of_one_point(shape: tuple[int, int, int]) -> None:
    check(random_field(EG3D_CORRECTED), replace(INSIDE, shape=shape), EG3D_CORRECTED)


# Batch, channels, height, width: channels last; batch last; every second pixel.
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 3, 2, 0), None], ids=str)
def test_planes_of_any_strides(order: tuple[int, ...] | None) -> None:
    field = random_field(EG3D, channels=10, batch=2)
    if order is None:
        planes = [torch.stack([plane, plane], dim=-1)[..., 0] for plane in field.planes]
    else:
        inverse = [order.index(dimension) for dimension in range(4)]
        planes = [p.permute(order).contiguous().permute(inverse) for p in field.planes]
    assert not any(plane.is_contiguous() for plane in planes)
    check(Field(planes, field.decoder), GRID, EG3D)


def test_weights_of_any_strides() -> None:
    field = random_field(EG3D)
    weight, *rest = field.decoder.weights
    weights = (weight.T.contiguous().T, *rest)
    check(field._replace(decoder=replace(field.decoder, weights=weights)), GRID, EG3D)


def test_offsets_beyond_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FARTHEST", 40)
    field = random_field(EG3D, batch=2)
    planes = [plane.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2) for plane in field.planes]
    check(Field(planes, field.decoder), INSIDE, EG3D)


def test_more_tiles_than_partial_sums() -> None:
    """Blocks go through several tiles."""
    layout = LAYOUTS["one-plane"]
    grid = replace(INSIDE, shape=(1, 16 * 27, 16 * 20))
    check(random_field(layout, channels=1, units=1), grid, layout)


@pytest.mark.parametrize("layout", [EG3D, EG3D_CORRECTED], ids=["two-tables", "three-tables"])
def test_nan_in_nan_out(layout: TriplaneLayout) -> None:
    layout = summed(layout)
    field = random_field(layout)
    planes = [plane.clone() for plane in field.planes]
    planes[0][0, 1, 3, 3] = torch.nan
    field = field._replace(planes=planes)
    frame = Frame.of(INSIDE, layout)
    found = tabulate(field, INSIDE, layout, frame)
    expected = defined(field, INSIDE, layout, frame)
    expected_nan = 0
    for part, table in zip(PARTS, found, strict=True):
        if table is not None:
            nan = _nan_by_lookup(field, layout, frame, part)
            assert torch.equal(table[..., : frame.count(part)].isnan(), nan)
            expected_nan += int(nan.sum())
    assert 0 < expected_nan < sum(table.numel() for table in expected.values())


def _nan_by_lookup(field: Field, layout: TriplaneLayout, frame: Frame, part: str) -> Tensor:
    """Where a pixel with a share in an entry is NaN; without the matrix, whose zeros count."""
    batch, n_rows, units, _ = frame.table_shape(part, 1, len(field.decoder.weights[0]))
    nan = torch.zeros(batch, n_rows, frame.count(part), dtype=torch.bool)
    for plane, axes in zip(field.planes, layout.axes, strict=True):
        if frame.part(axes) != part:
            continue
        taps = [
            Taps.at(INSIDE.coordinates(axis, torch.float64), layout.extents[axis], size, layout)
            for axis, size in zip(axes, (plane.shape[3], plane.shape[2]), strict=True)
        ]
        for x in taps[0].index:
            for y in taps[1].index:
                here = plane.isnan().any(dim=1)[:, y][:, :, x]
                nan |= here.transpose(1, 2) if axes[0] == frame.rows_axis(part) else here
    return nan[:, :, None].expand(-1, -1, units, -1)


def test_pixels_that_no_point_looks_at_do_not_count() -> None:
    layout = summed(EG3D)
    frame = Frame.of(INSIDE, layout)
    field = random_field(EG3D)
    planes = [plane.clone() for plane in field.planes]
    planes[1][..., 4] = torch.nan
    tables = tabulate(field._replace(planes=planes), INSIDE, layout, frame)
    d_tables = random_gradients(tables)
    needs = Needs(planes=False, decoder=True)
    expected, found = (
        gradients_of_first_layer(d_tables, f, INSIDE, layout, frame, needs).weight
        for f in (field, field._replace(planes=planes))
    )
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


def test_only_what_is_needed() -> None:
    layout = summed(EG3D)
    frame = Frame.of(INSIDE, layout)
    field = random_field(EG3D)
    d_tables = random_gradients(tabulate(field, INSIDE, layout, frame))
    everything = gradients_of_first_layer(d_tables, field, INSIDE, layout, frame, BOTH)
    planes, decoder = (
        gradients_of_first_layer(d_tables, field, INSIDE, layout, frame, needs)
        for needs in (Needs(True, False), Needs(False, True))
    )
    assert planes.weight is planes.bias is decoder.planes is None
    for ours, theirs in zip(
        [*(planes.planes or []), decoder.weight, decoder.bias], flat(everything), strict=True
    ):
        assert ours is not None
        assert torch.equal(ours, theirs)


def test_gradients_of_stacked_planes_are_parts_of_one_tensor() -> None:
    layout = summed(EG3D)
    frame = Frame.of(INSIDE, layout)
    field = random_field(EG3D, batch=2)
    d_tables = random_gradients(tabulate(field, INSIDE, layout, frame))
    planes = gradients_of_first_layer(d_tables, field, INSIDE, layout, frame, BOTH).planes
    assert planes is not None
    assert len({plane.untyped_storage().data_ptr() for plane in planes}) == 1
    assert planes[0].untyped_storage().nbytes() == sum(plane.nbytes for plane in planes)


def test_empty_batch() -> None:
    layout = summed(EG3D)
    frame = Frame.of(INSIDE, layout)
    field = random_field(EG3D, batch=0)
    tables = tabulate(field, INSIDE, layout, frame)
    assert tables.rows.shape == (0, 3, 6, padded(4))
    gradients = gradients_of_first_layer(tables, field, INSIDE, layout, frame, BOTH)
    assert [plane.shape for plane in gradients.planes or []] == [(0, 3, 5, 7)] * 3
    assert not flat(gradients)[-2].any()
    assert flat(gradients)[-2].shape == (6, 3)
    assert not flat(gradients)[-1].any()


def test_too_many_planes_of_a_table() -> None:
    layout = TriplaneLayout(((0, 1),) * 7, 1.0, "sum")
    with pytest.raises(ValueError, match="at most 6 planes over the same two axes, got 7"):
        tabulate(random_field(layout), INSIDE, layout, Frame.of(INSIDE, layout))
