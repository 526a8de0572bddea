"""Which file holds a split: by task, source and split, for one dataset or several."""

from pathlib import Path

import pytest

from beit3.data.stores.split_files import find_split_files, locate_split


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_a_split_is_found_by_its_name(tmp_path):
    train = touch(tmp_path / "vqa/main/train.jsonl")
    tokens = touch(tmp_path / "pretrain/texts/train.tokens")
    assert locate_split(tmp_path, "vqa", "main", "train") == train
    assert locate_split(tmp_path, "pretrain", "texts", "train") == tokens


def test_the_error_for_an_absent_split_names_the_command(tmp_path):
    with pytest.raises(ValueError) as error:
        locate_split(tmp_path, "vqa", "main", "val")
    assert f"beit3 prepare vqa --raw DIR --root {tmp_path}" in str(error.value)
    assert "vqa/main/val.jsonl" in str(error.value)
    with pytest.raises(ValueError, match="--source pairs"):
        locate_split(tmp_path, "pretrain", "pairs", "train")


def test_several_datasets_are_found_below_their_source(tmp_path):
    source = tmp_path / "pretrain/pairs"
    coco = touch(source / "coco/train.jsonl")
    web = touch(source / "web/train.shards")
    touch(source / ".hidden/train.jsonl")
    assert locate_split(tmp_path, "pretrain", "pairs", "train") == source / "train"
    assert find_split_files(source, "train") == [coco, web]
    assert find_split_files(source, "val") == []


def test_two_files_of_one_split_are_refused(tmp_path):
    source = tmp_path / "pretrain/pairs"
    touch(source / "web/train.shards")
    duplicate = touch(source / "web/train.jsonl")
    with pytest.raises(
        ValueError, match=r"web/train\.jsonl and .*web/train\.shards are both train"
    ):
        locate_split(tmp_path, "pretrain", "pairs", "train")
    duplicate.unlink()
    touch(source / "train.jsonl")
    with pytest.raises(ValueError, match=r"pairs/train\.jsonl and .*train\.shards are both train"):
        locate_split(tmp_path, "pretrain", "pairs", "train")
    touch(source / "train.tokens")
    with pytest.raises(ValueError, match=r"train\.jsonl and .*train\.tokens are both train: keep"):
        locate_split(tmp_path, "pretrain", "pairs", "train")
