"""Records into a root: checked one by one, written aside, moved in place when all splits are whole.

A missing or unreadable image, or an empty text, is counted, named and passed over up to a stated
share of the records;
beyond it nothing is written. Records are not kept in memory.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from beit3.data.prepare.formats.files import Expected
from beit3.data.prepare.statistics import NAMED, Lengths, Survey, describe
from beit3.data.stores.records import FILE_FIELDS, IMAGE_FIELDS
from beit3.data.stores.split_files import STORE_SUFFIXES
from beit3.files import parse_tar_member, read_tar_member
from beit3.images import find_header_fault
from beit3.progress import show_progress

__all__ = ["BAD_SHARE", "Lengths", "describe", "find_fault", "image_fault", "write_splits"]

BAD_SHARE = 0.01
"""Share of the records that may be unusable before `prepare` refuses the whole."""


def write_splits(
    root: Path,
    task: str,
    source: str,
    records: Iterable[tuple[str, dict[str, Any]]],
    *,
    lengths: Lengths | None = None,
    bad_share: float = BAD_SHARE,
) -> dict[str, Any]:
    """Write `root/task/source/<split>.jsonl` from (split, record) pairs; image paths become
    relative to `root`.

    Returns the report: records per split, the lines of those passed over, and what `Survey` counts:
    images and their
    uses, lengths of texts (in words without `lengths`), balance of labels. ValueError beyond
    `bad_share`; what was there then stays.
    """
    written: Counter[str] = Counter()
    bad: list[str] = []
    known: dict[str, str] = {}
    survey = Survey(lengths)
    held_out: set[tuple[str, str]] = set()
    place = os.path.realpath(root)
    with (
        split_writers(root / task / source, ".jsonl") as file_of,
        show_progress(f"{task} {source}: records") as advance,
    ):
        for count, (split, record) in enumerate(records, 1):
            advance(count, 0)
            fault = find_fault(record, known) or doubled(split, record, held_out)
            if fault:
                bad.append(printable(f"{record.get('id', count)}: {fault}"))
                continue
            survey.add(record)
            # Links resolved first: the system walks ".." from where a link leads.
            record = record | {
                key: os.path.relpath(os.path.realpath(record[key]), place)
                for key in FILE_FIELDS
                if key in record
            }
            file_of(split).write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
            written[split] += 1
        judge(written, bad, bad_share, f"{source} records", f"for {task}")
    report = {"records": dict(written), "passed_over": bad} | survey.report()
    if "lengths" in report and lengths is None:
        train = root / task / source / "train.jsonl"
        report["lengths"]["hint"] = (
            f"for tokens: beit3 tokenizer train {train} --model {root / 'text.model'}, then "
            "prepare again"
        )
    return report


def find_fault(record: dict[str, Any], known: dict[str, str]) -> str:
    """What makes a record unusable, or ''. `known` remembers the verdict on images seen before.

    A reader that could not make a record out of a part of its file gives {id, fault}.
    """
    if "fault" in record:
        return record["fault"]
    if "text" in record and not record["text"].strip():
        return "its text is empty"
    if not all(caption.strip() for caption in record.get("captions", ())):
        return "one of its captions is empty"
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return (
            f"it holds {error.object[error.start]!r}, which is no character: write names and "
            "texts in UTF-8"
        )
    for path in (record[key] for key in IMAGE_FIELDS if key in record):
        if path not in known:
            known[path] = image_fault(
                path, (record["width"], record["height"]) if "width" in record else None
            )
        if known[path]:
            return known[path]
    return ""


def doubled(split: str, record: dict[str, Any], seen: set[tuple[str, str]]) -> str:
    """'' for a record whose id is new in its held-out split, where predictions are joined to
    records by it; else why not."""
    key = split, str(record.get("id"))
    if split == "train" or key not in seen:
        seen.update([key] if split != "train" else [])
        return ""
    return f"another record of {split} has the same id"


def image_fault(path: str, size: tuple[int, int] | None = None) -> str:
    """'' for an image whose header can be read, and is of this width and height where they are
    given; else one line with its name."""
    tar, start, length = parse_tar_member(path)
    if not os.path.exists(tar or path):
        return f"image {path} is missing" + (
            f", looked for in {path.searched}" if isinstance(path, Expected) else ""
        )
    fault = find_header_fault(
        io.BytesIO(read_tar_member(tar, start, length)) if tar else path, size
    )
    return f"image {path} {fault}" if fault else ""


def judge(written: Counter[str], bad: list[str], bad_share: float, what: str, goal: str) -> None:
    """ValueError where too many records are unusable or none can be trained or scored on."""
    total = written.total() + len(bad)
    if len(bad) > bad_share * total:
        raise ValueError(
            f"{len(bad)} of {total} {what} are unusable, {bad_share:.0%} are allowed, nothing was "
            "written: " + "; ".join(bad[:NAMED]) + (" ..." if len(bad) > NAMED else "")
        )
    if not written["train"] and not written["val"]:
        others = f" in train or val, only in {', '.join(written)}" if written.total() else ""
        raise ValueError(f"no {what} found {goal}{others}: check --raw")


@contextmanager
def split_writers(folder: Path, ending: str) -> Iterator[Callable[[str], BinaryIO]]:
    """Gives `file_of(split)`: files aside that take their places at the end, also those of records
    kept in another way.

    After an error they vanish, and so do new folders.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    files: dict[str, BinaryIO] = {}

    def file_of(split: str) -> BinaryIO:
        if split not in files:
            folder.mkdir(parents=True, exist_ok=True)
            files[split] = (folder / f"{split}{ending}.{os.getpid()}.partial").open("wb")
        return files[split]

    try:
        yield file_of
        for file in files.values():
            file.close()
        for split, file in files.items():
            Path(file.name).replace(folder / f"{split}{ending}")
            for other in STORE_SUFFIXES:
                if other != ending:
                    (folder / f"{split}{other}").unlink(missing_ok=True)
    except BaseException:
        for file in files.values():
            with suppress(OSError):  # a full disk fails a second time when the rest is flushed
                file.close()
            Path(file.name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty: what was read of tars stays
            for path in new:
                path.rmdir()
        raise


def printable(line: str) -> str:
    """`line` with control characters, line ends and what is no character spelled out: names come
    from outside."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)
