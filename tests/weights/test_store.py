"""Directories of weights are written whole or not at all."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.weights.loading import load_frozen, load_weights
from beit3.weights.store import read_config, save_weights
from tests.weights.tasks import (
    PAPER,
    RELEASE,
    assert_same_weights,
    initialize,
    make_pretrain,
    make_visual_tokenizer,
    make_vqa,
)


def test_a_task_without_tokenizer_is_saved_without_one(tmp_path):
    task = initialize(Backbone(TaskConfig(model=RELEASE)))
    save_weights(task, tmp_path / "w")
    assert not (tmp_path / "w" / "text.model").exists()
    assert_same_weights(load_weights(tmp_path / "w"), task)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of files")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_can_be_read_by_those_whom_the_umask_allows(tmp_path, tokenizer, umask):
    previous = os.umask(umask)
    try:
        save_weights(make_vqa(tokenizer=tokenizer), tmp_path / "w")
    finally:
        os.umask(previous)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "w").iterdir()}
    assert modes == dict.fromkeys(
        ("model.safetensors", "config.json", "text.model"), 0o666 & ~umask
    )


def test_saving_replaces_older_weights(tmp_path, tokenizer):
    save_weights(make_vqa(tokenizer=tokenizer), tmp_path / "w")
    newer_task = initialize(Backbone(TaskConfig(model=PAPER)), 1)
    save_weights(newer_task, tmp_path / "w")
    assert_same_weights(load_weights(tmp_path / "w"), newer_task)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    assert not (tmp_path / "w" / "text.model").exists(), "no file of the older weights is left"


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    for leftover in (".w.new", ".w.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_text("half")
    task = initialize(Backbone(TaskConfig(model=PAPER)))
    save_weights(task, tmp_path / "w")
    assert_same_weights(load_weights(tmp_path / "w"), task)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_failed_save_leaves_the_older_weights(tmp_path, monkeypatch):
    task = initialize(Backbone(TaskConfig(model=PAPER)))
    save_weights(task, tmp_path / "w")
    (tmp_path / "w").rename(
        tmp_path / ".w.old"
    )  # where a save that dies between its two renames leaves them
    monkeypatch.setattr(
        "beit3.weights.store.write_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_weights(initialize(Backbone(TaskConfig(model=PAPER)), 1), tmp_path / "w")
    assert_same_weights(load_weights(tmp_path / "w"), task)


def test_saving_never_replaces_other_files(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(ValueError, match="photos exists and does not hold weights"):
        save_weights(make_vqa(), tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_visual_tokenizers_are_saved_with_codebook_and_without_teacher(tmp_path):
    task = make_visual_tokenizer()
    task.backbone.quantizer.codebook.add_(0.5)
    task.teacher = torch.nn.Linear(2, 2)
    save_weights(task, tmp_path / "w")
    assert not [
        name
        for name in load_file(tmp_path / "w" / "model.safetensors")
        if name.startswith("teacher")
    ]
    loaded = load_weights(tmp_path / "w")
    task.teacher = None
    assert_same_weights(loaded, task)


def test_frozen_parts_are_stored_as_path_and_digest(tmp_path):
    task = make_pretrain(tmp_path)
    save_weights(task, tmp_path / "w")
    assert not [
        name
        for name in load_file(tmp_path / "w" / "model.safetensors")
        if name.startswith("visual_tokenizer")
    ]
    file = read_config(tmp_path / "w").frozen["visual_tokenizer"]
    assert file == load_frozen(str(tmp_path / "visual"), "vqkd")[1]
    assert_same_weights(load_weights(tmp_path / "w"), task)


def test_a_frozen_part_that_changed_is_refused(tmp_path):
    save_weights(make_pretrain(tmp_path), tmp_path / "w")
    other_visual_tokenizer = make_visual_tokenizer(1)
    save_weights(other_visual_tokenizer, tmp_path / "visual")
    with pytest.raises(
        ValueError,
        match="visual_tokenizer .*visual is not the file that these weights were trained with",
    ):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize(
    "change",
    [{"task": 3}, {"frozen": "x"}, {"tokenizer": ["x"]}],
    ids=lambda change: next(iter(change)),
)
def test_a_field_of_another_type_is_named(tmp_path, change):
    save_weights(initialize(Backbone(TaskConfig(model=RELEASE))), tmp_path / "w")
    path = tmp_path / "w" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"config.json: the field '{next(iter(change))}' is"):
        load_weights(tmp_path / "w")
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_weights(tmp_path / "w")
