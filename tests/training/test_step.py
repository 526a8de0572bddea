"""A step has the same loss and gradients for any micro-batches, and names nonfinite ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.data.loader import RecordDataset
from beit3.recipe import Recipe
from beit3.task import Batch, Task, grow_vocabulary
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain
from beit3.tasks.retrieval import Retrieval
from beit3.tokenizer.text import TextTokenizer
from beit3.training.step import (
    backward,
    check_finite,
    get_part_name,
    measure_gradient_norms,
    sum_targets,
)
from tests.world_root import make_finetuning_recipe, make_pretrain_recipe

FLOAT32 = torch.autocast("cpu", enabled=False)


def build_float64_task(recipe: Recipe, task_class: type[Task], root: Path) -> Task:
    """Returns the task of a recipe in training mode, in float64 but for its frozen parts."""
    tokenizer = TextTokenizer(root / "text.model")
    task = task_class(
        task_class.configure(grow_vocabulary(recipe.task, tokenizer), root), tokenizer=tokenizer
    )
    task.init_weights(0)
    for name, child in task.named_children():
        child.to(torch.float32 if name in task_class.frozen else torch.float64)
    return task.train()


def compute_gradients(
    task: Task, batches: list[Batch]
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    task.zero_grad()
    values, _ = backward(task, batches, sum_targets(task, batches), FLOAT32)
    return values, {
        name: p.grad.clone() for name, p in task.trainable_parameters() if p.grad is not None
    }


# Loss and gradients -------------------------------------------------------------------------------


def split_batch(batch: Batch, *sizes: int) -> list[Batch]:
    """Splits a batch into micro-batches of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append({key: value[start : start + size] for key, value in batch.items()})
        start += size
    return parts


@pytest.mark.parametrize("depth_drop", [0.0, 0.3])
def test_cached_features_give_the_loss_of_all_pairs(root, depth_drop):
    """Gradient caching equals one batch; with stochastic depth it equals all graphs at once."""
    recipe = make_finetuning_recipe("retrieval", root)
    recipe = replace(
        recipe,
        task=replace(recipe.task, model=replace(recipe.task.model, drop_path_rate=depth_drop)),
    )
    task = build_float64_task(recipe, Retrieval, root)
    source = RecordDataset(root / "retrieval/main/train.jsonl", root)
    batch = task.collate([task.example(source[3 * i], True) for i in range(7)])
    parts = split_batch(batch, 3, 3, 1)

    def forward_in_parts() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Keeps the graphs of all parts at once."""
        task.zero_grad()
        outputs = [task.outputs(part) for part in parts]
        loss = (
            task.compare(
                {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
            )["losses"]["loss"]
            / 7
        )
        loss.backward()
        return {
            name: p.grad.clone() for name, p in task.trainable_parameters() if p.grad is not None
        }, loss.detach()

    torch.manual_seed(3)
    expected, loss = forward_in_parts()
    torch.manual_seed(3)
    values, cached_gradients = compute_gradients(task, parts)
    assert values["loss"] == pytest.approx(float(loss), rel=1e-9) and values["accuracy"] <= 1
    if not depth_drop:
        batch_values, batch_gradients = compute_gradients(task, [batch])
        assert batch_values == pytest.approx(values, rel=1e-9)
        expected = batch_gradients
    assert cached_gradients.keys() == expected.keys() and "logit_scale" in cached_gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(
            cached_gradients[name],
            gradient,
            rtol=1e-9,
            atol=1e-9 * float(gradient.abs().max()),
            msg=name,
        )


@pytest.fixture(scope="module")
def pretrain_step(root, vqkd_weights) -> tuple[Task, list[Batch]]:
    """Returns a task and the three batches of a step, with varying numbers of targets."""
    recipe = make_pretrain_recipe(root, vqkd_weights)
    task = build_float64_task(recipe, Pretrain, root)
    records = {
        name: RecordDataset(root / f"pretrain/{name}/val.jsonl", root) for name in Pretrain.sources
    }
    return task, [
        task.collate([task.example(source[i], True) for i in range(6)])
        for source in records.values()
    ]


def test_micro_batches_give_the_loss_and_gradients_of_one_batch(pretrain_step):
    task, step = pretrain_step
    counts = (step[2]["text_target"] != IGNORE_INDEX).sum(1)
    assert len(set(counts.tolist())) > 1, "averaging means of micro-batches would give another loss"
    expected, expected_gradients = compute_gradients(task, step)
    for sizes in ((3, 3), (1, 5), (2, 2, 2)):
        values, part_gradients = compute_gradients(
            task, [part for batch in step for part in split_batch(batch, *sizes)]
        )
        assert values == pytest.approx(expected, rel=1e-6)
        assert part_gradients.keys() == expected_gradients.keys()
        for name, gradient in part_gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-8)


def test_the_loss_is_the_plain_sum_of_means(pretrain_step):
    task, step = pretrain_step
    values, _ = compute_gradients(task, step)
    means = {}
    for batch, prefix in zip(step, ("", "", "pair_"), strict=True):
        outputs = task.outputs(batch)
        if "image" in batch:
            logits, codes = (
                outputs["image_logits"][batch["image_mask"]],
                task.compute_codes(batch)[batch["image_mask"]],
            )
            means[prefix + "image"] = torch.nn.functional.cross_entropy(logits, codes)
        if "text" in batch:
            means[prefix + "text"] = torch.nn.functional.cross_entropy(
                outputs["text_logits"].transpose(1, 2), batch["text_target"]
            )
    assert sorted(means) == ["image", "pair_image", "pair_text", "text"]
    for name, mean in means.items():
        assert values[f"loss/{name}"] == pytest.approx(mean.item(), rel=1e-6)
    assert values["loss"] == pytest.approx(sum(means.values()).item(), rel=1e-6)


def test_loss_weights_scale_loss_and_gradient(pretrain_step, monkeypatch):
    task, step = pretrain_step
    values, plain = compute_gradients(task, step[:1])
    monkeypatch.setattr(task, "config", replace(task.config, image_weight=3.0))
    weighted, scaled = compute_gradients(task, step[:1])
    assert weighted["loss"] == pytest.approx(3 * values["loss"]) and weighted[
        "loss/image"
    ] == pytest.approx(values["loss/image"])
    torch.testing.assert_close(scaled["image_head.weight"], 3 * plain["image_head.weight"])


def test_gradient_norms_of_parts_add_up(pretrain_step):
    task, step = pretrain_step
    _, parameter_gradients = compute_gradients(task, step)
    norms = measure_gradient_norms(task)
    assert {name.removeprefix("gradient_norm/") for name in norms} == {
        "image_embedding",
        "text_embedding",
        "blocks.0",
        "blocks.1",
        "norm",
        "text_head",
        "image_head",
    }
    total = sum(gradient.square().sum() for gradient in parameter_gradients.values()).sqrt()
    assert sum(norm**2 for norm in norms.values()) ** 0.5 == pytest.approx(float(total))
    blocks = sum(
        gradient.square().sum()
        for name, gradient in parameter_gradients.items()
        if name.startswith("backbone.blocks.1.")
    ).sqrt()
    assert norms["gradient_norm/blocks.1"] == pytest.approx(float(blocks))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("backbone.blocks.3.ffn.image.fc1.weight", "blocks.3"),
        ("backbone.encoder.blocks.0.norm1.bias", "encoder"),
        ("head.3.bias", "head"),
    ],
)
def test_parts_are_named_after_the_module(name, part):
    assert get_part_name(name) == part


def test_the_nonfinite_micro_batch_is_named():
    batches = [{"id": [f"{prefix}{index}" for index in range(10)]} for prefix in "ab"]
    losses = [torch.tensor(1.0), torch.tensor(float("nan"))]
    with pytest.raises(
        FloatingPointError,
        match=r"^step 5: loss nan, gradient norm 1.0; records b0, b1, .*b7 \.\.\.; lower optim.lr",
    ):
        check_finite(4, float("nan"), 1.0, batches, losses)
    with pytest.raises(FloatingPointError, match=r"records a0, a1"):
        check_finite(4, 1.0, float("inf"), batches, losses[:1] * 2)
    check_finite(4, 1.0, 1.0, batches, losses)


def test_shared_features_that_no_loss_uses_are_named(pretrain_step, monkeypatch):
    task, micro_batches = pretrain_step
    unused = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(task, "compute_shared_features", lambda: {"names": unused})
    with pytest.raises(ValueError, match="Pretrain.compute_shared_features returns 'names', which"):
        compute_gradients(task, micro_batches)
