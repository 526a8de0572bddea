"""Readable names of the classes of classified images, from the lists that lie beside the images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from beit3.data.prepare.formats.files import find_files
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.files import read_lines

SYNSET_MAPPING = "LOC_synset_mapping.txt"
"""Kaggle's list of ImageNet's classes."""
CLASS_LIST = "classes.txt"
NAME_FILES = (SYNSET_MAPPING, "classes.tsv", CLASS_LIST)
"""Files that name the classes, beside their folders; the first that exists counts."""


class ClassifiedImages(NamedTuple):
    """A dataset of images with one class each."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    records: Iterator[SplitRecord]
    """(split, {id, image, label}); `label` is missing in a test split without labels."""


def find_class_names(raw: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns a readable name of each class.

    It comes from the first of `NAME_FILES` in `raw` or right below it (Kaggle's also up to three
    folders above); a class that is not named there is called as in `classes`.
    """
    files = [file for name in NAME_FILES for file in find_files(raw, name)]
    files += find_files_above(raw, SYNSET_MAPPING)
    names = _read_names(files[0], classes) if files else {}
    readable = (" ".join(names.get(name, name).replace("_", " ").split()) for name in classes)
    return tuple(name or original for name, original in zip(readable, classes, strict=True))


def find_files_above(raw: Path, name: str) -> list[Path]:
    """Returns the files of this name in the three folders above `raw`.

    Kaggle unpacks ImageNet's lists three folders above its images.
    """
    return [folder / name for folder in raw.parents[:3] if (folder / name).is_file()]


def keep_first_synonyms(names: Sequence[str]) -> list[str]:
    """Returns the first synonym of each name: "tench" of "tench, Tinca tinca".

    A name whose first synonym is also another's stays complete.
    """
    first_synonyms = [name.partition(",")[0] for name in names]
    uses = Counter(first_synonyms)
    return [
        first if uses[first] == 1 else name
        for first, name in zip(first_synonyms, names, strict=True)
    ]


def _read_names(file: Path, classes: Sequence[str]) -> dict[str, str]:
    """Returns class -> name from a list of classes and names, or of names in the classes' order."""
    lines = [line.strip() for line in read_lines(file) if line.strip()]
    names = _parse_named_classes(lines, set(classes))
    if file.name == SYNSET_MAPPING:
        return dict(zip(names, keep_first_synonyms([*names.values()]), strict=True))
    return names or _match_by_order(lines, classes)


def _parse_named_classes(lines: Sequence[str], classes: set[str]) -> dict[str, str]:
    """Returns class -> name from lines that hold both, "n01440764 tench" or in columns.

    The class is in the first or second column, the name behind it.
    """
    names: dict[str, str] = {}
    for line in lines:
        if _is_class(line, classes):
            continue  # a line that is a class itself gives no other name
        cells = line.split("\t") if "\t" in line else line.split(maxsplit=1)
        named_cells = zip(cells[:2], cells[1:3], strict=False)
        names |= {cell: name for cell, name in named_cells if cell in classes}
    return names


def _match_by_order(lines: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Returns class -> name where there are as many lines as classes and none is a class.

    Classes that are numbers are taken in numeric order.
    """
    known_classes = set(classes)
    if len(lines) != len(classes) or any(_is_class(line, known_classes) for line in lines):
        return {}
    if all(name.isdecimal() for name in classes):
        classes = sorted(classes, key=int)
    return dict(zip(classes, lines, strict=True))


def _is_class(line: str, classes: set[str]) -> bool:
    """Returns whether a line is the name of a class folder, perhaps written with spaces."""
    return line.replace(" ", "_") in classes
