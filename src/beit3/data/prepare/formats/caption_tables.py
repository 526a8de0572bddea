"""Captions in tables (CSV, TSV, JSON lines), one record per caption."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, TEXT_COLUMNS, read_table_rows
from beit3.data.stores.literals import list_items


def read_caption_tables(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields (split, {id: "image#k", image, text}) of a table, or of all tables in a folder.

    A cell holds a caption, or a list of captions as JSON or Python write it. k counts an image's
    captions. An `id` in JSON lines replaces the image's name in the id. A row without a text,
    with another value, or with too few or too many cells, is a record {id, fault}.
    """
    num_captions: Counter[str] = Counter()
    for row in read_table_rows(raw, {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}):
        try:
            texts, fault = _list_texts(row.cells.get("text", "")), row.fault
        except ValueError as error:
            texts, fault = [], row.fault or str(error)
        if fault or not texts:
            yield row.split, {"id": row.location, "fault": fault or "it has no text"}
            continue
        # In a CSV a column `id` counts the rows or captions.
        row_id = str(row.cells["id"]) if row.file.suffix.lower() == ".jsonl" else ""
        key = row_id or row.image_name
        for text in texts:
            record_id = f"{key}#{num_captions[key]}"
            yield row.split, {"id": record_id, "image": row.image_path, "text": text.strip()}
            num_captions[key] += 1


def _list_texts(value: Any) -> list[str]:
    """Returns the captions in a cell, of which a list of texts is several.

    `[2018]` and `(1, 2)` are captions as they stand. Raises ValueError for a value of JSON that is
    no text, and for texts in brackets without commas.
    """
    try:
        texts = list_items(value)
    except ValueError as error:
        raise ValueError(f"its text {error}") from None
    if all(isinstance(text, str) for text in texts):
        return texts
    if isinstance(value, str):
        return [value]
    raise ValueError(f"its text should be a text or a list of texts, not {str(value)[:60]}")
