"""Classified images: the real samples, folders and tables made by hand, how classes get readable
names; what breaks them is named."""

from pathlib import Path

import pytest

from beit3.data.prepare.formats.detect import read_classified_images
from beit3.data.prepare.formats.split_names import HELD_OUT_RATE, SplitRecord, is_held_out
from tests.data.prepare.test_formats import count_splits, find_sample, write_files


def read_all(raw: Path) -> tuple[tuple[str, ...], list[SplitRecord]]:
    names, pairs = read_classified_images(raw)
    return names, list(pairs)


def read_labels(raw: Path) -> dict[str, tuple[str, int | None]]:
    return {record["id"]: (split, record.get("label")) for split, record in read_all(raw)[1]}


def assert_refused(raw: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_all(raw)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


# The real samples ---------------------------------------------------------------------------------


def test_real_cifar10_is_read():
    raw = find_sample("cifar10_mini")
    names, pairs = read_all(raw)
    assert names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert count_splits(pairs) == {"train": 2000, "val": 500}, "its test is our val"
    assert all(
        names[record["label"]] == Path(record["image"]).parent.name
        and Path(record["image"]).is_file()
        for _, record in pairs
    )
    assert len({record["id"] for _, record in pairs}) == 2500


def test_real_imagenet_sample_is_read():
    raw = find_sample("imagenet_sample_1k")
    names, pairs = read_all(raw)
    assert (
        len(names) == 1000
        and names[:3] == ("tench", "goldfish", "great white shark")
        and names[999] == "toilet tissue"
    )
    assert count_splits(pairs) == {"train": 1000} and all(
        Path(record["image"]).is_file() for _, record in pairs
    )
    for line in (raw / "classes.tsv").read_text().splitlines():
        label, _, name, file = line.split("\t")
        record = pairs[int(label)][1]
        assert record["id"] == file and record["label"] == int(label) and names[int(label)] == name


def test_the_world_reads_as_imagenet(raw):
    names, pairs = read_all(raw / "imagenet")
    assert (
        set(count_splits(pairs)) == {"train", "val"}
        and "blue circle" in names
        and len(names) == len(set(names))
    )
    assert {record["label"] for _, record in pairs} == set(range(len(names)))


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("train", "validation"), ("training", "val")]
)
def test_class_folders_give_labels_and_splits(tmp_path, train, val):
    write_files(
        tmp_path,
        dict.fromkeys(
            [
                f"{train}/n2/b.JPEG",
                f"{train}/n1/deep/a.png",
                f"{val}/n2/c.jpg",
                f"{train}/stray.png",
            ]
        ),
    )
    write_files(
        tmp_path,
        {f"{train}/n1/notes.txt": "no image", f"{train}/.hidden/x.png": None, "test/t.png": None},
    )
    assert read_all(tmp_path)[0] == ("n1", "n2")
    left_out = {
        record["id"]: record["left_out"]
        for _, record in read_all(tmp_path)[1]
        if "left_out" in record
    }
    assert left_out == {
        f"{train}/n1/notes.txt": ".txt",
        f"{train}/stray.png": "images in no class folder",
    }
    labels = {id: label for id, label in read_labels(tmp_path).items() if id not in left_out}
    assert labels == {
        f"{train}/n1/deep/a.png": ("train", 0),
        f"{train}/n2/b.JPEG": ("train", 1),
        f"{val}/n2/c.jpg": ("val", 1),
        "test/t.png": ("test", None),
    }


def test_the_test_split_is_val_only_without_a_val_folder(tmp_path):
    write_files(tmp_path, dict.fromkeys(["train/a/1.png", "train/b/1.png", "test/b/1.png"]))
    assert read_labels(tmp_path)["test/b/1.png"] == ("val", 1)
    write_files(tmp_path, {"val/a/1.png": None})
    assert read_labels(tmp_path)["test/b/1.png"] == ("test", 1) and read_labels(tmp_path)[
        "val/a/1.png"
    ] == (
        "val",
        0,
    )


def test_folders_without_splits_are_held_out_by_hash(tmp_path):
    """And a class may be called train."""
    write_files(
        tmp_path,
        dict.fromkeys(f"{name}/{n}.png" for name in ("bus", "car", "train") for n in range(100)),
    )
    names, pairs = read_all(tmp_path)
    assert names == ("bus", "car", "train") and 3 < count_splits(pairs)["val"] < 35
    assert all(
        (split == "val") == is_held_out(record["id"], HELD_OUT_RATE) for split, record in pairs
    )
    assert all(
        record["label"] == names.index(record["id"].partition("/")[0]) for _, record in pairs
    )


def test_broken_class_folders_are_refused(tmp_path):
    write_files(tmp_path / "a", dict.fromkeys(["train/a/1.png", "val/b/1.png"]))
    assert_refused(tmp_path / "a", "a/val/b is not a class of the training folder")
    write_files(tmp_path / "b", dict.fromkeys(["train/a/1.png", "val/1.png"]))
    assert_refused(tmp_path / "b", "b/val holds no class folders", "<class>")
    write_files(
        tmp_path / "c", dict.fromkeys(["train/a/1.png", "val/a/1.png", "validation/a/1.png"])
    )
    assert_refused(tmp_path / "c", "c/val and", "c/validation are both val")
    write_files(tmp_path / "d", dict.fromkeys(["photos/1.png", "train/1.png"]))
    assert_refused(tmp_path / "d", "no known format", "(class_folders)", "(class_tables)")
    write_files(
        tmp_path / "e",
        dict.fromkeys([f"{name}/1.png" for name in ("train", "val", "trainannot", "valannot")]),
    )
    assert_refused(tmp_path / "e", "no known format")


TRAIN_IMAGES = dict.fromkeys(["n01440764/1.JPEG", "n01443537/1.JPEG"])
KAGGLE = "ILSVRC/Data/CLS-LOC"
VAL_SOLUTION = (
    "ImageId,PredictionString\nval_1,n01443537 1 2 3 4 n01443537 5 6 7 8\nval_2,n01440764 1 2 3 4\n"
)
SYNSET_MAPPING = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"


@pytest.mark.parametrize(
    ("place", "raw"), [("", ""), (f"{KAGGLE}/", ""), (f"{KAGGLE}/", f"{KAGGLE}/")]
)
def test_kaggles_imagenet_takes_val_classes_from_its_list(tmp_path, place, raw):
    """val/ without folders, its classes in a list; named from the folder that Kaggle unpacks or
    from that of the images."""
    write_files(tmp_path, {f"{place}train/{name}": None for name in TRAIN_IMAGES})
    write_files(
        tmp_path,
        {f"{place}{name}.JPEG": None for name in ("val/val_1", "val/val_2", "val/val_3", "test/t")},
    )
    write_files(
        tmp_path, {"LOC_val_solution.csv": VAL_SOLUTION, "LOC_synset_mapping.txt": SYNSET_MAPPING}
    )
    names, pairs = read_all(tmp_path / raw)
    assert names == ("tench", "goldfish")
    results = {
        record["id"]: (split, record.get("label", record.get("fault"))) for split, record in pairs
    }
    assert results == {
        "train/n01440764/1.JPEG": ("train", 0),
        "train/n01443537/1.JPEG": ("train", 1),
        "val/val_1.JPEG": ("val", 1),
        "val/val_2.JPEG": ("val", 0),
        "val/val_3.JPEG": ("val", "LOC_val_solution.csv has no line about it"),
        "test/t.JPEG": ("test", None),
    }


def test_folders_are_checked_before_the_first_record(tmp_path):
    write_files(
        tmp_path, {f"train/{name}": None for name in TRAIN_IMAGES} | {"val/val_1.JPEG": None}
    )
    with pytest.raises(ValueError, match="val holds no class folders.*LOC_val_solution.csv"):
        read_classified_images(tmp_path)
    for content, word in (
        ("a,b\nval_1,n9 1\n", "'n9', which is not a class"),
        ("a,b\nval_1,\n", "has lines that are not"),
    ):
        write_files(tmp_path, {"LOC_val_solution.csv": content})
        with pytest.raises(ValueError, match=word):
            read_classified_images(tmp_path)


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("none.md", "", ("n1", "n2", "n3")),
        (
            "classes.txt",
            "tench\ngreat white shark\ncrane_bird\n",
            ("tench", "great white shark", "crane bird"),
        ),
        ("classes.txt", "n3 crane\nn1 tench, fish\n", ("tench, fish", "n2", "crane")),
        ("classes.txt", "only\ntwo\n", ("n1", "n2", "n3")),
        (
            "classes.tsv",
            "0\tn1\ttench\tx\n1\tn2\tshark\ty\n2\tn3\tcrane\tz\n",
            ("tench", "shark", "crane"),
        ),
        (
            "LOC_synset_mapping.txt",
            "n1 tench, Tinca tinca\nn2 crane\nn3 crane, a machine\n",
            ("tench", "crane", "crane, a machine"),
        ),
    ],
)
def test_classes_are_named_by_the_list_beside_them(tmp_path, name, content, names):
    write_files(tmp_path, {name: content, **dict.fromkeys(f"train/n{n}/1.png" for n in (1, 2, 3))})
    assert read_all(tmp_path)[0] == names


def test_a_list_of_the_folders_does_not_rename_them(tmp_path):
    """In whatever order it is, and though one class begins like another."""
    folders = ["tiger", "tiger_shark", "airplane"]
    write_files(
        tmp_path,
        {
            "classes.txt": "tiger shark\nairplane\ntiger\n",
            **dict.fromkeys(f"train/{name}/1.png" for name in folders),
        },
    )
    assert read_all(tmp_path)[0] == ("airplane", "tiger", "tiger shark")


def test_numbered_folders_keep_torchvisions_order_and_find_their_names(tmp_path):
    write_files(
        tmp_path,
        {
            "classes.txt": "\n".join(f"name {n}" for n in range(11)),
            **dict.fromkeys(f"train/{n}/1.png" for n in range(11)),
        },
    )
    names, pairs = read_all(tmp_path)
    assert names[:3] == ("name 0", "name 1", "name 10")
    assert all(
        names[record["label"]] == f"name {record['id'].split('/')[1]}" for _, record in pairs
    )


# Lists and tables ---------------------------------------------------------------------------------


def test_a_list_with_a_short_line_is_refused(tmp_path):
    write_files(tmp_path, {"classes.tsv": "0\tn1\ttench\ta.png\n1\tn2\tb.png\n"})
    assert_refused(tmp_path, "classes.tsv line 2 has 3 cells")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "image,label,split\na.png,great_dog,train\nb.png,cat,val\nc.png,,test\n"),
        (
            "x.jsonl",
            '{"file": "a.png", "class": "great_dog"}\n{"file": "b.png", "class": "cat", "split": '
            '"val"}\n'
            '{"file": "c.png", "class": null, "split": "test"}\n',
        ),
    ],
)
def test_tables_give_labels_and_splits(tmp_path, name, content):
    write_files(tmp_path, {name: content, "a.png": None})
    names, pairs = read_all(tmp_path)
    assert names == ("cat", "great dog")
    assert pairs == [
        ("train", {"id": "a.png", "image": str(tmp_path / "a.png"), "label": 1}),
        ("val", {"id": "b.png", "image": str(tmp_path / "b.png"), "label": 0}),
        ("test", {"id": "c.png", "image": str(tmp_path / "c.png")}),
    ]


def test_numbers_in_a_table_are_labels(tmp_path):
    rows = "".join(f"{n}.png,{n},{'val' if n % 2 else 'train'}\n" for n in range(11))
    write_files(
        tmp_path,
        {
            "x.csv": "image,label,split\n" + rows,
            "classes.txt": "\n".join(f"name {n}" for n in range(11)),
        },
    )
    names, pairs = read_all(tmp_path)
    assert names == tuple(f"name {n}" for n in range(11))
    assert all(record["id"] == f"{record['label']}.png" for _, record in pairs)


@pytest.mark.parametrize(
    ("listed", "count"), [("", 6), ("zero\none\ntwo\nthree\nfour\nfive\nsix\n", 7)]
)
def test_numbers_stay_what_they_are_where_some_are_missing(tmp_path, listed, count):
    write_files(
        tmp_path, {"x.csv": "image,label,split\na.png,0,train\nb.png,2,train\nc.png,05,val\n"}
    )
    write_files(tmp_path, {"classes.txt": listed} if listed else {})
    names, pairs = read_all(tmp_path)
    assert len(names) == count and names[5] == ("five" if listed else "5")
    assert [record["label"] for _, record in pairs] == [0, 2, 5]


@pytest.mark.parametrize(("listed", "label"), [("zero\none\n", 2), ("", 10**9)])
def test_numbers_beyond_the_classes_are_refused(tmp_path, listed, label):
    write_files(
        tmp_path,
        {
            "x.csv": f"image,label\na.png,0\nb.png,{label}\n",
            **({"classes.txt": listed} if listed else {}),
        },
    )
    assert_refused(
        tmp_path,
        f"x.csv line 3 has label {label}",
        "classes.txt names 2 classes" if listed else "labels go up to",
    )


def test_hugging_faces_folders_keep_their_own_images(tmp_path):
    """A table a folder, which names its own images: the same names mean others elsewhere."""
    rows = "file_name,label\n" + "".join(
        f"{n}.png,{'cat' if n % 2 else 'dog'}\n" for n in range(100)
    )
    write_files(
        tmp_path,
        {
            "train/metadata.csv": rows,
            "test/metadata.csv": rows,
            "train/3.png": None,
            "test/3.png": None,
        },
    )
    names, pairs = read_all(tmp_path)
    assert names == ("cat", "dog") and not [record for _, record in pairs if "fault" in record]
    assert (
        count_splits(pairs)["test"] == 100
        and count_splits(pairs)["train"] + count_splits(pairs)["val"] == 100
    )
    results = {split: record["image"] for split, record in pairs if record["id"] == "3.png"}
    assert results.pop("test") == str(tmp_path / "test/3.png") and [*results.values()] == [
        str(tmp_path / "train/3.png")
    ]


def test_rows_without_one_label_are_faults(tmp_path):
    write_files(tmp_path, {"x.csv": "image,label\na.png,cat\nb.png,\nc.png,cat\nc.png,dog\n"})
    faults = [record["fault"] for _, record in read_all(tmp_path)[1] if "fault" in record]
    assert faults == ["it has no label", *["c.png has 2 rows, and can have one class"] * 2]
    write_files(tmp_path, {"x.csv": "image,text\na.png,cat\n"})
    assert_refused(tmp_path, "x.csv has the columns 'image', 'text'", "one label (or class")
