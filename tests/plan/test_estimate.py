"""Memory estimates of every recipe equal full traces and, closely, one measured step."""

from dataclasses import replace

import pytest
import torch

from beit3.plan import estimate
from beit3.plan.devices import DEVICES, GIB, Device, find_device
from beit3.plan.estimate import Estimate
from beit3.recipe import Recipe
from beit3.task import list_tasks, load_task
from beit3.tasks.vqa import VQA
from beit3.training.optim import make_optimizer
from benchmarks.memory import Case, estimate_case, measure_case

H100 = DEVICES["h100"]
DENSE_TASKS = ("coco", "ade20k")
"""Tasks of which only the demo is planned here: tracing a large image takes seconds."""
RECIPES = [(name, label) for name in list_tasks() for label in load_task(name).recipes]


def set_run_fields(recipe: Recipe, **fields: object) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **fields))


def make_recipe(depth: int = 2, **run_fields: object) -> Recipe:
    """Returns the VQA demo with a network of this depth and 32 records in micro-batches of 8."""
    recipe = set_run_fields(VQA.recipes["demo"], **({"micro_batch": 8} | run_fields))
    model = replace(recipe.task.model, depth=depth, drop_path_rate=0.1)
    return replace(recipe, task=replace(recipe.task, model=model))


def estimate_shallow(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """Plans a recipe on up to 8 GPUs, as many as divide its batches, with as few blocks as it can
    have."""

    def trace_shallow_network(self, source, count):
        return self.trace_at_depth(source, count, self.recipe.task.base_depth)

    monkeypatch.setattr(Estimate, "trace_network", trace_shallow_network)
    recipe = load_task(name).recipes[label]
    sizes = recipe.data.batch.values()
    processes = next(n for n in (8, 4, 2, 1) if not any(size % n for size in sizes))
    return Estimate(load_task(name), recipe, H100, processes)


def describe_variant(name: str, label: str) -> tuple:
    """Returns the settings, but for sizes, by which recipes run different code."""
    if name in DENSE_TASKS:
        return (name,)
    recipe = load_task(name).recipes[label]
    model_fields = ("shared_attention", "sub_ln", "final_norm", "fusion_layers")
    return (
        name,
        recipe.task.classifies_by_names,
        bool(recipe.run.micro_batch),
        recipe.run.checkpointing,
        *(getattr(recipe.task.model, field, None) for field in model_fields),
    )


VARIANTS = {describe_variant(name, label): (name, label) for name, label in reversed(RECIPES)}
"""The first recipe of each variant, which is the smallest."""


def check_estimate(estimate: Estimate) -> None:
    micro_batch = estimate.recipe.run.micro_batch
    memory = estimate.estimate_memory(micro_batch)
    assert all(value >= 0 for value in vars(memory).values())
    assert 0 < memory.activations < memory.total
    assert estimate.count_flops(micro_batch) > 0


@pytest.mark.parametrize(("name", "label"), VARIANTS.values())
def test_recipes_of_every_variant_can_be_planned(name, label, monkeypatch):
    check_estimate(estimate_shallow(name, label, monkeypatch))


def test_all_recipes_have_sizes_and_batches(monkeypatch):
    for name, label in RECIPES:
        planned = estimate_shallow(name, label, monkeypatch)
        assert planned.sizes.used > planned.sizes.block > 0, (name, label)
        assert planned.count_inputs().keys() == planned.split_batch(1).keys(), (name, label)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), RECIPES)
def test_all_recipes_can_be_planned(name, label, monkeypatch):
    check_estimate(estimate_shallow(name, label, monkeypatch))


def test_the_estimate_is_close_to_a_measured_step():
    """The tolerance is 15 %; benchmarks/memory.py has more cases."""
    case = Case("imagenet", "laptop", 32)
    assert estimate_case(case) == pytest.approx(measure_case(case), rel=0.15)


def get_traced_depths(planned: Estimate) -> set[int]:
    return {depth for _, _, depth in planned.traces}


@pytest.mark.parametrize(
    ("checkpointing", "processes"), [("none", 2), ("selective", 1), ("full", 2)]
)
def test_a_deep_network_follows_from_shallow_ones(monkeypatch, checkpointing, processes):
    recipe = make_recipe(8, checkpointing=checkpointing)
    interpolated, traced = (Estimate(VQA, recipe, H100, processes) for _ in range(2))
    flops, total = interpolated.count_flops(8), interpolated.estimate_memory(8).total
    monkeypatch.setattr(estimate, "MAX_TRACED_DEPTH", 8)
    assert flops == traced.count_flops(8)
    assert total == pytest.approx(traced.estimate_memory(8).total, rel=1e-3)
    assert 0 not in get_traced_depths(interpolated) and get_traced_depths(traced) == {0}


@pytest.mark.parametrize("name", DENSE_TASKS)
def test_blocks_of_a_fixed_number_are_in_all_depths(name, monkeypatch):
    """Four global blocks, or groups that an adapter interacts with; other blocks differ only in
    number."""
    recipe = set_run_fields(load_task(name).recipes["demo"], micro_batch=1)
    task_fields = {"window": 2} if name == "coco" else {}
    model = replace(recipe.task.model, depth=8)
    recipe = replace(
        recipe,
        task=replace(recipe.task, model=model, **task_fields),
        data=replace(recipe.data, batch={"main": 1}),
    )
    interpolated, traced = (Estimate(load_task(name), recipe, H100, 1) for _ in range(2))
    flops, total = interpolated.count_flops(1), interpolated.estimate_memory(1).total
    monkeypatch.setattr(estimate, "MAX_TRACED_DEPTH", 8)
    assert flops == traced.count_flops(1)
    assert total == pytest.approx(traced.estimate_memory(1).total, rel=1e-3)
    assert get_traced_depths(interpolated) == {4, 5} and get_traced_depths(traced) == {0}


def test_other_micro_batches_follow_from_two():
    interpolated, traced = (
        Estimate(VQA, make_recipe(micro_batch=size), H100, 1) for size in (8, 16)
    )
    activations = interpolated.estimate_memory(16).activations
    assert activations == pytest.approx(traced.estimate_memory(16).activations, rel=0.01)
    assert {count for _, count, _ in interpolated.traces} == {8, 4}
    assert {count for _, count, _ in traced.traces} == {16}


def test_weights_and_optimizer_are_sharded_and_gathered_blocks_are_not():
    on_one, on_four = (Estimate(VQA, make_recipe(), H100, count) for count in (1, 4))
    one, four = on_one.estimate_memory(8), on_four.estimate_memory(8)
    assert four.weights == one.weights / 4 and four.optimizer == one.optimizer / 4
    assert one.gradients == on_one.sizes.used * 4, (
        "with several micro-batches all gradients exist before the last"
    )
    assert four.gradients < one.gradients, (
        "with one micro-batch each process keeps its shard of the gradients"
    )
    assert one.gathered == 0 < four.gathered
    with pytest.raises(ValueError, match=r"data\.batch\.main 32 is not divisible by 5"):
        Estimate(VQA, make_recipe(), H100, 5)


def test_the_largest_micro_batch_that_fits():
    planned = Estimate(VQA, make_recipe(), H100, 1)
    assert planned.list_micro_batches() == [32, 16, 8, 4, 2, 1]
    assert planned.find_largest_micro_batch() == 32
    needed = planned.estimate_memory(16).total / GIB
    small = Estimate(VQA, make_recipe(), Device("small", needed, 1), 1)  # type: ignore[arg-type]
    assert small.find_largest_micro_batch() == 16
    assert Estimate(VQA, make_recipe(), Device("none", 0, 1), 1).find_largest_micro_batch() == 0


def test_weights_by_hand():
    """Sizes are those of the task; parameters without gradients have no moments."""
    planned, task = Estimate(VQA, make_recipe(), find_device("cpu"), 1), VQA(make_recipe().task)
    count = sum(parameter.numel() for parameter in task.parameters())
    unused = sum(
        parameter.numel()
        for name, parameter in task.named_parameters()
        if name.startswith(tuple(task.unused_parameters))
    )
    memory = planned.estimate_memory(8)
    assert memory.weights == 4 * count and memory.optimizer == 8 * (count - unused)
    assert 0 < unused < count
    assert memory.frozen == memory.reserve == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_of_the_optimizer_after_a_step(name):
    """Muon keeps one for the matrices of the blocks; parameters without gradients have none."""
    recipe = VQA.recipes["demo"]
    recipe = replace(recipe, optim=replace(recipe.optim, name=name))
    planned = Estimate(VQA, recipe, find_device("cpu"), 1)
    task = VQA(planned.recipe.task)
    task.init_weights(0)
    optimizer = make_optimizer(task, recipe.optim)
    batch = task.collate([planned.make_example("main")])
    sum(task(batch | {"step": 0, "steps": 1})["losses"].values()).backward()
    optimizer.step()
    num_kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim > 0  # AdamW counts its steps in a tensor without dimensions
    )
    assert planned.sizes.moments == num_kept
    assert planned.estimate_memory(8).optimizer == 4 * num_kept
    assert (num_kept < 2 * planned.sizes.used) == (name == "muon")


def test_frozen_parts_count_without_their_weights():
    pretrain, vqkd = load_task("pretrain"), load_task("vqkd")
    planned = Estimate(pretrain, pretrain.recipes["base_224"], H100, 8)
    assert planned.sizes.frozen == pytest.approx(109e6, rel=0.02), "the published visual tokenizer"
    planned = Estimate(vqkd, vqkd.recipes["base_224_clip"], H100, 8)
    assert planned.sizes.frozen == pytest.approx(86e6, rel=0.02), "CLIP's image encoder"


def test_devices_are_found_by_name():
    assert find_device("h200").memory == 141
    assert find_device("cpu").teraflops > 0 and find_device("cpu").memory > 0
    with pytest.raises(ValueError, match="--gpu h201 is not listed; did you mean h200"):
        find_device("h201")


def test_blocks_are_gathered_in_bfloat16():
    half, full = (
        Estimate(VQA, make_recipe(precision=precision), H100, 2).estimate_memory(8)
        for precision in ("auto", "float32")
    )
    assert half.gathered < full.gathered and half.activations < full.activations
    assert torch.get_default_dtype() == torch.float32
