"""Memory of every recipe, short cuts beside the long way, and one step that is really taken."""

from dataclasses import replace

import pytest
import torch

from beit3.plan import estimate
from beit3.plan.devices import DEVICES, GIB, Device, device
from beit3.plan.estimate import Estimate
from beit3.recipe import Recipe
from beit3.task import list_tasks, load_task
from beit3.tasks.vqa import VQA
from benchmarks.memory import Case, estimated, measured

H100 = DEVICES["h100"]
DENSE = ("coco", "ade20k")
"""Tasks of which the demo is planned here; of a large picture a trace takes seconds."""
RECIPES = [(name, label) for name in list_tasks() for label in load_task(name).recipes]


def changed(recipe: Recipe, **run: object) -> Recipe:
    return replace(recipe, run=replace(recipe.run, **run))


def small(depth: int = 2, **run: object) -> Recipe:
    """VQA's demo with a network of this depth, 32 records in micro-batches of 8."""
    recipe = changed(VQA.recipes["demo"], **({"micro_batch": 8} | run))
    return replace(
        recipe,
        task=replace(
            recipe.task, model=replace(recipe.task.model, depth=depth, drop_path_rate=0.1)
        ),
    )


def planned(name: str, label: str, monkeypatch: pytest.MonkeyPatch) -> Estimate:
    """A recipe on as many GPUs as divide its batches, up to 8; traced with as few blocks as it can have, which is enough here."""
    once = lambda self, source, count: self.traced(
        source, count, estimate.shallow(self.recipe.task)
    )  # noqa: E731
    monkeypatch.setattr(Estimate, "deep", once)
    recipe = load_task(name).recipes[label]
    count = next(
        n for n in (8, 4, 2, 1) if not any(size % n for size in recipe.data.batch.values())
    )
    return Estimate(load_task(name), recipe, H100, count)


def form(name: str, label: str) -> tuple:
    """What makes a recipe run other code than its neighbours', sizes aside."""
    recipe = load_task(name).recipes[label]
    model = recipe.task.model
    own = [
        getattr(model, field, None)
        for field in ("shared_attention", "sub_ln", "final_norm", "fusion_layers")
    ]
    if name in DENSE:
        return (name,)
    return (
        name,
        getattr(recipe.task, "head", ""),
        bool(recipe.run.micro_batch),
        recipe.run.checkpointing,
        *own,
    )


FORMS = {form(name, label): (name, label) for name, label in reversed(RECIPES)}
"""Of each form the first, which is the smallest."""


def check(found: Estimate) -> None:
    micro_batch = found.recipe.run.micro_batch
    memory = found.memory(micro_batch)
    assert all(value >= 0 for value in vars(memory).values())
    assert 0 < memory.activations < memory.total and found.flops(micro_batch) > 0


@pytest.mark.parametrize(("name", "label"), FORMS.values())
def test_recipes_of_every_form_can_be_planned(name, label, monkeypatch):
    check(planned(name, label, monkeypatch))


def test_all_recipes_have_sizes_and_batches(monkeypatch):
    for name, label in RECIPES:
        found = planned(name, label, monkeypatch)
        assert (
            found.sizes.used > found.sizes.block > 0
            and found.reads().keys() == found.pieces(1).keys()
        ), (name, label)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), RECIPES)
def test_all_recipes_can_be_planned(name, label, monkeypatch):
    check(planned(name, label, monkeypatch))


def test_one_case_is_what_a_process_takes():
    """Within 15 %; benchmarks/memory.py has more of them."""
    case = Case("imagenet", "laptop", 32)
    assert estimated(case) == pytest.approx(measured(case), rel=0.15)


@pytest.mark.parametrize(
    ("checkpointing", "processes"), [("none", 2), ("selective", 1), ("full", 2)]
)
def test_a_deep_network_follows_from_shallow_ones(monkeypatch, checkpointing, processes):
    recipe = small(8, checkpointing=checkpointing)
    short, long = (Estimate(VQA, recipe, H100, processes) for _ in range(2))
    flops, total = short.flops(8), short.memory(8).total
    monkeypatch.setattr(estimate, "WHOLE", 8)
    assert flops == long.flops(8) and total == pytest.approx(long.memory(8).total, rel=1e-3)
    assert 0 not in {depth for _, _, depth in short.traces} and {
        depth for _, _, depth in long.traces
    } == {0}


@pytest.mark.parametrize("name", DENSE)
def test_blocks_of_a_fixed_number_are_in_all_depths(name, monkeypatch):
    """Four that see the whole picture, or after which an adapter talks; the others, amid windows, differ in number alone."""
    recipe = changed(load_task(name).recipes["demo"], micro_batch=1)
    task = replace(
        recipe.task,
        model=replace(recipe.task.model, depth=8),
        **({"window": 2} if name == "coco" else {}),
    )
    recipe = replace(recipe, task=task, data=replace(recipe.data, batch={"main": 1}))
    short, long = (Estimate(load_task(name), recipe, H100, 1) for _ in range(2))
    flops, total = short.flops(1), short.memory(1).total
    monkeypatch.setattr(estimate, "WHOLE", 8)
    assert flops == long.flops(1) and total == pytest.approx(long.memory(1).total, rel=1e-3)
    assert {depth for _, _, depth in short.traces} == {4, 5} and {
        depth for _, _, depth in long.traces
    } == {0}


def test_other_sizes_follow_from_two():
    short, long = (Estimate(VQA, small(micro_batch=size), H100, 1) for size in (8, 16))
    assert short.memory(16).activations == pytest.approx(long.memory(16).activations, rel=0.01)
    assert {count for _, count, _ in short.traces} == {8, 4} and {
        count for _, count, _ in long.traces
    } == {16}


def test_what_is_sharded_and_what_is_not():
    one, four = (Estimate(VQA, small(), H100, count) for count in (1, 4))
    mine, theirs = one.memory(8), four.memory(8)
    assert theirs.weights == mine.weights / 4 and theirs.optimizer == mine.optimizer / 4
    assert mine.gradients == one.sizes.used * 4, (
        "several micro-batches: all gradients are there before the last"
    )
    assert theirs.gradients < mine.gradients, (
        "one micro-batch: each process keeps its share of them"
    )
    assert mine.gathered == 0 < theirs.gathered
    with pytest.raises(ValueError, match=r"data\.batch\.main 32 does not divide over 5"):
        Estimate(VQA, small(), H100, 5)


def test_the_largest_that_fits():
    found = Estimate(VQA, small(), H100, 1)
    assert found.micro_batches() == [32, 16, 8, 4, 2, 1] and found.largest() == 32
    room = found.memory(16).total / GIB
    tight = Estimate(VQA, small(), Device("small", room, 1), 1)  # type: ignore[arg-type]
    assert tight.largest() == 16
    assert Estimate(VQA, small(), Device("none", 0, 1), 1).largest() == 0


def test_weights_by_hand():
    """The sizes are the task's own; what never gets a gradient has no moments."""
    found, task = Estimate(VQA, small(), device("cpu"), 1), VQA(small().task)
    count = sum(parameter.numel() for parameter in task.parameters())
    unused = sum(
        parameter.numel()
        for name, parameter in task.named_parameters()
        if name.startswith(tuple(task.unused_parameters))
    )
    memory = found.memory(8)
    assert (
        memory.weights == 4 * count
        and memory.optimizer == 8 * (count - unused)
        and 0 < unused < count
    )
    assert memory.frozen == memory.reserve == 0


def test_frozen_parts_count_though_they_are_not_there():
    pretrain = load_task("pretrain")
    found = Estimate(pretrain, pretrain.recipes["base_224"], H100, 8)
    assert found.sizes.frozen == pytest.approx(109e6, rel=0.02), "the published visual tokenizer"
    assert Estimate(
        load_task("vqkd"), load_task("vqkd").recipes["base_224_clip"], H100, 8
    ).sizes.frozen == pytest.approx(86e6, rel=0.02)


def test_devices():
    assert device("h200").memory == 141 and device("cpu").teraflops > 0 and device("cpu").memory > 0
    with pytest.raises(ValueError, match="--gpu h201 is not listed; did you mean h200"):
        device("h201")


def test_bfloat16_is_gathered_in_half(monkeypatch):
    half, whole = (
        Estimate(VQA, small(precision=precision), H100, 2) for precision in ("auto", "float32")
    )
    assert (
        half.memory(8).gathered < whole.memory(8).gathered
        and half.memory(8).activations < whole.memory(8).activations
    )
    assert torch.get_default_dtype() == torch.float32
