"""Tar shards as WebDataset and img2dataset write them: neighbouring members 0007.jpg, 0007.txt, 0007.json are one record.

Shards are read once from start to end, and their images unpacked where the caller says: records name files. Nothing in a
tar is trusted: names become plain ones below that folder, sizes are limited, links and devices are no members.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from beit3.data.formats.files import Pair, Record, found, named_split, nothing_known, or_held_out
from beit3.data.formats.folders import IMAGES
from beit3.data.records import MAX_BYTES

MAX_TEXT = 1 << 20
"""Bytes of a caption or a .json."""


@dataclass
class Sample:
    """What the members of one key hold; `fault` says why they are no record."""

    key: str
    ending: str = ""
    image: bytes | None = None
    txt: bytes | None = None
    json: bytes | None = None
    fault: str = ""


def webdataset(raw: str | Path, *, unpack: str | Path | None, captions: bool = True) -> Iterator[Pair]:
    """The records of the .tar files in `raw`, or right below it, or of `raw` itself: {id: "shard/key", image, text}.

    unpack: the folder that receives the images as shard/key.jpg; what is there already is replaced by the same bytes.
    captions: False gives {id, image}. Splits come from the names of shards and folders; without a val, 5 % of the keys
    are held out. A key without image or caption is {id, fault}. ValueError for a tar that is cut or damaged.
    """
    raw = Path(raw).absolute()
    files = shards(raw)
    if not files:
        raise nothing_known(raw, "*.tar (webdataset)")
    if unpack is None:
        raise ValueError(f"{raw} holds tar files: say with unpack=DIR where their images should be unpacked")
    named = {file: named_split(file, raw) for file in files}
    for file, name in named.items():
        shard = file.relative_to(raw if raw.is_dir() else raw.parent).with_suffix("").as_posix()
        done: set[str] = set()
        try:
            for sample in _samples(file):
                if sample.key in done:
                    sample.fault = f"{file.name} has its members in two places: write members of one key next to each other"
                side = or_held_out(name or "train", sample.key, has_val="val" in named.values())
                yield side, _record(sample, shard, Path(unpack), captions)
                done.add(sample.key)
        except tarfile.TarError as error:
            raise ValueError(
                f"{file} is cut or damaged after {len(done)} whole records ({error}), no records were written: "
                "download it again, or move it away"
            ) from None


def shards(raw: Path) -> list[Path]:
    """The .tar files in `raw` and right below it; or `raw` itself."""
    if raw.is_file():
        return [raw] if raw.suffix == ".tar" else []
    return [file for file in found(raw, "*.tar") if file.name[0] != "."]


def is_webdataset(raw: Path) -> bool:
    """Whether `raw` is or holds tar files."""
    return bool(shards(raw))


def _samples(file: Path) -> Iterator[Sample]:
    """The keys of a shard in its order. tarfile.TarError where it is cut or damaged, also at a place that tarfile takes for the end."""
    sample = Sample("")
    with tarfile.open(file, "r|") as tar:
        try:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")
                if not stem or not ending:
                    continue
                key = _plain(name.with_name(stem).as_posix())
                if key != sample.key:
                    if sample.key:
                        yield sample
                    sample = Sample(key)
                _add(sample, tar, member, ending.lower())
        except (ValueError, OverflowError, EOFError) as error:  # what tarfile lets through of a damaged extended header
            raise tarfile.ReadError(str(error)) from None
        end = tar.offset
    with file.open("rb") as content:
        content.seek(end)
        if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {end}")
    if sample.key:
        yield sample


def _add(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
    """Read a member into its sample; members of other kinds are passed over unread."""
    image = f".{ending}" in IMAGES
    if not image and ending not in ("txt", "json"):
        return
    limit = MAX_BYTES if image else MAX_TEXT
    if not member.isreg() or member.issparse():
        sample.fault = f"{member.name[-80:]!r} is a link or a device, no file"
    elif member.size > limit:
        sample.fault = f"{member.name[-80:]!r} has {member.size} bytes, more than {limit}: make it smaller"
    else:
        content = tar.extractfile(member)
        assert content is not None
        if image:
            sample.ending, sample.image = ending, content.read()
        elif ending == "txt":
            sample.txt = content.read()
        else:
            sample.json = content.read()


def _record(sample: Sample, shard: str, unpack: Path, captions: bool) -> Record:
    """The record of a sample, its image unpacked; {id, fault} where something is missing."""
    id = f"{shard}/{sample.key}"
    text = _caption(sample) if captions and not sample.fault else ""
    if sample.image is None and not sample.fault:
        sample.fault = f"no image ({', '.join(sorted(IMAGES))}) among its members"
    if sample.fault:
        return {"id": id, "fault": sample.fault}
    assert sample.image is not None
    path = unpack.absolute() / shard / f"{sample.key}.{sample.ending}"
    _write(path, sample.image)
    return {"id": id, "image": str(path)} | ({"text": text} if captions else {})


def _caption(sample: Sample) -> str:
    """The text of the .txt, else `caption` or `text` of the .json; '' with the sample's fault set where there is none."""
    try:
        if sample.txt is not None:
            return sample.txt.decode("utf-8-sig").strip()
        entry = json.loads(sample.json or b"{}")
    except UnicodeDecodeError:
        sample.fault = "its caption is not UTF-8"
    except (ValueError, RecursionError) as error:
        sample.fault = f"its .json is not JSON ({error})"
    else:
        given = [entry[name] for name in ("caption", "text") if isinstance(entry.get(name), str)] if isinstance(entry, dict) else []
        if given:
            return given[0].strip()
        sample.fault = "no caption among its members (a .txt, or a .json with caption)"
    return ""


def _plain(key: str) -> str:
    """`key` as a file name of letters, digits, - and _; what is not such a name gets a hash behind it and stays distinct."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key)[-100:]
    return plain if plain == key else f"{plain}-{blake2b(key.encode(errors='surrogatepass'), digest_size=4).hexdigest()}"


def _write(path: Path, content: bytes) -> None:
    """Write a file aside and move it in place: nobody reads half an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
