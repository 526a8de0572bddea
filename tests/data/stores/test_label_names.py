"""Lists of names: every form that people have gives the same names, unclear ones are refused."""

import json

import pytest

from beit3.data.stores.label_names import read_answers, read_class_names, write_class_names
from beit3.data.stores.literals import list_items, parse_literal
from beit3.predict import read_classes

NAMES = ("tench", "great white shark", "café")
CONTENTS = {
    "plain.txt": "tench\ngreat white shark\ncafé\n",
    "ends.txt": "tench\r\ngreat white shark \r\ncafé",
    "numbered.txt": "0 tench\n1: great white shark\n2\tcafé\n",
    "synsets.txt": "n01440764 tench\nn01484850 great white shark\nn00000003 café\n",
    "python.txt": "{0: 'tench',\n 1: 'great white shark',\n 2: 'café'}",
    "lines.txt": "".join(
        json.dumps({"answer": NAMES[label], "label": label}) + "\n" for label in (2, 0, 1)
    ),
    "list.json": json.dumps(NAMES),
    "list.txt": json.dumps(NAMES, indent=1),
    "dense.json": json.dumps([{"id": 7 - label, "name": NAMES[label]} for label in range(3)]),
    "imagenet_class_index.json": json.dumps(
        {str(label): [f"n{label}", NAMES[label]] for label in (1, 0, 2)}
    ),
    "id2label.json": json.dumps({str(label): NAMES[label] for label in (2, 1, 0)}),
    "label2id.json": json.dumps({NAMES[label]: label for label in (2, 1, 0)}),
    "config.json": json.dumps(
        {"model_type": "vit", "id2label": {str(label): NAMES[label] for label in range(3)}}
    ),
    "coco.json": json.dumps({"images": [], "categories": [{"id": 1, "name": n} for n in NAMES]}),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_form_and_encoding_gives_the_same_names(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(CONTENTS[name].encode(encoding))
    assert read_class_names(tmp_path / name) == read_answers(tmp_path / name) == NAMES


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "café\n".encode("latin-1"), "a.txt is not UTF-8"),
        ("a.txt", b"\x80\x04\x95pickle", "a.txt is not UTF-8"),
        ("a.txt", "a\nb\n".encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.txt", b"\n \n", "a.txt holds no names"),
        ("a.txt", b"tench\n\nshark\n", "a.txt line 2 is blank"),
        ("a.txt", b"1 tench\n2 shark\n", "1 to 2, which may count from 1 or leave out class 0"),
        ("a.json", b'{"1": "a", "2": "b"}', "1 to 2, which may count from 1 or leave out class 0"),
        ("a.json", b'{"0": "a", "2": "b"}', "its labels are not 0 to 1, each once"),
        ("a.json", b'{"0": "a", "0": "b"}', "'0' is there 2 times"),
        ("a.json", b'{"0": 1, "1": 0}', "names may be the keys or the values"),
        ("a.json", b'{"n01440764": "a"}', "keys 'n01440764'"),
        ("a.json", b'["a", null]', r"\[1\] is 'None': it should be a name"),
        ("a.json", b'["a", ""]', "name of class 1 is empty"),
        ("a.json", b'"tench"', "should be a list of names"),
        ("a.json", b'["tench"', "a.json is no list of class names: it is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is no list of class names"),
    ],
)
def test_lists_that_are_broken_or_unclear_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_class_names(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_repeated_answer_is_refused_and_a_blank_one_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("yes\n\nno\n\n", encoding="utf-8-sig")
    assert read_answers(tmp_path / "a.txt") == ("yes", "", "no")
    (tmp_path / "a.txt").write_text("yes\nno\nyes \n")
    with pytest.raises(ValueError, match="a.txt lists the answer 'yes' 2 times"):
        read_answers(tmp_path / "a.txt")


@pytest.mark.parametrize("names", [("1 euro", "2 euro"), ("[x]", "y"), ("0 b", "1 a"), NAMES])
def test_written_class_names_are_read_as_they_were(tmp_path, names):
    write_class_names(tmp_path / "classes.txt", names)
    assert read_class_names(tmp_path / "classes.txt") == names


def test_names_are_taken_from_records_lists_and_mappings(tmp_path):
    (tmp_path / "imagenet/main").mkdir(parents=True)
    with pytest.raises(ValueError, match="no class names at .*imagenet/main/classes.txt"):
        read_classes(tmp_path)
    write_class_names(tmp_path / "imagenet/main/classes.txt", NAMES)
    for names in (tmp_path, tmp_path / "imagenet", str(tmp_path / "imagenet/main"), list(NAMES)):
        assert read_classes(names) == NAMES
    assert read_classes(dict(enumerate(NAMES))) == NAMES and read_classes(None) == ()


@pytest.mark.parametrize(
    ("value", "items"),
    [
        ("a red circle", ["a red circle"]),
        ("['red', 'red', 'blue']", ["red", "red", "blue"]),
        ('["red", null, "blue"]', ["red", "blue"]),
        ("('red', 'blue')", ["red", "blue"]),
        ("(3, 4)", ["(3, 4)"]),
        ("{3, 4}", ["{3, 4}"]),
        ("[a dog]", ["[a dog]"]),
        ("(1) a dog (2)", ["(1) a dog (2)"]),
        (["red", None, float("nan")], ["red"]),
        (float("nan"), []),
        (3, [3]),
    ],
)
def test_one_value_or_many(value, items):
    assert list_items(value) == items


def test_a_list_without_commas_is_refused():
    """NumPy writes its arrays so, and Python would join the texts."""
    with pytest.raises(ValueError, match="lacks commas"):
        parse_literal("['red' 'red' 'blue']")
