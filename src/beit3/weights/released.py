"""Downloads the files released with BEiT-3 and BEiT v2, when asked to, and finds them again."""

import zipfile
import zlib
from pathlib import Path

from beit3.download import FIRST_WAIT, Expected, check_digest, download_file
from beit3.files import cache_directory
from beit3.progress import show_progress
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.catalog import (
    RELEASED_FILES,
    ReleasedFile,
    find_by_name,
    find_file,
    suggest_file,
)

MEGABYTE = 1_000_000
PICKLE_START = b"\x80"
"""First byte of checkpoints written before torch 1.6, which are no zip archives."""
TEXT_MODEL = "beit3.spm"
TASKS_WITHOUT_TEXT = ("imagenet", "vqkd", "text")


def get_download_directory() -> Path:
    """Returns where downloads go by default: `released` in the cache directory."""
    return cache_directory() / "released"


def find_downloaded(name: str) -> Path | None:
    """Returns the path of a released file in the download directory, or None.

    Its name may come without its ending.
    """
    file = find_by_name(name)
    path = get_download_directory() / file.name if file is not None else None
    return path if path is not None and path.is_file() else None


def find_text_model(path: Path) -> Path | None:
    """Returns the beit3.spm beside a released file that reads texts, or None."""
    file = find_file(path.name)
    text_model = path.with_name(TEXT_MODEL)
    if file is None or file.task in TASKS_WITHOUT_TEXT or not text_model.is_file():
        return None
    return text_model


def download_released(
    name: str, to: str | Path | None = None, *, base_url: str = "", first_wait: float = FIRST_WAIT
) -> Path:
    """Downloads a released file, or checks the one that is there already; returns its path.

    A download that broke off goes on where it ended. Size and digest are checked where they are
    known; of other checkpoints, which are zip archives, the checksum of every tensor.

    Args:
        name: Name of the file, with or without its ending.
        to: The directory to write to, by default `get_download_directory()`, where bare names are
            looked for.
        base_url: Address of a mirror, to which `/` and the file's name are added.
        first_wait: Seconds before a broken connection is tried again for the first time.

    Raises:
        ValueError: No such file was released, the server's answer is refused, or the file is
            not the released one.
        OSError: The connection kept breaking off, or the file cannot be written.
    """
    file = find_by_name(name)
    if file is None:
        hint = suggest_file(name) or "beit3 recipes --released lists them"
        raise ValueError(f"no file {name} was released; {hint}")
    path = Path(to or get_download_directory()) / file.name
    if path.is_file():
        _check_existing(path, file)
        return path
    url = f"{base_url.rstrip('/')}/{file.name}" if base_url else file.url
    with show_progress(f"{file.name} (MB)") as advance:
        download_file(
            url,
            path,
            expected=Expected(file.num_bytes, file.max_bytes, file.sha256),
            check=lambda complete: check_content(complete, file),
            advance=lambda done, total: advance(done // MEGABYTE, max(1, total // MEGABYTE)),
            first_wait=first_wait,
        )
    return path


def _check_existing(path: Path, file: ReleasedFile) -> None:
    """Raises ValueError where a file that has the name of a released one is another."""
    try:
        if file.num_bytes and path.stat().st_size != file.num_bytes:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, not {file.num_bytes:,}")
        check_digest(path, file.sha256)
        check_content(path, file)
    except ValueError as error:
        raise ValueError(f"{path} is not the released file: {error}; remove it") from None


def check_content(path: Path, file: ReleasedFile) -> None:
    """Raises ValueError where a complete file is damaged or of another kind."""
    if file.task == "text":
        TextTokenizer(path)
        return
    if not zipfile.is_zipfile(path):
        with path.open("rb") as opened:
            if opened.read(1) != PICKLE_START:
                raise ValueError("it is no checkpoint")
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"its archive is damaged ({error})") from None
    if damaged is not None:
        raise ValueError(f"its archive is damaged (checksum of {damaged})")


def format_downloads() -> list[str]:
    """Returns a line for each released file: its name, its size and digest where known, its path.

    The path is that in the download directory, and `-` where it was not downloaded.
    """
    rows = [("file", "bytes", "sha256", "downloaded")]
    for file in RELEASED_FILES:
        size = f"{file.num_bytes:,}" if file.num_bytes else "?"
        path = find_downloaded(file.name)
        rows.append((file.stem, size, file.sha256[:8] or "?", str(path or "-")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
