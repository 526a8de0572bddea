"""The tables of docs/records.md, prepared as they stand there by the task that each is for."""

import re
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.stores.records import Records
from beit3.task import load_task

PAGE = (Path(__file__).resolve().parents[3] / "docs/records.md").read_text(encoding="utf-8")
SHOWN = dict(re.findall(r"`(\w+/\w+\.\w+)`[^`]*?:\n\n```text\n(.*?)```", PAGE, re.DOTALL))


def prepared(tmp_path: Path, task: str, file: str) -> dict[str, list[dict]]:
    """Split -> records of a task made from the table of this name."""
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(SHOWN[file])
    for name in {*re.findall(r"photos/\w+\.jpg", SHOWN[file])}:
        (tmp_path / file).with_name("photos").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save((tmp_path / file).parent / name)
    report = load_task(task).prepare((tmp_path / file).parent, tmp_path / "data", "main")
    assert report["passed_over"] == []
    splits = {
        split: list(Records(tmp_path / f"data/{task}/main/{split}.jsonl"))
        for split in report["records"]
    }
    assert all(
        (tmp_path / "data" / record["image"]).is_file()
        for records in splits.values()
        for record in records
    )
    return splits


def test_every_table_that_is_shown_is_tried():
    assert SHOWN.keys() == {
        "questions/train.csv",
        "votes/all.jsonl",
        "statements/all.csv",
        "captions/all.csv",
        "classes/all.csv",
    }


def test_questions(tmp_path):
    found = prepared(tmp_path, "vqa", "questions/train.csv")
    assert [record["answers"] for record in found["train"]] == [{"red": 1.0}, {"yes": 1.0}]
    assert [record["answers"] for record in found["val"]] == [{"cat": 1.0}]


def test_votes(tmp_path):
    found = prepared(tmp_path, "vqa", "votes/all.jsonl")
    assert (
        found["train"][0]["answers"]["yes"] == pytest.approx(0.6)
        and found["val"][0]["answers"]["cat"] == 1.0
    )


def test_statements(tmp_path):
    found = prepared(tmp_path, "nlvr2", "statements/all.csv")
    assert [record["label"] for split in ("train", "val") for record in found[split]] == [1, 1, 0]


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_captions(tmp_path, task):
    found = prepared(tmp_path, task, "captions/all.csv")
    assert [record["text"] for record in found["train"]] == [
        "a red door, half open",
        "someone left the door open",
    ]
    assert (
        found["val"][0]["captions"] == ["a cat asleep"]
        and found["val"][0]["image_id"] == "photos/cat.jpg"
    )


def test_classes(tmp_path):
    found = prepared(tmp_path, "imagenet", "classes/all.csv")
    assert [record["label"] for split in ("train", "val") for record in found[split]] == [1, 0, 0]
    assert (tmp_path / "data/imagenet/main/classes.txt").read_text() == "cat\ndoor\n"
