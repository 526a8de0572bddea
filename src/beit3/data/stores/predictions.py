"""Predictions on disk: one JSON line each; arrays go to one .npy file per field beside it, and a line says which rows it has.

`beit3 eval --predictions x.jsonl` writes, `beit3 score` reads. An array [D] or [K, D] becomes {"file": "x.image.npy",
"rows": 7} or "rows": [7, 12].
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.stores.records import Records, write_records

Prediction = dict[str, Any]


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write `predictions` to `path`, their arrays before the lines that name them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[np.ndarray]] = {}
    rows: Counter[str] = Counter()
    lines = []
    for prediction in predictions:
        line = dict(prediction)
        for name, value in prediction.items():
            if isinstance(value, np.ndarray):
                start = rows[name]
                parts.setdefault(name, []).append(np.atleast_2d(value))
                rows[name] += len(parts[name][-1])
                line[name] = {
                    "file": f"{path.stem}.{name}.npy",
                    "rows": start if value.ndim == 1 else [start, rows[name]],
                }
        lines.append(line)
    for name, arrays in parts.items():
        partial = path.with_name(f"{path.stem}.{name}.npy.partial")
        with partial.open("wb") as file:
            np.save(file, np.concatenate(arrays))
        partial.replace(path.with_name(f"{path.stem}.{name}.npy"))
    write_records(path, lines)


def read_predictions(path: str | Path) -> Iterator[Prediction]:
    """The predictions of a file, their arrays in place. ValueError naming an array's file that is absent or too short."""
    path, arrays = Path(path), dict[str, np.ndarray]()
    for line in Records(path):
        for name, value in line.items():
            if isinstance(value, dict) and value.keys() == {"file", "rows"}:
                line[name] = _rows(path.with_name(Path(value["file"]).name), value["rows"], arrays)
        yield line


def _rows(file: Path, rows: int | list[int], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of an array that is read once."""
    first, last = (rows, rows + 1) if isinstance(rows, int) else rows
    try:
        if file.name not in arrays:
            arrays[file.name] = np.load(file, mmap_mode="r", allow_pickle=False)
        array = arrays[file.name]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the arrays {file}: {error}; write the predictions again"
        ) from None
    if not 0 <= first < last <= len(array):
        raise ValueError(
            f"{file} has {len(array)} rows, {first} to {last} are asked for: write the predictions again"
        )
    return array[first] if isinstance(rows, int) else array[first:last]
