"""Frozen dataclasses to JSON and back with strict keys, and overrides of their fields from a command line."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def to_dict(value: Any) -> Any:
    """A dataclass as plain JSON values: dicts, lists, strings, numbers, booleans, None."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, tuple | list) else value


def from_dict(kind: type[T], data: Any, where: str = "") -> T:
    """Rebuild dataclass `kind` from `to_dict`'s output. An unknown key or a value of another type is a ValueError."""
    return _read(kind, data, where or kind.__name__)


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if origin is typing.Literal:
        if data not in arguments:
            raise ValueError(f"{where}: {data!r} is not one of {', '.join(map(repr, arguments))}")
        return data
    if origin in (typing.Union, types.UnionType):
        return (
            None
            if data is None
            else _read(next(a for a in arguments if a is not type(None)), data, where)
        )
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{where}: a list expected, {data!r} given")
        kinds = [arguments[0]] * len(data) if arguments[1:] == (...,) else arguments
        if len(kinds) != len(data):
            raise ValueError(f"{where}: {len(kinds)} values expected, {len(data)} given")
        return tuple(_read(each, item, where) for each, item in zip(kinds, data, strict=True))
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: a table expected, {data!r} given")
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ValueError(f"{where}: {data!r} is not of type {kind.__name__}")
    return data


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: a table of fields expected, {data!r} given")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            raise ValueError(f"{where}: unknown field {key!r}{suggestion(key, names)}")
    return kind(**{key: _read(hints[key], item, f"{where}.{key}") for key, item in data.items()})


def suggestion(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' where a known name is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def flags(value: Any, prefix: str = "--") -> list[str]:
    """The command-line names of all fields: `--optim.lr`, `--task.model.dim`, `--data.batch.pairs`."""
    names = []
    items = (
        value.items()
        if isinstance(value, Mapping)
        else ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    )
    for name, item in items:
        nested = dataclasses.is_dataclass(item) or (isinstance(item, Mapping) and item)
        names += flags(item, f"{prefix}{name}.") if nested else [prefix + name]
    return names


def override(value: T, arguments: Sequence[str]) -> T:
    """`value` with fields replaced by `--section.field text` pairs.

    Raises ValueError, in one line, for an unknown field (with the nearest known one) or a text that does not fit it.
    """
    if not arguments:
        return value
    import tyro  # slow to import, and absent on machines that only train

    known = flags(value)
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known:
            raise ValueError(f"unknown field {argument}{suggestion(name, known)}")
    config = (tyro.conf.FlagConversionOff,)  # --run.compile True, like every other field
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(
            said
        ):  # tyro draws a box around its errors, console_outputs or not
            return tyro.cli(
                type(value),
                default=value,
                args=list(arguments),
                config=config,
                console_outputs=False,
            )
    except SystemExit:
        raise ValueError(f"cannot read {' '.join(arguments)}: {_reason(said.getvalue())}") from None


def keyword_options(call: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`--name VALUE` for the keyword arguments that a task's own `prepare` takes; ValueError for any other."""
    parameters = inspect.signature(call).parameters.items()
    known = {
        f"--{name}": str if isinstance(p.default, str) else int
        for name, p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    for flag in arguments[::2]:
        if flag not in known:
            raise ValueError(
                f"unknown argument {flag}{suggestion(flag, [*known])}; see beit3 prepare --help"
            )
    given = dict(zip(arguments[::2], [*arguments[1::2], ""], strict=False))
    for flag, value in given.items():
        if not value or (known[flag] is int and not value.isdecimal()):
            raise ValueError(
                f"{flag} {value}".rstrip()
                + f": it takes a {'whole number' if known[flag] is int else 'name'}"
            )
    return {flag.removeprefix("--"): known[flag](value) for flag, value in given.items()}


def _reason(box: str) -> str:
    """The first paragraph inside tyro's box, as one line."""
    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    return (
        " ".join(itertools.takewhile(lambda line: line.strip("─╰╯"), lines))
        or "a value is missing or of the wrong type"
    )
