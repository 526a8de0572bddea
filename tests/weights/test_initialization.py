"""A task starts from other weights: what is loaded, fresh, ignored or refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit3.data.views.preprocessing import Preprocessing
from beit3.ops.positions import resample_positions
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA
from beit3.weights.initialization import initialize_from
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.weights.tasks import PAPER, RELEASE, initialize, make_visual_tokenizer, make_vqa


def test_a_task_starts_from_pretrained_weights(tmp_path):
    source = initialize(
        Pretrain(PretrainConfig(model=PAPER, image=Preprocessing(16), num_codes=9)), 1
    )
    save_weights(source, tmp_path / "w")
    task = make_vqa()
    head = {
        name: tensor.clone()
        for name, tensor in task.state_dict().items()
        if not name.startswith("backbone.")
    }
    report = initialize_from(task, tmp_path / "w")
    state = task.state_dict()
    for name, tensor in source.backbone.state_dict().items():
        if not name.startswith("norm."):
            assert torch.equal(state[f"backbone.{name}"], tensor), name
    assert all(torch.equal(state[name], tensor) for name, tensor in head.items())
    assert set(report.fresh) == set(head)
    heads = {
        f"{head}.{part}" for head in ("text_head", "image_head") for part in ("weight", "bias")
    }
    assert report.ignored.keys() == heads | {"backbone.norm.weight", "backbone.norm.bias"}
    assert set(report.loaded) == {name for name in state if name.startswith("backbone.")}


def test_positions_are_resampled_to_the_image_size_of_the_task(tmp_path):
    save_weights(make_vqa(), tmp_path / "w")
    task = initialize(
        VQA(replace(make_vqa().config, model=replace(PAPER, final_norm=False, image_size=40))), 1
    )
    initialize_from(task, tmp_path / "w")
    old = make_vqa().backbone.image_embedding.positions.data
    expected = resample_positions(old, (2, 2), (5, 5), keep=3)
    assert torch.equal(task.backbone.image_embedding.positions.data, expected)
    assert torch.equal(expected[:3], old[:3])


def test_heads_are_taken_where_name_and_shape_agree(tmp_path):
    source = make_vqa()
    save_weights(source, tmp_path / "w")
    task = initialize(VQA(replace(source.config, answers=("yes", "no"), num_answers=2)), 1)
    report = initialize_from(task, tmp_path / "w")
    assert report.fresh == {
        "head.3.weight": "shape [3, 64] in the file, [2, 64] here",
        "head.3.bias": "shape [3] in the file, [2] here",
    }
    assert torch.equal(task.pooler.dense.weight, source.pooler.dense.weight)


def test_a_task_starts_from_a_released_file(tmp_path):
    source = initialize(Backbone(TaskConfig(model=RELEASE)), 1)
    torch.save(
        {"model": {key: tensor.half() for key, tensor in to_released_state(source).items()}},
        tmp_path / "a.pth",
    )
    task = make_vqa(replace(RELEASE, image_size=24))
    report = initialize_from(task, tmp_path / "a.pth")
    assert all(
        reason == "the final norm: vqa reads the states before it"
        for reason in report.ignored.values()
    )
    assert len(report.ignored) == 4 and "released backbone file" in report.source
    weight: Tensor = task.backbone.blocks[1].attention.qkv.text.weight
    assert torch.equal(weight, source.backbone.blocks[1].attention.qkv.text.weight.half().float())


def test_a_final_norm_that_the_weights_lack_is_fresh(tmp_path):
    save_weights(make_vqa(), tmp_path / "w")
    task = initialize(
        Pretrain(PretrainConfig(model=PAPER, image=Preprocessing(16), num_codes=9)), 1
    )
    report = initialize_from(task, tmp_path / "w")
    assert report.fresh["backbone.norm.weight"] == "the file's task has no final norm"
    assert torch.equal(task.backbone.norm.weight, torch.ones(32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dim": 64},
            r"another network \(dim is 32, here 64\): .* --task.model.dim 32; "
            r".* has shape \[.*\], this vqa needs \[.*\]",
        ),
        (
            {"num_heads": 2},
            r"another network \(num_heads is 4, here 2\): .* --task.model.num_heads 4; "
            "their tensors have the same shapes",
        ),
        (
            {"vocab_size": 70},
            r"text_embedding.tokens.weight has shape \[64, 32\], this vqa needs \[70, 32\]",
        ),
        ({"depth": 3, "fusion_layers": 2}, "tensors are missing: backbone.blocks.2."),
        ({"fusion_layers": 0}, "this vqa does not have 6 tensors: backbone.blocks.1.ffn.fusion"),
        ({"fusion_layers": 2}, "6 tensors are missing: backbone.blocks.0.norm2.fusion.weight"),
    ],
)
def test_a_backbone_of_other_sizes_is_refused(tmp_path, change, message):
    save_weights(make_vqa(), tmp_path / "w")
    task = make_vqa(replace(PAPER, **change))
    initial_state = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_from(task, tmp_path / "w")
    assert all(
        torch.equal(tensor, initial_state[name]) for name, tensor in task.state_dict().items()
    ), "nothing was changed"


def test_a_network_of_another_kind_is_refused(tmp_path):
    codes = make_visual_tokenizer()
    save_weights(codes, tmp_path / "codes")
    save_weights(make_vqa(), tmp_path / "w")
    with pytest.raises(
        ValueError, match="it holds a vqkd, whose network is of another kind than that of vqa"
    ):
        initialize_from(make_vqa(), tmp_path / "codes")
    with pytest.raises(
        ValueError, match="it holds a vqa, whose network is of another kind than that of vqkd"
    ):
        initialize_from(codes, tmp_path / "w")


def test_a_released_file_needs_the_released_tokenizer(tmp_path, tokenizer):
    source = initialize(Backbone(TaskConfig(model=replace(RELEASE, vocab_size=64010, depth=1))))
    torch.save({"model": to_released_state(source)}, tmp_path / "a.pth")
    task = make_vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer)
    with pytest.raises(
        ValueError,
        match="cannot start from .*a.pth: the text tokenizer has .* ids, the released one 64002",
    ):
        initialize_from(task, tmp_path / "a.pth")


def test_weights_of_another_text_tokenizer_are_refused(tmp_path, tokenizer, other_tokenizer):
    save_weights(make_vqa(tokenizer=tokenizer), tmp_path / "w")
    with pytest.raises(
        ValueError,
        match="cannot start from .*w: the text tokenizer is not the one that these weights "
        "were trained with",
    ):
        initialize_from(make_vqa(tokenizer=other_tokenizer), tmp_path / "w")
    initialize_from(make_vqa(tokenizer=tokenizer), tmp_path / "w")
