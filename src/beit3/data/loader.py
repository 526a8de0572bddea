"""Records -> batches, as a pure function of (seed, step, process): nothing to save, so a resume is exact.

Step s of a source with global batch B reads positions s*B .. (s+1)*B - 1 of an endless sequence of epochs, each a
permutation seeded by (seed, epoch, source). A process takes its contiguous share, cut into micro-batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from beit3.data.masking import rng
from beit3.data.records import IMAGES, Records
from beit3.data.upstream import Index, is_index

PASSED_OVER = "passed_over"
"""Batch key: one line for every unreadable record that another one replaced."""

TRIES = 100
"""Records in a row that may be unreadable before the data, not the record, is at fault."""

Place = tuple[str, int]
"""(source, position in its endless sequence)."""


class Source:
    """The records of one split of one source, with image paths made absolute; `limit` > 0 keeps the first so many."""

    def __init__(self, path: Path, root: Path, *, limit: int = 0):
        self.path, self.root = path, root
        self.records: Records | Index = Index(path) if is_index(path) else Records(path)
        self.size = min(limit, len(self.records)) if limit else len(self.records)
        if not self.size:
            raise ValueError(f"{path} holds no records: run beit3 prepare again, or check the raw data")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return record | {key: str(self.root / record[key]) for key in IMAGES if key in record}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class Examples(Dataset):
    """Map-style access by `Place`. An unreadable record is replaced by the next of the same epoch, and named."""

    def __init__(self, sources: Mapping[str, Source], make: Callable[..., dict[str, Any]], *, seed: int):
        self.sources, self.make, self.seed = sources, make, seed
        self.order: Callable[[str, int], np.ndarray] = lru_cache(maxsize=8)(self._order)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        return rng(self.seed, epoch, name).permutation(len(self.sources[name]))

    def __getitem__(self, place: Place) -> dict[str, Any]:
        name, position = place
        source = self.sources[name]
        epoch, offset = divmod(position, len(source))
        order = self.order(name, epoch)
        failures: list[str] = []
        for turn in range(min(TRIES, len(source))):
            record = source[int(order[(offset + turn) % len(source)])]
            try:
                example = self.make(record, True, rng=rng(self.seed, epoch, str(record["id"])))
                return example | {PASSED_OVER: failures}
            except ValueError as error:
                failures.append(f"{name} record {record['id']}: {error}")
        raise ValueError(f"{len(failures)} records of {source.path} in a row cannot be read; the first: {failures[0]}")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.order = lru_cache(maxsize=8)(self._order)


def step_places(
    step: int, batch: Mapping[str, int], sources: Sequence[str], *, micro_batch: int, rank: int, world: int
) -> list[list[Place]]:
    """The micro-batches of one step on one process, in the order of `sources`."""
    pieces = []
    for name in sources:
        share, rest = divmod(batch[name], world)
        if rest:
            raise ValueError(f"data.batch.{name} {batch[name]} does not divide over {world} processes")
        first = step * batch[name] + rank * share
        size = min(micro_batch or share, share)
        pieces += [
            [(name, position) for position in range(start, min(start + size, first + share))]
            for start in range(first, first + share, max(1, size))
        ]
    return pieces


@dataclass(frozen=True)
class Stack:
    """`collate` that hands on the failures; a class, because processes that are not forked must unpickle it."""

    collate: Callable[..., dict[str, Any]]

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        failures = [line for item in items for line in item.pop(PASSED_OVER)]
        return self.collate(items) | {PASSED_OVER: failures}


def step_batches(
    examples: Examples, collate: Callable[..., dict[str, Any]], places: Callable[[int], list[list[Place]]], steps: range, *, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """For each of `steps` its list of micro-batches; `places` gives theirs, asked only when their turn comes."""
    loader = DataLoader(
        examples, batch_sampler=(piece for step in steps for piece in places(step)), collate_fn=Stack(collate), num_workers=workers,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip
    batches = iter(loader)
    for step in steps:
        yield [next(batches) for _ in places(step)]
