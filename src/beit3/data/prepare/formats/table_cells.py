"""Reads the cells of one table (CSV, TSV, JSON lines or a JSON list) by the columns asked for."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.delimited import open_table
from beit3.files import read_json_lines, read_json_list
from beit3.images import SUFFIXES

ColumnNames = Mapping[str, tuple[str, ...]]
"""A reader's name of a column -> the names that a table may give it.

Case is ignored; of several names the first counts.
"""

JSON_SUFFIXES = (".json", ".jsonl")


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
    return bool(_match_columns(open_table(file).columns, needed, optional, file)["split"])


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
        column_names = _match_columns([name.lower() for name in entry], needed, optional, location)
        entry = {name.lower(): value for name, value in entry.items()}
        values = {
            column: _clean_json_value(entry[name]) if name else ""
            for column, name in column_names.items()
        }
        yield Cells(location, values)


def _clean_json_value(value: Any) -> Any:
    """Returns a text without surrounding spaces, "" for null and NaN, any other value unchanged."""
    if value is None or value != value:
        return ""
    return value.strip() if isinstance(value, str) else value


def _read_csv_cells(file: Path, needed: ColumnNames, optional: ColumnNames) -> Iterator[Cells]:
    """Yields the cells of the rows below a header. A row of another length is a fault."""
    table = open_table(file)
    column_names = _match_columns(table.columns, needed, optional, file)
    for line_number, cells in table.rows:
        location = f"{file} line {line_number}"
        if len(cells) == len(table.columns):
            row = dict(zip(table.columns, cells, strict=True))
            # A header may have an empty name, as pandas writes its index: `row[""]` is no value of
            # a column that the table lacks.
            values = {column: row[name] if name else "" for column, name in column_names.items()}
            yield Cells(location, values)
        else:  # Flickr30k's results.csv has one such line
            fault = (
                f"{len(cells)} cells for {len(table.columns)} columns: put quotes around cells "
                f"with {table.delimiter!r}"
            )
            yield Cells(location, {}, fault)


def _match_columns(
    table_names: Sequence[str],
    needed: ColumnNames,
    optional: ColumnNames,
    location: str | Path,
) -> dict[str, str]:
    """Returns column -> the table's name of it, "" where the table lacks an optional column.

    Raises ValueError for a needed column that is missing, or one that the table has twice.
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
        if any(name.endswith(tuple(SUFFIXES)) for name in table_names):
            wanted += "; its first line looks like data: put the names of the columns above it"
        raise ValueError(f"{location} has the columns {shown}: name {wanted}")
    for name in filter(None, column_names.values()):
        if table_names.count(name) > 1:
            raise ValueError(
                f"{location} has {table_names.count(name)} columns {name!r}, and either may be "
                "meant: rename all but one"
            )
    return column_names


def _describe_column(accepted: tuple[str, ...]) -> str:
    """Returns "one text (or caption, title)" for the names that a column may have."""
    alternatives = f" (or {', '.join(accepted[1:6])})" if len(accepted) > 1 else ""
    return f"one {accepted[0]}{alternatives}"


def _shorten(name: str) -> str:
    """Returns a column's name in quotes, cut to 30 characters."""
    return repr(name[:30] + ("..." if len(name) > 30 else ""))
