"""Records into a root: checked one by one, written aside, moved in place when a split is whole.

A missing or unreadable image, or an empty text, is counted, named and passed over up to a stated share of the records;
beyond it nothing is written.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from beit3.data.records import write_records
from beit3.progress import bar

BAD_SHARE = 0.01
"""Share of the records that may be unusable before `prepare` refuses the whole."""

NAMED = 20
"""Unusable records that a report lists by name."""


def write_splits(
    root: Path, task: str, source: str, records: Iterable[tuple[str, dict[str, Any]]], *,
    bad_share: float = BAD_SHARE,
) -> dict[str, Any]:
    """Write `root/task/source/<split>.jsonl` from (split, record) pairs; image paths become relative to `root`.

    Returns the report: records per split, and the lines of those passed over. ValueError beyond `bad_share`.
    """
    splits: dict[str, list[dict[str, Any]]] = {}
    bad: list[str] = []
    known: dict[str, str] = {}
    with bar(f"{task} {source}: records") as advance:
        for count, (split, record) in enumerate(records, 1):
            advance(count, 0)
            fault = find_fault(record, known)
            if fault:
                bad.append(f"{record.get('id', count)}: {fault}")
                continue
            if "image" in record:  # links resolved first: the system walks ".." from where a link leads
                record = record | {"image": os.path.relpath(os.path.realpath(record["image"]), os.path.realpath(root))}
            splits.setdefault(split, []).append(record)
    total = sum(map(len, splits.values())) + len(bad)
    if len(bad) > bad_share * total:
        raise ValueError(
            f"{len(bad)} of {total} {source} records are unusable, {bad_share:.0%} are allowed, nothing was written: "
            + "; ".join(bad[:NAMED]) + (" ..." if len(bad) > NAMED else "")
        )  # fmt: skip
    if not splits.get("train") and not splits.get("val"):
        raise ValueError(f"no {source} records found for {task}: check --raw")
    for split, items in splits.items():
        write_records(root / task / source / f"{split}.jsonl", items)
    return {"records": {split: len(items) for split, items in splits.items()}, "passed_over": bad}


def find_fault(record: dict[str, Any], known: dict[str, str]) -> str:
    """What makes a record unusable, or ''. `known` remembers the verdict on images seen before."""
    if "text" in record and not record["text"].strip():
        return "its text is empty"
    path = record.get("image")
    if path is None:
        return ""
    if path not in known:
        known[path] = image_fault(path)
    return known[path]


def image_fault(path: str) -> str:
    """'' for an image whose header can be read; else one line with its name."""
    if not os.path.exists(path):
        return f"image {path} is missing"
    try:
        with Image.open(path) as image:
            return "" if min(image.size) > 0 else f"image {path} is empty"
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        return f"image {path} cannot be read ({type(error).__name__})"
