"""The triplane generator: latent -> planes -> density and image (EG3D, arXiv:2112.07945)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densityrl.generator import camera
from densityrl.generator.backbone import Backbone, MappingNetwork, SynthesisNetwork
from densityrl.generator.layers import FullyConnected, NoiseMode
from densityrl.generator.render import MarchingOptions, render_rays
from densityrl.generator.superresolution import FEATURE_CHANNELS, SuperResolution
from triplane_kernels import EG3D, DensityMLP, TriplaneLayout

PLANES = 3


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Everything about a generator but its weights."""

    z_dim: int
    w_dim: int
    c_dim: int = 25  # 0 or a camera of 25 numbers
    mapping_layers: int = 2
    mapping_features: int | None = None  # None: w_dim
    embed_features: int | None = None  # None: w_dim
    mapping_lr_mul: float = 0.01
    synthesis_channels: tuple[int, ...]  # width of each block from 4x4 up; sets the plane side
    synthesis_clamp: float | None = None
    plane_channels: int = FEATURE_CHANNELS
    plane_axes: tuple[tuple[int, int], ...] = EG3D.axes
    decoder_hidden: int = 64
    decoder_features: int = FEATURE_CHANNELS
    decoder_lr_mul: float = 1.0
    superresolution: str | None = None  # class name; None: the rendered image is the final one
    superresolution_clamp: float | None = 256.0
    superresolution_antialias: bool = True
    rendering: dict[str, Any] = field(default_factory=dict)  # EG3D's rendering_kwargs
    neural_rendering_resolution: int = 64
    # Half-open ranges of latent numbers by name; empty where they mean nothing by themselves.
    latent_groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    millimetres: float | None = None  # a world unit, where the scene has a size

    def __post_init__(self) -> None:
        for name, (start, end) in self.latent_groups.items():
            if not 0 <= start < end <= self.z_dim:
                raise ValueError(
                    f"latent group {name!r} must be a range within 0 to {self.z_dim}, "
                    f"not {start} to {end}"
                )
        if self.millimetres is not None and not 0 < self.millimetres < math.inf:
            raise ValueError(f"millimetres must be a positive length, not {self.millimetres}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GeneratorConfig:
        """Inverse of `dataclasses.asdict` after a trip through JSON."""
        values = dict(values)
        values["synthesis_channels"] = tuple(values["synthesis_channels"])
        values["plane_axes"] = tuple(tuple(axes) for axes in values["plane_axes"])
        groups = values.get("latent_groups", {})  # absent from older files
        values["latent_groups"] = {name: tuple(ends) for name, ends in groups.items()}
        return cls(**values)


class OSGDecoder(nn.Module):
    """The decoder's parameters: two fully connected layers with a softplus between."""

    def __init__(self, in_features: int, hidden: int, out_features: int, lr_mul: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            FullyConnected(in_features, hidden, lr_mul=lr_mul),
            nn.Softplus(),
            FullyConnected(hidden, out_features, lr_mul=lr_mul),
        )

    def effective(self) -> DensityMLP:
        layers = [layer for layer in self.net if isinstance(layer, FullyConnected)]
        weights, biases = zip(*(layer.effective() for layer in layers), strict=True)
        return DensityMLP(weights, biases, hidden="softplus")


class TriplaneGenerator(nn.Module):
    """A pretrained 3D-aware GAN of EG3D's kind.

    World axes: x to the subject's left, y up, z toward the camera of the frontal view. `decoder`
    and `layout` describe the density to `triplane_kernels`; the density they give is raw, before
    the marcher's softplus(sigma - 1).
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        synthesis = SynthesisNetwork(
            config.w_dim,
            config.synthesis_channels,
            PLANES * config.plane_channels,
            config.synthesis_clamp,
        )
        mapping = MappingNetwork(
            config.z_dim,
            config.c_dim,
            config.w_dim,
            config.mapping_layers,
            config.mapping_features,
            config.embed_features,
            config.mapping_lr_mul,
        )
        self.backbone = Backbone(mapping, synthesis)
        self.superresolution = (
            None
            if config.superresolution is None
            else SuperResolution(
                config.superresolution,
                config.w_dim,
                config.superresolution_clamp,
                config.superresolution_antialias,
            )
        )
        self.osg_decoder = OSGDecoder(
            config.plane_channels,
            config.decoder_hidden,
            1 + config.decoder_features,
            config.decoder_lr_mul,
        )

    # --- what a caller describes to triplane_kernels -------------------------------------------

    @property
    def decoder(self) -> DensityMLP:
        """Effective weights, gains folded in; gradients flow to the stored parameters."""
        return self.osg_decoder.effective()

    @property
    def layout(self) -> TriplaneLayout:
        return TriplaneLayout(self.config.plane_axes, float(self.rendering["box_warp"]))

    @property
    def box_side(self) -> float:
        """Side of the cube that holds the scene, in world units."""
        return float(self.rendering["box_warp"])

    @property
    def rendering(self) -> dict[str, Any]:
        """The checkpoint's own rendering options, under EG3D's names."""
        return self.config.rendering

    @property
    def z_dim(self) -> int:
        return self.config.z_dim

    @property
    def c_dim(self) -> int:
        return self.config.c_dim

    @property
    def w_dim(self) -> int:
        return self.config.w_dim

    @property
    def num_ws(self) -> int:
        return self.backbone.synthesis.num_ws

    @property
    def device(self) -> torch.device:
        return self.backbone.mapping.w_avg.device

    # --- latent to image -----------------------------------------------------------------------

    def frontal_camera(self, yaw: float = 0.0, pitch: float = 0.0) -> Tensor:
        """[1, 25] camera that looks at the subject from the front, or turned by yaw and pitch.

        Radius and pivot are the checkpoint's (`avg_camera_radius`, `avg_camera_pivot`); the field
        of view is FFHQ's unless the checkpoint says `camera_fov_deg`.
        """
        pose = camera.camera_pose(
            yaw,
            pitch,
            self.rendering.get("avg_camera_pivot", (0.0, 0.0, 0.0)),
            float(self.rendering.get("avg_camera_radius", 2.7)),
        )
        fov_deg = float(self.rendering.get("camera_fov_deg", camera.FFHQ_FOV_DEG))
        return camera.camera_label(pose, camera.intrinsics(fov_deg)).to(self.device)

    def mapping(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """z [B, z_dim] and conditioning camera c [B or 1, 25] (None: frontal) -> ws [B, L, w_dim].

        The first `truncation_cutoff` rows (all when None) are drawn toward the mean latent:
        w_avg + psi * (w - w_avg).
        """
        self._check_latents(z)
        if self.c_dim == 0:
            c = None
        else:
            c = self.frontal_camera() if c is None else self._check_camera(c)
            c = c.to(self.device).expand(z.shape[0], -1)
            if self.rendering.get("c_gen_conditioning_zero", True):
                c = torch.zeros_like(c)
            # A checkpoint without the option ignores the camera: that is what EG3D's code does.
            c = c * float(self.rendering.get("c_scale", 0))
        w = self.backbone.mapping(z, c)
        ws = w[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws.clone()
        mean = self.backbone.mapping.w_avg
        rows = self.num_ws if truncation_cutoff is None else truncation_cutoff
        truncated = mean + truncation_psi * (ws[:, :rows] - mean)
        return torch.cat([truncated, ws[:, rows:]], dim=1)

    def without_faults(self, z: Tensor) -> Tensor:
        """Latents [B, z_dim] of the clean twins of z: the same heads without their faults.

        The numbers of the group `faults` become 0. Those of `spare`, which mean nothing, grow so
        that each row keeps its length: the mapping network normalises it, and would otherwise
        exaggerate everything else about the head.
        """
        self._check_latents(z)
        groups = self.config.latent_groups
        if not {"faults", "spare"} <= groups.keys():
            raise ValueError(
                "this generator has no latent groups named faults and spare, so a head has no "
                "clean twin: take one that was trained with them"
            )
        faults, spare = (slice(*groups[name]) for name in ("faults", "spare"))
        lost = z[:, faults].double().square().sum(dim=1, keepdim=True)
        filler = z[:, spare].double()
        # Spare numbers that are all 0 have no direction to grow in: any one will do.
        filler = torch.where((filler == 0).all(dim=1, keepdim=True), 1e-12, filler)
        length = filler.square().sum(dim=1, keepdim=True)
        clean = z.clone()
        clean[:, faults] = 0
        clean[:, spare] = (filler * (1 + lost / length).sqrt()).to(z.dtype)
        return clean

    def planes(self, ws: Tensor, noise_mode: NoiseMode = "const") -> Tensor:
        """ws [B, L, w_dim] -> planes [B, 3, C, H, W], float32."""
        image = self.backbone.synthesis(ws, noise_mode)
        return image.unflatten(1, (PLANES, self.config.plane_channels))

    def render(
        self,
        ws: Tensor,
        c: Tensor,
        resolution: int | None = None,
        jitter: bool = False,
        noise_mode: NoiseMode = "const",
        planes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Render from cameras c [B or 1, 25].

        `resolution` is the side of the volume-rendered image (None: the checkpoint's);
        `jitter=False` is deterministic: no coarse jitter, importance samples at
        u = linspace(0, 1). `planes` saves computing them again. Returns image [B, 3, R, R] and
        image_raw [B, 3, r, r] in about [-1, 1], and image_depth [B, 1, r, r], the distance along
        each ray. image_raw is always what was rendered (for two super-resolution classes EG3D's
        own return value is not: it is overwritten in place).
        """
        side = resolution or self.config.neural_rendering_resolution
        if planes is None:
            planes = self.planes(ws, noise_mode)
        features, depth = self._render_features(planes, c, side, jitter)
        raw = features[:, :3]
        image = raw
        if self.superresolution is not None:
            mode = self.rendering.get("superresolution_noise_mode", "none")
            image = self.superresolution(raw, features, ws, mode)
        return {"image": image, "image_raw": raw, "image_depth": depth}

    def render_raw(self, planes: Tensor, c: Tensor, resolution: int) -> Tensor:
        """The volume-rendered colour alone, [B, 3, r, r]: no super-resolution, deterministic."""
        return self._render_features(planes, c, resolution, jitter=False)[0][:, :3]

    def _render_features(
        self, planes: Tensor, c: Tensor, side: int, jitter: bool
    ) -> tuple[Tensor, Tensor]:
        c = self._check_camera(c).to(self.device).expand(planes.shape[0], -1)
        rays = render_rays(
            planes,
            self.decoder,
            self.layout,
            *camera.pixel_rays(c, side),
            MarchingOptions.from_rendering(self.rendering),
            jitter,
        )
        features = rays.features.mT.unflatten(2, (side, side))
        return features, rays.depth[:, None].unflatten(2, (side, side))

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must be [B, {self.z_dim}], not {list(z.shape)}")

    @staticmethod
    def _check_camera(c: Tensor) -> Tensor:
        if c.ndim != 2 or c.shape[1] != 25:
            raise ValueError(
                f"c must be [B, 25] (4x4 camera-to-world, 3x3 intrinsics), not {list(c.shape)}"
            )
        return c

    # --- identity and precision ----------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hex digest of configuration and every weight: equal digests, equal outputs."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def convolutions_to(self, dtype: torch.dtype) -> TriplaneGenerator:
        """Run synthesis and super-resolution in `dtype` (bfloat16 halves their memory).

        Mapping, images that add up along the skips, decoder and coordinates stay in float32.
        """
        self.backbone.synthesis.to(dtype)
        if self.superresolution is not None:
            self.superresolution.to(dtype)
        return self


def latents(seeds: Sequence[int], z_dim: int) -> Tensor:
    """[len(seeds), z_dim] float32; row i is numpy's RandomState(seeds[i]).randn(1, z_dim).

    The convention of StyleGAN's and EG3D's scripts, so that a seed means the same head here.
    """
    rows = [np.random.RandomState(seed).randn(z_dim) for seed in seeds]
    return torch.tensor(np.array(rows).reshape(-1, z_dim), dtype=torch.float32)
