"""Encodes the shards of a worklist: images are decoded, vectors and metadata are written.

A batch lies within one shard and is filled up to its full size, so that its bytes are a function of
the worklist alone. On a CPU a batch is computed by one thread, several batches at once: results of
matrix products depend on the number of threads in their last bits, and one thread per batch keeps
all cores busy without waiting for each other.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from beit3.data.loader import EvaluationBatches, load_evaluation_batches
from beit3.machine import count_cores
from beit3.predict import Predictor
from beit3.search.folder import get_metadata_path, get_vectors_path, write_shard
from beit3.search.input_tables import (
    CAPTION,
    HASH,
    ID,
    IMAGE_PATH,
    get_metadata_names,
    read_image,
)
from beit3.search.manifest import Shard
from beit3.search.survey import Measurement, measure_image
from beit3.search.worklist import Worklist
from beit3.task import Batch, Example, Record, Task

TEXT_BATCH = 64
"""Captions that are encoded at once."""
MAX_WORKERS = 8

Advance = Callable[[int], None]
"""Receives the number of images that were encoded since the last call."""


class ImageBatch(NamedTuple):
    """A batch of images of one shard, by their rows in the worklist."""

    shard: int
    rows: list[int]


class Encoded(NamedTuple):
    """The vectors [len(rows), D] of a batch, and the faults of its other images by row."""

    rows: list[int]
    vectors: np.ndarray
    faults: dict[int, str]


def count_workers(workers: int | None, device: torch.device) -> int:
    """Returns the number of decoding processes: by default none on a CPU, else one per core.

    On a CPU the threads that compute also decode, so that no core waits for another.
    """
    if workers is not None:
        return workers
    return 0 if device.type == "cpu" else min(MAX_WORKERS, count_cores())


# Shards -------------------------------------------------------------------------------------------


def encode_shards(
    predictor: Predictor,
    worklist: Worklist,
    numbers: Sequence[int],
    *,
    workers: int | None = None,
    threads: int = 0,
    advance: Advance | None = None,
) -> None:
    """Encodes shards of distinct images and marks each as complete.

    Args:
        predictor: The weights, in the precision of the worklist.
        worklist: The worklist.
        numbers: Numbers of the shards.
        workers: Processes that decode images; None = see `count_workers`.
        threads: Batches that a CPU computes at once; 0 = one per core.
        advance: Receives the number of images done.
    """
    batches = _list_batches(worklist, numbers)
    encoded = _encode_images(predictor, worklist, batches, workers=workers, threads=threads)
    parts: list[Encoded] = []
    for position, (batch, part) in enumerate(zip(batches, encoded, strict=True)):
        parts.append(part)
        if advance is not None:
            advance(len(batch.rows))
        is_last = position + 1 == len(batches) or batches[position + 1].shard != batch.shard
        if is_last:
            rows = [row for part in parts for row in part.rows]
            faults = {row: fault for part in parts for row, fault in part.faults.items()}
            vectors = np.concatenate([part.vectors for part in parts])
            _check_unchanged(worklist, batch.shard)
            _finish_shard(predictor, worklist, batch.shard, rows, vectors, faults, threads)
            parts = []


def _check_unchanged(worklist: Worklist, number: int) -> None:
    """Raises ValueError for an image of a shard that is not what it was in the survey.

    Its hash is that of the survey, and copies of it would get its vector.
    """
    items = worklist.items.take(pa.array(worklist.get_rows(number)))
    columns = [items[name].to_pylist() for name in (IMAGE_PATH, *Measurement._fields)]
    for image_path, *values in zip(*columns, strict=True):
        path = os.path.join(worklist.settings.image_root, image_path)
        measured = Measurement(*values)
        if measure_image(path, measured).hash != measured.hash:
            raise ValueError(
                f"image {path} was changed or removed while it was embedded: repeat the command "
                "with --update"
            )


def encode_duplicates(
    predictor: Predictor, worklist: Worklist, numbers: Sequence[int], *, threads: int = 0
) -> None:
    """Writes shards of duplicates, whose image vectors are copied from other shards.

    All shards of distinct images must be complete.

    Args:
        predictor: The weights, for the captions.
        worklist: The worklist.
        numbers: Numbers of the shards.
        threads: As for `encode_shards`.
    """
    if not numbers:
        return
    vectors_by_hash = _VectorsByHash(worklist)
    hashes = worklist.items[HASH].to_pylist()
    for number in numbers:
        rows, faults = [], {}
        for row in worklist.get_rows(number).tolist():
            fault = vectors_by_hash.find_fault(hashes[row])
            if fault:
                faults[row] = fault
            else:
                rows.append(row)
        vectors = [vectors_by_hash.read(hashes[row]) for row in rows]
        shape = (len(rows), worklist.settings.dim)
        stacked = np.array(vectors, dtype=np.float32).reshape(shape)
        _finish_shard(predictor, worklist, number, rows, stacked, faults, threads)


def _finish_shard(
    predictor: Predictor,
    worklist: Worklist,
    number: int,
    rows: Sequence[int],
    vectors: np.ndarray,
    faults: Mapping[int, str],
    threads: int,
) -> None:
    """Encodes the captions of a shard, writes its files and marks it as complete."""
    settings, items = worklist.settings, worklist.items
    ids = items[ID].to_pylist()
    if rows:
        table = items.take(pa.array(rows, pa.int64()))
        by_modality = {"image": vectors}
        if "text" in settings.modalities:
            captions = table[CAPTION].to_pylist() if CAPTION in table.column_names else []
            captions = captions or [None] * len(rows)
            by_modality["text"] = _encode_captions(predictor, captions, settings.dim, threads)
        metadata = table.select(get_metadata_names(table.column_names))
        write_shard(worklist.out, number, by_modality, metadata, dtype=settings.dtype)
    worklist.mark_complete(number, len(rows), {ids[row]: fault for row, fault in faults.items()})


# Images -------------------------------------------------------------------------------------------


def _list_batches(worklist: Worklist, numbers: Sequence[int]) -> list[ImageBatch]:
    """Divides shards into batches."""
    size = worklist.settings.batch_size
    batches = []
    for number in numbers:
        rows = worklist.get_rows(number).tolist()
        batches += [
            ImageBatch(number, rows[start : start + size]) for start in range(0, len(rows), size)
        ]
    return batches


class _Records(Sequence[Sequence[Record]]):
    """The records of each batch, made when they are asked for."""

    def __init__(
        self, batches: Sequence[ImageBatch], root: str, image_paths: Sequence[str]
    ) -> None:
        self.batches, self.root, self.image_paths = batches, root, image_paths

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Sequence[Record]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[Record]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return [
            {"id": str(row), "image": os.path.join(self.root, self.image_paths[row])}
            for row in self.batches[index].rows
        ]


def _make_image_example(task: Task, record: Record, train: bool) -> Example:
    """Decodes and prepares the image of a record."""
    image = task.record(read_image(record["image"]))
    return task.example(image | {"id": record["id"]}, train)


def _collate_padded(task: Task, size: int, examples: Sequence[Example]) -> Batch:
    """Collates examples, the first of which fills the batch up to its full size."""
    return task.collate([*examples, *[examples[0]] * (size - len(examples))])


def _encode_images(
    predictor: Predictor,
    worklist: Worklist,
    batches: Sequence[ImageBatch],
    *,
    workers: int | None,
    threads: int,
) -> Iterator[Encoded]:
    """Yields the vectors of each batch, in order."""
    settings = worklist.settings
    workers = count_workers(workers, predictor.device)
    task = predictor.task.without_network()
    maker = EvaluationBatches(
        _Records(batches, settings.image_root, worklist.items[IMAGE_PATH].to_pylist()),
        partial(_make_image_example, task),
        partial(_collate_padded, task, settings.batch_size),
    )

    def encode(batch: Batch | None, unreadable: Sequence[str]) -> Encoded:
        faults = {}
        for line in unreadable:
            row, _, fault = line.partition(": ")
            faults[int(row)] = fault
        if batch is None:
            return Encoded([], np.zeros((0, settings.dim), np.float32), faults)
        vectors = _normalize(predictor.encode({"image": batch["image"]})["image"])
        rows = [int(row) for row in batch["id"]][: settings.batch_size]
        rows = list(dict.fromkeys(rows))  # without those that fill the batch up
        return Encoded(rows, vectors[: len(rows)], faults)

    with compute_in_threads(predictor, threads) as map_ahead:
        if workers:
            loaded = load_evaluation_batches(maker, workers=workers)
            yield from map_ahead(lambda pair: encode(*pair), loaded)
        else:
            yield from map_ahead(lambda index: encode(*maker[index]), iter(range(len(batches))))


def _normalize(vectors: np.ndarray) -> np.ndarray:
    """Returns unit vectors [N, D]; a vector of zeros stays one."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


@contextmanager
def compute_in_threads(
    predictor: Predictor, threads: int
) -> Iterator[Callable[[Callable[[Any], Any], Iterator[Any]], Iterator[Any]]]:
    """Yields `map_ahead(function, values)`: an ordered map in threads, a few values ahead.

    On a CPU each thread computes alone. Compiled networks (int8) and accelerators take one batch at
    a time: there the threads load the next batches meanwhile.
    """
    is_shared = predictor.device.type == "cpu" and predictor.precision != "int8"
    num_threads = threads or count_threads()
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1 if is_shared else num_threads)
    pool = ThreadPoolExecutor(num_threads, initializer=_set_threads, initargs=(is_shared,))

    def map_ahead(function: Callable[[Any], Any], values: Iterator[Any]) -> Iterator[Any]:
        pending: deque[Future] = deque()
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield map_ahead
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


def _set_threads(is_shared: bool) -> None:
    """Sets a new thread's own number of threads within an operator."""
    if is_shared:
        torch.set_num_threads(1)


def count_threads() -> int:
    """Returns the cores of this process: those of the machine, divided among its processes."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# Captions -----------------------------------------------------------------------------------------


def _encode_captions(
    predictor: Predictor, captions: Sequence[str | None], dim: int, threads: int
) -> np.ndarray:
    """Returns the vectors [len(captions), dim] of captions; zeros where there is none.

    Captions of similar length share a batch.
    """
    vectors = np.zeros((len(captions), dim), dtype=np.float32)
    task = predictor.task.without_network()
    examples = {
        row: task.example(task.record(None, caption) | {"id": str(row)}, False)
        for row, caption in enumerate(captions)
        if caption
    }
    lengths = {row: _count_tokens(example) for row, example in examples.items()}
    order = sorted(examples, key=lambda row: (lengths[row], row))
    batches = [order[start : start + TEXT_BATCH] for start in range(0, len(order), TEXT_BATCH)]

    def encode(rows: Sequence[int]) -> np.ndarray:
        batch = task.collate([examples[row] for row in rows])
        return _normalize(predictor.encode(batch)["text"])

    with compute_in_threads(predictor, threads) as map_ahead:
        for rows, part in zip(batches, map_ahead(encode, iter(batches)), strict=True):
            vectors[rows] = part
    return vectors


def _count_tokens(example: Example) -> int:
    """Returns the number of tokens of a text without its padding."""
    return int((~example["text_padding"]).sum())


# Duplicates ---------------------------------------------------------------------------------------


class _VectorsByHash:
    """Finds the vectors of images by the hash of their content, in all shards of a folder."""

    def __init__(self, worklist: Worklist) -> None:
        self.worklist = worklist
        self.locations: dict[str, tuple[int, int]] = {}
        self.faults: dict[str, str] = {}
        items = worklist.items
        hashes = dict(zip(items[ID].to_pylist(), items[HASH].to_pylist(), strict=True))
        shards = list(worklist.base.shards) if worklist.base is not None else []
        for number in worklist.list_shards(duplicates=False):
            mark = worklist.read_mark(number)
            assert mark is not None, f"shard {number} is not complete"
            self.faults |= {hashes[item]: fault for item, fault in mark.faults.items()}
            if mark.rows:
                shards.append(Shard(number, mark.rows))
        for shard in shards:
            self._add_shard(shard)
        self._open: dict[int, np.ndarray] = {}

    def _add_shard(self, shard: Shard) -> None:
        """Notes where the images of a shard are."""
        file = pq.ParquetFile(get_metadata_path(self.worklist.out, shard.number))
        if HASH in file.schema_arrow.names:
            for row, value in enumerate(file.read(columns=[HASH])[HASH].to_pylist()):
                self.locations.setdefault(value, (shard.number, row))

    def find_fault(self, content_hash: str) -> str:
        """Returns why an image has no vector, "" if it has one."""
        if content_hash in self.locations:
            return ""
        return self.faults[content_hash]

    def read(self, content_hash: str) -> np.ndarray:
        """Returns the stored vector [D] of an image."""
        number, row = self.locations[content_hash]
        if number not in self._open:
            path = get_vectors_path(self.worklist.out, number, "image")
            self._open[number] = np.load(path, mmap_mode="r")
        return self._open[number][row]
