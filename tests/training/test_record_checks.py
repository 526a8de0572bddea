"""Records are checked before the first step: each wrong one is named by file, line and field."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.task import load_task, task_name
from beit3.training.record_checks import check_records, find_checked_stores
from tests.world_root import list_trainable_tasks

VQA = {"id": "1", "image": "1.jpg", "text": "which?", "answers": {"red": 1.0}}
NLVR2 = {"id": "1", "image": "1.jpg", "image2": "1.jpg", "text": "so it is", "label": 1}
IMAGENET = {"id": "1", "image": "1.jpg", "label": 3}
CAPTION = {"id": "1", "image": "1.jpg", "image_id": 7, "text": "a cat"}
CAPTIONS = {"id": "1", "image": "1.jpg", "image_id": 7, "captions": ["a cat"]}
PAIR = {"id": "1", "image": "1.jpg", "text": "a cat"}


def check(
    task: str, folder: Path, lines: list[Any], purpose: str, *, limit: int = 0, **options: Any
) -> None:
    """Checks the lines, records or raw text, as the records of a task."""
    (folder / "1.jpg").touch()
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "split.jsonl").write_text("".join(text + "\n" for text in texts))
    source = RecordDataset(folder / "split.jsonl", folder, limit=limit)
    check_records(load_task(task), {load_task(task).sources[-1]: source}, purpose, **options)


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


def test_fields_that_the_task_does_not_declare_name_no_files(tmp_path):
    others = {"image2": None, "label_map": ["no.png"]}
    check("vqa", tmp_path, [change(VQA, **others)], "score")
    check("vqa", tmp_path, [change(VQA, image2="no.jpg")], "score")
    with pytest.raises(ValueError, match=r"line 1: field image2 names .*no\.jpg"):
        check("nlvr2", tmp_path, [change(NLVR2, image2="no.jpg")], "score")


def test_no_file_is_looked_for_where_all_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("beit3.training.record_checks.measure_file", None)
    check("vqa", tmp_path, [VQA], "score", bad_share=1.0)
    check("vqa", tmp_path, [VQA], "train")


def test_the_records_within_a_limit_are_checked(tmp_path):
    """Of two datasets it keeps records of both. Tars and token ids are passed over."""
    (tmp_path / "1.jpg").touch()
    for name in ("a", "b"):
        records = [change(VQA, id=str(number)) for number in range(9)]
        records[5]["text"] = 7
        write_records(tmp_path / name / "val.jsonl", records)
    for limit in (2, 4, 10, 0):
        source = RecordDataset(tmp_path / "val", tmp_path, limit=limit)
        assert source.names == ["a", "b"] and len(source) == (limit or 18)
        checked = {
            (store.path.parent.name, str(index))
            for store, indices in find_checked_stores(source)
            for index in indices
        }
        assert checked == {tuple(record["id"].split("/")) for record in source}
    source = RecordDataset(tmp_path / "val", tmp_path, limit=10)
    check_records(load_task("vqa"), {"main": source}, "score")
    with pytest.raises(ValueError, match=r"val\.jsonl line 6 .*\(1 more of 18 records"):
        check_records(
            load_task("vqa"), {"main": RecordDataset(tmp_path / "val", tmp_path)}, "score"
        )
    source.stores[0] = object()  # as a store of another kind
    ((store, indices),) = find_checked_stores(source)
    assert store is source.stores[1] and len(indices) == 5


def test_every_rank_raises_whatever_stops_the_check(tmp_path):
    """Also what nobody expects, as an error of the disk: the others do not wait for rank 0."""
    (tmp_path / "1.jpg").touch()
    write_records(tmp_path / "split.jsonl", [change(VQA, text=7)])
    mp.spawn(_check_on_rank, (tmp_path,), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for expected, unexpected in results:
        assert expected.startswith("ValueError: ") and "line 1 (record 1): field text" in expected
        assert "OSError" in unexpected and "the disk is gone" in unexpected
    assert results[1][1].startswith("RuntimeError: rank 0 failed with ")


def _check_on_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    messages = []
    source = RecordDataset(folder / "split.jsonl", folder)
    for progress in (None, _fail):
        try:
            check_records(load_task("vqa"), {"main": source}, "train", progress=progress)
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    (folder / f"{rank}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


def _fail(done: int, total: int) -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("kind", list_trainable_tasks(), ids=task_name)
def test_every_task_declares_fields_that_its_own_records_have(root, kind):
    for source in kind.sources:
        assert kind.get_record_fields(source)
        directory = root / kind.records_from.get(source, task_name(kind)) / source
        for split, purpose in (("train", "train"), ("val", "score")):
            records = RecordDataset(directory / f"{split}.jsonl", root)
            check_records(kind, {source: records}, purpose)


def test_the_check_of_a_large_file_takes_seconds(tmp_path):
    """100,000 records are read and checked in far less than a minute."""
    write_records(tmp_path / "train.jsonl", (change(VQA, id=number) for number in range(100_000)))
    calls: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda done, total: calls.append((done, total))  # noqa: E731
    source = RecordDataset(tmp_path / "train.jsonl", tmp_path)
    check_records(load_task("vqa"), {"main": source}, "train", progress=progress)
    assert calls[-1] == (99_000, 100_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, r"line 1 .*\(99999 more of 100000 records"),
        ("which?", r"line 1: field image .* the first of 100000 such records"),
    ],
)
def test_faults_in_every_record_take_seconds_too(tmp_path, text, message):
    """The time grows with the number of records, not with its square: that took minutes."""
    write_records(
        tmp_path / "val.jsonl",
        (VQA | {"id": n, "image": f"no/{n}.jpg", "text": text} for n in range(100_000)),
    )
    source = RecordDataset(tmp_path / "val.jsonl", tmp_path)
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        check_records(load_task("vqa"), {"main": source}, "score")
    assert time.process_time() - start < 20
