"""Tar shards as WebDataset and img2dataset write them: neighbouring members 0007.jpg, 0007.txt,
0007.json are one record.

The tars stay as they are: a record names the bytes of its image inside them. Of an image only the
header is read here.
Nothing in a tar is trusted: names become plain ones, sizes are limited, links and devices are no
members.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from beit3.data.prepare.formats.files import Pair, found, named_split, nothing_known, or_held_out
from beit3.data.prepare.formats.folders import IMAGES
from beit3.files import format_tar_member
from beit3.images import MAX_BYTES, find_header_fault

MAX_TEXT = 1 << 20
"""Bytes of a caption or a .json."""

NO_CAPTION = "no caption among its members (a .txt, or a .json with caption)"


class Span(NamedTuple):
    """Bytes of a tar."""

    start: int
    size: int


@dataclass
class Sample:
    """What the members of one key hold. `caption`: where the text is; `fault`: why this is no
    record."""

    key: str
    image: Span | None = None
    caption: Span | None = None
    in_json: bool = False
    text: str = ""
    unread: str = NO_CAPTION
    """Why there is no caption, unless a further member has one."""
    fault: str = ""


def webdataset(raw: str | Path, *, captions: bool = True) -> Iterator[Pair]:
    """The records of the .tar files in `raw`, or right below it, or of `raw` itself: {id:
    "shard/key", image, text}.

    captions: False gives {id, image}. Splits come from the names of shards and folders; without a
    val, 5 % of the keys
    are held out. A key without image or caption is {id, fault}, and so is a tar that is cut or
    damaged, after its whole
    records.
    """
    files = shards(raw)
    has_val = "val" in (split for *_, split in files)
    for file, name, split in files:
        try:
            for sample in samples(file, captions=captions):
                side = or_held_out(split, sample.key, has_val=has_val)
                yield side, {"id": f"{name}/{sample.key}"} | fields(sample, file, captions=captions)
        except tarfile.TarError as error:
            yield split, {"id": name, "fault": str(error)}


def shards(raw: str | Path) -> list[tuple[Path, str, str]]:
    """(file, its name in ids, split) of the .tar files in `raw` or right below it, or of `raw`
    itself; ValueError for none."""
    raw = Path(raw).absolute()
    files = _tars(raw)
    if not files:
        raise nothing_known(raw, "*.tar (webdataset)")
    top = raw if raw.is_dir() else raw.parent
    return [
        (file, file.relative_to(top).with_suffix("").as_posix(), named_split(file, raw) or "train")
        for file in files
    ]


def is_webdataset(raw: Path) -> bool:
    """Whether `raw` is or holds tar files."""
    return bool(_tars(raw))


def samples(file: Path, *, captions: bool) -> Iterator[Sample]:
    """The keys of a shard in its order; at a second place of the same key, with a fault.

    tarfile.TarError, saying how many came before, where the tar is cut or damaged, also at a place
    that tarfile takes for the end.
    """
    done: set[str] = set()
    try:
        for sample in _neighbours(file, captions=captions):
            if sample.key in done:
                sample.fault = (
                    f"{file.name} has its members in two places: write members of one key next to "
                    "each other"
                )
            elif not sample.image and not sample.fault:
                sample.fault = f"no image ({', '.join(sorted(IMAGES))}) among its members"
            elif captions and not sample.caption and not sample.fault:
                sample.fault = sample.unread
            done.add(sample.key)
            yield sample
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        EOFError,
    ) as error:  # all that a damaged header leads to
        raise tarfile.ReadError(
            f"{file} is cut or damaged after {len(done)} whole records ({error}): download it again"
        ) from None


def fields(sample: Sample, file: Path, *, captions: bool) -> dict[str, str]:
    """What a record has beside its id: `fault`, or `image` and `text`."""
    if sample.fault:
        return {"fault": sample.fault}
    assert sample.image
    return {"image": format_tar_member(file, *sample.image)} | (
        {"text": sample.text} if captions else {}
    )


def caption(content: bytes, in_json: bool) -> str:
    """The text of a .txt, or `caption` or `text` of a .json; ValueError where there is none."""
    if not in_json:
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("its caption is not UTF-8") from None
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is not JSON ({error})") from None
    given = (
        [entry[name] for name in ("caption", "text") if isinstance(entry.get(name), str)]
        if isinstance(entry, dict)
        else []
    )
    if not given:
        raise ValueError(NO_CAPTION)
    return given[0].strip()


def plain(key: str) -> str:
    """`key` as a file name of letters, digits, - and _; what is not such a name gets a hash behind
    it and stays distinct."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", key)[-100:]
    return (
        name
        if name == key
        else f"{name}-{blake2b(key.encode(errors='surrogatepass'), digest_size=4).hexdigest()}"
    )


def _tars(raw: Path) -> list[Path]:
    if raw.is_file():
        return [raw] if raw.suffix == ".tar" else []
    return [file for file in found(raw, "*.tar") if file.name[0] != "." and file.is_file()]


def _neighbours(file: Path, *, captions: bool) -> Iterator[Sample]:
    """Each run of members of one key, once a member of another key, or the end of a whole tar, has
    followed it."""
    sample = Sample("")
    with tarfile.open(file, "r:") as tar:
        while entry := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # which tarfile would keep, a KB each
            name = PurePosixPath(entry.name)
            stem, _, ending = name.name.partition(".")
            if not stem or not ending:
                continue
            key = plain(name.with_name(stem).as_posix())
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = Sample(key)
            _add(sample, tar, entry, ending.lower(), captions)
        end = tar.offset
    with file.open("rb") as content:
        content.seek(end)
        if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark at byte {end}")
    if sample.key:
        yield sample


def _add(
    sample: Sample, tar: tarfile.TarFile, entry: tarfile.TarInfo, ending: str, captions: bool
) -> None:
    """Take a member into its sample; members of other kinds are passed over unread."""
    image = f".{ending}" in IMAGES
    if not image and not (captions and ending in ("txt", "json")):
        return
    limit = MAX_BYTES if image else MAX_TEXT
    if not entry.isreg() or entry.issparse():
        sample.fault = f"{entry.name[-80:]!r} is a link or a device, no file"
    elif entry.size > limit:
        sample.fault = (
            f"{entry.name[-80:]!r} has {entry.size} bytes, more than {limit}: make it smaller"
        )
    else:
        content = tar.extractfile(entry)
        assert content is not None
        span = Span(entry.offset_data, entry.size)
        if image:
            sample.image, fault = span, find_header_fault(cast(BinaryIO, content))
            sample.fault = f"{entry.name[-80:]!r} {fault}" if fault else sample.fault
        else:
            _take_caption(sample, span, content.read(), in_json=ending == "json")


def _take_caption(sample: Sample, span: Span, content: bytes, *, in_json: bool) -> None:
    """A .txt that can be read is the caption; else a .json may hold it."""
    if in_json and sample.caption:
        return
    try:
        sample.text, sample.caption, sample.in_json = caption(content, in_json), span, in_json
    except ValueError as error:
        sample.unread = str(error)
