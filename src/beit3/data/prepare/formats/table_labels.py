"""Reads the labels of a table: names of classes, or numbers that count the classes from 0.

What can be read in two ways is refused: numbers from 1, numbers with wide gaps, -1, and classes
that differ in case or spaces alone.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.class_names import (
    find_class_names,
    find_name_lists,
    read_name_list,
)
from beit3.data.stores.literals import list_items

MAX_CLASSES = 100_000
"""A larger number in a table is not a label; ImageNet-21k has 21,841 classes."""
NULL_CELLS = frozenset({"nan", "NaN", "NAN", "<NA>", "NaT"})
"""Texts that pandas writes for a missing value."""
NULL_NUMBERS = NULL_CELLS | {"None", "none", "null", "NULL", "NA", "N/A", "n/a", "-", "?"}
"""Texts that stand for none among numbers; among names they may be classes."""
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)

SEVERAL_NUMBERS = re.compile(r"[({][\d\s.+-]+,[\d\s.,+-]*[)}]", re.ASCII)
"""A tuple or set of numbers, as Python writes them."""


def parse_label_cell(value: Any, location: str, split: str) -> str:
    """Returns the label in a cell as a text, "" where there is none.

    Whole numbers lose their ".0" later, where all labels are known. In a test split -1 is none, as
    Hugging Face's datasets have it.

    Raises:
        ValueError: The cell holds several labels, or an object; or -1 in another split.
    """
    labels = list_items(value)
    is_several = len(labels) > 1 or SEVERAL_NUMBERS.fullmatch(str(value).strip())
    if is_several or isinstance(value, dict) or any(isinstance(x, dict) for x in labels):
        raise ValueError(
            f"{location} has label {str(value)[:40]!r}: an image can have one class, a name or a "
            "number from 0"
        )
    label = unicodedata.normalize("NFC", " ".join(str(labels[0]).split())) if labels else ""
    if NUMBER.fullmatch(label) and float(label) == -1:
        if split == "test":
            return ""
        raise ValueError(
            f"{location} has label {label}, which may mean that it has none, or be a class: leave "
            "the cell empty, or number the classes from 0"
        )
    return label


def number_labels(cells: Mapping[str, str], folder: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the readable names of the classes in the order of the labels, and cell -> label.

    Args:
        cells: Location -> label as it is written, "" for none. Those that are not in the result
            stand for none.
        folder: Folder in which lists of class names may lie.

    Raises:
        ValueError: The labels can be read in two ways, or are beyond the classes of a list.
    """
    values = set(cells.values()) - {""}
    if values <= NULL_NUMBERS:
        values -= NULL_CELLS
    if values and values - NULL_NUMBERS and all(map(NUMBER.fullmatch, values - NULL_NUMBERS)):
        return _number_numbers(
            {location: cell for location, cell in cells.items() if NUMBER.fullmatch(cell)}, folder
        )
    classes = sorted(values - NULL_CELLS)
    _check_spellings(cells, classes)
    labels = {name: label for label, name in enumerate(classes)}
    return find_class_names(folder, classes), labels


def _check_spellings(cells: Mapping[str, str], classes: list[str]) -> None:
    """Raises ValueError for two classes that differ in case, hyphens or underscores alone."""
    spellings: dict[str, str] = {}
    for name in classes:
        key = " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
        other = spellings.setdefault(key, name)
        if other != name and len(name) > 1:
            locations = {cell: location for location, cell in reversed([*cells.items()])}
            raise ValueError(
                f"{locations[name]} has label {name!r} and {locations[other]} has {other!r}, which "
                "may be one class or two: write one of them alike, or make the names differ"
            )


def _number_numbers(
    cells: Mapping[str, str], folder: Path
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the names of classes whose labels are numbers, and cell -> label.

    They are those of a list beside the table, else "0", "1", ... up to the largest label.
    """
    labels: dict[str, int] = {}
    for location, cell in cells.items():
        number = float(cell)
        if not number.is_integer() or number < 0:
            raise ValueError(
                f"{location} has label {cell}, which is no class: number the classes from 0, or "
                "write names"
            )
        labels[cell] = int(number)
    locations = {labels[cell]: location for location, cell in cells.items()}
    numbers = set(labels.values())
    largest = max(numbers)
    files = find_name_lists(folder)
    if files:
        names = read_name_list(files[0])
        num_classes = len(names)
        limit = f"{files[0]} names {num_classes} classes, 0 to {num_classes - 1}"
    else:
        num_classes = min(largest + 1, MAX_CLASSES)
        names = tuple(map(str, range(num_classes)))
        limit = f"labels go up to {MAX_CLASSES - 1}"
    if largest >= num_classes:
        raise ValueError(
            f"{locations[largest]} has label {largest}, but {limit}: number them from 0, or write "
            "names"
        )
    if not files:
        _check_clear(numbers, locations)
    return names, labels


def _check_clear(numbers: set[int], locations: Mapping[int, str]) -> None:
    """Raises ValueError for numbers that may count from 0 or from 1, or be names of classes."""
    smallest, largest = min(numbers), max(numbers)
    remedy = (
        "number them from 0, or put a classes.txt with the names of all classes from 0 beside the "
        "table"
    )
    if smallest > 0:
        second = "count from 1" if smallest == 1 else "be names of classes"
        raise ValueError(
            f"{locations[smallest]} has the smallest label, {smallest}: labels {smallest} to "
            f"{largest} may count from 0, where class 0 has no image, or {second}: {remedy}"
        )
    if 2 * len(numbers) < largest + 1:
        raise ValueError(
            f"{locations[largest]} has the largest label, {largest}, but {len(numbers)} are used: "
            f"they may be labels of {largest + 1} classes, or names of {len(numbers)}: {remedy}"
        )
