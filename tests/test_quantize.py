"""8-bit inference beside a plain statement of what it computes, and the one line where it cannot be
had."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from beit3 import predict
from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY_RELEASE
from beit3.quantize import check_support, quantize
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.store import save_weights

MODEL = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=2,
    depth=2,
    ffn_dim=96,
    image_size=16,
    vocab_size=64,
    text_positions=66,
)
CPU = torch.device("cpu")


def available() -> str:
    """Why int8 cannot run here; empty where it can."""
    try:
        check_support(CPU)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def int8() -> None:
    """Skips in sight where this machine lacks what int8 needs."""
    if reason := available():
        pytest.skip(reason)


def retrieval(tokenizer: TextTokenizer | None = None) -> Retrieval:
    """Weights far enough from their start that rounding shows."""
    task = Retrieval(
        RetrievalConfig(model=MODEL, image=Preprocessing(16), text_length=12), tokenizer=tokenizer
    )
    task.init_weights(0)
    return task.eval()


class Rounded(nn.Module):
    """A linear layer in plain float arithmetic on rounded numbers: 255 steps over each token's, and
    each output's, range."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = steps(linear.weight), linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(steps(states), self.weight, self.bias)


def steps(values: Tensor) -> Tensor:
    """Each row [..., n] on 8 bits: multiples of its largest magnitude / 127.5."""
    step = (values.abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-7)
    return (values * (1 / step)).round().clamp(-128, 127) * step


def linears(task: Retrieval) -> dict[str, nn.Linear]:
    return {name: module for name, module in task.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_every_linear_layer_of_the_blocks_is_rounded_and_nothing_else(int8):
    exact, generator = retrieval(), torch.Generator().manual_seed(1)
    fast = quantize(deepcopy(exact))
    rounded = {
        name: layer
        for name, layer in linears(fast).items()
        if type(layer.weight.data) is not Tensor
    }
    assert rounded.keys() == {name for name in linears(exact) if ".blocks." in name}
    for name, layer in rounded.items():
        states = torch.randn(2, 5, layer.in_features, generator=generator)
        states[1] = 0  # a padded text
        assert torch.allclose(layer(states), Rounded(linears(exact)[name])(states), atol=1e-5)
        assert not torch.allclose(layer(states), linears(exact)[name](states), atol=1e-3), (
            "rounding shows"
        )
    others = {
        name: value
        for name, value in fast.named_parameters()
        if name.removesuffix(".weight") not in rounded
    }
    assert all(torch.equal(value, exact.get_parameter(name)) for name, value in others.items())
    assert not fast.training and not any(parameter.requires_grad for parameter in fast.parameters())


@torch.no_grad()
def test_features_are_close_and_do_not_depend_on_the_batch(int8):
    exact, images = (
        retrieval(),
        torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    )
    fast = quantize(deepcopy(exact))
    theirs, ours = (task.outputs({"image": images})["image_features"] for task in (exact, fast))
    assert (ours * theirs).sum(1).min() > 0.999 and not torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(
        fast.outputs({"image": images[1:2]})["image_features"], ours[1:2], atol=1e-6
    )


def test_load_and_the_command_line(int8, tmp_path, tokenizer, run_cli):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    save_weights(retrieval(tokenizer), tmp_path / "run")
    exact, fast = predict.load(tmp_path / "run"), predict.load(tmp_path / "run", int8=True)
    features = [predictor.embed([tmp_path / "a.png"])["image"][0] for predictor in (exact, fast)]
    assert 0.999 < features[0] @ features[1] and not np.array_equal(*features)
    said = json.loads(run_cli("predict", tmp_path / "run", tmp_path / "a.png", "--int8"))
    assert np.allclose(said[0]["image"], features[1], atol=1e-6)
    with pytest.raises(ValueError, match="int8 is for a processor.*cuda"):
        fast.to("cuda")
    assert fast.to("cpu").task is fast.task


def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setitem(sys.modules, "torchao", None)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object) -> None:
        raise RuntimeError("No working C++ compiler found\n\nand a long tail")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True})
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setattr(torch, "compile", fails)


@pytest.mark.parametrize(
    "lack, said",
    [
        (
            without_instructions,
            "this processor has no int8 instructions (VNNI), so int8 would not be faster: leave "
            "int8 out",
        ),
        (without_package, "int8 needs torchao: pip install 'beit3[quant]', or leave int8 out"),
        (without_compiler, "or leave int8 out: No working C++ compiler found"),
    ],
)
def test_what_is_missing_is_one_line_and_changes_nothing(
    lack, said, monkeypatch, tmp_path, tokenizer, run_failing_cli
):
    task = retrieval(tokenizer).train()
    save_weights(task, tmp_path / "run")
    lack(monkeypatch)
    assert said in run_failing_cli("predict", tmp_path / "run", "a.png", "--int8")
    with pytest.raises(ValueError):
        quantize(task)
    assert task.training and all(parameter.requires_grad for parameter in task.parameters())


def test_weights_elsewhere_and_tasks_without_blocks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="int8 is for a processor, and the device here is meta"):
        quantize(retrieval().to("meta"))
    task = retrieval()
    task.backbone.blocks = nn.ModuleList()
    monkeypatch.setattr("beit3.quantize.check_support", lambda device: None)
    with pytest.raises(ValueError, match="retrieval has no Transformer blocks"):
        quantize(task)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many red cubes are left of the two blue balls"], vocab_size=60)
