"""Ways to damage a file: anywhere, or with its structure and checksums intact.

Damage anywhere mostly ends at the first check, such as the CRC of a PNG or the syntax of JSON. The
other functions change what lies behind that check. Each takes the bytes of an intact file and a
generator, and returns the damaged bytes; the same seed gives the same damage.
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Damage = Callable[[bytes, np.random.Generator], bytes]

DEEP = "@nested too deeply@"
"""Stands for a list in 100,000 lists, which `json.dumps` could not write."""
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 0.5, 2**31, 2**53 + 1, 10**30, 1e308, float("nan")),
    *(float("inf"), "", " ", "7", "a\nb", "\ud800", "\0", "../../x", "/", "nan", "[1, 2]"),
    *("x" * 5000, "日本語", "\u202e", [], {}, [[]], [None], [""], {"": 0}, {"a": None}, DEEP),
)
ODD_CELLS = (
    *("", " ", "0", "-1", "1e999", "nan", "['a', 'b']", '"', "'", "a\nb", "x" * 2000, "日本語"),
    *("\0", "../../x", "/", "http://x/y.png", "train", "test", "a,b", "a\tb", "\ufeff", "#", "\r"),
)


def combine(*damages: Damage) -> Damage:
    """Returns a function that applies one of `damages`, each equally often."""

    def damage(data: bytes, rng: np.random.Generator) -> bytes:
        return damages[int(rng.integers(len(damages)))](data, rng)

    return damage


# Anywhere -----------------------------------------------------------------------------------------


def damage_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes 1 to 4 places of a file; a quarter of the changes fall into its first 64 bytes."""
    for _ in range(rng.integers(1, 5)):
        size = max(1, len(data) if rng.random() < 0.75 else min(64, len(data)))
        start = int(rng.integers(size))
        length = int(rng.integers(1, 1 + min(64, size)))
        if rng.random() < 0.05:
            data = data[:start]
        else:
            replacement = replace_bytes(data[start : start + length], rng)
            data = data[:start] + replacement + data[start + length :]
    return data


def replace_bytes(old: bytes, rng: np.random.Generator) -> bytes:
    """Returns a replacement: a flipped bit, random, nothing, a repetition, or an extreme number."""
    kind = int(rng.integers(7))
    if kind == 0:
        return bytes([old[0] ^ (1 << int(rng.integers(8)))]) + old[1:] if old else b"\0"
    if kind == 1:
        return rng.bytes(len(old))
    if kind == 2:
        return b""
    if kind == 3:
        return old + old
    if kind == 4:
        return bytes(rng.choice([0, 255, 127], 1).astype(np.uint8)) * len(old)
    number = int(rng.choice([0, 1, 2**31 - 1, 2**32 - 1]))
    return number.to_bytes(4, "big" if kind == 5 else "little") + old[4:]


# Text, tables and JSON ----------------------------------------------------------------------------


def damage_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """Repeats, removes, swaps, joins or cuts lines, or changes the encoding of the whole."""
    lines = data.split(b"\n")
    index, other = rng.integers(len(lines), size=2).tolist()
    kind = int(rng.integers(10))
    if kind == 0:
        lines.insert(index, lines[other])
    elif kind == 1:
        del lines[index]
    elif kind == 2:
        lines[index], lines[other] = lines[other], lines[index]
    elif kind == 3:
        lines[index] = lines[index][: int(rng.integers(len(lines[index]) + 1))]
    elif kind == 4:
        lines.insert(index, b"")
    elif kind == 5:
        lines[index : index + 2] = [b"".join(lines[index : index + 2])]
    joined = b"\n".join(lines)
    if kind == 6:
        return b"\xef\xbb\xbf" + joined
    if kind == 7:
        return joined.replace(b"\n", bytes(rng.choice([b"\r\n", b"\r"])))
    if kind == 8:
        return joined.decode().encode(str(rng.choice(["utf-16", "utf-32", "utf-16-le"])))
    if kind == 9:
        return joined.rstrip(b"\n")
    return joined


def damage_cells(delimiter: str) -> Damage:
    """Returns damage to 1 to 3 cells of a table, which are not quoted anew."""

    def damage(data: bytes, rng: np.random.Generator) -> bytes:
        rows = [line.split(delimiter) for line in data.decode().split("\n")]
        for _ in range(rng.integers(1, 4)):
            row = rows[int(rng.integers(len(rows)))]
            index = int(rng.integers(len(row)))
            kind = int(rng.integers(6))
            if kind == 0:
                row.insert(index, row[index])
            elif kind == 1 and len(row) > 1:
                del row[index]
            elif kind == 2:
                row[index] = f'"{row[index]}'
            else:
                row[index] = ODD_CELLS[int(rng.integers(len(ODD_CELLS)))]
        return "\n".join(map(delimiter.join, rows)).encode()

    return damage


def damage_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes 1 or 2 values of a JSON file, which stays JSON."""
    value = json.loads(data)
    for _ in range(rng.integers(1, 3)):
        value = change_value(value, rng)
    text = json.dumps(value, ensure_ascii=bool(rng.integers(2)))
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode(errors="surrogatepass")


def damage_json_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes values in one line of a file of JSON lines."""
    lines = data.rstrip(b"\n").split(b"\n")
    index = int(rng.integers(len(lines)))
    lines[index] = damage_json(lines[index], rng)
    return b"\n".join(lines) + b"\n"


def change_value(value: Any, rng: np.random.Generator) -> Any:
    """Returns a JSON value with one change somewhere inside: a value, a key or an element."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return ODD_VALUES[int(rng.integers(len(ODD_VALUES)))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[int(rng.integers(len(keys)))]
    changed = value.copy()
    if rng.random() < 0.85:
        changed[key] = change_value(value[key], rng)
    elif rng.random() < 0.5:
        del changed[key]
    elif isinstance(changed, list):
        changed.insert(key, value[key])
    else:
        changed[f"{key}2"] = changed.pop(key)
    return changed


# Behind checksums and lengths ---------------------------------------------------------------------


def damage_png(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages the body of a chunk of a PNG, or its decompressed pixels, and mends its CRC."""
    chunks = []
    offset = 8
    while offset < len(data):
        (length,) = struct.unpack(">I", data[offset : offset + 4])
        chunks.append((data[offset + 4 : offset + 8], data[offset + 8 : offset + 8 + length]))
        offset += 12 + length
    index = int(rng.integers(len(chunks)))
    name, body = chunks[index]
    if name == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(damage_bytes(zlib.decompress(body), rng))
    else:
        body = damage_bytes(body, rng)
    chunks[index] = name, body
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def damage_gzip(inner: Damage) -> Damage:
    """Returns damage to the content of a gzip file, whose CRC is mended."""
    return lambda data, rng: gzip.compress(inner(gzip.decompress(data), rng), mtime=0)


def damage_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages one member of a zip file, whose CRC is mended."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = list(members)[int(rng.integers(len(members)))]
    members[name] = damage_bytes(members[name], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return file.getvalue()


def damage_tar(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages the header of one member of a tar, and mends its checksum."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [member.offset for member in tar]
    start = offsets[int(rng.integers(len(offsets)))]
    header = bytearray(data[start : start + 512])
    # name, mode, size, modification time, kind, target of a link, device
    fields = ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (329, 8))
    field_start, length = fields[int(rng.integers(len(fields)))]
    old = bytes(header[field_start : field_start + length])
    kinds = bytes(rng.choice(list(b"0123456789LKxgSV"), 1).astype(np.uint8))
    new = kinds if length == 1 else damage_bytes(old, rng)[:length].ljust(length, b"\0")
    header[field_start : field_start + length] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


def damage_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes values in the header of a safetensors file, and mends its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_first_line(inner: Damage) -> Damage:
    """Returns damage to the first line of a file, such as the JSON before the rows of an index."""

    def damage(data: bytes, rng: np.random.Generator) -> bytes:
        line, newline, rest = data.partition(b"\n")
        return inner(line, rng) + newline + rest

    return damage


def damage_numbers(data: bytes, rng: np.random.Generator) -> bytes:
    """Sets 1 to 8 aligned bytes of an .npy array behind its header, or of any other file."""
    start = 128 if data.startswith(b"\x93NUMPY") else 0
    changed = bytearray(data)
    if len(data) > start:
        for _ in range(rng.integers(1, 9)):
            offset = int(rng.integers(start, len(data)))
            changed[offset] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(changed)
