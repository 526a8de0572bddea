"""Tables of captioned images, CSV, TSV or JSON lines, with a column of images and one of texts.

open_clip's training files, Hugging Face's image folders, Kaggle's Flickr8k and Flickr30k and most sets made at home look
like this. Gives (split, {id: "image#k", image, text}), one record per caption. Nothing is ever downloaded.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.formats.files import SPLITS, Pair, lines, named_split, nothing_known, or_held_out, split_name

# Case is ignored; where a table has several of them, the first counts.
IMAGE_COLUMNS = (
    "image", "filepath", "filename", "file", "path", "img", "file_name", "file_path", "image_name", "image_path", "image_file", "img_path",
)  # fmt: skip
TEXT_COLUMNS = ("text", "caption", "title", "sentence", "description", "comment", "texts", "captions", "sentences")
# Folders beside a table where its images may be; the last is how Flickr30k unpacks.
PLACES = ("", "images", "Images", "flickr30k_images")
ENDINGS = frozenset({".csv", ".tsv", ".jsonl"})
DELIMITERS = ",\t|;"


class Row(NamedTuple):
    """One image with its texts as a table gives them; `fault` says why a row is none."""

    where: str
    image: str
    texts: list[str]
    split: str = ""
    id: str = ""
    fault: str = ""


def tables(raw: str | Path) -> Iterator[Pair]:
    """The captions of a table, or of all tables in a folder: {id: "image#k", image, text}, k counting an image's captions.

    Splits come from a column `split`, else from the file's name or folder. Without a val, 5 % of the images are held out
    with all their captions. A row with too few or too many cells is a record {id, fault}.
    """
    raw = Path(raw).absolute()
    files = table_files(raw)
    if not files:
        raise nothing_known(raw, ".csv, .tsv, .jsonl or captions.txt (tables)")
    named = {file: named_split(file, raw) for file in files}
    captions: Counter[str] = Counter()
    for file, name in named.items():
        for row in _json_rows(file) if file.suffix.lower() == ".jsonl" else _rows(file):
            if row.fault or not row.image or not row.texts:
                yield name or "train", {"id": row.where, "fault": row.fault or f"it has no {'text' if row.image else 'image'}"}
                continue
            if "://" in row.image:
                raise _urls(file)
            # From the table's folder, so that "./a.jpg", "a.jpg" and the absolute path are one image, wherever the folder is.
            image = os.path.relpath(os.path.join(file.parent, row.image), file.parent)
            side = split_name(row.split, row.where) if row.split else or_held_out(name or "train", image, has_val="val" in named.values())
            path, key = _find(file.parent, row.image), row.id or image
            for text in row.texts:
                yield side, {"id": f"{key}#{captions[key]}", "image": path, "text": text}
                captions[key] += 1


def table_files(raw: Path) -> list[Path]:
    """The tables in `raw` and in the folders train, val, test (or a synonym) right below it; or `raw` itself."""
    if raw.is_file():
        return [raw] if raw.suffix.lower() in ENDINGS | {".txt"} else []
    places = [raw, *sorted(path for path in raw.iterdir() if path.is_dir() and path.name.lower() in SPLITS)]
    files = [path for place in places for path in sorted(place.iterdir()) if path.is_file() and path.name[0] != "."]
    return [path for path in files if path.suffix.lower() in ENDINGS or path.name == "captions.txt"]


def is_tables(raw: Path) -> bool:
    """Whether `raw` is or holds a table."""
    return bool(table_files(raw))


def _rows(file: Path) -> Iterator[Row]:
    given = lines(file)
    header = next(given, "")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(DELIMITERS, key=header.count)
    names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
    image, text, split, _ = _columns(names, file)
    reader = csv.reader(given, delimiter=delimiter)
    try:
        for cells in reader:
            where = f"{file} line {reader.line_num + 1}"
            row = dict(zip(names, map(str.strip, cells), strict=False))
            if len(cells) == len(names):
                yield Row(where, row[image], [row[text]], row[split] if split else "")
            elif any(row.values()):  # Flickr30k's results.csv has one such line
                yield Row(where, "", [], fault=f"{len(cells)} cells for {len(names)} columns: put quotes around cells with {delimiter!r}")
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num + 1} cannot be read ({error}): check its quotes") from None


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(lines(file), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): check that the file is whole") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{where} holds a {type(entry).__name__}: each line should be an object with an image and a text")
        entry = {name.lower(): value for name, value in entry.items()}
        image, text, split, id = _columns(entry, where)
        texts = entry[text] if isinstance(entry[text], list) else [entry[text]]
        if not (isinstance(entry[image], str) and all(isinstance(each, str) for each in texts)):
            raise ValueError(f"{where}: {image} should be a file name and {text} a text or a list of texts")
        others = ("" if entry.get(name) is None else str(entry[name]) for name in (split, id))
        yield Row(where, entry[image].strip(), [each.strip() for each in texts], *others)


def _columns(names: Collection[str], where: str | Path) -> tuple[str, str, str, str]:
    """The columns of images, texts, splits and ids; the last two may be ''. ValueError where one of the first two is missing."""
    image = next((name for name in IMAGE_COLUMNS if name in names), "")
    text = next((name for name in TEXT_COLUMNS if name in names), "")
    if not image and any(name.endswith("url") or "://" in name for name in names):
        raise _urls(where)
    if not (image and text):
        raise ValueError(
            f"{where} has the columns {', '.join(map(_short, [*names][:8])) or 'none'}: name one {IMAGE_COLUMNS[0]} "
            f"(or {', '.join(IMAGE_COLUMNS[1:6])}) and one {TEXT_COLUMNS[0]} (or {', '.join(TEXT_COLUMNS[1:5])})"
        )
    return image, text, "split" if "split" in names else "", "id" if "id" in names else ""


def _find(base: Path, image: str) -> str:
    """Absolute path of an image beside the table, or where it was expected; an absolute name stays as it is."""
    paths = [os.path.join(base, place, image) for place in PLACES]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def _urls(where: Any) -> ValueError:
    return ValueError(f"{where} names images by url: download them first, for example with img2dataset, and give its tar files as --raw")


def _short(name: str) -> str:
    return repr(name[:30] + ("..." if len(name) > 30 else ""))
