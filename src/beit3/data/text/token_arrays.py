"""Writes the arrays of `.tokens` files: per part of a corpus, then joined to one per split."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np

from beit3.data.stores.tokens import ARRAY_DTYPES, RECORD_DTYPE, TokensHeader

BLOCK = 1 << 20
"""Bytes of ids, or rows of an array, that are in memory before they are written."""


class PartWriter:
    """Writes the records of one split of one part to three files as they come.

    The files are `path` with the suffixes .ids, .records and .names. Used as a context manager,
    which leaves them on the disk.

    Args:
        path: Common beginning of the files' names.
        dtype: Type of the ids.
        id_counts: int64 [vocab_size]; the ids written are counted in it.
    """

    def __init__(self, path: Path, dtype: np.dtype, id_counts: np.ndarray) -> None:
        self.dtype, self.id_counts = dtype, id_counts
        self.files = {
            name: path.with_name(f"{path.name}.{name}").open("wb") for name in ARRAY_DTYPES
        }
        self.num_records = 0
        self._num_ids = 0
        self._blocks: list[bytes] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._num_waiting_bytes = 0
        self._file_name = ""
        self._name_start = self._names_size = 0

    def add(self, ids: bytes, file_name: str, number: int) -> None:
        """Adds the record with this number in a file of the corpus."""
        if file_name != self._file_name:
            self._file_name, self._name_start = file_name, self._names_size
            self._names_size += self.files["names"].write(file_name.encode() + b"\0")
        size = len(ids) // self.dtype.itemsize
        self._rows.append((self._num_ids, self._name_start, size, number))
        self._blocks.append(ids)
        self._num_ids += size
        self._num_waiting_bytes += len(ids)
        self.num_records += 1
        if self._num_waiting_bytes > BLOCK:
            self._write_block()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_block()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _write_block(self) -> None:
        block = b"".join(self._blocks)
        self.files["ids"].write(block)
        self.files["records"].write(np.array(self._rows, RECORD_DTYPE).tobytes())
        ids = np.frombuffer(block, self.dtype)
        self.id_counts += np.bincount(ids, minlength=len(self.id_counts))
        self._blocks, self._rows, self._num_waiting_bytes = [], [], 0


def append_to_array(array: Path, part: Path, name: str, header: TokensHeader) -> int:
    """Appends a part's array to the .npy file of its split and returns the new length.

    The file is first truncated to the length in `header`, which counts the parts before. So it does
    no harm if an interrupted call had appended a part of the data.

    Args:
        array: The .npy file; it is created if absent.
        part: Path that was given to `PartWriter`.
        name: "ids", "records" or "names".
        header: Lengths of the arrays before, and the type of the ids.
    """
    dtype, size = header.get_dtype(name), getattr(header, name)
    with (
        array.open("r+b" if array.exists() else "w+b") as file,
        part.with_name(f"{part.name}.{name}").open("rb") as part_file,
    ):
        file.seek(len(_make_npy_header(dtype, size)) + size * dtype.itemsize)
        file.truncate()
        while block := part_file.read(BLOCK * dtype.itemsize):
            file.write(_shift_offsets(block, header) if name == "records" else block)
        size += part_file.tell() // dtype.itemsize
        file.seek(0)
        file.write(_make_npy_header(dtype, size))
        file.flush()
        os.fsync(file.fileno())
    return size


def _shift_offsets(block: bytes, header: TokensHeader) -> bytes:
    """Turns offsets into a part's arrays into offsets into those of its split."""
    rows = np.frombuffer(block, RECORD_DTYPE).copy()
    rows["start"] += header.ids
    rows["name"] += header.names
    return rows.tobytes()


def _make_npy_header(dtype: np.dtype, size: int) -> bytes:
    """Returns the header of an .npy file. It has one length for all sizes and can be rewritten."""
    buffer = BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (size,),
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()
