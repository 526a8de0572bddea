"""Downloads resume, refuse what is wrong, and leave nothing half written under a final name."""

import hashlib
import random
import subprocess
import sys
import threading
import time
from email.message import Message
from email.utils import formatdate
from pathlib import Path

import pytest

from beit3 import download
from beit3.download import Expected, download_file
from tests.file_server import Behavior, serve

CONTENT = random.Random(0).randbytes(3_000_000)
OTHER = random.Random(1).randbytes(len(CONTENT))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def behavior():
    return Behavior(CONTENT)


@pytest.fixture
def base(behavior):
    with serve(behavior) as address:
        yield address


def fetch(base: str, path: Path, **options) -> None:
    download_file(f"{base}/file.bin", path, first_wait=0.001, **options)


def list_names(folder: Path) -> set[str]:
    """Returns the names in a folder but for those of locks, which are empty."""
    return {path.name for path in folder.iterdir() if path.stat().st_size or path.suffix != ".lock"}


def test_a_file_arrives_whole_with_progress(base, tmp_path):
    progress = []
    path = tmp_path / "deep" / "file.bin"
    fetch(
        base,
        path,
        expected=Expected(len(CONTENT), sha256=DIGEST),
        advance=lambda done, total: progress.append((done, total)),
    )
    assert path.read_bytes() == CONTENT
    assert list_names(path.parent) == {"file.bin"}
    assert progress == sorted(progress) and progress[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_is_resumed_where_it_ended(base, behavior, tmp_path):
    behavior.stop_after = [1_000_000, 700_000]
    fetch(base, tmp_path / "file.bin", expected=Expected(sha256=DIGEST))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    ranges = [request.get("Range") for request in behavior.requests]
    assert ranges == [None, "bytes=1000000-", "bytes=1700000-"]
    assert all(request["If-Range"] == '"1"' for request in behavior.requests[1:])


def test_a_later_call_goes_on_from_what_an_earlier_one_left(base, behavior, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_TRIES", 1)
    behavior.stop_after = [1_234_567]
    with pytest.raises(OSError, match=r"broke off after 1,234,567 of 3,000,000.*same command"):
        fetch(base, tmp_path / "file.bin")
    assert list_names(tmp_path) == {"file.bin.part", "file.bin.part.json"}
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert behavior.requests[-1]["Range"] == "bytes=1234567-"
    assert list_names(tmp_path) == {"file.bin"}


@pytest.mark.parametrize("checks_if_range", [True, False])
def test_versions_of_a_changed_file_are_never_glued_together(
    base, behavior, tmp_path, monkeypatch, checks_if_range
):
    with monkeypatch.context() as patch:
        patch.setattr(download, "MAX_TRIES", 1)
        behavior.stop_after = [1_000_000]
        with pytest.raises(OSError):
            fetch(base, tmp_path / "file.bin")
    behavior.content, behavior.etag = OTHER, '"2"'
    behavior.checks_if_range = checks_if_range
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == OTHER


def test_a_file_that_became_shorter_is_fetched_anew(base, behavior, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download, "MAX_TRIES", 1)
        behavior.stop_after = [1_000_000]
        with pytest.raises(OSError):
            fetch(base, tmp_path / "file.bin")
    behavior.content = CONTENT[:500_000]  # under the same ETag
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT[:500_000]


def test_without_a_version_of_the_file_nothing_is_resumed(base, behavior, tmp_path):
    behavior.etag = 'W/"weak"'
    behavior.stop_after = [1_000_000]
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert all("Range" not in request for request in behavior.requests)


def test_a_date_serves_as_version_where_there_is_no_strong_etag(base, behavior, tmp_path):
    behavior.etag, behavior.last_modified = "", "Wed, 01 Mar 2023 00:00:00 GMT"
    behavior.stop_after = [1_000_000]
    fetch(base, tmp_path / "file.bin", expected=Expected(sha256=DIGEST))
    assert behavior.requests[1]["If-Range"] == behavior.last_modified


def test_a_server_that_ignores_ranges_sends_the_file_again(base, behavior, tmp_path):
    behavior.ranges = False
    behavior.stop_after = [2_000_000, 1_000_000]
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert len(behavior.requests) == 3


def test_a_server_that_always_breaks_off_is_given_up(base, behavior, tmp_path):
    behavior.ranges = False
    behavior.stop_after = [2_000_000, 1_000_000] * 20
    with pytest.raises(OSError, match="broke off"):
        fetch(base, tmp_path / "file.bin")
    assert len(behavior.requests) == download.MAX_TRIES
    assert not (tmp_path / "file.bin").exists()


def test_another_size_than_the_known_one_is_refused_before_a_byte_is_written(base, tmp_path):
    for expected in (Expected(size=2_999_999), Expected(max_size=2_000_000)):
        with pytest.raises(ValueError, match=r"announces 3,000,000 bytes, the file has 2,"):
            fetch(base, tmp_path / "file.bin", expected=expected)
    assert list_names(tmp_path) == set()


def test_an_announced_size_that_is_too_large_never_becomes_a_file(base, behavior, tmp_path):
    behavior.announced = len(CONTENT) + 5
    behavior.ranges = False
    with pytest.raises(OSError, match=r"broke off after 3,000,000 of 3,000,005"):
        fetch(base, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


def test_an_announced_size_that_is_too_small_is_refused_by_the_digest(base, behavior, tmp_path):
    behavior.announced = 1_000_000
    with pytest.raises(ValueError, match=r"SHA-256 is .* is expected; what was downloaded is rem"):
        fetch(base, tmp_path / "file.bin", expected=Expected(sha256=DIGEST))
    assert list_names(tmp_path) == set()


@pytest.mark.parametrize("known", [DIGEST, DIGEST[:8]])
def test_wrong_bytes_are_removed(base, behavior, tmp_path, known):
    behavior.content = OTHER
    with pytest.raises(ValueError, match=f"SHA-256 is [0-9a-f]+, {known} is expected"):
        fetch(base, tmp_path / "file.bin", expected=Expected(sha256=known))
    assert list_names(tmp_path) == set()


def test_a_file_that_fails_its_check_is_removed(base, tmp_path):
    def refuse(path: Path) -> None:
        assert path.read_bytes() == CONTENT
        raise ValueError("it is a fake")

    with pytest.raises(ValueError, match="it is a fake; what was downloaded is removed"):
        fetch(base, tmp_path / "file.bin", check=refuse)
    assert list_names(tmp_path) == set()


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Content-Type": "text/html; charset=utf-8"}, "a web page in place of the file"),
        ({"Content-Encoding": "gzip"}, "encodes the file as gzip"),
    ],
)
def test_answers_that_are_no_file_are_refused(base, behavior, tmp_path, headers, reason):
    behavior.headers = headers
    with pytest.raises(ValueError, match=reason):
        fetch(base, tmp_path / "file.bin")
    assert list_names(tmp_path) == set()


def test_a_redirect_to_the_same_scheme_is_followed_with_the_range(base, behavior, tmp_path):
    behavior.redirect = f"{base}/moved/file.bin"
    behavior.stop_after = [1_000_000]
    fetch(base, tmp_path / "file.bin", expected=Expected(sha256=DIGEST))
    assert behavior.requests[-1]["path"] == "/moved/file.bin"
    assert behavior.requests[-1]["Range"] == "bytes=1000000-"


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"])
def test_a_redirect_to_another_scheme_is_refused(base, behavior, tmp_path, target):
    behavior.redirect = target
    with pytest.raises(ValueError, match=r"redirect|not allowed") as caught:
        fetch(base, tmp_path / "file.bin")
    assert "\n" not in str(caught.value) and list_names(tmp_path) == set()


def test_a_redirect_away_from_https_is_refused():
    handler = download._SafeRedirects()
    request = download.Request("https://example.org/a")
    with pytest.raises(ValueError, match=r"redirect to http://example.org/b is refused"):
        handler.redirect_request(request, None, 302, "", {}, "http://example.org/b")


def test_passing_errors_of_a_server_are_tried_again_and_others_are_not(base, behavior, tmp_path):
    behavior.statuses = [503, 429]
    fetch(base, tmp_path / "file.bin")
    assert len(behavior.requests) == 3
    behavior.statuses = [404]
    with pytest.raises(ValueError, match="the server answers 404 Not Found"):
        fetch(base, tmp_path / "other.bin")
    assert len(behavior.requests) == 4


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_is_left_alone_for_as_long_as_it_asks(
    base, behavior, tmp_path, monkeypatch, status
):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    behavior.statuses = [status] * 3
    behavior.retry_after = "70"
    fetch(base, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert waits == [70, 70, 70]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7, 7),
        (3600, 3300, 3600),
        (-3600, 0, 0),
        *((text, 0, 0) for text in ("", "-5", "soon", "1.5", "Wed, 99 Mar 2023 00:00:00 GMT")),
    ],
)
def test_the_wait_is_a_number_of_seconds_or_a_date(text, low, high):
    """A number of seconds from now stands for that date."""
    if isinstance(text, int):
        text = formatdate(time.time() + text, usegmt=True)
    headers = Message()
    headers["Retry-After"] = text
    assert low <= download._read_retry_after(headers) <= high


def test_a_short_wait_asked_for_does_not_shorten_the_own_one(base, behavior, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    behavior.statuses = [503] * 3
    behavior.retry_after = "1"
    download_file(f"{base}/file.bin", tmp_path / "file.bin", first_wait=0.5)
    assert waits == [1, 1, 2]


@pytest.mark.parametrize("text", ["3600", "9" * 400])
def test_a_wait_that_is_too_long_ends_the_download_and_keeps_what_has_come(
    base, behavior, tmp_path, text
):
    behavior.stop_after = [1_000_000]
    behavior.statuses = [200, 429]
    behavior.retry_after = text
    with pytest.raises(OSError, match=r"429 .* asks to wait .* s; 1,000,000 bytes are kept"):
        fetch(base, tmp_path / "file.bin")
    assert len(behavior.requests) == 2
    fetch(base, tmp_path / "file.bin")
    assert behavior.requests[-1]["Range"] == "bytes=1000000-"


def test_addresses_of_other_schemes_are_refused(tmp_path):
    for url in ("file:///etc/hostname", "ftp://host/x", "file.bin", "http:///x"):
        with pytest.raises(ValueError, match="no http or https address"):
            download_file(url, tmp_path / "x")
    assert list_names(tmp_path) == set()


@pytest.mark.parametrize("url", ["http://host/a b", "http://host:port/x", "http://host/a\nb"])
def test_an_address_that_cannot_be_used_is_refused_without_waiting(tmp_path, url):
    started = time.monotonic()
    with pytest.raises(ValueError, match="address cannot be used") as caught:
        download_file(url, tmp_path / "x")
    assert "\n" not in str(caught.value) and time.monotonic() - started < download.FIRST_WAIT


def test_a_missing_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_TRIES", 2)
    with serve(Behavior()) as address:
        pass
    with pytest.raises(OSError, match="no connection") as caught:
        fetch(address, tmp_path / "file.bin")
    assert "\n" not in str(caught.value)


def test_a_file_too_large_for_the_disk_is_refused_at_once(base, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has 1,000 bytes left and 3,000,000 are needed"):
        fetch(base, tmp_path / "file.bin")
    assert list_names(tmp_path) == set()


def test_a_killed_download_is_resumed(base, behavior, tmp_path):
    behavior.hold, behavior.hold_after = threading.Event(), 2_500_000
    code = (
        "import sys, pathlib; from beit3.download import download_file; "
        "download_file(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", code, f"{base}/file.bin", str(tmp_path / "file.bin")]
    process = subprocess.Popen(arguments)
    part = tmp_path / "file.bin.part"
    deadline = time.monotonic() + 20
    while not part.exists() or part.stat().st_size < 1_000_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    behavior.hold.set()
    behavior.hold = None
    fetch(base, tmp_path / "file.bin", expected=Expected(sha256=DIGEST))
    assert int(behavior.requests[-1]["Range"][6:-1]) >= 1_000_000
    assert list_names(tmp_path) == {"file.bin"}


def test_two_downloads_of_one_file_do_not_mix(base, behavior, tmp_path):
    behavior.hold = threading.Event()
    first = threading.Thread(target=fetch, args=(base, tmp_path / "file.bin"))
    first.start()
    try:
        while not behavior.requests:
            time.sleep(0.001)
        with pytest.raises(ValueError, match="is being downloaded by another process"):
            fetch(base, tmp_path / "file.bin")
    finally:
        behavior.hold.set()
        first.join()
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    with pytest.raises(ValueError, match="exists already"):
        fetch(base, tmp_path / "file.bin")
