"""Filters on metadata columns: `year >= 2019 and city in ('Hue', 'Hanoi')`.

    comparison    column == value, != < <= > >= (`=` is `==`)
    membership    column in (value, ...), column not in (value, ...)
    text          column contains 'dog', column starts with 'IMG_', and `not` before both
    missing       column is null, column is not null
    combination   and, or, not, parentheses

Values are text in single or double quotes (a quote inside is written twice), numbers, true and
false. Dates and times are text, as in `taken >= '2024-03-01'`. A column whose name is no plain word
stands in backquotes. Text is compared by its characters, upper and lower case differ.

A null is neither equal to a value nor different from it: every comparison with it is false, the
negated one too, as in SQL. Only `is null` finds it. All stores follow this.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Value = str | int | float | bool
ReadColumn = Callable[[str], pa.ChunkedArray]

NEGATED = {
    "==": "!=",
    "!=": "==",
    "<": ">=",
    ">=": "<",
    ">": "<=",
    "<=": ">",
    "in": "not in",
    "not in": "in",
    "contains": "not contains",
    "not contains": "contains",
    "starts with": "not starts with",
    "not starts with": "starts with",
    "is null": "is not null",
    "is not null": "is null",
}
ORDERED = ("<", "<=", ">", ">=")
TEXT_OPERATORS = ("contains", "not contains", "starts with", "not starts with")
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Comparison:
    """One comparison of a column; `value` is a list for `in`, None for `is null`."""

    column: str
    operator: str
    value: Any
    position: int
    """Position of the column in the text, from 1."""


@dataclass(frozen=True)
class Combination:
    """Parts joined by "and" or "or"."""

    word: str
    parts: tuple["Node", ...]


Node = Comparison | Combination


@dataclass(frozen=True)
class Filter:
    """A parsed filter. `not` has been moved into the comparisons."""

    text: str
    root: Node

    def __and__(self, other: "Filter") -> "Filter":
        return Filter(
            f"({self.text}) and ({other.text})", Combination("and", (self.root, other.root))
        )

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the filter reads, each once."""
        return list(dict.fromkeys(leaf.column for leaf in _iterate_comparisons(self.root)))

    def check(self, columns: Mapping[str, str]) -> None:
        """Raises ValueError for a column that is not there, or a value of another type.

        Args:
            columns: Name -> type ("string", "int64", "double", "bool" or "null") of the columns.
        """
        for leaf in _iterate_comparisons(self.root):
            _check_comparison(leaf, columns, self.text)

    def select(self, read_column: ReadColumn) -> np.ndarray:
        """Returns which rows pass, bool [rows]. `read_column` returns a column by its name."""
        return _select(self.root, read_column)

    def to_milvus(self, columns: Mapping[str, str]) -> str:
        """Returns the filter in Milvus's language; `columns` as in `check`."""
        return _write_milvus(self.root, columns)


def parse_filter(text: str) -> Filter:
    """Parses a filter; raises ValueError with the position of what is wrong."""
    return Filter(text, _Parser(text).parse())


def require_text(column: str) -> Filter:
    """Returns the filter for rows that have a text in a column."""
    return parse_filter(f"`{column}` != ''")


def _iterate_comparisons(node: Node) -> Iterator[Comparison]:
    if isinstance(node, Comparison):
        yield node
    else:
        for part in node.parts:
            yield from _iterate_comparisons(part)


# Parsing --------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
    | (?P<string>'(?:[^']|'')*'|"(?:[^"]|"")*")
    | (?P<quoted>`[^`]+`)
    | (?P<word>[^\W\d][\w.]*(?:-\w+)*)
    | (?P<symbol>==|!=|<=|>=|<>|[=<>(),\[\]])
    )""",
    re.VERBOSE,
)
KEYWORDS = ("and", "or", "not", "in", "is", "null", "contains", "starts", "with", "true", "false")
MAX_DEPTH = 100


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int


class _Parser:
    """Reads a filter from left to right: `or` joins `and`s, which join comparisons."""

    def __init__(self, text: str):
        self.text = text
        self.tokens = list(_split(text))
        self.next = 0
        self.depth = 0

    def parse(self) -> Node:
        node = self.parse_or(negated=False)
        if self.peek().kind != "end":
            raise self.make_error("and, or, or the end")
        return node

    def parse_or(self, *, negated: bool) -> Node:
        return self.parse_joined("or", self.parse_and, negated=negated)

    def parse_and(self, *, negated: bool) -> Node:
        return self.parse_joined("and", self.parse_not, negated=negated)

    def parse_joined(self, word: str, parse_part: Callable[..., Node], *, negated: bool) -> Node:
        parts = [parse_part(negated=negated)]
        while self.accept(word):
            parts.append(parse_part(negated=negated))
        if len(parts) == 1:
            return parts[0]
        if negated:
            word = "or" if word == "and" else "and"
        return Combination(word, tuple(parts))

    def parse_not(self, *, negated: bool) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"filter has more than {MAX_DEPTH} nested parts: make it simpler")
        try:
            if self.accept("not"):
                return self.parse_not(negated=not negated)
            if self.accept("("):
                node = self.parse_or(negated=negated)
                self.expect(")")
                return node
            return self.parse_comparison(negated=negated)
        finally:
            self.depth -= 1

    def parse_comparison(self, *, negated: bool) -> Comparison:
        token = self.peek()
        if token.kind not in ("word", "quoted") or token.text.lower() in KEYWORDS:
            raise self.make_error("a column")
        self.next += 1
        column = token.text.strip("`") if token.kind == "quoted" else token.text
        operator = self.parse_operator()
        value: Any = None
        if operator in ("in", "not in"):
            value = self.parse_list()
        elif operator not in ("is null", "is not null"):
            value = self.parse_value()
        if negated:
            operator = NEGATED[operator]
        return Comparison(column, operator, value, token.position)

    def parse_operator(self) -> str:
        symbol = self.peek().text
        if symbol in ("==", "=", "!=", "<>", *ORDERED):
            self.next += 1
            return {"=": "==", "<>": "!="}.get(symbol, symbol)
        if self.accept("is"):
            operator = "is not null" if self.accept("not") else "is null"
            self.expect("null")
            return operator
        prefix = "not " if self.accept("not") else ""
        if self.accept("in"):
            return f"{prefix}in"
        if self.accept("contains"):
            return f"{prefix}contains"
        if self.accept("starts"):
            self.expect("with")
            return f"{prefix}starts with"
        raise self.make_error("one of == != < <= > >= in, not in, contains, starts with, is null")

    def parse_list(self) -> list[Value]:
        closing = "]" if self.peek().text == "[" else ")"
        self.expect("[" if closing == "]" else "(")
        values = [self.parse_value()]
        while self.accept(","):
            values.append(self.parse_value())
        self.expect(closing)
        return values

    def parse_value(self) -> Value:
        token = self.peek()
        if token.kind == "string":
            quote = token.text[0]
            self.next += 1
            return token.text[1:-1].replace(quote * 2, quote)
        if token.kind == "number":
            self.next += 1
            return _parse_number(token.text)
        if self.accept("true"):
            return True
        if self.accept("false"):
            return False
        raise self.make_error("a value: text in quotes, a number, true or false")

    def peek(self) -> _Token:
        return self.tokens[self.next]

    def accept(self, word: str) -> bool:
        """Goes on when the next token is `word`; text in quotes never is."""
        token = self.peek()
        if token.kind not in ("word", "symbol") or token.text.lower() != word:
            return False
        self.next += 1
        return True

    def expect(self, word: str) -> None:
        if not self.accept(word):
            raise self.make_error(word)

    def make_error(self, wanted: str) -> ValueError:
        token = self.peek()
        there = repr(token.text) if token.kind != "end" else "the end"
        return ValueError(
            f"filter {self.text!r}, position {token.position}: {there} should be {wanted}"
        )


def _split(text: str) -> Iterator[_Token]:
    """Splits a filter into tokens; the last one is the end."""
    start = 0
    end = len(text.rstrip())
    while start < end:
        match = TOKEN.match(text, start, end)
        if match is None or match.lastgroup is None:
            position = start + len(text[start:]) - len(text[start:].lstrip())
            character = text[position]
            remedy = "the closing quote is missing" if character in "'\"`" else "remove it"
            raise ValueError(
                f"filter {text!r}, position {position + 1}: {character!r} cannot be read: {remedy}"
            )
        yield _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1)
        start = match.end()
    yield _Token("end", "", end + 1)


def _parse_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


# Types ----------------------------------------------------------------------------------------

VALUE_NAMES = {str: "text", int: "numbers", float: "numbers", bool: "true/false"}
COLUMN_NAMES = {"string": "text", "int64": "numbers", "double": "numbers", "bool": "true/false"}


def _check_comparison(leaf: Comparison, columns: Mapping[str, str], text: str) -> None:
    """Raises ValueError unless the column is there and the values are of its type."""
    start = f"filter {text!r}, position {leaf.position}: "
    kind = columns.get(leaf.column)
    if kind is None:
        raise ValueError(
            f"{start}there is no column {leaf.column!r}; there are {', '.join(columns)}"
        )
    if kind == "null" or leaf.operator in ("is null", "is not null"):
        return
    if leaf.operator in TEXT_OPERATORS and kind != "string":
        raise ValueError(
            f"{start}column {leaf.column!r} holds {COLUMN_NAMES.get(kind, kind)}, "
            f"{leaf.operator} takes text"
        )
    if leaf.operator in ORDERED and kind == "bool":
        raise ValueError(f"{start}column {leaf.column!r} holds true/false, which have no order")
    for value in leaf.value if isinstance(leaf.value, list) else [leaf.value]:
        if VALUE_NAMES[type(value)] != COLUMN_NAMES.get(kind, kind):
            raise ValueError(
                f"{start}column {leaf.column!r} holds {COLUMN_NAMES.get(kind, kind)}, not "
                f"{VALUE_NAMES[type(value)]} such as {value!r}"
            )
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"{start}{value} is too large: whole numbers end at {MAX_INTEGER}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{start}{value} is no finite number")


def _bring_to_type(leaf: Comparison, kind: str) -> Comparison | None:
    """Returns the comparison with values of the column's own type, None where none can pass.

    A column of whole numbers is compared with a fraction by the whole number beside it.
    """
    if leaf.value is None or kind in ("string", "bool"):
        return leaf
    if isinstance(leaf.value, list):
        values = leaf.value
        if kind == "int64":
            values = [
                int(value)
                for value in values
                if value == int(value) and abs(int(value)) <= MAX_INTEGER
            ]
        else:
            values = [float(value) for value in values]
        if not values:
            return None if leaf.operator == "in" else _make_present(leaf)
        return Comparison(leaf.column, leaf.operator, values, leaf.position)
    if kind == "double":
        return Comparison(leaf.column, leaf.operator, float(leaf.value), leaf.position)
    return _bring_to_integer(leaf)


def _bring_to_integer(leaf: Comparison) -> Comparison | None:
    """Returns a comparison of whole numbers, as `_bring_to_type`."""
    value, operator = leaf.value, leaf.operator
    if value != int(value):
        if operator == "==":
            return None
        if operator == "!=":
            return _make_present(leaf)
        # x < 2.5 and x <= 2.5 are x <= 2; x > 2.5 and x >= 2.5 are x >= 3.
        below = operator in ("<", "<=")
        value = math.floor(value) if below else math.ceil(value)
        operator = "<=" if below else ">="
    value = int(value)
    if abs(value) <= MAX_INTEGER:
        return Comparison(leaf.column, operator, value, leaf.position)
    always = {"==": False, "!=": True}.get(operator, (value > 0) == (operator in ("<", "<=")))
    return _make_present(leaf) if always else None


def _make_present(leaf: Comparison) -> Comparison:
    return Comparison(leaf.column, "is not null", None, leaf.position)


# Rows of tables -------------------------------------------------------------------------------


def _select(node: Node, read_column: ReadColumn) -> np.ndarray:
    """Returns which rows pass, bool [rows]."""
    if isinstance(node, Combination):
        combine = np.logical_and if node.word == "and" else np.logical_or
        return combine.reduce([_select(part, read_column) for part in node.parts])
    column = read_column(node.column)
    comparison = _bring_to_type(node, _get_kind(column))
    if comparison is None or (pa.types.is_null(column.type) and node.operator != "is null"):
        return np.zeros(len(column), dtype=bool)
    passed = _compare(column, comparison.operator, comparison.value)
    return pc.fill_null(passed, False).combine_chunks().to_numpy(zero_copy_only=False)


def _get_kind(column: pa.ChunkedArray) -> str:
    return "string" if pa.types.is_null(column.type) else str(column.type)


def _compare(column: pa.ChunkedArray, operator: str, value: Any) -> pa.ChunkedArray:
    """Compares a column; rows with a null give null or false."""
    if operator == "is null":
        return pc.is_null(column)
    if operator == "is not null":
        return pc.is_valid(column)
    if operator in ("in", "not in"):
        among = pc.is_in(column, value_set=pa.array(value, type=column.type))
        return among if operator == "in" else pc.and_(pc.invert(among), pc.is_valid(column))
    if operator in TEXT_OPERATORS:
        match = pc.starts_with if operator.endswith("starts with") else pc.match_substring
        matched = match(column, value)
        return pc.invert(matched) if operator.startswith("not") else matched
    compare = {
        "==": pc.equal,
        "!=": pc.not_equal,
        "<": pc.less,
        "<=": pc.less_equal,
        ">": pc.greater,
        ">=": pc.greater_equal,
    }
    return compare[operator](column, pa.scalar(value, type=column.type))


# Milvus ---------------------------------------------------------------------------------------

NOTHING = 'id == ""'
"""A Milvus filter that no row passes: ids are not empty."""


MILVUS_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})
"""Milvus Lite knows no others; other control characters stand for themselves."""


def _write_milvus(node: Node, columns: Mapping[str, str]) -> str:
    """Writes a filter in Milvus's language.

    Milvus lets nulls pass `not in`, so that each comparison asks for a value first.
    """
    if isinstance(node, Combination):
        parts = [f"({_write_milvus(part, columns)})" for part in node.parts]
        return f" {node.word} ".join(parts)
    kind = columns[node.column]
    if kind == "null" and node.operator not in ("is null", "is not null"):
        return NOTHING
    comparison = _bring_to_type(node, kind)
    if comparison is None:
        return NOTHING
    name, operator, value = comparison.column, comparison.operator, comparison.value
    if name == "id" and operator in ("is null", "is not null"):
        return NOTHING if operator == "is null" else f"not ({NOTHING})"
    if operator in ("is null", "is not null"):
        return f"{name} {operator}"
    condition = _write_condition(name, operator, value)
    return condition if name == "id" else f"{name} is not null and {condition}"


def _write_condition(name: str, operator: str, value: Any) -> str:
    """Writes a comparison with a value in Milvus's language."""
    if operator.endswith("starts with"):
        return _write_prefix(name, value, negated=operator.startswith("not"))
    if operator.endswith("contains"):
        if "\\" in value:
            # Milvus Lite reads a backslash in a pattern in two ways, by what else is in it.
            raise ValueError(
                f"filter on {name!r}: Milvus finds no text with a backslash by `contains`; use == "
                "or `starts with`, or search in a folder"
            )
        escaped = re.sub(r"([%_])", r"\\\1", value)
        condition = f"{name} like {_write_value(f'%{escaped}%')}"
        return f"not ({condition})" if operator.startswith("not") else condition
    if operator in ("in", "not in"):
        return f"{name} {operator} [{', '.join(map(_write_value, value))}]"
    return f"{name} {operator} {_write_value(value)}"


def _write_prefix(name: str, prefix: str, *, negated: bool) -> str:
    """Writes `starts with` as a range of texts, which needs no pattern."""
    first = _write_value(prefix)
    last = prefix.rstrip("\U0010ffff")
    if not last:
        return f"{name} {'<' if negated else '>='} {first}"
    following = ord(last[-1]) + 1
    if 0xD800 <= following <= 0xDFFF:
        # Surrogates are no characters.
        following = 0xE000
    end = _write_value(last[:-1] + chr(following))
    if negated:
        return f"({name} < {first} or {name} >= {end})"
    return f"({name} >= {first} and {name} < {end})"


def _write_value(value: Value) -> str:
    """Writes a value in Milvus's language."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value.translate(MILVUS_ESCAPES)}"' if isinstance(value, str) else repr(value)
