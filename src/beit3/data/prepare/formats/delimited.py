"""Splits delimited text (CSV, TSV) into rows of cells, without losing a row to a stray quote.

In a TSV quotes are part of the text. In a CSV a cell in quotes may hold delimiters and a few line
ends; a quote that is never closed, or closed in a later row, is an error that names its line.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from beit3.files import read_lines
from beit3.images import SUFFIXES

DELIMITERS = ",\t|;"
MAX_ROW_LINES = 20
"""Lines that the row of a CSV may have; captions and answers have one or a few."""
FILE_SUFFIX = re.compile(r"(?<=[^\s.])\.[A-Za-z][A-Za-z0-9]{1,4}$")
"""The ending of a file's name."""


class Row(NamedTuple):
    """A row below the header."""

    line_number: int
    """Number of the row's first line, from 1."""
    cells: list[str]
    """Cells without surrounding spaces, as many as the header has unless the row is ragged."""


class Table(NamedTuple):
    """A table whose header was read."""

    columns: list[str]
    """Names of the columns in lower case, without empty ones at the end."""
    delimiter: str
    rows: Iterator[Row]
    """The rows that hold anything, in order."""


def open_table(file: Path) -> Table:
    """Reads the header of a CSV or TSV. The rows are read while `rows` is consumed.

    Blank lines before the header are skipped. Excel's first line `sep=;` names the delimiter. Else
    it is the tab in a .tsv, and in other files the one that splits the header into most columns.

    Raises:
        ValueError: The file cannot be read, now or while its rows are read.
    """
    lines = _number_lines(file)
    line_number, header = next(lines, (1, ""))
    delimiter = _parse_delimiter_line(header)
    if delimiter:
        line_number, header = next(lines, (line_number + 1, ""))
    is_tsv = file.suffix.lower() == ".tsv"
    if not delimiter:
        delimiter = "\t" if is_tsv else _choose_delimiter(header)
    has_quoted_header = header.lstrip().startswith('"')
    if is_tsv and not has_quoted_header:
        columns = _split_tsv_line(header, delimiter)
    else:
        columns = _split_csv_line(header, delimiter)
    columns = [name.strip().lower() for name in columns]
    while columns and not columns[-1]:
        columns.pop()
    if is_tsv and not has_quoted_header:
        rows: Iterable[Row] = (
            Row(number, _split_tsv_line(line, delimiter)) for number, line in lines
        )
    else:
        rows = _CsvRows(file, lines, delimiter, len(columns))
    return Table(columns, delimiter, _clean_rows(rows, len(columns)))


def _number_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line) from the first line that is not blank.

    Raises ValueError for NUL characters, which text does not hold.
    """
    has_begun = False
    for number, line in enumerate(read_lines(file), 1):
        if "\0" in line:
            raise ValueError(
                f"{file} line {number} holds a NUL character: the file is damaged, or UTF-16 "
                "without a byte order mark; save it as UTF-8"
            )
        has_begun = has_begun or bool(line.strip())
        if has_begun:
            yield number, line


def _clean_rows(rows: Iterable[Row], num_columns: int) -> Iterator[Row]:
    """Strips cells, drops empty ones beyond the header, and skips rows that hold nothing."""
    for number, cells in rows:
        cells = [cell.strip() for cell in cells]
        while len(cells) > num_columns and not cells[-1]:
            cells.pop()
        if any(cells):
            yield Row(number, cells)


# Delimiters ---------------------------------------------------------------------------------------


def _parse_delimiter_line(line: str) -> str:
    """Returns the delimiter that Excel's `sep=;` names, or "" for any other line."""
    content = line.strip(" \r\n").strip('"')
    if not content.lower().startswith("sep="):
        return ""
    delimiter = content[len("sep=") :]
    if delimiter == "\\t":
        return "\t"
    return delimiter if len(delimiter) == 1 else ""


def _choose_delimiter(header: str) -> str:
    """Returns the delimiter that splits a header into most columns."""
    return max(DELIMITERS, key=lambda delimiter: len(_split_csv_line(header, delimiter)))


# Lines --------------------------------------------------------------------------------------------


def _split_csv_line(line: str, delimiter: str) -> list[str]:
    """Splits one line of CSV into cells."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return line.split(delimiter)


def _split_tsv_line(line: str, delimiter: str) -> list[str]:
    """Splits a line of TSV into cells, in which quotes are part of the text.

    A cell such as `"the ""red"" dog"`, which can only have been written as CSV, is read so.
    """
    return [_unquote(cell.strip()) for cell in line.rstrip("\r\n").split(delimiter)]


def _unquote(cell: str) -> str:
    """Returns the text of a cell in quotes with doubled quotes in it, and other cells unchanged."""
    content = cell[1:-1]
    is_quoted = len(cell) > 2 and cell[0] == cell[-1] == '"'
    if is_quoted and '""' in content and '"' not in content.replace('""', ""):
        return content.replace('""', '"')
    return cell


def _find_suffix(cell: str) -> str:
    """Returns ".png" for a cell that ends like the name of a file, "" for other cells."""
    match = FILE_SUFFIX.search(cell.strip(' "\n'))
    return match[0].lower() if match and "\n" not in cell.strip() else ""


# Rows of CSV --------------------------------------------------------------------------------------


class _CsvRows:
    """Iterates over the rows of CSV text and checks the lines that each of them takes.

    Args:
        file: The file, for messages.
        lines: (number, line) below the header.
        delimiter: The delimiter.
        num_columns: Number of columns.
    """

    def __init__(
        self, file: Path, lines: Iterator[tuple[int, str]], delimiter: str, num_columns: int
    ) -> None:
        self.file, self.lines = file, lines
        self.delimiter, self.num_columns = delimiter, num_columns
        self._row_lines: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[Row]:
        reader = csv.reader(self._feed_lines(), delimiter=self.delimiter, strict=True)
        while True:
            self._row_lines = []
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells = self._read_misquoted(error)
            if cells is None:
                return
            if len(self._row_lines) > 1:
                self._check_swallowed(cells)
            yield Row(self._row_lines[0][0], cells)

    def _feed_lines(self) -> Iterator[str]:
        """Yields the lines and notes those of the current row."""
        for number, line in self.lines:
            self._row_lines.append((number, line))
            if len(self._row_lines) > MAX_ROW_LINES:
                raise self._make_quote_error(f"is not closed within {MAX_ROW_LINES} lines")
            yield line

    def _read_misquoted(self, error: csv.Error) -> list[str]:
        """Returns the cells of a row that is no CSV: of one line, such as `a.png,"Stop" on a sign`.

        Its quotes are text, if it has as many cells as the header then. Raises ValueError for
        any other row.
        """
        if len(self._row_lines) == 1:
            number, line = self._row_lines[0]
            cells = line.rstrip("\r\n").split(self.delimiter)
            if len(cells) == self.num_columns and line.count('"') % 2 == 0:
                return [_unquote(cell.strip()) for cell in cells]
            if line.count('"') % 2 == 0:
                raise ValueError(
                    f"{self.file} line {number} cannot be read ({error}): check its quotes"
                ) from None
        raise self._make_quote_error(f"is not closed ({error})") from None

    def _check_swallowed(self, cells: list[str]) -> None:
        """Raises ValueError where a cell of several lines holds what looks like further rows.

        That is more names of images than the row has cells of them. Where names of images have no
        endings, it is a second line with as many cells as the header.
        """
        suffixes = SUFFIXES | set(map(_find_suffix, cells)) - {""}
        num_images = sum(_find_suffix(cell) in suffixes for cell in cells)
        split_lines = [line.split(self.delimiter) for _, line in self._row_lines]
        if num_images:
            num_found = sum(_find_suffix(cell) in suffixes for line in split_lines for cell in line)
            is_swallowed = num_found > num_images
        else:
            is_swallowed = [len(line) for line in split_lines].count(self.num_columns) > 1
        if is_swallowed:
            raise self._make_quote_error("takes in the rows below it")

    def _make_quote_error(self, fault: str) -> ValueError:
        """Returns the error for the quote that is open at the end of the row's lines."""
        opened, is_open = self._row_lines[0][0], False
        for number, line in self._row_lines:
            if line.count('"') % 2:
                is_open = not is_open
                opened = number if is_open else opened
        return ValueError(
            f"{self.file} line {opened} opens a quote that {fault}: check its quotes; one that is "
            'part of a text is written twice, in a cell in quotes ("a ""red"" dog")'
        )
