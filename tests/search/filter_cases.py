"""Random filters with a slow, obvious second evaluation, and metadata to try them on."""

import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa

Row = dict[str, Any]
Evaluate = Callable[[Row], bool | None]

CITIES = (
    "Hue",
    "Hanoi",
    "it's",
    'say "hi"',
    "50%",
    "50x",
    "a_b",
    "axb",
    "back\\slash",
    "\\%",
    "",
    "Đà Nẵng",
    "hue",
    "two\nlines",
)
"""Texts with every character that some store treats specially."""

PARTS = ("", "a", "%", "_", "\\", "'", '"', "50", "Hu", "Đ", "\n")


def make_rows(number: int, rng: random.Random) -> list[Row]:
    """Makes metadata with nulls in every column but `id`."""
    return [
        {
            "id": f"row{position:04d}",
            "city": rng.choice([None, *CITIES]),
            "year": rng.choice([None, -3, 0, 1, 2, 2019, 2020, 2**60]),
            "weight": rng.choice([None, -1.5, 0.0, 0.1, 1.0, 2.0, 1e12]),
            "good": rng.choice([None, True, False]),
        }
        for position in range(number)
    ]


def make_table(rows: list[Row]) -> pa.Table:
    """Returns rows as a table."""
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("city", pa.string()),
            ("year", pa.int64()),
            ("weight", pa.float64()),
            ("good", pa.bool_()),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def make_filter(rng: random.Random, depth: int = 3) -> tuple[str, Evaluate]:
    """Returns the text of a random filter and a function that evaluates it as SQL does."""
    choice = rng.randrange(5) if depth else 4
    if choice == 0:
        text, evaluate = make_filter(rng, depth - 1)
        return f"not ({text})", lambda row: negate(evaluate(row))
    if choice in (1, 2):
        word = "and" if choice == 1 else "or"
        cases = [make_filter(rng, depth - 1) for _ in range(rng.randint(2, 3))]
        texts, parts = zip(*cases, strict=True)
        join = all_of if word == "and" else any_of
        return f" {word} ".join(f"({text})" for text in texts), lambda row: join(
            [part(row) for part in parts]
        )
    return make_comparison(rng)


def make_comparison(rng: random.Random) -> tuple[str, Evaluate]:
    """Returns one comparison and its evaluation."""
    column = rng.choice(["city", "year", "weight", "good", "id"])
    if rng.random() < 0.15:
        negated = rng.random() < 0.5
        text = f"{column} is {'not ' if negated else ''}null"
        return text, lambda row: (row[column] is None) != negated
    values = {
        "city": lambda: rng.choice(CITIES),
        "id": lambda: f"row{rng.randrange(60):04d}",
        "year": lambda: rng.choice([-3, 0, 1, 1.5, 2019, 2019.0, -0.5, 2**60, 1e300, -1e300]),
        "weight": lambda: rng.choice([-1.5, 0, 1, 0.1, 2, 1e12]),
        "good": lambda: rng.random() < 0.5,
    }
    draw = values[column]
    kind = rng.randrange(3)
    if kind == 0:
        chosen = [draw() for _ in range(rng.randint(1, 3))]
        word = rng.choice(["in", "not in"])
        text = f"{column} {word} ({', '.join(map(write_value, chosen))})"
        return text, guard(column, lambda value: (value in chosen) == (word == "in"))
    if kind == 1 and column in ("city", "id"):
        part = rng.choice(PARTS)
        word = rng.choice(["contains", "starts with"])
        prefix = rng.choice(["", "not "])
        text = f"{column} {prefix}{word} {write_value(part)}"
        if word == "contains":
            return text, guard(column, lambda value: (part in value) == (not prefix))
        return text, guard(column, lambda value: value.startswith(part) == (not prefix))
    symbols = ["==", "!="] if column == "good" else ["==", "=", "!=", "<", "<=", ">", ">="]
    symbol = rng.choice(symbols)
    value = draw()
    compare: dict[str, Callable[[Any], bool]] = {
        "==": lambda stored: stored == value,
        "=": lambda stored: stored == value,
        "!=": lambda stored: stored != value,
        "<": lambda stored: stored < value,
        "<=": lambda stored: stored <= value,
        ">": lambda stored: stored > value,
        ">=": lambda stored: stored >= value,
    }
    return f"{column} {symbol} {write_value(value)}", guard(column, compare[symbol])


def guard(column: str, test: Callable[[Any], bool]) -> Evaluate:
    """Returns a test of a column that gives None for a null."""
    return lambda row: None if row[column] is None else test(row[column])


def write_value(value: Any) -> str:
    """Writes a value as filters have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)


def negate(value: bool | None) -> bool | None:
    return None if value is None else not value


def all_of(values: list[bool | None]) -> bool | None:
    if False in values:
        return False
    return None if None in values else True


def any_of(values: list[bool | None]) -> bool | None:
    return negate(all_of([negate(value) for value in values]))
