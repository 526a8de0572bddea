"""Files: atomic writes, checksums, text and JSON, members of tar files, the cache directory."""

import codecs
import json
import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any, BinaryIO

MAX_OPEN_TARS = 64
"""Number of tar files that a process keeps open, the most recently used ones."""

# Bytes --------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` when the block ends.

    A reader of `path` never sees a partly written file. After an error the temporary file is
    removed and `path` stays as it was. Missing parent directories are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        _replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, path: Path) -> None:
    """Moves a file to `path`. Windows replaces no file that is open, or mapped into memory."""
    try:
        partial.replace(path)
    except PermissionError as error:
        if not path.is_file():
            raise
        reason = f"{path} cannot be replaced ({error.strerror}): end what has it open, then repeat"
        raise PermissionError(reason) from error


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, atomically."""
    with atomic_write(Path(path)) as file:
        file.write(text.encode())


def flush_to_disk(path: str | Path) -> None:
    """Waits until the contents of a file, or the entries of a directory, are on the disk."""
    is_directory = os.path.isdir(path)
    try:
        # Windows flushes only files that are open for writing, and opens no directories.
        descriptor = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    except PermissionError:
        if is_directory:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def compute_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file as a hexadecimal string."""
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


# Text and JSON --------------------------------------------------------------------------------


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file, or of UTF-16 with a byte order mark as Excel writes it.

    Each line ends with a newline, however the file ends its lines. Raises ValueError when the file
    has another encoding.
    """
    encoding = _detect_encoding(path)
    try:
        with path.open(encoding=encoding) as file:
            yield from file
    except UnicodeError as error:
        raise _make_encoding_error(path, encoding, error) from error


def read_text(path: Path) -> str:
    """Returns the text of a file as `read_lines` decodes it."""
    return "".join(read_lines(path))


def _detect_encoding(path: Path) -> str:
    """Returns the encoding that a file's byte order mark tells, else UTF-8."""
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _make_encoding_error(path: Path, encoding: str, error: UnicodeError) -> ValueError:
    """Returns the error for a file whose bytes are not of its encoding."""
    name = "UTF-8" if encoding == "utf-8-sig" else "UTF-16"
    reason = str(error)
    if isinstance(error, UnicodeDecodeError):
        reason = f"{error.reason} 0x{error.object[error.start]:02x}"
    return ValueError(f"{path} is not {name} ({reason}): convert it to UTF-8")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; raises ValueError naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding=_detect_encoding(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location, value) for each line that is not blank.

    The location, "path line 7", is for error messages. Raises ValueError that names file and line
    when a line is not JSON.
    """
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        try:
            yield location, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{location} is not JSON ({error}): check that the file is complete"
            ) from None


def read_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (location, value) for each entry of a file that holds one JSON list.

    The location, "path [7]", is for error messages. Raises ValueError when the file holds
    anything else.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}: it should be a list")
    yield from ((f"{path} [{number}]", entry) for number, entry in enumerate(content))


# Members of tar files -------------------------------------------------------------------------

_TAR_MEMBER = re.compile(r"(.+\.tar)@(\d{1,18})\+(\d{1,18})", re.DOTALL)


def format_tar_member(tar: str | Path, start: int, size: int) -> str:
    """Returns the path by which records name a file inside a tar, as in "photos.tar@1536+20480".

    `start` is the offset of the first byte, `size` the number of bytes.
    """
    return f"{tar}@{start}+{size}"


def parse_tar_member(path: str) -> tuple[str, int, int]:
    """Splits the path of a tar member into (tar, start, size); for other paths the tar is ""."""
    match = _TAR_MEMBER.fullmatch(path)
    return (match[1], int(match[2]), int(match[3])) if match else ("", 0, 0)


def read_tar_member(tar: str | Path, start: int, size: int) -> bytes:
    """Reads `size` bytes of a tar from offset `start`.

    Raises ValueError when the tar ends before them and OSError when it cannot be read.
    """
    opened = _open_tar(str(tar))
    content = _read_at(opened.descriptor, size, start)
    if len(content) != size:
        raise ValueError(
            f"{tar} ends before byte {start + size}: it was changed, run `beit3 prepare` again"
        )
    return content


class _OpenTar:
    """A tar that is closed when the last reference to it is gone."""

    def __init__(self, tar: str):
        self.descriptor = os.open(tar, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)


@lru_cache(maxsize=MAX_OPEN_TARS)
def _open_tar(tar: str) -> _OpenTar:
    """Opens a tar once. Forked processes may share the descriptor: `os.pread` does not move it."""
    return _OpenTar(tar)


_SEEK_LOCK = threading.Lock()


def _read_at(descriptor: int, size: int, start: int) -> bytes:
    """Reads from an offset; on Windows, which has no `os.pread` and no fork, under a lock."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, start)
    with _SEEK_LOCK:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)


# Paths and directories ------------------------------------------------------------------------


def make_relative(path: str | Path, root: str) -> str:
    """Returns the real path relative to the real `root`, with slashes on every system.

    A path on another drive of Windows has no relative form and stays absolute.
    """
    real_path = os.path.realpath(path)
    try:
        return Path(os.path.relpath(real_path, root)).as_posix()
    except ValueError:
        return Path(real_path).as_posix()


def cache_directory() -> Path:
    """Returns `$BEIT3_CACHE`, or by default `beit3` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beit3"
    return Path(os.environ.get("BEIT3_CACHE") or default)
