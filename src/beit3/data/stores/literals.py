"""Reads one value or many: lists and mappings that people write as JSON or Python into a text."""

import ast
import io
import json
import math
import tokenize
from typing import Any

BRACKETS = {"[": "]", "{": "}", "(": ")"}


def parse_literal(text: str) -> Any:
    """Returns the list or dict that a text writes as JSON or Python, else the text unchanged.

    `['red', 'blue']` as pandas writes a list is one, `[a dog]` is none. Tuples and sets of texts
    become lists; `(3, 4)` may be a point, and stays a text.

    Raises:
        ValueError: It is a list without commas, as NumPy writes its arrays.
    """
    stripped = text.strip()
    if not stripped or BRACKETS.get(stripped[0]) != stripped[-1]:
        return text
    value = _evaluate(stripped)
    if isinstance(value, tuple | set) and all(isinstance(item, str) for item in value):
        value = list(value)
    if not isinstance(value, list | dict):
        return text
    if isinstance(value, list) and stripped[0] == "(" and len(value) < 2:
        return text
    if isinstance(value, list) and _count_texts(stripped) > len(value) > 0:
        if all(isinstance(item, str) for item in value):
            raise ValueError(
                f"{stripped[:60]} lacks commas between its texts: write it as JSON, as in "
                '["red", "blue"]'
            )
    return value


def list_items(value: Any) -> list[Any]:
    """Returns one value or many as a list: a text is one item, unless it writes a list.

    Items that are null or NaN are left out. Raises ValueError as `parse_literal`.
    """
    if isinstance(value, str):
        value = parse_literal(value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    return [item for item in items if not is_null(item)]


def is_null(value: Any) -> bool:
    """Returns whether a value stands for none: null, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _evaluate(text: str) -> Any:
    """Returns the value of a JSON or Python literal, else None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _count_texts(text: str) -> int:
    """Returns the number of quoted texts in a Python literal; 0 where it is none."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return 0
    return sum(token.type == tokenize.STRING for token in tokens)
