"""The backbone equals torchscale's BEiT3 on numbers that `record.py` beside this file recorded.

Both forms of the layers, all kinds of calls, the states after each layer, the attention weights and
the gradients of every parameter. float32 on both sides: states are below 40 and agree to 5e-5,
gradients are compared relative to the largest of their tensor.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from beit3.model.config import TINY_RELEASE
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.weights.release_format import translate
from tests.recorded.record import CALLS, FILE, FORMS, SIZES
from tests.reference import backbone as reference

TOLERANCE = 5e-5
RELATIVE_TOLERANCE = 1e-5
"""Of gradients."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(FILE)


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors below a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def load_backbone(recorded: dict[str, Tensor], form: str) -> Backbone:
    """Builds our network with the recorded weights; no tensor may be left over or missing."""
    config = replace(
        TINY_RELEASE,
        dim=SIZES["encoder_embed_dim"],
        depth=SIZES["encoder_layers"],
        num_heads=SIZES["encoder_attention_heads"],
        ffn_dim=SIZES["encoder_ffn_embed_dim"],
        image_size=SIZES["img_size"],
        patch_size=SIZES["patch_size"],
        vocab_size=SIZES["vocab_size"],
        text_positions=SIZES["max_source_positions"],
        sub_ln=FORMS[form],
    )
    task = Backbone(TaskConfig(model=config))
    tensors, ignored, _ = translate(select(recorded, f"{form}/model/"), task)
    assert not ignored
    task.load_state_dict(tensors, strict=True)
    return task.eval()


def test_the_file_says_where_it_comes_from():
    with safe_open(FILE, "pt") as file:
        metadata = file.metadata()
    assert metadata["torchscale"] == "0.3.0"
    assert {"torch", "python", "machine", "command", "sizes"} <= metadata.keys()
    assert FILE.stat().st_size < 300_000


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_states_of_every_layer_equal_those_of_torchscale(recorded, form, name):
    network = load_backbone(recorded, form).backbone
    inputs = select(recorded, "inputs/")
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(name, torch.cat(output, 1))

    network.blocks[0].register_forward_pre_hook(
        lambda module, arguments: seen.__setitem__("embedding", torch.cat(arguments[0], 1))
    )
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(record(f"layer{number}"))
    with torch.inference_mode():
        seen["output"] = network(**{argument: inputs[argument] for argument in CALLS[name]}).tokens
    expected = select(recorded, f"{form}/{name}/")
    expected.pop("attention")
    assert seen.keys() == expected.keys() and len(seen) == 4
    for state, value in expected.items():
        torch.testing.assert_close(
            seen[state], value, rtol=0, atol=TOLERANCE, msg=lambda m, s=state: f"{s}: {m}"
        )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_implementation_has_the_attention_of_torchscale(recorded, form, name):
    """The attention weights of the first layer, which our network never holds, and the output."""
    task = load_backbone(recorded, form)
    inputs = select(recorded, "inputs/")
    state = {name: tensor.double() for name, tensor in task.backbone.state_dict().items()}
    arguments = {argument: inputs[argument] for argument in CALLS[name]}
    if "image" in arguments:
        arguments["image"] = arguments["image"].double()
    if "attention_mask" in arguments:
        arguments["may_attend"] = arguments.pop("attention_mask")
    seen: dict[str, Tensor] = {}
    output = reference.encode(state, task.config.model, **arguments, trace=seen)
    expected = select(recorded, f"{form}/{name}/")
    torch.testing.assert_close(output.float(), expected["output"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        seen["layer0.self_attn_weights"].float(),
        expected["attention"].transpose(0, 1).flatten(0, 1),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_parameter_equal_those_of_torchscale(recorded, form):
    task = load_backbone(recorded, form)
    inputs = select(recorded, "inputs/")
    output = task.backbone(**{argument: inputs[argument] for argument in CALLS["pair"]}).tokens
    num_image = output.shape[1] - inputs["text"].shape[1]
    kept = torch.ones(output.shape[:2]).bool()
    kept[:, num_image:] = ~inputs["text_padding"]
    (output * inputs["output_gradient"])[kept].sum().backward()
    # Parameters without a gradient, such as the image mask token, have none on both sides.
    state = select(recorded, f"{form}/model/")
    gradients = {name: torch.zeros_like(value) for name, value in state.items()}
    gradients |= select(recorded, f"{form}/gradients/")
    expected, _, _ = translate(gradients, task)
    for name, parameter in task.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        atol = RELATIVE_TOLERANCE * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert expected.keys() == dict(task.named_parameters()).keys()
