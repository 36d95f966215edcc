"""The demo: every stage leaves its files, and an interrupted one goes on."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from tiny import tiny_generator

from densityrl import demo as module
from densityrl.config import FinetuneConfig, RewardConfig
from densityrl.demo import demo
from densityrl.errors import RunError
from densityrl.generator import TriplaneGenerator, load_generator, save_generator
from densityrl.preference import read_preferences


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder for the demo, and a demo of few seeds and few points on a tiny generator."""
    plain = tiny_generator()
    groups = {"faults": (4, 7), "spare": (7, 8)}
    config = replace(plain.config, latent_groups=groups, millimetres=250.0)
    generator = TriplaneGenerator(config)
    generator.load_state_dict(plain.state_dict())
    with torch.no_grad():  # every seed passes the level of the surface
        generator.osg_decoder.net[2].bias[0] += 4
    save_generator(generator, tmp_path / "generator")
    monkeypatch.setattr(module, "GENERATOR", str(tmp_path / "generator"))
    monkeypatch.setattr(module, "HELD_OUT", range(1000, 1003))
    monkeypatch.setattr(module, "SHOWN", 2)
    monkeypatch.setattr(module, "RESOLUTION", 16)
    rewards = partial(RewardConfig, inversion_slabs=40, components=6)
    monkeypatch.setattr(module, "RewardConfig", rewards)
    monkeypatch.setattr(module, "FinetuneConfig", partial(FinetuneConfig, target_seeds=8))
    for pictures in ("sample", "evaluation.compare"):  # which take most of the time
        monkeypatch.setattr(f"densityrl.{pictures}.TILE", 32)
    return tmp_path / "demo"


def test_demo(small, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said.extend(demo(small, pairs=20, steps=1))
    assert any("by mistake; 5 ties left out" in line for line in said)  # 25 pairs were shown
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        list(demo(small, pairs=20, steps=1))
    reward = (small / "reward" / "reward.safetensors").read_bytes()

    said = "\n".join(demo(small, pairs=20, steps=1, resume=True))
    assert (small / "reward" / "reward.safetensors").read_bytes() == reward
    assert len(read_preferences(small / "preferences.csv")) == 20
    for name in ("base/sheet.png", "sculpted/sheet.png"):
        assert Image.open(small / name).height > 6 * 32
    assert Image.open(small / "before_after.png").width > 6 * module.TILE
    assert (small / "evaluation" / "report.html").is_file()
    tuned = load_generator(small / "tuned")
    assert tuned.fingerprint() != load_generator(module.GENERATOR).fingerprint()
    summary = json.loads((small / "evaluation" / "evaluation.json").read_text())
    assert f"by the reward {summary['tuned_preferred']:.1%}" in said
    judged = summary["simulated_annotator"]
    better = f"{3 * judged['tuned_preferred']:g}"
    assert f"by the simulated annotator's own rule {better} of 3 heads are better" in said
    assert f"-> {judged['tuned_distance']:.2f} mm" in said
    faults = {row["seed"]: row["simulated"]["base_distance"] for row in summary["per_seed"]}
    worst, second = sorted(faults, key=faults.get, reverse=True)[:2]
    assert f"the 2 of these seeds with the worst faults: {worst}, {second}" in said
