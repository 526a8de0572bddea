"""Statements on two images: the real samples, the embedded world's, files made by hand; what breaks
them is named."""

import json
from collections import Counter
from pathlib import Path

import pytest

from beit3.data.prepare.formats.detect import read_statements
from beit3.data.prepare.splits import write_splits
from tests.data.prepare.test_formats import assert_refused, count_splits, find_sample, write_files


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# NLVR2 --------------------------------------------------------------------------------------------


def test_real_nlvr2():
    raw = find_sample("nlvr2_sample")
    split_records = list(read_statements(raw))
    assert count_splits(split_records) == {"val": 8}
    rows = [json.loads(line) for line in (raw / "dev.json").read_text().splitlines()]
    for (_, record), row in zip(split_records, rows, strict=True):
        assert record["id"] == row["identifier"] and record["text"] == row["sentence"]
        assert record["label"] == {"True": 1, "False": 0}[row["label"]]
        pair = row["identifier"].split("-")[2]
        images = [Path(record[key]) for key in ("image", "image2")]
        assert [path.name for path in images] == [
            f"dev-850-{pair}-img0.png",
            f"dev-850-{pair}-img1.png",
        ]
        assert all(path.is_file() for path in images)
    # Two sentences, each about all four pairs: what consistency counts together.
    assert Counter(record["group"] for _, record in split_records) == {
        "dev-850-0": 4,
        "dev-850-1": 4,
    }
    assert len({(record["group"], record["text"]) for _, record in split_records}) == 2


def test_the_world_reads_as_nlvr2(raw):
    split_records = list(read_statements(raw / "nlvr2"))
    assert set(count_splits(split_records)) == {"train", "val"}
    assert all(
        Path(record[key]).is_file() for _, record in split_records for key in ("image", "image2")
    )
    assert {record["label"] for _, record in split_records} == {0, 1}
    assert len({record["group"] for _, record in split_records}) == len(split_records)


OFFICIAL = {"sentence": "Two dogs.", "label": "True", "identifier": "train-10-3-1", "directory": 7}


@pytest.mark.parametrize("place", ["images/train/7", "train/7"])
def test_nlvr2_layouts(tmp_path, place):
    held = {"sentence": "A cat.", "identifier": "test1-0-1-0"}
    pictures = [f"{place}/train-10-3-img{side}.png" for side in (0, 1)] + [
        f"test1/test1-0-1-img{side}.png" for side in (0, 1)
    ]
    write_files(
        tmp_path,
        {"data/train.json": jsonl(OFFICIAL), "test1.json": jsonl(held), **dict.fromkeys(pictures)},
    )
    assert list(read_statements(tmp_path)) == [
        (
            "train",
            {
                "id": "train-10-3-1",
                "image": str(tmp_path / pictures[0]),
                "image2": str(tmp_path / pictures[1]),
                "text": "Two dogs.",
                "label": 1,
                "group": "train-10-1",
            },
        ),
        (
            "test",
            {
                "id": "test1-0-1-0",
                "image": str(tmp_path / pictures[2]),
                "image2": str(tmp_path / pictures[3]),
                "text": "A cat.",
                "group": "test1-0-0",
            },
        ),
    ]


def test_an_nlvr2_image_that_is_listed_but_absent_is_counted_and_named(tmp_path):
    rows = [{"sentence": "x", "label": "False", "identifier": f"dev-{n}-0-0"} for n in range(200)]
    pictures = {f"dev/dev-{n}-0-img{side}.png": None for n in range(200) for side in (0, 1)}
    del pictures["dev/dev-7-0-img1.png"]
    write_files(tmp_path / "raw", {"dev.json": jsonl(*rows), **pictures})
    report = write_splits(tmp_path / "root", "nlvr2", "main", read_statements(tmp_path / "raw"))
    assert report["records"] == {"val": 199}
    (line,) = report["passed_over"]
    searched = f"looked for in dev, images, ., images/dev of {tmp_path / 'raw'}"
    assert (
        line == f"dev-7-0-0: image {tmp_path / 'raw/dev/dev-7-0-img1.png'} is missing, {searched}"
    )


BROKEN = [
    ({**OFFICIAL, "label": "maybe"}, ["train.json line 2", "'maybe'", "true"]),
    (
        {key: OFFICIAL[key] for key in ("sentence", "identifier")},
        ["train.json line 2 has no label"],
    ),
    ({**OFFICIAL, "identifier": "10-3"}, ["train.json line 2", "'10-3'"]),
    ({"statement": "of another version", "label": "True"}, ["train.json line 2 has no identifier"]),
    ({**OFFICIAL, "sentence": None}, ["train.json line 2 has no sentence"]),
]


@pytest.mark.parametrize(("row", "words"), BROKEN)
def test_what_is_no_nlvr2(tmp_path, row, words):
    assert_refused(
        read_statements, write_files(tmp_path, {"train.json": jsonl(OFFICIAL, row)}), *words
    )


def test_two_files_of_one_name(tmp_path):
    write_files(tmp_path, {"train.json": jsonl(OFFICIAL), "data/train.json": jsonl(OFFICIAL)})
    assert_refused(read_statements, tmp_path, "both train", "data/train.json")
    assert_refused(
        read_statements,
        write_files(tmp_path / "x", {"train.json": "[\n]"}),
        "x/train.json line 1 is not JSON",
    )


def test_test_and_test1_are_different_splits(tmp_path):
    write_files(tmp_path, {"test.json": jsonl(OFFICIAL)})
    assert count_splits(read_statements(tmp_path)) == {"test": 1}
    assert_refused(
        read_statements,
        write_files(tmp_path, {"test1.json": jsonl(OFFICIAL)}),
        "test1.json and",
        "test.json would both be test",
    )


# NLVR1 --------------------------------------------------------------------------------------------


def test_real_nlvr1():
    raw = find_sample("nlvr1_dev")
    rows = [json.loads(line) for line in (raw / "dev/dev.json").read_text().splitlines()]
    split_records = list(read_statements(raw))
    held = [row for row in rows if row["directory"] == "5"]
    assert count_splits(split_records) == {"train": 6 * (989 - len(held)), "val": len(held)}
    assert split_records == list(read_statements(raw / "dev"))
    assert len({record["id"] for _, record in split_records}) == len(split_records)
    assert all(Path(record["image"]).is_file() for _, record in split_records)
    labels = {row["identifier"]: row["label"] == "true" for row in rows}
    for split, record in split_records:
        name, _, k = record["id"].rpartition("-")
        assert (
            record["image"] == record["image2"]
            and Path(record["image"]).name == f"dev-{name}-{k}.png"
        )
        assert record["label"] == labels[name] and record["group"] == name.partition("-")[0]
        assert record["boxes"] == [[0, 0, 250, 100], [250, 0, 400, 100]] and (
            split == "train" or k == "0"
        )
    for key, shared in (
        ("group", 0),
        ("text", 3),
    ):  # three sentences were written twice, about other pictures
        sides = [
            {record[key].lower() for split, record in split_records if split == name}
            for name in ("train", "val")
        ]
        assert len(sides[0] & sides[1]) == shared


def test_nlvr1_with_its_own_splits(tmp_path):
    row = {
        "sentence": "There is a box.",
        "label": "false",
        "identifier": "3-1",
        "directory": "5",
        "structured_rep": [],
    }
    hidden = {key: value for key, value in row.items() if key != "label"}
    for name, each in (("train", row), ("dev", row), ("test", hidden)):
        write_files(tmp_path, {f"{name}/{name}.json": jsonl(each)})
    split_records = list(read_statements(tmp_path))
    assert (
        count_splits(split_records) == {"train": 6, "val": 1, "test": 1}
        and "label" not in split_records[-1][1]
    )
    assert [record["id"] for _, record in split_records] == [
        *(f"3-1-{k}" for k in range(6)),
        "3-1-0",
        "3-1-0",
    ]
    assert split_records[0][1]["image"] == str(tmp_path / "train/images/5/train-3-1-0.png")
    write_files(tmp_path, {"dev/dev.json": jsonl({**row, "directory": 5})})
    assert_refused(read_statements, tmp_path, "dev.json line 1 has no directory (str)")


# Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "train.csv",
            "image,image2,text,label\na.png,b.png,Two dogs.,true\nb.png,a.png,Two dogs.,0\n",
        ),
        (
            "train.tsv",
            "left\tright\tsentence\tlabel\na.png\tb.png\tTwo dogs.\tYes\nb.png\ta.png\tTwo "
            "dogs.\tFalse\n",
        ),
        (
            "train.jsonl",
            jsonl(
                {"image": "a.png", "image2": "b.png", "text": "Two dogs.", "label": 1},
                {"image": "b.png", "image2": "a.png", "text": "Two dogs.", "label": False},
            ),
        ),
    ],
)
def test_tables_of_statements(tmp_path, name, content):
    write_files(
        tmp_path,
        {
            name: content,
            "images/a.png": None,
            "b.png": None,
            "val.csv": "image,image2,text,label\na.png,b.png,x,no\n",
        },
    )
    a, b = str(tmp_path / "images/a.png"), str(tmp_path / "b.png")
    split_records = list(read_statements(tmp_path))
    assert sorted(count_splits(split_records)) == ["train", "val"]
    assert [record for split, record in split_records if split == "train"] == [
        {
            "id": "a.png#0",
            "image": a,
            "image2": b,
            "text": "Two dogs.",
            "label": 1,
            "group": "Two dogs.",
        },
        {
            "id": "b.png#0",
            "image": b,
            "image2": a,
            "text": "Two dogs.",
            "label": 0,
            "group": "Two dogs.",
        },
    ]


def test_given_ids_groups_and_tests_without_labels(tmp_path):
    rows = [
        "7,a.png,b.png,x,1,g,train",
        "8,a.png,b.png,x,,g,test",
        "9,a.png,b.png,x,,g,train",
        "10,a.png,,x,1,g,val",
    ]
    write_files(tmp_path, {"x.csv": "\n".join(["id,image,image2,text,label,group,split", *rows])})
    split_records = list(read_statements(tmp_path))
    assert [
        (split, record["id"], record["group"], record.get("label"))
        for split, record in split_records[:2]
    ] == [("train", "7", "g", 1), ("test", "8", "g", None)]
    assert [record["fault"] for _, record in split_records[2:]] == [
        "it has no label",
        "it has no image2",
    ]
    assert split_records[2][1]["id"].endswith("x.csv line 4")


def test_broken_tables_of_statements(tmp_path):
    assert_refused(
        read_statements,
        write_files(tmp_path, {"x.csv": "image,text,label\na,b,1\n"}),
        "x.csv has the columns",
        "one image2 (or right)",
    )
    assert_refused(
        read_statements,
        write_files(tmp_path, {"x.csv": "image,image2,text,label\na,b,c,2\n"}),
        "x.csv line 2 has label '2'",
    )
    assert_refused(
        read_statements,
        write_files(tmp_path, {"x.csv": "image,image2,text,label\na,http://b,c,1\n"}),
        "by url",
    )
