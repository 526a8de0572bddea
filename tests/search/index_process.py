"""Run by the tests as a process: writes to a folder, or holds its lock."""

import sys
import time

import numpy as np
import pyarrow as pa

from beit3.search.folder import append_rows, delete_rows, lock_for_writing, replace_rows

ROWS = 4
"""Rows of a write; a reader sees all of a write or none."""


def make_vectors(number: int) -> np.ndarray:
    """Returns the vectors of a write: all point to the axis of its number."""
    return np.repeat(np.eye(8, dtype=np.float32)[[number % 8]], ROWS, axis=0)


def make_metadata(number: int) -> pa.Table:
    ids = [f"{number}-{row}" for row in range(ROWS)]
    return pa.table({"id": ids, "write": [number] * ROWS})


def write_repeatedly(folder: str, times: int) -> None:
    """Appends, replaces and deletes in turns."""
    for number in range(times):
        append_rows(folder, {"image": make_vectors(number)}, make_metadata(number))
        if number % 3 == 1:
            replace_rows(folder, {"image": make_vectors(number)}, make_metadata(number))
        if number % 2:
            delete_rows(folder, make_metadata(number - 1).column("id").to_pylist())


def hold_lock(folder: str) -> None:
    with lock_for_writing(folder):
        print("locked", flush=True)
        time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write_repeatedly(sys.argv[2], int(sys.argv[3]))
    else:
        hold_lock(sys.argv[2])
