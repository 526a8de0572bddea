"""Files: atomic writes, errors that name the file, tar members, the cache directory."""

import os
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from beit3.files import (
    atomic_write,
    cache_directory,
    compute_sha256,
    flush_to_disk,
    format_tar_member,
    parse_tar_member,
    read_json,
    read_json_lines,
    read_json_list,
    read_lines,
    read_tar_member,
    write_text,
)


def test_an_atomic_write_replaces_the_file_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write_text(path, "old ☃")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text(encoding="utf-8") == "old ☃"
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["a.bin"]
    flush_to_disk(path)
    flush_to_disk(path.parent)


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError("stop")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_checksum_equals_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert compute_sha256(tmp_path / "a") == sha256(b"abc" * 100_000).hexdigest()


def test_lines_and_json_are_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + b'["caf\xc3\xa9",\n 2]')
        assert list(read_lines(path)) == ['["café",\n', " 2]"]
        assert read_json(path) == ["café", 2]
        assert list(read_json_list(path)) == [(f"{path} [0]", "café"), (f"{path} [1]", 2)]
        path.write_bytes(mark + b'{"a": 1}\n\n  \n[2]')
        lines = [(f"{path} line 1", {"a": 1}), (f"{path} line 4", [2])]
        assert list(read_json_lines(path)) == lines


@pytest.mark.parametrize(
    "read, content, message",
    [
        (read_lines, b"a\ncaf\xe9 au lait", r"x\.json is not UTF-8 \(.* 0xe9\): convert it"),
        (read_json, b"{", r"x\.json is not JSON: "),
        (read_json, b"[" * 100_000, r"x\.json is not JSON: "),
        (read_json_lines, b"1\n\n{", r"x\.json line 3 is not JSON \(.*\): check that the file"),
        (read_json_lines, b"[" * 100_000, r"x\.json line 1 is not JSON"),
        (read_json_list, b"{}", r"x\.json holds a dict: it should be a list"),
    ],
)
def test_malformed_files_are_named(tmp_path, read, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read(path))
    assert "\n" not in str(error.value)


def test_a_path_of_a_tar_member_is_parsed_as_it_was_formatted():
    path = format_tar_member("a b/x.tar", 1536, 20480)
    assert path == "a b/x.tar@1536+20480"
    assert parse_tar_member(path) == ("a b/x.tar", 1536, 20480)
    for other in ("x.png", "x.tar", "x.tar@1", "x.zip@1+2", "x.tar@1+2.png", "x.tar@-1+2"):
        assert parse_tar_member(other) == ("", 0, 0)


def test_tar_members_are_read_by_offset(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    with tarfile.open(tmp_path / "x.tar") as tar:
        start = tar.getmember("a.txt").offset_data
    assert read_tar_member(tmp_path / "x.tar", start, 5) == b"hello"
    size = (tmp_path / "x.tar").stat().st_size
    with pytest.raises(ValueError, match=rf"x\.tar ends before byte {size + 5}: "):
        read_tar_member(tmp_path / "x.tar", size - 5, 10)
    with pytest.raises(OSError):
        read_tar_member(tmp_path / "absent.tar", 0, 1)


def test_the_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("BEIT3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "beit3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_directory() == tmp_path / ".cache" / "beit3"
