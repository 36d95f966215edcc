"""The evaluation as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from densityrl.picture import png_bytes
from densityrl.run import atomic_write

HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class SeedComparison:
    """One latent in both generators."""

    seed: int
    base_reward: float
    tuned_reward: float
    drift: float  # mean |difference of raw density| over 64^3 points of the whole box
    psnr: float  # dB, of the final image from the front, tuned against base

    @property
    def gain(self) -> float:
        return self.tuned_reward - self.base_reward


def write_report(
    path: str | Path,
    summary: Mapping[str, Any],
    shown: Sequence[SeedComparison],
    tiles: Sequence[Mapping[str, np.ndarray]],
    gains: np.ndarray,
) -> None:
    """Write the page: the summary, a histogram of gains, and a row of pictures a shown seed."""
    from jinja2 import Environment

    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    rows = [
        {
            "result": result,
            "pictures": [
                (name, base64.b64encode(png_bytes(picture)).decode())
                for name, picture in pictures.items()
            ],
        }
        for result, pictures in zip(shown, tiles, strict=True)
    ]
    counts, edges = np.histogram(gains, bins=HISTOGRAM_BINS)
    bars = [
        {"low": low, "high": high, "count": int(count), "height": count / max(counts.max(), 1)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    atomic_write(path, page.render(summary=summary, rows=rows, bars=bars))
