"""Names of the VQA head's outputs and of classes: a file, a list or a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beit3.data.stores import label_names

Names = str | Path | Sequence[str] | Mapping[int | str, str] | None
"""Names of a head's outputs: a file, a list, {label: name}, or none."""


def read_answers(names: Names) -> tuple[str, ...]:
    """Returns the names of the VQA head's outputs.

    A file has the released format, or another of those that `label_names` reads. Of a root of
    records the answer list of its VQA records is read.
    """
    if isinstance(names, str | Path):
        return label_names.read_answers(Path(names))
    return _parse_names(names, "answers")


def read_classes(names: Names) -> tuple[str, ...]:
    """Returns class names.

    A file has one name per line, or is JSON as dense tasks, Keras or Hugging Face write it. Of a
    root of records the names of its ImageNet records are read.
    """
    if isinstance(names, str | Path):
        return label_names.read_class_names(Path(names))
    return _parse_names(names, "classes")


def _parse_names(names: Any, location: str) -> tuple[str, ...]:
    """Returns names that are no file; () for None."""
    if names is None:
        return ()
    return label_names.parse_names(names if isinstance(names, Mapping) else list(names), location)
