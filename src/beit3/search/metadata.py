"""Metadata tables: one form for every column, so that all stores filter them alike.

Columns become text, whole numbers (int64), numbers (float64) or booleans. Dates become text such as
"2024-03-01", times "2024-03-01 10:00:00"; a number that is no number becomes null; lists and
structures become JSON text.
"""

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

ID = "id"
TYPE_NAMES = {"string": "text", "int64": "whole number", "double": "number", "bool": "true/false"}


def normalize_metadata(table: pa.Table) -> pa.Table:
    """Returns the table with columns of the four types. `id` becomes text and has to be unique."""
    names = table.column_names
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"metadata have two columns {double!r}: rename one")
    if ID not in names:
        raise ValueError(f"metadata have no column {ID!r}; there are {', '.join(names)}")
    columns = {name: normalize_column(name, table.column(name)) for name in names}
    columns[ID] = columns[ID].cast(pa.string())
    check_ids(columns[ID])
    return pa.table(columns)


def normalize_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column as one of the four types, or as nulls where it holds nothing else."""
    kind = column.type
    if types.is_dictionary(kind):
        return normalize_column(name, column.cast(kind.value_type))
    if types.is_null(kind) or types.is_boolean(kind) or types.is_string(kind):
        return column
    try:
        return _convert_column(name, column)
    except pa.ArrowException as error:
        raise ValueError(f"metadata column {name!r} ({kind}) cannot be stored: {error}") from None


def _convert_column(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts a column that is not of the four types yet."""
    kind = column.type
    if types.is_integer(kind):
        return column.cast(pa.int64())
    if types.is_floating(kind) or types.is_decimal(kind):
        numbers = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    if types.is_large_string(kind) or types.is_date(kind) or types.is_time(kind):
        return column.cast(pa.string())
    if types.is_timestamp(kind):
        return _format_times(column)
    if types.is_nested(kind):
        return pa.chunked_array([[_write_json(value) for value in column.to_pylist()]], pa.string())
    raise ValueError(
        f"metadata column {name!r} holds {kind}, which cannot be searched: leave it out"
    )


def _format_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Formats times as "2024-03-01 10:00:00", with a fraction where one is there."""
    moments = column.cast(pa.timestamp(column.type.unit, None))
    seconds = moments.cast(pa.timestamp("s"), safe=False)
    if pc.all(pc.equal(seconds.cast(moments.type), moments)).as_py() is not False:
        moments = seconds
    return moments.cast(pa.string())


def _write_json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def check_ids(ids: pa.ChunkedArray) -> None:
    """Raises ValueError unless every row has an id and no two rows share one."""
    if ids.null_count:
        raise ValueError(f"metadata: {ids.null_count} rows have no {ID}")
    if pc.any(pc.equal(ids, "")).as_py():
        raise ValueError(f"metadata: a row has an empty {ID}")
    if pc.count_distinct(ids).as_py() != len(ids):
        counts = pc.value_counts(ids.combine_chunks())
        double = next(row["values"].as_py() for row in counts if row["counts"].as_py() > 1)
        raise ValueError(f"metadata: two rows have the {ID} {double!r}; ids have to differ")


def unify_schemas(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Returns all columns of some schemas; numbers widen, other differences raise ValueError."""
    merged: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            kind = merged.get(field.name)
            merged[field.name] = _unify_types(field.name, kind, field.type)
    return pa.schema([pa.field(name, kind) for name, kind in merged.items()])


def _unify_types(name: str, first: pa.DataType | None, second: pa.DataType) -> pa.DataType:
    """Returns the type that holds both: whole numbers and numbers are numbers."""
    if first is None or types.is_null(first) or first == second:
        return second
    if types.is_null(second):
        return first
    if {first, second} == {pa.int64(), pa.float64()}:
        return pa.float64()
    raise ValueError(
        f"metadata column {name!r} holds {describe_type(first)} in some rows and "
        f"{describe_type(second)} in others: give it one type"
    )


def join_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Joins tables of the same columns below each other."""
    return pa.concat_tables(tables)


def describe_type(kind: pa.DataType) -> str:
    """Returns a type in words, as messages name it."""
    return TYPE_NAMES.get(str(kind), str(kind))
