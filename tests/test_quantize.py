"""8-bit inference against the same arithmetic in float, and the error where it is not supported."""

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


def find_obstacle() -> str:
    """Returns why int8 does not work on this machine, or ""."""
    try:
        check_support(CPU)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def int8() -> None:
    """Skips tests where this machine lacks what int8 needs."""
    reason = find_obstacle()
    if reason:
        pytest.skip(reason)


def make_retrieval(tokenizer: TextTokenizer | None = None) -> Retrieval:
    """Makes a task whose outputs rounding changes measurably."""
    task = Retrieval(
        RetrievalConfig(model=MODEL, image=Preprocessing(16), text_length=12), tokenizer=tokenizer
    )
    task.init_weights(0)
    return task.eval()


class RoundedLinear(nn.Module):
    """A linear layer in float arithmetic on rounded values: 255 steps over the range of each token
    and of each output channel."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = round_to_int8(linear.weight), linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(round_to_int8(states), self.weight, self.bias)


def round_to_int8(values: Tensor) -> Tensor:
    """Rounds each row of [..., n] to 8 bits: multiples of its largest magnitude / 127.5."""
    step = (values.abs().amax(-1, keepdim=True) / 127.5).clamp_min(1e-7)
    return (values * (1 / step)).round().clamp(-128, 127) * step


def find_linears(task: Retrieval) -> dict[str, nn.Linear]:
    return {name: module for name, module in task.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_all_linear_layers_of_the_blocks_are_rounded_and_nothing_else(int8):
    exact, generator = make_retrieval(), torch.Generator().manual_seed(1)
    quantized = quantize(deepcopy(exact))
    rounded = {
        name: layer
        for name, layer in find_linears(quantized).items()
        if type(layer.weight.data) is not Tensor
    }
    assert rounded.keys() == {name for name in find_linears(exact) if ".blocks." in name}
    for name, layer in rounded.items():
        states = torch.randn(2, 5, layer.in_features, generator=generator)
        states[1] = 0  # a padded text
        assert torch.allclose(
            layer(states), RoundedLinear(find_linears(exact)[name])(states), atol=1e-5
        )
        assert not torch.allclose(layer(states), find_linears(exact)[name](states), atol=1e-3), (
            "rounding shows"
        )
    others = {
        name: value
        for name, value in quantized.named_parameters()
        if name.removesuffix(".weight") not in rounded
    }
    assert all(torch.equal(value, exact.get_parameter(name)) for name, value in others.items())
    assert not quantized.training and not any(
        parameter.requires_grad for parameter in quantized.parameters()
    )


@torch.no_grad()
def test_features_are_close_and_do_not_depend_on_the_batch(int8):
    exact, images = (
        make_retrieval(),
        torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    )
    quantized = quantize(deepcopy(exact))
    exact_features, features = (
        task.outputs({"image": images})["image_features"] for task in (exact, quantized)
    )
    assert (features * exact_features).sum(1).min() > 0.999 and not torch.allclose(
        features, exact_features, atol=1e-4
    )
    assert torch.allclose(
        quantized.outputs({"image": images[1:2]})["image_features"], features[1:2], atol=1e-6
    )


def test_load_and_the_command_line_offer_int8(int8, tmp_path, tokenizer, run_cli):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    save_weights(make_retrieval(tokenizer), tmp_path / "run")
    exact, quantized = predict.load(tmp_path / "run"), predict.load(tmp_path / "run", int8=True)
    features = [
        predictor.embed([tmp_path / "a.png"])["image"][0] for predictor in (exact, quantized)
    ]
    assert 0.999 < features[0] @ features[1] and not np.array_equal(*features)
    predictions = json.loads(run_cli("predict", tmp_path / "run", tmp_path / "a.png", "--int8"))
    assert np.allclose(predictions[0]["image"], features[1], atol=1e-6)
    with pytest.raises(ValueError, match="int8 runs on CPU.*cuda"):
        quantized.to("cuda")
    assert quantized.to("cpu").task is quantized.task


def remove_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})


def remove_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setitem(sys.modules, "torchao", None)


def remove_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("No working C++ compiler found\n\nand a long tail")

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True})
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setattr(torch, "compile", fail)


@pytest.mark.parametrize(
    ("remove_support", "message"),
    [
        (
            remove_instructions,
            "this CPU has no int8 instructions (VNNI), so int8 would not be faster: leave int8 out",
        ),
        (remove_package, "int8 needs torchao: pip install 'beit3[quant]', or leave int8 out"),
        (remove_compiler, "or leave int8 out: No working C++ compiler found"),
    ],
)
def test_missing_support_is_reported_in_one_line_and_changes_nothing(
    remove_support, message, monkeypatch, tmp_path, tokenizer, run_failing_cli
):
    task = make_retrieval(tokenizer).train()
    save_weights(task, tmp_path / "run")
    remove_support(monkeypatch)
    assert message in run_failing_cli("predict", tmp_path / "run", "a.png", "--int8")
    with pytest.raises(ValueError):
        quantize(task)
    assert task.training and all(parameter.requires_grad for parameter in task.parameters())


def test_weights_on_other_devices_and_tasks_without_blocks_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="int8 runs on CPU, and the device is meta"):
        quantize(make_retrieval().to("meta"))
    task = make_retrieval()
    task.backbone.blocks = nn.ModuleList()
    monkeypatch.setattr("beit3.quantize.check_support", lambda device: None)
    with pytest.raises(ValueError, match="retrieval has no Transformer blocks"):
        quantize(task)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many red cubes are left of the two blue balls"], vocab_size=60)
