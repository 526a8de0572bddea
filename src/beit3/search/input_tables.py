"""Tables of images: CSV, TSV, JSON lines and Parquet, with the types of their columns.

Images are paths, or bytes in a column of Parquet, whose image is named
"photos.parquet@image+17" (column and row).
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types
from torch import Tensor

from beit3.data.prepare.formats.delimited import open_table
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, TEXT_COLUMNS, find_image
from beit3.files import read_json_lines
from beit3.images import ImageInput, open_image, read_image_bytes

ID, IMAGE_PATH, CAPTION = "id", "image_path", "caption"
HASH, WIDTH, HEIGHT = "hash", "width", "height"
OWN_COLUMNS = (ID, IMAGE_PATH, CAPTION, HASH, WIDTH, HEIGHT)
"""Columns that embedding writes. A table's own column of such a name becomes `table_<name>`."""

_PARQUET_IMAGE = re.compile(r"(.+\.parquet)@(.+)\+(\d{1,18})", re.DOTALL | re.IGNORECASE)

STATE_COLUMNS = (
    "size",
    "mtime",
    "fault",
    "digest",
    "shard",
    "is_duplicate",
    "is_wanted",
    "kind",
    "detail",
)
"""Columns of surveys and worklists, which are no metadata."""


@dataclass
class InputTable:
    """The rows of a table that name an image.

    Attributes:
        paths: The images, as `read_image` reads them.
        ids: Their ids; empty where the table has none.
        columns: Captions and metadata by name, a value per row.
        faults: (location, reason) of each row that makes no item.
    """

    paths: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)


def read_input_table(
    file: Path, base: Path, *, image_column: str = "", caption_column: str = "", id_column: str = ""
) -> InputTable:
    """Reads a table.

    Args:
        file: A .csv, .tsv, .jsonl, .parquet or .txt file.
        base: Folder that its paths are relative to.
        image_column: Name of the column of images; "" takes the first of the usual names.
        caption_column: Name of the column of captions; "" takes the first of the usual names.
        id_column: Name of the column of ids; "" takes `id`.

    Raises:
        ValueError: The file is damaged or lacks a column.
    """
    table, faults = _read_columns(file)
    names = table.column_names
    image = _find_column(file, names, image_column, IMAGE_COLUMNS)
    if not image:
        if any(name.endswith("url") for name in names):
            raise _make_url_error(file)
        raise ValueError(
            f"{file} has the columns {', '.join(names[:8]) or 'none'}: name one image, or give "
            "--image-column"
        )
    caption = _find_column(file, names, caption_column, TEXT_COLUMNS)
    item_id = _find_column(file, names, id_column, (ID,))
    values = table[image].to_pylist() if not _holds_bytes(table[image].type) else None
    paths = (
        _name_parquet_images(file, image, table[image], base)
        if values is None
        else [_find_path(file, base, value) for value in values]
    )
    kept = [row for row, path in enumerate(paths) if path]
    faults += [
        (f"{file.name} row {row}", "it has no image") for row, path in enumerate(paths) if not path
    ]
    table = table.take(pa.array(kept, pa.int64()))
    if caption and (types.is_list(table[caption].type) or types.is_large_list(table[caption].type)):
        table, rows = _split_captions(table, image, caption, item_id)
        kept = [kept[row] for row in rows]
        item_id = item_id or ID
    columns: dict[str, pa.Array] = {}
    if caption:
        columns[CAPTION] = _read_captions(file, caption, table[caption])
    for name in table.column_names:
        if name not in (image, caption, item_id):
            is_taken = name in OWN_COLUMNS or name in STATE_COLUMNS
            new_name = f"table_{name}" if is_taken else name
            columns[new_name] = table[name].combine_chunks()
    ids = [str(value or "") for value in table[item_id].to_pylist()] if item_id else []
    return InputTable([paths[row] for row in kept], ids, columns, faults)


def get_metadata_names(names: Sequence[str]) -> list[str]:
    """Returns those columns of a worklist that are metadata: ours, then those of the inputs."""
    own = [name for name in OWN_COLUMNS if name in names]
    return own + [name for name in names if name not in own and name not in STATE_COLUMNS]


def _find_column(file: Path, names: Sequence[str], given: str, usual: Sequence[str]) -> str:
    """Returns the column that was asked for, else the first of the usual names, else ""."""
    if given:
        match = next((name for name in names if name.lower() == given.lower()), None)
        if match is None:
            raise ValueError(
                f"{file} has no column {given!r}, it has {', '.join(names[:12])}: name one of them"
            )
        return match
    return next((name for label in usual for name in names if name.lower() == label), "")


def find_image_path(file: Path, base: Path, name: str) -> str:
    """Returns the absolute path of an image that a list or table names.

    It is looked for below `base`, and in the usual folders beside the file. A missing image has
    the path where it was expected: reading it tells so.
    """
    if "://" in name:
        raise _make_url_error(file)
    path = os.path.join(base, name)
    return path if os.path.exists(path) else str(find_image(base / file.name, name))


def _make_url_error(file: Path) -> ValueError:
    return ValueError(
        f"{file} names images by url: download them first, for example with img2dataset, and embed "
        "its tar files"
    )


def _find_path(file: Path, base: Path, value: Any) -> str:
    """Returns the path that a cell names, "" for an empty cell."""
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{file} names the image {str(value)[:40]!r} ({type(value).__name__}): give paths, or "
            "the column of images by --image-column"
        )
    return find_image_path(file, base, value)


def _split_captions(
    table: pa.Table, image: str, caption: str, item_id: str
) -> tuple[pa.Table, list[int]]:
    """Returns a row for each caption of a list, as records have them, and the rows' numbers.

    The ids of an image's rows are "id#0", "id#1" and so on; without ids its name stands for them.
    """
    lists = [texts or [None] for texts in table[caption].to_pylist()]
    rows = [row for row, texts in enumerate(lists) for _ in texts]
    names = table[item_id or image].to_pylist()
    ids = [
        f"{name}#{number}"
        for name, texts in zip(names, lists, strict=True)
        for number in range(len(texts))
    ]
    table = table.take(pa.array(rows, pa.int64()))
    captions = pa.array([text for texts in lists for text in texts])
    table = table.set_column(table.column_names.index(caption), caption, captions)
    if not item_id:
        return table.append_column(ID, pa.array(ids, pa.string())), rows
    return table.set_column(
        table.column_names.index(item_id), item_id, pa.array(ids, pa.string())
    ), rows


def _read_captions(file: Path, name: str, column: pa.ChunkedArray) -> pa.Array:
    """Returns captions as text; null where there is none. Raises ValueError for other values."""
    values = column.to_pylist()
    for value in values:
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{file} column {name} holds {str(value)[:40]!r}, no text: write one caption per "
                "row, or name another column by --caption-column"
            )
    return pa.array([(value or "").strip() or None for value in values], pa.string())


# Columns and their types --------------------------------------------------------------------------


def _read_columns(file: Path) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Returns the columns of a table with their types, and (location, reason) of faulty rows."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        try:
            return pq.read_table(file, memory_map=True), []
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is no Parquet file, or damaged ({error})") from None
    if suffix == ".jsonl":
        return _read_json_columns(file), []
    return _read_delimited_columns(file)


def _read_json_columns(file: Path) -> pa.Table:
    """Reads JSON lines; raises ValueError for a column whose values have no common type."""
    rows: list[dict[str, Any]] = []
    for location, entry in read_json_lines(file):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{location} holds a {type(entry).__name__}: it should be an object with an image"
            )
        rows.append(entry)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except pa.ArrowException:
            raise ValueError(
                f"{file} column {name} mixes values of several types: write one type"
            ) from None
    return pa.table(columns)


def _read_delimited_columns(file: Path) -> tuple[pa.Table, list[tuple[str, str]]]:
    """Reads a CSV or TSV. A row with more or fewer cells than the header is a fault."""
    table = open_table(file)
    rows, faults = [], []
    for number, cells in table.rows:
        if len(cells) == len(table.columns):
            rows.append(cells)
        else:
            reason = f"{len(cells)} cells for {len(table.columns)} columns"
            faults.append((f"{file.name} line {number}", reason))
    columns = {}
    for position, name in enumerate(table.columns):
        if name in columns:
            raise ValueError(f"{file} has two columns {name!r}: rename one")
        if name:
            columns[name] = infer_type([row[position] for row in rows])
    return pa.table(columns), faults


def infer_type(cells: Sequence[str]) -> pa.Array:
    """Returns cells as whole numbers, numbers, true and false, or text; empty ones are null.

    Numbers that are written with leading zeros, as ids are, stay text.
    """
    values = [cell for cell in cells if cell]
    kinds = (
        (_parse_whole_numbers, pa.int64()),
        (_parse_numbers, pa.float64()),
        (_parse_booleans, pa.bool_()),
    )
    for parse, kind in kinds:
        parsed = parse(values)
        if values and parsed is not None:
            remaining = iter(parsed)
            return pa.array([next(remaining) if cell else None for cell in cells], kind)
    return pa.array([cell or None for cell in cells], pa.string())


def _parse_whole_numbers(values: Sequence[str]) -> list[Any] | None:
    if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", value) for value in values):
        return [int(value) for value in values]
    return None


def _parse_numbers(values: Sequence[str]) -> list[Any] | None:
    pattern = r"-?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?"
    if all(re.fullmatch(pattern, value) for value in values):
        return [float(value) for value in values]
    return None


def _parse_booleans(values: Sequence[str]) -> list[Any] | None:
    if all(value.lower() in ("true", "false") for value in values):
        return [value.lower() == "true" for value in values]
    return None


# Images in Parquet --------------------------------------------------------------------------------


def _holds_bytes(kind: pa.DataType) -> bool:
    """Returns whether a column holds images' bytes, alone or as Hugging Face's {bytes, path}."""
    is_struct = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return is_struct or types.is_binary(kind) or types.is_large_binary(kind)


def _name_parquet_images(file: Path, column: str, values: pa.ChunkedArray, base: Path) -> list[str]:
    """Returns the path of each row's image: bytes in the file, or the path beside empty bytes."""
    is_struct = types.is_struct(values.type)
    has_path = is_struct and values.type.get_field_index("path") >= 0
    contents = [values.chunk(i) for i in range(values.num_chunks)]
    paths = []
    row = 0
    for chunk in contents:
        data = chunk.field("bytes") if is_struct else chunk
        names = chunk.field("path").to_pylist() if has_path else [None] * len(chunk)
        for is_valid, name in zip(data.is_valid().to_pylist(), names, strict=True):
            if is_valid:
                paths.append(f"{file}@{column}+{row}")
            else:
                paths.append(_find_path(file, base, name))
            row += 1
    return paths


def read_image(path: str) -> str | bytes:
    """Returns an image as `open_image` takes it: the path, or the bytes of a Parquet row."""
    match = _PARQUET_IMAGE.fullmatch(path)
    if match is None:
        return path
    return _read_parquet_image(match[1], match[2], int(match[3]))


def open_any_image(image: ImageInput) -> Tensor:
    """Opens an image as `open_image` does, which may also be a row of a Parquet file."""
    return open_image(read_image(str(image)) if isinstance(image, str | Path) else image)


def read_bytes(path: str) -> bytes:
    """Returns the bytes of an image file, of a member of a tar or of a Parquet row.

    Raises ValueError that names the image when it cannot be read.
    """
    image = read_image(path)
    return image if isinstance(image, bytes) else read_image_bytes(image)


def get_container(path: str) -> str:
    """Returns the file in which an image lies: a tar, a Parquet file or the image itself."""
    match = _PARQUET_IMAGE.fullmatch(path)
    return match[1] if match else re.sub(r"(?<=\.tar)@\d+\+\d+$", "", path)


def _read_parquet_image(file: str, column: str, row: int) -> bytes:
    """Reads one image of a Parquet file by way of its row group, the last of which are kept."""
    try:
        starts = _read_row_group_starts(file, os.stat(file).st_mtime_ns)
        group = max(number for number, start in enumerate(starts) if start <= row)
        values = _read_row_group(file, os.stat(file).st_mtime_ns, column, group)
        content = values[row - starts[group]].as_py()
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise ValueError(f"image {file}@{column}+{row} cannot be read: {error}") from None
    if not isinstance(content, bytes):
        raise ValueError(f"image {file}@{column}+{row} is not there: the file was changed")
    return content


@lru_cache(maxsize=64)
def _read_row_group_starts(file: str, _modified: int) -> list[int]:
    """Returns the number of the first row of each row group."""
    metadata = pq.read_metadata(file)
    starts, row = [], 0
    for group in range(metadata.num_row_groups):
        starts.append(row)
        row += metadata.row_group(group).num_rows
    return starts


@lru_cache(maxsize=4)
def _read_row_group(file: str, _modified: int, column: str, group: int) -> pa.ChunkedArray:
    """Reads the images of one row group."""
    with pq.ParquetFile(file) as content:
        values = content.read_row_group(group, columns=[column], use_threads=False)[column]
    if types.is_struct(values.type):
        chunks = [values.chunk(i).field("bytes") for i in range(values.num_chunks)]
        return pa.chunked_array(chunks)
    return values
