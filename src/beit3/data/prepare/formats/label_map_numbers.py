"""The numbers in label maps, and what they mean.

The options of a dataset say it:

- `reduce_zero`: 0 is no class, and 1 is label 0.
- `ignore`: the number of pixels that count nowhere. Where it is not 255, 255 is no class either.
- `lookup`, if present: the label of each number, `ignore` for none.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.views.label_maps import IGNORE_INDEX, read_pixel_values
from beit3.progress import show_progress

Options = dict[str, Any]

MAX_LISTED_NUMBERS = 10


@dataclass(frozen=True)
class LabelNumbers:
    """The numbers that occur in the label maps of a dataset."""

    by_path: dict[Path, frozenset[int]]
    """Empty for a label map that cannot be read."""
    faults: dict[Path, str]
    """Label maps that cannot be read, with the reason."""
    all: frozenset[int]
    """Those of all label maps, without 255."""
    has_ignored: bool
    """Whether 255 occurs."""

    @property
    def largest(self) -> int:
        """The largest number without 255; 0 if there is none."""
        return max(self.all, default=0)


def read_all_numbers(paths: Iterable[Path]) -> LabelNumbers:
    """Reads the numbers in label maps. A file that cannot be read has none."""
    by_path: dict[Path, frozenset[int]] = {}
    faults: dict[Path, str] = {}
    with show_progress("label maps") as advance:
        for count, path in enumerate(paths, 1):
            advance(count, 0)
            try:
                by_path[path] = find_numbers(read_pixel_values(path))
            except ValueError as error:
                by_path[path] = frozenset()
                faults[path] = str(error)
    numbers: frozenset[int] = frozenset().union(*by_path.values())
    return LabelNumbers(by_path, faults, numbers - {IGNORE_INDEX}, IGNORE_INDEX in numbers)


def find_numbers(values: np.ndarray) -> frozenset[int]:
    """Returns the numbers that occur in a label map."""
    if values.size and 0 <= values.min() and values.max() < 1 << 16:
        return frozenset(np.flatnonzero(np.bincount(values.ravel())).tolist())
    return frozenset(np.unique(values).tolist())


def name_by_number(numbers: LabelNumbers, *, start: int) -> tuple[str, ...]:
    """Returns names for classes that no list names: the numbers from `start` to the largest."""
    return tuple(str(number) for number in range(start, numbers.largest + 1))


def check_numbers(
    numbers: LabelNumbers, class_names: Sequence[str], options: Options, raw: Path
) -> None:
    """Raises ValueError where no class is left in the label maps, or one of black-and-white masks.

    Label maps that cannot be read are no matter of this check.
    """
    if not numbers.all and not numbers.has_ignored:
        return
    first = 1 if options["reduce_zero"] else 0
    named = f" ({', '.join(class_names[:2])})" if len(class_names) == 2 else ""
    remedy = (
        f"number the classes from {first}; for a mask of two{named} write {first} and {first + 1}"
    )
    content = " and ".join(str(number) for number in sorted(numbers.all)[:MAX_LISTED_NUMBERS])
    if not has_labels(numbers.all, options):
        unlabeled = f"{content}, which is unlabeled" if content else ""
        ignored = f"{IGNORE_INDEX}, which is ignored" if numbers.has_ignored else ""
        held = ", and ".join(filter(None, (unlabeled, ignored)))
        raise ValueError(
            f"no class is left in the {len(numbers.by_path)} label maps of {raw}, which hold only "
            f"{held}: {remedy}"
        )
    if numbers.all == {0} and numbers.has_ignored:
        raise ValueError(
            f"the {len(numbers.by_path)} label maps of {raw} hold only 0 and {IGNORE_INDEX}, which "
            f"is ignored, so that one class is left: {remedy}"
        )


def find_wrong_number(
    numbers: Collection[int], path: Path, class_names: Sequence[str], options: Options
) -> str:
    """Returns which numbers of a label map are no class, or ""."""
    lookup = options.get("lookup")
    limit = len(lookup) if lookup else len(class_names) + options["reduce_zero"]
    ignored = {IGNORE_INDEX, options["ignore"]}
    wrong = sorted(
        number for number in numbers if not 0 <= number < limit and number not in ignored
    )
    if not wrong:
        return ""
    listed = ", ".join(map(str, wrong[:MAX_LISTED_NUMBERS]))
    first = 1 if options["reduce_zero"] else 0
    return (
        f"its label map {path} holds {listed}, but the {len(class_names)} classes are numbered "
        f"{first} to {limit - 1}: name all classes in the list, or write {IGNORE_INDEX} for none"
    )


def has_labels(numbers: Collection[int], options: Options) -> bool:
    """Returns whether one of the numbers is a class."""
    lookup = options.get("lookup")
    for number in numbers:
        label = lookup[number] if lookup and 0 <= number < len(lookup) else number
        if label in (IGNORE_INDEX, options["ignore"]) or (options["reduce_zero"] and number == 0):
            continue
        return True
    return False
