"""Weights are loaded from directories and released files, or refused by a plain message."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD
from beit3.task import task_name
from beit3.tasks.backbone import Backbone
from beit3.tasks.vqa import VQA
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_frozen, load_released, load_weights, load_weights_as
from beit3.weights.release_format import identify_checkpoint, to_released_state
from beit3.weights.store import read_config, save_weights
from tests.golden import find_fixture, load_config, load_tensors
from tests.weights.states import (
    add_pretraining_heads,
    assert_equal_tensors,
    drop_final_norm,
    make_backbone,
    make_retrieval_state,
)
from tests.weights.tasks import RELEASE, assert_same_weights, make_vqa

# Directories of weights ---------------------------------------------------------------------------


def test_saved_weights_are_loaded_with_config_and_tokenizer(tmp_path, tokenizer):
    task = make_vqa(tokenizer=tokenizer)
    save_weights(task, tmp_path / "w")
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [
        "config.json",
        "model.safetensors",
        "text.model",
    ]
    loaded = load_weights(tmp_path / "w")
    assert isinstance(loaded, VQA)
    assert_same_weights(loaded, task)
    assert loaded.tokenizer.bytes == tokenizer.bytes
    stored = read_config(tmp_path / "w")
    assert (stored.task, stored.config, stored.tokenizer) == (
        "vqa",
        task.config,
        tokenizer.digest,
    )
    data = json.loads((tmp_path / "w" / "config.json").read_text())
    assert data["config"]["image"]["mean"] == [0.5, 0.5, 0.5], (
        "preprocessing is part of the weights"
    )


def test_frozen_tasks_have_no_gradients_and_are_of_the_expected_task(tmp_path):
    save_weights(make_vqa(), tmp_path / "w")
    task, _ = load_frozen(str(tmp_path / "w"), "vqa")
    assert not task.training and not [
        name for name, p in task.named_parameters() if p.requires_grad
    ]
    with pytest.raises(ValueError, match="w holds weights of vqa, vqkd is needed here"):
        load_frozen(str(tmp_path / "w"), "vqkd")
    with pytest.raises(ValueError, match="no weights at .*absent"):
        load_frozen(str(tmp_path / "absent"), "vqkd")


def rewrite_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes) -> None:
    """Changes fields of `config.json`; `...` removes one."""
    data = json.loads((directory / "config.json").read_text()) | changes
    data = {key: value for key, value in data.items() if value is not Ellipsis}
    (directory / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.3.bias"), "1 tensors are missing: head.3.bias"),
        (lambda t: t.update({"head.4.bias": torch.zeros(1)}), "1 tensors are unknown: head.4.bias"),
        (
            lambda t: t.update({"head.3.bias": torch.zeros(7)}),
            r"head.3.bias has shape \[7\], the config needs \[3\]",
        ),
    ],
)
def test_tensors_that_disagree_with_the_config_are_named(tmp_path, change, message):
    save_weights(make_vqa(), tmp_path / "w")
    rewrite_tensors(tmp_path / "w", change)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "config.json is of format 2, not 1"),
        ({"task": "vqaa"}, "unknown task 'vqaa'; did you mean vqa?"),
        (
            {"config": {"modle": {}}},
            "config.json: config: unknown field 'modle'; did you mean model?",
        ),
        ({"tokenizer": ...}, "config.json lacks the field 'tokenizer'"),
    ],
)
def test_malformed_configs_are_named(tmp_path, changes, message):
    save_weights(make_vqa(), tmp_path / "w")
    edit_config(tmp_path / "w", **changes)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w")


def test_truncated_and_absent_files_are_named(tmp_path):
    save_weights(make_vqa(), tmp_path / "w")
    file = tmp_path / "w" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        load_weights(tmp_path / "w")
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        load_weights(tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_weights(tmp_path / "w")
    with pytest.raises(ValueError, match="no weights at .*nowhere: config.json is missing"):
        load_weights(tmp_path / "nowhere")


def test_another_tokenizer_than_in_training_is_refused(tmp_path, tokenizer, other_tokenizer):
    save_weights(make_vqa(tokenizer=tokenizer), tmp_path / "w")
    other_tokenizer.save(tmp_path / "other.spm")
    with pytest.raises(ValueError, match="other.spm is a tokenizer that does not fit the weights"):
        load_weights(tmp_path / "w", text_model=tmp_path / "other.spm")
    other_tokenizer.save(tmp_path / "w" / "text.model")
    with pytest.raises(ValueError, match="text.model is a tokenizer that does not fit the weights"):
        load_weights(tmp_path / "w")
    (tmp_path / "w" / "text.model").unlink()
    assert not load_weights(tmp_path / "w").has_tokenizer
    tokenizer.save(tmp_path / "mine.spm")
    assert (
        load_weights(tmp_path / "w", text_model=tmp_path / "mine.spm").tokenizer.digest
        == tokenizer.digest
    )


def test_a_converted_release_needs_the_released_tokenizer(tmp_path, tokenizer):
    """Weights converted without a tokenizer have no digest; their 64010 rows of ids show it."""
    released = make_vqa(replace(RELEASE, vocab_size=64010, depth=1))
    save_weights(released, tmp_path / "w")
    tokenizer.save(tmp_path / "mine.spm")
    message = (
        r"w: the text tokenizer has \d+ ids, the released one 64002: "
        "give the beit3.spm of the release"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w", text_model=tmp_path / "mine.spm")
    with pytest.raises(ValueError, match=message):
        load_weights_as(tmp_path / "w", "backbone", text_model=tmp_path / "mine.spm")
    with pytest.raises(ValueError, match=f"cannot start from .*{message}"):
        initialize_from(
            make_vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer),
            tmp_path / "w",
        )
    save_weights(
        make_vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer), tmp_path / "own"
    )
    assert load_weights(tmp_path / "own").tokenizer.digest == tokenizer.digest, (
        "a large table may belong to another tokenizer"
    )


# Released files -----------------------------------------------------------------------------------


def test_vqa_equals_recorded_outputs_loss_and_gradients():
    inputs, expected = load_tensors("vqa", "inputs"), load_tensors("vqa", "outputs")
    task, _ = load_released(load_tensors("vqa", "model"), num_heads=4)
    assert isinstance(task, VQA) and task.config.num_answers == 37 and task.config.answers == ()
    padding = inputs["padding_mask"].bool()
    batch = {
        "image": inputs["image"],
        "text": inputs["question"],
        "text_padding": padding,
        "target": inputs["labels"],
    }
    task.eval()
    torch.testing.assert_close(task.outputs(batch)["logits"], expected["logits"], rtol=0, atol=1e-4)
    loss = task(batch)["losses"]["loss"] / task.targets(batch)["loss"]
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-6, atol=1e-4)

    loss.backward()
    assert task.backbone.image_embedding.mask_token.grad is None
    gradient_task, _ = load_released(load_tensors("vqa", "model"), num_heads=4)
    with torch.no_grad():
        for value, parameter in zip(gradient_task.parameters(), task.parameters(), strict=True):
            value.copy_(torch.zeros_like(value) if parameter.grad is None else parameter.grad)
    gradients = to_released_state(gradient_task)
    for name, gradient in load_tensors("vqa", "grads").items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    norms = json.loads((find_fixture("vqa") / "grad_norms.json").read_text())
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm or 0.0, rel=1e-4, abs=1e-4), name


def test_the_number_of_heads_can_be_given():
    """Shapes do not show the number of heads: any divisor of the width loads."""
    state = load_tensors("vqa", "model")
    assert load_released(state, num_heads=4)[0].config.model.num_heads == 4
    assert load_released(state)[0].config.model.num_heads == 1


def test_heads_of_other_tasks_are_reported(backbone_state):
    state = backbone_state | {
        "vision_head.weight": torch.zeros(64, 64),
        "language_head.weight": torch.zeros(64, 64),
        "logit_scale": torch.zeros(()),
    }
    task, report = load_released(state, Backbone)
    assert isinstance(task, Backbone)
    assert len(report.ignored) == 3 and all(
        reason.startswith("head of retrieval: ") for reason in report.ignored.values()
    )


def test_a_file_without_text_parameters_leaves_them_fresh(backbone_state):
    state = {
        key: tensor
        for key, tensor in backbone_state.items()
        if ".B." not in key and "text_embed" not in key
    }
    task, report = load_released(state)
    assert task.config.model.vocab_size == 64010
    assert set(report.fresh.values()) == {"the file holds the image side alone"}
    assert {name for name in task.state_dict() if ".text" in name} == set(report.fresh)
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(
        task.eval().outputs({"image": image})["image"],
        make_backbone().eval().outputs({"image": image})["image"],
    )


def test_vqkd_files_load_as_the_visual_tokenizer():
    state, inputs, expected = (
        load_tensors("vqkd", file) for file in ("model", "inputs", "outputs")
    )
    num_heads = load_config("vqkd").get("num_heads", 4)
    task, report = load_released(state, num_heads=num_heads)
    assert identify_checkpoint(state) == "vqkd" and not report.fresh
    assert set(report.ignored) == {
        key
        for key in state
        if key not in ("quantize.embedding.weight",) and key.startswith("quantize.")
    }
    codes = task.eval().outputs({"token_image": inputs["image_0_1"]})["codes"]
    assert torch.equal(codes.flatten(), expected["image_0_1.codebook_indices"].flatten())
    with pytest.raises(ValueError, match="a released vqkd file cannot become vqa"):
        load_released(state, "vqa")


# Released files of another task -------------------------------------------------------------------


def test_a_pretrained_file_loads_as_vqa_with_a_fresh_head(backbone_state):
    state = add_pretraining_heads(backbone_state)
    task, report = load_released(state, "vqa", answers=("yes", "no"))
    assert (
        isinstance(task, VQA)
        and task.config.answers == ("yes", "no")
        and task.config.num_answers == 2
    )
    assert task.backbone.norm is None
    assert set(report.ignored) == {
        key for key in state if "encoder.layer_norm." in key or key.startswith("m")
    }
    assert {reason for key, reason in report.ignored.items() if "head" in key} == {
        "head of pretrain: no part of vqa"
    }
    assert set(report.fresh) == {
        name for name in task.state_dict() if not name.startswith("backbone.")
    }
    second_task, _ = load_released(state, VQA, answers=("yes", "no"))
    assert_equal_tensors(dict(task.state_dict()), dict(second_task.state_dict()))
    assert 0 < task.head[0].weight.abs().max() <= 0.02, (
        "fresh heads have the initial values of BEiT"
    )
    assert [line.split(" (")[0] for line in report.lines()] == [
        f"{len(report.loaded)} tensors loaded from a released pretrain file",
        "4 ignored",
        "4 ignored",
        "10 fresh",
    ]


def test_a_retrieval_file_classifies_by_names(backbone_state):
    state = make_retrieval_state(backbone_state)
    task, report = load_released(
        state, "imagenet", classes=("cat", "dog", "house"), prompt="a photo of a {}"
    )
    assert not report.fresh and not report.ignored
    assert (task.config.head, task.config.num_classes, task.config.prompt) == (
        "names",
        3,
        "a photo of a {}",
    )
    assert task.config.classes == ("cat", "dog", "house")
    assert task.config.image == replace(load_released(state)[0].config.image, image_size=16), (
        "preprocessing is that of retrieval"
    )
    assert_equal_tensors(to_released_state(task), state)


def test_an_imagenet_file_needs_as_many_classes_as_outputs(backbone_state):
    state = to_released_state(
        load_released(drop_final_norm(backbone_state), "imagenet", classes=("cat", "dog"))[0]
    )
    task, report = load_released(state, classes=("cat", "dog"))
    assert not report.fresh and (task.config.head, task.config.num_classes) == ("linear", 2)
    assert (task.config.image.mean, task.config.image.resize) == (IMAGENET_MEAN_STD[0], "crop")
    as_backbone, _ = load_released(state, "backbone")
    assert as_backbone.config.image == task.config.image, "preprocessing is that of the file"
    with pytest.raises(
        ValueError, match="3 classes given, the file's head has 2 outputs: give its own list"
    ):
        load_released(state, classes=("a", "b", "c"))
    with pytest.raises(ValueError, match="prompt 'a photo' has no {}"):
        load_released(
            make_retrieval_state(backbone_state), "imagenet", classes=("a",), prompt="a photo"
        )


@pytest.mark.parametrize("name", ["nlvr2", "captioning", "retrieval", "vqa", "imagenet"])
def test_a_pretrained_file_loads_as_every_task(backbone_state, name):
    """Only the head is fresh; captioning takes that of masked language modeling."""
    state = add_pretraining_heads(backbone_state)
    task, report = load_released(state, name)
    assert task_name(type(task)) == name
    heads = {name for name in task.state_dict() if not name.startswith("backbone.")}
    assert set(report.fresh) == (set() if name == "captioning" else heads)
    assert all(torch.isfinite(parameter).all() for parameter in task.parameters())
    assert name != "nlvr2" or 0 < task.head.dense1.weight.abs().max() <= 0.02 * 1e-3


# Released files that are refused ------------------------------------------------------------------


LAYER = "beit3.encoder.layers.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.ffn.A.fc1.weight": None}, rf"1 tensors are missing: {LAYER}.ffn.A.fc1.weight"),
        (
            {f"{LAYER}.self_attn.k_proj.B.bias": None},
            rf"1 tensor is missing: {LAYER}.self_attn.k_proj.B.bias",
        ),
        ({"beit3.text_embed.weight": None}, "1 tensors are missing: beit3.text_embed.weight"),
        (
            {f"{LAYER}.ffn.VL.fc1.weight": torch.zeros(1)},
            rf"1 unknown tensors: {LAYER}.ffn.VL.fc1.weight",
        ),
        ({"extra": torch.zeros(1)}, "1 unknown tensors: extra"),
        (
            {f"{LAYER}.ffn.B.fc2.bias": torch.zeros(63)},
            rf"{LAYER}.ffn.B.fc2.bias has shape \[63\], .* needs \[64\]",
        ),
        (
            {f"{LAYER}.self_attn.v_proj.A.bias": torch.zeros(3)},
            rf"{LAYER}.self_attn.v_proj.A.bias has shape \[3\], \[64\]",
        ),
        (
            {"beit3.encoder.embed_positions.A.weight": torch.zeros(8, 64)},
            "has 8 rows: not 3 and a square grid",
        ),
        (
            {"beit3.vision_embed.proj.weight": torch.zeros(65, 3, 8, 8)},
            "width 65 is not a multiple of 64.*give num_heads",
        ),
        (
            {"beit3.vision_embed.proj.weight": torch.zeros(64)},
            "no tensor of 4 dimensions called vision_embed.proj.weight",
        ),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(backbone_state, change, message):
    state = {key: tensor for key, tensor in (backbone_state | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_released(state)
    assert "\n" not in str(caught.value)


def test_a_misshapen_part_of_a_head_is_refused(backbone_state):
    state = to_released_state(load_released(backbone_state, "vqa", answers=("yes", "no"))[0]) | {
        "pooler.dense.weight": torch.zeros(64, 63)
    }
    with pytest.raises(
        ValueError, match=r"pooler.dense.weight has shape \[64, 63\], this vqa needs \[64, 64\]"
    ):
        load_released(state)


def test_a_wrong_number_of_answers_is_refused():
    with pytest.raises(ValueError, match="2 answers given, the file's head has 37 outputs"):
        load_released(load_tensors("vqa", "model"), answers=("a", "b"))


def test_answers_are_refused_for_a_task_without_them(backbone_state):
    with pytest.raises(ValueError, match="answers given, but backbone has none: leave answers out"):
        load_released(backbone_state, answers=("a", "b"))


def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(backbone_state):
    with pytest.raises(ValueError, match="dim 64 is not a multiple of num_heads 5"):
        load_released(backbone_state, num_heads=5)
