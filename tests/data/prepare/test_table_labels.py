"""Labels in tables and names beside them: numbers, names, missing ones, and what is unclear."""

import json
import time

import pytest

from beit3.data.prepare.formats.class_names import find_class_names
from tests.data.prepare.test_formats import write_files
from tests.data.prepare.test_formats_labels import assert_refused, read_all


def write_labels(root, labels, **files):
    """Writes a table with one image per label, the last 2 of them in the test split."""
    rows = [
        {"image": f"{k}.png", "label": label, "split": "test" if k >= len(labels) - 2 else "train"}
        for k, label in enumerate(labels)
    ]
    return write_files(root, {"x.jsonl": "\n".join(map(json.dumps, rows)), **files})


@pytest.mark.parametrize(
    "labels", [["0", "1", "2", "1"], [0, 1, 2, 1], [0.0, 1.0, 2.0, 1.0], ["0.0", "1.", "02", "1.0"]]
)
def test_numbers_are_labels_however_they_are_written(tmp_path, labels):
    names, pairs = read_all(write_labels(tmp_path, labels))
    assert names == ("0", "1", "2")
    assert [record["label"] for _, record in pairs] == [0, 1, 2, 1]


@pytest.mark.parametrize("missing", [None, float("nan"), "nan", "<NA>", "", "None"])
def test_rows_without_a_label_are_counted_and_shift_no_other(tmp_path, missing):
    labels = [missing if k % 10 == 3 else k % 4 for k in range(200)] + [-1, missing]
    names, pairs = read_all(write_labels(tmp_path, labels))
    faults = [record for _, record in pairs if "fault" in record]
    labeled = {record["id"]: record["label"] for _, record in pairs if "label" in record}
    assert names == ("0", "1", "2", "3") and len(faults) == 20 and len(pairs) == 202
    assert labeled == {f"{k}.png": k % 4 for k in range(200) if k % 10 != 3}
    assert [record.get("label") for split, record in pairs if split == "test"] == [None, None]


def test_booleans_and_lists_of_one_are_names(tmp_path):
    names, pairs = read_all(write_labels(tmp_path, [True, False, ["True"], "['False']"]))
    assert names == ("False", "True")
    assert [record["label"] for _, record in pairs] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 2, 3, 1], ["may count from 0", "or count from 1", "x.jsonl line"]),
        ([3, 7, 3, 7], ["may count from 0", "be names of classes"]),
        ([0, 90, 180, 270], ["271 classes", "names of 4"]),
        ([-1, 1, 1, 1], ["x.jsonl line 1 has label -1", "it has none, or be a class"]),
        (["-1.0", "cat", "dog", "cat"], ["line 1 has label -1.0"]),
        ([0.5, 1, 0, 1], ["x.jsonl line 1 has label 0.5, which is no class"]),
        (["Cat", "cat", "dog", "dog"], ["'Cat'", "'cat'", "one class or two"]),
        ([["cat", "dog"], "cat", "cat", "dog"], ["line 1 has label", "one class"]),
        (["(1, 2)", "0", "1", "2"], ["line 1 has label '(1, 2)'", "one class"]),
        (["{1, 2}", "0", "1", "2"], ["line 1 has label '{1, 2}'", "one class"]),
        ([{"id": 1}, "cat", "cat", "dog"], ["line 1 has label", "one class"]),
    ],
)
def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path, labels, words):
    assert_refused(write_labels(tmp_path, labels), *words)


def test_a_list_of_names_makes_numbers_clear(tmp_path):
    names, pairs = read_all(
        write_labels(tmp_path, [1, 2, 3, 1], **{"classes.json": ["none", "a", "b", "c"]})
    )
    assert names == ("none", "a", "b", "c")
    assert [record["label"] for _, record in pairs] == [1, 2, 3, 1]
    names = {"classes.json": ["a", "b", "c"]}
    assert_refused(write_labels(tmp_path, [1, 2, 3, 1], **names), "names 3 classes, 0 to 2")


@pytest.mark.parametrize("is_table", [True, False])
def test_numbers_beside_kaggles_list_get_its_first_synonyms(tmp_path, is_table):
    mapping = "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 white_shark, shark\n"
    if is_table:
        write_labels(tmp_path, [1, 2, 0, 1], **{"LOC_synset_mapping.txt": mapping})
    else:
        images = {f"train/{k}/1.png": None for k in range(3)}
        write_files(tmp_path, {"LOC_synset_mapping.txt": mapping, **images})
    assert read_all(tmp_path)[0] == ("tench", "goldfish", "white shark")


def test_a_long_list_of_numbered_names_is_ordered_fast(tmp_path):
    """It took 3 s for ImageNet-21k, and with the square of the number."""
    names = {str(k): [f"n{k:08}", f"name {k}"] for k in reversed(range(60_000))}
    write_files(tmp_path, {"imagenet_class_index.json": names})
    classes = [f"n{k:08}" for k in range(60_000)]
    start = time.perf_counter()
    assert find_class_names(tmp_path, classes)[-1] == "name 59999"
    assert time.perf_counter() - start < 5


# Names beside folders -----------------------------------------------------------------------------

FOLDERS = [f"c{k}" for k in range(12)]
IMAGES = {f"{folder}/1.png": None for folder in FOLDERS}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "\n".join(f"c{k} name {k}" for k in range(12))),
        ("classes.json", {f"c{k}": f"name {k}" for k in range(12)}),
        ("imagenet_class_index.json", {str(k): [f"c{k}", f"name {k}"] for k in range(12)}),
    ],
)
def test_folders_get_the_names_that_lists_give_them(tmp_path, name, content):
    names, pairs = read_all(write_files(tmp_path, {name: content, **IMAGES}))
    for _, record in pairs:
        if "label" in record:
            folder = record["id"].partition("/")[0]
            assert names[record["label"]] == folder.replace("c", "name ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classes.txt", "\n".join(f"name {k}" for k in range(12))),
        ("classes.json", [f"name {k}" for k in range(12)]),
        ("id2label.json", {str(k): f"name {k}" for k in range(12)}),
    ],
)
def test_names_in_the_order_of_folders_that_sort_in_two_ways_are_refused(tmp_path, name, content):
    raw = write_files(tmp_path, {name: content, **IMAGES})
    assert_refused(raw, name, "'c2' (as people count)", "'c10' (as labels are sorted)")


def test_lines_that_begin_with_the_class_of_another_are_refused(tmp_path):
    images = {f"{folder}/1.png": None for folder in "012"}
    raw = write_files(tmp_path, {"classes.txt": "1 euro\n2 euro\n5 euro\n", **images})
    assert_refused(raw, "classes.txt can be read in two ways")
    raw = write_files(tmp_path, {"classes.txt": "0 euro\n1 cent\n0 dollar\n", **images})
    assert_refused(raw, "classes.txt names class '0' twice")
