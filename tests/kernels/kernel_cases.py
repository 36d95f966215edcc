"""Random models, layouts that differ in every respect, and how to judge a result."""

import torch
from torch import Tensor

from triplane_kernels import (
    CRM,
    EG3D,
    EG3D_CORRECTED,
    NERFSTUDIO,
    OPENLRM,
    SSDNERF,
    TRIPOSR,
    DensityMLP,
    TriplaneLayout,
)

PRESETS = {
    "eg3d": EG3D,
    "eg3d-corrected": EG3D_CORRECTED,
    "triposr": TRIPOSR,
    "openlrm": OPENLRM,
    "ssdnerf": SSDNERF,
    "crm": CRM,
    "nerfstudio": NERFSTUDIO,
}

LAYOUTS = {
    **PRESETS,
    "one-plane": TriplaneLayout(((1, 2),), 1.5),
    "two-planes": TriplaneLayout(((2, 1), (0, 1)), 1.5, "sum"),
    "all-six-pairs": TriplaneLayout(
        ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)), (1.0, 1.3, 0.8), "concat"
    ),
    "product-of-equal-pairs": TriplaneLayout(((0, 1), (1, 0), (2, 1)), 1.2, "product", "border"),
}


def random_planes(
    layout: TriplaneLayout,
    batch: int = 1,
    channels: int = 3,
    size: tuple[int, int] = (5, 7),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensor:
    """[batch, P, channels, *size]; `size` is (H, W)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(layout.axes), channels, *size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def random_decoder(
    in_channels: int,
    widths: tuple[int, ...] = (6, 4),
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    requires_grad: bool = False,
    **options: object,
) -> DensityMLP:
    """One layer for each of `widths`; the last of them counts density and features."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (in_channels, *widths)

    def parameter(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_(requires_grad)

    return DensityMLP(
        [parameter(n_out, n_in) for n_in, n_out in zip(sizes, widths, strict=False)],
        [parameter(n_out) for n_out in widths],
        **options,
    )


def random_points(
    count: int,
    batch: int = 1,
    scale: float = 1.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
) -> Tensor:
    """Uniform in [-scale, scale]^3: with the layouts here some lie outside the box."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(batch, count, 3, generator=generator, dtype=torch.float64)
    return (scale * (2 * unit - 1)).to(dtype)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference over largest magnitude."""
    scale = exact.detach().abs().max().item()
    return (ours.detach().double() - exact.detach().double()).abs().max().item() / scale
