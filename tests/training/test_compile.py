"""Compiled blocks: one program without breaks each, equal gradients, and few programs over changing
lengths."""

import shutil
from dataclasses import replace

import pytest
import torch

from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.training.parallel import wrap_blocks

SMALL = {
    "paper": replace(TINY, dim=32, ffn_dim=64, depth=3),
    "release": replace(TINY_RELEASE, dim=32, ffn_dim=64, depth=3),
}
LENGTHS = (8, 16, 24, 32, 40)


class Network(torch.nn.Module):
    """As much of a task as `wrap_blocks` looks at."""

    frozen = ()

    def __init__(self, config):
        super().__init__()
        self.backbone = BEiT3(config).double()
        self.backbone.init_weights()


def inputs(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        "image": torch.randn(2, 3, 32, 32, generator=generator).double(),
        "text": torch.randint(4, 90, (2, length), generator=generator),
        "text_padding": torch.arange(length) >= torch.tensor([[length], [length - 3]]),
    }


def gradients(
    network: Network, given: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    states = network.backbone(**given, read="first").first("image")
    (states**2).sum().backward()
    return states.detach(), {
        name: p.grad for name, p in network.named_parameters() if p.grad is not None
    }


def compare(form: str, lengths: tuple[int, ...]) -> dict:
    """Compiled beside plain at these lengths of the text; what the compiler counted."""
    plain, compiled = Network(SMALL[form]), Network(SMALL[form])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wrap_blocks(compiled, compiled=True)
    for length in lengths:
        (states, theirs), (expected, ours) = (
            gradients(compiled, inputs(length)),
            gradients(plain, inputs(length)),
        )
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)
        for name, gradient in ours.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-9, atol=1e-9)
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("form", SMALL)
def test_blocks_are_single_programs_and_few_over_changing_lengths(form, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )
    counted = compare(form, LENGTHS)
    assert not counted["graph_break"], dict(counted["graph_break"])
    # Plain, fused and last blocks, each with a fixed and with a changing length; the release has
    # nothing fused.
    assert counted["stats"]["unique_graphs"] <= (6 if form == "paper" else 4)


@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler"
)
def test_compiled_by_default_they_give_the_same_gradients():
    compare("paper", LENGTHS[:1])
