"""From records to batches, as a pure function of (seed, step, rank).

Nothing is saved, so a resumed run reads exactly what it would have read. Step s of a source with a
global batch size B reads positions s*B to (s+1)*B - 1 of an endless sequence of epochs. Each epoch
is a permutation seeded by (seed, epoch, source). For tars and arrays of token ids it shuffles
within windows, so that it can be entered at low cost and reads lie near each other. A source of
several datasets assigns its positions to them by weight, and each dataset has its own epochs. A
rank reads its contiguous part of a step's positions, divided into micro-batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from beit3.data.sampling import DatasetMixture, WindowShuffle, spread_indices
from beit3.data.stores.records import FILE_FIELDS, Records
from beit3.data.stores.shards import Shards
from beit3.data.stores.split_files import find_split_files
from beit3.data.stores.tokens import SUFFIX, Tokens
from beit3.data.stores.upstream import UpstreamIndex, is_upstream_index
from beit3.ops.collectives import compute_on_rank_zero
from beit3.seeding import make_rng

SKIPPED = "skipped"
"""Batch key: one line for every unreadable record that another one replaced."""

MAX_LISTED_RECORDS = 20
"""Unreadable records that an error lists."""

MAX_FAILURES = 100
"""Number of unreadable records in a row after which the data as a whole is at fault."""

CACHED_EPOCHS = 16
"""Number of epochs of datasets whose order is kept in memory."""

WINDOW = 100_000
"""Default number of records in a window: about ten tars of img2dataset."""

Position: TypeAlias = tuple[str, int]
"""(source, position in its endless sequence)."""

RecordStore: TypeAlias = Records | UpstreamIndex | Shards | Tokens

Order: TypeAlias = np.ndarray | WindowShuffle
"""Order of an epoch: offset -> index of a record."""


# Records --------------------------------------------------------------------------------------


class RecordDataset:
    """The records of one split of one source, from one dataset or several.

    Paths of images become absolute. Several datasets form one sequence in proportion to their
    sizes, and their names begin the ids of their records.

    Args:
        path: The split as `locate_split` returns it.
        root: Directory that paths in records are relative to.
        limit: Number of records to keep, spread evenly over each dataset, for files are often
            sorted by class; 0 keeps all. A smaller limit keeps some of a larger one's.
        window: Number of records that are shuffled together, for tars and token ids.
        weights: Dataset name -> weight with which training reads it; {} weights by size.
        keep: Says which records of .jsonl files to keep; None keeps all. With a function, all
            ranks must open the records together: rank 0 asks it and tells the others.
    """

    def __init__(
        self,
        path: Path,
        root: Path,
        *,
        limit: int = 0,
        window: int = WINDOW,
        weights: Mapping[str, float] | None = None,
        keep: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        self.path, self.root, self.window = path, root, window
        files = [path] if path.suffix else find_split_files(path.parent, path.name)
        self.stores: list[RecordStore] = [_open_store(file, root) for file in files]
        has_names = len(files) > 1 or not path.suffix
        self.names = [file.parent.name if has_names else "" for file in files]
        """Name of each dataset; "" for a source of one."""
        self.num_left_out = 0
        """Number of records that `keep` is false for."""
        for file, store in zip(files, self.stores, strict=True):
            content = "only records that are left out of training" if len(store) else "no records"
            if keep is not None and isinstance(store, Records):
                self.num_left_out += _leave_out_records(store, keep)
            if not len(store):
                raise ValueError(
                    f"{file} holds {content}: run beit3 prepare again, or check the raw data"
                )
        store_sizes = [len(store) for store in self.stores]
        self.size = min(limit or sum(store_sizes), sum(store_sizes))
        self.by_size = DatasetMixture(store_sizes)
        self.indices = [
            spread_indices(store_size, max(1, count))
            for store_size, count in zip(store_sizes, self.by_size.count(self.size), strict=True)
        ]
        """Indices of each dataset's records within the limit, ascending."""
        self.sizes = [len(indices) for indices in self.indices]
        """Number of records of each dataset within the limit."""
        self.mixture = DatasetMixture(self._check_weights(weights or {}))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read_record(*self.by_size.locate(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def read_record(self, dataset: int, index: int) -> dict[str, Any]:
        """Returns record `index`, within the limit, of a dataset, which is given by its number."""
        record = self.stores[dataset][int(self.indices[dataset][index])]
        if self.names[dataset]:
            record = record | {"id": f"{self.names[dataset]}/{record.get('id', '')}"}
        files = {key: record[key] for key in FILE_FIELDS if isinstance(record.get(key), str)}
        return record | {key: str(self.root / path) for key, path in files.items()}

    def make_order(self, dataset: int, get_rng: Callable[[str], np.random.Generator]) -> Order:
        """Returns the order of an epoch of a dataset.

        `get_rng` returns the random generator that belongs to a name within this epoch.
        """
        store, size = self.stores[dataset], self.sizes[dataset]
        if not isinstance(store, Shards | Tokens):
            return get_rng("").permutation(size)
        run_ends, indices = np.cumsum(store.run_lengths), self.indices[dataset]
        if isinstance(indices, np.ndarray):
            run_ends = np.searchsorted(indices, run_ends)
        return WindowShuffle(np.diff(run_ends, prepend=0), self.window, get_rng)

    def _check_weights(self, weights: Mapping[str, float]) -> list[float]:
        """Returns one weight per dataset; raises ValueError where they do not name the datasets."""
        if not weights:
            return list(self.sizes)
        if weights.keys() != set(self.names) or min(weights.values()) <= 0:
            names = ", ".join(filter(None, self.names)) or "none"
            raise ValueError(
                f"data.weights gives {dict(weights)} for {self.path}, its datasets are {names}: "
                "give each a weight above 0"
            )
        return [weights[name] for name in self.names]


def _leave_out_records(store: Records, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Leaves out the records that `keep` is false for, on every rank, and returns their number."""
    is_left_out = compute_on_rank_zero(partial(store.find_left_out, keep))
    store.leave_out(is_left_out)
    return int(is_left_out.sum())


def _open_store(path: Path, root: Path) -> RecordStore:
    """Opens a file of records by its name."""
    if path.suffix == ".shards":
        return Shards(path, root)
    if path.suffix == SUFFIX:
        return Tokens(path)
    return UpstreamIndex(path) if is_upstream_index(path) else Records(path)


# Examples -------------------------------------------------------------------------------------


class ExampleDataset(Dataset):
    """Examples by `Position`. An unreadable record is replaced by the next of the same epoch.

    Args:
        sources: Source name -> its records.
        make_example: Turns (record, True, rng=...) into an example; raises ValueError for a bad
            record.
        seed: Seed of the order of records and of their augmentation.
    """

    def __init__(
        self,
        sources: Mapping[str, RecordDataset],
        make_example: Callable[..., dict[str, Any]],
        *,
        seed: int,
    ) -> None:
        self.sources, self.make_example, self.seed = sources, make_example, seed
        self.get_order = lru_cache(maxsize=CACHED_EPOCHS)(self._make_order)

    def __getitem__(self, position: Position) -> dict[str, Any]:
        """Returns an example, in which `SKIPPED` names the records that it replaces."""
        name, source_position = position
        source = self.sources[name]
        dataset, dataset_position = source.mixture.locate(source_position)
        size = source.sizes[dataset]
        epoch, offset = divmod(dataset_position, size)
        order = self.get_order(name, dataset, epoch)
        failures: list[str] = []
        for attempt in range(min(MAX_FAILURES, size)):
            record = source.read_record(dataset, int(order[(offset + attempt) % size]))
            try:
                example = self.make_example(
                    record, True, rng=make_rng(self.seed, epoch, str(record["id"]))
                )
                return example | {SKIPPED: failures}
            except ValueError as error:
                failures.append(f"{name} record {record['id']}: {error}")
        raise ValueError(
            f"{len(failures)} records of {source.path} in a row cannot be read; "
            f"the first: {failures[0]}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "get_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.get_order = lru_cache(maxsize=CACHED_EPOCHS)(self._make_order)

    def _make_order(self, name: str, dataset: int, epoch: int) -> Order:
        source = self.sources[name]

        def make_named_rng(purpose: str) -> np.random.Generator:
            key = "/".join(filter(None, (name, source.names[dataset], purpose)))
            return make_rng(self.seed, epoch, key)

        return source.make_order(dataset, make_named_rng)


# Batches --------------------------------------------------------------------------------------


def sample_micro_batches(
    step: int,
    batch: Mapping[str, int],
    sources: Sequence[str],
    *,
    micro_batch: int,
    rank: int,
    world: int,
) -> list[list[Position]]:
    """Returns the positions of each micro-batch of one step on one rank.

    Args:
        step: Number of the step, from 0.
        batch: Source -> its global batch size.
        sources: Sources in the order in which the step visits them.
        micro_batch: Largest size of a micro-batch; 0 leaves a source's part undivided.
        rank: This process.
        world: Number of processes.

    Raises:
        ValueError: A batch size is not divisible by the number of processes.
    """
    micro_batches = []
    for name in sources:
        rank_size, remainder = divmod(batch[name], world)
        if remainder:
            raise ValueError(
                f"data.batch.{name} {batch[name]} is not divisible by {world} processes"
            )
        first = step * batch[name] + rank * rank_size
        end = first + rank_size
        size = max(1, min(micro_batch or rank_size, rank_size))
        for start in range(first, end, size):
            micro_batches.append(
                [(name, position) for position in range(start, min(start + size, end))]
            )
    return micro_batches


@dataclass(frozen=True)
class Collator:
    """Collates examples and gathers their `SKIPPED` lines.

    It is a class because worker processes that are not forked must unpickle it.
    """

    collate: Callable[..., dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        skipped = [line for example in examples for line in example.pop(SKIPPED)]
        return self.collate(examples) | {SKIPPED: skipped}


def load_batches(
    examples: ExampleDataset,
    collate: Callable[..., dict[str, Any]],
    sample_step: Callable[[int], list[list[Position]]],
    steps: range,
    *,
    workers: int,
    pinned: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Yields the list of micro-batches of each step.

    Args:
        examples: Where examples are read from.
        collate: Stacks a list of examples to a batch.
        sample_step: Returns the positions of a step's micro-batches; called as its turn comes.
        steps: The steps to load.
        workers: Number of loader processes; 0 loads in this one.
        pinned: Whether batches are in pinned memory, from which CUDA copies while it computes.
    """
    loader = DataLoader(
        examples,
        batch_sampler=(positions for step in steps for positions in sample_step(step)),
        collate_fn=Collator(collate),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
    )
    batches = iter(loader)
    for step in steps:
        yield [next(batches) for _ in sample_step(step)]


# Evaluation -----------------------------------------------------------------------------------


class EvaluationBatches(Dataset):
    """Batches of a split by their number.

    Args:
        batches: The records of each batch.
        make_example: Turns (record, False) into an example; raises ValueError for a bad record.
        collate: Stacks a list of examples to a batch.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[dict[str, Any]]],
        make_example: Callable[..., dict[str, Any]],
        collate: Callable[..., dict[str, Any]],
    ) -> None:
        self.batches, self.make_example, self.collate = batches, make_example, collate

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, list[str]]:
        """Returns a batch of the readable records, None without any, and why others are not."""
        examples, unreadable = [], []
        for record in self.batches[index]:
            try:
                examples.append(self.make_example(record, False))
            except ValueError as error:
                unreadable.append(f"{record['id']}: {error}")
        return self.collate(examples) if examples else None, unreadable


def load_evaluation_batches(
    batches: EvaluationBatches, *, workers: int
) -> Iterator[tuple[dict[str, Any] | None, list[str]]]:
    """Yields the batches in their order, made ahead by up to `workers` processes."""
    num_workers = min(workers, len(batches)) if len(batches) > 1 else 0
    if not num_workers:
        yield from (batches[number] for number in range(len(batches)))
        return
    yield from DataLoader(
        batches,
        batch_size=None,
        collate_fn=_keep_batch,
        num_workers=num_workers,
        prefetch_factor=2,
        # Otherwise the loader draws a seed from torch's global generator.
        generator=torch.Generator(),
    )


def _keep_batch(batch: Any) -> Any:
    """Returns the batch as it is: the dataset makes whole batches."""
    return batch
