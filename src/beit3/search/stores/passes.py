"""The first pass of exact search: approximate products of vectors and queries, and their errors.

Bounds, by the Cauchy-Schwarz inequality, for a vector x, a query q and their roundings x', q':
- 8 bits: |x'q' - xq| <= |x' - x| |q| + |x'| |q' - q|. Both differences are known (`Sketch`), and
  products of integers are exact.
- bfloat16: the relative error u of each element gives (2u + u^2) |x| |q|; the sum in float32 adds
  at most 2 dim 2^-24 |x| |q|, the rounding of the result u |x| |q|. In float32, u is 0.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from beit3.search.folder import MAX_NORM
from beit3.search.sketch import LEVELS, Sketch, find_scale, rotate, round_to_codes
from beit3.search.stores.threads import reuse_memory, run_in_thread

MEASURE_ROWS = 50_000
MEASURE_QUERIES = 16
"""From so many rows and queries on, the first pass is in bfloat16 where that is faster. For fewer
queries the rounding of the vectors costs more than the products."""

MEASURE_REPEATS = 12

MAX_CHUNK_ROWS = 16_384
MAX_PRODUCTS = 2**19
"""Largest chunk of codes, and how many products of it stay in the cache. Chunks of fewer products
let threads wait for each other more often."""

COPIED_ROWS = 4096
"""Rows of codes that are copied before they are multiplied. Products of a copy in the cache are
faster than those of memory-mapped codes: for a million rows, with the copying, 64 queries take 285
milliseconds of a core instead of 343, one query 54 instead of 84."""


class Pass(Protocol):
    """Multiplies rows of one shard with all queries, approximately."""

    num_rows: int
    chunk_rows: int
    """Rows of a chunk; what is computed of it should stay in the cache."""
    scales: np.ndarray
    """What a product of each query is multiplied with to be a score, float64 [queries]."""
    errors: np.ndarray
    """Largest error of a score of each query, float64 [queries]."""

    def multiply(self, rows: np.ndarray) -> torch.Tensor:
        """Returns products [len(rows), queries]; the rows are sorted."""
        ...

    def compute_limits(self, thresholds: np.ndarray) -> torch.Tensor:
        """Returns the products [queries] from which on a score can reach float32 thresholds."""
        ...


def choose_passes(
    shards: Sequence[np.ndarray], sketches: Sequence[Sketch | None], queries: np.ndarray
) -> list[Pass]:
    """Returns the fastest pass over each shard."""
    num_rows = sum(len(shard) for shard in shards)
    use_sketches = any(sketches) and can_multiply_codes()
    codes = encode_queries(queries)
    dtype = choose_float_dtype(num_rows, len(queries))
    return [
        SketchPass(sketch, codes)
        if sketch is not None and use_sketches
        else FloatPass(shard, queries, dtype)
        for shard, sketch in zip(shards, sketches, strict=True)
    ]


@dataclass(frozen=True)
class QueryCodes:
    """Queries in 8 bits: rotated, `codes * scales` are the queries, but for `errors`.

    Attributes:
        codes: int8 [dim, queries].
        scales: [queries].
        errors: Length of what rounding changed [queries].
        norms: Length of the queries [queries].
    """

    codes: torch.Tensor
    scales: np.ndarray
    errors: np.ndarray
    norms: np.ndarray


def encode_queries(queries: np.ndarray) -> QueryCodes:
    """Rounds queries [queries, dim] to 8 bits, each by its own scale."""
    rotated = rotate(queries.astype(np.float64))
    scales = find_scale(np.abs(rotated).max(axis=1))
    codes, errors = round_to_codes(rotated, scales[:, None])
    transposed = torch.from_numpy(np.ascontiguousarray(codes.T))
    return QueryCodes(transposed, scales, errors, np.linalg.norm(rotated, axis=1))


class SketchPass:
    """Multiplies 8-bit codes; products are exact int32 of the codes."""

    def __init__(self, sketch: Sketch, queries: QueryCodes):
        self.num_rows = len(sketch.codes)
        self.chunk_rows = min(MAX_CHUNK_ROWS, MAX_PRODUCTS // len(queries.scales))
        self.codes = share_memory(sketch.codes)
        self.query_codes = queries.codes
        self.scales = sketch.scale * queries.scales
        rounding = (MAX_NORM + sketch.error) * queries.errors
        self.errors = sketch.error * queries.norms + rounding

    def multiply(self, rows: np.ndarray) -> torch.Tensor:
        """Returns products, see `Pass`."""
        products = torch.empty(len(rows), len(self.scales), dtype=torch.int32)
        for start in range(0, len(rows), COPIED_ROWS):
            part = rows[start : start + COPIED_ROWS]
            codes = reuse_memory(len(part), self.codes.shape[1])
            codes.copy_(take_rows(self.codes, part))
            torch._int_mm(codes, self.query_codes, out=products[start : start + len(part)])
        return products

    def compute_limits(self, thresholds: np.ndarray) -> torch.Tensor:
        """Returns limits, see `Pass`."""
        lower = np.nextafter(thresholds, np.float32(-np.inf)).astype(np.float64)
        limits = np.floor((lower - self.errors) / self.scales) - 1
        bound = 2.0**31 - 1
        return torch.from_numpy(limits.clip(-bound, bound).astype(np.int32))


class FloatPass:
    """Multiplies vectors in float32 or bfloat16."""

    chunk_rows = 1024

    def __init__(self, vectors: np.ndarray, queries: np.ndarray, dtype: torch.dtype):
        self.num_rows = len(vectors)
        self.vectors = share_memory(vectors)
        self.dtype = dtype
        self.queries = torch.from_numpy(queries).to(dtype).t()
        self.scales = np.ones(len(queries))
        rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
        summing = 2 * queries.shape[1] * 2.0**-24
        relative = 3 * rounding + rounding**2 + summing
        self.errors = np.linalg.norm(queries.astype(np.float64), axis=1) * MAX_NORM * relative

    def multiply(self, rows: np.ndarray) -> torch.Tensor:
        """Returns products, see `Pass`."""
        # PyTorch converts float16 to bfloat16 four times slower than by way of float32.
        return (take_rows(self.vectors, rows).float().to(self.dtype) @ self.queries).float()

    def compute_limits(self, thresholds: np.ndarray) -> torch.Tensor:
        """Returns limits, see `Pass`."""
        # Rounded down twice: the threshold and the limit are float32.
        limits = (np.nextafter(thresholds, np.float32(-np.inf)) - self.errors).astype(np.float32)
        return torch.from_numpy(np.nextafter(limits, np.float32(-np.inf)))


def take_rows(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Returns rows of a tensor: a view where they follow each other, else a copy."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return tensor[first : last + 1]
    return tensor.index_select(0, torch.from_numpy(rows))


def share_memory(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor over the same memory. It is only read, of which PyTorch warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


# What the processor does well -----------------------------------------------------------------


@lru_cache(maxsize=1)
def can_multiply_codes() -> bool:
    """Tells whether products of 8-bit integers are right and faster than those of floats here.

    Processors without instructions for them are slow, or round sums of two products to 16 bits.
    """
    if not hasattr(torch, "_int_mm"):
        return False
    codes = torch.full((512, 512), LEVELS, dtype=torch.int8)
    codes[::2] = -LEVELS
    codes[:, ::7] = 1
    for queries in (1, 3, 64):
        parts = codes[:queries].t().contiguous()
        try:
            products = torch._int_mm(codes, parts)
        except RuntimeError:
            return False
        if not torch.equal(products, (codes.double() @ parts.double()).to(torch.int32)):
            return False
    seconds = _measure_products(codes, codes[:64].t().contiguous(), torch._int_mm)
    return seconds < _measure_float_products(_choose_fast_dtype())


def choose_float_dtype(num_rows: int, num_queries: int) -> torch.dtype:
    """Returns the number format of a pass over floats: float32 for little work, else the faster."""
    if num_rows < MEASURE_ROWS or num_queries < MEASURE_QUERIES:
        return torch.float32
    return _choose_fast_dtype()


@lru_cache(maxsize=1)
def _choose_fast_dtype() -> torch.dtype:
    return min((torch.float32, torch.bfloat16), key=_measure_float_products)


def _measure_float_products(dtype: torch.dtype) -> float:
    """Measures what `FloatPass` does with vectors as they are stored: it converts them first."""
    vectors, queries = torch.ones(512, 512, dtype=torch.float16), torch.ones(512, 64, dtype=dtype)
    return _measure_products(
        vectors, queries, lambda first, second: first.float().to(dtype) @ second
    )


def _measure_products(
    first: torch.Tensor,
    second: torch.Tensor,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """Returns the seconds that a product takes, at best, in a thread as those of a search."""

    def measure() -> float:
        durations = []
        for _ in range(MEASURE_REPEATS):
            start = time.perf_counter()
            multiply(first, second)
            durations.append(time.perf_counter() - start)
        return min(durations)

    return run_in_thread(measure)
