"""Records are checked before the first step: each wrong one is named by file, line and field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.task import load_task, task_name
from beit3.training.record_checks import check_records
from tests.world_root import list_trainable_tasks

VQA = {"id": "1", "image": "1.jpg", "text": "which?", "answers": {"red": 1.0}}
NLVR2 = {"id": "1", "image": "1.jpg", "image2": "1.jpg", "text": "so it is", "label": 1}
IMAGENET = {"id": "1", "image": "1.jpg", "label": 3}
CAPTION = {"id": "1", "image": "1.jpg", "image_id": 7, "text": "a cat"}
CAPTIONS = {"id": "1", "image": "1.jpg", "image_id": 7, "captions": ["a cat"]}
PAIR = {"id": "1", "image": "1.jpg", "text": "a cat"}


def check(task: str, folder: Path, lines: list[Any], purpose: str, **options: Any) -> None:
    """Checks the lines, records or raw text, as the records of a task."""
    (folder / "1.jpg").touch()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "split.jsonl").write_text("".join(text + "\n" for text in texts))
    sources = {load_task(task).sources[-1]: RecordDataset(folder / "split.jsonl", folder)}
    check_records(load_task(task), sources, purpose, **options)


def change(record: dict, **fields: Any) -> dict:
    return {key: value for key, value in (record | fields).items() if value != "ABSENT"}


@pytest.mark.parametrize("field", ["id", "image", "text", "answers"])
@pytest.mark.parametrize("value", ["ABSENT", None, "", " ", 7.5, True, [[]], {"red": "1"}])
def test_every_wrong_value_of_a_question_is_named(tmp_path, field, value):
    good = change(VQA, id="0")
    with pytest.raises(ValueError, match=rf"split\.jsonl line 3.* field {field}") as caught:
        check("vqa", tmp_path, [good, "", change(VQA, **{field: value})], "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "record", "purpose", "field"),
    [
        ("vqa", change(VQA, answers=["red"]), "train", "answers"),
        ("vqa", change(VQA, answers={"red": float("nan")}), "train", "answers"),
        ("vqa", change(VQA, answers={"red": 1.5}), "train", "answers"),
        ("vqa", change(VQA, answers={"red": -0.1}), "train", "answers"),
        ("vqa", change(VQA, answers={}), "train", "answers"),
        ("vqa", change(VQA, answers="ABSENT"), "score", "answers"),
        ("vqa", change(VQA, annotators=[]), "score", "annotators"),
        ("vqa", change(VQA, annotators="red"), "score", "annotators"),
        ("vqa", change(VQA, id=True), "train", "id"),
        ("vqa", change(VQA, text=[5, -1]), "train", "text"),
        ("vqa", change(VQA, text="\ud800"), "train", "text"),
        ("vqa", change(VQA, image="a\0b"), "train", "image"),
        ("vqa", change(VQA, image={"path": "1.jpg"}), "train", "image"),
        ("nlvr2", change(NLVR2, image2="ABSENT"), "train", "image2"),
        ("nlvr2", change(NLVR2, label="true"), "train", "label"),
        ("nlvr2", change(NLVR2, label=2), "train", "label"),
        ("nlvr2", change(NLVR2, label="ABSENT"), "score", "label"),
        ("nlvr2", change(NLVR2, boxes=[[0, 0, 1, 1]]), "train", "boxes"),
        ("imagenet", change(IMAGENET, label="ABSENT"), "train", "label"),
        ("imagenet", change(IMAGENET, label=None), "train", "label"),
        ("imagenet", change(IMAGENET, label=[1, 2]), "train", "label"),
        ("imagenet", change(IMAGENET, label=-1), "train", "label"),
        ("imagenet", change(IMAGENET, label=1.5), "train", "label"),
        ("imagenet", change(IMAGENET, label="3"), "train", "label"),
        ("imagenet", change(IMAGENET, label=True), "train", "label"),
        ("captioning", CAPTIONS, "train", "text"),
        ("captioning", change(CAPTION, captions=["a cat"]), "train", "captions"),
        ("captioning", change(CAPTIONS, captions="a red circle"), "score", "captions"),
        ("captioning", change(CAPTIONS, captions=[]), "score", "captions"),
        ("captioning", change(CAPTIONS, captions=["a cat", ""]), "score", "captions"),
        ("captioning", change(CAPTIONS, captions=[[5, 6]]), "score", "captions"),
        ("captioning", change(CAPTIONS, captions="ABSENT"), "score", "captions"),
        ("captioning", change(CAPTIONS, captions="ABSENT", text=[5, 6]), "score", "text"),
        ("retrieval", change(CAPTIONS, captions=[]), "score", "captions"),
        ("retrieval", change(CAPTIONS, captions="a red circle"), "score", "captions"),
        ("pretrain", change(PAIR, text="ABSENT"), "train", "text"),
        ("vqkd", {"id": "1"}, "score", "image"),
    ],
)
def test_each_task_names_the_field_that_is_wrong(tmp_path, task, record, purpose, field):
    with pytest.raises(ValueError, match=rf"split\.jsonl line 1.* field {field}\b"):
        check(task, tmp_path, [record], purpose)


@pytest.mark.parametrize(
    ("task", "records", "purpose"),
    [
        ("vqa", [change(VQA, id=1), change(VQA, id=2, answers={})], "score"),
        ("vqa", [change(VQA, answers="ABSENT"), change(VQA, id="2", answers={})], "predict"),
        ("vqa", [change(VQA, text=[5, 6], note={"any": ["thing"]})], "train"),
        ("vqa", ["\ufeff" + json.dumps(VQA)], "train"),
        ("nlvr2", [change(NLVR2, label=True, boxes=[[0, 0, 1, 1], [0, 0, 1, 1]])], "train"),
        ("imagenet", [change(IMAGENET, label="ABSENT")], "predict"),
        ("captioning", [CAPTION], "train"),
        ("captioning", [CAPTION, change(CAPTIONS, id="2")], "score"),
        ("captioning", [change(CAPTIONS, captions=[])], "predict"),
        ("retrieval", [change(CAPTIONS, captions=[[5, 6], "a cat"])], "score"),
        ("retrieval", [CAPTION], "score"),
    ],
)
def test_records_that_can_be_used_pass(tmp_path, task, records, purpose):
    check(task, tmp_path, records, purpose)


@pytest.mark.parametrize("line", ["[1, 2]", "7", '"text"', "{", '{"id": 1}}', "[" * 100_000])
def test_lines_that_are_no_objects_are_named(tmp_path, line):
    with pytest.raises(ValueError, match=r"split\.jsonl line 2 is not a JSON object"):
        check("vqa", tmp_path, [VQA, line], "train")


def test_labels_beyond_the_classes_are_named(tmp_path):
    config = load_task("imagenet").Config(num_classes=3)
    with pytest.raises(ValueError, match=r"line 1 .* field label is 3, not below the 3"):
        check("imagenet", tmp_path, [IMAGENET], "train", config=config)


def test_training_answers_that_are_in_no_list_are_named(tmp_path):
    config = load_task("vqa").Config(answers=("blue", "green"), num_answers=2)
    with pytest.raises(ValueError, match="field answers names 'red', none of which"):
        check("vqa", tmp_path, [VQA], "train", config=config)
    check("vqa", tmp_path, [VQA], "score", config=config)


def test_ids_are_told_apart_where_predictions_are_scored(tmp_path):
    records = [VQA, change(VQA, id="2"), change(VQA, id=1)]
    with pytest.raises(
        ValueError, match=r"line 3 \(record 1\): field id is also that of .* line 1"
    ):
        check("vqa", tmp_path, records, "score")
    check("vqa", tmp_path, records, "train")


def test_answers_that_are_empty_throughout_cannot_be_scored(tmp_path):
    records = [change(VQA, answers={}), change(VQA, id="2", answers={})]
    with pytest.raises(ValueError, match="field answers is empty in all 2 records"):
        check("vqa", tmp_path, records, "score")


def test_missing_images_to_score_are_named_beyond_the_allowed_fraction(tmp_path):
    absolute = change(VQA, id="2", image=str(tmp_path / "1.jpg"))
    records = [VQA, absolute, change(VQA, id="3", image="no.jpg")]
    with pytest.raises(ValueError, match=r"line 3: field image names .*no\.jpg.* 1 such .* of 3"):
        check("vqa", tmp_path, records, "score")
    check("vqa", tmp_path, records, "score", bad_share=0.34)
    check("vqa", tmp_path, records, "train")


def test_all_faulty_records_are_counted(tmp_path):
    records = [VQA] + [change(VQA, id=str(number), text=7) for number in range(2, 5)]
    with pytest.raises(ValueError, match=r"line 2 \(record 2\): .*\(2 more of 4 records"):
        check("vqa", tmp_path, records, "train")


def test_only_records_within_the_limit_are_checked(tmp_path):
    check("vqa", tmp_path, [VQA, change(VQA, id="2", text=7)], "score", limit=1)


@pytest.mark.parametrize("kind", list_trainable_tasks(), ids=task_name)
def test_every_task_declares_fields_that_its_own_records_have(root, kind):
    for source in kind.sources:
        assert kind.get_record_fields(source)
        directory = root / kind.records_from.get(source, task_name(kind)) / source
        for split, purpose in (("train", "train"), ("val", "score")):
            records = RecordDataset(directory / f"{split}.jsonl", root)
            check_records(kind, {source: records}, purpose)


def test_the_check_of_a_large_file_takes_seconds(tmp_path, monkeypatch):
    """100,000 records are read and checked in far less than a minute."""
    write_records(tmp_path / "train.jsonl", (change(VQA, id=number) for number in range(100_000)))
    calls: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    source = RecordDataset(tmp_path / "train.jsonl", tmp_path)
    check_records(load_task("vqa"), {"main": source}, "train", progress=progress)
    assert calls[-1] == (99_000, 100_000)
