"""Predictions on disk: one JSON object per line, with arrays in .npy files beside it.

`beit3 eval --predictions x.jsonl` writes them and `beit3 score` reads them. All arrays of one field
go to one file. A line refers to its rows: an array [D] becomes {"file": "x.image.npy", "rows": 7},
an array [K, D] becomes {"file": "x.image.npy", "rows": [7, 12]}.
"""

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.stores.arrays import open_array
from beit3.data.stores.records import write_records
from beit3.files import atomic_write, read_json_lines, read_json_list

Prediction = dict[str, Any]

FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str, int),
    "source": (str,),
    "answer": (str, bool),
    "caption": (str,),
    "label": (int,),
    "score": (int, float),
    "candidates": (list,),
    "objects": (list,),
    "height": (int,),
    "width": (int,),
    "map": (str,),
    "codes": (list,),
    "num_codes": (int,),
    "distance": (int, float),
    "image_loss": (int, float),
    "image_targets": (int,),
    "image_correct": (int,),
    "text_loss": (int, float),
    "text_targets": (int,),
    "text_correct": (int,),
}
"""JSON types of the fields that tasks write and score."""


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes predictions to `path`, their arrays before the lines that refer to them."""
    path = Path(path)
    arrays: dict[str, list[np.ndarray]] = {}
    num_rows: Counter[str] = Counter()
    lines = []
    for prediction in predictions:
        line = dict(prediction)
        for name, value in prediction.items():
            if not isinstance(value, np.ndarray):
                continue
            rows = np.atleast_2d(value)
            arrays.setdefault(name, []).append(rows)
            start, end = num_rows[name], num_rows[name] + len(rows)
            line[name] = {
                "file": f"{path.stem}.{name}.npy",
                "rows": start if value.ndim == 1 else [start, end],
            }
            num_rows[name] = end
        lines.append(line)
    for name, parts in arrays.items():
        with atomic_write(path.with_name(f"{path.stem}.{name}.npy")) as file:
            np.save(file, np.concatenate(parts))
    write_records(path, lines)


def read_predictions(path: str | Path) -> Iterator[Prediction]:
    """Yields the predictions of a file, with their arrays.

    The file holds one JSON object per line, or one JSON list of them. Raises ValueError naming the
    line and field that does not fit, and the file of an array that is absent or too short.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    for location, prediction in _read_objects(path):
        if not isinstance(prediction, dict):
            kind = type(prediction).__name__
            raise ValueError(f"{location} holds a {kind}: a prediction is a JSON object")
        for name, value in prediction.items():
            if isinstance(value, dict) and value.keys() == {"file", "rows"}:
                array_path = path.with_name(Path(str(value["file"])).name)
                prediction[name] = _read_rows(array_path, value["rows"], arrays)
            else:
                _check_field(location, name, value)
        yield prediction


def _read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location, value) for each line, or each entry of a JSON list."""
    if not path.is_file():
        raise ValueError(f"no predictions at {path}: write them by beit3 eval --predictions")
    with path.open("rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_list(path) if start.startswith(b"[") else read_json_lines(path)


def _check_field(location: str, name: str, value: Any) -> None:
    """Raises ValueError where a field is null or not of its type in `FIELD_TYPES`."""
    types = FIELD_TYPES.get(name, (object,))
    is_number_as_bool = isinstance(value, bool) and bool not in types and object not in types
    if value is not None and isinstance(value, types) and not is_number_as_bool:
        return
    shown = json.dumps(value, ensure_ascii=False)[:40]
    names = {str: "a text", bool: "true or false", list: "a list", int: "a whole number"}
    expected = " or ".join(names.get(type, "a number") for type in types)
    expected = "no null" if types == (object,) else expected
    raise ValueError(f"{location}: the field {name!r} is {shown}, expected {expected}")


def _read_rows(path: Path, rows: int | list[int], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns rows of an array. `arrays` keeps the arrays that are open."""
    try:
        start, end = (rows, rows + 1) if isinstance(rows, int) else map(int, rows)
    except (TypeError, ValueError):
        raise ValueError(f"rows {rows} of {path} are no row and no [start, end]") from None
    if path.name not in arrays:
        arrays[path.name] = open_array(path, "write the predictions again")
    array = arrays[path.name]
    if array.ndim != 2:
        raise ValueError(
            f"{path} holds an array of shape {list(array.shape)}, not of rows: "
            "write the predictions again"
        )
    if not 0 <= start < end <= len(array):
        raise ValueError(
            f"{path} has {len(array)} rows, rows {start} to {end} are needed: "
            "write the predictions again"
        )
    return array[start] if isinstance(rows, int) else array[start:end]
