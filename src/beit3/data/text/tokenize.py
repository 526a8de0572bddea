"""Tokenizes text corpora into `.tokens` files (`beit3.data.stores.tokens`), by several processes.

A corpus is divided into parts. A part that is done is kept: an interrupted run continues from
there, and the number of processes changes no byte of the result. The arrays of the parts are
appended to those of their splits in `<source>/tokens-N/` as they are done. Existing records stay in
use until all parts are.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from beit3.data.prepare.formats.corpora import PART_BYTES, Corpus, list_left_out
from beit3.data.prepare.formats.documents import Fault, Span
from beit3.data.prepare.splits import (
    BAD_SHARE,
    check_bad_share,
    check_unusable,
    escape_unprintable,
    open_split_writers,
    report_left_out,
    report_splits,
)
from beit3.data.prepare.statistics import MAX_LISTED_FAULTS, RecordStatistics, TokenCounter
from beit3.data.process_pool import run_jobs
from beit3.data.stores.tokens import ARRAY_DTYPES, SUFFIX, TokensHeader, read_tokens_header
from beit3.data.text.packing import NUM_SPECIAL_TOKENS, Packer
from beit3.data.text.token_arrays import PartWriter, append_to_array
from beit3.files import read_json, write_text
from beit3.machine import count_cores
from beit3.progress import show_progress

PLAN_FILE = "plan.json"
"""In a directory of arrays that are not complete: what they are made from."""

LOCK_FILE = "lock"
"""Beside it: locked while a process works on them."""

MAX_NAMED_FAULTS = 1000
"""Number of unusable documents that a part names; further ones are only counted."""


class Tokenizer(Protocol):
    """The members of `beit3.tokenizer.text.TextTokenizer` that are needed here."""

    unk: int
    first_piece: int

    @property
    def mask(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def encode_pieces(self, text: str) -> list[int]: ...

    def id_to_piece(self, id: int) -> str: ...


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
    """Writes the corpora below `raw` as `folder/<split>.tokens`.

    Args:
        raw: Directory of text files.
        folder: Directory of the source's records.
        tokenizer: The text tokenizer.
        pack: Number of tokens of the longest record.
        field: Field of JSON lines, or column of Parquet files, that holds the text.
        workers: Number of processes; 0 means one per core.
        bad_share: Fraction of the documents that may be unusable.

    Returns:
        The report. It counts the documents that cannot be read and names them.

    Raises:
        ValueError: More than `bad_share` of the documents are unusable, or there are none. Existing
            records stay.
    """
    _refuse_joined_words(tokenizer)
    check_bad_share(bad_share)
    corpus = Corpus.open(raw, field)
    header = TokensHeader("", tokenizer.digest, tokenizer.vocab_size, pack, 0, 0, 0)
    Packer(tokenizer.encode_pieces, pack)  # refuses a length that is too short
    plan = {"about": asdict(header), "part": PART_BYTES, "corpus": _hash_corpus(corpus)}
    with _open_work_directory(folder, plan) as directory:
        header = replace(header, arrays=directory.name)
        job = TokenizeJob(replace(corpus, spans=()), tokenizer, header, directory)
        parts = _group_spans(corpus.spans)
        _run_job(job, parts, workers or count_cores())
        report = _make_report(job, len(parts), bad_share)
        with open_split_writers(folder, SUFFIX) as open_split:
            for split in report["records"]:
                _, split_header = _read_state(job, split)
                open_split(split).write(split_header.to_json().encode())
    remove_unused_arrays(folder)
    left_out = Counter(kind for _, kind in list_left_out(raw))
    return report | report_splits(report["records"]) | report_left_out(left_out)


def remove_unused_arrays(folder: Path) -> None:
    """Removes the arrays in `folder` that no `.tokens` file names and no process is writing."""
    try:
        used = {read_tokens_header(path).arrays for path in folder.glob(f"*{SUFFIX}")}
    except ValueError:
        return  # a header that cannot be read may name any of them
    for directory in folder.glob("tokens-*"):
        if directory.name not in used:
            with suppress(Timeout), FileLock(directory / LOCK_FILE, timeout=0):
                shutil.rmtree(directory)


# One part -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeJob:
    """Tokenizes parts of a corpus, in any process.

    A part is written to files of its own in `directory`: `<number>.<split>.<array>`, and
    `<number>.json` with a summary, which comes last.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    header: TokensHeader
    directory: Path

    def __call__(self, number: int, spans: tuple[Span, ...]) -> None:
        """Tokenizes the documents in `spans` as the part with this number."""
        dtype = self.header.get_dtype("ids")
        packer = Packer(self.tokenizer.encode_pieces, self.header.pack, typecode=dtype.char)
        statistics = self.make_statistics()
        id_counts = np.zeros(self.header.vocab_size, np.int64)
        counts, faults = Counter[str](), list[str]()
        writers: dict[str, PartWriter] = {}
        with ExitStack() as files:
            for span in spans:
                num_records = 0
                for document in self._read_documents(span, counts, faults):
                    for ids in packer.pack(document):
                        num_records += 1
                        split, _ = self.corpus.name_record(span, num_records)
                        if split not in writers:
                            path = self.directory / f"{number:06}.{split}"
                            writer = PartWriter(path, dtype, id_counts)
                            writers[split] = files.enter_context(writer)
                        writers[split].add(ids, span.name, num_records)
                        statistics.sizes[len(ids) // dtype.itemsize + NUM_SPECIAL_TOKENS] += 1
        statistics.tokens, statistics.unknown = (
            int(id_counts.sum()),
            int(id_counts[self.tokenizer.unk]),
        )
        statistics.seen.update(np.flatnonzero(id_counts).tolist())
        summary = {
            "records": {split: writer.num_records for split, writer in writers.items()},
            "counts": counts,
            "faults": faults,
            "texts": statistics.get_text_counts(),
        }
        write_text(self.get_summary_path(number), json.dumps(summary))

    def get_summary_path(self, number: int) -> Path:
        return self.directory / f"{number:06}.json"

    def make_statistics(self) -> RecordStatistics:
        """Returns empty statistics, which measure texts with the tokenizer."""
        tokenizer = self.tokenizer
        num_pieces = tokenizer.mask - tokenizer.first_piece
        return RecordStatistics(
            TokenCounter(tokenizer.encode_pieces, self.header.pack, tokenizer.unk, num_pieces)
        )

    def _read_documents(self, span: Span, counts: Counter[str], faults: list[str]) -> Iterator[Any]:
        """Yields the documents of a span that can be read; counts and names the others."""
        for document in self.corpus.read_documents(span):
            if not isinstance(document, Fault):
                counts["documents"] += 1
                yield document
                continue
            counts["unusable"] += 1
            if len(faults) < MAX_NAMED_FAULTS:
                faults.append(escape_unprintable(f"{document.location}: {document.reason}"))


# All parts ------------------------------------------------------------------------------------


def _group_spans(spans: Iterable[Span]) -> list[tuple[Span, ...]]:
    """Groups neighboring spans to parts of about PART bytes."""
    parts: list[list[Span]] = []
    remaining = 0
    for span in spans:
        if not parts or span.size > remaining:
            parts.append([])
            remaining = PART_BYTES
        parts[-1].append(span)
        remaining -= span.size
    return [*map(tuple, parts)]


def _run_job(job: TokenizeJob, parts: list[tuple[Span, ...]], workers: int) -> None:
    """Tokenizes all parts that are not done yet, and appends parts to their splits in order."""
    megabytes = [sum(span.size for span in spans) >> 20 for spans in parts]
    missing = [n for n in range(len(parts)) if not job.get_summary_path(n).exists()]
    total = sum(megabytes[number] for number in missing)
    calls = {number: (number, parts[number]) for number in missing}
    done, num_appended = 0, _append_parts(job, 0, len(parts))
    with show_progress("MB of texts") as advance:
        for number, _ in run_jobs(job, calls, workers, module=__name__):
            done += megabytes[number]
            advance(done, total)
            _refuse_unusable(read_json(job.get_summary_path(number)))
            num_appended = _append_parts(job, num_appended, len(parts))


def _refuse_unusable(summary: dict[str, Any]) -> None:
    """Raises ValueError for a part without a usable document, as with a wrong field."""
    if summary["records"] or summary["counts"].get("unusable", 0) < MAX_NAMED_FAULTS:
        return
    raise ValueError(
        f"none of the first {MAX_NAMED_FAULTS} documents can be used: "
        f"{'; '.join(summary['faults'][:MAX_LISTED_FAULTS])} ..."
    )


def _append_parts(job: TokenizeJob, first: int, end: int) -> int:
    """Appends parts from `first` on, up to the first that is not done; returns its number."""
    for number in range(first, end):
        if not job.get_summary_path(number).exists():
            return number
        for split in read_json(job.get_summary_path(number))["records"]:
            _append_part(job, number, split)
    return end


def _append_part(job: TokenizeJob, number: int, split: str) -> None:
    """Appends one part to the arrays of a split, unless it is in them, and removes its files."""
    num_appended, header = _read_state(job, split)
    part = job.directory / f"{number:06}.{split}"
    if number >= num_appended:
        sizes: dict[str, Any] = {
            name: append_to_array(job.directory / f"{split}.{name}.npy", part, name, header)
            for name in ARRAY_DTYPES
        }
        state = [number + 1, asdict(replace(header, **sizes))]
        write_text(job.directory / f"{split}.json", json.dumps(state))
    for name in ARRAY_DTYPES:
        part.with_name(f"{part.name}.{name}").unlink(missing_ok=True)


def _read_state(job: TokenizeJob, split: str) -> tuple[int, TokensHeader]:
    """Returns how many parts the arrays of a split contain, and the header with their lengths."""
    path = job.directory / f"{split}.json"
    if not path.exists():
        return 0, job.header
    num_appended, header = read_json(path)
    return num_appended, TokensHeader(**header)


def _make_report(job: TokenizeJob, num_parts: int, bad_share: float) -> dict[str, Any]:
    """Sums up all parts; raises ValueError where too many documents are unusable."""
    statistics = job.make_statistics()
    num_records, counts, faults = Counter[str](), Counter[str](), list[str]()
    for number in range(num_parts):
        summary = read_json(job.get_summary_path(number))
        statistics.add_counts(summary["texts"])
        num_records.update(summary["records"])
        counts.update(summary["counts"])
        faults += summary["faults"]
    unusable, total = counts["unusable"], counts.total()
    if unusable > bad_share * total:
        names = "; ".join(faults[:MAX_LISTED_FAULTS]) + (
            " ..." if unusable > MAX_LISTED_FAULTS else ""
        )
        raise ValueError(
            f"{unusable} of {total} documents are unusable, {bad_share:.0%} are allowed "
            f"(--bad_share), nothing was written: {names}"
        )
    check_unusable(num_records, [], bad_share, "texts", "for pretrain")
    report: dict[str, Any] = {
        "records": dict(num_records),
        "documents": counts["documents"],
        "tokens": statistics.tokens,
        "passed_over": faults,
    }
    if unusable > len(faults):
        report["more_passed_over"] = unusable - len(faults)
    return report | statistics.report()


# The work directory ---------------------------------------------------------------------------


@contextmanager
def _open_work_directory(folder: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the directory that an interrupted run of the same plan left, or a new one.

    It is complete when the block ends. After a ValueError it is removed, as are new parent
    directories. After any other error it stays for the next run.
    """
    directories = (folder, *folder.parents)
    new_directories = [path for path in directories if not path.exists()]  # the deepest first
    directory = _find_work_directory(folder, plan)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{directory} is being written by another process: wait for it, or stop it"
        ) from None
    try:
        write_text(directory / PLAN_FILE, json.dumps(plan))
        yield directory
        for path in directory.iterdir():
            if path.suffix != ".npy":
                path.unlink()
    except ValueError:
        shutil.rmtree(directory)
        with suppress(OSError):  # a directory is not empty
            for path in new_directories:
                path.rmdir()
        raise
    finally:
        lock.release()


def _find_work_directory(folder: Path, plan: Mapping[str, Any]) -> Path:
    """Returns the directory with the same plan, or the first name that is not used."""
    for path in folder.glob(f"tokens-*/{PLAN_FILE}"):
        if read_json(path) == plan:
            return path.parent
    candidates = (folder / f"tokens-{number}" for number in count(1))
    return next(path for path in candidates if not path.exists())


def _hash_corpus(corpus: Corpus) -> str:
    """Returns a digest of the names, sizes and modification times of a corpus's files."""
    times = {span.file: os.stat(corpus.raw / span.file).st_mtime_ns for span in corpus.spans}
    description = repr((str(corpus.raw), corpus.field, corpus.spans, times))
    return sha256(description.encode(errors="backslashreplace")).hexdigest()


def _refuse_joined_words(tokenizer: Tokenizer) -> None:
    """Raises ValueError for a tokenizer whose pieces depend on neighboring words.

    Texts are tokenized word by word.
    """
    pieces = (tokenizer.id_to_piece(id) for id in range(tokenizer.first_piece, tokenizer.mask))
    has_joined = any(" " in piece.strip() for piece in pieces)
    if has_joined or tokenizer.encode_pieces("a a") != 2 * tokenizer.encode_pieces("a"):
        raise ValueError(
            "this text tokenizer joins words, which cannot be packed: "
            "use another (beit3 tokenizer train), or --pack 0"
        )
