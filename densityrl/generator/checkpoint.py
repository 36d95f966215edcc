"""Generators on disk: our own directory, and EG3D's pickles read without executing them.

A directory holds `generator.json` (configuration, provenance, digest of the weights) and
`generator.safetensors` (tensors under EG3D's names).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densityrl.errors import CheckpointError
from densityrl.generator.model import PLANES, GeneratorConfig, TriplaneGenerator
from densityrl.generator.pickle_reader import NetworkRecord, read_network_pickle
from densityrl.generator.superresolution import VARIANTS
from densityrl.run import atomic_write
from triplane_kernels import EG3D

FORMAT = "densityrl-generator"
FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS = "generator.json", "generator.safetensors"
BUNDLED = Path(__file__).parent / "bundled"

# In EG3D's files the decoder's tensors are `decoder.*`; here `decoder` is what callers hand to
# triplane_kernels, so the module that holds the parameters has another name.
_OURS, _THEIRS = "osg_decoder.", "decoder."
# A statistic of EG3D's training set that travels in its files; nothing here reads it.
_UNUSED = frozenset({"dataset_label_std"})


def bundled_generators() -> list[str]:
    """Words that `load_generator` takes for generators shipped with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{DESCRIPTION}"))


def load_generator(
    source: str | Path, device: str | torch.device = "cpu", which: str = "G_ema"
) -> TriplaneGenerator:
    """Load a generator in evaluation mode, its parameters requiring no gradient.

    source: the word of a bundled generator, an EG3D `.pkl`, or a directory written by
    `save_generator`. `which` picks the network of a pickle: G_ema (the averaged one) or G.
    Raises CheckpointError with one sentence if that cannot be done.
    """
    path = Path(source)
    if isinstance(source, str) and source in bundled_generators():
        path = BUNDLED / source
    if not path.exists():
        raise CheckpointError(
            f"no generator at {path}: give an EG3D .pkl, a directory, "
            f"or a bundled one ({', '.join(bundled_generators())})"
        )
    if path.is_dir():
        generator = _read_directory(path)
    else:
        if which not in ("G", "G_ema"):
            raise CheckpointError(f"which={which!r} is no generator: give G_ema or G")
        generator = generator_from_record(read_network_pickle(path, which), str(path))
    return generator.eval().requires_grad_(False).to(device)


def save_generator(
    generator: TriplaneGenerator, path: str | Path, provenance: dict[str, Any] | None = None
) -> None:
    """Write a directory that `load_generator` reads; each file appears whole or not at all.

    `provenance` is kept as it is: where the weights come from, by which run.
    """
    from safetensors.torch import save

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        _renamed(name, _OURS, _THEIRS): tensor.detach().cpu().contiguous()
        for name, tensor in generator.state_dict().items()
    }
    data = save(tensors)
    description = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "config": asdict(generator.config),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest()},
        "provenance": provenance or {},
    }
    atomic_write(path / WEIGHTS, data)
    atomic_write(path / DESCRIPTION, json.dumps(description, indent=1))


def _read_directory(path: Path) -> TriplaneGenerator:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        description = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        data = (path / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} holds no generator: {Path(str(error.filename)).name} is missing"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path / DESCRIPTION} is not JSON") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path / DESCRIPTION} does not describe a {FORMAT}")
    if description.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description.get('version')}; this release reads "
            f"version {FORMAT_VERSION}"
        )
    if hashlib.sha256(data).hexdigest() != description.get("weights", {}).get("sha256"):
        raise CheckpointError(
            f"{path / WEIGHTS} and {DESCRIPTION} do not belong together (a copy or a write was "
            "cut short): copy the directory again, or resume the run that wrote it"
        )
    try:
        config = GeneratorConfig.from_json(description["config"])
        return _assemble(config, load(data), str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path / WEIGHTS} is not a safetensors file: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path / DESCRIPTION} has an unusable config: {error!r}") from None


def generator_from_record(record: NetworkRecord, name: str) -> TriplaneGenerator:
    """Build the generator that an EG3D network record describes; its live state counts."""
    if record.class_name != "TriPlaneGenerator":
        raise CheckpointError(
            f"{name} holds a {record.class_name}, not EG3D's TriPlaneGenerator: "
            "that architecture is not supported"
        )
    try:
        return _assemble(config_from_record(record), record.tensors, name)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
        raise CheckpointError(
            f"{name} is not the EG3D generator it claims to be: {e!r} while reading its options"
        ) from None


def config_from_record(record: NetworkRecord) -> GeneratorConfig:
    """Derive the configuration from tensor shapes and the record's live attributes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in record.tensors.items()}
    rendering = dict(record.attributes["rendering_kwargs"])
    prefix = "backbone.synthesis.b"
    sides = sorted(
        int(key[len(prefix) :].split(".")[0])
        for key in shapes
        if key.endswith(".conv1.weight") and key.startswith(prefix)
    )
    if sides != [4 << index for index in range(len(sides))]:
        raise ValueError(f"synthesis blocks of sides {sides}")
    mapping_layers = sum(
        key.startswith("backbone.mapping.fc") and key.endswith(".weight") for key in shapes
    )
    embed = shapes.get("backbone.mapping.embed.weight")
    image_channels = shapes[f"{prefix}{sides[-1]}.torgb.weight"][0]
    superresolution = record.modules.get("superresolution")
    if superresolution is not None and superresolution.class_name not in VARIANTS:
        raise ValueError(
            f"super-resolution class {superresolution.class_name} (known: {', '.join(VARIANTS)})"
        )
    return GeneratorConfig(
        z_dim=int(record.attributes["z_dim"]),
        w_dim=shapes["backbone.mapping.w_avg"][0],
        c_dim=0 if embed is None else embed[1],
        mapping_layers=mapping_layers,
        mapping_features=shapes["backbone.mapping.fc0.weight"][0],
        embed_features=None if embed is None else embed[0],
        mapping_lr_mul=float(record.modules["backbone.mapping.fc0"].attributes["bias_gain"]),
        synthesis_channels=tuple(shapes[f"{prefix}{side}.conv1.weight"][0] for side in sides),
        synthesis_clamp=_clamp(record, f"{prefix}{sides[-1]}.conv1"),
        plane_channels=image_channels // PLANES,
        plane_axes=_plane_axes(record),
        decoder_hidden=shapes["decoder.net.0.weight"][0],
        decoder_features=shapes["decoder.net.2.weight"][0] - 1,
        decoder_lr_mul=float(record.modules["decoder.net.0"].attributes["bias_gain"]),
        superresolution=None if superresolution is None else superresolution.class_name,
        superresolution_clamp=(
            None if superresolution is None else _clamp(record, "superresolution.block0.conv1")
        ),
        superresolution_antialias=bool(rendering.get("sr_antialias", True)),
        rendering=rendering,
        neural_rendering_resolution=int(record.attributes["neural_rendering_resolution"]),
    )


def _clamp(record: NetworkRecord, module: str) -> float | None:
    value = record.modules[module].attributes["conv_clamp"]
    return None if value is None else float(value)


def _plane_axes(record: NetworkRecord) -> tuple[tuple[int, int], ...]:
    """Read the renderer's three axis matrices: a point's plane coordinates are x @ inverse."""
    renderer = record.modules.get("renderer")
    matrices = None if renderer is None else renderer.attributes.get("plane_axes")
    if matrices is None:
        return EG3D.axes
    if not isinstance(matrices, Tensor) or matrices.shape != (PLANES, 3, 3):
        raise ValueError("renderer.plane_axes that is not a [3, 3, 3] tensor")
    columns = np.linalg.inv(matrices.double().numpy())[:, :, :2]
    if not (np.isin(columns, (0, 1)).all() and (columns.sum(axis=1) == 1).all()):
        raise ValueError("plane axes that are not permutations of x, y and z")
    return tuple((int(a), int(b)) for a, b in columns.argmax(axis=1))


def _assemble(config: GeneratorConfig, tensors: dict[str, Tensor], name: str) -> TriplaneGenerator:
    """The generator that config describes, holding these tensors; every name and shape must match.

    Memory is taken for the tensors only, whatever sizes the configuration claims.
    """
    with torch.device("meta"):
        generator = TriplaneGenerator(config)
    own = generator.state_dict()
    given = {
        _renamed(key, _THEIRS, _OURS): tensor
        for key, tensor in tensors.items()
        if key not in _UNUSED
    }
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        fault, keys = ("lacks", missing) if missing else ("has unknown", unknown)
        raise CheckpointError(
            f"{name} {fault} {len(keys)} tensor{'s'[: len(keys) > 1]}, "
            f"among them {_renamed(keys[0], _OURS, _THEIRS)}"
        )
    for key, tensor in given.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"{name}: {_renamed(key, _OURS, _THEIRS)} has shape {list(tensor.shape)}, "
                f"expected {list(own[key].shape)}"
            )
    copies = {
        key: torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
        for key, tensor in given.items()
    }
    generator.load_state_dict(copies, assign=True)
    return generator


def _renamed(key: str, old: str, new: str) -> str:
    return new + key[len(old) :] if key.startswith(old) else key
