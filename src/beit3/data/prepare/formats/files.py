"""Files of a raw data set: listed, walked, read as lines or JSON, their fields checked, their
splits named.

What is wrong with a file is a ValueError of one line that names the file, the place in it and the
remedy.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Pair = tuple[str, Record]

# What data sets call their splits. Karpathy's restval is the rest of COCO's val, used for training.
SPLITS = {
    **dict.fromkeys(("train", "training", "restval", "train2014", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "val2014", "val2017"), "val"),
    **dict.fromkeys(("test", "testing", "test2014", "test2015", "test2017"), "test"),
    **dict.fromkeys(("test-dev2015", "test-dev2017"), "test-dev"),
}
HELD_OUT = 0.05
FLICKR30K = ("flickr30k-images", "flickr30k_images")
"""Folders as which Flickr30k's images unpack."""


def folder(raw: str | Path) -> Path:
    """`raw` as an absolute path; ValueError when it is no folder."""
    raw = Path(raw).absolute()
    if not raw.is_dir():
        raise ValueError(
            f"raw folder {raw} does not exist: give the folder that holds the data set"
        )
    return raw


def walk(raw: Path) -> Iterator[Path]:
    """Files below `raw`, sorted, links followed once, hidden ones and macOS leftovers left out."""
    seen = set()
    for place, folders, names in os.walk(raw, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] not in "._")
        if real not in seen:
            yield from (Path(place) / name for name in sorted(names) if name[0] != ".")
        seen.add(real)


def found(raw: Path, pattern: str) -> list[Path]:
    """Files of this name in `raw` or the folders right below it."""
    return sorted(raw.glob(pattern)) + sorted(raw.glob(f"*/{pattern}"))


def only(raw: str | Path, pattern: str, what: str) -> Path:
    """The one file of this name in or right below `raw`, or `raw` itself if it is a file;
    ValueError for none or several."""
    raw = Path(raw).absolute()
    files = [raw] if raw.is_file() else found(folder(raw), pattern)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{raw} should hold {what} named {pattern}, one of them; found {names}")
    return files[0]


def nothing_known(raw: Path, wanted: str) -> ValueError:
    """The error to raise for a folder or file that no reader understands."""
    return ValueError(f"nothing known in {raw}: it should hold one of {wanted}")


def field(entry: Any, name: str, kind: type, where: str | Path) -> Any:
    """`entry[name]`, which must be there and of this kind; `where` says in the ValueError which
    entry it was."""
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise ValueError(
            f"{where} has no {name} ({kind.__name__}): check that the file is whole and of this "
            "format"
        )
    return entry[name]


class Expected(str):
    """Where a missing image was expected; `searched`: the folders in which it is not."""

    searched: str

    def __new__(cls, path: str, searched: str) -> "Expected":
        made = super().__new__(cls, path)
        made.searched = searched
        return made


class Listing:
    """Image files of some folders below `base`, or below those in `also`, each listed once; what is
    named first wins."""

    def __init__(self, base: Path, *folders: str, also: Sequence[Path] = ()) -> None:
        self.bases, self.folders = [each.absolute() for each in (base, *also)], folders
        self.listed: dict[Path, dict[str, str]] = {}
        self.places: dict[str, list[Path]] = {}

    def find(self, *names: str, folder: str = "") -> str:
        """Absolute path of the first of `names` that exists; else where the first name was
        expected, as `Expected`."""
        if folder not in self.places:
            # "images" and the folder an entry names may be nested either way.
            nested = [f"{outer}/{folder}" for outer in self.folders if outer and folder]
            folders = [*([folder] if folder else []), *self.folders, *nested]
            self.places[folder] = [base / name for base in self.bases for name in folders]
        for place in self.places[folder]:
            if place not in self.listed:
                self.listed[place] = (
                    {entry.name: entry.path for entry in os.scandir(place)}
                    if place.is_dir()
                    else {}
                )
            for name in names:
                if name in self.listed[place]:
                    return self.listed[place][name]
        return expected(self.places[folder], names[0], self.bases[0])


def expected(places: Sequence[Path], name: str, base: Path) -> Expected:
    """The path of a missing image in the first of `places`; those below `base` are named from
    there."""
    shown = [
        os.path.relpath(place, base) if place.is_relative_to(base) else str(place)
        for place in places
    ]
    return Expected(str(places[0] / name), f"{', '.join(dict.fromkeys(shown))} of {base}")


# Splits -------------------------------------------------------------------------------------------


def split(
    records: Iterable[Record], raw: str | Path, *, held_out: float = HELD_OUT
) -> Iterator[Pair]:
    """Give records of `image_folder` or `text_files` their splits: by the folders train, val, test
    right below `raw`.

    Without a val folder, a share `held_out` of what would be train becomes val, chosen by hash of
    the id.
    """
    names = folder_splits(folder(raw))
    for record in records:
        name = names.get(record["id"].partition("/")[0], "train")
        yield (
            or_held_out(name, record["id"], has_val="val" in names.values(), held_out=held_out),
            record,
        )


def folder_splits(raw: Path) -> dict[str, str]:
    """The folders right below `raw` that are called like a split, and which."""
    return {
        path.name: SPLITS[path.name.lower()]
        for path in raw.iterdir()
        if path.name.lower() in SPLITS
    }


def named_split(file: Path, raw: Path) -> str:
    """The split that the file's name holds (captions_val2017.csv, cc12m-train-0000.tar) or a folder
    below `raw`; else ''."""
    words = [
        *re.split(r"[._-]", file.stem)[::-1],
        *file.parent.relative_to(raw if raw.is_dir() else raw.parent).parts[::-1],
    ]
    return next((SPLITS[word.lower()] for word in words if word.lower() in SPLITS), "")


def subset(file: Path) -> str:
    """`val2014` of v2_OpenEnded_mscoco_val2014_questions.json; train where the name says
    nothing."""
    return next(
        (part for part in reversed(file.stem.split("_")) if part.lower() in SPLITS), "train"
    )


def or_held_out(name: str, key: str, *, has_val: bool, held_out: float = HELD_OUT) -> str:
    """The split `name`; where the owners made no val, val for the share of train that the hash of
    `key` holds out."""
    return "val" if name == "train" and not has_val and holdout(key, held_out) else name


def holdout(key: str, share: float) -> bool:
    """Whether `key` (say an image's name: its questions stay together) is in the held-out share;
    the same for ever."""
    return (
        int.from_bytes(blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
        < share * 2**64
    )


def split_name(name: str, where: str) -> str:
    """The split that a file calls `name`; ValueError for a word that is none."""
    if name.lower() not in SPLITS:
        raise ValueError(f"{where} is of split {name!r}: use one of {', '.join(SPLITS)}")
    return SPLITS[name.lower()]
