"""What every store of vectors offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from beit3.search.filters import Filter, require_text

CAPTION = "caption"


@dataclass(frozen=True)
class Hits:
    """Results of a search, best first: ids and float32 scores (inner products) of each query."""

    ids: list[list[str]]
    scores: list[np.ndarray]


class Store(Protocol):
    """Vectors with metadata, searched by inner product.

    Hits of equal score come in the order in which their rows were added (by id in Milvus).
    """

    uri: str
    dim: int
    max_hits: int
    """Largest k of a search: all rows, but for Milvus."""
    columns: dict[str, str]
    """Name -> type of the metadata columns: string, int64, double, bool, or null."""
    modalities: tuple[str, ...]
    fingerprint: dict[str, str]
    weights: str
    image_root: str

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Filter | None = None,
        offset: int = 0,
        modality: str = "image",
    ) -> Hits:
        """Finds the best rows for each query.

        Args:
            queries: [queries, dim].
            k: Number of hits for a query; fewer are returned when fewer rows pass.
            where: Which rows take part; all by default.
            offset: Number of best hits to pass over.
            modality: "image" or "text": which vectors of the rows are compared. Rows without a
                caption take no part in "text".
        """
        ...

    def fetch(
        self, ids: Sequence[str], columns: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Returns metadata of rows, in the order of `ids`; raises ValueError for unknown ids."""
        ...

    def get_vectors(self, ids: Sequence[str], modality: str = "image") -> np.ndarray:
        """Returns the float32 vectors [len(ids), dim]; raises ValueError for unknown ids."""
        ...

    def add(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Adds rows; raises ValueError when an id is there already."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes rows, and returns how many; raises ValueError for unknown ids."""
        ...

    def replace(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Adds rows in place of those with the same ids, if there are any."""
        ...

    def select_ids(self, where: Filter) -> list[str]:
        """Returns the ids of the rows that pass a filter."""
        ...


def check_search(
    store: Store, queries: np.ndarray, k: int, offset: int, where: Filter | None, modality: str
) -> Filter | None:
    """Checks the arguments of a search; returns the filter with what the modality adds to it."""
    if queries.ndim != 2 or queries.shape[1] != store.dim:
        raise ValueError(
            f"{store.uri} holds vectors of length {store.dim}, the queries have the shape "
            f"{list(queries.shape)}: use the weights that made the index"
        )
    if not np.isfinite(queries).all():
        raise ValueError("the queries hold numbers that are not finite")
    if k < 1 or offset < 0:
        raise ValueError(f"k {k} and offset {offset}: k is at least 1, offset at least 0")
    if modality not in store.modalities:
        raise ValueError(
            f"{store.uri} holds no {modality} vectors, only {' and '.join(store.modalities)} ones"
        )
    if where is not None:
        where.check(store.columns)
    if modality == "text" and store.columns.get(CAPTION) == "string":
        has_caption = require_text(CAPTION)
        where = has_caption if where is None else where & has_caption
    return where


def check_writable(uri: str, read_only: bool) -> None:
    """Raises ValueError when a store was opened for reading only."""
    if read_only:
        raise ValueError(f"{uri} is open for reading: open it with read_only=False to change it")


class QueryError(ValueError):
    """A query is wrong in a way that only the search finds out."""


class UnknownIdError(QueryError):
    """A store has no row of an id."""


def make_unknown_id_error(uri: str, ids: Sequence[str]) -> UnknownIdError:
    """Returns the error for ids that are not in a store."""
    more = f" ({len(ids)} such ids)" if len(ids) > 1 else ""
    return UnknownIdError(
        f"{uri} has no row with the id {ids[0]!r}{more}: give ids as `beit3 search` prints them"
    )
