"""Tables of captions, written by hand or made from a real sample; broken ones are refused."""

import csv
import json
from pathlib import Path

import pytest

from beit3.data.prepare.formats.captions import read_karpathy
from beit3.data.prepare.formats.detect import read_pairs
from beit3.data.prepare.formats.split_names import is_held_out
from beit3.data.prepare.splits import write_splits
from tests.data.prepare.test_formats import assert_refused, count_splits, find_sample, write_files

IMAGES = {"a.png": None, "b.png": None}


def list_captions(raw: Path) -> list[tuple[str, str, str]]:
    """Returns (id, image relative to `raw`, text) of all splits."""
    return [
        (r["id"], Path(r["image"]).relative_to(raw).as_posix(), r["text"])
        for _, r in read_pairs(raw)
    ]


CAPTION_A0, CAPTION_A1 = ("a.png#0", "a.png", "A dog, asleep"), ("a.png#1", "a.png", 'the "dog"')
CAPTION_B0 = ("b.png#0", "b.png", "a cat")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "captions.txt",
            'image,caption\na.png,"A dog, asleep"\na.png,"the ""dog"""\n\nb.png,a cat\n',
        ),
        (
            "x.csv",
            '\ufeffFilePath\tother\tTitle\r\na.png\t1\tA dog, asleep\r\na.png\t2\t"the '
            '""dog"""\r\nb.png\t3\ta cat\r\n',
        ),
        ("x.tsv", 'caption\timage\nA dog, asleep\ta.png\n"the ""dog"""\t./a.png\na cat\tb.png\n'),
        (
            "results.csv",
            "image_name| comment_number| comment\na.png| 0| A dog, asleep\na.png| 1| the "
            '"dog"\nb.png| 0| a cat\n',
        ),
        ("x.csv", 'id;img;text\n1;a.png;A dog, asleep\n1;a.png;"the ""dog"""\n1;b.png;a cat\n'),
        (
            "x.jsonl",
            '{"file": "a.png", "Captions": ["A dog, asleep", "the \\"dog\\""]}\n\n{"file": '
            '"b.png", "captions": "a cat"}\n',
        ),
    ],
)
def test_every_dialect_gives_the_same_captions(tmp_path, name, content):
    write_files(tmp_path, {name: content, **IMAGES})
    assert list_captions(tmp_path) == [CAPTION_A0, CAPTION_A1, CAPTION_B0]
    assert list(read_pairs(tmp_path / name)) == list(read_pairs(tmp_path))


def test_the_flickr30k_line_without_a_delimiter_is_skipped(tmp_path):
    """Line 19,999 of the real file; everything around it is kept."""
    lines = [f"a.png| {i}| text {i}" for i in range(120)]
    lines[50] = "a.png| 50   A dog runs across the grass ."
    write_files(
        tmp_path,
        {
            "raw/results.csv": "\n".join(["image_name| comment_number| comment", *lines]),
            "raw/flickr30k_images/a.png": None,
        },
    )
    report = write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    assert sum(report["records"].values()) == 119
    assert report["passed_over"] == [
        f"{tmp_path / 'raw/results.csv'} line 52: 2 cells for 3 columns: put quotes around cells "
        "with '|'"
    ]


@pytest.mark.parametrize("place", ["a.png", "images/a.png", "Images/a.png"])
def test_images_lie_beside_the_table_or_at_absolute_paths(tmp_path, place):
    write_files(tmp_path, {"x.csv": "image,text\na.png,one\n", place: None})
    assert list_captions(tmp_path) == [("a.png#0", place, "one")]
    write_files(tmp_path, {"x.csv": f"image,text\n{tmp_path / place},one\n"})
    assert list_captions(tmp_path) == [(f"{place}#0", place, "one")]


def test_splits_come_from_columns_names_and_folders(tmp_path):
    write_files(
        tmp_path,
        {
            "x.csv": "image,text,Split\na.png,one,restval\na.png,two,dev\nb.png,three,test\n",
            **IMAGES,
        },
    )
    assert [(split, r["text"]) for split, r in read_pairs(tmp_path)] == [
        ("train", "one"),
        ("val", "two"),
        ("test", "three"),
    ]
    (tmp_path / "x.csv").unlink()
    many = "image,text\n" + "".join(f"{i}.png,t\n" for i in range(400))
    write_files(tmp_path, {"captions_train2017.csv": many, "val.tsv": "image\ttext\na.png\ta\n"})
    write_files(tmp_path, {"test/metadata.csv": "file_name,text\nc.png,c\n"})
    assert count_splits(read_pairs(tmp_path)) == {"train": 400, "val": 1, "test": 1}
    (tmp_path / "val.tsv").unlink()
    num_records = count_splits(read_pairs(tmp_path))
    assert (
        num_records["test"] == 1
        and 5 < num_records["val"] < 40
        and num_records["train"] + num_records["val"] == 400
    )


def test_a_split_column_without_val_is_held_out_too(tmp_path):
    rows = "".join(f"{i}.png,t,{'test' if i < 100 else 'train'}\n" for i in range(500))
    write_files(tmp_path, {"x.csv": "image,text,split\n" + rows})
    num_records = count_splits(read_pairs(tmp_path))
    assert (
        num_records["test"] == 100
        and 5 < num_records["val"] < 40
        and num_records["train"] + num_records["val"] == 400
    )
    write_files(tmp_path, {"y.jsonl": '{"image": "a.png", "text": "x", "split": "dev"}\n'})
    assert count_splits(read_pairs(tmp_path)) == {"train": 400, "test": 100, "val": 1}


def test_a_column_without_a_name_is_ignored(tmp_path):
    """pandas writes its index this way."""
    write_files(
        tmp_path,
        {
            "train.csv": ",image,text\n0,a.png,one\n1,b.png,two\n",
            "val.csv": ",image,text\n0,a.png,three\n",
            **IMAGES,
        },
    )
    assert count_splits(read_pairs(tmp_path)) == {"train": 2, "val": 1}


def test_captions_of_one_image_are_held_out_together(tmp_path):
    rows = [(f"{i}.png", f"text {k}") for k in range(3) for i in range(300)]
    write_files(
        tmp_path, {"x.csv": "image,text\n" + "".join(f"{image},{text}\n" for image, text in rows)}
    )
    sides: dict[str, set[str]] = {}
    for split, record in read_pairs(tmp_path):
        sides.setdefault(record["id"].partition("#")[0], set()).add(split)
    assert len(sides) == 300 and all(len(side) == 1 for side in sides.values())
    assert {"val"} in sides.values() and all(
        ("val" in side) == is_held_out(name, 0.05) for name, side in sides.items()
    )


def test_ids_are_unique_over_all_files_and_use_the_id_column(tmp_path):
    write_files(
        tmp_path,
        {
            "train.csv": "image,text\na.png,one\nb.png,two\na.png,three\n",
            "val.csv": "image,text\na.png,four\n",
        },
    )
    assert [r["id"] for _, r in read_pairs(tmp_path)] == [
        "a.png#0",
        "b.png#0",
        "a.png#1",
        "a.png#2",
    ]
    rows = [(7, "a.png", ["x", "y"]), (7, "b.png", "z"), (None, "b.png", "w")]
    write_files(
        tmp_path,
        {
            "x.jsonl": "\n".join(
                json.dumps({"id": id, "image": image, "text": text}) for id, image, text in rows
            )
        },
    )
    assert [r["id"] for _, r in read_pairs(tmp_path / "x.jsonl")] == [
        "7#0",
        "7#1",
        "7#2",
        "b.png#0",
    ]


def test_rows_without_image_or_text_are_faults(tmp_path):
    good = "".join(f"a.png,text {i}\n" for i in range(300))
    write_files(
        tmp_path,
        {
            "raw/x.csv": f"image,text\n,lost\na.png,\nb.png,unquoted, comma\n{good}",
            "raw/a.png": None,
        },
    )
    report = write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    lost, empty, comma = report["passed_over"]
    assert lost.endswith("x.csv line 2: it has no image") and empty == "a.png#0: its text is empty"
    assert "line 4: 3 cells for 2 columns" in comma
    write_files(tmp_path, {"raw/y.jsonl": '{"image": "a.png", "text": []}\n'})
    assert [r["fault"] for _, r in read_pairs(tmp_path / "raw/y.jsonl")] == ["it has no text"]


def test_a_cell_may_hold_a_list_of_captions(tmp_path):
    rows = [("a.png", '["a dog", "x, y"]'), ("a.png", "['one']"), ("b.png", "[a dog] sits")]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    texts = [(record["id"], record["text"]) for _, record in read_pairs(tmp_path)]
    assert texts == [
        ("a.png#0", "a dog"),
        ("a.png#1", "x, y"),
        ("a.png#2", "one"),
        ("b.png#0", "[a dog] sits"),
    ]


@pytest.mark.parametrize("text", ["[2018]", "(1, 2)", "['a', 3]", '{"a": 1}', "[]x", "(a)", "{1}"])
def test_captions_in_brackets_that_are_no_list_of_texts_stay(tmp_path, text):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("a.png", text), ("b.png", "a cat")])
    assert [record["text"] for _, record in read_pairs(tmp_path)] == [text, "a cat"]


def test_other_values_than_texts_are_faults_of_their_rows(tmp_path):
    values = [["b", 1], 3, {"a": 1}, [2018], "['a' 'b']"]
    rows = [{"image": "a.png", "text": value} for value in [*values, "a cat"]]
    write_files(tmp_path, {"x.jsonl": "\n".join(map(json.dumps, rows))})
    *faults, (_, record) = read_pairs(tmp_path)
    assert record["text"] == "a cat" and len(faults) == len(values)
    for number, (_, fault) in enumerate(faults, 1):
        assert fault["id"].endswith(f"x.jsonl line {number}")
    assert "a text or a list of texts, not ['b', 1]" in faults[0][1]["fault"]
    assert "lacks commas" in faults[-1][1]["fault"]


REFUSED_TABLES = [
    (
        "x.csv",
        "image_id,caption\n1,a\n",
        ["x.csv has the columns 'image_id', 'caption'", "name one image (or filepath"],
    ),
    ("x.csv", "image,label\na.png,1\n", ["'image', 'label'", "one text (or caption, title"]),
    ("x.tsv", "", ["x.tsv has the columns none"]),
    (
        "Train_GCC-training.tsv",
        "a bus station\thttp://lh6.example/x.jpg\n",
        ["GCC-training.tsv names images by url", "img2dataset"],
    ),
    ("x.csv", "url,caption\nhttp://a/b.jpg,c\n", ["by url", "img2dataset"]),
    ("x.csv", "image,text\nhttps://a/b.jpg,c\n", ["x.csv names images by url"]),
    ("x.csv", "image,text,split\na.png,c,odd\n", ["x.csv line 2", "'odd'"]),
    ("x.csv", b"image,text\na.png,caf\xe9\n", ["x.csv is not UTF-8", "0xe9"]),
    ("x.csv", 'image,text\na.png,"' + "long " * 30000, ["x.csv line ", "check its quotes"]),
    (
        "x.jsonl",
        '{"image": "a.png", "text": "b"}\n{"image": "a.png", "te',
        ["x.jsonl line 2 is not JSON", "complete"],
    ),
    ("x.jsonl", "[1]\n", ["x.jsonl line 1 holds a list"]),
    ("x.jsonl", "[" * 100_000, ["x.jsonl line 1 is not JSON"]),
    ("x.jsonl", '{"image": "a.png"}\n', ["x.jsonl line 1 has the columns 'image'"]),
    ("x.jsonl", '{"image": 3, "text": "b"}\n', ["x.jsonl line 1 has no image (str)"]),
]


@pytest.mark.parametrize(("name", "content", "words"), REFUSED_TABLES)
def test_broken_tables_are_refused_and_old_records_stay(tmp_path, name, content, words):
    write_files(tmp_path, {f"raw/{name}": content})
    assert_refused(read_pairs, tmp_path / "raw", *words)
    older = tmp_path / "root/pretrain/pairs/train.jsonl"
    write_files(tmp_path, {"root/pretrain/pairs/train.jsonl": '{"id": "older"}\n'})
    with pytest.raises(ValueError):
        write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    assert older.read_text() == '{"id": "older"}\n' and [
        path.name for path in older.parent.iterdir()
    ] == ["train.jsonl"]


def test_names_that_are_not_unicode_are_skipped(tmp_path):
    rows = [{"image": "a.png", "text": f"text {i}"} for i in range(300)]
    write_files(
        tmp_path,
        {
            "raw/x.jsonl": "\n".join(
                map(json.dumps, [*rows, {"image": "a\ud800.png", "text": "\ud800"}])
            ),
            "raw/a.png": None,
        },
    )
    report = write_splits(tmp_path / "root", "pretrain", "pairs", read_pairs(tmp_path / "raw"))
    assert report["passed_over"] == [
        "a\\ud800.png#0: it holds '\\ud800', which is no character: write names and texts in UTF-8"
    ]


def test_a_real_dataset_as_a_table_equals_its_own_files(tmp_path):
    raw = find_sample("flickr8k_mini")
    own = list(read_karpathy(raw))
    with (tmp_path / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption", "split"), *((r["image"], r["text"], split) for split, r in own)]
        )
    table = list(read_pairs(tmp_path))
    assert [(split, r["text"], r["image"]) for split, r in table] == [
        (split, r["text"], r["image"]) for split, r in own
    ]
    assert len({r["id"] for _, r in table}) == len(own)
    # A list of pairs that do and do not match is no list of captions, and says so.
    assert_refused(read_pairs, raw / "itm_pairs.tsv", "itm_pairs.tsv has the columns")
