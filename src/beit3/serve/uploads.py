"""What a request holds: forms, JSON, and images as files, base64 or names in a named folder.

Nothing is written to disk, nothing is fetched, and no image is decoded before its header is
checked.
"""

import base64
import binascii
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3.config import suggest
from beit3.data.stores.record_fields import is_string
from beit3.images import find_mode_fault, open_with_pillow
from beit3.serve.extra import import_extra
from beit3.serve.refusal import Refusal

DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII)
MAX_PARTS = 64
"""Most parts of a form."""
MAX_NAME_BYTES = 4096
"""Longest name of a file in a folder, and longest header of a part of a form."""
MAX_HEADERS = 8
"""Most headers of a part of a form."""
MAX_JSON_ITEMS = 500_000
"""Most commas and brackets of a JSON body: small values take far more memory than their text."""
MAX_SCANS = 100
"""Most scans of a JPEG. A progressive one usually has 10, and libtiff allows 100. A scan of a few
bytes goes over all blocks of the image, so that a small file can take minutes."""
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
"""The next marker. In the data of a scan a 0xff is followed by 0 or is a restart marker."""


@dataclass(frozen=True)
class Limits:
    """What a request may hold.

    Args:
        max_bytes: Of a request's body, and of a file in a folder.
        max_pixels: Of an image.
        max_text: Characters of a text.
        folders: Name -> directory whose images requests may name.
    """

    max_bytes: int = 32 << 20
    max_pixels: int = 50_000_000
    max_text: int = 4_000
    folders: Mapping[str, Path] = field(default_factory=dict)


# Bodies -------------------------------------------------------------------------------------------


def read_body(body: bytes, content_type: str) -> dict[str, Any]:
    """Returns the fields of a form or a JSON object.

    Files of a form are bytes, its other fields are texts.

    Raises Refusal: 400 for a broken body, 415 for one of another type.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return read_form(body, content_type)
    if kind == "application/json" or re.fullmatch(r"application/[\w.-]+\+json", kind):
        return read_json(body)
    if kind == "application/x-www-form-urlencoded" or not kind:
        shown = "no content type" if not kind else kind
    else:
        shown = f"content type {kind[:60]!r}"
    raise Refusal(415, f"{shown}: send multipart/form-data or application/json")


def read_json(body: bytes) -> dict[str, Any]:
    """Returns the JSON object that a body holds. Raises Refusal 400 for anything else."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_ITEMS:
        raise Refusal(400, f"the JSON has more than {MAX_JSON_ITEMS} commas and brackets")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except RecursionError:
        raise Refusal(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body is JSON, but no object: send {name: value}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_form(body: bytes, content_type: str) -> dict[str, Any]:
    """Returns the parts of a form by name: bytes of files, texts of other parts.

    Raises Refusal 400 for a broken form.
    """
    multipart = import_extra("python_multipart.multipart")
    _, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary or len(boundary) > 256:
        raise Refusal(400, "the form has no boundary in its content type")
    collector = _PartCollector()
    try:
        parser = multipart.MultipartParser(boundary, collector.callbacks)
        parser.write(body)
        parser.finalize()
    except multipart.FormParserError as error:
        raise Refusal(400, f"the form is damaged: {str(error)[:100]}") from None
    if not collector.is_complete:
        raise Refusal(400, "the form is damaged: its end is missing")
    fields: dict[str, Any] = {}
    for headers, data in collector.parts:
        name, value = _read_part(headers, data, multipart.parse_options_header)
        if name in fields:
            raise Refusal(400, f"the form has two parts {name!r}", field=name)
        fields[name] = value
    return fields


class _PartCollector:
    """Gathers the parts of a form in memory."""

    def __init__(self) -> None:
        self.parts: list[tuple[dict[bytes, bytes], bytearray]] = []
        self.is_complete = False
        self._name, self._value = bytearray(), bytearray()
        self.callbacks = {
            "on_part_begin": self._begin_part,
            "on_part_data": self._add_data,
            "on_header_field": self._add_name,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise Refusal(400, f"the form has more than {MAX_PARTS} parts")
        self.parts.append(({}, bytearray()))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(memoryview(data)[start:end])

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._check_header()

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._name) + len(self._value) > MAX_NAME_BYTES:
            raise Refusal(400, "a part of the form has too long a header")

    def _end_header(self) -> None:
        headers = self.parts[-1][0]
        if len(headers) >= MAX_HEADERS:
            raise Refusal(400, f"a part of the form has more than {MAX_HEADERS} headers")
        headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        self.is_complete = True


def _read_part(headers: dict[bytes, bytes], data: bytearray, parse_options: Any) -> tuple[str, Any]:
    """Returns the name of a part and its value: bytes of a file, or a text."""
    try:
        _, options = parse_options(headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8")
    except (ValueError, UnicodeDecodeError):
        raise Refusal(400, "a part of the form has a damaged name") from None
    if not name:
        raise Refusal(400, "a part of the form has no name")
    if b"filename" in options or headers.get(b"content-type", b"").startswith(b"image/"):
        return name, bytes(data)
    try:
        return name, data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refusal(
            400, f"the part {name[:60]!r} is neither a file nor UTF-8", field=name
        ) from None


def check_names(fields: Mapping[str, Any], field_names: Sequence[str]) -> None:
    """Raises Refusal for a field that there is not."""
    for name in fields:
        if name not in field_names:
            hint = suggest(name[:60], list(field_names))
            raise Refusal(
                422,
                f"there is no field {name[:60]!r}{hint}; the fields are {', '.join(field_names)}",
                field=name[:60],
            )


# Values -------------------------------------------------------------------------------------------


def read_text(value: Any, name: str, limits: Limits) -> str:
    """Returns a text. Raises Refusal 422 for what is none, 413 for one that is too long."""
    if isinstance(value, bytes):
        raise Refusal(422, f"{name} is a file, not a text", field=name)
    if not is_string(value):
        raise Refusal(422, f"{name} is {_describe(value)}, not a text", field=name)
    if len(value) > limits.max_text:
        raise Refusal(
            413,
            f"{name} has {len(value)} characters, more than {limits.max_text}: shorten it",
            field=name,
        )
    return value


def read_image(value: Any, name: str, limits: Limits) -> bytes:
    """Returns the bytes of an image whose header was checked.

    `value` is the bytes of a file, base64 or a data URI, or {"name": "folder/file.jpg"}.

    Raises Refusal: 422 for what is no image, 404 for an unknown name, 413 for a too large one.
    """
    if isinstance(value, bytes):
        data = value
    elif isinstance(value, str):
        data = decode_base64(value, name)
    elif isinstance(value, dict):
        data = read_named(value, name, limits)
    else:
        raise Refusal(
            422,
            f"{name} is {_describe(value)}, not an image: send a file, base64, or a name in a "
            "folder",
            field=name,
        )
    check_header(data, name, limits)
    return data


def decode_base64(text: str, name: str) -> bytes:
    """Returns what base64 or a data URI holds. Raises Refusal 422 for anything else."""
    if re.match(r"[a-z][a-z0-9+.-]{1,20}://", text[:32], re.IGNORECASE):
        raise Refusal(
            422, f"{name} is a URL, and none is ever fetched: send the image itself", field=name
        )
    if text[:5].lower() == "data:":
        header = DATA_URI.match(text[:256])
        if header is None:
            raise Refusal(422, f"{name} is a data URI that is not base64", field=name)
        text = text[header.end() :]
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, f"{name} is a text that is no base64 of an image", field=name) from None


def check_header(data: bytes, name: str, limits: Limits) -> None:
    """Checks an image's header before it is decoded; raises Refusal."""
    if len(data) > limits.max_bytes:
        raise Refusal(413, f"{name} has more than {limits.max_bytes} bytes", field=name)
    try:
        with open_with_pillow(data, f"{name} (a file of {len(data)} bytes)") as header:
            num_pixels = header.width * header.height
            fault = find_mode_fault(header)
            is_jpeg = header.format in ("JPEG", "MPO")
    except ValueError as error:
        if "pixels: make it smaller" in str(error):
            raise Refusal(413, str(error), field=name) from None
        raise Refusal(422, str(error), field=name) from None
    if num_pixels > limits.max_pixels:
        raise Refusal(
            413,
            f"{name} has {num_pixels} pixels, more than {limits.max_pixels}: make it smaller",
            field=name,
        )
    if is_jpeg and count_scans(data, MAX_SCANS + 1) > MAX_SCANS:
        raise Refusal(
            413,
            f"{name} is a JPEG of more than {MAX_SCANS} scans: save it again, not progressive",
            field=name,
        )
    if fault or not num_pixels:
        raise Refusal(422, f"{name} {fault or 'is empty'}", field=name)


def count_scans(data: bytes, limit: int) -> int:
    """Returns the number of scans of a JPEG's first image, at most `limit`, without decoding it.

    Damaged places are passed over as decoders do: to the next marker.
    """
    count, position = 0, 2
    while count < limit:
        match = JPEG_MARKER.search(data, position)
        if match is None or match[1] == b"\xd9":  # end of the image
            break
        position = match.end()
        if match[1] in (b"\x01", b"\xd8"):  # markers without content
            continue
        count += match[1] == b"\xda"
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return count


def names_files(body: bytes, content_type: str, limits: Limits) -> bool:
    """Returns whether a body may name files in folders: only an object inside JSON can.

    Its files are read by threads of their own, since a disk may be slow.
    """
    return bool(limits.folders) and "json" in content_type.lower() and body.count(b"{") > 1


def _describe(value: Any) -> str:
    """Returns what a JSON value is, in words."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", dict: "an object", list: "a list", str: "a damaged text"}
    return kinds.get(type(value), "a number")


# Named folders ------------------------------------------------------------------------------------


def read_named(value: Mapping[str, Any], name: str, limits: Limits) -> bytes:
    """Returns the bytes of a file that {"name": "folder/file.jpg"} names in a named folder.

    Raises Refusal, which is the same whether a file outside exists or not.
    """
    path = value.get("name")
    if set(value) != {"name"} or not isinstance(path, str):
        raise Refusal(
            422, f'{name} is an object, but not {{"name": "folder/file.jpg"}}', field=name
        )
    if not limits.folders:
        raise Refusal(422, f"{name}: this server reads no folder: send the image", field=name)
    folder_name, _, inside = path.partition("/")
    parts = inside.split("/")
    is_plain = is_string(path) and len(path) < MAX_NAME_BYTES and not set(path) & set("\\\0:")
    missing = Refusal(404, f"{name}: there is no such image in the folders", field=name)
    if not is_plain or any(part in ("", ".", "..") for part in parts):
        raise missing
    folder = limits.folders.get(folder_name)
    if folder is None:
        raise missing
    data = read_inside(folder, inside, limits.max_bytes)
    if data is None:
        raise missing
    return data


def find_inside(folder: Path, inside: str) -> Path | None:
    """Returns the real path of a file inside a folder; None for one outside, or none at all.

    Links are followed, but not out of the folder.
    """
    try:
        root = folder.resolve(strict=True)
        path = (root / inside).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        return None
    return path if path.is_relative_to(root) else None


def read_inside(folder: Path, inside: str, max_bytes: int) -> bytes | None:
    """Returns the bytes of a regular file inside a folder, None where there is none.

    Links that lead out of the folder are not followed, and no pipe is waited for.
    """
    path = find_inside(folder, inside)
    if path is None:
        return None
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
            return None
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes + 1)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def name_folders(folders: Iterable[Path]) -> dict[str, Path]:
    """Returns directories by the name that requests give them, their own. Raises ValueError."""
    named: dict[str, Path] = {}
    for folder in folders:
        path = folder.resolve()
        if not path.is_dir():
            raise ValueError(f"--folder {folder} is no directory")
        if path.name in named:
            raise ValueError(f"--folder: two directories are named {path.name}: rename one")
        named[path.name] = path
    return named
