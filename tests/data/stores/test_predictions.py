"""Predictions with and without arrays come back as they were; broken files are refused by name."""

import json

import numpy as np
import pytest

from beit3.data.stores.predictions import read_predictions, write_predictions


def same(one, two) -> bool:
    return (
        np.array_equal(one, two) and one.dtype == two.dtype
        if isinstance(one, np.ndarray)
        else one == two
    )


@pytest.fixture
def rows():
    draw = np.random.default_rng(0)
    return [
        {
            "id": "a",
            "image": draw.random(4, np.float32),
            "texts": draw.random((3, 4), np.float32),
            "note": {"file": "kept"},
        },
        {"id": "b", "texts": draw.random((1, 4), np.float32)},
        {
            "id": "c",
            "image": draw.random(4, np.float32),
            "texts": draw.random((2, 4), np.float32),
            "candidates": [{"label": 1}],
        },
    ]


def test_arrays_and_all_else_come_back(rows, tmp_path):
    write_predictions(tmp_path / "new" / "x.jsonl", rows)
    again = list(read_predictions(tmp_path / "new" / "x.jsonl"))
    assert [row.keys() for row in again] == [row.keys() for row in rows]
    assert all(
        same(row[name], value)
        for row, wanted in zip(again, rows, strict=True)
        for name, value in wanted.items()
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "x.image.npy",
        "x.jsonl",
        "x.texts.npy",
    ]


def test_broken_arrays_are_named(rows, tmp_path):
    path = tmp_path / "x.jsonl"
    write_predictions(path, rows)
    np.save(tmp_path / "x.image.npy", np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match=r"x\.image\.npy has 1 rows, 1 to 2"):
        list(read_predictions(path))
    (tmp_path / "x.image.npy").unlink()
    with pytest.raises(ValueError, match=r"cannot read the arrays .*x\.image\.npy"):
        list(read_predictions(path))


def test_a_line_cannot_name_a_file_elsewhere(rows, tmp_path):
    """Only the name counts, not a path in front of it."""
    path = tmp_path / "x.jsonl"
    write_predictions(path, rows)
    line = json.loads(path.read_text().splitlines()[0])
    line["image"]["file"] = "../../elsewhere/x.image.npy"
    path.write_text(json.dumps(line) + "\n")
    assert same(next(read_predictions(path))["image"], rows[0]["image"])
