"""Readable names of the classes of classified images, from the lists that lie beside the images."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from beit3.data.prepare.formats.files import find_files
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.stores.label_names import LIST_KEYS, parse_names, read_class_names
from beit3.files import read_json, read_lines

SYNSET_MAPPING = "LOC_synset_mapping.txt"
"""Kaggle's list of ImageNet's classes."""
CLASS_LIST = "classes.txt"
NAME_FILES = (
    SYNSET_MAPPING,
    "classes.tsv",
    CLASS_LIST,
    "classes.json",
    "imagenet_class_index.json",
    "id2label.json",
)
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
    files = find_name_lists(raw)
    names = _read_names(files[0], classes) if files else {}
    return tuple(_make_readable(names.get(name, name)) or name for name in classes)


def read_name_list(file: Path) -> tuple[str, ...]:
    """Returns the readable names in one of `NAME_FILES`, whose order is that of the labels.

    Raises ValueError where it is no list of names, or their order is not clear.
    """
    names: Sequence[str] = read_class_names(file)
    if file.name == SYNSET_MAPPING:
        names = keep_first_synonyms(names)
    return tuple(_make_readable(name) or name for name in names)


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


def find_name_lists(raw: Path) -> list[Path]:
    """Returns the files that may name classes, in `raw` or right below it; the first counts.

    Kaggle's also lies up to three folders above.
    """
    files = [file for name in NAME_FILES for file in find_files(raw, name)]
    return files + find_files_above(raw, SYNSET_MAPPING)


# Joining names to classes -------------------------------------------------------------------------


class NameEntry(NamedTuple):
    """An entry of a list of names."""

    text: str
    """The entry as it stands there."""
    keys: tuple[tuple[str, str], ...]
    """Pairs of what may be a class, and its name in that case."""


def _read_names(file: Path, classes: Sequence[str]) -> dict[str, str]:
    """Returns class -> name from a list of classes and names, or of names in the classes' order.

    Raises ValueError where the list can be read in two ways.
    """
    if file.suffix == ".json":
        entries = _read_json_entries(file)
    else:
        entries = [_parse_line(line) for line in _read_filled_lines(file)]
    class_set = set(classes)
    keyed_names = _find_keyed_names(entries, class_set, file)
    if file.name == SYNSET_MAPPING and not keyed_names and all(map(_is_decimal, classes)):
        return _match_by_order(read_name_list(file), classes, file)
    if file.name == SYNSET_MAPPING:
        first_synonyms = keep_first_synonyms([*keyed_names.values()])
        return dict(zip(keyed_names, first_synonyms, strict=True))
    if any(_is_class(entry.text, class_set) for entry in entries):
        return keyed_names
    if not keyed_names:
        return _match_by_order([entry.text for entry in entries], classes, file)
    if len(entries) == len(classes) and len(keyed_names) < len(classes):
        key = next(iter(keyed_names))
        raise ValueError(
            f"{file} can be read in two ways: as one name per class in their order, or by lines "
            f"that begin with a class, as {key!r} does: begin every line with its class"
        )
    return keyed_names


def _read_filled_lines(file: Path) -> list[str]:
    """Returns the lines that are not blank."""
    return [line.strip() for line in read_lines(file) if line.strip()]


def _read_json_entries(file: Path) -> list[NameEntry]:
    """Returns the entries of {class: name}, of Keras' {"0": [class, name]}, or of a list."""
    content = read_json(file)
    if isinstance(content, dict) and not any(key in content for key in LIST_KEYS):
        entries = []
        for key, value in content.items():
            cells = [key, *(value if isinstance(value, list) else [value])]
            if not all(isinstance(cell, str) for cell in cells):
                return [NameEntry(name, ()) for name in parse_names(content, file)]
            entries.append(NameEntry(cells[-1], tuple((cell, cells[-1]) for cell in cells[:-1])))
        if all(_is_decimal(key) for key in content):
            numbered = zip(map(int, content), entries, strict=True)
            return [entry for _, entry in sorted(numbered, key=lambda pair: pair[0])]
        return entries
    return [NameEntry(name, ()) for name in parse_names(content, file)]


def _parse_line(line: str) -> NameEntry:
    """Parses a line that may hold a class and its name, "n01440764 tench" or in columns.

    The class is in the first or second column, the name behind it.
    """
    cells = line.split("\t") if "\t" in line else line.split(maxsplit=1)
    return NameEntry(line, tuple(zip(cells[:2], cells[1:3], strict=False)))


def _find_keyed_names(
    entries: Sequence[NameEntry], classes: set[str], file: Path
) -> dict[str, str]:
    """Returns class -> name of the entries that hold both.

    Raises ValueError for two names of one class.
    """
    names: dict[str, str] = {}
    for entry in entries:
        if _is_class(entry.text, classes):
            continue  # an entry that is a class itself gives no other name
        for key, name in entry.keys:
            if key not in classes:
                continue
            if names.setdefault(key, name) != name:
                raise ValueError(f"{file} names class {key!r} twice: remove one of its lines")
    return names


def _match_by_order(names: Sequence[str], classes: Sequence[str], file: Path) -> dict[str, str]:
    """Returns class -> name where there are as many names as classes.

    Classes that are numbers are taken in numeric order. Raises ValueError where their order as
    people count, c2 before c10, is not that of the labels.
    """
    has_number_classes = all(_is_decimal(name) for name in classes)
    if len(names) != len(classes):
        if has_number_classes:
            raise ValueError(
                f"{file} lists {len(names)} names for the {len(classes)} classes "
                f"{', '.join(classes[:3])} ...: begin every line with its class"
            )
        return {}
    if has_number_classes:
        return dict(zip(sorted(classes, key=int), names, strict=True))
    natural_order = sorted(classes, key=_make_natural_key)
    if natural_order != list(classes):
        index = next(k for k, name in enumerate(natural_order) if name != classes[k])
        raise ValueError(
            f"{file} names the classes by their order, and line {index + 1} may mean "
            f"{natural_order[index]!r} (as people count) or {classes[index]!r} (as labels are "
            f"sorted): begin every line with its class, as in '{natural_order[index]} "
            f"{names[index]}'"
        )
    return dict(zip(classes, names, strict=True))


def _make_natural_key(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts c2 before c10, and without regard to case."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _make_readable(name: str) -> str:
    """Returns a name with single spaces, also for underscores."""
    return " ".join(name.replace("_", " ").split())


def _is_decimal(name: str) -> bool:
    """Returns whether the name of a class consists of digits."""
    return name.isascii() and name.isdecimal()


def _is_class(line: str, classes: set[str]) -> bool:
    """Returns whether a line is the name of a class folder, perhaps written with spaces."""
    return line.replace(" ", "_") in classes or line in classes
