"""Frozen dataclasses to JSON and back, with strict keys, and overrides from a command line.

A config is a dataclass whose fields are numbers, strings, booleans, literals, optional values,
tuples, mappings and other configs. `to_dict` and `from_dict` convert it to JSON values and back;
`override` replaces fields by `--section.field value`, as `beit3 train` does.
"""

import contextlib
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


# To JSON and back -------------------------------------------------------------------------------


def to_dict(value: Any) -> Any:
    """Returns a config as plain JSON values: dicts, lists, strings, numbers, booleans, None."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Rebuilds a config of class `cls` from the output of `to_dict`.

    Args:
        cls: The dataclass.
        data: A mapping of its fields. Absent fields keep their defaults.
        path: How errors name the config; the name of the class by default.

    Raises:
        ValueError: A field is unknown, or a value is of another type than its field.
    """
    return _read_value(cls, data, path or cls.__name__)


def _read_value(kind: Any, data: Any, path: str) -> Any:
    """Returns `data` as a value of type `kind`; `path` names it in errors."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, path)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return _read_literal(kind, data, path)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _read_value(_unwrap_optional(kind), data, path)
    if origin is tuple:
        return _read_tuple(kind, data, path)
    if origin in (dict, Mapping):
        return _read_mapping(kind, data, path)
    return _read_scalar(kind, data, path)


def _read_dataclass(kind: Any, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected a table of fields, got {data!r}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            raise ValueError(f"{path}: unknown field {key!r}{suggest(key, names)}")
    return kind(
        **{key: _read_value(hints[key], item, f"{path}.{key}") for key, item in data.items()}
    )


def _read_literal(kind: Any, data: Any, path: str) -> Any:
    choices = typing.get_args(kind)
    if data not in choices:
        listing = ", ".join(map(repr, choices))
        raise ValueError(f"{path}: {data!r} is not one of {listing}{suggest(data, choices)}")
    return data


def _read_tuple(kind: Any, data: Any, path: str) -> tuple:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{path}: expected a list, got {data!r}")
    item_kinds = _list_item_kinds(kind, len(data))
    if len(item_kinds) != len(data):
        raise ValueError(f"{path}: expected {len(item_kinds)} values, got {len(data)}")
    return tuple(
        _read_value(item_kind, item, path) for item_kind, item in zip(item_kinds, data, strict=True)
    )


def _read_mapping(kind: Any, data: Any, path: str) -> dict:
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected a table, got {data!r}")
    item_kind = typing.get_args(kind)[1]
    return {key: _read_value(item_kind, item, f"{path}.{key}") for key, item in data.items()}


def _read_scalar(kind: Any, data: Any, path: str) -> Any:
    """Reads a number, string or boolean. JSON writes 3.0 as 3; a boolean is no number."""
    is_number = isinstance(data, int | float) and not isinstance(data, bool)
    if kind is float and is_number:
        return float(data)
    if not isinstance(data, kind) or (kind is int and not is_number):
        raise ValueError(f"{path}: {data!r} is not of type {kind.__name__}")
    return data


def _unwrap_optional(kind: Any) -> Any:
    """Returns the X of `X | None`."""
    return next(argument for argument in typing.get_args(kind) if argument is not types.NoneType)


def _list_item_kinds(kind: Any, length: int) -> list[Any]:
    """Returns the types of a tuple's items; `tuple[X, ...]` takes any `length`."""
    item_kinds = list(typing.get_args(kind))
    return item_kinds[:1] * length if item_kinds[1:] == [...] else item_kinds


def suggest(name: Any, candidates: Sequence[str]) -> str:
    """Returns "; did you mean X?" where a candidate is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), candidates, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# From a command line ----------------------------------------------------------------------------


def list_flags(config: Any) -> list[str]:
    """Lists the command-line names of all fields: `--optim.lr`, `--data.batch.pairs`."""
    return [flag for flag, _ in _iterate_fields(config, type(config), "--")]


def override(config: T, arguments: Sequence[str], *, options: Sequence[str] = ()) -> T:
    """Returns `config` with fields replaced by `--section.field value` or `--section.field=value`.

    A tuple takes several values; an empty mapping takes pairs of a key and a value.

    Args:
        config: The config whose fields are replaced; it stays as it is.
        arguments: The words of a command line.
        options: Further names to suggest where an unknown field is close to one of them.

    Raises:
        ValueError: In one line, for an unknown field (with the nearest known one), for words that
            do not fit a field, and for values that the config itself refuses.
    """
    if not arguments:
        return config
    kinds = dict(_iterate_fields(config, type(config), "--"))
    changes = {}
    for flag, words in _group_by_flag(arguments):
        if flag not in kinds:
            raise ValueError(f"unknown field {flag}{suggest(flag, [*kinds, *options])}")
        path = f"cannot read {' '.join([flag, *words])}"
        changes[flag] = _read_value(kinds[flag], _parse_words(kinds[flag], words, path), path)
    try:
        return _replace_fields(config, changes, "--")
    except ValueError as error:
        raise ValueError(f"cannot read {' '.join(arguments)}: {error}") from None


def parse_keyword_options(
    function: Callable[..., Any], arguments: Sequence[str], *, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Parses `--name value` for the keyword-only arguments of a task's own `prepare`.

    An argument is a string, a whole number or a number, as its default is.

    Args:
        function: The function that takes the arguments.
        arguments: The words of a command line.
        options: Further names to suggest where an unknown one is close to one of them.

    Raises:
        ValueError: An argument is unknown, has no value or one of another type.
    """
    kinds = {
        f"--{name}": type(parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    values = {}
    for flag, words in _group_by_flag(arguments):
        if flag not in kinds:
            raise ValueError(f"unknown option {flag}{suggest(flag, [*kinds, *options])}")
        text = " ".join(words)
        values[flag.removeprefix("--")] = _parse_option(kinds[flag], flag, text)
    return values


def _parse_option(kind: type, flag: str, text: str) -> Any:
    """Returns the value of an option that is a string, a whole number from 0 or a number."""
    expected = {int: "a whole number", float: "a number"}.get(kind, "a name")
    is_valid = bool(text) and (kind is not int or text.isdecimal())
    with contextlib.suppress(ValueError):
        if is_valid:
            return kind(text)
    raise ValueError(f"{f'{flag} {text}'.rstrip()}: expected {expected}")


def _iterate_fields(value: Any, kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the flag and the type of every field that holds no further fields."""
    if isinstance(value, Mapping):
        kinds = dict.fromkeys(value, typing.get_args(kind)[1])
    else:
        kinds = typing.get_type_hints(type(value))
    for name, item in _list_items(value).items():
        if _has_fields(item):
            yield from _iterate_fields(item, kinds[name], f"{prefix}{name}.")
        else:
            yield prefix + name, kinds[name]


def _list_items(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass, or the items of a mapping, by name."""
    if isinstance(value, Mapping):
        return dict(value)
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _has_fields(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and bool(value))


def _replace_fields(value: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """Rebuilds `value` with the fields whose flags are in `changes`; configs check themselves."""
    items = {}
    for name, item in _list_items(value).items():
        if _has_fields(item):
            items[name] = _replace_fields(item, changes, f"{prefix}{name}.")
        else:
            items[name] = changes.get(prefix + name, item)
    return items if isinstance(value, Mapping) else dataclasses.replace(value, **items)


def _group_by_flag(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields every flag with the words up to the next one; `--a=b` is the flag `--a`, word `b`."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, word = argument.partition("=")
            groups.append((flag, [word] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise ValueError(f"unexpected argument {argument}: fields are --section.field value")
    yield from groups


def _parse_words(kind: Any, words: list[str], path: str) -> Any:
    """Converts words to the JSON value that `_read_value` checks for `kind`."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        item_kinds = _list_item_kinds(kind, len(words))
        if len(item_kinds) != len(words):
            return words
        return [
            _parse_word(item_kind, word) for item_kind, word in zip(item_kinds, words, strict=True)
        ]
    if origin in (dict, Mapping):
        if len(words) % 2:
            raise ValueError(f"{path}: expected pairs of a key and a value")
        item_kind = typing.get_args(kind)[1]
        pairs = zip(words[::2], words[1::2], strict=True)
        return {key: _parse_word(item_kind, word) for key, word in pairs}
    if len(words) != 1:
        raise ValueError(f"{path}: expected one value, got {len(words)}")
    return _parse_word(kind, words[0])


def _parse_word(kind: Any, word: str) -> Any:
    """Converts a word to `kind`, or returns it as it is where it does not fit."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return None if word == "None" else _parse_word(_unwrap_optional(kind), word)
    if origin is typing.Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}.get(word, word)
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word
