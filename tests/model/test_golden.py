"""The backbone against outputs recorded from the official code, through the table of released
names.

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
from tests.reference import backbone as slow

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


def backbone(name: str) -> BEiT3:
    task, _ = load_released(
        load_tensors(name, "model"),
        "backbone",
        num_heads=load_config(name)["encoder_attention_heads"],
    )
    assert isinstance(task.backbone, BEiT3)
    return task.backbone.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """The fixture's inputs under our argument names."""
    given = load_tensors(name, "inputs")
    image = given["image_a"] if name == "nlvr2" else given["image"]
    padding = given.get("padding_mask", given.get("backbone.padding_mask"))
    found = {"image": image, "text": given[TEXTS[name]], "text_padding": padding.bool()}
    if "backbone.vision_masked_position" in given:
        found["image_mask"] = given["backbone.vision_masked_position"].bool()
    return found


@pytest.mark.parametrize("name", ["vqa", "captioning", "retrieval", "nlvr2", "imageclassification"])
def test_every_way_to_call_the_backbone(name):
    model, given, expected = backbone(name), inputs(name), load_tensors(name, "outputs")
    assert (model.norm is not None) == load_config(name)["normalize_output"]
    tolerance = 1e-4 if model.norm is not None else 5e-4
    for case, arguments in INPUTS.items():
        with torch.inference_mode():
            found = model(**{argument: given[argument] for argument in arguments}).tokens
        torch.testing.assert_close(
            found,
            expected[f"backbone.{case}"],
            rtol=0,
            atol=tolerance,
            msg=lambda m, c=case: f"{c}: {m}",
        )


@pytest.mark.parametrize("case", ["fused", "image_only", "text_only"])
def test_every_layer(case):
    model, given, expected = (
        backbone("backbone_layers"),
        inputs("backbone_layers"),
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
            **{argument: given[argument] for argument in INPUTS[case]}
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
def test_the_slow_implementation_agrees_with_the_official_one_too(case):
    model, given, expected = (
        backbone("backbone_layers"),
        inputs("backbone_layers"),
        load_tensors("backbone_layers", "outputs"),
    )
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    arguments = {
        name: given[name].double() if name == "image" else given[name] for name in INPUTS[case]
    }
    seen: dict[str, Tensor] = {}
    seen["encoder_out"] = slow.encode(state, model.config, **arguments, trace=seen)
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
def test_another_image_size(name):
    given, expected = load_tensors(name, "inputs"), load_tensors(name, "outputs")
    file, state = find_fixture(name) / "model.safetensors", load_tensors(name, "model")
    small, _ = load_released(
        state, "backbone", num_heads=load_config(name)["encoder_attention_heads"]
    )
    model = replace(small.config.model, image_size=given["image"].shape[-1])
    task = Backbone(replace(small.config, model=model)).eval()
    initialize_from(task, file)
    table = task.backbone.image_embedding.positions
    torch.testing.assert_close(
        table.data, expected["embed_positions.A.weight.after"], rtol=0, atol=1e-6
    )
    assert torch.equal(table[:3], given["embed_positions.A.weight.before"][:3])
    with torch.inference_mode():
        states = task.outputs({"image": given["image"]})["image"]
        on_the_fly = small.eval().outputs({"image": given["image"]})["image"]
    torch.testing.assert_close(states, expected["encoder_out"], rtol=0, atol=5e-4)
    torch.testing.assert_close(on_the_fly, expected["encoder_out"], rtol=0, atol=5e-4)
    norm = state["fc_norm.weight"], state["fc_norm.bias"]
    pooled = torch.nn.functional.layer_norm(states[:, 1:].mean(1), (states.shape[-1],), *norm, 1e-5)
    logits = pooled @ given["new_model.head.weight"].T + given["new_model.head.bias"]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-4)


def test_captions_step_by_step():
    """The official protocol: image with [<s>, <mask>], then [word, <mask>] a call, each time
    forgetting the mask."""
    name = "captioning"
    model, given, expected = (
        backbone(name),
        load_tensors(name, "inputs"),
        load_tensors(name, "outputs"),
    )
    weights, words = load_tensors(name, "model"), given["decode.forced_tokens"]
    special = load_config(name)["special_token_ids"]
    mask = torch.full_like(words[:, :1], special["mask_token_id"])
    rows, cache, found = 1 + model.config.num_patches, Cache(), []
    with torch.inference_mode():
        for step in range(words.shape[1] + 1):
            word = (
                words[:, step - 1 : step]
                if step
                else torch.full_like(mask, special["cls_token_id"])
            )
            may = (
                make_image_to_text_mask(rows, step + 2)[-2:]
                if step
                else make_image_to_text_mask(rows, 2)
            )
            text = torch.cat((word, mask), 1)
            encoded = model(None if step else given["image"], text, attention_mask=may, cache=cache)
            found.append(
                encoded.of("text") @ weights["mlm_head.weight"].T + weights["mlm_head.bias"]
            )
            cache.drop_last(1)
    torch.testing.assert_close(
        torch.stack(found), expected["decode.forced_step_logits"], rtol=0, atol=1e-4
    )


def test_captions_in_one_call():
    name = "captioning"
    model, given, expected = backbone(name), inputs(name), load_tensors(name, "outputs")
    given["text"], weights = (
        load_tensors(name, "inputs")["masked_tokens"],
        load_tensors(name, "model"),
    )
    may = make_image_to_text_mask(1 + model.config.num_patches, given["text"].shape[1])
    with torch.inference_mode():
        states = model(
            given["image"], given["text"], text_padding=given["text_padding"], attention_mask=may
        ).of("text")
        logits = states @ weights["mlm_head.weight"].T + weights["mlm_head.bias"]
    torch.testing.assert_close(logits, expected["logits_all_positions"], rtol=0, atol=1e-4)


def test_backbone_task_gives_the_same_states():
    task, report = load_released(load_tensors("backbone_layers", "model"), num_heads=4)
    assert isinstance(task, Backbone) and not report.ignored and not report.fresh
    given, expected = inputs("backbone_layers"), load_tensors("backbone_layers", "outputs")
    with torch.inference_mode():
        outputs = task.eval().outputs(given)
        predictions = task.predict(given | {"id": list("abcd")})
    torch.testing.assert_close(outputs["tokens"], expected["fused.encoder_out"], rtol=0, atol=1e-4)
    assert torch.equal(torch.cat((outputs["image"], outputs["text"]), 1), outputs["tokens"])
    assert [prediction["id"] for prediction in predictions] == list("abcd")
    assert torch.equal(
        torch.tensor([prediction["text"] for prediction in predictions]), outputs["text"][:, 0]
    )
    assert torch.equal(
        torch.tensor([prediction["image"] for prediction in predictions]), outputs["image"][:, 0]
    )
