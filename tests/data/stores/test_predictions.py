"""Predictions with and without arrays are read as they were written; broken files are named."""

import json
from typing import Any

import numpy as np
import pytest

from beit3.data.stores.predictions import read_predictions, write_predictions


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
