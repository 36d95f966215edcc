"""The evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densityrl.picture import png_bytes
from densityrl.run import atomic_write

HISTOGRAM_BINS = 24


# What a row of the gallery shows in full size, then what it shows smaller: names of pictures as
# `seed_pictures` gives them, and captions.
LARGE = {
    "base three-quarter": "surface before",
    "tuned three-quarter": "surface after",
    "base render": "render before",
    "tuned render": "render after",
}
SMALL = {
    "base front": "front before",
    "tuned front": "front after",
    "density change, middle slice": "density change",
    "base side": "side before",
    "tuned side": "side after",
}


@dataclass(frozen=True)
class SimulatedJudgement:
    """A simulated annotator's scores of one latent in both generators; larger is better.

    Distances are mean distances to the surface of the clean head, where the annotator judges by
    them: in millimetres where the base generator has a scale, else in world units.
    """

    base_score: float
    tuned_score: float
    base_distance: float | None = None
    tuned_distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class SeedComparison:
    """One latent in both generators; pictures are final images, tuned against base."""

    seed: int
    base_reward: float
    tuned_reward: float
    drift: float  # mean |difference of raw density| over 64^3 points of the whole box
    psnr: float  # dB, from the front
    ssim: float
    side_psnr: float  # dB, mean of the side views
    side_ssim: float
    simulated: SimulatedJudgement | None = None

    @property
    def gain(self) -> float:
        return self.tuned_reward - self.base_reward

    def to_json(self) -> dict[str, Any]:
        """The fields; null for what equal images have, an infinite PSNR."""
        values = asdict(self)
        for name in ("psnr", "side_psnr"):
            values[name] = values[name] if math.isfinite(values[name]) else None
        return values


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    shown: Sequence[SeedComparison],
    tiles: Sequence[Mapping[str, np.ndarray]],
    gains: np.ndarray,
) -> None:
    """Write the page: the figures, a row of pictures a shown seed, and a histogram of gains."""
    from jinja2 import Environment

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    rows = [
        {
            "result": result,
            "large": _encoded(pictures, LARGE),
            "small": _encoded(pictures, SMALL),
        }
        for result, pictures in zip(shown, tiles, strict=True)
    ]
    counts, edges = np.histogram(gains, bins=HISTOGRAM_BINS)
    bars = [
        {"low": low, "high": high, "count": int(count), "height": count / max(counts.max(), 1)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    atomic_write(path, page.render(summary=summary, rows=rows, bars=bars))


def _encoded(
    pictures: Mapping[str, np.ndarray], captions: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Captions, and the pictures they are of as base64 of PNGs."""
    return [
        (caption, base64.b64encode(png_bytes(pictures[name])).decode())
        for name, caption in captions.items()
    ]
