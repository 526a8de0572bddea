"""The time, price and number of steps of a run equal those computed by hand."""

from dataclasses import replace

import pytest

from beit3.plan.costs import count_run_steps, plan_run
from beit3.tasks.vqa import VQA


def test_time_and_cost_by_hand():
    recipe = VQA.recipes["demo"]
    recipe = replace(recipe, task=replace(recipe.task, model=replace(recipe.task.model, depth=2)))
    plan = plan_run(VQA, recipe, gpus=4, gpu="a100-80", utilization=0.5, price=2.0)
    assert plan["steps"] == 200
    assert [option["checkpointing"] for option in plan["ways"]] == ["none", "selective", "full"]
    for option in plan["ways"]:
        assert option["seconds"] == pytest.approx(option["flops"] / (4 * 312e12 * 0.5))
        assert option["hours"] == pytest.approx(200 * option["seconds"] / 3600)
        assert (
            option["cost"]
            == pytest.approx(2 * option["gpu_hours"])
            == pytest.approx(8 * option["hours"])
        )
        assert option["total"] == pytest.approx(sum(option["memory"].values()))
    without, _, full = plan["ways"]
    assert plan["model_flops"] == without["flops"] < full["flops"]
    assert plan["a_step"] == {"main": {"records": 32, "images": 32, "tokens": 32 * 16}}


def test_epochs_need_the_number_of_records(root):
    """It is given, or counted in the root; an epoch is a pass over the largest source."""
    assert count_run_steps(VQA, VQA.recipes["base_480"], records=12_800) == 10 * 100
    assert count_run_steps(VQA, VQA.recipes["base_480"], records=0) == 0
    demo = VQA.recipes["demo"]
    recipe = replace(
        demo,
        run=replace(demo.run, steps=0, epochs=3),
        data=replace(demo.data, root=str(root), batch={"main": 4}),
    )
    num_records = len((root / "vqa/main/train.jsonl").read_text().splitlines())
    assert count_run_steps(VQA, recipe, records=0) == 3 * (num_records // 4)
