"""Images with one class each in a list or a table: classes.tsv, CSV, TSV and JSON lines.

Labels count the sorted classes from 0. Numbers in a table are the labels themselves.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from beit3.data.prepare.formats.class_names import ClassifiedImages, find_class_names
from beit3.data.prepare.formats.files import ImageFinder, find_folder
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.table_labels import number_labels, parse_label_cell
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, TableRow, read_table_rows
from beit3.files import read_lines

LABEL_COLUMNS = ("label", "class", "category", "label_name", "class_name")

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
    cells = {
        row.location: parse_label_cell(row.cells["label"], row.location, row.split)
        for row in rows
        if not row.fault
    }
    names, labels = number_labels(cells, folder)
    return ClassifiedImages(names, _make_records(rows, cells, labels))


def _make_records(
    rows: Sequence[TableRow], cells: Mapping[str, str], labels: Mapping[str, int]
) -> Iterator[SplitRecord]:
    """Yields the records of a table's rows, whose label cells are given by location."""
    # By path: the images of train/ and test/ may have the same names.
    num_rows = Counter(os.path.normpath(row.image_path) for row in rows)
    for row in rows:
        cell = cells.get(row.location, "")
        fault = row.fault
        if not fault and cell not in labels and row.split != "test":
            fault = f"its label is {cell!r}, which stands for none" if cell else "it has no label"
        if not fault and num_rows[os.path.normpath(row.image_path)] > 1:
            fault = (
                f"{row.image_name} has {num_rows[os.path.normpath(row.image_path)]} rows, and can "
                "have one class"
            )
        if fault:
            yield row.split, {"id": row.location, "fault": fault}
            continue
        record = {"id": str(row.cells["id"]) or row.image_name, "image": row.image_path}
        yield row.split, record | {"label": labels[cell]} if cell in labels else record
