"""Text corpora -> `.tokens` (`beit3.data.stores.tokens`): tokenized once, by several processes, a part of the corpora at a time.

A finished part is kept: a run that was stopped goes on from there, and how many processes work changes no byte. The parts
are put behind each other in `<source>/tokens-N/` as they come; what was there before stays in use until all are.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from beit3.data.prepare.formats.corpora import PART, Corpus, Fault, Span
from beit3.data.prepare.splits import BAD_SHARE, judge, printable, split_writers
from beit3.data.prepare.statistics import NAMED, Lengths, Survey
from beit3.data.process_pool import finished
from beit3.data.stores.records import write_text
from beit3.data.stores.tokens import ARRAYS, ENDING, RECORD, About, read_about
from beit3.data.text.packing import MARKS, Packer
from beit3.files import read_json
from beit3.machine import count_cores
from beit3.progress import bar

PLAN, LOCK = "plan.json", "lock"
"""In a folder of arrays that are not finished: what they are made of, and whether somebody is at it."""

NAMED_OF_PART = 1000
"""Documents passed over that a part names; the others it counts."""
BLOCK = 1 << 20
"""Bytes of ids, or rows, that are held before they are written."""


class Tokenizer(Protocol):
    """What is needed of `beit3.tokenizer.text.TextTokenizer`."""

    unk: int
    first_piece: int

    @property
    def mask(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def pieces(self, text: str) -> list[int]: ...

    def word(self, id: int) -> str: ...


def write_tokens(
    raw: Path,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    pack: int,
    field: str = "text",
    workers: int = 0,
    bad_share: float = BAD_SHARE,
) -> dict[str, Any]:
    """The corpora below `raw` as `folder/<split>.tokens`, in records of at most `pack` tokens; returns the report.

    field: where JSON lines and Parquet have their texts. workers: processes, 0 = one a core. Documents that cannot be read
    are counted, and named, up to `bad_share` of all; beyond it ValueError, and what was there stays.
    """
    _refuse_joined_words(tokenizer)
    corpus = Corpus.open(raw, field)
    about = About("", tokenizer.digest, tokenizer.vocab_size, pack, 0, 0, 0)
    Packer(tokenizer.pieces, pack)  # a length without room ends here
    plan = {"about": asdict(about), "part": PART, "corpus": _fingerprint(corpus)}
    with _workplace(folder, plan) as place:
        job = _Job(replace(corpus, spans=()), tokenizer, replace(about, arrays=place.name), place)
        parts = _parts(corpus.spans)
        _work(job, parts, workers or count_cores())
        report = _report(job, len(parts), bad_share)
        with split_writers(folder, ENDING) as file_of:
            for split in report["records"]:
                file_of(split).write(_appended(job, split)[1].json().encode())
    drop_unused(folder)
    return report


def drop_unused(folder: Path) -> None:
    """Remove the arrays in `folder` that no `.tokens` names and nobody is writing."""
    try:
        used = {read_about(path).arrays for path in folder.glob(f"*{ENDING}")}
    except ValueError:
        return  # which are used cannot be known
    for place in folder.glob("tokens-*"):
        if place.name not in used:
            with suppress(Timeout), FileLock(place / LOCK, timeout=0):
                shutil.rmtree(place)


# One part ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Tokenizes parts into files of their own in `place`: number.split.array, and number.json, which is written last."""

    corpus: Corpus
    tokenizer: Tokenizer
    about: About
    place: Path

    def summary(self, number: int) -> Path:
        return self.place / f"{number:06}.json"

    def lengths(self) -> Lengths:
        tokenizer = self.tokenizer
        return Lengths(
            tokenizer.pieces, self.about.pack, tokenizer.unk, tokenizer.mask - tokenizer.first_piece
        )

    def __call__(self, number: int, spans: tuple[Span, ...]) -> None:
        dtype = self.about.dtype("ids")
        packer, survey = (
            Packer(self.tokenizer.pieces, self.about.pack, typecode=dtype.char),
            Survey(self.lengths()),
        )
        pieces = np.zeros(self.about.vocab_size, np.int64)
        counts, faults, outputs = Counter[str](), list[str](), dict[str, _Output]()
        with ExitStack() as files:
            for span in spans:
                record = 0
                for document in self.corpus.documents(span):
                    counts["unusable" if isinstance(document, Fault) else "documents"] += 1
                    if isinstance(document, Fault):
                        faults += (
                            [printable(f"{document.place}: {document.why}")]
                            if len(faults) < NAMED_OF_PART
                            else []
                        )
                        continue
                    for ids in packer.records(document):
                        record += 1
                        split, _ = self.corpus.named(span, record)
                        if split not in outputs:
                            outputs[split] = files.enter_context(
                                _Output(self.place / f"{number:06}.{split}", dtype, pieces)
                            )
                        outputs[split].add(ids, span.name, record)
                        survey.sizes[len(ids) // dtype.itemsize + MARKS] += 1
        survey.tokens, survey.unknown = int(pieces.sum()), int(pieces[self.tokenizer.unk])
        survey.seen.update(np.flatnonzero(pieces).tolist())
        records = {split: output.records for split, output in outputs.items()}
        write_text(
            self.summary(number),
            json.dumps(
                {"records": records, "counts": counts, "faults": faults, "texts": survey.texts()}
            ),
        )


class _Output:
    """The records of one split of one part as files: place.ids, place.records and place.names, written as they come.

    `pieces` [vocab_size] counts the ids.
    """

    def __init__(self, place: Path, dtype: np.dtype, pieces: np.ndarray) -> None:
        self.dtype, self.pieces = dtype, pieces
        self.files = {name: place.with_name(f"{place.name}.{name}").open("wb") for name in ARRAYS}
        self.ids, self.rows = list[bytes](), list[tuple[int, int, int, int]]()
        self.num_ids = self.records = self.waiting = self.names = self.name = 0
        self.file = ""

    def add(self, ids: bytes, file: str, number: int) -> None:
        if file != self.file:
            self.file, self.name = file, self.names
            self.names += self.files["names"].write(file.encode() + b"\0")
        size = len(ids) // self.dtype.itemsize
        self.rows.append((self.num_ids, self.name, size, number))
        self.ids.append(ids)
        self.num_ids, self.records, self.waiting = (
            self.num_ids + size,
            self.records + 1,
            self.waiting + len(ids),
        )
        if self.waiting > BLOCK:
            self.flush()

    def flush(self) -> None:
        block = b"".join(self.ids)
        self.files["ids"].write(block)
        self.files["records"].write(np.array(self.rows, RECORD).tobytes())
        self.pieces += np.bincount(np.frombuffer(block, self.dtype), minlength=len(self.pieces))
        self.ids, self.rows, self.waiting = [], [], 0

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()


# All parts -----------------------------------------------------------------------------------------------------------


def _parts(spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """Neighbouring spans together, about PART bytes each time."""
    parts: list[list[Span]] = []
    room = 0
    for span in spans:
        if not parts or span.size > room:
            parts.append([])
            room = PART
        parts[-1].append(span)
        room -= span.size
    return [*map(tuple, parts)]


def _work(job: _Job, parts: list[tuple[Span, ...]], workers: int) -> None:
    """Make every part that is not there yet, and put behind each other those that are."""
    sizes = [sum(span.size for span in spans) >> 20 for spans in parts]
    todo = [number for number in range(len(parts)) if not job.summary(number).exists()]
    done, appended = 0, _append(job, 0, len(parts))
    with bar("MB of texts") as advance:
        for number, _ in finished(
            job, {number: (number, parts[number]) for number in todo}, workers, module=__name__
        ):
            done += sizes[number]
            advance(done, sum(sizes[each] for each in todo))
            summary = read_json(job.summary(number))
            if (
                not summary["records"] and summary["counts"].get("unusable", 0) >= NAMED_OF_PART
            ):  # another field, say
                raise ValueError(
                    f"none of the first {NAMED_OF_PART} documents can be used: {'; '.join(summary['faults'][:NAMED])} ..."
                )
            appended = _append(job, appended, len(parts))


def _append(job: _Job, first: int, stop: int) -> int:
    """Put parts from `first` on behind the arrays of their splits, as far as they are finished; returns where that ends."""
    for number in range(first, stop):
        if not job.summary(number).exists():
            return number
        for split in read_json(job.summary(number))["records"]:
            done, about = _appended(job, split)
            part = job.place / f"{number:06}.{split}"
            if number >= done:
                ids, records, names = (
                    _extend(job.place / f"{split}.{name}.npy", part, name, about) for name in ARRAYS
                )
                about = replace(about, ids=ids, records=records, names=names)
                write_text(job.place / f"{split}.json", json.dumps([number + 1, asdict(about)]))
            for name in ARRAYS:
                part.with_name(f"{part.name}.{name}").unlink(missing_ok=True)
    return stop


def _appended(job: _Job, split: str) -> tuple[int, About]:
    """How many parts are in the arrays of a split, and their sizes."""
    path = job.place / f"{split}.json"
    if not path.exists():
        return 0, job.about
    parts, about = read_json(path)
    return parts, About(**about)


def _extend(array: Path, part: Path, name: str, about: About) -> int:
    """Put a part's array behind that of all parts before, which is cut to the length that `about` knows; returns the new one."""
    dtype, size = about.dtype(name), getattr(about, name)
    head = len(_header(dtype, size))
    with (
        array.open("r+b" if array.exists() else "w+b") as file,
        part.with_name(f"{part.name}.{name}").open("rb") as added,
    ):
        file.seek(head + size * dtype.itemsize)
        file.truncate()
        while block := added.read(BLOCK * dtype.itemsize):
            if name == "records":
                rows = np.frombuffer(block, RECORD).copy()
                rows["start"] += about.ids
                rows["name"] += about.names
                block = rows.tobytes()
            file.write(block)
        size += added.tell() // dtype.itemsize
        file.seek(0)
        file.write(_header(dtype, size))
        file.flush()
        os.fsync(file.fileno())
    return size


def _header(dtype: np.dtype, size: int) -> bytes:
    """The head of an .npy file; as long for every size, so that it can be written anew."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(
        head,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)},
    )
    return head.getvalue()


def _report(job: _Job, num_parts: int, bad_share: float) -> dict[str, Any]:
    """What all parts hold; ValueError where too many documents are unusable."""
    survey, records, counts, faults = (
        Survey(job.lengths()),
        Counter[str](),
        Counter[str](),
        list[str](),
    )
    for number in range(num_parts):
        summary = read_json(job.summary(number))
        survey.take(summary["texts"])
        records.update(summary["records"])
        counts.update(summary["counts"])
        faults += summary["faults"]
    unusable, total = counts["unusable"], counts.total()
    if unusable > bad_share * total:
        raise ValueError(
            f"{unusable} of {total} documents are unusable, {bad_share:.0%} are allowed, nothing was written: "
            + "; ".join(faults[:NAMED])
            + (" ..." if unusable > NAMED else "")
        )
    judge(records, [], bad_share, "texts", "for pretrain")
    more = {"more_passed_over": unusable - len(faults)} if unusable > len(faults) else {}
    found = {
        "records": dict(records),
        "documents": counts["documents"],
        "tokens": survey.tokens,
        "passed_over": faults,
    }
    return found | more | survey.report()


# The folder ----------------------------------------------------------------------------------------------------------


@contextmanager
def _workplace(folder: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of arrays that a stopped run of the same plan left, or a new one; finished when the block ends.

    After a ValueError it vanishes, and so do new folders; after anything else it waits for the next run.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    left = (path.parent for path in folder.glob(f"tokens-*/{PLAN}") if read_json(path) == plan)
    place = next(left, None) or next(
        path for path in (folder / f"tokens-{n}" for n in count(1)) if not path.exists()
    )
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{place} is being written by another process: wait for it, or stop it"
        ) from None
    try:
        write_text(place / PLAN, json.dumps(plan))
        yield place
        for path in place.iterdir():
            if path.suffix != ".npy":
                path.unlink()
    except ValueError:
        shutil.rmtree(place)
        with suppress(OSError):  # not empty
            for path in new:
                path.rmdir()
        raise
    finally:
        lock.release()


def _fingerprint(corpus: Corpus) -> str:
    """Of the names, sizes and times of a corpus's files."""
    times = {span.file: os.stat(corpus.raw / span.file).st_mtime_ns for span in corpus.spans}
    return sha256(
        repr((str(corpus.raw), corpus.field, corpus.spans, times)).encode(errors="backslashreplace")
    ).hexdigest()


def _refuse_joined_words(tokenizer: Tokenizer) -> None:
    """ValueError for a tokenizer whose pieces depend on the words beside them: they are asked for word by word."""
    crossing = (
        id
        for id in range(tokenizer.first_piece, tokenizer.mask)
        if " " in tokenizer.word(id).strip()
    )
    if next(crossing, None) is not None or tokenizer.pieces("a a") != 2 * tokenizer.pieces("a"):
        raise ValueError(
            "this text tokenizer joins words, which cannot be packed: use another (beit3 tokenizer train), or --pack 0"
        )
