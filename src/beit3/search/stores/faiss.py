"""An approximate FAISS index in a folder of vectors.

The index proposes rows, which are then scored exactly, so that scores equal those of exact search.
Rows that were added after the index was built are searched exactly and merged; deleted ones are
passed over. Small selections of rows are searched exactly.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beit3.files import flush_to_disk, read_json, write_text
from beit3.progress import Advance, show_progress
from beit3.search.folder import VectorFolder, lock_for_writing, open_folder
from beit3.search.stores.exact import ExactStore
from beit3.search.stores.scan import find_best_rows, rank_rows, score_rows

FACTS = "faiss.json"
HNSW_ROWS = 20_000
"""Fewer rows get a graph (HNSW), more get inverted lists (IVF), which are built much faster."""

EXACT_ROWS = 50_000
"""Selections of at most so many rows are searched exactly."""

EXACT_FRACTION = 0.2
"""Selections of at most this fraction of the rows are searched exactly: the index would miss some
of their neighbors."""

SAMPLE_QUERIES = 200
RECALL_K = 10
WANTED_RECALL = 0.98
EFFORTS = {"hnsw": (32, 64, 128, 256, 512), "ivf": (8, 16, 32, 64, 128)}
"""efSearch or nprobe: the first that reaches the wanted recall is kept, else the last one.

Queries by text lie farther from images than images from each other, so that the smallest nprobe is
larger than what images alone need.
"""

CHUNK_ROWS = 16_384
TRAIN_POINTS = 40
"""Vectors per inverted list from which the lists' centers are computed."""


@dataclass(frozen=True)
class IndexFacts:
    """Describes the index of one modality.

    Attributes:
        file: Name of the index's file in the folder.
        kind: hnsw or ivf.
        parameters: How it was built.
        effort: efSearch or nprobe of a search.
        shards: [number, rows] of the shards that it covers.
        recall: Fraction of the 10 nearest neighbors that it finds, over sampled vectors.
        queries: Number of the sampled vectors.
    """

    file: str
    kind: str
    parameters: dict[str, int]
    effort: int
    shards: list[list[int]]
    recall: float
    queries: int


def import_faiss() -> Any:
    """Imports FAISS; raises ValueError when it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "FAISS is not installed: pip install 'beit3[faiss]', or search with the exact index"
        ) from None
    return faiss


def has_faiss_index(path: str | Path) -> bool:
    """Tells whether a folder has a FAISS index."""
    return (Path(path) / FACTS).is_file()


def read_facts(path: str | Path) -> dict[str, IndexFacts]:
    """Returns what is known of a folder's indexes, by modality; empty when it has none."""
    if not has_faiss_index(path):
        return {}
    content = read_json(Path(path) / FACTS)
    try:
        return {modality: IndexFacts(**facts) for modality, facts in content.items()}
    except (TypeError, AttributeError):
        raise ValueError(f"{Path(path) / FACTS} is damaged: {make_remedy(path)}") from None


def make_remedy(path: str | Path) -> str:
    return f"run `beit3 index {path} --faiss`"


# Search ---------------------------------------------------------------------------------------


class FaissStore(ExactStore):
    """A folder of vectors, searched through its FAISS index."""

    def refresh(self) -> None:
        """Opens the newest generation of the folder, and its indexes."""
        super().refresh()
        self.facts = read_facts(self.uri)
        if not self.facts:
            raise ValueError(f"{self.uri} has no FAISS index: {make_remedy(self.uri)}")
        self._indexes = {
            modality: _open_index(self.folder, facts) for modality, facts in self.facts.items()
        }

    def find_rows(
        self, queries: np.ndarray, k: int, selected: np.ndarray | None, modality: str
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the k best rows of each query, as `ExactStore.find_rows`."""
        if modality not in self._indexes:
            return super().find_rows(queries, k, selected, modality)
        index, facts = self._indexes[modality], self.facts[modality]
        covered = index.ntotal
        fraction = 1.0
        if selected is not None:
            count = int(np.count_nonzero(selected[:covered]))
            fraction = count / covered
            if fraction < 1 and (count <= EXACT_ROWS or fraction <= EXACT_FRACTION):
                return super().find_rows(queries, k, selected, modality)
        chosen = selected[:covered] if selected is not None and fraction < 1 else None
        proposed = _propose_rows(index, facts, queries, k, chosen)
        if (np.count_nonzero(proposed >= 0, axis=1) < min(k, round(fraction * covered))).any():
            return super().find_rows(queries, k, selected, modality)
        shards = self.folder.get_vectors(modality)
        later = shards[len(facts.shards) :]
        later_selected = None if selected is None else selected[covered:]
        later_rows, later_scores = find_best_rows(later, queries, k, later_selected)
        ranked = []
        for number, query in enumerate(queries):
            rows = np.sort(proposed[number][proposed[number] >= 0])
            scores = score_rows(shards, query.astype(np.float32), rows)
            all_rows = np.concatenate([rows, later_rows[number] + covered])
            ranked.append(rank_rows(all_rows, np.concatenate([scores, later_scores[number]]), k))
        return [rows for rows, _ in ranked], [scores for _, scores in ranked]


def _propose_rows(
    index: Any, facts: IndexFacts, queries: np.ndarray, k: int, selected: np.ndarray | None
) -> np.ndarray:
    """Returns rows [queries, more than k] that can be the best ones, -1 where there are none."""
    faiss = import_faiss()
    effort = facts.effort
    options: dict[str, Any] = {}
    if selected is not None:
        options["sel"] = faiss.IDSelectorBitmap(np.packbits(selected, bitorder="little"))
        effort = math.ceil(effort * len(selected) / np.count_nonzero(selected))
    # Vectors are stored in 8 bits there, and more proposals make up for it.
    number = min(index.ntotal, max(4 * k, k + 32))
    if facts.kind == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=min(effort, index.nlist), **options)
    else:
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, number), **options)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    return index.search(queries, number, params=parameters)[1]


def _open_index(folder: VectorFolder, facts: IndexFacts) -> Any:
    """Opens an index, and checks that it belongs to the folder's vectors."""
    faiss = import_faiss()
    path = folder.path / facts.file
    shards = [[shard.number, shard.rows] for shard in folder.shards]
    if shards[: len(facts.shards)] != facts.shards:
        raise ValueError(
            f"{path} is of other vectors than the folder's: {make_remedy(folder.path)}"
        )
    flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if facts.kind == "ivf" else 0
    try:
        index = faiss.read_index(str(path), flags)
    except RuntimeError as error:
        reason = str(error).split("\n")[0][-120:]
        raise ValueError(
            f"{path} is missing or damaged ({reason}): {make_remedy(folder.path)}"
        ) from None
    if index.d != folder.manifest.dim or index.ntotal != sum(rows for _, rows in facts.shards):
        raise ValueError(
            f"{path} is of other vectors than the folder's: {make_remedy(folder.path)}"
        )
    return index


# Building -------------------------------------------------------------------------------------


def build_faiss_index(path: str | Path) -> dict[str, IndexFacts]:
    """Builds the indexes of a folder, replaces older ones, and returns what is known of them.

    The kind follows from the number of rows. Recall is measured against exact search. Queries are
    sampled vectors, each without itself; in a folder of images and texts, as many vectors of the
    other modality as well, because texts lie elsewhere than images.
    """
    faiss = import_faiss()
    path = Path(path)
    with lock_for_writing(path):
        folder = open_folder(path)
        if folder.manifest.num_rows == 0:
            raise ValueError(f"{path} has no rows: embed something first")
        generation = folder.manifest.generation
        older = read_facts(path)
        facts = {}
        for modality in folder.manifest.modalities:
            name = f"faiss_{modality}_{generation}.index"
            index, kind, parameters = _build(folder, modality)
            facts[modality] = _tune(folder, modality, index, kind, parameters, name)
            partial = path / f"{name}.partial"
            faiss.write_index(index, str(partial))
            flush_to_disk(partial)
            partial.replace(path / name)
        content = {modality: asdict(entry) for modality, entry in facts.items()}
        write_text(path / FACTS, json.dumps(content, indent=1) + "\n")
        kept = {entry.file for entry in facts.values()}
        for entry in older.values():
            if entry.file not in kept:
                (path / entry.file).unlink(missing_ok=True)
    return facts


def _build(folder: VectorFolder, modality: str) -> tuple[Any, str, dict[str, int]]:
    """Builds an index of all rows; returns it, its kind and its parameters."""
    faiss = import_faiss()
    dim, num_rows = folder.manifest.dim, folder.manifest.num_rows
    metric = faiss.METRIC_INNER_PRODUCT
    if num_rows < HNSW_ROWS:
        kind, parameters = "hnsw", {"M": 32, "efConstruction": 80}
        index = faiss.IndexHNSWFlat(dim, parameters["M"], metric)
        index.hnsw.efConstruction = parameters["efConstruction"]
    else:
        lists = 2 ** round(math.log2(2 * math.sqrt(num_rows)))
        kind, parameters = "ivf", {"nlist": lists, "bits": 8}
        quantizer = faiss.IndexFlatIP(dim)
        quantizer_type = faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, quantizer_type, metric)
        index.cp.niter = 6
        index.cp.spherical = True
        sample = _sample_rows(num_rows, lists * TRAIN_POINTS)
        index.train(folder.gather_vectors(sample, modality))
    with show_progress(f"{modality} vectors indexed") as advance:
        for vectors in _iterate_vectors(folder, modality, advance):
            index.add(vectors)
    return index, kind, parameters


def _iterate_vectors(folder: VectorFolder, modality: str, advance: Advance) -> Iterator[np.ndarray]:
    """Yields all vectors as float32, chunk by chunk."""
    done = 0
    for shard in folder.get_vectors(modality):
        for start in range(0, len(shard), CHUNK_ROWS):
            chunk = shard[start : start + CHUNK_ROWS].astype(np.float32)
            yield chunk
            done += len(chunk)
            advance(done, folder.manifest.num_rows)


def _tune(
    folder: VectorFolder,
    modality: str,
    index: Any,
    kind: str,
    parameters: dict[str, int],
    file: str,
) -> IndexFacts:
    """Measures recall with growing effort until it suffices."""
    queries, rows = _sample_queries(folder, modality)
    shards = folder.get_vectors(modality)
    exact = [set(found) for found in find_best_rows(shards, queries, RECALL_K + 1)[0]]
    covered = [[shard.number, shard.rows] for shard in folder.shards]
    for effort in EFFORTS[kind]:
        facts = IndexFacts(file, kind, parameters, effort, covered, 0.0, len(rows))
        proposed = _propose_rows(index, facts, queries, RECALL_K + 1, None)
        recall = _measure_recall(shards, queries, rows, exact, proposed)
        facts = IndexFacts(file, kind, parameters, effort, covered, recall, len(rows))
        if recall >= WANTED_RECALL:
            break
    return facts


def _sample_queries(folder: VectorFolder, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns query vectors and the row that each is, -1 for those of the other modality."""
    sample = _sample_rows(folder.manifest.num_rows, SAMPLE_QUERIES)
    queries, rows = [], []
    for name in folder.manifest.modalities:
        vectors = folder.gather_vectors(sample, name)
        # Rows without a caption have zeros as their text vector.
        given = vectors.any(axis=1)
        queries.append(vectors[given])
        rows.append(sample[given] if name == modality else np.full(int(given.sum()), -1))
    return np.concatenate(queries), np.concatenate(rows)


def _measure_recall(
    shards: list[np.ndarray],
    queries: np.ndarray,
    rows: np.ndarray,
    exact: list[set[int]],
    proposed: np.ndarray,
) -> float:
    """Returns the fraction of the exact neighbors among the best proposed rows."""
    num_hits = num_neighbors = 0
    for query, row, neighbors, candidates in zip(queries, rows, exact, proposed, strict=True):
        candidates = np.sort(candidates[candidates >= 0])
        scores = score_rows(shards, query, candidates)
        best = set(rank_rows(candidates, scores, RECALL_K + 1)[0]) - {row}
        num_hits += len(best & (neighbors - {row}))
        num_neighbors += len(neighbors - {row})
    return round(num_hits / max(1, num_neighbors), 4)


def _sample_rows(num_rows: int, number: int) -> np.ndarray:
    """Returns some row numbers, sorted; the same ones each time."""
    return np.sort(np.random.default_rng(0).permutation(num_rows)[:number])
