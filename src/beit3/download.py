"""Downloads one large file: resumable, checked, and never half written under its final name.

A download writes `NAME.part` and, beside it, `NAME.part.json`, which says where the bytes come from
and which version of the file they are. The same call goes on from there: it asks for the rest only
if the server still has that version (`If-Range`), else it starts anew. The finished file is checked
and renamed. Only the standard library is used.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from email.message import Message
from email.utils import mktime_tz, parsedate_tz
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from filelock import FileLock, Timeout

from beit3.files import compute_sha256, flush_to_disk, read_json, write_text

SCHEMES = ("https", "http")
CHUNK_SIZE = 1 << 20
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""
MAX_TRIES = 5
"""Tries that bring no new byte, one after the other, before a download gives up."""
FIRST_WAIT = 0.5
"""Seconds before the second try; each further wait is twice as long."""
MAX_WAIT = 120.0
"""Longest wait in seconds that a server may ask for by `Retry-After`; beyond it a download ends."""
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)

Advance = Callable[[int, int], None]
"""`advance(done, total)` in bytes."""
Check = Callable[[Path], None]
"""Raises ValueError where the content of a finished file is not what it should be."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is downloaded."""

    size: int = 0
    """Bytes; 0 where they are not known."""
    max_size: int = 0
    """Largest plausible number of bytes, where `size` is not known; 0 for no limit."""
    sha256: str = ""
    """The digest, or its first characters; empty where it is not known."""


@dataclass(frozen=True)
class _Source:
    """Where the bytes of a `.part` come from: the content of its `.part.json`."""

    url: str
    validator: str
    """The strong ETag or else the date by which the server knows this version of the file."""
    size: int


class _BrokenOffError(OSError):
    """The connection ended, or the server cannot answer now; another try may help."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait
        """Seconds that the server asks to wait."""


class _RangeRefusedError(_BrokenOffError):
    """The server has fewer bytes than were downloaded: its file is another one now."""


def download_file(
    url: str,
    path: Path,
    *,
    expected: Expected | None = None,
    check: Check | None = None,
    advance: Advance | None = None,
    first_wait: float = FIRST_WAIT,
) -> None:
    """Downloads a file to `path`, which must not exist, or goes on with an earlier download of it.

    Args:
        url: An http or https address. Redirects may lead to the same scheme or to https.
        path: Where the file goes. Missing parent directories are created.
        expected: Size and digest, where they are known.
        check: Called with the complete file before it gets its final name.
        advance: Called with the numbers of downloaded and of all bytes.
        first_wait: Seconds before a broken connection is tried again for the first time.

    Raises:
        ValueError: The address or the server's answer is refused, the file is not the expected
            one (it is removed), or another process is downloading it.
        OSError: The connection kept breaking off, or the server asks to wait for longer than
            `MAX_WAIT` (what has come is kept), or the disk is full.
    """
    expected = expected or Expected()
    _check_scheme(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        if path.exists():
            raise ValueError(f"{path} exists already: remove it to download it again")
        part = path.with_name(f"{path.name}.part")
        _fetch(url, part, expected, advance or _ignore, first_wait)
        try:
            check_digest(part, expected.sha256)
            if check:
                check(part)
        except ValueError as error:
            _remove(part)
            raise ValueError(f"{url}: {error}; what was downloaded is removed") from None
        flush_to_disk(part)
        part.rename(path)
        flush_to_disk(path.parent)
        _remove(part)


def check_digest(path: Path, sha256: str) -> None:
    """Raises ValueError where the SHA-256 of a file does not begin with `sha256`."""
    if sha256 and not (digest := compute_sha256(path)).startswith(sha256):
        raise ValueError(f"its SHA-256 is {digest}, {sha256} is expected")


def _ignore(done: int, total: int) -> None:
    """Reports no progress."""


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the lock of a download. Raises ValueError where another process holds it."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path} is being downloaded by another process: wait for it") from None
    try:
        yield
    finally:
        lock.release()


# Trying again -------------------------------------------------------------------------------------


def _fetch(url: str, part: Path, expected: Expected, advance: Advance, first_wait: float) -> None:
    """Completes `part`, with new tries where the connection breaks off."""
    failures, most = 0, _get_size(part)
    while True:
        try:
            _fetch_once(url, part, expected, advance)
            return
        except _BrokenOffError as error:
            if isinstance(error, _RangeRefusedError):
                _remove(part)
            done = _get_size(part)
            failures = 1 if done > most else failures + 1
            most = max(done, most)
            if failures == MAX_TRIES or error.wait > MAX_WAIT:
                raise OSError(
                    f"{url}: {error}; {done:,} bytes are kept in {part}, "
                    "the same command goes on from there"
                ) from None
            time.sleep(max(first_wait * 2 ** (failures - 1), error.wait))


def _fetch_once(url: str, part: Path, expected: Expected, advance: Advance) -> None:
    """Makes one request for what `part` lacks and writes the answer to it."""
    start = _get_size(part)
    source = _read_source(part)
    if source is None or source.url != url or not source.validator or start > source.size:
        start = 0
    if source is not None and start == source.size > 0:
        return  # complete; it broke off before it was checked
    headers = {"User-Agent": "beit3", "Accept-Encoding": "identity"}
    if start and source is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": source.validator}
    with _open(Request(url, headers=headers)) as response:
        _check_answer(url, response.headers)
        answer = _Source(url, _get_validator(response.headers), _get_total(url, response))
        if response.status == 206:
            if source is None or answer.validator != source.validator or answer.size != source.size:
                _remove(part)
                raise _BrokenOffError("the server sent a part of another version of the file")
            if _get_first_byte(response.headers) != start:
                raise ValueError(f"{url}: the server sent other bytes than those asked for")
        else:
            start = 0
            _check_size(url, answer.size, expected)
            _check_free_space(part, answer.size)
        if start == 0:
            _remove(part)
            write_text(_get_source_file(part), json.dumps(asdict(answer)) + "\n")
        _write_body(response, part, start, answer.size, advance)


def _write_body(response: Any, part: Path, start: int, size: int, advance: Advance) -> None:
    """Appends the body of an answer to `part`, up to `size` bytes in all."""
    done = start
    with part.open("ab") as file:
        while True:
            try:
                chunk = response.read(CHUNK_SIZE)
            except (HTTPException, OSError) as error:
                raise _BrokenOffError(_describe_break(done, size, error)) from None
            if not chunk:
                break
            if done + len(chunk) > size:
                file.close()
                _remove(part)
                raise ValueError(f"{response.url}: the server sent more than its {size:,} bytes")
            file.write(chunk)
            done += len(chunk)
            advance(done, size)
    if done < size:
        raise _BrokenOffError(_describe_break(done, size))


def _describe_break(done: int, size: int, error: Exception | None = None) -> str:
    reason = f" ({error})" if error is not None and str(error) else ""
    return f"the connection broke off after {done:,} of {size:,} bytes{reason}"


# Requests -----------------------------------------------------------------------------------------


class _SafeRedirects(HTTPRedirectHandler):
    """Follows redirects to the same scheme or to https alone."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("https", req.type):
            raise ValueError(f"{req.full_url}: a redirect to {newurl[:80]} is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(request: Request) -> Any:
    """Returns the answer to a request. Errors become ValueError, or _BrokenOffError to retry."""
    opener = OpenerDirector()  # without handlers of files, FTP and data URLs
    for handler in (
        ProxyHandler(),
        UnknownHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        HTTPDefaultErrorHandler(),
        _SafeRedirects(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    url = request.full_url
    try:
        return opener.open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code == 416:
                raise _RangeRefusedError("the server's file is shorter now") from None
            if error.code in RETRIED_STATUS:
                raise _describe_refusal(error) from None
            reason = " ".join(str(error.reason).split())
            raise ValueError(f"{url}: the server answers {error.code} {reason}") from None
    except InvalidURL as error:
        raise ValueError(f"this address cannot be used: {error}") from None
    except (URLError, HTTPException, OSError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        raise _BrokenOffError(f"no connection ({cause})") from None


def _describe_refusal(error: HTTPError) -> _BrokenOffError:
    """Returns the error of a server that cannot answer now, with the wait that it asks for."""
    wait = _read_retry_after(error.headers)
    asked = f" and asks to wait {wait:,.0f} s" if wait else ""
    return _BrokenOffError(f"the server answers {error.code} {error.reason}{asked}", wait)


def _read_retry_after(headers: Message) -> float:
    """Returns the seconds that `Retry-After` asks to wait, a number or a date; 0 without one."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_tz(text)
        return max(0.0, mktime_tz(date) - time.time()) if date else 0.0
    except (ValueError, OverflowError):  # a day or year that no calendar has
        return 0.0


def _check_scheme(url: str) -> None:
    """Raises ValueError for an address that is not http or https."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ValueError(f"{url} is no http or https address: give one")


def _check_answer(url: str, headers: Message) -> None:
    """Raises ValueError for an answer that is a web page or is encoded."""
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"{url}: the server encodes the file as {encoding}: take another mirror")
    if headers.get_content_type() == "text/html":
        raise ValueError(f"{url}: the server sent a web page in place of the file")


def _get_validator(headers: Message) -> str:
    """Returns what `If-Range` takes: a strong ETag, else the date, else an empty string."""
    etag = headers.get("ETag", "")
    if etag.startswith('"'):
        return etag
    return headers.get("Last-Modified", "")


def _get_total(url: str, response: Any) -> int:
    """Returns the number of bytes of the whole file that an answer announces."""
    text = response.headers.get("Content-Length", "")
    if response.status == 206:
        text = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise ValueError(f"{url}: the server does not say how large the file is")
    return int(text)


def _get_first_byte(headers: Message) -> int:
    """Returns the offset at which a partial answer begins, -1 where it does not say."""
    text = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(text) if text.isascii() and text.isdigit() else -1


def _check_size(url: str, size: int, expected: Expected) -> None:
    """Raises ValueError where the announced size cannot be that of the file."""
    if expected.size and size != expected.size:
        raise ValueError(
            f"{url}: the server announces {size:,} bytes, the file has {expected.size:,}"
        )
    if expected.max_size and size > expected.max_size:
        raise ValueError(
            f"{url}: the server announces {size:,} bytes, "
            f"the file has {expected.max_size:,} at most"
        )


def _check_free_space(part: Path, size: int) -> None:
    """Raises OSError where a file does not fit on the disk."""
    free = shutil.disk_usage(part.parent).free + _get_size(part)
    if size > free:
        raise OSError(f"{part.parent} has {free:,} bytes left and {size:,} are needed: make room")


# The partial file ---------------------------------------------------------------------------------


def _get_source_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _get_size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _read_source(part: Path) -> _Source | None:
    """Returns where the bytes of `part` come from, or None where that is not known."""
    try:
        return _Source(**read_json(_get_source_file(part)))
    except (OSError, ValueError, TypeError):
        return None


def _remove(part: Path) -> None:
    """Removes a partial file and what is known of it."""
    part.unlink(missing_ok=True)
    _get_source_file(part).unlink(missing_ok=True)
