"""Base against tuned: figures against their definitions, and the page."""

import html.parser
import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_generator, tiny_reward

from densityrl.evaluation import evaluate
from densityrl.evaluation.compare import psnr
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, density_slab

SEEDS = range(50, 56)
SETTINGS = SlabSettings(resolution=16, truncation_psi=0.6)


def test_psnr():
    black, grey = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -0.5)
    assert psnr(black, grey) == pytest.approx(10 * math.log10(4 / 0.25))
    assert psnr(black, black) == math.inf
    assert psnr(black - 3, black) == math.inf  # compared as they are shown


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    base, tuned = tiny_generator(0), tiny_generator(0)
    tuned.osg_decoder.net[2].bias[0] += 0.4  # denser everywhere
    tuned.osg_decoder.net[0].weight.mul_(1.1)
    about = {"base": "a <b>", "tuned": "t", "reward": "r"}
    summary = evaluate(
        base, tuned, tiny_reward(SETTINGS), SEEDS, out, level=6.0, pictures=3, about=about
    )
    return out, base, tuned, summary


def test_figures(evaluated):
    out, base, tuned, summary = evaluated
    written = json.loads((out / "evaluation.json").read_text())
    assert {k: v for k, v in written.items() if k != "per_seed"} == summary
    rewards = [
        tiny_reward(SETTINGS).score_slab(density_slab(g, SEEDS, SETTINGS)) for g in (base, tuned)
    ]
    rows = written["per_seed"]
    assert [row["seed"] for row in rows] == list(SEEDS)
    for index, name in enumerate(("base_reward", "tuned_reward")):
        np.testing.assert_allclose([r[name] for r in rows], rewards[index], rtol=1e-4, atol=1e-5)
    wins = int((rewards[1] > rewards[0]).sum())
    assert summary["tuned_preferred"] == wins / 6
    assert summary["tuned_preferred_interval"] == pytest.approx(list(wilson_interval(wins, 6)))
    assert summary["drift"] > 0.1
    assert 5 < summary["appearance_psnr_db"] < 60


class Page(html.parser.HTMLParser):
    """Text, pictures and tags left open."""

    def __init__(self, content):
        super().__init__()
        self.images, self.text, self.open = [], "", []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page(evaluated):
    out, _, _, summary = evaluated
    page = Page((out / "report.html").read_text())
    assert page.open == []
    assert len(page.images) == 3 * 9
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert "a <b>" in page.text
    assert f"{100 * summary['tuned_preferred']:.1f} %" in page.text
    rows = json.loads((out / "evaluation.json").read_text())["per_seed"]
    gains = {row["seed"]: row["tuned_reward"] - row["base_reward"] for row in rows}
    for extreme in (min, max):
        assert f"seed {extreme(gains, key=gains.get)}:" in page.text


def test_a_generator_against_itself(tmp_path):
    generator = tiny_generator()
    summary = evaluate(generator, generator, tiny_reward(), [1, 2], tmp_path, level=6.0)
    assert summary["tuned_preferred"] == 0.5  # ties are halves
    assert summary["drift"] == 0
    assert summary["appearance_psnr_db"] is None
    assert "equal images" in (tmp_path / "report.html").read_text()
