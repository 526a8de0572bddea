"""Files: atomic writes, JSON, members of tars, the cache directory."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

MEMBER = re.compile(r"(.+\.tar)@(\d{1,18})\+(\d{1,18})", re.DOTALL)

OPEN_TARS = 64
"""Tars that a process keeps open, the last ones used."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when it is written whole, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: str | Path) -> None:
    """Make what was written to a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark; ValueError for another encoding."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        wrong = f"{error.reason} 0x{error.object[error.start]:02x}"
        raise ValueError(f"{path} is not UTF-8 ({wrong}): convert it to UTF-8") from error


def read_json(file: Path) -> Any:
    """What a JSON file holds; ValueError naming it."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank; ValueError naming file and line."""
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            where = f"{file} line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} is not JSON ({error}): check that the file is whole"
                ) from None


def read_json_list(file: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each entry of a JSON list; ValueError for anything else."""
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}: it should be a list")
    yield from ((f"{file} [{number}]", entry) for number, entry in enumerate(content))


def cache_directory() -> Path:
    """`$BEIT3_CACHE`, else the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit3"
    return Path(os.environ.get("BEIT3_CACHE") or default)


def format_tar_member(tar: str | Path, start: int, size: int) -> str:
    """The name by which records know an image inside a tar."""
    return f"{tar}@{start}+{size}"


def parse_tar_member(image: str) -> tuple[str, int, int]:
    """(tar, start, size) of the name of a member; the tar is '' for any other file."""
    found = MEMBER.fullmatch(image)
    return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)


def read_tar_member(tar: str | Path, start: int, size: int) -> bytes:
    """`size` bytes of a tar from `start`. ValueError where it ends before; OSError where it cannot be read."""
    content = os.pread(_open_tar(str(tar)).fileno(), size, start)
    if len(content) != size:
        raise ValueError(
            f"{tar} ends before byte {start + size}: it was changed, run `beit3 prepare` again"
        )
    return content


@lru_cache(maxsize=OPEN_TARS)
def _open_tar(tar: str) -> BinaryIO:
    """Processes that are forked share the descriptor, which reading at a place does not move."""
    return open(tar, "rb", buffering=0)  # type: ignore[return-value]
