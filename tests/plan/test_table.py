"""The plan as figures and as a table; what a person gets wrong."""

import json
from dataclasses import replace

import pytest

from beit3.plan.table import length, plan
from beit3.task import load_task
from beit3.tasks.vqa import VQA
from tests.test_cli import NETWORK


def test_time_and_cost_by_hand():
    recipe = VQA.recipes["demo"]
    recipe = replace(recipe, task=replace(recipe.task, model=replace(recipe.task.model, depth=2)))
    found = plan(VQA, recipe, gpus=4, gpu="a100-80", utilisation=0.5, price=2.0)
    assert found["steps"] == 200 and [way["checkpointing"] for way in found["ways"]] == [
        "none",
        "selective",
        "full",
    ]
    for way in found["ways"]:
        assert way["seconds"] == pytest.approx(way["flops"] / (4 * 312e12 * 0.5))
        assert way["hours"] == pytest.approx(200 * way["seconds"] / 3600)
        assert way["cost"] == pytest.approx(2 * way["gpu_hours"]) == pytest.approx(8 * way["hours"])
        assert way["total"] == pytest.approx(sum(way["memory"].values()))
    kept, _, recomputed = found["ways"]
    assert found["model_flops"] == kept["flops"] < recomputed["flops"]
    assert found["a_step"] == {"main": {"records": 32, "images": 32, "tokens": 32 * 16}}


def test_epochs_need_records(root):
    """Given, or counted in the root; an epoch is a pass over the largest source."""
    assert length(VQA, VQA.recipes["base_480"], records=12_800) == 10 * 100
    assert length(VQA, VQA.recipes["base_480"], records=0) == 0
    demo = VQA.recipes["demo"]
    run, data = (
        replace(demo.run, steps=0, epochs=3),
        replace(demo.data, root=str(root), batch={"main": 4}),
    )
    records = len((root / "vqa/main/train.jsonl").read_text().splitlines())
    assert length(VQA, replace(demo, run=run, data=data), records=0) == 3 * (records // 4)


def test_the_command_line(say):
    table = say("plan", "vqa", "demo", "--gpus", 2, "--gpu", "h200", "--price", 3, *NETWORK)
    assert table.startswith("vqa demo on 2 x h200 (141 GiB, 989 TFLOP/s, of which 40%)")
    assert "none *" in table and "cost at 3 an hour" in table and "hours, 200 steps" in table
    found = json.loads(say("plan", "vqa", "demo", "--gpu", "cpu", "--json", *NETWORK))
    assert found["gpu"]["name"] == "cpu" and found["ways"][0]["memory"]["reserve"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--gpus", "3"], "data.batch.main 32 does not divide over 3 processes"),
        (["--gpu", "h1000"], "--gpu h1000 is not listed; did you mean h100?"),
        (["--utilisation", "40"], "--utilisation 40.0 is no share of the peak"),
        (["--run.micro_bach", "4"], "did you mean --run.micro_batch?"),
        (["--data.batch.main", "0"], "data.batch names none of the sources main"),
    ],
)
def test_what_can_be_mended_is_one_line(arguments, said, capsys):
    from beit3.cli import main

    assert main(["plan", "vqa", "demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_hours_are_unknown_without_records(say):
    table = say("plan", "vqkd", "base_224_clip", "--gpus", 8, "--task.model.depth", 2)
    assert "give --records N, or --data.root" in table and "hours," not in table
    assert load_task("vqkd").recipes["base_224_clip"].run.steps == 0
