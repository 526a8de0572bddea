"""Exact search over the memory-mapped vectors of a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from beit3.search.filters import Filter
from beit3.search.folder import (
    VectorFolder,
    append_rows,
    delete_rows,
    open_folder,
    replace_rows,
)
from beit3.search.stores.scan import find_best_rows
from beit3.search.stores.store import Hits, check_search, check_writable, make_unknown_id_error


class ExactStore:
    """A folder of vectors. It shows the generation at which it was opened, until `refresh`."""

    def __init__(self, path: str | Path, *, read_only: bool = True):
        self.uri = str(path)
        self.read_only = read_only
        self.refresh()

    def refresh(self) -> None:
        """Opens the newest generation of the folder."""
        self.folder: VectorFolder = open_folder(self.uri)
        manifest = self.folder.manifest
        self.dim = manifest.dim
        self.num_rows = self.max_hits = self.folder.num_rows
        self.columns = {field.name: str(field.type) for field in self.folder.schema}
        self.modalities = manifest.modalities
        self.fingerprint = manifest.fingerprint
        self.weights = manifest.weights
        self.image_root = manifest.image_root

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: Filter | None = None,
        offset: int = 0,
        modality: str = "image",
    ) -> Hits:
        """Finds the best rows, see `Store`."""
        find_rows = self.find_rows if where is None else self.find_rows_exactly
        where = check_search(self, queries, k, offset, where, modality)
        best_rows, scores = find_rows(queries, k + offset, self.select_rows(where), modality)
        return self.make_hits([row[offset:] for row in best_rows], [row[offset:] for row in scores])

    def find_rows(
        self, queries: np.ndarray, k: int, selected: np.ndarray | None, modality: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the numbers and scores of the k best rows among those selected, best first.

        It serves searches without a filter; an approximate store overrides it.
        """
        return self.find_rows_exactly(queries, k, selected, modality)

    def find_rows_exactly(
        self, queries: np.ndarray, k: int, selected: np.ndarray | None, modality: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns what `find_rows` does, by exact search."""
        folder = self.folder
        sketches = folder.get_sketches(modality)
        return find_best_rows(folder.get_vectors(modality), queries, k, selected, sketches)

    def make_hits(self, rows: list[np.ndarray], scores: list[np.ndarray]) -> Hits:
        """Returns hits with ids instead of row numbers."""
        ids = self.folder.read_rows(np.concatenate(rows), ["id"]).column("id").to_pylist()
        ends = np.cumsum([len(numbers) for numbers in rows])
        starts = ends - [len(numbers) for numbers in rows]
        groups = [ids[start:end] for start, end in zip(starts, ends, strict=True)]
        return Hits(groups, scores)

    def select_rows(self, where: Filter | None) -> np.ndarray | None:
        """Returns which rows take part, bool [rows]; None for all of them."""
        if where is None:
            return self.folder.alive if len(self.folder.deleted) else None
        return where.select(self.folder.read_column) & self.folder.alive

    def select_ids(self, where: Filter) -> list[str]:
        """Returns the ids of the rows that pass a filter."""
        where.check(self.columns)
        selected = self.select_rows(where)
        return self.folder.read_column("id").filter(pa.array(selected)).to_pylist()

    def fetch(
        self, ids: Sequence[str], columns: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Returns metadata of rows, see `Store`."""
        return self.folder.read_rows(self._find(ids), columns).to_pylist()

    def get_vectors(self, ids: Sequence[str], modality: str = "image") -> np.ndarray:
        """Returns vectors, see `Store`."""
        return self.folder.gather_vectors(self._find(ids), modality)

    def _find(self, ids: Sequence[str]) -> np.ndarray:
        """Returns the row numbers of ids."""
        rows = self.folder.find_rows(ids)
        if (rows < 0).any():
            unknown = [item for item, row in zip(ids, rows, strict=True) if row < 0]
            raise make_unknown_id_error(self.uri, unknown)
        return rows

    def add(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Adds rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        append_rows(self.uri, vectors, metadata)
        self.refresh()

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        number = delete_rows(self.uri, ids)
        self.refresh()
        return number

    def replace(self, vectors: Mapping[str, np.ndarray], metadata: pa.Table) -> None:
        """Replaces rows, see `Store`."""
        check_writable(self.uri, self.read_only)
        replace_rows(self.uri, vectors, metadata)
        self.refresh()
