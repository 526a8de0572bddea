"""Shards: records that stay in their tars, read at random through one compact index a split.

An index, `root/<task>/<source>/<split>.shards`, is a line of JSON (the tars and how many records each has), then one row of
fixed size per record: its key, start and size of its image, and those of its caption. Rows are memory-mapped; 100 million
take about 4 GB. `write_shards` makes it, reading each tar once. A record is {id: "shard/key", image: "tar@start+size",
text}, paths relative to the root.
"""

import json
import operator
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from beit3.data.prepare.formats.files import HELD_OUT, holdout
from beit3.data.prepare.formats.tars import Sample, caption, plain, samples, shards
from beit3.data.prepare.splits import BAD_SHARE, find_fault, judge, printable, split_writers
from beit3.data.prepare.statistics import Lengths, Survey
from beit3.data.process_pool import finished
from beit3.files import atomic_write, format_tar_member, read_tar_member
from beit3.machine import count_cores
from beit3.progress import bar

FORMAT = "beit3 shards 1"
PARTS = ".parts"
"""Folder beside the index with what was read of each tar, until all are: an interrupted `prepare` goes on from it."""

HEADER = 1 << 28
"""Bytes of the longest first line that is read: the names of a million tars."""

ALONE = 1 << 26
"""Bytes of tars that are read before other processes would have started."""


class Shards:
    """The records of an index, by index. Safe to send to loader workers and to read from several processes and threads.

    ValueError for an index that is cut, and where a tar is missing or no longer the one that was prepared.
    """

    def __init__(self, path: str | Path, root: str | Path) -> None:
        self.path, self.root = Path(path), Path(root)
        header, self.start = _header(self.path)
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no index of shards of this version ({FORMAT}): run `beit3 prepare` again"
            )
        self.tars: list[dict[str, Any]] = header["tars"]
        self.columns = _columns(header["width"], captions=header["captions"])
        self.runs = np.array([tar["records"] for tar in self.tars], dtype=np.int64)
        self._ends = np.cumsum(self.runs)
        found = (self.path.stat().st_size - self.start) / self.columns.itemsize
        if found != len(self):
            raise ValueError(f"{path} has {found:g} of {len(self)} rows: run `beit3 prepare` again")
        self._rows: np.ndarray | None = None
        self._known: set[int] = set()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index`; its caption is read from the tar, its image is not."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        tar, row = self._tar(shard), self._mapped()[index]
        record = {"id": f"{self.tars[shard]['name']}/{row['key'].decode()}"}
        record["image"] = format_tar_member(
            self.tars[shard]["path"], int(row["image"]), int(row["image_size"])
        )
        if "text" not in (self.columns.names or ()):
            return record
        try:
            return record | {
                "text": caption(
                    read_tar_member(tar, int(row["text"]), int(row["text_size"])),
                    bool(row["in_json"]),
                )
            }
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read the caption of {record['id']} in {tar}: {error}"
            ) from None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def _mapped(self) -> np.ndarray:
        if self._rows is None:
            self._rows = np.memmap(
                self.path, dtype=self.columns, mode="r", offset=self.start, shape=(len(self),)
            )
        return self._rows

    def _tar(self, shard: int) -> Path:
        """The file of a shard, looked at once: offsets into another file would give other bytes."""
        path = self.root / self.tars[shard]["path"]
        if shard not in self._known:
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise ValueError(
                    f"cannot read {path}: {error.strerror}; it is named by {self.path}"
                ) from None
            if size != self.tars[shard]["bytes"]:
                raise ValueError(
                    f"{path} has {size} bytes, not the {self.tars[shard]['bytes']} of {self.path}: run `beit3 prepare` again"
                )
            self._known.add(shard)
        return path


def write_shards(
    root: Path,
    task: str,
    source: str,
    raw: Path,
    *,
    captions: bool,
    lengths: Lengths | None = None,
    bad_share: float = BAD_SHARE,
    workers: int = 0,
) -> dict[str, Any]:
    """Write `root/task/source/<split>.shards` over the tars of `raw`, read by `workers` processes; 0 = one a core.

    Returns the report of `write_splits`; `passed_over` also names tars that are cut or damaged, of which the whole records
    are kept. ValueError beyond `bad_share` of the records: what was there then stays, and so does what was read of tars.
    """
    files, folder = shards(raw), root / task / source
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    parts = [folder / PARTS / plain(name) for _, name, _ in files]
    read = partial(_read, captions=captions, lengths=lengths)
    heads = _all(
        [(file, part) for (file, *_), part in zip(files, parts, strict=True)],
        read,
        workers,
        f"{task} {source}: tars",
    )
    bad = [
        f"{name}/{line}"
        for (_, name, _), head in zip(files, heads, strict=True)
        for line in head["faults"]
    ]
    cut = [head["cut"] for head in heads if head["cut"]]
    sides: dict[str, list[Shard]] = {}
    has_val = "val" in (split for *_, split in files)
    for (file, name, split), part, head in zip(files, parts, heads, strict=True):
        for side, records in _sides(split, head, has_val):
            if records:
                sides.setdefault(side, []).append(Shard(file, name, records, part, head))
    written = Counter({side: sum(shard.records for shard in some) for side, some in sides.items()})
    if cut and not written:
        raise ValueError(f"no {source} records found in {len(files)} tars: {printable(cut[0])}")
    with split_writers(folder, ".shards") as file_of:
        judge(written, bad, bad_share, f"{source} records", f"for {task}")
        for side, some in sides.items():
            _write_index(file_of(side), some, side, root)
    shutil.rmtree(folder / PARTS)
    survey = Survey(lengths)
    for head in heads:
        survey.take(head["texts"])
    images = {"distinct": written.total(), "median_uses": 1, "most_uses": 1}
    return {
        "records": dict(written),
        "tars": len(files),
        "passed_over": [*cut, *bad],
        "images": images,
    } | survey.report()


class Shard(NamedTuple):
    """Those records of a tar that go to one split; `head` and rows of all of them are in `part`."""

    file: Path
    name: str
    records: int
    part: Path
    head: dict[str, Any]


def _columns(width: int, *, captions: bool, held_out: bool = False) -> np.dtype:
    """A row, of keys of at most `width` characters."""
    columns: list[tuple[str, str]] = [("key", f"S{width}"), ("image", "<i8"), ("image_size", "<i4")]
    columns += [("text", "<i8"), ("text_size", "<i4"), ("in_json", "?")] if captions else []
    return np.dtype(columns + [("held_out", "?")] * held_out)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON of the first line and where the rows begin; ValueError where it is not that."""
    with path.open("rb") as file:
        line = file.readline(HEADER)
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} does not begin with a line of JSON: run `beit3 prepare` again")
    return header, len(line)


def _all(
    jobs: list[tuple[Path, Path]],
    read: Callable[[Path, Path], dict[str, Any]],
    workers: int,
    label: str,
) -> list[dict[str, Any]]:
    """`read(tar, part)` of all jobs, in their order."""
    small = sum(os.stat(tar).st_size for tar, _ in jobs) < ALONE
    heads: dict[int, dict[str, Any]] = {}
    with bar(label) as advance:
        for number, head in finished(
            read,
            dict(enumerate(jobs)),
            1 if small else workers or count_cores(),
            module=__name__,
        ):
            heads[number] = head
            advance(len(heads), len(jobs))
    return [heads[number] for number in range(len(jobs))]


def _read(tar: Path, part: Path, *, captions: bool, lengths: Lengths | None) -> dict[str, Any]:
    """Read a tar, keep its rows in `part`, and return the head of that file; nothing is done where it is there already."""
    status = os.stat(tar)
    measure = [lengths.limit, lengths.unk, lengths.num_pieces] if lengths else None
    of = [FORMAT, str(tar), status.st_size, status.st_mtime_ns, captions, measure]
    if part.is_file() and (head := _header(part)[0]).get("of") == of:
        return head
    rows: list[tuple] = []
    faults: list[str] = []
    survey, cut = Survey(lengths), ""
    try:
        for sample in samples(tar, captions=captions):
            fault = sample.fault or (find_fault({"text": sample.text}, {}) if captions else "")
            if fault:
                faults.append(f"{sample.key}: {fault}")
                continue
            rows.append(_row(sample, captions=captions))
            if captions:
                survey.add({"text": sample.text})
    except tarfile.TarError as error:
        cut = str(error)
    width = max((len(row[0]) for row in rows), default=1)
    made = np.array(rows, dtype=_columns(width, captions=captions, held_out=True))
    head = {"of": of, "width": width, "records": len(rows), "held_out": int(made["held_out"].sum())}
    head |= {"faults": faults, "cut": cut, "texts": survey.texts()}
    with atomic_write(part) as file:
        file.write(f"{json.dumps(head)}\n".encode())
        file.write(made.tobytes())
    return head


def _row(sample: Sample, *, captions: bool) -> tuple:
    assert sample.image and (sample.caption or not captions)
    text = (*sample.caption, sample.in_json) if captions and sample.caption else ()
    return (sample.key.encode(), *sample.image, *text, holdout(sample.key, HELD_OUT))


def _sides(split: str, head: dict[str, Any], has_val: bool) -> list[tuple[str, int]]:
    """(split, records) of a tar: where nobody made a val, the keys that are held out are it."""
    if split != "train" or has_val:
        return [(split, head["records"])]
    return [("train", head["records"] - head["held_out"]), ("val", head["held_out"])]


def _write_index(file: BinaryIO, some: list[Shard], side: str, root: Path) -> None:
    """The header, then the rows of `some`, one tar in memory at a time."""
    place, captions, width = (
        os.path.realpath(root),
        some[0].head["of"][4],
        max(shard.head["width"] for shard in some),
    )
    tars = [
        {
            "path": os.path.relpath(os.path.realpath(shard.file), place),
            "name": shard.name,
            "bytes": shard.head["of"][2],
            "records": shard.records,
        }
        for shard in some
    ]
    file.write(
        f"{json.dumps({'format': FORMAT, 'captions': captions, 'width': width, 'tars': tars})}\n".encode()
    )
    columns = _columns(width, captions=captions)
    for shard in some:
        own = _columns(shard.head["width"], captions=captions, held_out=True)
        rows = np.fromfile(shard.part, dtype=own, offset=_header(shard.part)[1])
        if shard.records < len(rows):
            rows = rows[rows["held_out"] == (side == "val")]
        file.write(rows[list(columns.names or ())].astype(columns).tobytes())
