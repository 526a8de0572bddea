"""Reads the cells of one table (CSV, TSV, JSON lines or a JSON list) by the columns asked for."""

import csv
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from beit3.files import read_json_lines, read_json_list, read_lines

ColumnNames = Mapping[str, tuple[str, ...]]
"""A reader's name of a column -> the names that a table may give it.

Case is ignored; of several names the first counts.
"""

JSON_SUFFIXES = (".json", ".jsonl")
DELIMITERS = ",\t|;"


class Cells(NamedTuple):
    """The cells of a row that were asked for, or why the row has none."""

    location: str
    """"all.csv line 7", for messages and ids."""
    values: dict[str, Any]
    """A reader's name of a column -> the value. "" where the table lacks it."""
    fault: str = ""


def read_cells(file: Path, needed: ColumnNames, optional: ColumnNames) -> Iterator[Cells]:
    """Yields the cells of each row of a table.

    Args:
        file: The table.
        needed: Columns that the table must have.
        optional: Columns that it may have.

    Raises:
        ValueError: The file cannot be read or lacks a needed column.
    """
    if file.suffix.lower() in JSON_SUFFIXES:
        yield from _read_json_cells(file, needed, optional)
    else:
        yield from _read_csv_cells(file, needed, optional)


def may_name_splits(file: Path, needed: ColumnNames, optional: ColumnNames) -> bool:
    """Returns whether rows of a table may name their splits; of a CSV only the header is read."""
    if file.suffix.lower() in JSON_SUFFIXES:
        return True
    column_names, _ = _read_header(next(read_lines(file), ""), file)
    return bool(_match_columns(column_names, needed, optional, file)["split"])


def make_url_error(location: str | Path) -> ValueError:
    """Returns the error for a table that names images by URL: nothing is downloaded here."""
    return ValueError(
        f"{location} names images by url: download them first, for example with img2dataset, and "
        "give its tar files as --raw"
    )


def _read_json_cells(file: Path, needed: ColumnNames, optional: ColumnNames) -> Iterator[Cells]:
    """Yields the cells of JSON objects, each of which may have its own columns."""
    read_entries = read_json_lines if file.suffix.lower() == ".jsonl" else read_json_list
    for location, entry in read_entries(file):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{location} holds a {type(entry).__name__}: it should be an object with an "
                f"{', a '.join(needed)}"
            )
        entry = {name.lower(): value for name, value in entry.items()}
        column_names = _match_columns(entry, needed, optional, location)
        values = {
            column: _clean_json_value(entry[name]) if name else ""
            for column, name in column_names.items()
        }
        yield Cells(location, values)


def _clean_json_value(value: Any) -> Any:
    """Returns a text without surrounding spaces, "" for null, and any other value unchanged."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else value


def _read_csv_cells(file: Path, needed: ColumnNames, optional: ColumnNames) -> Iterator[Cells]:
    """Yields the cells of the rows below a header. A row of another length is a fault."""
    lines = read_lines(file)
    header, delimiter = _read_header(next(lines, ""), file)
    column_names = _match_columns(header, needed, optional, file)
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for cells in reader:
            location = f"{file} line {reader.line_num + 1}"
            row = dict(zip(header, map(str.strip, cells), strict=False))
            if len(cells) == len(header):
                # A header may have an empty name, as pandas writes its index: `row[""]` is no value
                # of a column that the table lacks.
                values = {
                    column: row[name] if name else "" for column, name in column_names.items()
                }
                yield Cells(location, values)
            elif any(row.values()):  # Flickr30k's results.csv has one such line
                fault = (
                    f"{len(cells)} cells for {len(header)} columns: put quotes around cells with "
                    f"{delimiter!r}"
                )
                yield Cells(location, {}, fault)
    except csv.Error as error:
        raise ValueError(
            f"{file} line {reader.line_num + 1} cannot be read ({error}): check its quotes"
        ) from None


def _read_header(line: str, file: Path) -> tuple[list[str], str]:
    """Returns the column names of a first line in lower case, and the delimiter."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(DELIMITERS, key=line.count)
    names = next(csv.reader([line], delimiter=delimiter), [])
    return [name.strip().lower() for name in names], delimiter


def _match_columns(
    table_names: Collection[str],
    needed: ColumnNames,
    optional: ColumnNames,
    location: str | Path,
) -> dict[str, str]:
    """Returns column -> the table's name of it, "" where the table lacks an optional column.

    Raises ValueError for a missing needed column.
    """
    column_names = {
        column: next((name for name in accepted if name in table_names), "")
        for column, accepted in {**optional, **needed}.items()
    }
    if not column_names["image"] and any(
        name.endswith("url") or "://" in name for name in table_names
    ):
        raise make_url_error(location)
    if not all(column_names[column] for column in needed):
        shown = ", ".join(_shorten(name) for name in list(table_names)[:8]) or "none"
        wanted = " and ".join(_describe_column(accepted) for accepted in needed.values())
        raise ValueError(f"{location} has the columns {shown}: name {wanted}")
    return column_names


def _describe_column(accepted: tuple[str, ...]) -> str:
    """Returns "one text (or caption, title)" for the names that a column may have."""
    alternatives = f" (or {', '.join(accepted[1:6])})" if len(accepted) > 1 else ""
    return f"one {accepted[0]}{alternatives}"


def _shorten(name: str) -> str:
    """Returns a column's name in quotes, cut to 30 characters."""
    return repr(name[:30] + ("..." if len(name) > 30 else ""))
