"""Records -> batches, as a pure function of (seed, step, process): nothing to save, so a resume is exact.

Step s of a source with global batch B reads positions s*B .. (s+1)*B - 1 of an endless sequence of epochs, each a
permutation seeded by (seed, epoch, source); of tars and arrays of ids one that stays within windows, so that it is cheap to
enter and reads lie near each other. A source of several sets deals its positions out to them by weight, and each set has its own epochs.
A process takes its contiguous share, cut into micro-batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch.utils.data import DataLoader, Dataset

from beit3.data.sampling import Mix, Windows
from beit3.data.stores.records import FILES, Records, split_files
from beit3.data.stores.shards import Shards
from beit3.data.stores.tokens import ENDING, Tokens
from beit3.data.stores.upstream import Index, is_index
from beit3.seeding import make_rng

PASSED_OVER = "passed_over"
"""Batch key: one line for every unreadable record that another one replaced."""

TRIES = 100
"""Records in a row that may be unreadable before the data, not the record, is at fault."""

ORDERS = 16
"""Epochs of sets whose order is kept."""

Place = tuple[str, int]
"""(source, position in its endless sequence)."""

WINDOW = 100_000
"""Records that are shuffled among each other where an epoch goes by windows: of about ten of img2dataset's tars."""

Store: TypeAlias = Records | Index | Shards | Tokens


class Source:
    """The records of one split of one source, with image paths made absolute.

    path: as `locate` gives it. Several sets are one sequence, in proportion to their sizes, and their names begin the ids.
    limit: > 0 keeps the first so many. window: of tars and ids. weights: set -> share of what training reads; {} = its size.
    """

    def __init__(
        self,
        path: Path,
        root: Path,
        *,
        limit: int = 0,
        window: int = WINDOW,
        weights: Mapping[str, float] | None = None,
    ):
        self.path, self.root, self.window = path, root, window
        files = [path] if path.suffix else split_files(path.parent, path.name)
        self.stores: list[Store] = [_open_store(file, root) for file in files]
        self.names = [
            file.parent.name if len(files) > 1 or not path.suffix else "" for file in files
        ]
        for file, store in zip(files, self.stores, strict=True):
            if not len(store):
                raise ValueError(
                    f"{file} holds no records: run beit3 prepare again, or check the raw data"
                )
        whole = [len(store) for store in self.stores]
        self.size = min(limit, sum(whole)) if limit else sum(whole)
        self.even = Mix(whole)
        self.sizes = [max(1, count) for count in self.even.counts(self.size)]
        self.mix = Mix(self._weights(weights or {}))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.record(*self.even(index))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def record(self, number: int, index: int) -> dict[str, Any]:
        """Record `index` of set `number`."""
        record = self.stores[number][index]
        if self.names[number]:
            record = record | {"id": f"{self.names[number]}/{record['id']}"}
        return record | {key: str(self.root / record[key]) for key in FILES if key in record}

    def order(
        self, number: int, draw: Callable[[str], np.random.Generator]
    ) -> np.ndarray | Windows:
        """An epoch of set `number`: offset -> index. `draw`: the generator of a name."""
        store, size = self.stores[number], self.sizes[number]
        if not isinstance(store, Shards | Tokens):
            return draw("").permutation(size)
        return Windows(
            np.diff(np.minimum(np.cumsum(store.runs), size), prepend=0), self.window, draw
        )

    def _weights(self, weights: Mapping[str, float]) -> list[float]:
        """One per set; ValueError where they do not name the sets."""
        if not weights:
            return list(self.sizes)
        if weights.keys() != set(self.names) or min(weights.values()) <= 0:
            known = ", ".join(filter(None, self.names)) or "none"
            raise ValueError(
                f"data.weights gives {dict(weights)} for {self.path}, its sets are {known}: give each a weight above 0"
            )
        return [weights[name] for name in self.names]


def _open_store(path: Path, root: Path) -> Store:
    if path.suffix == ".shards":
        return Shards(path, root)
    if path.suffix == ENDING:
        return Tokens(path)
    return Index(path) if is_index(path) else Records(path)


class Examples(Dataset):
    """Map-style access by `Place`. An unreadable record is replaced by the next of the same epoch, and named."""

    def __init__(
        self, sources: Mapping[str, Source], make: Callable[..., dict[str, Any]], *, seed: int
    ):
        self.sources, self.make, self.seed = sources, make, seed
        self.order = lru_cache(maxsize=ORDERS)(self._order)

    def _order(self, name: str, number: int, epoch: int) -> np.ndarray | Windows:
        source = self.sources[name]
        return source.order(
            number,
            lambda what: make_rng(
                self.seed, epoch, "/".join(filter(None, (name, source.names[number], what)))
            ),
        )

    def __getitem__(self, place: Place) -> dict[str, Any]:
        name, position = place
        source = self.sources[name]
        number, position = source.mix(position)
        size = source.sizes[number]
        epoch, offset = divmod(position, size)
        order = self.order(name, number, epoch)
        failures: list[str] = []
        for turn in range(min(TRIES, size)):
            record = source.record(number, int(order[(offset + turn) % size]))
            try:
                example = self.make(record, True, rng=make_rng(self.seed, epoch, str(record["id"])))
                return example | {PASSED_OVER: failures}
            except ValueError as error:
                failures.append(f"{name} record {record['id']}: {error}")
        raise ValueError(
            f"{len(failures)} records of {source.path} in a row cannot be read; the first: {failures[0]}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.order = lru_cache(maxsize=ORDERS)(self._order)


def step_places(
    step: int,
    batch: Mapping[str, int],
    sources: Sequence[str],
    *,
    micro_batch: int,
    rank: int,
    world: int,
) -> list[list[Place]]:
    """The micro-batches of one step on one process, in the order of `sources`."""
    pieces = []
    for name in sources:
        share, rest = divmod(batch[name], world)
        if rest:
            raise ValueError(
                f"data.batch.{name} {batch[name]} does not divide over {world} processes"
            )
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
    examples: Examples,
    collate: Callable[..., dict[str, Any]],
    places: Callable[[int], list[list[Place]]],
    steps: range,
    *,
    workers: int,
    pinned: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """For each of `steps` its list of micro-batches; `places` gives theirs, asked only when their turn comes.

    pinned: in memory that CUDA copies from while it computes.
    """
    loader = DataLoader(
        examples,
        batch_sampler=(piece for step in steps for piece in places(step)),
        collate_fn=Stack(collate),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
    )
    batches = iter(loader)
    for step in steps:
        yield [next(batches) for _ in places(step)]
