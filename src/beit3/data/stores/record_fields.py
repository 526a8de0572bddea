"""What the fields of records hold, as each task declares it, and the check of a record against it.

A task declares its fields as a table, `Task.record_fields`: name of a field -> `RecordField`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Purpose = Literal["train", "score", "predict"]
"""What records are read for: training, an evaluation, or predictions that nobody scores."""

PURPOSES: tuple[Purpose, ...] = ("train", "score", "predict")

GERUNDS = {"train": "training", "score": "scoring", "predict": "prediction"}

MAX_SHOWN = 60
"""Characters of a wrong value that a message shows."""


@dataclass(frozen=True)
class FieldKind:
    """A kind of values: what it is called in messages, and whether a value is one."""

    name: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class RecordField:
    """One field of a task's records.

    Args:
        kind: What the field holds wherever it is present.
        needed_for: Purposes for which a record must have the field, and not empty.
        may_be_empty_for: Purposes for which a single record may have it empty, but not all.
        refused_for: Purposes for which no record may have the field.
        alternative: Field that may stand in its place.
        below: Field of the task's config that a number must be smaller than.
    """

    kind: FieldKind
    needed_for: tuple[Purpose, ...] = ()
    may_be_empty_for: tuple[Purpose, ...] = ()
    refused_for: tuple[Purpose, ...] = ()
    alternative: str = ""
    below: str = ""


# Kinds --------------------------------------------------------------------------------------------


def is_whole_number(value: Any) -> bool:
    """Returns whether a JSON value is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a finite number, and a whole one within 64 bits."""
    if is_whole_number(value):
        return bool(abs(value) < 2**63)
    return isinstance(value, float) and math.isfinite(value)


def is_string(value: Any) -> bool:
    """Returns whether a JSON value is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as "\ud83d"
        return False
    return True


def is_caption(value: Any) -> bool:
    """Returns whether a JSON value is a string with a visible character."""
    return is_string(value) and bool(value.strip())


def is_text(value: Any) -> bool:
    """Returns whether a JSON value is a text: a string, or token ids."""
    if isinstance(value, list):
        return bool(value) and all(is_whole_number(id) and id >= 0 for id in value)
    return is_caption(value)


def is_path(value: Any) -> bool:
    """Returns whether a JSON value can be the path of a file."""
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def is_id(value: Any) -> bool:
    """Returns whether a JSON value can be the id of a record."""
    return is_whole_number(value) or is_caption(value)


def is_answers(value: Any) -> bool:
    """Returns whether a JSON value maps answers to scores."""
    return isinstance(value, dict) and all(
        is_string(answer) and is_number(score) and 0 <= score <= 1
        for answer, score in value.items()
    )


def is_box(value: Any) -> bool:
    """Returns whether a JSON value is a list of four numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_object(value: Any) -> bool:
    """Returns whether a JSON value is an object of an image, with box, label and crowd."""
    return (
        isinstance(value, dict)
        and is_box(value.get("box"))
        and is_whole_number(value.get("label"))
        and value["label"] >= 0
        and isinstance(value.get("crowd"), int)
    )


def is_label_map_description(value: Any) -> bool:
    """Returns whether a JSON value says what the numbers of a label map mean."""
    if not isinstance(value, dict):
        return False
    num_classes: Any = value.get("num_classes")
    return is_whole_number(num_classes) and num_classes > 0


def is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns a function that tells whether a JSON value is a list of such values."""
    return lambda value: isinstance(value, list) and all(map(accepts, value))


ID = FieldKind("a text or a whole number", is_id)
FILE = FieldKind("the path of a file", is_path)
WORD = FieldKind("a text", is_caption)
TEXT_OR_IDS = FieldKind("a text with a visible character or a list of token ids", is_text)
TEXTS_OR_IDS = FieldKind("a list of texts, each with a visible character", is_list_of(is_text))
CAPTIONS = FieldKind("a list of texts, each with a visible character", is_list_of(is_caption))
STRINGS = FieldKind(
    "a list of one text or more", lambda value: is_list_of(is_string)(value) and bool(value)
)
NUMBER = FieldKind("a number", is_number)
LABEL = FieldKind("a whole number from 0 on", lambda value: is_whole_number(value) and value >= 0)
TRUTH = FieldKind("1 (true) or 0 (false)", lambda value: isinstance(value, int) and value in (0, 1))
ANSWERS = FieldKind('an object of answers and scores from 0 to 1, as {"yes": 1.0}', is_answers)
TWO_BOXES = FieldKind(
    "two boxes [left, top, right, bottom]",
    lambda value: is_list_of(is_box)(value) and len(value) in (0, 2),
)
OBJECTS = FieldKind(
    "a list of objects, each with a box [left, top, width, height], a label and crowd",
    is_list_of(is_object),
)
LABEL_MAP_DESCRIPTION = FieldKind(
    'an object that describes the label map, as {"num_classes": 150}', is_label_map_description
)

ID_FIELD = RecordField(ID, needed_for=PURPOSES)
"""The field `id`, which every record has."""


# Checking -----------------------------------------------------------------------------------------


def find_fault(
    record: Mapping[str, Any],
    fields: Mapping[str, RecordField],
    purpose: Purpose,
    config: Any = None,
) -> str:
    """Returns what is wrong with a record's fields, or "" where nothing is.

    Args:
        record: The record as its file holds it.
        fields: The declared fields; others are not looked at.
        purpose: What the record is read for.
        config: The task's config, which `RecordField.below` refers to; None leaves this check out.
    """
    for name, field in fields.items():
        fault = _find_fault_of_field(record, name, field, purpose)
        if not fault and name in record and field.below and config is not None:
            limit = getattr(config, field.below)
            if record[name] >= limit:
                fault = f"field {name} is {record[name]}, not below the {limit} of {field.below}"
        if fault:
            return fault
    return ""


def _find_fault_of_field(
    record: Mapping[str, Any], name: str, field: RecordField, purpose: Purpose
) -> str:
    is_needed = purpose in field.needed_for and not record.get(field.alternative)
    names = f"{name} or {field.alternative}" if field.alternative else name
    if name not in record:
        if not is_needed:
            return ""
        own_names = ", ".join(map(str, record)) or "none"
        return f"there is no field {names}, which {GERUNDS[purpose]} needs (fields: {own_names})"
    value = record[name]
    if purpose in field.refused_for:
        return f"field {name} is not for {GERUNDS[purpose]}, {_list_needed(field, purpose)}"
    if not field.kind.accepts(value):
        return f"field {name} is {_show(value)}, not {field.kind.name}"
    is_empty = isinstance(value, list | dict) and not value
    if is_empty and is_needed and purpose not in field.may_be_empty_for:
        return f"field {name} is empty, and {GERUNDS[purpose]} needs it"
    return ""


def _list_needed(field: RecordField, purpose: Purpose) -> str:
    """Returns the remedy for a field that a purpose refuses."""
    if field.alternative:
        return f"which takes one {field.alternative} per record"
    return f"leave it out of {purpose} records"


def _show(value: Any) -> str:
    """Returns a value as JSON, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 4] + " ..."
