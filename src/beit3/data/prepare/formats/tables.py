"""Tables, CSV, TSV or JSON lines, with a column of images: read row by row for any task, and
captions made of them.

open_clip's training files, Hugging Face's image folders, Kaggle's Flickr8k and Flickr30k and most
sets made at home look
like this. A reader says which columns it wants; `table_rows` finds them, the images and the splits.
Nothing is ever downloaded.
"""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.files import (
    FLICKR30K,
    SPLITS,
    Pair,
    expected,
    field,
    named_split,
    nothing_known,
    or_held_out,
    split_name,
)
from beit3.files import read_json_lines, read_json_list, read_lines

Columns = Mapping[str, tuple[str, ...]]
"""A reader's name for a column -> the names that a table may give it. Case is ignored; of several
the first counts."""

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
OPTIONAL: Columns = {"split": ("split",), "id": ("id",)}
# Folders beside a table where its images may be.
PLACES = ("", "images", "Images", *FLICKR30K)
ENDINGS = frozenset({".csv", ".tsv", ".jsonl"})
DELIMITERS = ",\t|;"


class Row(NamedTuple):
    """A row: its image as the table names it and where that is; the columns asked for. `fault` says
    why a row is none."""

    file: Path
    where: str
    split: str
    cells: dict[str, Any]
    image: str = ""
    path: str = ""
    fault: str = ""


def tables(raw: str | Path) -> Iterator[Pair]:
    """The captions of a table, or of all tables in a folder: {id: "image#k", image, text}, k
    counting an image's captions.

    An `id` in JSON lines takes the place of the image's name. A row with too few or too many cells
    is a record {id, fault}.
    """
    captions: Counter[str] = Counter()
    for row in table_rows(raw, {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}):
        given = row.cells.get("text", "")
        texts = given if isinstance(given, list) else [given]
        if row.fault or not texts:
            yield row.split, {"id": row.where, "fault": row.fault or "it has no text"}
            continue
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{row.where}: text should be a text or a list of texts, not {str(given)[:60]}"
            )
        # In a CSV an `id` counts its rows or captions.
        key = str(row.cells["id"] if row.file.suffix.lower() == ".jsonl" else "") or row.image
        for text in texts:
            yield (
                row.split,
                {"id": f"{key}#{captions[key]}", "image": row.path, "text": text.strip()},
            )
            captions[key] += 1


def table_rows(
    raw: str | Path, needed: Columns, also: Columns = OPTIONAL, *, files: Sequence[Path] = ()
) -> Iterator[Row]:
    """The rows of a table, of all tables in a folder, or of `files`; `needed` columns must be
    there, `also` may ("" if not).

    Splits come from a column `split`, else from the file's name or folder. Without a val, 5 % of
    the images are held out
    with all their rows. A row without an image, or with too few or too many cells, has a fault.
    """
    raw = Path(raw).absolute()
    files = files or table_files(raw)
    if not files:
        raise nothing_known(raw, ".csv, .tsv, .jsonl or captions.txt (tables)")
    named = {file: named_split(file, raw) for file in files}
    has_val = "val" in named.values() or any(
        side == "val" for file in files for side in _given_splits(file, needed, also)
    )
    for file, name in named.items():
        for where, cells, fault in _cells(file, needed, also):
            if fault or not cells["image"]:
                yield Row(file, where, name or "train", {}, fault=fault or "it has no image")
                continue
            image = field(cells, "image", str, where)
            path = find_image(file, image)
            # From the table's folder, so that "./a.jpg", "a.jpg" and the absolute path are one
            # image, wherever the folder is.
            image = os.path.relpath(os.path.join(file.parent, image), file.parent)
            given = str(cells.get("split", ""))
            side = or_held_out(
                split_name(given, where) if given else name or "train", image, has_val=has_val
            )
            yield Row(file, where, side, cells, image, path)


def table_files(raw: Path) -> list[Path]:
    """The tables in `raw` and in the folders train, val, test (or a synonym) right below it; or
    `raw` itself."""
    if raw.is_file():
        return [raw] if raw.suffix.lower() in ENDINGS | {".txt"} else []
    places = [
        raw,
        *sorted(path for path in raw.iterdir() if path.is_dir() and path.name.lower() in SPLITS),
    ]
    files = [
        path
        for place in places
        for path in sorted(place.iterdir())
        if path.is_file() and path.name[0] != "."
    ]
    return [path for path in files if path.suffix.lower() in ENDINGS or path.name == "captions.txt"]


def is_tables(raw: Path) -> bool:
    """Whether `raw` is or holds a table."""
    return bool(table_files(raw))


def find_image(table: Path, image: str) -> str:
    """Absolute path of an image beside the table or in the folder above, or where it was expected;
    an absolute name stays."""
    if "://" in image:
        raise _urls(table)
    base = table.parent
    places = [*(base / name for name in PLACES), base.parent]
    paths = (os.path.join(place, image) for place in places)
    found = next((path for path in paths if os.path.isfile(path)), "")
    return found or (image if os.path.isabs(image) else expected(places, image, base))


def _given_splits(file: Path, needed: Columns, also: Columns) -> Iterator[str]:
    """The splits that the rows of a table name; a CSV without such a column is not read for it."""
    if (
        file.suffix.lower() in (".json", ".jsonl")
        or _columns(_heads(next(read_lines(file), ""), file)[0], needed, also, file)["split"]
    ):
        for where, cells, _ in _cells(file, needed, also):
            if cells.get("split"):
                yield split_name(str(cells["split"]), where)


Cells = tuple[str, dict[str, Any], str]
"""(where, column -> value, fault)."""


def _cells(file: Path, needed: Columns, also: Columns) -> Iterator[Cells]:
    kind = file.suffix.lower()
    if kind not in (".json", ".jsonl"):
        yield from _csv_cells(file, needed, also)
        return
    for where, entry in read_json_lines(file) if kind == ".jsonl" else read_json_list(file):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{where} holds a {type(entry).__name__}: it should be an object with an "
                f"{', a '.join(needed)}"
            )
        entry = {name.lower(): value for name, value in entry.items()}
        names = _columns(entry, needed, also, where)
        values = {column: entry[name] if name else None for column, name in names.items()}
        yield (
            where,
            {
                key: value.strip() if isinstance(value, str) else "" if value is None else value
                for key, value in values.items()
            },
            "",
        )


def _csv_cells(file: Path, needed: Columns, also: Columns) -> Iterator[Cells]:
    given = read_lines(file)
    heads, delimiter = _heads(next(given, ""), file)
    names = _columns(heads, needed, also, file)
    reader = csv.reader(given, delimiter=delimiter)
    try:
        for cells in reader:
            where = f"{file} line {reader.line_num + 1}"
            row = dict(zip(heads, map(str.strip, cells), strict=False))
            if len(cells) == len(heads):
                # A column without a name, as pandas writes its index, is none of those that are not
                # there.
                yield (
                    where,
                    {column: row[name] if name else "" for column, name in names.items()},
                    "",
                )
            elif any(row.values()):  # Flickr30k's results.csv has one such line
                yield (
                    where,
                    {},
                    f"{len(cells)} cells for {len(heads)} columns: put quotes around cells with "
                    f"{delimiter!r}",
                )
    except csv.Error as error:
        raise ValueError(
            f"{file} line {reader.line_num + 1} cannot be read ({error}): check its quotes"
        ) from None


def _heads(header: str, file: Path) -> tuple[list[str], str]:
    """Lower-cased names of the columns, and the delimiter."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(DELIMITERS, key=header.count)
    return [
        name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])
    ], delimiter


def _columns(
    names: Collection[str], needed: Columns, also: Columns, where: str | Path
) -> dict[str, str]:
    """The table's name of each column, "" for those of `also` that are not there. ValueError where
    a needed one is missing."""
    found = {
        column: next((name for name in known if name in names), "")
        for column, known in {**also, **needed}.items()
    }
    if not found["image"] and any(name.endswith("url") or "://" in name for name in names):
        raise _urls(where)
    if not all(found[column] for column in needed):
        wanted = " and ".join(
            f"one {known[0]}" + (f" (or {', '.join(known[1:6])})" if len(known) > 1 else "")
            for known in needed.values()
        )
        raise ValueError(
            f"{where} has the columns {', '.join(map(_short, [*names][:8])) or 'none'}: name "
            f"{wanted}"
        )
    return found


def _urls(where: Any) -> ValueError:
    return ValueError(
        f"{where} names images by url: download them first, for example with img2dataset, and "
        "give its tar files as --raw"
    )


def _short(name: str) -> str:
    return repr(name[:30] + ("..." if len(name) > 30 else ""))
