"""Predictions with and without arrays are read as they were written; broken files are named."""

import json
from typing import Any

import numpy as np
import pytest

from beit3.data.stores.predictions import read_predictions, write_predictions
from beit3.task import load_task


def is_equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second) and first.dtype == second.dtype
    return first == second


@pytest.fixture
def predictions() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "id": "a",
            "image": rng.random(4, np.float32),
            "texts": rng.random((3, 4), np.float32),
            "note": {"file": "kept"},
        },
        {"id": "b", "texts": rng.random((1, 4), np.float32)},
        {
            "id": "c",
            "image": rng.random(4, np.float32),
            "texts": rng.random((2, 4), np.float32),
            "candidates": [{"label": 1}],
        },
    ]


def test_predictions_are_read_as_they_were_written(predictions, tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    write_predictions(path, predictions)
    copies = list(read_predictions(path))
    assert [copy.keys() for copy in copies] == [prediction.keys() for prediction in predictions]
    for copy, prediction in zip(copies, predictions, strict=True):
        assert all(is_equal(copy[name], value) for name, value in prediction.items())
    names = sorted(path.name for path in path.parent.iterdir())
    assert names == ["x.image.npy", "x.jsonl", "x.texts.npy"]


def test_broken_arrays_are_named(predictions, tmp_path):
    path = tmp_path / "x.jsonl"
    write_predictions(path, predictions)
    np.save(tmp_path / "x.image.npy", np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"x\.image\.npy has 1 rows, rows 1 to 2 are needed"):
        list(read_predictions(path))
    (tmp_path / "x.image.npy").unlink()
    with pytest.raises(ValueError, match=r"x\.image\.npy cannot be read"):
        list(read_predictions(path))


@pytest.mark.parametrize("rows", [[0, float("inf")], [0, 1.5], [0], [0, 1, 2], "0", None])
def test_rows_that_are_no_numbers_are_named(predictions, tmp_path, rows):
    write_predictions(tmp_path / "x.jsonl", predictions)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    lines[0]["texts"]["rows"] = rows
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(ValueError, match=r"rows .* of .*x\.texts\.npy are no row"):
        list(read_predictions(tmp_path / "x.jsonl"))


def test_damaged_arrays_are_named(predictions, tmp_path):
    """numpy reads a header as Python source, which fails in ways of its own."""
    path, array_path = tmp_path / "x.jsonl", tmp_path / "x.image.npy"
    write_predictions(path, predictions)
    intact = array_path.read_bytes()
    shape = intact[intact.index(b"'shape'") : intact.index(b"}")]
    for damaged in (
        b"'shape': (2, 4, ",
        b"'shape': (2**70, 4), ",
        b"'shape': 'x', ",
        b"'\x00': ((",
    ):
        array_path.write_bytes(intact.replace(shape, damaged.ljust(len(shape))))
        with pytest.raises(ValueError, match=r"x\.image\.npy cannot be read") as error:
            list(read_predictions(path))
        assert "\n" not in str(error.value)
    np.save(array_path, np.zeros((2, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"x\.image\.npy holds an array of shape \[2, 4, 3\]"):
        list(read_predictions(path))


def test_a_line_cannot_name_a_file_elsewhere(predictions, tmp_path):
    """Directories in the name of an array file are ignored."""
    path = tmp_path / "x.jsonl"
    write_predictions(path, predictions)
    line = json.loads(path.read_text().splitlines()[0])
    line["image"]["file"] = "../../elsewhere/x.image.npy"
    path.write_text(json.dumps(line) + "\n")
    assert is_equal(next(read_predictions(path))["image"], predictions[0]["image"])


INTACT = {
    "vqa": {"answer": "yes"},
    "nlvr2": {"answer": "true"},
    "captioning": {"caption": "a dog"},
    "imagenet": {"candidates": [{"label": 3}]},
    "coco": {"objects": [{"box": [0, 0, 1, 1], "label": 0, "score": 0.5}]},
    "ade20k": {"map": "aGk="},
    "vqkd": {"codes": [1, 2], "num_codes": 4},
    "retrieval": {"image": [0.1, 0.2], "texts": [[0.1, 0.2]]},
}
WRONG = (None, 3.5, True, {}, [None], [[]], [{}], [{"label": "a"}], [{"label": -1}], [["a"]])
WRONG_OBJECTS = (
    {"box": "abcd"},
    {"box": [0, 0, 1]},
    {"box": [0, 0, 1, 10**400]},
    {"label": None},
    {"score": "high"},
    {"mask": {"size": [1], "counts": "a"}},
)


@pytest.mark.parametrize("name", INTACT)
def test_fields_that_a_task_cannot_score_are_named_with_their_line(tmp_path, name):
    fields, path = load_task(name).prediction_fields, tmp_path / "x.jsonl"
    assert fields.keys() == INTACT[name].keys()
    intact = {"id": 1, **INTACT[name]}
    changes = [{field: value} for field in fields for value in WRONG]
    if name == "coco":
        changes += [{"objects": [intact["objects"][0] | wrong]} for wrong in WRONG_OBJECTS]
    for change in [{"id": [1]}, *changes]:
        path.write_text(f"{json.dumps(intact)}\n{json.dumps(intact | change)}\n")
        with pytest.raises(ValueError, match=f"x.jsonl line 2: the field '{next(iter(change))}'"):
            list(read_predictions(path, fields))
    for field in intact:
        path.write_text(json.dumps({k: v for k, v in intact.items() if k != field}) + "\n")
        with pytest.raises(ValueError, match=f"line 1: the prediction has no field '{field}'"):
            list(read_predictions(path, fields))
    path.write_text(json.dumps(intact) + "\n")
    assert list(read_predictions(path, fields)) == [intact]


def test_null_is_refused_only_in_fields_that_are_scored(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "answer": "yes", "note": null, "confidence": NaN}\n')
    assert next(read_predictions(path))["answer"] == "yes"
    path.write_text('{"id": 1, "answer": null}\n')
    with pytest.raises(ValueError, match="line 1: the field 'answer' is null, expected a text"):
        list(read_predictions(path))
