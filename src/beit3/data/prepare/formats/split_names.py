"""Splits: the names that datasets give them, and the val split held out where there is none.

A reader yields (split, record) pairs. The splits are train, val, test and test-dev.
"""

import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import find_folder

Record = dict[str, Any]
SplitRecord = tuple[str, Record]
"""A split and a record of it."""

# Karpathy's restval is the rest of COCO's val, which is used for training.
SPLITS = {
    **dict.fromkeys(("train", "training", "restval", "train2014", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "val2014", "val2017"), "val"),
    **dict.fromkeys(("test", "testing", "test2014", "test2015", "test2017"), "test"),
    **dict.fromkeys(("test-dev2015", "test-dev2017"), "test-dev"),
}
"""Lower-case name that a dataset may give a split -> our name."""

HELD_OUT_RATE = 0.05
"""Fraction of the training records that become val where the owners made no val split."""


def parse_split(name: str, location: str) -> str:
    """Returns the split that a dataset calls `name`.

    Raises ValueError that begins with `location` for a name that is not in `SPLITS`.
    """
    if name.lower() not in SPLITS:
        raise ValueError(f"{location} is of split {name!r}: use one of {', '.join(SPLITS)}")
    return SPLITS[name.lower()]


def infer_split(file: Path, raw: Path) -> str:
    """Returns the split that a file's name or a folder between it and `raw` tells, else "".

    Names are "captions_val2017.csv" or "cc12m-train-0000.tar"; the file's name counts before the
    folders, and of several words the last.
    """
    top = raw if raw.is_dir() else raw.parent
    words = [
        *reversed(re.split(r"[._-]", file.stem)),
        *reversed(file.parent.relative_to(top).parts),
    ]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def make_split_error(first: Path, second: Path, raw: Path, split: str) -> ValueError:
    """Returns the error for two files in `raw` that both are of one split, for the caller to raise.

    The second is named relative to `raw`.
    """
    other = second.relative_to(raw).as_posix()
    return ValueError(f"{first} and {other} are both {split}: keep one of them")


def infer_subset(file: Path) -> str:
    """Returns the part of a file's name that names a split, as it stands there, else "train".

    It is "val2014" for v2_OpenEnded_mscoco_val2014_questions.json.
    """
    parts = reversed(file.stem.split("_"))
    return next((part for part in parts if part.lower() in SPLITS), "train")


def find_folder_splits(raw: Path) -> dict[str, str]:
    """Returns folder name -> split for the folders right below `raw` that are named after one."""
    return {
        path.name: SPLITS[path.name.lower()]
        for path in raw.iterdir()
        if path.name.lower() in SPLITS
    }


def assign_splits(
    records: Iterable[Record], raw: str | Path, *, held_out: float = HELD_OUT_RATE
) -> Iterator[SplitRecord]:
    """Yields the records with their splits, told by the folders train, val and test below `raw`.

    Args:
        records: Records whose ids are paths relative to `raw`.
        raw: Folder of the raw dataset.
        held_out: Fraction of train that becomes val, by hash of the id, where there is no val
            folder.
    """
    folder_splits = find_folder_splits(find_folder(raw))
    has_val = "val" in folder_splits.values()
    for record in records:
        split = folder_splits.get(record["id"].partition("/")[0], "train")
        yield choose_split(split, record["id"], has_val=has_val, held_out=held_out), record


def choose_split(split: str, key: str, *, has_val: bool, held_out: float = HELD_OUT_RATE) -> str:
    """Returns `split`, or val for a held-out key of train where the owners made no val split."""
    if split == "train" and not has_val and is_held_out(key, held_out):
        return "val"
    return split


def is_held_out(key: str, rate: float) -> bool:
    """Returns whether `key` belongs to the fraction `rate` of all keys that is held out.

    The answer depends on the hash of `key` alone, so it never changes. The key of a question is its
    image's name: the questions about an image stay together.
    """
    digest = blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64
