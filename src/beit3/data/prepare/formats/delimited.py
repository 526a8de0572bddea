"""Splits delimited text (CSV, TSV) into rows of cells, without losing a row to a stray quote.

In a TSV quotes are part of the text; a cell of several lines there is an error that names its line.
In a CSV a cell in quotes may hold delimiters and line ends; a quote that is never closed, or closed
in a later row, is such an error too.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from beit3.files import read_lines
from beit3.images import SUFFIXES

DELIMITERS = ",\t|;"
MAX_ROW_LINES = 1000
"""Lines that the row of a CSV may have; captions and answers have one or a few, machines' more."""
FILE_SUFFIX = re.compile(r"(?<=[^\s.])\.[A-Za-z][A-Za-z0-9]{1,4}$")
"""The ending of a file's name."""
CHARACTER_KINDS = (("0", re.compile(r"\d+")), ("a", re.compile(r"[^\W\d_]+")))

csv.field_size_limit(2**31 - 1)  # 131,072 characters at first, which documents exceed


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
        rows: Iterable[Row] = _read_tsv_rows(file, lines, delimiter, len(columns))
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
        cells = _drop_empty_end([cell.strip() for cell in cells], num_columns)
        if any(cells):
            yield Row(number, cells)


def _drop_empty_end(cells: list[str], num_columns: int) -> list[str]:
    """Returns the cells without empty ones beyond the header at the end."""
    num_cells = len(cells)
    while num_cells > num_columns and not cells[num_cells - 1].strip():
        num_cells -= 1
    return cells[:num_cells]


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


# Rows of TSV --------------------------------------------------------------------------------------


def _read_tsv_rows(
    file: Path, lines: Iterable[tuple[int, str]], delimiter: str, num_columns: int
) -> Iterator[Row]:
    """Yields the rows of a TSV, of one line each.

    Raises ValueError where a cell seems to have several lines, as pandas writes them: it opens a
    quote that stays open, and this line or the next has not the cells of the header.
    """
    open_line = 0
    for number, line in lines:
        if not line.strip():
            continue
        cells = _drop_empty_end(line.rstrip("\r\n").split(delimiter), num_columns)
        is_open = _is_quote_open(cells, delimiter)
        if len(cells) != num_columns and (is_open or open_line):
            raise ValueError(
                f"{file} line {open_line or number} opens a quote that may be text or begin a cell "
                f"of several lines, and line {number} has {len(cells)} cells for {num_columns} "
                "columns: write each row on one line, or put quotes around the names in the "
                "header too"
            )
        open_line = number if is_open else 0
        yield Row(number, _split_tsv_line(line, delimiter))


def _is_quote_open(cells: list[str], delimiter: str) -> bool:
    """Returns whether one of the cells begins with a quote that the line does not close."""
    for k, cell in enumerate(cells):
        if cell.lstrip().startswith('"') and delimiter.join(cells[k:]).count('"') % 2:
            return True
    return False


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

        That is a second line with as many cells as the header, of which those beside the long cell
        look like the row's own: names of images where there are some, else ids and words.
        """
        columns = _find_telling_columns(cells)
        num_rows = 0
        for _, line in self._row_lines:
            line_cells = line.split(self.delimiter)
            if len(line_cells) < self.num_columns:
                continue
            # Counted from the left and from the right: a text may hold delimiters.
            shift = len(line_cells) - len(cells)
            num_rows += any(
                all(
                    0 <= k + offset < len(line_cells)
                    and _is_alike(line_cells[k + offset], cells[k])
                    for k in columns
                )
                for offset in (0, shift)
            )
        if num_rows > 1:
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


def _find_telling_columns(cells: list[str]) -> list[int]:
    """Returns the columns by which a row is known: names of images, else of files, else words."""
    short = [k for k, cell in enumerate(cells) if cell.strip() and "\n" not in cell.strip()]
    images = [k for k in short if _find_suffix(cells[k]) in SUFFIXES]
    files = [k for k in short if _find_suffix(cells[k])]
    return images or files or [k for k in short if len(cells[k].split()) == 1]


def _is_alike(cell: str, other: str) -> bool:
    """Returns whether two cells may be of one column: "003" and "12", "a.png" and "b.jpg"."""
    cell, other = cell.strip(' "\n'), other.strip(' "\n')
    suffix, other_suffix = _find_suffix(cell), _find_suffix(other)
    if other_suffix:
        return suffix == other_suffix or {suffix, other_suffix} <= SUFFIXES
    is_code = len(cell) == len(other) and all(
        re.search(r"\d", text) and len(text.split()) == 1 for text in (cell, other)
    )
    return is_code or _describe_characters(cell) == _describe_characters(other)


def _describe_characters(cell: str) -> str:
    """Returns a cell with "a" for each run of letters and "0" for digits: "a_0" for "img_007"."""
    for kind, characters in CHARACTER_KINDS:
        cell = characters.sub(kind, cell)
    return cell
