"""Predictions on disk: one JSON object per line, with arrays in .npy files beside it.

`beit3 eval --predictions x.jsonl` writes them and `beit3 score` reads them. All arrays of one field
go to one file. A line refers to its rows: an array [D] becomes {"file": "x.image.npy", "rows": 7},
an array [K, D] becomes {"file": "x.image.npy", "rows": [7, 12]}.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.stores.records import Records, write_records
from beit3.files import atomic_write

Prediction = dict[str, Any]


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
    """Yields the predictions of a file with their arrays.

    Raises ValueError naming the file of an array that is absent or too short.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    for prediction in Records(path):
        for name, value in prediction.items():
            if isinstance(value, dict) and value.keys() == {"file", "rows"}:
                array_path = path.with_name(Path(value["file"]).name)
                prediction[name] = _read_rows(array_path, value["rows"], arrays)
        yield prediction


def _read_rows(path: Path, rows: int | list[int], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Returns rows of an array. `arrays` keeps the arrays that are open."""
    start, end = (rows, rows + 1) if isinstance(rows, int) else rows
    try:
        if path.name not in arrays:
            arrays[path.name] = np.load(path, mmap_mode="r", allow_pickle=False)
        array = arrays[path.name]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the arrays {path}: {error}; write the predictions again"
        ) from None
    if not 0 <= start < end <= len(array):
        raise ValueError(
            f"{path} has {len(array)} rows, rows {start} to {end} are needed: "
            "write the predictions again"
        )
    return array[start] if isinstance(rows, int) else array[start:end]
