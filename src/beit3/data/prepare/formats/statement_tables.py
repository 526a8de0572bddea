"""Reads tables of statements about two images, true or false."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import get_field
from beit3.data.prepare.formats.nlvr import parse_label
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.table_cells import ColumnNames
from beit3.data.prepare.formats.tables import (
    IMAGE_COLUMNS,
    OPTIONAL_COLUMNS,
    TEXT_COLUMNS,
    TableRow,
    find_image,
    read_table_rows,
)

STATEMENT_COLUMNS: ColumnNames = {
    "image": ("image", "image1", "left", *IMAGE_COLUMNS[1:]),
    "image2": ("image2", "right"),
    "text": TEXT_COLUMNS,
}
LABEL_COLUMNS: ColumnNames = {
    **OPTIONAL_COLUMNS,
    "label": ("label", "answer"),
    "group": ("group",),
}


def read_statement_tables(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads tables with image, image2, text, label, and optionally id, split and group.

    The label is true, false, 1, 0, yes or no; the group is by default the text. A row without a
    label is a fault, except in a test split.
    """
    num_statements: Counter[str] = Counter()
    """Image -> number of its statements so far."""
    for row in read_table_rows(raw, STATEMENT_COLUMNS, LABEL_COLUMNS):
        fault = row.fault or _find_missing_cell(row)
        if fault:
            yield row.split, {"id": row.location, "fault": fault}
            continue
        cells = row.cells
        text = get_field(cells, "text", str, row.location)
        image2 = find_image(row.file, get_field(cells, "image2", str, row.location))
        label = {}
        if cells["label"] != "":
            label = {"label": parse_label(cells["label"], row.location)}
        id = str(cells["id"]) or f"{row.image_name}#{num_statements[row.image_name]}"
        num_statements[row.image_name] += 1
        record = {"id": id, "image": row.image_path, "image2": image2, "text": text}
        yield row.split, record | label | {"group": str(cells["group"]) or text}


def _find_missing_cell(row: TableRow) -> str:
    """Returns a fault for a row without the second image or without a label, else ""."""
    if row.cells.get("image2", "") == "":
        return "it has no image2"
    if row.cells.get("label", "") == "" and row.split != "test":
        return "it has no label"
    return ""
