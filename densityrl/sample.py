"""Seeds to volumes, meshes, images and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from densityrl.export import extract_surface, write_mesh, write_volume
from densityrl.generator import TriplaneGenerator
from densityrl.picture import image_of_tensor, resized, shade_volume, sheet, write_png
from densityrl.run import progress
from densityrl.volume import SlabSettings, slab_of_planes, ws_of_seeds

TILE = 192  # pixels a side of the contact sheet's pictures
THREE_QUARTER = 0.7  # radians of yaw
SIDE = 1.45


@torch.no_grad()
def sample(
    generator: TriplaneGenerator,
    seeds: Sequence[int],
    out: str | Path,
    settings: SlabSettings,
    level: float,
) -> list[int]:
    """Write volumes/, meshes/, images/ and sheet.png for the seeds.

    Returns the seeds whose density crosses `level` nowhere: they have no mesh.
    """
    out = Path(out)
    for folder in ("volumes", "meshes", "images"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    grid = settings.grid(generator.box_side)
    camera = generator.frontal_camera()
    rows, without_surface = [], []
    with progress(len(seeds), "sample") as bar:
        for done, seed in enumerate(seeds, 1):
            name = f"seed{seed:06d}"
            ws = ws_of_seeds(generator, [seed], settings)
            planes = generator.planes(ws)
            sigma = slab_of_planes(generator, planes, settings)[0].cpu()
            write_volume(out / "volumes" / f"{name}.npz", sigma.numpy(), grid)
            surface = extract_surface(sigma.numpy(), grid, level)
            if surface is None:
                without_surface.append(seed)
            else:
                write_mesh(out / "meshes" / f"{name}.ply", *surface)
            image = image_of_tensor(generator.render(ws, camera, planes=planes)["image"][0])
            write_png(out / "images" / f"{name}.png", image)
            views = [
                shade_volume(sigma, grid, level, yaw, size=TILE)
                for yaw in (0.0, THREE_QUARTER, SIDE)
            ]
            rows.append([resized(image, TILE), *views])
            bar.update(done)
    titles = ("render", "surface", "three-quarter", "side")
    write_png(out / "sheet.png", sheet(rows, [str(seed) for seed in seeds], titles))
    return without_surface
