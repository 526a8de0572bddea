"""Tables (CSV, TSV or JSON lines) with a column of images, read row by row for any task.

open_clip's training files, Hugging Face's image folders, Kaggle's Flickr8k and Flickr30k and most
datasets made at home look like this. A reader says which columns it wants; `read_table_rows` finds
them, the images and the splits. Nothing is ever downloaded.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.files import (
    FLICKR30K_FOLDERS,
    get_field,
    list_spellings,
    make_missing_path,
    make_unknown_error,
)
from beit3.data.prepare.formats.split_names import SPLITS, choose_split, infer_split, parse_split
from beit3.data.prepare.formats.table_cells import (
    ColumnNames,
    make_url_error,
    may_name_splits,
    read_cells,
)

IMAGE_COLUMNS = (
    "image",
    "filepath",
    "filename",
    "file",
    "path",
    "img",
    "file_name",
    "file_path",
    "image_name",
    "image_path",
    "image_file",
    "img_path",
)
TEXT_COLUMNS = (
    "text",
    "caption",
    "title",
    "sentence",
    "description",
    "comment",
    "texts",
    "captions",
    "sentences",
)
OPTIONAL_COLUMNS: ColumnNames = {"split": ("split",), "id": ("id",)}

IMAGE_FOLDERS = ("", "images", "Images", *FLICKR30K_FOLDERS)
"""Folders beside a table in which its images may lie."""
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})


class TableRow(NamedTuple):
    """A row of a table."""

    file: Path
    location: str
    """"all.csv line 7", for messages and ids."""
    split: str
    cells: dict[str, Any]
    """Values of the columns asked for; empty when the row has a fault."""
    image_name: str = ""
    """The image as the table names it, relative to the table's folder."""
    image_path: str = ""
    fault: str = ""
    """Why the row makes no record, or ""."""


def read_table_rows(
    raw: str | Path,
    needed: ColumnNames,
    optional: ColumnNames = OPTIONAL_COLUMNS,
    *,
    files: Sequence[Path] = (),
) -> Iterator[TableRow]:
    """Yields the rows of a table, of all tables in a folder, or of `files`.

    Splits come from a column "split", else from the name of the file or its folder. Without a val
    split, 5 % of the images are held out with all their rows. A row without an image, or with too
    few or too many cells, has a fault.

    Args:
        raw: A table, or the folder of the tables.
        needed: Columns that each table must have.
        optional: Columns that it may have; their cells are "" where it does not.
        files: The tables to read, instead of those found.

    Raises:
        ValueError: There is no table, or one breaks the format.
    """
    raw = Path(raw).absolute()
    files = files or find_tables(raw)
    if not files:
        raise make_unknown_error(raw, ".csv, .tsv, .jsonl or captions.txt (tables)")
    file_splits = {file: infer_split(file, raw) for file in files}
    has_val = "val" in file_splits.values() or any(
        split == "val" for file in files for split in _read_named_splits(file, needed, optional)
    )
    for file, file_split in file_splits.items():
        file_split = file_split or "train"
        for location, cells, fault in read_cells(file, needed, optional):
            if fault or not cells["image"]:
                yield TableRow(file, location, file_split, {}, fault=fault or "it has no image")
                continue
            image = get_field(cells, "image", str, location)
            image_path = find_image(file, image)
            # "./a.jpg", "a.jpg" and the absolute path are one image, wherever the folder is.
            image_name = os.path.relpath(os.path.join(file.parent, image), file.parent)
            split = str(cells.get("split", ""))
            split = parse_split(split, location) if split else file_split
            split = choose_split(split, image_name, has_val=has_val)
            yield TableRow(file, location, split, cells, image_name, image_path)


def find_tables(raw: Path) -> list[Path]:
    """Returns the tables in `raw` and in the split folders right below it, or `raw` itself.

    A .txt file is a table if it is called captions.txt or given as `raw`.
    """
    if raw.is_file():
        return [raw] if raw.suffix.lower() in TABLE_SUFFIXES | {".txt"} else []
    split_folders = sorted(
        path for path in raw.iterdir() if path.is_dir() and path.name.lower() in SPLITS
    )
    return [
        path
        for folder in [raw, *split_folders]
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name[0] != "."
        and (path.suffix.lower() in TABLE_SUFFIXES or path.name == "captions.txt")
    ]


def is_tables(raw: Path) -> bool:
    """Returns whether `raw` is or holds a table."""
    return bool(find_tables(raw))


def find_image(table: Path, image: str) -> str:
    """Returns the absolute path of an image beside a table or in the folder above.

    Backslashes and either Unicode form of its name will do. A missing image gives a
    `MissingImagePath`; an absolute path is returned as it is.
    """
    if "://" in image:
        raise make_url_error(table)
    base = table.parent
    folders = [*(base / name for name in IMAGE_FOLDERS), base.parent]
    for spelling in list_spellings(image):
        for folder in folders:
            path = os.path.join(folder, spelling)
            if os.path.isfile(path):
                return path
    return image if os.path.isabs(image) else make_missing_path(folders, image, base)


def _read_named_splits(file: Path, needed: ColumnNames, optional: ColumnNames) -> Iterator[str]:
    """Yields the splits that the rows of a table name."""
    if not may_name_splits(file, needed, optional):
        return
    for location, cells, _ in read_cells(file, needed, optional):
        if cells.get("split"):
            yield parse_split(str(cells["split"]), location)
