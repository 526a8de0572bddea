"""`make weights` in small: one step each in place of hundreds."""

from dataclasses import replace

import pytest
import torch

from beit3 import load
from beit3.demo import shipping
from beit3.weights.matching import get_weights


@pytest.mark.slow
def test_all_stages_are_trained_and_written(tmp_path, monkeypatch, capsys):
    short = ("--run.steps", "1", "--run.eval_records", "20")
    stages = {
        name: replace(stage, fields=(*stage.fields, *short))
        for name, stage in shipping.STAGES.items()
    }
    pairs = replace(shipping.PAIRS, fields=(*shipping.PAIRS.fields, *short))
    monkeypatch.setattr(shipping, "STAGES", stages)
    monkeypatch.setattr(shipping, "PAIRS", pairs)
    runs, shipped = tmp_path / "runs", tmp_path / "shipped"
    shipping.make_weights(runs, shipped)
    assert "world/vqa: accuracy" in capsys.readouterr().out
    assert {path.name for path in shipped.iterdir()} == set(stages)
    for name in stages:
        trained = get_weights(load(runs / name / "last").task)
        for key, tensor in get_weights(load(shipped / name).task).items():
            assert torch.equal(tensor, trained[key].half().float())
    # Called again it finds finished runs and trains nothing.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    shipping.make_weights(runs, shipped)
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
