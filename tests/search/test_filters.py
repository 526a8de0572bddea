"""Filters agree with an obvious evaluation, and errors tell position, column and choices."""

import random

import numpy as np
import pyarrow as pa
import pytest

from beit3.search.filters import parse_filter
from tests.search.filter_cases import make_filter, make_rows, make_table

COLUMNS = {"id": "string", "city": "string", "year": "int64", "weight": "double", "good": "bool"}


@pytest.mark.parametrize("seed", range(400))
def test_random_filters_select_what_an_obvious_evaluation_selects(seed):
    rng = random.Random(seed)
    rows = make_rows(60, rng)
    text, evaluate = make_filter(rng)
    where = parse_filter(text)
    where.check(COLUMNS)
    selected = where.select(make_table(rows).column)
    assert selected.dtype == bool
    assert selected.tolist() == [evaluate(row) is True for row in rows], text


def select(text: str, **columns: list) -> list[int]:
    table = pa.table(columns)
    return np.flatnonzero(parse_filter(text).select(table.column)).tolist()


def test_and_binds_stronger_than_or_and_not_binds_strongest():
    a, b, c = [True, False, False, True], [True, True, False, False], [False, True, True, True]
    assert select("a == true or b == true and c == true", a=a, b=b, c=c) == [0, 1, 3]
    assert select("(a == true or b == true) and c == true", a=a, b=b, c=c) == [1, 3]
    assert select("not a == true and b == true", a=a, b=b) == [1]


def test_a_null_is_neither_equal_nor_different():
    assert select("x == 1", x=[1, None, 2]) == [0]
    assert select("not (x == 1)", x=[1, None, 2]) == [2]
    assert select("x not in (1)", x=[1, None, 2]) == [2]
    assert select("x is null", x=[1, None, 2]) == [1]


def test_a_column_of_nulls_only_passes_is_null_only():
    assert select("x == 1 or x != 1 or x is not null", x=[None, None]) == []
    assert select("x is null", x=[None, None]) == [0, 1]


def test_names_quotes_and_words_of_any_case():
    assert select("`my col` == 'it''s'", **{"my col": ["it's", "x"]}) == [0]
    assert select('x = "say ""hi"""', x=['say "hi"', "x"]) == [0]
    assert select("x IN ['a', 'b'] AND NOT x Contains 'b'", x=["a", "b"]) == [0]
    assert select("x == 'and'", x=["and", "or"]) == [0]
    assert select("taken >= '2024-03-01'", taken=["2024-02-28", "2024-03-01 10:00:00"]) == [1]


def test_whole_numbers_stay_exact_beyond_those_of_floats():
    assert select(f"x == {2**60 + 1}", x=[2**60, 2**60 + 1]) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "position 1: the end should be a column"),
        ("year", "position 5: the end should be one of =="),
        ("year >", "position 7: the end should be a value"),
        ("year > 3 city", "position 10: 'city' should be and, or, or the end"),
        ("(year > 3", r"position 10: the end should be \)"),
        ("city == 'Hue", 'position 9: "\'" cannot be read: the closing quote is missing'),
        ("city == Hue", "position 9: 'Hue' should be a value"),
        ("year & 3", "position 6: '&' cannot be read"),
        ("year in ()", r"position 10: '\)' should be a value"),
        ("year is 3", "position 9: '3' should be null"),
        ("city starts 'a'", "position 13: \"'a'\" should be with"),
        ("not and", "position 5: 'and' should be a column"),
        ("3 < year", "position 1: '3' should be a column"),
        ("(" * 500 + "year > 3" + ")" * 500, "more than 100 nested parts"),
    ],
)
def test_an_error_tells_the_position_and_what_should_be_there(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_filter(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good == true and yeer > 3", "position 18: there is no column 'yeer'; there are id, city"),
        ("year == 'x'", "column 'year' holds numbers, not text such as 'x'"),
        ("city == 3", "column 'city' holds text, not numbers such as 3"),
        ("good == 1", "column 'good' holds true/false, not numbers"),
        ("year == true", "column 'year' holds numbers, not true/false"),
        ("good > true", "true/false, which have no order"),
        ("year contains '1'", "column 'year' holds numbers, contains takes text"),
        ("year in (1, 'x')", "not text such as 'x'"),
        (f"year == {2**63}", "too large"),
        ("weight == 1e999", "no finite number"),
    ],
)
def test_a_check_names_the_column_and_its_type(text, message):
    with pytest.raises(ValueError, match=message):
        parse_filter(text).check(COLUMNS)
