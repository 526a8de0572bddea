"""Fake tensors count as real ones would: storages while they live, operations, autograd's share."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit3.plan.dummy_inputs import built, example
from beit3.plan.trace import Allocations, norms_in_float32, trace
from beit3.task import load_task
from beit3.training.parallel import materialise
from beit3.training.step import weigh

KIB = 1024
CPU = torch.device("cpu")
PLAIN = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture
def counted():
    with Allocations() as counted:
        yield counted


def floats(counted: Allocations, *shape: int) -> torch.Tensor:
    with counted.fake:
        return torch.empty(*shape, requires_grad=True)


def test_a_storage_counts_while_it_lives(counted):
    one = torch.zeros(16, 16)
    assert counted.bytes == KIB
    view, two = one[:4], one + one
    assert counted.bytes == 2 * KIB and view.shape == (4, 16)
    del two
    assert counted.bytes == KIB
    del one
    assert counted.bytes == KIB, "a view holds all of it"
    del view
    assert counted.bytes == 0 and counted.kept == counted.peak == 2 * KIB
    assert counted.largest == (KIB, "[16, 16] float32")


def test_what_autograd_keeps_counts_and_weights_do_not():
    """GELU keeps its input, a square its own, each 1 KiB; the weight's gradient counts apart."""
    counted = Allocations()
    weight = torch.nn.Parameter(floats(counted, 16, 16))
    weight.register_post_accumulate_grad_hook(counted.set_aside)
    counted.leave_out(weight)
    with counted:
        states = weight.view(256) * 2
        loss = F.gelu(states).square().sum()
        del states
        assert counted.bytes == 2 * KIB + 4
        loss.backward()
    assert counted.gradients == KIB and weight.grad is None
    assert counted.bytes == 4 and 3 * KIB <= counted.kept <= counted.peak <= counted.kept + KIB


def test_masks_are_real_and_choose(counted):
    states = floats(counted, 4, 6, 8)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, :5] = True
    chosen = states[mask]
    assert chosen.shape == (5, 8) and int(mask.sum()) == 5
    chosen.sum().backward()
    assert states.grad is not None and states.grad.shape == states.shape


def test_values_that_nobody_knows(counted):
    """Checks of values find nothing; positions that follow from floats are taken as all of them."""
    states = floats(counted, 3, 4).detach()
    assert not bool((states < 0).any()) and float(states.max()) == 0
    assert (states > 0).nonzero().shape == (12, 2)
    assert torch.bincount(states.argmax(1), minlength=7).shape == (7,)
    assert torch.arange(3).tolist() == [0, 1, 2], "integers are real"


def test_products_are_counted(counted):
    one, two = floats(counted, 3, 5), floats(counted, 5, 7)
    assert (one @ two).shape == (3, 7)
    assert counted.flops == 2 * 3 * 5 * 7


def test_norms_of_an_accelerator_are_in_float32():
    plain, states = F.layer_norm, torch.ones(2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="inside"), norms_in_float32(True):
        with torch.autocast("cpu", torch.bfloat16):
            assert F.layer_norm(states, (4,)).dtype == torch.float32
        assert F.layer_norm(states, (4,)).dtype == torch.bfloat16, "autocast alone does so"
        raise ValueError("inside")
    assert F.layer_norm is plain


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("vqa", "none"), ("vqa", "full"), ("vqkd", "none"), ("coco", "full"), ("ade20k", "none")],
)
def test_operations_are_those_of_a_real_step(name, checkpointing):
    kind = load_task(name)
    recipe = kind.recipes["demo"]
    run = replace(recipe.run, checkpointing=checkpointing)
    found = trace(
        task := built(kind, recipe.task, run), example(task, "main"), 3, PLAIN, accelerator=False
    )
    real = built(kind, recipe.task, run)
    materialise(real, CPU, 0)
    if name == "vqkd":
        real.backbone.quantizer.started.fill_(True)  # k-means comes once, and is not counted
    batch = real.collate([example(real, "main")] * 3) | {"step": 0, "steps": 1}
    with FlopCounterMode(display=False) as counter:
        weigh(real, real(batch), real.targets(batch))[0].backward()
    assert found.flops == counter.get_total_flops()
    assert found.batch == sum(
        value.numel() * value.element_size()
        for value in batch.values()
        if isinstance(value, torch.Tensor)
    )


def test_recomputing_keeps_less():
    kind = load_task("vqa")
    recipe = kind.recipes["demo"]
    kept = {}
    for way in ("none", "selective", "full"):
        task = built(kind, recipe.task, replace(recipe.run, checkpointing=way))
        kept[way] = trace(task, example(task, "main"), 64, PLAIN, accelerator=False).kept
    assert kept["full"] < kept["selective"] < kept["none"]
