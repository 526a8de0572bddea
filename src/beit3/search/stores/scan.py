"""Exact search by reading all vectors once, chunk by chunk.

A first pass computes approximate products in bfloat16 or float32, whichever is faster on the
processor. Its error is bounded, so that the rows that can be among the best are known; they are
scored again in float64. The result does not depend on the number format of the first pass, on
chunks or on threads.

Bound: for vectors x, q and their roundings x', q' with relative error u of each element,
|x'q' - xq| <= (2u + u^2) |x| |q| by the Cauchy-Schwarz inequality. The sum in float32 adds at most
2 dim 2^-24 |x| |q|, the rounding of the result u |x| |q|.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from beit3.search.folder import MAX_NORM

CHUNK_ROWS = 2048
"""Rows of a chunk. Its float32 copy (6 MB at 768 dimensions) should stay in the cache."""

QUERY_ROWS = 256
"""Queries that are compared in one pass over the vectors."""

MEASURE_ROWS = 50_000
MEASURE_QUERIES = 16
"""From so many rows and queries on, the first pass is in bfloat16 where that is faster. For fewer
queries the rounding of the vectors costs more than the products."""

PENDING_PER_QUERY = 256
"""Rows that reach the threshold, per query, before thresholds are raised."""

MAX_CANDIDATES = 4096
"""Candidates of a query before they are scored to keep the best ones only."""


def find_best_rows(
    shards: Sequence[np.ndarray], queries: np.ndarray, k: int, selected: np.ndarray | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Finds the k rows with the largest inner product for each query, among those selected.

    Args:
        shards: Vectors [rows, dim] of each shard, float16 or float32; rows are numbered through.
        queries: [queries, dim].
        k: Number of rows for a query.
        selected: Which rows take part, bool [all rows]; None for all.

    Returns:
        Row numbers and float32 scores of each query, by falling score; equal ones by row.
    """
    rows: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    for start in range(0, len(queries), QUERY_ROWS):
        scan = _Scan(shards, queries[start : start + QUERY_ROWS].astype(np.float32), k)
        scan.run(selected)
        for number in range(len(scan.queries)):
            best_rows, best_scores = scan.rank(number)
            rows.append(best_rows)
            scores.append(best_scores)
    return rows, scores


def score_rows(shards: Sequence[np.ndarray], query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the exact scores of some rows for one query: float64 products as float32."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    shard_of_row = np.searchsorted(starts, rows, side="right") - 1
    scores = np.empty(len(rows), dtype=np.float32)
    for number in np.unique(shard_of_row):
        positions = np.flatnonzero(shard_of_row == number)
        vectors = shards[number][rows[positions] - starts[number]].astype(np.float64)
        scores[positions] = vectors @ query.astype(np.float64)
    return scores


def rank_rows(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best rows and their scores, by falling score; equal ones by row."""
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


class _Scan:
    """One pass over all vectors: keeps, for each query, the rows that can be among the k best."""

    def __init__(self, shards: Sequence[np.ndarray], queries: np.ndarray, k: int):
        self.shards = shards
        self.queries = queries
        self.k = k
        self.dtype = choose_pass_dtype(sum(len(shard) for shard in shards), len(queries))
        self.torch_queries = torch.from_numpy(queries).to(self.dtype)
        self.errors = _bound_errors(queries, self.dtype)
        self.candidates = [_Candidates() for _ in queries]
        self.thresholds = torch.full((len(queries),), -torch.inf)
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.num_pending = 0
        self.buffer = torch.empty(CHUNK_ROWS, queries.shape[1])
        self.rounded = torch.empty(CHUNK_ROWS, queries.shape[1], dtype=self.dtype)

    def run(self, selected: np.ndarray | None) -> None:
        """Reads the vectors, and collects candidates."""
        for vectors, rows in _iterate_chunks(self.shards, selected):
            products = self.multiply(vectors)
            reached, positions = (products >= self.thresholds[:, None]).nonzero(as_tuple=True)
            scores = products[reached, positions].numpy()
            self.pending.append((reached.numpy(), rows[positions.numpy()], scores))
            self.num_pending += len(scores)
            if self.num_pending > PENDING_PER_QUERY * len(self.queries):
                self.raise_thresholds()
        self.raise_thresholds()

    def multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the approximate products [queries, rows] of a chunk as float32."""
        buffer = self.buffer[: len(vectors)]
        buffer.copy_(vectors)
        if self.dtype == torch.float32:
            return self.torch_queries @ buffer.t()
        # PyTorch converts float16 to bfloat16 four times slower than by way of float32.
        rounded = self.rounded[: len(vectors)]
        rounded.copy_(buffer)
        return (self.torch_queries @ rounded.t()).float()

    def raise_thresholds(self) -> None:
        """Adds the rows that reached the thresholds to the candidates, and raises the former."""
        if not self.pending:
            return
        queries, rows, scores = (np.concatenate(parts) for parts in zip(*self.pending, strict=True))
        self.pending, self.num_pending = [], 0
        order = np.argsort(queries, kind="stable")
        ends = np.cumsum(np.bincount(queries, minlength=len(self.queries)))
        for query, positions in enumerate(np.split(order, ends[:-1])):
            self.candidates[query].add(rows[positions], scores[positions], self.errors[query])
            self.raise_threshold(query)

    def raise_threshold(self, query: int) -> None:
        """Drops candidates of a query that cannot be among the best, and raises its threshold."""
        candidates = self.candidates[query]
        least = candidates.prune(self.k)
        if len(candidates.rows) > max(MAX_CANDIDATES, 4 * self.k):
            best_rows, scores = self.rank(query)
            candidates.rows = best_rows
            candidates.lowest = candidates.highest = scores
            least = float(scores[-1])
        # Rounded down: the threshold is a float32.
        threshold = np.nextafter(np.float32(least - self.errors[query]), np.float32(-np.inf))
        self.thresholds[query] = float(threshold)

    def rank(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k best candidates of a query and their exact scores."""
        rows = np.sort(self.candidates[query].rows)
        return rank_rows(rows, score_rows(self.shards, self.queries[query], rows), self.k)


class _Candidates:
    """Rows that can be among the best of a query, and between which limits their scores are."""

    def __init__(self) -> None:
        self.rows = np.zeros(0, dtype=np.int64)
        self.lowest = np.zeros(0, dtype=np.float32)
        self.highest = np.zeros(0, dtype=np.float32)

    def add(self, rows: np.ndarray, scores: np.ndarray, error: float) -> None:
        """Adds rows whose scores are known up to an error."""
        self.rows = np.concatenate([self.rows, rows])
        self.lowest = np.concatenate([self.lowest, scores - error])
        self.highest = np.concatenate([self.highest, scores + error])

    def prune(self, k: int) -> float:
        """Drops rows that k others surely exceed; returns the score that k rows surely reach."""
        if len(self.rows) < k:
            return -np.inf
        least = np.partition(self.lowest, -k)[-k]
        kept = self.highest >= least
        self.rows, self.lowest, self.highest = (
            self.rows[kept],
            self.lowest[kept],
            self.highest[kept],
        )
        return float(least)


def _bound_errors(queries: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Returns the largest error of a product of the first pass, for each query (see the top)."""
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    summing = 2 * queries.shape[1] * 2.0**-24
    relative = 3 * rounding + rounding**2 + summing
    return np.linalg.norm(queries.astype(np.float64), axis=1) * MAX_NORM * relative


def _iterate_chunks(
    shards: Sequence[np.ndarray], selected: np.ndarray | None
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yields the selected vectors of each chunk and their row numbers."""
    first = 0
    for shard in shards:
        vectors = _share_memory(shard)
        for start in range(0, len(shard), CHUNK_ROWS):
            chunk = vectors[start : start + CHUNK_ROWS]
            rows = np.arange(first + start, first + start + len(chunk))
            if selected is not None:
                passed = selected[rows[0] : rows[-1] + 1]
                if not passed.any():
                    continue
                if not passed.all():
                    chunk, rows = chunk[torch.from_numpy(passed)], rows[passed]
            yield chunk, rows
        first += len(shard)


def _share_memory(vectors: np.ndarray) -> torch.Tensor:
    """Returns a tensor over the same memory. It is only read, of which PyTorch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(vectors)


def choose_pass_dtype(num_rows: int, num_queries: int) -> torch.dtype:
    """Returns the number format of the first pass: float32 for little work, else the faster one."""
    if num_rows < MEASURE_ROWS or num_queries < MEASURE_QUERIES:
        return torch.float32
    return _measure_pass_dtype()


@lru_cache(maxsize=1)
def _measure_pass_dtype() -> torch.dtype:
    """Measures products of both formats for some milliseconds."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        queries, vectors = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        durations = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(queries, vectors.t())
            durations.append(time.perf_counter() - start)
        seconds[dtype] = min(durations)
    return min(seconds, key=seconds.__getitem__)
