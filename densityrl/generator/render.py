"""Volume rendering of a triplane: EG3D's sampling and compositing (arXiv:2112.07945, section 4).

Two passes: evenly spaced (or jittered) samples, then samples drawn where the first pass found
matter. Compositing works on intervals between neighbouring samples ("mip" marching, after
Mip-NeRF, arXiv:2103.13415). Oddities of the released code that its weights were trained with are
kept and named where they occur.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triplane_kernels import DensityMLP, TriplaneLayout, radiance

# Rays marched at once where no gradient is asked for; bounds memory, changes no number.
RAYS_PER_CHUNK = 1 << 13


@dataclass(frozen=True)
class MarchingOptions:
    """The part of a checkpoint's rendering options that this module reads."""

    depth_resolution: int
    depth_resolution_importance: int
    ray_start: float | None  # None, in both: entry and exit of the box, per ray
    ray_end: float | None
    box_side: float
    disparity_space_sampling: bool = False
    white_back: bool = False

    @classmethod
    def from_rendering(cls, rendering: Mapping[str, Any]) -> MarchingOptions:
        """Read EG3D's `rendering_kwargs`; unknown modes raise ValueError."""
        clamp_mode = rendering.get("clamp_mode", "softplus")
        if clamp_mode != "softplus":
            raise ValueError(
                f"rendering option clamp_mode={clamp_mode!r} is unknown: give softplus"
            )
        start, end = rendering["ray_start"], rendering["ray_end"]
        if (start == "auto") != (end == "auto"):
            raise ValueError(
                f"ray_start={start!r}, ray_end={end!r}: both must be numbers, or both 'auto'"
            )
        return cls(
            depth_resolution=int(rendering["depth_resolution"]),
            depth_resolution_importance=int(rendering["depth_resolution_importance"]),
            ray_start=None if start == "auto" else float(start),
            ray_end=None if end == "auto" else float(end),
            box_side=float(rendering["box_warp"]),
            disparity_space_sampling=bool(rendering.get("disparity_space_sampling", False)),
            white_back=bool(rendering.get("white_back", False)),
        )


class Composite(NamedTuple):
    """What marching along rays gives; `features` are scaled to [-1, 1]."""

    features: Tensor  # [B, R, F]
    depth: Tensor  # [B, R]
    weight_sum: Tensor  # [B, R]
    weights: Tensor  # [B, R, S - 1]


def box_limits(origins: Tensor, directions: Tensor, side: float) -> tuple[Tensor, Tensor]:
    """Entry and exit depth [B, R] of rays in the centred cube of the given side.

    Rays that miss it get the smallest entry and the largest *entry* of all rays that hit, and
    -1, -2 where none hits: the rule of the released code. An entry may lie behind the camera.
    """
    toward_lo = (-side / 2 - origins) / directions
    toward_hi = (side / 2 - origins) / directions
    start = torch.minimum(toward_lo, toward_hi).amax(dim=-1)
    end = torch.maximum(toward_lo, toward_hi).amin(dim=-1)
    hit = start <= end
    if not bool(hit.any()):
        return torch.full_like(start, -1.0), torch.full_like(start, -2.0)
    entries = start[hit]
    return torch.where(hit, start, entries.min()), torch.where(hit, end, entries.max())


def coarse_depths(start: Tensor, end: Tensor, options: MarchingOptions, jitter: bool) -> Tensor:
    """Depths [B, R, D] from start to end [B, R], both included; jitter adds up to one spacing."""
    count = options.depth_resolution
    t = torch.linspace(0, 1, count, device=start.device, dtype=start.dtype)
    t = t.expand(*start.shape, count)
    if jitter:
        t = t + torch.rand_like(t) / (count - 1)
    start, end = start[..., None], end[..., None]
    if options.disparity_space_sampling:
        return 1 / ((1 - t) / start + t / end)
    return start + t * (end - start)


def interval_weights(depths: Tensor, sigma: Tensor) -> Tensor:
    """Compositing weights [..., S - 1] of the intervals between samples [..., S].

    alpha = 1 - exp(-softplus(mean raw sigma - 1) * length); weight = alpha * transmittance.
    """
    density = F.softplus((sigma[..., :-1] + sigma[..., 1:]) / 2 - 1)
    alpha = 1 - torch.exp(-density * (depths[..., 1:] - depths[..., :-1]))
    passed = torch.cumprod(1 - alpha + 1e-10, dim=-1)
    transmittance = torch.cat([torch.ones_like(passed[..., :1]), passed[..., :-1]], dim=-1)
    return alpha * transmittance


def composite(depths: Tensor, sigma: Tensor, features: Tensor, white_back: bool) -> Composite:
    """March samples: depths and raw sigma [B, R, S], features [B, R, S, F].

    Depth is the weighted mean of interval midpoints. It is not yet clamped to the range of all
    samples: `clamp_depth` does that once the whole batch is known.
    """
    weights = interval_weights(depths, sigma)
    middle = (features[..., :-1, :] + features[..., 1:, :]) / 2
    midpoints = (depths[..., :-1] + depths[..., 1:]) / 2
    weight_sum = weights.sum(dim=-1)
    blended = (weights[..., None, :] @ middle)[..., 0, :]
    if white_back:
        blended = blended + 1 - weight_sum[..., None]
    depth = (weights * midpoints).sum(dim=-1) / weight_sum
    return Composite(blended * 2 - 1, depth, weight_sum, weights)


def clamp_depth(depth: Tensor, nearest: Tensor, farthest: Tensor) -> Tensor:
    """Rays without any weight get the farthest sample's depth; all lie in the sampled range."""
    return depth.nan_to_num(nan=float("inf")).clamp(nearest, farthest)


@torch.no_grad()
def importance_depths(depths: Tensor, weights: Tensor, count: int, jitter: bool) -> Tensor:
    """Draw `count` depths [B, R, count] where the coarse weights [B, R, D - 1] are large.

    Weights are smoothed by a maximum and a mean of neighbours, then sampled by inverting their
    cumulative sum; without jitter at u = linspace(0, 1), ends included. As in the released code
    the weight of an interval is spread between its own midpoint and the one before it.
    """
    peaks = F.max_pool1d(weights.flatten(0, 1)[:, None], 2, stride=1, padding=1)
    smooth = F.avg_pool1d(peaks, 2, stride=1)[:, 0].reshape(weights.shape) + 0.01
    inner = smooth[..., 1:-1] + 1e-5
    probability = inner / inner.sum(dim=-1, keepdim=True)
    cumulative = F.pad(torch.cumsum(probability, dim=-1), (1, 0))
    midpoints = (depths[..., :-1] + depths[..., 1:]) / 2
    shape = (*depths.shape[:-1], count)
    if jitter:
        u = torch.rand(shape, device=depths.device, dtype=depths.dtype)
    else:
        u = torch.linspace(0, 1, count, device=depths.device, dtype=depths.dtype).expand(shape)
    above = torch.searchsorted(cumulative, u.contiguous(), right=True)
    lower = (above - 1).clamp_min(0)
    upper = above.clamp_max(cumulative.shape[-1] - 1)
    c_lower, c_upper = cumulative.gather(-1, lower), cumulative.gather(-1, upper)
    d_lower, d_upper = midpoints.gather(-1, lower), midpoints.gather(-1, upper)
    width = c_upper - c_lower
    width = torch.where(width < 1e-5, torch.ones_like(width), width)
    return d_lower + (u - c_lower) / width * (d_upper - d_lower)


def merge_samples(
    depths: tuple[Tensor, Tensor], sigma: tuple[Tensor, Tensor], features: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Join two sets of samples and sort them by depth."""
    all_depths, order = torch.cat(depths, dim=-1).sort(dim=-1)
    all_sigma = torch.cat(sigma, dim=-1).gather(-1, order)
    all_features = torch.cat(features, dim=-2)
    index = order[..., None].expand(-1, -1, -1, all_features.shape[-1])
    return all_depths, all_sigma, all_features.gather(-2, index)


def eg3d_color(raw: Tensor) -> Tensor:
    """Raw decoder features to the open range that EG3D composites: sigmoid, widened by 0.001."""
    return torch.sigmoid(raw) * 1.002 - 0.001


def render_rays(
    planes: Tensor,
    decoder: DensityMLP,
    layout: TriplaneLayout,
    origins: Tensor,
    directions: Tensor,
    options: MarchingOptions,
    jitter: bool = False,
    color: Callable[[Tensor], Tensor] = eg3d_color,
) -> Composite:
    """Render rays [B, R, 3] through planes [B, P, C, H, W].

    Differentiable in planes and decoder; sample depths are constants. Without a gradient, rays
    go in chunks.
    """
    if options.ray_start is None or options.ray_end is None:
        start, end = box_limits(origins, directions, options.box_side)
    else:
        start = torch.full_like(origins[..., 0], options.ray_start)
        end = torch.full_like(origins[..., 0], options.ray_end)

    def samples(depths: Tensor, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        points = o[..., None, :] + depths[..., None] * d[..., None, :]
        sigma, raw = radiance(planes, decoder, points.flatten(1, 2), layout)
        return sigma.unflatten(1, depths.shape[1:]), color(raw).unflatten(1, depths.shape[1:])

    def march(o: Tensor, d: Tensor, s: Tensor, e: Tensor) -> tuple[Composite, Tensor]:
        depths = coarse_depths(s, e, options, jitter)
        sigma, features = samples(depths, o, d)
        count = options.depth_resolution_importance
        if count > 0:
            with torch.no_grad():
                weights = interval_weights(depths, sigma)
            fine = importance_depths(depths, weights, count, jitter)
            fine_sigma, fine_features = samples(fine, o, d)
            depths, sigma, features = merge_samples(
                (depths, fine), (sigma, fine_sigma), (features, fine_features)
            )
        limits = torch.stack([depths.amin(), depths.amax()])
        return composite(depths, sigma, features, options.white_back), limits

    rays = (origins, directions, start, end)
    if torch.is_grad_enabled():
        whole, limits = march(*rays)
    else:
        parts = [
            march(*chunk)
            for chunk in zip(*(x.split(RAYS_PER_CHUNK, dim=1) for x in rays), strict=True)
        ]
        whole = Composite(
            *(torch.cat(field, dim=1) for field in zip(*(p for p, _ in parts), strict=True))
        )
        limits = torch.stack([part for _, part in parts])
    return whole._replace(depth=clamp_depth(whole.depth, limits.amin(), limits.amax()))
