"""Files that name a head's outputs: the answer list of VQA, class names; in any form they come in.

A list of names is text with one name per line, or JSON: a list of names, of objects with a name or
of pairs [number, name]; {"0": name} or {name: 0}; or a description of a model that holds one of
them as `id2label`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.data.stores.literals import is_null, parse_literal
from beit3.files import read_text, write_text

ANSWERS_FILE = "answer2label.txt"
CLASSES_FILE = "classes.txt"

LIST_KEYS = ("id2label", "label2id", "classes", "answers", "categories", "names")
"""Fields under which a JSON object holds a list of names; the first that exists counts."""
NAME_KEYS = ("name", "answer", "class", "class_name", "text")
NUMBER_KEYS = ("label", "index")
"""Fields that order the names. `id` is not among them: COCO's categories count as listed."""
NUMBERED_LINE = re.compile(r"(\d+)\s*[\s,:;]\s*(\S.*)")
WORDNET_LINE = re.compile(r"n\d{8}[\s,]+(\S.*)")


# Files --------------------------------------------------------------------------------------------


def read_answers(path: Path) -> tuple[str, ...]:
    """Reads an answer list in the order of the head's outputs.

    The file has one of the forms above, or JSON lines {"answer", "label"} in any order, as
    released. In a text a blank line is the answer "", which VQAv2's list has; at the end of the
    file it is none. Of a directory the list of its VQA records is read.

    Raises:
        ValueError: The file is absent, its labels are not 0 to A - 1, each once, or an answer is
            listed twice.
    """
    path = find_names_file(path, ANSWERS_FILE, "vqa", "answer list", "run beit3 prepare vqa")
    answers = _read_names(path, "answer list", may_be_blank=True)
    for answer, count in Counter(answers).items():
        if count > 1:
            raise ValueError(
                f"{path} lists the answer {answer!r} {count} times: each is one output, remove the "
                "others"
            )
    return answers


def read_class_names(path: Path) -> tuple[str, ...]:
    """Reads class names in the order of the labels, in one of the forms above.

    Of a directory the names of its ImageNet records are read.

    Raises:
        ValueError: The file is absent or in no such form, or the order of the names is not clear.
    """
    path = find_names_file(
        path, CLASSES_FILE, "imagenet", "class names", "run beit3 prepare imagenet"
    )
    return _read_names(path, "list of class names", may_be_blank=False)


def find_names_file(path: Path, name: str, task: str, content: str, remedy: str) -> Path:
    """Returns `path` if it is a file, or the list of names in a directory of records.

    Raises ValueError where there is none.
    """
    if path.is_dir():
        files = [path / task / "main" / name, path / "main" / name, path / name]
        path = next((file for file in files if file.is_file()), files[0])
    if not path.is_file():
        raise ValueError(f"no {content} at {path}: {remedy}, or give one name per line")
    return path


def write_answers(path: Path, answers: Sequence[str]) -> None:
    """Writes an answer list as the release has it, one {"answer", "label"} per line."""
    lines = [
        json.dumps({"answer": answer, "label": label}, ensure_ascii=False)
        for label, answer in enumerate(answers)
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Writes class names, one per line in the order of the labels.

    Names that lines would not give back, such as "1 euro" and "2 euro", are written as JSON.
    """
    text = "".join(f"{name}\n" for name in names)
    try:
        is_readable = _parse_text(text, path, "list of class names") == tuple(names)
    except ValueError:
        is_readable = False
    if not is_readable:
        text = json.dumps(list(names), ensure_ascii=False, indent=1) + "\n"
    write_text(path, text)


# Forms --------------------------------------------------------------------------------------------


def parse_names(value: Any, location: str | Path) -> tuple[str, ...]:
    """Returns the names that a value of JSON or Python holds, in the order of the labels.

    Args:
        value: A list or mapping in one of the forms above.
        location: Where it was found, for messages.

    Raises:
        ValueError: It has no such form, or the order is not clear.
    """
    if isinstance(value, Mapping):
        for key in LIST_KEYS:
            if isinstance(value.get(key), Mapping | list):
                return parse_names(value[key], f"{location} {key}")
        return _parse_mapping(value, location)
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{location} holds {str(value)[:40]!r}: it should be a list of names, or "
            '{"0": "name", ...}'
        )
    return _parse_list(value, location)


def _read_names(path: Path, content: str, *, may_be_blank: bool = False) -> tuple[str, ...]:
    """Reads a file of names in any form; `content` names it in messages."""
    text = read_text(path)
    if "\0" in text:
        raise ValueError(f"{path} is no {content}: it is not text, or UTF-16 without its mark")
    names = _parse_text(text, path, content, may_be_blank=may_be_blank)
    if not (names and text.strip()):
        raise ValueError(f"{path} holds no names: give one per line")
    if "" in names and not may_be_blank:
        raise ValueError(f"{path}: the name of class {names.index('')} is empty, write one")
    return names


def _parse_text(
    text: str, path: Path, content: str, *, may_be_blank: bool = False
) -> tuple[str, ...]:
    """Returns the names of a text in any form."""
    start = text.lstrip()[:1]
    if start == "{" or path.suffix.lower() == ".json":
        return parse_names(_parse_structure(text, path, content), path)
    literal = parse_literal(text) if start == "[" else text
    if isinstance(literal, list):
        return parse_names(literal, path)
    return _parse_lines(text, path, may_be_blank=may_be_blank)


def _parse_structure(text: str, path: Path, content: str) -> Any:
    """Returns the JSON, JSON lines or Python literal that a text holds."""
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    except json.JSONDecodeError as error:
        literal = parse_literal(text)
        if not isinstance(literal, str):
            return literal
        try:
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is no {content}: it is not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {content}: {error}") from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; raises ValueError for two values of one key."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key!r} is there {count} times")
    return dict(pairs)


def _parse_lines(text: str, path: Path, *, may_be_blank: bool) -> tuple[str, ...]:
    """Returns the names of a text with one per line."""
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if not may_be_blank:
        while lines and not lines[0]:
            del lines[0]
        if "" in lines:
            raise ValueError(
                f"{path} line {lines.index('') + 1} is blank: remove it, or write the name of "
                f"class {lines.index('')}"
            )
    numbered = [NUMBERED_LINE.fullmatch(line) for line in lines]
    if len(lines) > 1 and all(numbered):
        pairs = [(int(match[1]), match[2]) for match in numbered if match]
        return _order_by_number(pairs, path, "its lines begin with")
    synsets = [WORDNET_LINE.fullmatch(line) for line in lines]
    if all(synsets):
        return tuple(match[1] for match in synsets if match)
    return tuple(lines)


def _parse_list(items: Sequence[Any], location: str | Path) -> tuple[str, ...]:
    """Returns the names of a list of names, objects or pairs."""
    if not (items and all(isinstance(item, Mapping) for item in items)):
        return tuple(_get_name(item, f"{location} [{k}]") for k, item in enumerate(items))
    names = [_get_object_name(item, f"{location} [{k}]") for k, item in enumerate(items)]
    for key in NUMBER_KEYS:
        numbers = [int(item[key]) for item in items if _is_number(item.get(key))]
        if len(numbers) == len(names):
            return _order_by_number([*zip(numbers, names, strict=True)], location, "its labels are")
    return tuple(names)


def _parse_mapping(mapping: Mapping[Any, Any], location: str | Path) -> tuple[str, ...]:
    """Returns the names of {number: name}, {number: [class, name]} or {name: number}."""
    has_number_keys = all(_is_number(key) for key in mapping)
    has_number_values = all(_is_number(value) for value in mapping.values())
    if set(mapping) <= set(NUMBER_KEYS) or not (has_number_keys or has_number_values):
        if mapping and {"name", "answer"} & mapping.keys():
            return _parse_list([mapping], location)
        keys = ", ".join(repr(str(key)[:20]) for key in list(mapping)[:3]) or "none"
        raise ValueError(
            f"{location} is no answer list or list of names (keys {keys}): "
            'give one name per line, a JSON list, or {"0": "name", "1": ...}'
        )
    by_key = [(key, value) for key, value in mapping.items()]
    by_value = [(value, key) for key, value in mapping.items()]
    if has_number_keys and has_number_values:
        if any(int(key) != int(value) for key, value in by_key):
            raise ValueError(
                f"{location} maps numbers to numbers: the names may be the keys or the values, "
                "write a list of names in the order of the labels"
            )
    pairs = by_key if has_number_keys else by_value
    numbered_names = [
        (int(number), _get_name(name, f"{location} {number!r}")) for number, name in pairs
    ]
    return _order_by_number(numbered_names, location, "its labels are")


def _order_by_number(
    pairs: Sequence[tuple[int, str]], location: str | Path, description: str
) -> tuple[str, ...]:
    """Returns names in the order of their numbers, which must be 0 to A - 1, each once."""
    numbers = sorted(number for number, _ in pairs)
    if len(pairs) > 1 and numbers == list(range(1, len(pairs) + 1)):
        raise ValueError(
            f"{location}: {description} 1 to {len(pairs)}, which may count from 1 or leave out "
            "class 0: number the names from 0, or write a JSON list if the numbers are part of them"
        )
    if numbers != list(range(len(pairs))):
        raise ValueError(
            f"{location}: {description} {_shorten(numbers)}, its labels are not 0 to "
            f"{len(pairs) - 1}, each once"
        )
    return tuple(name for _, name in sorted(pairs, key=lambda pair: pair[0]))


def _shorten(numbers: Sequence[int]) -> str:
    """Returns the first numbers of a list."""
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def _is_number(value: Any) -> bool:
    """Returns whether a key or value is a label: 3 or "3"."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (
        isinstance(value, str) and value.isascii() and value.isdecimal()
    )


def _get_object_name(item: Mapping[str, Any], location: str) -> str:
    """Returns the name in an object such as {"id": 1, "name": "tench"}."""
    for key in NAME_KEYS:
        if key in item:
            return _get_name(item[key], location)
    raise ValueError(f"{location} has no name: it should be an object with a field name")


def _get_name(value: Any, location: str) -> str:
    """Returns a name, or that of the pair [class, name] in which ImageNet's lists have it."""
    if isinstance(value, list | tuple) and len(value) == 2:
        value = value[1]
    if isinstance(value, bool) or is_null(value) or not isinstance(value, str | int | float):
        raise ValueError(f"{location} is {str(value)[:40]!r}: it should be a name, a text")
    return str(value).strip()
