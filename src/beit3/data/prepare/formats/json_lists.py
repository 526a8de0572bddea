"""Reads JSON lists of objects entry by entry: one of Visual Genome's is 700 MB, 5 GB as objects."""

import os
import re
from codecs import BOM_UTF8 as BOM
from collections.abc import Iterator
from fnmatch import fnmatch
from json import JSONDecoder
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import make_pipe_error

CHUNK_CHARS = 1 << 16
"""Characters that are read at a time."""
MAX_ENTRY_CHARS = 1 << 26
"""Characters of an entry beyond which the file counts as damaged."""

NUM_START_BYTES = 64
"""Bytes by which a file that is no list is recognized, unless it begins with more blanks."""
NUM_ABOUT_IMAGES = 100
"""Files about one image each after which a folder is not looked through further."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Suffixes of the images that a JSON file of the same name may be about."""

START = re.compile(r"\s*(?=\{)")
SEPARATOR = re.compile(r"\s*,\s*(?=\{)")
END = re.compile(r"\s*\]\s*$")


def find_lists(raw: Path, fields: set[str], pattern: str = "*.json") -> list[Path]:
    """Returns the JSON lists in `raw` or right below it whose first entry has all of `fields`.

    Only the beginning of each file is read. `raw` may be such a file itself. A file beside an image
    of the same name is about that image (img2dataset writes them) and is none.
    """
    if raw.is_file():
        files = [raw] if raw.suffix.lower() == ".json" and fnmatch(raw.name, pattern) else []
    else:
        files = _find_json(raw, pattern, raw) if raw.is_dir() else []
        for folder in _list_folders(raw):
            files += _find_json(folder, pattern, raw)
    return [file for file in files if _is_list_of(file, fields)]


def stream_json_list(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (location, entry) for each entry of a file that holds one JSON list of objects.

    The location, "path [7]", is for error messages. Raises ValueError when the file holds anything
    else; the entries before the fault come first.
    """
    decode = JSONDecoder().raw_decode
    try:
        with file.open(encoding="utf-8-sig") as content:
            text = content.read(CHUNK_CHARS).lstrip()
            if text[:1] != "[":
                raise ValueError(f"{file} should hold a JSON list of objects")
            text, position, number = text[1:], 0, 0
            while True:
                location = f"{file} [{number}]"
                try:
                    start = _find_entry(text, position, START if number == 0 else SEPARATOR)
                    if start < 0:
                        return
                    entry, position = decode(text, start)
                except (ValueError, RecursionError) as error:
                    more = content.read(max(CHUNK_CHARS, len(text) - position))
                    if not more or len(text) - position > MAX_ENTRY_CHARS:
                        raise ValueError(
                            f"{location} is not a JSON object in a list ({error}): check that "
                            "the file is complete"
                        ) from None
                    text, position = text[position:] + more, 0
                    continue
                yield location, entry
                number += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}): convert it to UTF-8") from None


def _find_entry(text: str, position: int, separator: re.Pattern[str]) -> int:
    """Returns where the next entry begins, behind its separator, or -1 at the end of the list.

    Raises ValueError where neither is seen, perhaps as more has to be read.
    """
    if END.match(text, position):
        return -1
    match = separator.match(text, position)
    if not match:
        raise ValueError(f"{text[position : position + 20]!r} is neither an object nor the end")
    return match.end()


def _list_folders(raw: Path) -> list[Path]:
    """Returns the folders right below `raw`, sorted."""
    if not raw.is_dir():
        return []
    with os.scandir(raw) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _find_json(folder: Path, pattern: str, raw: Path) -> list[Path]:
    """Returns the JSON files in a folder that match a glob, but for those about one image each.

    A folder below `raw` of which the first hundred are about one image each holds no others.
    Raises ValueError for a pipe or a device.
    """
    files: list[Path] = []
    num_about_images = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() != ".json" or not fnmatch(entry.name, pattern):
                    continue
                if any(os.path.exists(f"{folder}/{stem}{ending}") for ending in IMAGE_ENDINGS):
                    num_about_images += 1
                    if num_about_images == NUM_ABOUT_IMAGES and not files and folder != raw:
                        return []
                elif entry.is_file():
                    files.append(Path(entry.path))
                elif not entry.is_dir() and os.path.exists(entry.path):
                    raise make_pipe_error(entry.path)
    except PermissionError:
        return []
    return sorted(files)


def _is_list_of(file: Path, fields: set[str]) -> bool:
    """Returns whether a file is a list of objects, the first of which has all of `fields`."""
    try:
        with file.open("rb") as content:
            if content.read(NUM_START_BYTES).removeprefix(BOM).lstrip()[:1] not in (b"[", b""):
                return False
        entry = next(stream_json_list(file), None)
    except (ValueError, OSError):
        return False
    return entry is not None and fields <= entry[1].keys()
