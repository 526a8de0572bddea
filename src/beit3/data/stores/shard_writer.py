"""Writes the index of tar shards (`beit3.data.stores.shards`), reading each tar once.

The rows of one tar go to a file of their own first, its part. An interrupted `beit3 prepare`
continues with the tars that have no part yet.
"""

import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit3.data.prepare.formats.split_names import HELD_OUT_RATE, is_held_out
from beit3.data.prepare.formats.tars import Sample, find_shards, make_plain_name, read_samples
from beit3.data.prepare.splits import (
    BAD_SHARE,
    check_bad_share,
    check_unusable,
    escape_unprintable,
    find_fault,
    open_split_writers,
    report_splits,
)
from beit3.data.prepare.statistics import RecordStatistics, TokenCounter
from beit3.data.process_pool import run_jobs
from beit3.data.stores.shards import FORMAT, make_row_dtype, read_header
from beit3.files import atomic_write, make_relative
from beit3.machine import count_cores
from beit3.progress import show_progress

PARTS_DIRECTORY = ".parts"
"""Directory beside the index, removed when the index is complete."""

MIN_PARALLEL_BYTES = 1 << 26
"""Total size of tars below which this process has read them before others would have started."""


class ShardPart(NamedTuple):
    """The records of one tar that belong to one split."""

    tar: Path
    name: str
    num_records: int
    path: Path
    """The part: header and rows of all records of the tar, of every split."""
    header: dict[str, Any]


def write_shards(
    root: Path,
    task: str,
    source: str,
    raw: Path,
    *,
    captions: bool,
    lengths: TokenCounter | None = None,
    bad_share: float = BAD_SHARE,
    workers: int = 0,
) -> dict[str, Any]:
    """Writes `root/task/source/<split>.shards` for the tars in `raw`.

    Args:
        root: Directory of all records; paths in the index are relative to it.
        task: Name of the task.
        source: Name of the source.
        raw: Directory with the tars.
        captions: Whether a record has a caption, besides its image.
        lengths: How texts are measured for the report.
        bad_share: Fraction of the records that may be unusable.
        workers: Number of processes; 0 means one per core.

    Returns:
        The report of `write_splits`. Its `passed_over` also names tars that are damaged, of which
        the intact records are kept.

    Raises:
        ValueError: More than `bad_share` of the records are unusable, or there are none. Existing
            index files and the parts of tars stay.
    """
    check_bad_share(bad_share)
    tars, directory = find_shards(raw), root / task / source
    (directory / PARTS_DIRECTORY).mkdir(parents=True, exist_ok=True)
    paths = [directory / PARTS_DIRECTORY / make_plain_name(name) for _, name, _ in tars]
    headers = _read_tars(
        [(tar, path) for (tar, *_), path in zip(tars, paths, strict=True)],
        partial(_read_tar, captions=captions, lengths=lengths),
        workers,
        f"{task} {source}: tars",
    )
    faults: list[str] = []
    damaged: list[str] = []
    parts: dict[str, list[ShardPart]] = {}
    has_val = "val" in (split for *_, split in tars)
    for (tar, name, tar_split), path, header in zip(tars, paths, headers, strict=True):
        faults += [f"{name}/{fault}" for fault in header["faults"]]
        damaged += [header["cut"]] if header["cut"] else []
        for split, size in _count_by_split(tar_split, header, has_val):
            if size:
                part = ShardPart(tar, name, size, path, header)
                parts.setdefault(split, []).append(part)
    num_records = Counter(
        {split: sum(part.num_records for part in own) for split, own in parts.items()}
    )
    if damaged and not num_records:
        raise ValueError(
            f"no {source} records found in {len(tars)} tars: {escape_unprintable(damaged[0])}"
        )
    with open_split_writers(directory, ".shards") as open_split:
        check_unusable(num_records, faults, bad_share, f"{source} records", f"for {task}")
        for split, own in parts.items():
            _write_index(open_split(split), own, split, root)
    shutil.rmtree(directory / PARTS_DIRECTORY)
    statistics = RecordStatistics(lengths)
    for header in headers:
        statistics.add_counts(header["texts"])
    report = {
        "records": dict(num_records),
        "tars": len(tars),
        "passed_over": [*damaged, *faults],
        "images": {"distinct": num_records.total(), "median_uses": 1, "most_uses": 1},
    }
    return report | report_splits(num_records) | statistics.report()


# Reading tars into parts ----------------------------------------------------------------------


def _read_tars(
    jobs: list[tuple[Path, Path]],
    read: Callable[[Path, Path], dict[str, Any]],
    workers: int,
    label: str,
) -> list[dict[str, Any]]:
    """Returns `read(tar, part)` for all jobs, in their order."""
    num_bytes = sum(os.stat(tar).st_size for tar, _ in jobs)
    num_workers = 1 if num_bytes < MIN_PARALLEL_BYTES else workers or count_cores()
    headers: dict[int, dict[str, Any]] = {}
    with show_progress(label) as advance:
        for number, header in run_jobs(read, dict(enumerate(jobs)), num_workers, module=__name__):
            headers[number] = header
            advance(len(headers), len(jobs))
    return [headers[number] for number in range(len(jobs))]


def _read_tar(
    tar: Path, part: Path, *, captions: bool, lengths: TokenCounter | None
) -> dict[str, Any]:
    """Reads a tar, writes its part and returns the part's header; an up-to-date part is kept."""
    status = os.stat(tar)
    measure = [lengths.limit, lengths.unk, lengths.num_pieces] if lengths else None
    origin = [FORMAT, str(tar), status.st_size, status.st_mtime_ns, captions, measure]
    if part.is_file():
        header, _ = read_header(part)
        if header.get("of") == origin:
            return header
    rows: list[tuple] = []
    faults: list[str] = []
    statistics, damage = RecordStatistics(lengths), ""
    try:
        for sample in read_samples(tar, captions=captions):
            fault = sample.fault or (find_fault({"text": sample.text}, {}) if captions else "")
            if fault:
                faults.append(f"{sample.key}: {fault}")
                continue
            rows.append(_make_row(sample, captions=captions))
            if captions:
                statistics.add({"text": sample.text})
    except tarfile.TarError as error:
        damage = str(error)
    width = max((len(row[0]) for row in rows), default=1)
    array = np.array(rows, dtype=make_row_dtype(width, captions=captions, held_out=True))
    header = {
        "of": origin,
        "width": width,
        "records": len(rows),
        "held_out": int(array["held_out"].sum()),
        "faults": faults,
        "cut": damage,
        "texts": statistics.get_text_counts(),
    }
    with atomic_write(part) as file:
        file.write(f"{json.dumps(header)}\n".encode())
        file.write(array.tobytes())
    return header


def _make_row(sample: Sample, *, captions: bool) -> tuple:
    """Returns the row of a sample, of the type `make_row_dtype(..., held_out=True)`."""
    assert sample.image and (sample.caption or not captions)
    caption = (*sample.caption, sample.in_json) if captions and sample.caption else ()
    return (sample.key.encode(), *sample.image, *caption, is_held_out(sample.key, HELD_OUT_RATE))


# Writing the index ----------------------------------------------------------------------------


def _count_by_split(split: str, header: dict[str, Any], has_val: bool) -> list[tuple[str, int]]:
    """Returns (split, records) of a tar. Without a val of its own, the held-out keys are val."""
    if split != "train" or has_val:
        return [(split, header["records"])]
    return [("train", header["records"] - header["held_out"]), ("val", header["held_out"])]


def _write_index(file: BinaryIO, parts: list[ShardPart], split: str, root: Path) -> None:
    """Writes the header, then the rows of all parts with one tar's rows in memory at a time."""
    real_root = os.path.realpath(root)
    captions = parts[0].header["of"][4]
    width = max(part.header["width"] for part in parts)
    tars = [
        {
            "path": make_relative(part.tar, real_root),
            "name": part.name,
            "bytes": part.header["of"][2],
            "records": part.num_records,
        }
        for part in parts
    ]
    header = {"format": FORMAT, "captions": captions, "width": width, "tars": tars}
    file.write(f"{json.dumps(header)}\n".encode())
    dtype = make_row_dtype(width, captions=captions)
    for part in parts:
        part_dtype = make_row_dtype(part.header["width"], captions=captions, held_out=True)
        rows = np.fromfile(part.path, dtype=part_dtype, offset=read_header(part.path)[1])
        if part.num_records < len(rows):
            rows = rows[rows["held_out"] == (split == "val")]
        file.write(rows[list(dtype.names or ())].astype(dtype).tobytes())
