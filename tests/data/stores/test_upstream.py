"""Upstream's index files read as they are: which file serves, and each kind of line as our record."""

import json
import pickle
from pathlib import Path

import pytest

from beit3.data.loader import Source
from beit3.data.stores.records import locate, write_records
from tests.data.prepare.test_formats import files

ANSWERS = [
    {"answer": "net", "label": 0},
    {"answer": "red", "label": 1},
    {"answer": "2", "label": 2},
]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def index(root: Path, **contents: list[dict]) -> Path:
    """Files of JSON lines; a name's __ is a dot."""
    return files(
        root,
        {
            f"{name.replace('__', '.').replace('_P', '-P')}.jsonl": jsonl(rows)
            for name, rows in contents.items()
        },
    )


def read(root: Path, task: str, split: str) -> list[dict]:
    return list(Source(locate(root, task, "main", split), root))


def refused(root: Path, task: str, split: str, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        read(root, task, split)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# Questions -----------------------------------------------------------------------------------------------------------


def question(qid: int, **fields) -> dict:
    return {"image_path": f"train2014/{qid}.jpg", "text_segment": [7, 8], "qid": qid, **fields}


@pytest.fixture
def vqa(tmp_path) -> Path:
    files(tmp_path, {"answer2label.txt": jsonl(ANSWERS)})
    scored = {"labels": [2, 0], "scores": [1.0, 0.3]}
    return index(
        tmp_path,
        vqa__train=[question(1, **scored), question(2, labels=[], scores=[])],
        vqa__test=[question(9)],
    )


def test_questions(vqa):
    image = str(vqa / "train2014/1.jpg")
    first, second = read(vqa, "vqa", "train")
    assert first == {"id": "1", "image": image, "text": [7, 8], "answers": {"2": 1.0, "net": 0.3}}
    assert second["answers"] == {} and read(vqa, "vqa", "test")[0]["answers"] == {}
    assert locate(vqa, "vqa", "main", "train").with_name("answer2label.txt").is_file()


def ids(root: Path, split: str) -> list[str]:
    return [record["id"] for record in read(root, "vqa", split)]


def test_the_rest_of_val_trains_only_where_it_is_not_scored(vqa):
    given = [question(n, labels=[1], scores=[1.0]) for n in (3, 4, 5)]
    index(vqa, vqa__val=given)
    assert ids(vqa, "train") == ["1", "2"] and ids(vqa, "val") == ["3", "4", "5"]
    index(vqa, vqa__trainable_val=given[:2])
    assert ids(vqa, "train") == ["1", "2"] and ids(vqa, "val") == ["3", "4", "5"], (
        "val is scored whole"
    )
    index(vqa, vqa__rest_val=given[2:])
    assert ids(vqa, "train") == ["1", "2", "3", "4"] and ids(vqa, "val") == ["5"]
    source = Source(locate(vqa, "vqa", "main", "train"), vqa, limit=3)
    assert len(source) == 3 and source[2]["answers"] == {"red": 1.0}
    assert ids(vqa, "trainable_val") == ["3", "4"], "any other of their names is a split of its own"


def test_test_dev_and_pickling(vqa):
    files(vqa, {"vqa.test-dev.jsonl": jsonl([question(7)])})
    assert ids(vqa, "test-dev") == ["7"]
    source = Source(locate(vqa, "vqa", "main", "train"), vqa)
    assert list(pickle.loads(pickle.dumps(source))) == list(source)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            question(1, labels=[3], scores=[1.0]),
            ["vqa.train.jsonl line 1 has label 3", "answer2label.txt"],
        ),
        (question(1, labels=[1], scores=[]), ["line 1 has 1 labels, 0 scores"]),
        (question(1, labels=[1]), ["line 1 has no scores (list)"]),
        ({"image_path": "a.jpg", "text_segment": [1]}, ["line 1 has no qid (int)"]),
        (question(1) | {"text_segment": []}, ["line 1 has text_segment []", "piece ids"]),
        (question(1) | {"text_segment": [1, "a"]}, ["line 1 has text_segment"]),
        (question(1) | {"image_path": None}, ["line 1 has no image_path (str)"]),
    ],
)
def test_broken_questions(vqa, row, words):
    refused(index(vqa, vqa__train=[row]), "vqa", "train", *words)


def test_questions_without_an_answer_list(vqa):
    (vqa / "answer2label.txt").unlink()
    refused(vqa, "vqa", "train", "vqa.train.jsonl line 1 has label 2", "put the answer2label.txt")
    files(vqa, {"answer2label.txt": "net\nred\n"})
    refused(vqa, "vqa", "train", "answer2label.txt line 1 is not a JSON object")


# Statements and classes ----------------------------------------------------------------------------------------------


def test_statements(tmp_path):
    row = {
        "image_path": "images/dev/dev-8-0-img0.png",
        "image2_path": "images/dev/dev-8-0-img1.png",
        "text_segment": [5],
        "label": 1,
        "identifier": "dev-8-0-1",
    }
    index(
        tmp_path,
        nlvr2__dev__index=[row],
        nlvr2__test_P__index=[{**row, "label": 0}],
        nlvr2__train__index=[row],
    )
    assert read(tmp_path, "nlvr2", "val") == [
        {
            "id": "dev-8-0-1",
            "image": str(tmp_path / row["image_path"]),
            "image2": str(tmp_path / row["image2_path"]),
            "text": [5],
            "label": 1,
            "group": "dev-8-1",
        }
    ]
    assert (
        read(tmp_path, "nlvr2", "test")[0]["label"] == 0
        and len(read(tmp_path, "nlvr2", "train")) == 1
    )
    index(tmp_path, nlvr2__dev__index=[{**row, "label": "True"}])
    refused(tmp_path, "nlvr2", "val", "nlvr2.dev.index.jsonl line 1 has no label (int)")


def test_classes(tmp_path):
    index(
        tmp_path,
        imagenet__train__index=[
            {"image_path": "train/n1/a.JPEG", "label": 0},
            {"image_path": "train/n2/b.JPEG", "label": 1},
        ],
    )
    assert read(tmp_path, "imagenet", "train")[1] == {
        "id": "train/n2/b.JPEG",
        "image": str(tmp_path / "train/n2/b.JPEG"),
        "label": 1,
    }


# Captions ------------------------------------------------------------------------------------------------------------


def caption(image: int, *ids: int) -> dict:
    return {
        "image_path": f"val2014/{image}.jpg",
        "text_segment": list(ids) or None,
        "image_id": image,
    }


@pytest.mark.parametrize("name", ["coco_retrieval", "flickr30k"])
def test_retrieval_scores_images_once(tmp_path, name):
    rows = [caption(0, 5, 6), caption(0, 7), caption(1, 8), caption(0, 9)]
    index(tmp_path, **{f"{name}__{split}": rows for split in ("train", "val", "test")})
    image = [str(tmp_path / f"val2014/{n}.jpg") for n in (0, 1)]
    for split in ("val", "test"):
        assert read(tmp_path, "retrieval", split) == [
            {"id": "0", "image": image[0], "image_id": 0, "captions": [[5, 6], [7], [9]]},
            {"id": "1", "image": image[1], "image_id": 1, "captions": [[8]]},
        ]
    train = read(tmp_path, "retrieval", "train")
    assert train[1] == {"id": "0#1", "image": image[0], "image_id": 0, "text": [7]}
    assert len({record["id"] for record in train}) == 4


def test_captioning_and_its_references(tmp_path):
    index(
        tmp_path,
        coco_captioning__train=[caption(42, 5), caption(42, 6)],
        coco_captioning__val=[caption(7), caption(42)],
    )
    assert [(r["id"], r["text"]) for r in read(tmp_path, "captioning", "train")] == [
        ("42#0", [5]),
        ("42#1", [6]),
    ]
    assert [record["captions"] for record in read(tmp_path, "captioning", "val")] == [[], []]
    rows = [
        {"image_id": image, "caption": text, "id": n}
        for n, (image, text) in enumerate([(42, "a dog"), (7, "x"), (42, "b")])
    ]
    files(
        tmp_path,
        {"coco_karpathy_val_gt.json": {"annotations": rows, "images": [{"id": 42}, {"id": 7}]}},
    )
    assert read(tmp_path, "captioning", "val") == [
        {"id": "7", "image": str(tmp_path / "val2014/7.jpg"), "image_id": 7, "captions": ["x"]},
        {
            "id": "42",
            "image": str(tmp_path / "val2014/42.jpg"),
            "image_id": 42,
            "captions": ["a dog", "b"],
        },
    ]
    files(tmp_path, {"coco_karpathy_val_gt.json": [{"image": "x"}]})
    refused(tmp_path, "captioning", "val", "coco_karpathy_val_gt.json has no annotations")


def test_nocaps(tmp_path):
    index(
        tmp_path,
        coco_captioning__train=[caption(42, 5)],
        nocaps__val=[caption(0)],
        nocaps__test=[caption(0)],
    )
    files(
        tmp_path,
        {"nocaps_val_4500_captions.json": {"annotations": [{"image_id": 0, "caption": "a dog"}]}},
    )
    assert [
        record["captions"]
        for split in ("val", "test")
        for record in read(tmp_path, "captioning", split)
    ] == [["a dog"], []]
    assert read(tmp_path, "captioning", "train")[0]["id"] == "42#0"


# Which file serves ---------------------------------------------------------------------------------------------------


def test_ours_win_and_are_not_mixed_with_theirs(vqa):
    ours = vqa / "vqa/main/train.jsonl"
    write_records(ours, [{"id": "ours"}])
    assert locate(vqa, "vqa", "main", "train") == ours
    refused(vqa, "vqa", "test", "no vqa/main/test.jsonl", "beit3 prepare vqa")


def test_two_that_could_serve(tmp_path):
    index(
        tmp_path,
        coco_retrieval__val=[caption(0, 5)],
        flickr30k__val=[caption(0, 5)],
        flickr30k__test=[caption(0, 5)],
    )
    refused(
        tmp_path,
        "retrieval",
        "val",
        "coco_retrieval.val.jsonl and",
        "flickr30k.val.jsonl are both retrieval val",
    )
    assert len(read(tmp_path, "retrieval", "test")) == 1


def test_none_that_serves(vqa):
    refused(vqa, "retrieval", "train", "no retrieval/main/train.jsonl", "beit3 prepare retrieval")
    refused(vqa, "vqa", "val", "no vqa/main/val.jsonl")
    with pytest.raises(ValueError, match="no vqa/other/train"):
        locate(vqa, "vqa", "other", "train")


def test_a_line_that_is_cut(vqa):
    files(vqa, {"vqa.train.jsonl": jsonl([question(1)]) + '{"image_path": '})
    refused(vqa, "vqa", "train", "vqa.train.jsonl line 2 is not a JSON object")
