"""Compiled blocks have no graph breaks, equal gradients, and few programs over many lengths."""

import shutil
from dataclasses import replace

import pytest
import torch

from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.training.parallel import wrap_blocks

CONFIGS = {
    "paper": replace(TINY, dim=32, ffn_dim=64, depth=3),
    "release": replace(TINY_RELEASE, dim=32, ffn_dim=64, depth=3),
}
LENGTHS = (8, 16, 24, 32, 40)


class Network(torch.nn.Module):
    """The members of a task that `wrap_blocks` reads."""

    frozen = ()

    def __init__(self, config):
        super().__init__()
        self.backbone = BEiT3(config).double()
        self.backbone.init_weights()


def make_inputs(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        "image": torch.randn(2, 3, 32, 32, generator=generator).double(),
        "text": torch.randint(4, 90, (2, length), generator=generator),
        "text_padding": torch.arange(length) >= torch.tensor([[length], [length - 3]]),
    }


def compute_gradients(
    network: Network, arguments: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    states = network.backbone(**arguments, read="first").first("image")
    (states**2).sum().backward()
    return states.detach(), {
        name: p.grad for name, p in network.named_parameters() if p.grad is not None
    }


def compare_compiled(form: str, lengths: tuple[int, ...]) -> dict:
    """Asserts that compiled blocks equal plain ones; returns the counters of the compiler."""
    plain, compiled = Network(CONFIGS[form]), Network(CONFIGS[form])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wrap_blocks(compiled, compiled=True)
    for length in lengths:
        inputs = make_inputs(length)
        states, gradients = compute_gradients(compiled, inputs)
        expected_states, expected_gradients = compute_gradients(plain, inputs)
        torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-10)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)
    return torch._dynamo.utils.counters


@pytest.mark.parametrize("form", CONFIGS)
def test_blocks_compile_without_graph_breaks_and_to_few_programs(form, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )
    counters = compare_compiled(form, LENGTHS)
    assert not counters["graph_break"], dict(counters["graph_break"])
    # Plain, fused and last blocks, each with a fixed and with a changing length; the released form
    # has no fused ones.
    assert counters["stats"]["unique_graphs"] <= (6 if form == "paper" else 4)


@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler"
)
def test_blocks_compiled_by_default_have_the_same_gradients():
    compare_compiled("paper", LENGTHS[:1])
