"""The demo: every stage leaves its files, and an interrupted one goes on."""

import json

import pytest
from PIL import Image

from densityrl import demo as module
from densityrl.demo import demo
from densityrl.errors import RunError
from densityrl.generator import load_generator
from densityrl.preference import read_preferences


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT", range(1000, 1002))
    monkeypatch.setattr(module, "SHOWN", (1,))
    monkeypatch.setattr(module, "RESOLUTION", 16)
    monkeypatch.setattr("densityrl.sample.TILE", 128)  # pixels: pictures take most of the time

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "finetune", interrupted)
        stages = demo(tmp_path, pairs=20, steps=1)
        with pytest.raises(KeyboardInterrupt):
            list(stages)
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        list(demo(tmp_path, pairs=20, steps=1))
    reward = (tmp_path / "reward" / "reward.safetensors").read_bytes()

    said = "\n".join(demo(tmp_path, pairs=20, steps=1, resume=True))
    assert (tmp_path / "reward" / "reward.safetensors").read_bytes() == reward
    assert len(read_preferences(tmp_path / "preferences.csv")) == 20
    for name in ("base/sheet.png", "sculpted/sheet.png", "before_after.png"):
        assert Image.open(tmp_path / name).width > 500
    assert (tmp_path / "evaluation" / "report.html").is_file()
    tuned = load_generator(tmp_path / "tuned")
    assert tuned.fingerprint() != load_generator("busts").fingerprint()
    summary = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert f"by the reward {summary['tuned_preferred']:.1%}" in said
    assert "of 2 heads moved the right way" in said
