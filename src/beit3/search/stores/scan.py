"""Exact search by reading all vectors once, chunk by chunk, in as many threads as there are cores.

A first pass computes approximate products: with the shard's 8-bit sketch where it has one, else in
bfloat16 or float32, whichever is faster on the processor. Its error is bounded (`passes.py`), so
that the rows that can be among the best are known; they are scored again in float64. The result
does not depend on the number format of the first pass, on chunks or on threads.
"""

from collections.abc import Iterator, Sequence
from threading import Lock

import numpy as np
import torch

from beit3.search.sketch import Sketch
from beit3.search.stores.passes import FloatPass, Pass, choose_passes
from beit3.search.stores.threads import map_in_threads

QUERY_ROWS = 256
"""Queries that are compared in one pass over the vectors."""

SAMPLE_ROWS = 2048
SAMPLE_FRACTION = 1 / 8
RUN_ROWS = 32
"""Rows that are scored before all others, at most, their largest fraction of all rows, and how many
of them follow each other, so that few places of a disk are read."""

BLOCK_ROWS = 64
"""Rows of which the largest product is compared with a threshold first."""

PENDING_PER_QUERY = 256
"""Rows that reach the threshold, per query, before thresholds are raised."""

MAX_CANDIDATES = 4096
"""Candidates of a query before they are scored to keep the best ones only."""

Chunk = tuple[Pass, int, int, int]
"""The pass over a shard, number of the shard's first row, the chunk's first row and its end."""

Reached = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Queries, rows, and the lowest and highest score that each can have.

The limits are rounded to float32 as scores are: a row below a limit is below it as a score, too."""


def find_best_rows(
    shards: Sequence[np.ndarray],
    queries: np.ndarray,
    k: int,
    selected: np.ndarray | None = None,
    sketches: Sequence[Sketch | None] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Finds the k rows with the largest inner product for each query, among those selected.

    Args:
        shards: Vectors [rows, dim] of each shard, float16 or float32; rows are numbered through.
        queries: [queries, dim].
        k: Number of rows for a query.
        selected: Which rows take part, bool [all rows]; None for all.
        sketches: 8-bit copy of each shard, None for a shard without one.

    Returns:
        Row numbers and float32 scores of each query, by falling score; equal ones by row.
    """
    rows: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    for start in range(0, len(queries), QUERY_ROWS):
        part = queries[start : start + QUERY_ROWS].astype(np.float32)
        scan = _Scan(shards, sketches or [None] * len(shards), part, k, selected)
        scan.run()
        ranked = map_in_threads(scan.rank, range(len(part)))
        rows.extend(best_rows for best_rows, _ in ranked)
        scores.extend(best_scores for _, best_scores in ranked)
    return rows, scores


def score_rows(shards: Sequence[np.ndarray], query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the exact scores of sorted rows for one query: float64 products as float32."""
    query = query.astype(np.float64)
    scores = [
        np.asarray(shard)[part].astype(np.float64) @ query
        for shard, part in split_rows(shards, rows)
    ]
    return np.concatenate([np.zeros(0), *scores]).astype(np.float32)


def split_rows(
    shards: Sequence[np.ndarray], rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the shards that hold sorted rows, and the rows of each, numbered within it."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    bounds = np.searchsorted(rows, starts)
    for number in np.flatnonzero(np.diff(bounds)).tolist():
        yield shards[number], rows[bounds[number] : bounds[number + 1]] - starts[number]


def rank_rows(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best rows and their scores, by falling score; equal ones by row."""
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


class _Scan:
    """One pass over all vectors: keeps, for each query, the rows that can be among the k best."""

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        sketches: Sequence[Sketch | None],
        queries: np.ndarray,
        k: int,
        selected: np.ndarray | None,
    ):
        self.shards = shards
        self.queries = queries
        self.k = k
        self.selected = selected
        self.passes = choose_passes(shards, sketches, queries)
        self.thresholds = np.full(len(queries), -np.inf, dtype=np.float32)
        self.candidates = make_candidates(np.zeros(0, dtype=np.int64), 0, self.thresholds[:0])
        self.pending: list[Reached] = []
        self.num_pending = 0
        self.lock = Lock()

    def run(self) -> None:
        """Reads the vectors, and collects candidates."""
        self.set_thresholds()
        chunks: list[Chunk] = []
        first = 0
        for pass_ in self.passes:
            last = first + pass_.num_rows
            for start in range(first, last, pass_.chunk_rows):
                chunks.append((pass_, first, start, min(start + pass_.chunk_rows, last)))
            first = last
        map_in_threads(self.read_chunk, chunks)
        self.raise_thresholds()

    def set_thresholds(self) -> None:
        """Scores a few rows: of all others only those that exceed them are looked at."""
        num_rows = sum(len(shard) for shard in self.shards)
        rows = sample_rows(num_rows if self.selected is None else self.selected.sum())
        if len(rows) < self.k:
            return
        if self.selected is not None:
            rows = np.flatnonzero(self.selected)[rows]

        def multiply(part: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
            pass_ = FloatPass(part[0], self.queries, torch.float32)
            return pass_.multiply(part[1]), pass_.errors

        products, errors = zip(
            *map_in_threads(multiply, split_rows(self.shards, rows)), strict=True
        )
        least = torch.cat(products).topk(self.k, dim=0).values[-1].numpy() - errors[0]
        self.thresholds = np.nextafter(least.astype(np.float32), np.float32(-np.inf))

    def list_rows(self, first: int, last: int) -> np.ndarray:
        """Returns those selected among successive rows."""
        if self.selected is None:
            return np.arange(first, last)
        return np.flatnonzero(self.selected[first:last]) + first

    def read_chunk(self, chunk: Chunk) -> None:
        """Adds the rows of a chunk that reach the thresholds; runs in several threads."""
        pass_, first, start, end = chunk
        rows = self.list_rows(start, end)
        if len(rows) == 0:
            return
        products = pass_.multiply(rows - first)
        limits = pass_.compute_limits(self.thresholds)
        positions, queries = find_reached(products, limits)
        scores = products.numpy()[positions, queries] * pass_.scales[queries]
        errors = pass_.errors[queries]
        lowest, highest = (scores - errors, scores + errors)
        with self.lock:
            self.pending.append(
                (queries, rows[positions], lowest.astype(np.float32), highest.astype(np.float32))
            )
            self.num_pending += len(queries)
            if self.num_pending > max(PENDING_PER_QUERY, self.k) * len(self.queries):
                self.raise_thresholds()

    def raise_thresholds(self) -> None:
        """Adds the rows that reached the thresholds to the candidates, and raises the former.

        Candidates that k others surely exceed are dropped.
        """
        reached = join_reached([self.candidates, *self.pending])
        queries, _, lowest, highest = reached
        self.pending, self.num_pending = [], 0
        order = np.lexsort((lowest, queries))
        counts = np.bincount(queries, minlength=len(self.queries))
        full = counts >= self.k
        least = lowest[order[np.cumsum(counts)[full] - self.k]]
        self.thresholds[full] = np.maximum(self.thresholds[full], least)
        self.candidates = take_reached(reached, highest >= self.thresholds[queries])
        self.limit_candidates()

    def limit_candidates(self) -> None:
        """Scores the candidates of queries that have very many, and keeps the best."""
        counts = np.bincount(self.candidates[0], minlength=len(self.queries))
        for query in np.flatnonzero(counts > max(MAX_CANDIDATES, 4 * self.k)).tolist():
            rows, scores = self.rank(query)
            others = take_reached(self.candidates, self.candidates[0] != query)
            self.candidates = join_reached([others, make_candidates(rows, query, scores)])
            self.thresholds[query] = max(self.thresholds[query], scores[-1])

    def rank(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k best candidates of a query and their exact scores.

        Those that can be best are scored first, until no other can be among the k best.
        """
        _, rows, _, highest = take_reached(self.candidates, self.candidates[0] == query)
        order = np.argsort(-highest)
        rows, highest = rows[order], highest[order]
        best_rows, scores = rows[:0], highest[:0]
        start, end = 0, max(32, 2 * self.k)
        while start < len(rows):
            part = np.sort(rows[start:end])
            part_scores = score_rows(self.shards, self.queries[query], part)
            best_rows, scores = rank_rows(
                np.concatenate([best_rows, part]), np.concatenate([scores, part_scores]), self.k
            )
            start, end = end, 2 * end
            if len(scores) == self.k and start < len(rows) and highest[start] < scores[-1]:
                break
        return best_rows, scores


def make_candidates(rows: np.ndarray, query: int, scores: np.ndarray) -> Reached:
    """Returns rows of which the scores for a query are known."""
    return np.full(len(rows), query), rows, scores, scores


def join_reached(parts: Sequence[Reached]) -> Reached:
    """Joins the rows of several parts."""
    queries, rows, lowest, highest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return queries, rows, lowest, highest


def take_reached(reached: Reached, mask: np.ndarray) -> Reached:
    """Returns those rows where a mask is true."""
    queries, rows, lowest, highest = (array[mask] for array in reached)
    return queries, rows, lowest, highest


def sample_rows(num_rows: int) -> np.ndarray:
    """Returns the numbers of a few rows, in runs that lie evenly among all."""
    num_runs = int(min(SAMPLE_ROWS, SAMPLE_FRACTION * num_rows) / RUN_ROWS)
    starts = np.linspace(0, num_rows - RUN_ROWS, num_runs).astype(np.int64)
    return (starts[:, None] + np.arange(RUN_ROWS)).ravel()


def find_reached(products: torch.Tensor, limits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and queries at which products [rows, queries] reach the queries' limits.

    The largest products of blocks are compared first, which is much less work than all of them.
    """
    whole = len(products) // BLOCK_ROWS * BLOCK_ROWS
    blocks = products[:whole].view(-1, BLOCK_ROWS, products.shape[1])
    block, query = (blocks.amax(dim=1) >= limits).nonzero(as_tuple=True)
    found, position = (blocks[block, :, query] >= limits[query, None]).nonzero(as_tuple=True)
    positions, queries = block[found] * BLOCK_ROWS + position, query[found]
    if whole < len(products):
        rest, rest_queries = (products[whole:] >= limits).nonzero(as_tuple=True)
        positions, queries = (
            torch.cat([positions, rest + whole]),
            torch.cat([queries, rest_queries]),
        )
    return positions.numpy(), queries.numpy()
