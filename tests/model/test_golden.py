"""The backbone equals outputs recorded from the original code, loaded by released names.

Tolerances are the fixtures' own: 1e-4 where states are normed, 5e-4 where they are not (deviation
8, largest 30).
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.cache import Cache
from beit3.tasks.backbone import Backbone
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_released
from tests.golden import find_fixture, load_config, load_tensors
from tests.reference import backbone as reference

INPUTS = {
    "image_only": ("image",),
    "image_only_masked": ("image", "image_mask"),
    "text_only": ("text", "text_padding"),
    "text_only_no_padding_mask": ("text",),
    "fused": ("image", "text", "text_padding"),
    "fused_no_padding_mask": ("image", "text"),
    "fused_masked": ("image", "text", "text_padding", "image_mask"),
}

TEXTS = {
    "vqa": "question",
    "captioning": "language_tokens",
    "retrieval": "text_description",
    "nlvr2": "text_description",
    "imageclassification": "backbone.text_ids",
    "backbone_layers": "text_ids",
}


def load_backbone(name: str) -> BEiT3:
    task, _ = load_released(
        load_tensors(name, "model"),
        "backbone",
        num_heads=load_config(name)["encoder_attention_heads"],
    )
    assert isinstance(task.backbone, BEiT3)
    return task.backbone.eval()


def load_inputs(name: str) -> dict[str, Tensor]:
    """Returns the inputs of a fixture under the argument names of the backbone."""
    recorded = load_tensors(name, "inputs")
    image = recorded["image_a"] if name == "nlvr2" else recorded["image"]
    padding = recorded.get("padding_mask", recorded.get("backbone.padding_mask"))
    arguments = {"image": image, "text": recorded[TEXTS[name]], "text_padding": padding.bool()}
    if "backbone.vision_masked_position" in recorded:
        arguments["image_mask"] = recorded["backbone.vision_masked_position"].bool()
    return arguments


@pytest.mark.parametrize("name", ["vqa", "captioning", "retrieval", "nlvr2", "imageclassification"])
def test_states_of_all_kinds_of_calls_equal_the_recorded_ones(name):
    model, recorded, expected = (
        load_backbone(name),
        load_inputs(name),
        load_tensors(name, "outputs"),
    )
    assert (model.norm is not None) == load_config(name)["normalize_output"]
    tolerance = 1e-4 if model.norm is not None else 5e-4
    for case, arguments in INPUTS.items():
        with torch.inference_mode():
            tokens = model(**{argument: recorded[argument] for argument in arguments}).tokens
        torch.testing.assert_close(
            tokens,
            expected[f"backbone.{case}"],
            rtol=0,
            atol=tolerance,
            msg=lambda m, c=case: f"{c}: {m}",
        )


@pytest.mark.parametrize("case", ["fused", "image_only", "text_only"])
def test_states_of_every_layer_equal_the_recorded_ones(case):
    model, recorded, expected = (
        load_backbone("backbone_layers"),
        load_inputs("backbone_layers"),
        load_tensors("backbone_layers", "outputs"),
    )
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, arguments, output: seen.__setitem__(name, torch.cat(output, 1))

    model.blocks[0].register_forward_pre_hook(
        lambda module, arguments: seen.__setitem__("embedding_output", torch.cat(arguments[0], 1))
    )
    model.blocks[0].attention.register_forward_hook(record("layer0.self_attn_out"))
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(record(f"layer{index}.out"))
    with torch.inference_mode():
        seen["encoder_out"] = model(
            **{argument: recorded[argument] for argument in INPUTS[case]}
        ).tokens
    assert len(seen) == 3 + load_config("backbone_layers")["encoder_layers"]
    for name, value in seen.items():
        # States grow from layer to layer until the final norm.
        tolerance = 5e-4 if name.endswith(".out") else 1e-4
        torch.testing.assert_close(
            value,
            expected[f"{case}.{name}"],
            rtol=0,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("case", ["fused", "image_only", "text_only"])
def test_the_reference_implementation_equals_the_recorded_states(case):
    model, recorded, expected = (
        load_backbone("backbone_layers"),
        load_inputs("backbone_layers"),
        load_tensors("backbone_layers", "outputs"),
    )
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    arguments = {
        name: recorded[name].double() if name == "image" else recorded[name]
        for name in INPUTS[case]
    }
    seen: dict[str, Tensor] = {}
    seen["encoder_out"] = reference.encode(state, model.config, **arguments, trace=seen)
    for name in (
        "embedding_output",
        "layer0.self_attn_weights",
        "layer0.self_attn_out",
        "layer3.out",
        "encoder_out",
    ):
        tolerance = 5e-4 if name.endswith(".out") else 1e-4
        torch.testing.assert_close(
            seen[name].float(), expected[f"{case}.{name}"], rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("name", ["pos_interp_up", "pos_interp_down"])
def test_states_at_another_image_size_equal_the_recorded_ones(name):
    recorded, expected = load_tensors(name, "inputs"), load_tensors(name, "outputs")
    file, state = find_fixture(name) / "model.safetensors", load_tensors(name, "model")
    small, _ = load_released(
        state, "backbone", num_heads=load_config(name)["encoder_attention_heads"]
    )
    model = replace(small.config.model, image_size=recorded["image"].shape[-1])
    task = Backbone(replace(small.config, model=model)).eval()
    initialize_from(task, file)
    table = task.backbone.image_embedding.positions
    torch.testing.assert_close(
        table.data, expected["embed_positions.A.weight.after"], rtol=0, atol=1e-6
    )
    assert torch.equal(table[:3], recorded["embed_positions.A.weight.before"][:3])
    with torch.inference_mode():
        states = task.outputs({"image": recorded["image"]})["image"]
        on_the_fly = small.eval().outputs({"image": recorded["image"]})["image"]
    torch.testing.assert_close(states, expected["encoder_out"], rtol=0, atol=5e-4)
    torch.testing.assert_close(on_the_fly, expected["encoder_out"], rtol=0, atol=5e-4)
    norm = state["fc_norm.weight"], state["fc_norm.bias"]
    pooled = torch.nn.functional.layer_norm(states[:, 1:].mean(1), (states.shape[-1],), *norm, 1e-5)
    logits = pooled @ recorded["new_model.head.weight"].T + recorded["new_model.head.bias"]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_logits_of_captions_decoded_step_by_step_equal_the_recorded_ones():
    """The first call has the image and [<s>, <mask>], later ones [last token, <mask>].

    After each call the mask token is dropped from the cache.
    """
    name = "captioning"
    model, recorded, expected = (
        load_backbone(name),
        load_tensors(name, "inputs"),
        load_tensors(name, "outputs"),
    )
    weights, token_ids = load_tensors(name, "model"), recorded["decode.forced_tokens"]
    special = load_config(name)["special_token_ids"]
    mask = torch.full_like(token_ids[:, :1], special["mask_token_id"])
    num_image, cache, step_logits = 1 + model.config.num_patches, Cache(), []
    with torch.inference_mode():
        for step in range(token_ids.shape[1] + 1):
            last_token = (
                token_ids[:, step - 1 : step]
                if step
                else torch.full_like(mask, special["cls_token_id"])
            )
            attention_mask = (
                make_image_to_text_mask(num_image, step + 2)[-2:]
                if step
                else make_image_to_text_mask(num_image, 2)
            )
            text = torch.cat((last_token, mask), 1)
            encoded = model(
                None if step else recorded["image"],
                text,
                attention_mask=attention_mask,
                cache=cache,
            )
            step_logits.append(
                encoded.of("text") @ weights["mlm_head.weight"].T + weights["mlm_head.bias"]
            )
            cache.drop_last(1)
    torch.testing.assert_close(
        torch.stack(step_logits), expected["decode.forced_step_logits"], rtol=0, atol=1e-4
    )


def test_logits_of_whole_captions_equal_the_recorded_ones():
    name = "captioning"
    model, recorded, expected = (
        load_backbone(name),
        load_inputs(name),
        load_tensors(name, "outputs"),
    )
    recorded["text"], weights = (
        load_tensors(name, "inputs")["masked_tokens"],
        load_tensors(name, "model"),
    )
    attention_mask = make_image_to_text_mask(
        1 + model.config.num_patches, recorded["text"].shape[1]
    )
    with torch.inference_mode():
        states = model(
            recorded["image"],
            recorded["text"],
            text_padding=recorded["text_padding"],
            attention_mask=attention_mask,
        ).of("text")
        logits = states @ weights["mlm_head.weight"].T + weights["mlm_head.bias"]
    torch.testing.assert_close(logits, expected["logits_all_positions"], rtol=0, atol=1e-4)


def test_backbone_task_gives_the_same_states():
    task, report = load_released(load_tensors("backbone_layers", "model"), num_heads=4)
    assert isinstance(task, Backbone) and not report.ignored and not report.fresh
    recorded, expected = load_inputs("backbone_layers"), load_tensors("backbone_layers", "outputs")
    with torch.inference_mode():
        outputs = task.eval().outputs(recorded)
        predictions = task.predict(recorded | {"id": list("abcd")})
    torch.testing.assert_close(outputs["tokens"], expected["fused.encoder_out"], rtol=0, atol=1e-4)
    assert torch.equal(torch.cat((outputs["image"], outputs["text"]), 1), outputs["tokens"])
    assert [prediction["id"] for prediction in predictions] == list("abcd")
    assert torch.equal(
        torch.tensor([prediction["text"] for prediction in predictions]), outputs["text"][:, 0]
    )
    assert torch.equal(
        torch.tensor([prediction["image"] for prediction in predictions]), outputs["image"][:, 0]
    )
