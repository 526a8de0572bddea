"""A traced micro-batch has the operations of a real one; recomputation saves memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit3.plan.dummy_inputs import build_meta_task, make_example
from beit3.plan.trace import layer_norms_in_float32, trace_step
from beit3.task import load_task
from beit3.training.parallel import materialize
from beit3.training.step import combine_losses

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


def test_layer_norms_of_an_accelerator_are_in_float32():
    layer_norm, states = F.layer_norm, torch.ones(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="inside"), layer_norms_in_float32(True):
        with torch.autocast("cpu", torch.bfloat16):
            assert F.layer_norm(states, (4,)).dtype == torch.float32
        assert F.layer_norm(states, (4,)).dtype == torch.bfloat16, "without autocast they are not"
        raise ValueError("inside")
    assert F.layer_norm is layer_norm


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("vqa", "none"), ("vqa", "full"), ("vqkd", "none"), ("coco", "full"), ("ade20k", "none")],
)
def test_operations_are_those_of_a_real_step(name, checkpointing):
    task_class = load_task(name)
    recipe = task_class.recipes["demo"]
    run = replace(recipe.run, checkpointing=checkpointing)
    traced_task = build_meta_task(task_class, recipe.task, run)
    example = make_example(traced_task, "main")
    trace = trace_step(traced_task, example, 3, FLOAT32, accelerator=False)
    task = build_meta_task(task_class, recipe.task, run)
    materialize(task, CPU, 0)
    if name == "vqkd":
        task.backbone.quantizer.started.fill_(True)  # k-means runs once and is not counted
    batch = task.collate([make_example(task, "main")] * 3)
    with FlopCounterMode(display=False) as counter:
        result = task(batch | {"step": 0, "steps": 1})
        combine_losses(task, result, task.targets(batch))[0].backward()
    assert trace.flops == counter.get_total_flops()
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    assert trace.batch == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_recomputing_keeps_less():
    task_class = load_task("vqa")
    recipe = task_class.recipes["demo"]
    activations = {}
    for checkpointing in ("none", "selective", "full"):
        run = replace(recipe.run, checkpointing=checkpointing)
        task = build_meta_task(task_class, recipe.task, run)
        trace = trace_step(task, make_example(task, "main"), 64, FLOAT32, accelerator=False)
        activations[checkpointing] = trace.activations
    assert activations["full"] < activations["selective"] < activations["none"]
