"""Our weights directories: what comes back, what is refused, and starting one task from another's
weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY, TINY_RELEASE, ModelConfig
from beit3.ops.positions import resample_positions
from beit3.recipe import TaskConfig
from beit3.task import Task
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_frozen, load_weights, load_weights_as
from beit3.weights.release_format import to_released_state
from beit3.weights.store import read_config, save_weights

PAPER = replace(TINY, dim=32, depth=2, ffn_dim=48, image_size=16, vocab_size=64, text_positions=20)
RELEASE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=2,
    ffn_dim=48,
    image_size=16,
    vocab_size=64,
    text_positions=20,
)
VISUAL = VisualTokenizerConfig(
    image_size=16,
    patch_size=8,
    dim=16,
    depth=1,
    num_heads=2,
    ffn_dim=32,
    decoder_depth=1,
    code_dim=4,
    num_codes=9,
    teacher_dim=12,
)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    words = "a red cube left of the blue ball and one green cone near two small boxes on top"
    return TextTokenizer.train([words, words.title()], vocab_size=60)


@pytest.fixture(scope="module")
def other_tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["how many rings are under this great yellow lamp"], vocab_size=60)


def vqa(
    model: ModelConfig = PAPER, answers: tuple[str, ...] = ("yes", "no", "two"), **given
) -> VQA:
    config = VQAConfig(
        model=replace(model, final_norm=False),
        answers=answers,
        num_answers=len(answers),
        text_length=9,
    )
    return filled(VQA(config, **given))


def filled(task, seed: int = 0):
    task.init_weights(seed)
    return task


def same(one: Task, two: Task) -> None:
    assert one.config == two.config
    here, there = one.state_dict(), two.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def edit(directory: Path, **changes) -> None:
    """Change fields of `config.json`; None removes one."""
    data = json.loads((directory / "config.json").read_text()) | changes
    data = {key: value for key, value in data.items() if value is not Ellipsis}
    (directory / "config.json").write_text(json.dumps(data))


# Saving and loading -------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path, tokenizer):
    task = vqa(tokenizer=tokenizer)
    save_weights(task, tmp_path / "w")
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == [
        "config.json",
        "model.safetensors",
        "text.model",
    ]
    again = load_weights(tmp_path / "w")
    assert isinstance(again, VQA)
    same(again, task)
    assert again.tokenizer.bytes == tokenizer.bytes
    described = read_config(tmp_path / "w")
    assert (described.task, described.config, described.tokenizer) == (
        "vqa",
        task.config,
        tokenizer.digest,
    )
    data = json.loads((tmp_path / "w" / "config.json").read_text())
    assert data["config"]["image"]["mean"] == [0.5, 0.5, 0.5], (
        "preprocessing is part of the weights"
    )


def test_a_task_without_tokenizer(tmp_path):
    task = filled(Backbone(TaskConfig(model=RELEASE)))
    save_weights(task, tmp_path / "w")
    assert not (tmp_path / "w" / "text.model").exists()
    same(load_weights(tmp_path / "w"), task)


def test_saving_replaces_older_weights(tmp_path, tokenizer):
    save_weights(vqa(tokenizer=tokenizer), tmp_path / "w")
    newer = filled(Backbone(TaskConfig(model=PAPER)), 1)
    save_weights(newer, tmp_path / "w")
    same(load_weights(tmp_path / "w"), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert not (tmp_path / "w" / "text.model").exists(), "nothing of the older weights stays"


def test_a_save_that_was_interrupted_does_not_hinder_the_next(tmp_path):
    for leftover in (".w.new", ".w.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_text("half")
    task = filled(Backbone(TaskConfig(model=PAPER)))
    save_weights(task, tmp_path / "w")
    same(load_weights(tmp_path / "w"), task)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_failed_save_leaves_the_older_weights(tmp_path, monkeypatch):
    task = filled(Backbone(TaskConfig(model=PAPER)))
    save_weights(task, tmp_path / "w")
    (tmp_path / "w").rename(
        tmp_path / ".w.old"
    )  # where a save that dies between its two renames leaves them
    monkeypatch.setattr(
        "beit3.weights.store.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_weights(filled(Backbone(TaskConfig(model=PAPER)), 1), tmp_path / "w")
    same(load_weights(tmp_path / "w"), task)


def test_saving_never_replaces_what_is_not_weights(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(ValueError, match="photos exists and does not hold weights"):
        save_weights(vqa(), tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_visual_tokenizers_keep_their_codebook(tmp_path):
    task = filled(VQKD(VQKDConfig(model=VISUAL, image=replace(VQKDConfig().image, image_size=16))))
    task.backbone.quantizer.codebook.add_(0.5)
    task.teacher = torch.nn.Linear(2, 2)
    save_weights(task, tmp_path / "w")
    assert not [
        name
        for name in load_file(tmp_path / "w" / "model.safetensors")
        if name.startswith("teacher")
    ]
    again = load_weights(tmp_path / "w")
    task.teacher = None
    same(again, task)


# Frozen parts -------------------------------------------------------------------------------------


def pretrain(tmp_path: Path) -> Pretrain:
    save_weights(
        filled(VQKD(VQKDConfig(model=VISUAL, image=replace(VQKDConfig().image, image_size=16)))),
        tmp_path / "visual",
    )
    config = PretrainConfig(
        model=PAPER,
        image=Preprocessing(16),
        num_codes=9,
        token_size=16,
        visual_tokenizer=str(tmp_path / "visual"),
    )
    return filled(Pretrain(config))


def test_frozen_parts_are_stored_as_path_and_digest(tmp_path):
    task = pretrain(tmp_path)
    save_weights(task, tmp_path / "w")
    assert not [
        name
        for name in load_file(tmp_path / "w" / "model.safetensors")
        if name.startswith("visual_tokenizer")
    ]
    file = read_config(tmp_path / "w").frozen["visual_tokenizer"]
    assert file == load_frozen(str(tmp_path / "visual"), "vqkd")[1]
    same(load_weights(tmp_path / "w"), task)


def test_another_frozen_part_is_refused(tmp_path):
    save_weights(pretrain(tmp_path), tmp_path / "w")
    other = filled(
        VQKD(VQKDConfig(model=VISUAL, image=replace(VQKDConfig().image, image_size=16))), 1
    )
    save_weights(other, tmp_path / "visual")
    with pytest.raises(
        ValueError,
        match="visual_tokenizer .*visual is not the file that these weights were trained with",
    ):
        load_weights(tmp_path / "w")


def test_load_frozen_gives_no_gradients_and_checks_the_kind(tmp_path):
    save_weights(vqa(), tmp_path / "w")
    task, _ = load_frozen(str(tmp_path / "w"), "vqa")
    assert not task.training and not [
        name for name, p in task.named_parameters() if p.requires_grad
    ]
    with pytest.raises(ValueError, match="w holds weights of vqa, vqkd is needed here"):
        load_frozen(str(tmp_path / "w"), "vqkd")
    with pytest.raises(ValueError, match="no weights at .*absent"):
        load_frozen(str(tmp_path / "absent"), "vqkd")


# Faults -------------------------------------------------------------------------------------------


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


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
def test_tensors_must_agree_with_the_config(tmp_path, change, message):
    save_weights(vqa(), tmp_path / "w")
    rewrite(tmp_path / "w", change)
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
def test_config_faults_name_file_and_field(tmp_path, changes, message):
    save_weights(vqa(), tmp_path / "w")
    edit(tmp_path / "w", **changes)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w")


def test_files_that_are_cut_or_absent(tmp_path):
    save_weights(vqa(), tmp_path / "w")
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


def test_a_tokenizer_that_does_not_fit(tmp_path, tokenizer, other_tokenizer):
    save_weights(vqa(tokenizer=tokenizer), tmp_path / "w")
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


# Starting from other weights ----------------------------------------------------------------------


def test_fine_tuning_starts_from_pretrained_weights(tmp_path):
    source = filled(Pretrain(PretrainConfig(model=PAPER, image=Preprocessing(16), num_codes=9)), 1)
    save_weights(source, tmp_path / "w")
    task = vqa()
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


def test_positions_are_resampled_to_the_tasks_image_size(tmp_path):
    save_weights(vqa(), tmp_path / "w")
    task = filled(
        VQA(replace(vqa().config, model=replace(PAPER, final_norm=False, image_size=40))), 1
    )
    initialize_from(task, tmp_path / "w")
    old = vqa().backbone.image_embedding.positions.data
    expected = resample_positions(old, (2, 2), (5, 5), keep=3)
    assert torch.equal(task.backbone.image_embedding.positions.data, expected)
    assert torch.equal(expected[:3], old[:3])


def test_heads_are_taken_where_name_and_shape_agree(tmp_path):
    source = vqa()
    save_weights(source, tmp_path / "w")
    task = filled(VQA(replace(source.config, answers=("yes", "no"), num_answers=2)), 1)
    report = initialize_from(task, tmp_path / "w")
    assert report.fresh == {
        "head.3.weight": "shape [3, 64] in the file, [2, 64] here",
        "head.3.bias": "shape [3] in the file, [2] here",
    }
    assert torch.equal(task.pooler.dense.weight, source.pooler.dense.weight)


def test_an_official_file_starts_a_task_as_well(tmp_path):
    source = filled(Backbone(TaskConfig(model=RELEASE)), 1)
    torch.save(
        {"model": {key: tensor.half() for key, tensor in to_released_state(source).items()}},
        tmp_path / "a.pth",
    )
    task = vqa(replace(RELEASE, image_size=24))
    report = initialize_from(task, tmp_path / "a.pth")
    assert all(
        reason == "the final norm: vqa reads the states before it"
        for reason in report.ignored.values()
    )
    assert len(report.ignored) == 4 and "released backbone file" in report.source
    here: Tensor = task.backbone.blocks[1].attention.qkv.text.weight
    assert torch.equal(here, source.backbone.blocks[1].attention.qkv.text.weight.half().float())


def test_a_task_that_norms_starts_from_one_that_does_not(tmp_path):
    save_weights(vqa(), tmp_path / "w")
    task = filled(Pretrain(PretrainConfig(model=PAPER, image=Preprocessing(16), num_codes=9)), 1)
    report = initialize_from(task, tmp_path / "w")
    assert report.fresh["backbone.norm.weight"] == "the file's task has no final norm"
    assert torch.equal(task.backbone.norm.weight, torch.ones(32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dim": 64},
            r"another network \(dim is 32, here 64\): .* --task.model.dim 32; .* has shape \[.*\], this vqa needs \[.*\]",
        ),
        (
            {"num_heads": 2},
            r"another network \(num_heads is 4, here 2\): .* --task.model.num_heads 4; their tensors have the same shapes",
        ),
        (
            {"vocab_size": 70},
            r"backbone.text_embedding.tokens.weight has shape \[64, 32\], this vqa needs \[70, 32\]",
        ),
        ({"depth": 3, "fusion_layers": 2}, "tensors are missing: backbone.blocks.2."),
        ({"fusion_layers": 0}, "this vqa does not have 6 tensors: backbone.blocks.1.ffn.fusion"),
        ({"fusion_layers": 2}, "6 tensors are missing: backbone.blocks.0.norm2.fusion.weight"),
    ],
)
def test_a_backbone_that_does_not_fit(tmp_path, change, message):
    save_weights(vqa(), tmp_path / "w")
    task = vqa(replace(PAPER, **change))
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize_from(task, tmp_path / "w")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items()), (
        "nothing was changed"
    )


def test_a_network_of_another_kind(tmp_path):
    codes = filled(VQKD(VQKDConfig(model=VISUAL, image=replace(VQKDConfig().image, image_size=16))))
    save_weights(codes, tmp_path / "codes")
    save_weights(vqa(), tmp_path / "w")
    with pytest.raises(
        ValueError, match="it holds a vqkd, whose network is of another kind than that of vqa"
    ):
        initialize_from(vqa(), tmp_path / "codes")
    with pytest.raises(
        ValueError, match="it holds a vqa, whose network is of another kind than that of vqkd"
    ):
        initialize_from(codes, tmp_path / "w")


def test_a_released_text_table_needs_the_released_tokenizer(tmp_path, tokenizer):
    source = filled(Backbone(TaskConfig(model=replace(RELEASE, vocab_size=64010, depth=1))))
    torch.save({"model": to_released_state(source)}, tmp_path / "a.pth")
    task = vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer)
    with pytest.raises(
        ValueError,
        match="cannot start from .*a.pth: the text tokenizer has .* ids, the released one 64002",
    ):
        initialize_from(task, tmp_path / "a.pth")


def test_a_converted_release_knows_its_tokenizer_without_a_digest(tmp_path, tokenizer):
    """A directory converted without a tokenizer has no digest to compare with; its table of 64010
    rows tells."""
    released = vqa(replace(RELEASE, vocab_size=64010, depth=1))
    save_weights(released, tmp_path / "w")
    tokenizer.save(tmp_path / "mine.spm")
    message = r"w: the text tokenizer has \d+ ids, the released one 64002: give the beit3.spm of the release"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w", text_model=tmp_path / "mine.spm")
    with pytest.raises(ValueError, match=message):
        load_weights_as(tmp_path / "w", "backbone", text_model=tmp_path / "mine.spm")
    with pytest.raises(ValueError, match=f"cannot start from .*{message}"):
        initialize_from(
            vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer), tmp_path / "w"
        )
    save_weights(
        vqa(replace(RELEASE, vocab_size=64010, depth=1), tokenizer=tokenizer), tmp_path / "own"
    )
    assert load_weights(tmp_path / "own").tokenizer.digest == tokenizer.digest, (
        "a large table trained with a tokenizer of one's own"
    )


def test_another_text_tokenizer_is_an_error(tmp_path, tokenizer, other_tokenizer):
    save_weights(vqa(tokenizer=tokenizer), tmp_path / "w")
    with pytest.raises(
        ValueError,
        match="cannot start from .*w: the text tokenizer is not the one that these weights were trained with",
    ):
        initialize_from(vqa(tokenizer=other_tokenizer), tmp_path / "w")
    initialize_from(vqa(tokenizer=tokenizer), tmp_path / "w")
