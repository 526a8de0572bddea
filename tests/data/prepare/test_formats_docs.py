"""The tables shown in docs/records.md, prepared by the task for which each is shown."""

import re
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.stores.records import Records
from beit3.task import load_task

DOCS_PAGE = (Path(__file__).resolve().parents[3] / "docs/records.md").read_text(encoding="utf-8")
SHOWN_TABLES = dict(
    re.findall(r"`(\w+/\w+\.\w+)`[^`]*?:\n\n```text\n(.*?)```", DOCS_PAGE, re.DOTALL)
)


def prepare_table(tmp_path: Path, task: str, file: str) -> dict[str, list[dict]]:
    """Returns split -> records of a task, prepared from the table of this name."""
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(SHOWN_TABLES[file])
    for name in {*re.findall(r"photos/\w+\.jpg", SHOWN_TABLES[file])}:
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


def test_every_shown_table_is_tested():
    assert SHOWN_TABLES.keys() == {
        "questions/train.csv",
        "votes/all.jsonl",
        "statements/all.csv",
        "captions/all.csv",
        "classes/all.csv",
    }


def test_shown_questions_are_prepared(tmp_path):
    splits = prepare_table(tmp_path, "vqa", "questions/train.csv")
    assert [record["answers"] for record in splits["train"]] == [{"red": 1.0}, {"yes": 1.0}]
    assert [record["answers"] for record in splits["val"]] == [{"cat": 1.0}]


def test_shown_votes_are_prepared(tmp_path):
    splits = prepare_table(tmp_path, "vqa", "votes/all.jsonl")
    assert (
        splits["train"][0]["answers"]["yes"] == pytest.approx(0.6)
        and splits["val"][0]["answers"]["cat"] == 1.0
    )


def test_shown_statements_are_prepared(tmp_path):
    splits = prepare_table(tmp_path, "nlvr2", "statements/all.csv")
    assert [record["label"] for split in ("train", "val") for record in splits[split]] == [1, 1, 0]


@pytest.mark.parametrize("task", ["captioning", "retrieval"])
def test_shown_captions_are_prepared(tmp_path, task):
    splits = prepare_table(tmp_path, task, "captions/all.csv")
    assert [record["text"] for record in splits["train"]] == [
        "a red door, half open",
        "someone left the door open",
    ]
    assert (
        splits["val"][0]["captions"] == ["a cat asleep"]
        and splits["val"][0]["image_id"] == "photos/cat.jpg"
    )


def test_shown_classes_are_prepared(tmp_path):
    splits = prepare_table(tmp_path, "imagenet", "classes/all.csv")
    assert [record["label"] for split in ("train", "val") for record in splits[split]] == [1, 0, 0]
    assert (tmp_path / "data/imagenet/main/classes.txt").read_text() == "cat\ndoor\n"
