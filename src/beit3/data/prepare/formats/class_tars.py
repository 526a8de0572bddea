"""Reads tars of one class each, as ImageNet-21k is published: n01440764.tar holds its images.

The tars stay as they are: a record names the bytes of its image in them. A tar of such tars
(ILSVRC2012_img_train.tar) is read as well.
"""

import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from beit3.data.prepare.formats.class_names import ClassifiedImages, find_class_names
from beit3.data.prepare.formats.files import make_unknown_error
from beit3.data.prepare.formats.split_names import SPLITS, Record, SplitRecord, choose_split
from beit3.data.prepare.formats.tars import (
    Shard,
    find_member_fault,
    find_shards,
    is_webdataset,
)
from beit3.files import format_tar_member
from beit3.images import MAX_BYTES, SUFFIXES

LABEL_SUFFIXES = (".cls", ".json", ".txt")
"""Members that would tell labels or captions: such a tar is a shard of many classes."""
NUM_CHECKED_MEMBERS = 4
"""Members by whose names a shard of many classes is recognized."""

TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, EOFError, OSError)
"""All errors to which a damaged header leads."""


class ClassTar(NamedTuple):
    """The images of a class: a tar, or a range of bytes of an outer tar."""

    path: Path
    class_name: str
    split: str
    start: int = 0


def read_class_tars(raw: str | Path) -> ClassifiedImages:
    """Reads <class>.tar in `raw`, or in its folders train, val and test.

    Records are {id: "class/image.jpg", image, label}. Labels count the sorted classes from 0.
    Without a val folder, 5 % are held out. A tar that is cut or damaged is {id, fault}, after its
    complete images; members that are no images are left out.

    Raises:
        ValueError: There are no tars, they are compressed, or hold images of several classes.
    """
    raw = Path(raw).absolute()
    folder = raw if raw.is_dir() else raw.parent
    tars = [tar for shard in find_shards(raw) for tar in _list_class_tars(shard, folder)]
    _refuse_split_names(tars, folder)
    train_classes = {tar.class_name for tar in tars if tar.split == "train"}
    classes = sorted(train_classes or {tar.class_name for tar in tars})
    if not classes:
        raise make_unknown_error(raw, "<class>.tar with images (class_tars)")
    labels = {name: label for label, name in enumerate(classes)}
    for tar in tars:
        if tar.class_name not in labels:
            raise ValueError(
                f"{tar.path} is not a class of the training tars: remove it, or add it there"
            )
    return ClassifiedImages(find_class_names(folder, classes), _read_tars(tars, labels))


def is_class_tars(raw: Path) -> bool:
    """Returns whether `raw` is or holds tar files."""
    return is_webdataset(raw)


def _list_class_tars(shard: Shard, raw: Path) -> list[ClassTar]:
    """Returns a tar of images as one class, a tar of tars as several."""
    members, inner_tars = _list_members(shard.path)
    for member in members:
        if member.suffix.lower() in LABEL_SUFFIXES:
            raise ValueError(
                f"{shard.path} holds {str(member)[-80:]!r}: labels inside of tars are not read, "
                "only tars called after their class; unpack it into class folders"
            )
    split = SPLITS.get(shard.path.parent.name.lower(), "") if shard.path.parent != raw else ""
    if inner_tars:
        split = split or shard.split
        return [ClassTar(shard.path, name, split, start) for name, start in inner_tars.items()]
    return [ClassTar(shard.path, shard.path.stem, split or "train")]


def _refuse_split_names(tars: list[ClassTar], raw: Path) -> None:
    """Raises ValueError for tars that are called after splits instead of classes.

    One that is called train.tar is; bullet_train.tar may be a class if others are called otherwise.
    """
    named_tars = [
        tar for tar in tars if tar.class_name == tar.path.stem and not _is_in_split(tar.path, raw)
    ]
    words = {tar: re.split("[._-]", tar.class_name.lower()) for tar in named_tars}
    suspects = [tar for tar in named_tars if not SPLITS.keys().isdisjoint(words[tar])]
    certain = [tar for tar in suspects if tar.class_name.lower() in SPLITS]
    if len(suspects) == len(tars):
        certain = suspects
    if certain:
        raise ValueError(
            f"{certain[0].path} is called after a split, and its images are in no class: unpack "
            "it into class folders, or call it after its class and put it into a folder train or "
            "val"
        )


def _is_in_split(path: Path, raw: Path) -> bool:
    """Returns whether a file's folder, below `raw`, is called after a split."""
    return path.parent != raw and path.parent.name.lower() in SPLITS


def _list_members(path: Path) -> tuple[list[PurePosixPath], dict[str, int]]:
    """Returns the names of the first members of a tar, and class -> offset of the tars in it."""
    names: list[PurePosixPath] = []
    inner_tars: dict[str, int] = {}
    with suppress(*TAR_ERRORS), tarfile.open(path, "r:") as tar:  # reading it says what is wrong
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]
            name = PurePosixPath(member.name)
            if not member.isreg() or name.name[0] == ".":
                continue
            if name.suffix.lower() == ".tar":
                inner_tars[name.stem] = member.offset_data
                continue
            names.append(name)
            if len(names) == NUM_CHECKED_MEMBERS:
                break
    return names, inner_tars


def _read_tars(tars: list[ClassTar], labels: dict[str, int]) -> Iterator[SplitRecord]:
    """Yields the images of all tars with their labels."""
    has_val = any(tar.split == "val" for tar in tars)
    for class_tar in tars:
        label = {"label": labels[class_tar.class_name]}
        try:
            for record in _read_images(class_tar):
                split = choose_split(class_tar.split, record["id"], has_val=has_val)
                yield split, record | label if "image" in record else record
        except TAR_ERRORS as error:
            fault = f"{class_tar.path} is cut or damaged ({error}): download it again"
            yield class_tar.split, {"id": class_tar.class_name, "fault": fault}


def _read_images(class_tar: ClassTar) -> Iterator[Record]:
    """Yields {id, image}, {id, fault} or {id, left_out} for the members of a tar."""
    with class_tar.path.open("rb") as file:
        file.seek(class_tar.start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                # tarfile would keep all members, a KB each.
                tar.members.clear()  # type: ignore[attr-defined]
                if not member.isdir():
                    yield _make_record(class_tar, member)
            end = tar.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive block at byte {end}")


def _make_record(class_tar: ClassTar, member: tarfile.TarInfo) -> Record:
    suffix = PurePosixPath(member.name).suffix.lower()
    record_id = f"{class_tar.class_name}/{member.name.removeprefix('./')}"
    if suffix not in SUFFIXES:
        return {"id": record_id, "left_out": suffix or "no suffix"}
    fault = find_member_fault(member, MAX_BYTES)
    if fault:
        return {"id": record_id, "fault": fault}
    # Offsets count from the beginning of the file, also in a tar inside a tar.
    image = format_tar_member(class_tar.path, member.offset_data, member.size)
    return {"id": record_id, "image": image}
