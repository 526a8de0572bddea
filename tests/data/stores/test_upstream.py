"""Index files of the release: the file of a split, and each kind of line as a record."""

import json
import pickle
import time
from pathlib import Path

import pytest

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.data.stores.split_files import locate_split
from tests.data.prepare.test_formats import write_files

ANSWERS = [
    {"answer": "net", "label": 0},
    {"answer": "red", "label": 1},
    {"answer": "2", "label": 2},
]


def format_json_lines(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_index_files(root: Path, contents: dict[str, list[dict]]) -> Path:
    """Writes `<name>.jsonl` for each name."""
    texts = {f"{name}.jsonl": format_json_lines(lines) for name, lines in contents.items()}
    return write_files(root, texts)


def read(root: Path, task: str, split: str) -> list[dict]:
    return list(RecordDataset(locate_split(root, task, "main", split), root))


def assert_refused(root: Path, task: str, split: str, *phrases: str) -> None:
    with pytest.raises(ValueError) as error:
        read(root, task, split)
    message = str(error.value)
    assert "\n" not in message and all(phrase in message for phrase in phrases), message


# Questions ------------------------------------------------------------------------------------


def make_question(qid: int, **fields) -> dict:
    return {"image_path": f"train2014/{qid}.jpg", "text_segment": [7, 8], "qid": qid, **fields}


@pytest.fixture
def vqa(tmp_path) -> Path:
    write_files(tmp_path, {"answer2label.txt": format_json_lines(ANSWERS)})
    answers = {"labels": [2, 0], "scores": [1.0, 0.3]}
    train = [make_question(1, **answers), make_question(2, labels=[], scores=[])]
    return write_index_files(tmp_path, {"vqa.train": train, "vqa.test": [make_question(9)]})


def read_ids(root: Path, split: str) -> list[str]:
    return [record["id"] for record in read(root, "vqa", split)]


def test_questions(vqa):
    image = str(vqa / "train2014/1.jpg")
    first, second = read(vqa, "vqa", "train")
    assert first == {"id": "1", "image": image, "text": [7, 8], "answers": {"2": 1.0, "net": 0.3}}
    assert second["answers"] == {} and read(vqa, "vqa", "test")[0]["answers"] == {}
    assert locate_split(vqa, "vqa", "main", "train").with_name("answer2label.txt").is_file()


def test_val_trains_only_where_rest_val_is_scored(vqa):
    questions = [make_question(n, labels=[1], scores=[1.0]) for n in (3, 4, 5)]
    write_index_files(vqa, {"vqa.val": questions})
    assert read_ids(vqa, "train") == ["1", "2"] and read_ids(vqa, "val") == ["3", "4", "5"]
    write_index_files(vqa, {"vqa.trainable_val": questions[:2]})
    assert read_ids(vqa, "train") == ["1", "2"]
    assert read_ids(vqa, "val") == ["3", "4", "5"], "all of val is scored"
    write_index_files(vqa, {"vqa.rest_val": questions[2:]})
    assert read_ids(vqa, "train") == ["1", "2", "3", "4"] and read_ids(vqa, "val") == ["5"]
    dataset = RecordDataset(locate_split(vqa, "vqa", "main", "train"), vqa, limit=3)
    assert len(dataset) == 3 and dataset[2]["answers"] == {"red": 1.0}
    assert read_ids(vqa, "trainable_val") == ["3", "4"], "the release's names are splits, too"


def test_test_dev_is_a_split_and_records_can_be_pickled(vqa):
    write_files(vqa, {"vqa.test-dev.jsonl": format_json_lines([make_question(7)])})
    assert read_ids(vqa, "test-dev") == ["7"]
    dataset = RecordDataset(locate_split(vqa, "vqa", "main", "train"), vqa)
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


@pytest.mark.parametrize(
    ("line", "phrases"),
    [
        (
            make_question(1, labels=[3], scores=[1.0]),
            ["vqa.train.jsonl line 1 has label 3", "answer2label.txt"],
        ),
        (make_question(1, labels=[1], scores=[]), ["line 1 has 1 labels, 0 scores"]),
        (make_question(1, labels=[1]), ["line 1 has no scores (list)"]),
        ({"image_path": "a.jpg", "text_segment": [1]}, ["line 1 has no qid (int)"]),
        (make_question(1) | {"text_segment": []}, ["line 1 has text_segment []", "piece ids"]),
        (make_question(1) | {"text_segment": [1, "a"]}, ["line 1 has text_segment"]),
        (make_question(1) | {"image_path": None}, ["line 1 has no image_path (str)"]),
    ],
)
def test_malformed_questions_are_refused(vqa, line, phrases):
    assert_refused(write_index_files(vqa, {"vqa.train": [line]}), "vqa", "train", *phrases)


def test_questions_need_the_list_of_answers(vqa):
    (vqa / "answer2label.txt").unlink()
    message = "vqa.train.jsonl line 1 has label 2"
    assert_refused(vqa, "vqa", "train", message, "put the answer2label.txt")
    write_files(vqa, {"answer2label.txt": "net\nred\n"})
    assert_refused(vqa, "vqa", "train", "answer2label.txt line 1 is not a JSON object")


def test_lines_of_answers_are_counted_with_blank_ones(vqa):
    write_files(vqa, {"answer2label.txt": "\n" + format_json_lines([{"answer": "net"}])})
    assert_refused(vqa, "vqa", "train", "answer2label.txt line 2 has no label (int)")


def test_a_large_file_is_read_in_seconds(vqa):
    """The time grows with the number of lines, not with its square: that took minutes."""
    lines = [make_question(qid, labels=[1], scores=[1.0]) for qid in range(100_000)]
    write_index_files(vqa, {"vqa.train": lines})
    start = time.process_time()
    assert len(read(vqa, "vqa", "train")) == 100_000
    assert time.process_time() - start < 20


# Statements and classes -----------------------------------------------------------------------


def test_statements(tmp_path):
    line = {
        "image_path": "images/dev/dev-8-0-img0.png",
        "image2_path": "images/dev/dev-8-0-img1.png",
        "text_segment": [5],
        "label": 1,
        "identifier": "dev-8-0-1",
    }
    contents = {
        "nlvr2.dev.index": [line],
        "nlvr2.test-P.index": [line | {"label": 0}],
        "nlvr2.train.index": [line],
    }
    write_index_files(tmp_path, contents)
    assert read(tmp_path, "nlvr2", "val") == [
        {
            "id": "dev-8-0-1",
            "image": str(tmp_path / line["image_path"]),
            "image2": str(tmp_path / line["image2_path"]),
            "text": [5],
            "label": 1,
            "group": "dev-8-1",
        }
    ]
    assert read(tmp_path, "nlvr2", "test")[0]["label"] == 0
    assert len(read(tmp_path, "nlvr2", "train")) == 1
    write_index_files(tmp_path, {"nlvr2.dev.index": [line | {"label": "True"}]})
    assert_refused(tmp_path, "nlvr2", "val", "nlvr2.dev.index.jsonl line 1 has no label (int)")


def test_classes(tmp_path):
    lines = [
        {"image_path": "train/n1/a.JPEG", "label": 0},
        {"image_path": "train/n2/b.JPEG", "label": 1},
    ]
    write_index_files(tmp_path, {"imagenet.train.index": lines})
    assert read(tmp_path, "imagenet", "train")[1] == {
        "id": "train/n2/b.JPEG",
        "image": str(tmp_path / "train/n2/b.JPEG"),
        "label": 1,
    }


# Captions -------------------------------------------------------------------------------------


def make_caption(image_id: int, *ids: int) -> dict:
    return {
        "image_path": f"val2014/{image_id}.jpg",
        "text_segment": list(ids) or None,
        "image_id": image_id,
    }


@pytest.mark.parametrize("name", ["coco_retrieval", "flickr30k"])
def test_retrieval_evaluates_each_image_once(tmp_path, name):
    lines = [make_caption(0, 5, 6), make_caption(0, 7), make_caption(1, 8), make_caption(0, 9)]
    write_index_files(tmp_path, {f"{name}.{split}": lines for split in ("train", "val", "test")})
    paths = [str(tmp_path / f"val2014/{n}.jpg") for n in (0, 1)]
    for split in ("val", "test"):
        assert read(tmp_path, "retrieval", split) == [
            {"id": "0", "image": paths[0], "image_id": 0, "captions": [[5, 6], [7], [9]]},
            {"id": "1", "image": paths[1], "image_id": 1, "captions": [[8]]},
        ]
    train = read(tmp_path, "retrieval", "train")
    assert train[1] == {"id": "0#1", "image": paths[0], "image_id": 0, "text": [7]}
    assert len({record["id"] for record in train}) == 4


def test_captioning_and_its_references(tmp_path):
    contents = {
        "coco_captioning.train": [make_caption(42, 5), make_caption(42, 6)],
        "coco_captioning.val": [make_caption(7), make_caption(42)],
    }
    write_index_files(tmp_path, contents)
    train = read(tmp_path, "captioning", "train")
    assert [(record["id"], record["text"]) for record in train] == [("42#0", [5]), ("42#1", [6])]
    assert [record["captions"] for record in read(tmp_path, "captioning", "val")] == [[], []]
    annotations = [
        {"image_id": image_id, "caption": text, "id": number}
        for number, (image_id, text) in enumerate([(42, "a dog"), (7, "x"), (42, "b")])
    ]
    references = {"annotations": annotations, "images": [{"id": 42}, {"id": 7}]}
    write_files(tmp_path, {"coco_karpathy_val_gt.json": references})
    paths = [str(tmp_path / f"val2014/{n}.jpg") for n in (7, 42)]
    assert read(tmp_path, "captioning", "val") == [
        {"id": "7", "image": paths[0], "image_id": 7, "captions": ["x"]},
        {"id": "42", "image": paths[1], "image_id": 42, "captions": ["a dog", "b"]},
    ]
    write_files(tmp_path, {"coco_karpathy_val_gt.json": [{"image": "x"}]})
    message = "coco_karpathy_val_gt.json has no annotations"
    assert_refused(tmp_path, "captioning", "val", message)


def test_nocaps(tmp_path):
    contents = {
        "coco_captioning.train": [make_caption(42, 5)],
        "nocaps.val": [make_caption(0)],
        "nocaps.test": [make_caption(0)],
    }
    write_index_files(tmp_path, contents)
    references = {"annotations": [{"image_id": 0, "caption": "a dog"}]}
    write_files(tmp_path, {"nocaps_val_4500_captions.json": references})
    assert read(tmp_path, "captioning", "val")[0]["captions"] == ["a dog"]
    assert read(tmp_path, "captioning", "test")[0]["captions"] == []
    assert read(tmp_path, "captioning", "train")[0]["id"] == "42#0"


# Which file holds a split ---------------------------------------------------------------------


def test_records_of_ours_come_first_and_are_not_mixed_with_index_files(vqa):
    path = vqa / "vqa/main/train.jsonl"
    write_records(path, [{"id": "ours"}])
    assert locate_split(vqa, "vqa", "main", "train") == path
    assert_refused(vqa, "vqa", "test", "no vqa/main/test.jsonl", "beit3 prepare vqa")


def test_two_index_files_of_one_split_are_refused(tmp_path):
    names = ("coco_retrieval.val", "flickr30k.val", "flickr30k.test")
    write_index_files(tmp_path, {name: [make_caption(0, 5)] for name in names})
    second = "flickr30k.val.jsonl are both retrieval val"
    assert_refused(tmp_path, "retrieval", "val", "coco_retrieval.val.jsonl and", second)
    assert len(read(tmp_path, "retrieval", "test")) == 1


def test_a_split_without_a_file_is_named(vqa):
    message = "no retrieval/main/train.jsonl"
    assert_refused(vqa, "retrieval", "train", message, "beit3 prepare retrieval")
    assert_refused(vqa, "vqa", "val", "no vqa/main/val.jsonl")
    with pytest.raises(ValueError, match="no vqa/other/train"):
        locate_split(vqa, "vqa", "other", "train")


def test_a_truncated_line_is_named(vqa):
    lines = format_json_lines([make_question(1)]) + '{"image_path": '
    write_files(vqa, {"vqa.train.jsonl": lines})
    assert_refused(vqa, "vqa", "train", "vqa.train.jsonl line 2 is not a JSON object")
