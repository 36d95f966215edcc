"""Base against tuned: figures against their definitions, and the page."""

import html.parser
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_generator, tiny_reward

from densityrl.evaluation import evaluate
from densityrl.evaluation.appearance import psnr, ssim
from densityrl.generator import TriplaneGenerator
from densityrl.geometry import surface_distance
from densityrl.preference.oracle import SimulatedAnnotator, clean_volumes
from densityrl.statistics import wilson_interval
from densityrl.volume import SlabSettings, density_slab, ws_of_seeds

SEEDS = range(50, 56)
SETTINGS = SlabSettings(resolution=16, truncation_psi=0.6)
LEVEL = 6.0


def generator_with_faults(**config):
    """tiny_generator(0) with groups of its latent, of which one stands for faults."""
    plain = tiny_generator(0)
    config = replace(plain.config, latent_groups={"faults": (4, 7), "spare": (7, 8)}, **config)
    generator = TriplaneGenerator(config).eval().requires_grad_(False)
    generator.load_state_dict(plain.state_dict())
    return generator


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    base, tuned = (generator_with_faults(millimetres=250.0) for _ in range(2))
    tuned.osg_decoder.net[2].bias[0] += 0.4  # denser everywhere
    tuned.osg_decoder.net[0].weight.mul_(1.1)
    about = {"base": "a <b>", "tuned": "t", "reward": "r"}
    summary = evaluate(
        base,
        tuned,
        tiny_reward(SETTINGS),
        SEEDS,
        out,
        level=LEVEL,
        annotator=SimulatedAnnotator(rule="clean", level=LEVEL),
        pictures=3,
        about=about,
    )
    return out, base, tuned, summary


def test_figures(evaluated):
    out, base, tuned, summary = evaluated
    assert json.loads((out / "evaluation.json").read_text()) == summary
    rewards = [
        tiny_reward(SETTINGS).score_slab(density_slab(g, SEEDS, SETTINGS)) for g in (base, tuned)
    ]
    rows = summary["per_seed"]
    assert [row["seed"] for row in rows] == list(SEEDS)
    for index, name in enumerate(("base_reward", "tuned_reward")):
        np.testing.assert_allclose([r[name] for r in rows], rewards[index], rtol=1e-4, atol=1e-5)
    wins = int((rewards[1] > rewards[0]).sum())
    assert summary["tuned_preferred"] == wins / 6
    assert summary["tuned_preferred_interval"] == pytest.approx(list(wilson_interval(wins, 6)))
    assert summary["drift"] > 0.1


def test_appearance(evaluated):
    _, base, tuned, summary = evaluated
    assert 5 < summary["appearance_psnr_db"] < 60
    first = summary["per_seed"][0]
    ws = {g: ws_of_seeds(g, SEEDS[:1], SETTINGS) for g in (tuned, base)}
    views = [
        [g.render(ws[g], g.frontal_camera(yaw))["image"][0] for g in (tuned, base)]
        for yaw in (0, -math.pi / 6, math.pi / 6)
    ]
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        front, left, right = (measure(*view) for view in views)
        assert first[name] == pytest.approx(front, rel=1e-3)
        assert first[f"side_{name}"] == pytest.approx((left + right) / 2, rel=1e-3)
    for name, of_all in (("ssim", "appearance_ssim"), ("side_psnr", "side_psnr_db")):
        assert summary[of_all] == pytest.approx(np.mean([r[name] for r in summary["per_seed"]]))


def test_simulated_annotator(evaluated):
    """The clean rule is the distance from the base's clean twins, in the unit that is named."""
    _, base, tuned, summary = evaluated
    settings = replace(SETTINGS, resolution=64)
    grid = settings.grid(1.0)
    clean = clean_volumes(base, SEEDS, settings)
    before, after = (
        np.array(
            [
                surface_distance(volume.numpy(), twin.numpy(), grid, LEVEL)
                for volume, twin in zip(density_slab(g, SEEDS, settings), clean, strict=True)
            ]
        )
        for g in (base, tuned)
    )
    judged = summary["simulated_annotator"]
    wins = int((after < before).sum())
    assert judged["rule"] == "clean"
    assert judged["tuned_preferred"] == wins / 6
    assert judged["tuned_preferred_interval"] == pytest.approx(list(wilson_interval(wins, 6)))
    assert judged["base_distance"] == pytest.approx(250 * before.mean(), rel=1e-3)
    assert judged["tuned_distance"] == pytest.approx(250 * after.mean(), rel=1e-3)
    assert judged["distance_unit"] == "mm"
    per_seed = [row["simulated"]["tuned_distance"] for row in summary["per_seed"]]
    np.testing.assert_allclose(per_seed, 250 * after, rtol=1e-3)
    scores = SimulatedAnnotator(rule="clean", level=LEVEL).scores(
        density_slab(tuned, SEEDS, settings), grid, clean
    )
    assert judged["tuned_score"] == pytest.approx(scores.mean(), rel=1e-3)


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
    for judge in (summary, summary["simulated_annotator"]):
        assert f"{100 * judge['tuned_preferred']:.1f} %" in page.text
    assert "by a simulated annotator, rule “clean”" in page.text
    assert "a rule that prefers the head whose surface is nearer" in page.text
    assert f"{summary['simulated_annotator']['tuned_distance']:.3g} mm" in page.text
    gains = {row["seed"]: row["tuned_reward"] - row["base_reward"] for row in summary["per_seed"]}
    for extreme in (min, max):
        assert f"seed {extreme(gains, key=gains.get)}" in page.text


def test_a_rule_without_clean_twins(tmp_path):
    generator = tiny_generator()
    annotator = SimulatedAnnotator(rule="symmetric", level=LEVEL)
    summary = evaluate(
        generator,
        generator,
        tiny_reward(),
        [1, 2],
        tmp_path,
        level=LEVEL,
        annotator=annotator,
        pictures=1,
    )
    judged = summary["simulated_annotator"]
    assert judged["tuned_preferred"] == 0.5  # ties are halves
    assert judged["base_score"] == judged["tuned_score"]
    assert "base_distance" not in judged
    assert "simulated annotator's mean score" in (tmp_path / "report.html").read_text()


def test_distances_without_a_scale_are_in_world_units(tmp_path):
    generator = generator_with_faults()
    annotator = SimulatedAnnotator(rule="clean", level=LEVEL)
    summary = evaluate(
        generator, generator, tiny_reward(), [1], tmp_path, level=LEVEL, annotator=annotator
    )
    judged = summary["simulated_annotator"]
    assert judged["distance_unit"] == "world units"
    assert 0 < judged["base_distance"] < 0.05


def test_a_generator_against_itself(tmp_path):
    generator = tiny_generator()
    summary = evaluate(
        generator, generator, tiny_reward(), [1, 2], tmp_path, level=LEVEL, pictures=1
    )
    assert summary["tuned_preferred"] == 0.5  # ties are halves
    assert summary["drift"] == 0
    assert summary["appearance_psnr_db"] is summary["side_psnr_db"] is None
    assert summary["appearance_ssim"] == summary["side_ssim"] == 1
    assert "simulated_annotator" not in summary
    said = (tmp_path / "report.html").read_text()
    assert "equal images" in said
    assert "simulated annotator" not in said
