"""Reads JSON lists of objects entry by entry: one of Visual Genome's is 700 MB, 5 GB as objects."""

import re
from collections.abc import Iterator
from json import JSONDecoder
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import find_files

CHUNK_CHARS = 1 << 16
"""Characters that are read at a time."""
MAX_ENTRY_CHARS = 1 << 26
"""Characters of an entry beyond which the file counts as damaged."""

START = re.compile(r"\s*(?=\{)")
SEPARATOR = re.compile(r"\s*,\s*(?=\{)")
END = re.compile(r"\s*\]\s*$")


def find_lists(raw: Path, fields: set[str], pattern: str = "*.json") -> list[Path]:
    """Returns the JSON lists in `raw` or right below it whose first entry has all of `fields`.

    Only the beginning of each file is read. `raw` may be such a file itself.
    """
    files = [raw] if raw.is_file() else find_files(raw, pattern)
    json_files = [file for file in files if file.suffix.lower() == ".json"]
    return [file for file in json_files if _is_list_of(file, fields)]


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


def _is_list_of(file: Path, fields: set[str]) -> bool:
    """Returns whether a file is a list of objects, the first of which has all of `fields`."""
    try:
        entry = next(stream_json_list(file), None)
    except (ValueError, OSError):
        return False
    return entry is not None and fields <= entry[1].keys()
