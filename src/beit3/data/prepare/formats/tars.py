"""Tar shards as WebDataset and img2dataset write them.

Neighboring members 0007.jpg, 0007.txt and 0007.json are one record. The tars stay as they are: a
record names the bytes of its image in them. Of an image only the header is read here. Nothing in a
tar is trusted: names become plain ones, sizes are limited, links and devices are refused.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from beit3.data.prepare.formats.files import find_files, make_unknown_error
from beit3.data.prepare.formats.split_names import SplitRecord, choose_split, infer_split
from beit3.files import format_tar_member
from beit3.images import MAX_BYTES, SUFFIXES, find_header_fault

COMPRESSED_TAR = re.compile(r".+\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)", re.IGNORECASE)
DECOMPRESSORS = {"gz": "gunzip", "z2": "bunzip2", "bz": "bunzip2", "xz": "unxz", "st": "unzstd"}
"""Last two letters of a compressed tar's name -> program that writes the tar beside it."""

MAX_TEXT_BYTES = 1 << 20
"""Bytes of a caption or a .json member."""

NO_CAPTION = "no caption among its members (a .txt, or a .json with caption)"


class Shard(NamedTuple):
    """A tar file."""

    path: Path
    name: str
    """Path relative to the raw folder without ".tar", which ids begin with."""
    split: str


class Span(NamedTuple):
    """A range of bytes in a tar."""

    start: int
    size: int


@dataclass
class Sample:
    """The image and caption in the members of one key."""

    key: str
    image: Span | None = None
    caption: Span | None = None
    in_json: bool = False
    """Whether `caption` is the span of a .json member."""
    text: str = ""
    caption_fault: str = NO_CAPTION
    """Why there is no caption, unless a further member has one."""
    fault: str = ""
    """Why this makes no record, or ""."""


def read_webdataset(raw: str | Path, *, captions: bool = True) -> Iterator[SplitRecord]:
    """Yields (split, {id: "shard/key", image, text}) of the tar files in `raw` or right below it.

    Splits come from the names of shards and folders; without a val split, 5 % of the keys are held
    out. A key without image or caption is {id, fault}, and so is a tar that is cut or damaged,
    after its complete records.

    Args:
        raw: A tar file or a folder of tar files.
        captions: False yields {id, image}.
    """
    shards = find_shards(raw)
    has_val = any(shard.split == "val" for shard in shards)
    for path, name, shard_split in shards:
        try:
            for sample in read_samples(path, captions=captions):
                split = choose_split(shard_split, sample.key, has_val=has_val)
                fields = _make_fields(sample, path, captions=captions)
                yield split, {"id": f"{name}/{sample.key}"} | fields
        except tarfile.TarError as error:
            yield shard_split, {"id": name, "fault": str(error)}


def is_webdataset(raw: Path) -> bool:
    """Returns whether `raw` is or holds tar files, compressed ones (refused later) included."""
    return bool(_find_tars(raw) or find_compressed_tars(raw))


def find_compressed_tars(raw: Path) -> list[Path]:
    """Returns the compressed tar files in `raw` or right below it, or `raw` itself."""
    files = [raw] if raw.is_file() else [*find_files(raw, "*.[tT]*")]
    return [file for file in files if file.name[0] != "." and COMPRESSED_TAR.fullmatch(file.name)]


def refuse_compressed_tars(raw: Path) -> None:
    """Raises ValueError for compressed tars: their members cannot be read at an offset."""
    files = find_compressed_tars(raw)
    if files:
        program = DECOMPRESSORS.get(files[0].name[-2:].lower(), "gunzip")
        others = f" and {len(files) - 1} others" if len(files) > 1 else ""
        raise ValueError(
            f"{files[0]}{others}: images inside a compressed tar cannot be read where they are; "
            f"decompress it first, for example `{program} {files[0].name}`"
        )


def find_shards(raw: str | Path) -> list[Shard]:
    """Returns the tar files in `raw` or right below it, or `raw` itself.

    Raises ValueError when there is none, or a compressed one.
    """
    raw = Path(raw).absolute()
    refuse_compressed_tars(raw)
    tars = _find_tars(raw)
    if not tars:
        raise make_unknown_error(raw, "*.tar (webdataset)")
    top = raw if raw.is_dir() else raw.parent
    return [
        Shard(
            path,
            path.relative_to(top).with_suffix("").as_posix(),
            infer_split(path, raw) or "train",
        )
        for path in tars
    ]


def read_samples(file: Path, *, captions: bool) -> Iterator[Sample]:
    """Yields the samples of a tar in its order.

    A sample has a fault when a part is missing, or when its key occurred before.

    Args:
        file: The tar file.
        captions: Whether a sample needs a caption.

    Raises:
        tarfile.TarError: The tar is cut or damaged, also where tarfile takes the damage for its
            end. The message says how many samples came before.
    """
    keys: set[str] = set()
    try:
        for sample in _read_neighbors(file, captions=captions):
            if sample.key in keys:
                sample.fault = (
                    f"{file.name} has its members in two places: write members of one key next to "
                    "each other"
                )
            elif not sample.image and not sample.fault:
                sample.fault = f"no image ({', '.join(sorted(SUFFIXES))}) among its members"
            elif captions and not sample.caption and not sample.fault:
                sample.fault = sample.caption_fault
            keys.add(sample.key)
            yield sample
    # All errors to which a damaged header leads.
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise tarfile.ReadError(
            f"{file} is cut or damaged after {len(keys)} complete records ({error}): download it "
            "again"
        ) from None


def decode_caption(content: bytes, in_json: bool) -> str:
    """Returns the text of a .txt member, or "caption" or "text" of a .json member.

    Raises ValueError when there is none.
    """
    if not in_json:
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("its caption is not UTF-8") from None
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is not JSON ({error})") from None
    if isinstance(entry, dict):
        for name in ("caption", "text"):
            if isinstance(entry.get(name), str):
                return entry[name].strip()
    raise ValueError(NO_CAPTION)


def make_plain_name(key: str) -> str:
    """Returns `key` as a file name of letters, digits, "-" and "_".

    A key that is not such a name gets a hash as its ending, which keeps it distinct.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", key)[-100:]
    if name == key:
        return name
    digest = blake2b(key.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{name}-{digest}"


def _find_tars(raw: Path) -> list[Path]:
    """Returns the tar files in `raw` or right below it, or `raw` itself."""
    if raw.is_file():
        return [raw] if raw.suffix == ".tar" else []
    return [file for file in find_files(raw, "*.tar") if file.name[0] != "." and file.is_file()]


def _make_fields(sample: Sample, tar: Path, *, captions: bool) -> dict[str, str]:
    """Returns what a record has besides its id: `fault`, or `image` and `text`."""
    if sample.fault:
        return {"fault": sample.fault}
    assert sample.image
    fields = {"image": format_tar_member(tar, *sample.image)}
    return fields | {"text": sample.text} if captions else fields


def _read_neighbors(file: Path, *, captions: bool) -> Iterator[Sample]:
    """Yields each run of members of one key, after a member of another key or the tar's end."""
    sample = Sample("")
    with tarfile.open(file, "r:") as tar:
        while member := tar.next():
            # tarfile would keep all members, a KB each.
            tar.members.clear()  # type: ignore[attr-defined]
            name = PurePosixPath(member.name)
            stem, _, ending = name.name.partition(".")
            if not stem or not ending:
                continue
            key = make_plain_name(name.with_name(stem).as_posix())
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = Sample(key)
            _add_member(sample, tar, member, ending.lower(), captions)
        end = tar.offset
    with file.open("rb") as content:
        content.seek(end)
        if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive block at byte {end}")
    if sample.key:
        yield sample


def _add_member(
    sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, captions: bool
) -> None:
    """Adds a member to its sample; members of other kinds are skipped unread."""
    is_image = f".{ending}" in SUFFIXES
    if not is_image and not (captions and ending in ("txt", "json")):
        return
    fault = find_member_fault(member, MAX_BYTES if is_image else MAX_TEXT_BYTES)
    if fault:
        sample.fault = fault
        return
    content = tar.extractfile(member)
    assert content is not None
    span = Span(member.offset_data, member.size)
    if not is_image:
        _add_caption(sample, span, content.read(), in_json=ending == "json")
        return
    sample.image = span
    fault = find_header_fault(cast(BinaryIO, content))
    if fault:
        sample.fault = f"{member.name[-80:]!r} {fault}"


def find_member_fault(member: tarfile.TarInfo, limit: int) -> str:
    """Returns why a member of a tar is no file of at most `limit` bytes, or ""."""
    name = repr(member.name[-80:])
    if not member.isreg() or member.issparse():
        return f"{name} is a link or a device, not a file"
    if member.size > limit:
        return f"{name} has {member.size} bytes, more than {limit}: make it smaller"
    return ""


def _add_caption(sample: Sample, span: Span, content: bytes, *, in_json: bool) -> None:
    """Adds a caption to its sample. A readable .txt member counts before a .json member."""
    if in_json and sample.caption:
        return
    try:
        sample.text = decode_caption(content, in_json)
    except ValueError as error:
        sample.caption_fault = str(error)
        return
    sample.caption, sample.in_json = span, in_json
