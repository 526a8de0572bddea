"""Images with one class each in a list or a table: classes.tsv, CSV, TSV and JSON lines.

Labels count the sorted classes from 0. Numbers in a table are the labels themselves.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from beit3.data.prepare.formats.class_names import (
    CLASS_LIST,
    ClassifiedImages,
    find_class_names,
)
from beit3.data.prepare.formats.files import ImageFinder, find_files, find_folder
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, TableRow, read_table_rows
from beit3.files import read_lines

LABEL_COLUMNS = ("label", "class", "category", "label_name", "class_name")
MAX_CLASSES = 100_000
"""A larger number in a table is not a label; ImageNet-21k has 21,841 classes."""


# A list of images ---------------------------------------------------------------------------------


def read_class_list(raw: str | Path) -> ClassifiedImages:
    """Reads `classes.tsv` with columns index, class, name and file, and the images in `images/`.

    Records are {id: file, image, label}, all of split train.
    """
    raw = find_folder(raw)
    entries = _read_list_entries(raw / "classes.tsv")
    classes = sorted({class_name for class_name, _ in entries})
    labels = {name: label for label, name in enumerate(classes)}
    finder = ImageFinder(raw, "images", "")
    records = (
        ("train", {"id": image, "image": finder.find(image), "label": labels[class_name]})
        for class_name, image in entries
    )
    return ClassifiedImages(find_class_names(raw, classes), records)


def is_class_list(raw: Path) -> bool:
    """Returns whether `raw` holds a classes.tsv that names image files."""
    file = raw / "classes.tsv"
    return file.is_file() and is_image(Path(next(read_lines(file), "").strip()))


def _read_list_entries(file: Path) -> list[tuple[str, str]]:
    """Returns (class, image) of each line of a classes.tsv that is not blank."""
    entries = []
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 4:
            raise ValueError(
                f"{file} line {number} has {len(cells)} cells: give index, class, name and file"
            )
        entries.append((cells[1], cells[3]))
    return entries


# Tables -------------------------------------------------------------------------------------------


def read_class_tables(raw: str | Path) -> ClassifiedImages:
    """Reads tables with columns image and label, perhaps id and split.

    The label is the class's name or the label itself. Records are {id: image, image, label}. A row
    without a label is a fault, unless it is of a test split.

    Raises:
        ValueError: A label is beyond the classes that a classes.txt names. Without that file the
            largest label says how many classes there are.
    """
    raw = Path(raw).absolute()
    folder = raw if raw.is_dir() else raw.parent
    rows = list(read_table_rows(raw, {"image": IMAGE_COLUMNS, "label": LABEL_COLUMNS}))
    values = {_get_label_value(row) for row in rows if not row.fault} - {""}
    if values and all(value.isdecimal() for value in values):
        classes = _number_classes(folder, rows)
        labels = {value: int(value) for value in values}
    else:
        classes = sorted(values)
        labels = {value: label for label, value in enumerate(classes)}
    return ClassifiedImages(find_class_names(folder, classes), _make_records(rows, labels))


def _get_label_value(row: TableRow) -> str:
    """Returns the label of a row as the table writes it, or ""."""
    return str(row.cells.get("label", ""))


def _make_records(rows: Sequence[TableRow], labels: Mapping[str, int]) -> Iterator[SplitRecord]:
    """Yields the records of a table's rows."""
    # By path: the images of train/ and test/ may have the same names.
    num_rows = Counter(os.path.normpath(row.image_path) for row in rows)
    for row in rows:
        fault = _find_row_fault(row, num_rows[os.path.normpath(row.image_path)])
        if fault:
            yield row.split, {"id": row.location, "fault": fault}
            continue
        record = {"id": str(row.cells["id"]) or row.image_name, "image": row.image_path}
        value = _get_label_value(row)
        yield row.split, record | {"label": labels[value]} if value else record


def _find_row_fault(row: TableRow, num_rows: int) -> str:
    """Returns why a row makes no record, or "". `num_rows` is the number of its image's rows."""
    if row.fault:
        return row.fault
    if not _get_label_value(row) and row.split != "test":
        return "it has no label"
    if num_rows > 1:
        return f"{row.image_name} has {num_rows} rows, and can have one class"
    return ""


def _number_classes(folder: Path, rows: Sequence[TableRow]) -> list[str]:
    """Returns the classes "0", "1", ... of a table of numbers.

    There are as many as a classes.txt has lines, else up to the largest label.
    """
    labels = {
        row.location: int(_get_label_value(row))
        for row in rows
        if not row.fault and _get_label_value(row)
    }
    location = max(labels, key=lambda key: labels[key])
    largest = labels[location]
    class_lists = find_files(folder, CLASS_LIST)
    if class_lists:
        num_classes = sum(1 for line in read_lines(class_lists[0]) if line.strip())
        limit = f"{class_lists[0]} names {num_classes} classes, 0 to {num_classes - 1}"
    else:
        num_classes = min(largest + 1, MAX_CLASSES)
        limit = f"labels go up to {MAX_CLASSES - 1}"
    if largest >= num_classes:
        raise ValueError(
            f"{location} has label {largest}, but {limit}: number them from 0, or write names"
        )
    return [str(label) for label in range(num_classes)]
