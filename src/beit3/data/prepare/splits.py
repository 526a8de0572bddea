"""Writes records into a root: checks each record, and moves the files into place at the end.

A record with a missing or unreadable image or an empty text is counted, listed and skipped, up to
an allowed fraction of the records. Beyond it nothing is written. Files that a reader left out are
counted by kind. Records are not kept in memory.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from beit3.data.prepare.formats.files import MissingImagePath
from beit3.data.prepare.statistics import (
    MAX_LISTED_FAULTS,
    RecordStatistics,
    TokenCounter,
    describe,
    describe_left_out,
)
from beit3.data.stores.records import FILE_FIELDS, IMAGE_FIELDS
from beit3.data.stores.split_files import STORE_SUFFIXES
from beit3.files import make_relative, parse_tar_member, read_tar_member
from beit3.images import find_header_fault
from beit3.progress import show_progress

__all__ = [
    "BAD_SHARE",
    "TokenCounter",
    "describe",
    "find_fault",
    "find_image_fault",
    "write_splits",
]

BAD_SHARE = 0.01
"""Fraction of the records that may be unusable before `prepare` refuses all of them."""


def write_splits(
    root: Path,
    task: str,
    source: str,
    records: Iterable[tuple[str, dict[str, Any]]],
    *,
    lengths: TokenCounter | None = None,
    bad_share: float = BAD_SHARE,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes `root/task/source/<split>.jsonl`, with image paths relative to `root`.

    Args:
        root: Directory of the prepared data of all tasks.
        task: Name of the task.
        source: Name of the source.
        records: Pairs of (split, record).
        lengths: How texts are measured; None counts words.
        bad_share: Fraction of the records that may be unusable.
        class_names: Names of the labels; those without a record are named in the report.

    Returns:
        The report: number of records per split (`records`), one line per unusable record
        (`passed_over`), the number of files that readers left out by kind (`left_out`),
        `classes_without_images`, and what `RecordStatistics.report` counts.

    Raises:
        ValueError: More than `bad_share` of the records are unusable, or there are none. Existing
            files stay.
    """
    check_bad_share(bad_share)
    num_written: Counter[str] = Counter()
    faults: list[str] = []
    left_out: Counter[str] = Counter()
    image_faults: dict[str, str] = {}
    held_out_ids: set[tuple[str, str]] = set()
    statistics = RecordStatistics(lengths)
    # Links are resolved first: the system follows ".." from where a link leads.
    real_root = os.path.realpath(root)
    with (
        open_split_writers(root / task / source, ".jsonl") as open_split,
        show_progress(f"{task} {source}: records") as advance,
    ):
        for count, (split, record) in enumerate(records, 1):
            advance(count, 0)
            if "left_out" in record:
                left_out[record["left_out"]] += 1
                continue
            fault = find_fault(record, image_faults)
            fault = fault or find_duplicate(split, record, held_out_ids)
            if fault:
                faults.append(escape_unprintable(f"{record.get('id', count)}: {fault}"))
                continue
            statistics.add(record)
            relative_paths = {
                key: make_relative(record[key], real_root) for key in FILE_FIELDS if key in record
            }
            line = json.dumps(record | relative_paths, ensure_ascii=False)
            open_split(split).write(f"{line}\n".encode())
            num_written[split] += 1
        check_unusable(
            num_written, faults, bad_share, f"{source} records", f"for {task}", left_out=left_out
        )
    report: dict[str, Any] = {"records": dict(num_written), "passed_over": faults}
    report |= report_splits(num_written) | report_left_out(left_out) | statistics.report()
    if class_names:
        report |= report_empty_classes(class_names, statistics.labels)
    if "lengths" in report and lengths is None:
        train = root / task / source / "train.jsonl"
        report["lengths"]["hint"] = (
            f"for tokens: beit3 tokenizer train {train} --model {root / 'text.model'}, then "
            "prepare again"
        )
    return report


# Checks ---------------------------------------------------------------------------------------


def find_fault(record: dict[str, Any], image_faults: dict[str, str]) -> str:
    """Returns why a record is unusable, or "".

    Args:
        record: The record, or {id, fault} from a reader that could not make one.
        image_faults: Image path -> its fault or "". Each image is checked once and added to it.
    """
    if "fault" in record:
        return record["fault"]
    if "text" in record and not record["text"].strip():
        return "its text is empty"
    if not all(caption.strip() for caption in record.get("captions", ())):
        return "one of its captions is empty"
    if invalid := find_invalid_character(record):
        return invalid
    size = (record["width"], record["height"]) if "width" in record else None
    for path in (record[key] for key in IMAGE_FIELDS if key in record):
        if path not in image_faults:
            image_faults[path] = find_image_fault(path, size)
        if image_faults[path]:
            return image_faults[path]
    return ""


def find_invalid_character(record: dict[str, Any]) -> str:
    """Returns the fault of a record whose names or texts cannot be written in UTF-8, or ""."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return (
            f"it holds {error.object[error.start]!r}, which is no character: write names and "
            "texts in UTF-8"
        )
    return ""


def find_duplicate(split: str, record: dict[str, Any], held_out_ids: set[tuple[str, str]]) -> str:
    """Returns a fault where a held-out split repeats an id, else "" and notes (split, id).

    Predictions are joined to the records of a held-out split by id; training records may share one.
    """
    if split == "train":
        return ""
    key = split, str(record.get("id"))
    if key in held_out_ids:
        return f"another record of {split} has the same id"
    held_out_ids.add(key)
    return ""


def find_image_fault(path: str, size: tuple[int, int] | None = None) -> str:
    """Returns why an image cannot be used, with its path, or "".

    The image must exist, and its header must be readable and agree with `size` (width, height).
    """
    tar, start, length = parse_tar_member(path)
    if not os.path.exists(tar or path):
        searched = f", looked for in {path.searched}" if isinstance(path, MissingImagePath) else ""
        return f"image {path} is missing{searched}"
    if not os.path.isfile(tar or path):
        return f"image {path} is a folder, a pipe or a device, not a file"
    image = io.BytesIO(read_tar_member(tar, start, length)) if tar else path
    fault = find_header_fault(image, size)
    return f"image {path} {fault}" if fault else ""


def check_bad_share(bad_share: float) -> None:
    """Raises ValueError for a fraction of unusable records that is not between 0 and 1."""
    if not 0 <= bad_share <= 1:
        raise ValueError(f"--bad_share {bad_share}: give a fraction from 0 to 1, such as 0.05")


def check_unusable(
    num_written: Counter[str],
    faults: list[str],
    bad_share: float,
    content: str,
    purpose: str,
    *,
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Raises ValueError for too many unusable records, or for none at all.

    A test split alone is enough: released weights are scored on it.

    Args:
        num_written: Split -> number of usable records.
        faults: One line per unusable record.
        bad_share: Fraction of the records that may be unusable.
        content: What the records are, for the message ("main records").
        purpose: What they are for, for the message ("for vqa").
        left_out: Kind -> number of files that were no records.
    """
    total = num_written.total() + len(faults)
    if len(faults) > bad_share * total:
        listed = "; ".join(faults[:MAX_LISTED_FAULTS])
        ellipsis = " ..." if len(faults) > MAX_LISTED_FAULTS else ""
        raise ValueError(
            f"{len(faults)} of {total} {content} are unusable, {bad_share:.0%} are allowed "
            f"(--bad_share), nothing was written: {listed}{ellipsis}"
        )
    if not num_written.total():
        reason = f" ({describe_left_out(left_out)} left out)" if left_out else ""
        raise ValueError(f"no {content} found {purpose}{reason}: check --raw")


def report_splits(num_records: Mapping[str, int]) -> dict[str, str]:
    """Returns the part of the report that says what records without a train split lack."""
    if num_records.get("train"):
        return {}
    splits = [split for split, count in num_records.items() if count]
    command = f"beit3 eval WEIGHTS --split {splits[0]}"
    text = f"only {' and '.join(splits)}: enough for `{command}`, training needs train records"
    return {"attention": text}


def report_left_out(left_out: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Returns the part of the report that counts files left out, the most frequent kind first."""
    if not left_out:
        return {}
    return {"left_out": dict(Counter(left_out).most_common())}


def report_empty_classes(
    class_names: Sequence[str], label_counts: Mapping[int, int]
) -> dict[str, list[str]]:
    """Returns the part of the report that names the classes of which there is no record."""
    names = [name for label, name in enumerate(class_names) if not label_counts.get(label)]
    return {"classes_without_images": names} if names else {}


# Files ----------------------------------------------------------------------------------------


@contextmanager
def open_split_writers(directory: Path, suffix: str) -> Iterator[Callable[[str], BinaryIO]]:
    """Yields a function that opens the file of a split, under a temporary name.

    At the end the files `<split><suffix>` take their places, and those of the same splits with
    other suffixes are removed. After an error the temporary files and new directories are removed.
    """
    new_directories = [path for path in (directory, *directory.parents) if not path.exists()]
    files: dict[str, BinaryIO] = {}

    def open_split(split: str) -> BinaryIO:
        if split not in files:
            directory.mkdir(parents=True, exist_ok=True)
            files[split] = (directory / f"{split}{suffix}.{os.getpid()}.partial").open("wb")
        return files[split]

    try:
        yield open_split
        for file in files.values():
            file.close()
        for split, file in files.items():
            _replace_split(Path(file.name), directory, split, suffix)
    except BaseException:
        for file in files.values():
            with suppress(OSError):  # a full disk fails again when the rest is flushed
                file.close()
            Path(file.name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: parts that were read of tars stay
            for path in new_directories:  # the deepest first
                path.rmdir()
        raise


def _replace_split(partial: Path, directory: Path, split: str, suffix: str) -> None:
    """Moves a finished file into place and removes the same split with other suffixes."""
    partial.replace(directory / f"{split}{suffix}")
    for other_suffix in STORE_SUFFIXES:
        if other_suffix != suffix:
            (directory / f"{split}{other_suffix}").unlink(missing_ok=True)


def escape_unprintable(line: str) -> str:
    """Escapes control characters, line ends and invalid characters: names come from outside."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
