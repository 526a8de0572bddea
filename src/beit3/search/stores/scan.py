"""Exact search by reading all vectors once, chunk by chunk, in as many threads as there are cores.

A first pass computes approximate products: with the shard's 8-bit sketch where it has one, else in
bfloat16 or float32, whichever is faster on the processor. Its error is bounded (`passes.py`), so
that the rows that can be among the best are known; they are scored again in float64. The result
does not depend on the number format of the first pass, on chunks or on threads.
"""

from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch

from beit3.search.sketch import Sketch
from beit3.search.stores.passes import Pass, choose_passes
from beit3.search.stores.threads import map_in_threads

QUERY_ROWS = 256
"""Queries that are compared in one pass over the vectors."""

FIRST_ROWS = 256
"""Rows that are read before all others."""

BLOCK_ROWS = 64
"""Rows of which the largest product is compared with a threshold first."""

PENDING_PER_QUERY = 256
"""Rows that reach the threshold, per query, before thresholds are raised."""

MAX_CANDIDATES = 4096
"""Candidates of a query before they are scored to keep the best ones only."""

Chunk = tuple[Pass, int, np.ndarray]
"""The pass over a shard, number of the shard's first row, rows."""

Reached = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Queries, rows, and the lowest and highest score that each can have."""


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
        scan = _Scan(shards, sketches or [None] * len(shards), part, k)
        scan.run(selected)
        ranked = map_in_threads(scan.rank, range(len(part)))
        rows.extend(best_rows for best_rows, _ in ranked)
        scores.extend(best_scores for _, best_scores in ranked)
    return rows, scores


def score_rows(shards: Sequence[np.ndarray], query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the exact scores of sorted rows for one query: float64 products as float32."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    bounds = np.searchsorted(rows, starts)
    scores = np.empty(len(rows), dtype=np.float32)
    query = query.astype(np.float64)
    for shard, start, first, last in zip(shards, starts, bounds, bounds[1:], strict=False):
        if first < last:
            vectors = np.asarray(shard)[rows[first:last] - start]
            scores[first:last] = vectors.astype(np.float64) @ query
    return scores


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
    ):
        self.shards = shards
        self.queries = queries
        self.k = k
        self.passes = choose_passes(shards, sketches, queries)
        self.candidates = [_Candidates() for _ in queries]
        self.thresholds = np.full(len(queries), -np.inf, dtype=np.float32)
        self.pending: list[Reached] = []
        self.num_pending = 0
        self.lock = Lock()

    def run(self, selected: np.ndarray | None) -> None:
        """Reads the vectors, and collects candidates."""
        chunks: list[Chunk] = []
        first = 0
        for pass_ in self.passes:
            for start in range(0, pass_.num_rows, pass_.chunk_rows):
                end = min(start + pass_.chunk_rows, pass_.num_rows)
                rows = np.arange(first + start, first + end)
                if selected is not None:
                    rows = rows[selected[rows]]
                if len(rows):
                    chunks.append((pass_, first, rows))
            first += pass_.num_rows
        if chunks:
            # A few rows first: of all others only those that exceed them are looked at.
            pass_, first, rows = chunks[0]
            self.read_chunk((pass_, first, rows[:FIRST_ROWS]))
            self.raise_thresholds()
            if len(rows) > FIRST_ROWS:
                chunks[0] = (pass_, first, rows[FIRST_ROWS:])
            else:
                del chunks[0]
        map_in_threads(self.read_chunk, chunks)
        self.raise_thresholds()

    def read_chunk(self, chunk: Chunk) -> None:
        """Adds the rows of a chunk that reach the thresholds; runs in several threads."""
        pass_, first, rows = chunk
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
            if self.num_pending > PENDING_PER_QUERY * len(self.queries):
                self.raise_thresholds()

    def raise_thresholds(self) -> None:
        """Adds the rows that reached the thresholds to the candidates, and raises the former."""
        if not self.pending:
            return
        queries, *values = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.num_pending = [], 0
        order = np.argsort(queries, kind="stable")
        ends = np.cumsum(np.bincount(queries, minlength=len(self.queries)))
        for query, positions in enumerate(np.split(order, ends[:-1])):
            self.candidates[query].add(*(value[positions] for value in values))
            self.thresholds[query] = self.prune(query)

    def prune(self, query: int) -> float:
        """Drops candidates that cannot be among the best; returns the score that k rows reach."""
        candidates = self.candidates[query]
        least = candidates.prune(self.k)
        if len(candidates.rows) > max(MAX_CANDIDATES, 4 * self.k):
            rows, scores = self.rank(query)
            self.candidates[query] = _Candidates(rows, scores, scores)
            least = float(scores[-1])
        return least

    def rank(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k best candidates of a query and their exact scores.

        Those that can be best are scored first, until no other can be among the k best.
        """
        candidates = self.candidates[query]
        order = np.argsort(-candidates.highest)
        rows, highest = candidates.rows[order], candidates.highest[order]
        best_rows, scores = rows[:0], highest[:0]
        start, end = 0, max(64, 4 * self.k)
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


class _Candidates:
    """Rows that can be among the best of a query, and between which limits their scores are.

    Limits are rounded to float32 as scores are: a row below a limit is below it as a score, too.
    """

    def __init__(self, rows: np.ndarray | None = None, *limits: np.ndarray) -> None:
        empty = np.zeros(0, dtype=np.float32)
        self.rows: np.ndarray = np.zeros(0, dtype=np.int64) if rows is None else rows
        self.lowest: np.ndarray
        self.highest: np.ndarray
        self.lowest, self.highest = limits or (empty, empty)

    def add(self, rows: np.ndarray, lowest: np.ndarray, highest: np.ndarray) -> None:
        """Adds rows."""
        self.rows = np.concatenate([self.rows, rows])
        self.lowest = np.concatenate([self.lowest, lowest])
        self.highest = np.concatenate([self.highest, highest])

    def prune(self, k: int) -> float:
        """Drops rows that k others surely exceed; returns the score that k rows surely reach."""
        if len(self.rows) < k:
            return -np.inf
        least = np.partition(self.lowest, -k)[-k]
        kept = self.highest >= least
        self.rows = self.rows[kept]
        self.lowest, self.highest = self.lowest[kept], self.highest[kept]
        return float(least)


def find_reached(products: torch.Tensor, limits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions and queries at which products [rows, queries] reach the queries' limits.

    The largest products of blocks are compared first, which is much less work than all of them.
    """
    whole = len(products) // BLOCK_ROWS * BLOCK_ROWS
    blocks = products[:whole].view(-1, BLOCK_ROWS, products.shape[1])
    block, query = (blocks.amax(dim=1) >= limits).nonzero(as_tuple=True)
    found, position = (blocks[block, :, query] >= limits[query, None]).nonzero(as_tuple=True)
    rest, rest_query = (products[whole:] >= limits).nonzero(as_tuple=True)
    positions = torch.cat([block[found] * BLOCK_ROWS + position, rest + whole])
    return positions.numpy(), torch.cat([query[found], rest_query]).numpy()
