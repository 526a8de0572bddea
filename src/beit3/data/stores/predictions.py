"""Predictions on disk: one JSON object per line, with arrays in .npy files beside it.

`beit3 eval --predictions x.jsonl` writes them and `beit3 score` reads them. All arrays of one field
go to one file. A line refers to its rows: an array [D] becomes {"file": "x.image.npy", "rows": 7},
an array [K, D] becomes {"file": "x.image.npy", "rows": [7, 12]}.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.stores.arrays import open_array
from beit3.data.stores.record_fields import (
    FieldKind,
    is_box,
    is_id,
    is_list_of,
    is_number,
    is_string,
    is_whole_number,
)
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
"""JSON types of the fields that tasks write and score; others may hold anything."""

MAX_LABEL = 2**31
"""Labels, codes and numbers of codes are smaller."""


# Kinds of fields that a task needs ----------------------------------------------------------------


def is_label(value: Any) -> bool:
    """Returns whether a JSON value can be the number of a class or code."""
    return is_whole_number(value) and 0 <= value < MAX_LABEL


def is_candidate(value: Any) -> bool:
    """Returns whether a JSON value is one candidate of a classification."""
    return isinstance(value, dict) and is_label(value.get("label"))


def is_detection(value: Any) -> bool:
    """Returns whether a JSON value is a predicted object: box, label, score, and maybe a mask."""
    return (
        isinstance(value, dict)
        and is_box(value.get("box"))
        and is_label(value.get("label"))
        and is_number(value.get("score"))
        and ("mask" not in value or is_encoded_mask(value["mask"]))
    )


def is_encoded_mask(value: Any) -> bool:
    """Returns whether a JSON value is a mask in COCO's compressed run lengths."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str):
        return False
    size: Any = value.get("size")
    return is_list_of(is_label)(size) and len(size) == 2


def is_feature(value: Any) -> bool:
    """Returns whether a JSON value is a number within float32."""
    return is_number(value) and abs(value) <= float(np.finfo(np.float32).max)


def is_feature_array(num_axes: int) -> Callable[[Any], bool]:
    """Returns a function that tells whether a value is numbers, in an array or in JSON lists."""

    def accepts(value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return value.ndim == num_axes and value.dtype.kind == "f"
        rows = [value] if num_axes == 1 else value
        if not is_list_of(is_list_of(is_feature))(rows):
            return False
        lengths = set(map(len, rows))
        return len(lengths) == 1 and 0 not in lengths

    return accepts


ID = FieldKind("a text or a whole number", is_id)
STRING = FieldKind("a text", is_string)
CANDIDATES = FieldKind("a list of objects, each with a label", is_list_of(is_candidate))
DETECTIONS = FieldKind(
    "a list of objects, each with a box [left, top, width, height], a label and a score",
    is_list_of(is_detection),
)
CODES = FieldKind("a list of codes, whole numbers from 0 on", is_list_of(is_label))
NUM_CODES = FieldKind(
    "a whole number from 1 to 2^24",
    lambda value: is_whole_number(value) and 0 < value <= 2**24,
)
VECTOR = FieldKind("one row of numbers", is_feature_array(1))
VECTORS = FieldKind("rows of numbers, equally many in each", is_feature_array(2))


# Writing and reading ------------------------------------------------------------------------------


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


def read_predictions(
    path: str | Path, fields: Mapping[str, FieldKind] | None = None
) -> Iterator[Prediction]:
    """Yields the predictions of a file, with their arrays.

    The file holds one JSON object per line, or one JSON list of them.

    Args:
        path: The file.
        fields: Fields that every prediction must have -> what they hold, beside `id`.

    Raises:
        ValueError: A line lacks a field, or holds something else in it; the file of an array is
            absent or too short.
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
            elif name in FIELD_TYPES:
                _check_field(location, name, value)
        if fields is not None:
            _check_needed_fields(location, prediction, {"id": ID, **fields})
        yield prediction


def _read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location, value) for each line, or each entry of a JSON list."""
    if not path.is_file():
        raise ValueError(f"no predictions at {path}: write them by beit3 eval --predictions")
    with path.open("rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return read_json_list(path) if start.startswith(b"[") else read_json_lines(path)


def _check_field(location: str, name: str, value: Any) -> None:
    """Raises ValueError where a field is not of its type in `FIELD_TYPES`."""
    types = FIELD_TYPES[name]
    if isinstance(value, int) and name != "id" and abs(value) >= 2**63:
        raise ValueError(f"{location}: the field {name!r} is a number beyond 64 bits")
    is_number_as_bool = isinstance(value, bool) and bool not in types
    if isinstance(value, types) and not is_number_as_bool:
        return
    shown = json.dumps(value, ensure_ascii=False)[:40]
    names = {str: "a text", bool: "true or false", list: "a list", int: "a whole number"}
    expected = " or ".join(names.get(type, "a number") for type in types)
    raise ValueError(f"{location}: the field {name!r} is {shown}, expected {expected}")


def _check_needed_fields(
    location: str, prediction: Prediction, fields: Mapping[str, FieldKind]
) -> None:
    """Raises ValueError where a prediction lacks a field, or holds something else in it."""
    for name, kind in fields.items():
        if name not in prediction:
            raise ValueError(
                f"{location}: the prediction has no field {name!r} (it has "
                f"{', '.join(prediction) or 'none'}): write the file by beit3 eval --predictions "
                "with weights of the task"
            )
        value = prediction[name]
        if kind.accepts(value):
            continue
        if isinstance(value, np.ndarray):
            shown = f"an array {value.dtype} {list(value.shape)}"
        else:
            shown = json.dumps(value, ensure_ascii=False)[:60]
        raise ValueError(f"{location}: the field {name!r} is {shown}, expected {kind.name}")


def _read_rows(path: Path, rows: int | list[int], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns rows of an array. `arrays` keeps the arrays that are open."""
    span = [rows, rows + 1] if isinstance(rows, int) else rows
    if not is_list_of(is_whole_number)(span) or len(span) != 2:
        raise ValueError(f"rows {rows} of {path} are no row and no [start, end]")
    start, end = span
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
