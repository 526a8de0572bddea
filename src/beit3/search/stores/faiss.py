"""An approximate FAISS index in a folder of vectors.

The index proposes rows, which are then scored exactly, so that scores equal those of exact search.
Rows that were added after the index was built are searched exactly and merged; deleted ones are
passed over. A search with a filter is exact: it compares all rows that pass.

Queries unlike the index, such as texts among images, have their neighbors in more lists than
queries like it. They are told by their best score, and searched again with more effort; exactly,
where so many of them come at once that this is faster.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from beit3.files import flush_to_disk, read_json, write_text
from beit3.progress import Advance, show_progress
from beit3.search.folder import VectorFolder, lock_for_writing, open_folder
from beit3.search.stores.exact import ExactStore
from beit3.search.stores.scan import find_best_rows, rank_rows

FACTS = "faiss.json"
HNSW_ROWS = 20_000
"""Fewer rows get a graph (HNSW), more get inverted lists (IVF), which are built much faster."""

EXACT_FRACTION = 0.2
"""Where at most this fraction of the rows has vectors and is not deleted, search is exact: the
index would miss some of their neighbors."""

SAMPLE_QUERIES = 200
RECALL_K = 10
WANTED_RECALL = 0.98
EFFORTS = {"hnsw": (32, 64, 128, 256, 512), "ivf": (2, 4, 8, 16, 32, 64, 128, 256)}
"""efSearch or nprobe: the first that reaches the wanted recall is kept, else the last one."""

LIST_ROWS = 8
"""The inverted lists that are read hold at least so many rows for each one that is proposed."""

FAR_COSINE = 0.3
"""Cosine of a row and the query unlike the index that is made of it, if no other vectors can serve
as queries: about that of a photograph and its caption."""

CHUNK_ROWS = 16_384
SCORED_ROWS = 4096
"""Proposed rows that are scored at a time."""

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
        near_score: Queries whose best score is lower are searched again with `far_effort`: the
            middle between the best scores that are usual for queries like the index and for others.
        far_effort: efSearch or nprobe for queries unlike the index.
        shards: [number, rows] of the shards that it covers.
        recall: Fraction of the 10 nearest neighbors that it finds for queries like the index.
        far_recall: The same for queries unlike it.
        queries: Number of queries of each kind.
    """

    file: str
    kind: str
    parameters: dict[str, int]
    effort: int
    near_score: float
    far_effort: int
    shards: list[list[int]]
    recall: float
    far_recall: float
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
    if not isinstance(content, dict) or not all(
        isinstance(item, dict) for item in content.values()
    ):
        raise ValueError(f"{Path(path) / FACTS} is damaged: {make_remedy(path)}")
    try:
        return {modality: IndexFacts(**facts) for modality, facts in content.items()}
    except TypeError:
        raise ValueError(
            f"{Path(path) / FACTS} is of another version of beit3: {make_remedy(path)}, or search "
            "with the exact index"
        ) from None


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
            return self.find_rows_exactly(queries, k, selected, modality)
        index, facts = self._indexes[modality], self.facts[modality]
        covered = index.ntotal
        chosen = None
        count = covered
        if selected is not None:
            count = int(np.count_nonzero(selected[:covered]))
            if count <= EXACT_FRACTION * covered:
                return self.find_rows_exactly(queries, k, selected, modality)
            chosen = selected[:covered] if count < covered else None
        shards = self.folder.get_vectors(modality)
        proposals = _Proposals(index, facts, shards, k, chosen)
        rows, scores, is_far = proposals.find(queries)
        num_shards = len(facts.shards)
        later_rows, later_scores = find_best_rows(
            shards[num_shards:],
            queries,
            k,
            None if selected is None else selected[covered:],
            self.folder.get_sketches(modality)[num_shards:],
        )
        found_rows, found_scores = [], []
        for number in range(len(queries)):
            found = rows[number] >= 0
            all_rows = np.concatenate([rows[number][found], later_rows[number] + covered])
            all_scores = np.concatenate([scores[number][found], later_scores[number]])
            best_rows, best_scores = rank_rows(all_rows, all_scores, k)
            found_rows.append(best_rows)
            found_scores.append(best_scores)
        is_short = np.count_nonzero(rows >= 0, axis=1) < min(k, count)
        unsure = np.flatnonzero(is_far | is_short)
        if len(unsure):
            exact = self.find_rows_exactly(queries[unsure], k, selected, modality)
            for position, best_rows, best_scores in zip(unsure, *exact, strict=True):
                found_rows[position], found_scores[position] = best_rows, best_scores
        return found_rows, found_scores


@dataclass(frozen=True)
class _Proposals:
    """Rows of an index that can be the k best ones among those selected."""

    index: Any
    facts: IndexFacts
    shards: list[np.ndarray]
    k: int
    selected: np.ndarray | None = None

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns rows [queries, more than k], -1 where there are none, and their exact scores.

        Also, which queries are so unlike the index, and so many, that exact search is faster.
        """
        facts = self.facts
        rows, scores = self.find_with(queries, facts.effort)
        is_far = scores.max(axis=1) < facts.near_score
        if facts.far_effort <= facts.effort:
            is_far[:] = False
        elif is_far.any() and not self.is_costly(int(is_far.sum())):
            rows[is_far], scores[is_far] = self.find_with(queries[is_far], facts.far_effort)
            is_far[:] = False
        return rows, scores, is_far

    def is_costly(self, num_far: int) -> bool:
        """Tells whether far queries read more vectors than there are, which exact search reads."""
        return self.facts.kind == "ivf" and num_far * self.facts.far_effort > self.index.nlist

    def find_with(self, queries: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `find` does, with the same effort for all queries."""
        faiss = import_faiss()
        index = self.index
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        # Vectors are stored in 8 bits there, and more proposals make up for it.
        number = min(index.ntotal, max(4 * self.k, self.k + 32))
        options: dict[str, Any] = {}
        if self.facts.kind == "ivf":
            effort = max(effort, math.ceil(LIST_ROWS * number * index.nlist / index.ntotal))
        if self.selected is not None:
            bits = np.packbits(self.selected, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
            effort = math.ceil(effort * len(self.selected) / np.count_nonzero(self.selected))
        if self.facts.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=min(effort, index.nlist), **options)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, number), **options)
        rows = index.search(queries, number, params=parameters)[1]
        return rows, score_proposals(self.shards, queries, rows)


def score_proposals(shards: list[np.ndarray], queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the exact scores of rows [queries, N], -inf where a row is -1."""
    scores = np.empty(rows.shape, dtype=np.float32)
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    step = max(1, SCORED_ROWS // rows.shape[1])
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        vectors = np.empty((*part.shape, queries.shape[1]), dtype=np.float64)
        shard_of_row = np.searchsorted(starts, part, side="right") - 1
        for number in np.unique(shard_of_row[part >= 0]):
            found = shard_of_row == number
            vectors[found] = np.asarray(shards[number])[part[found] - starts[number]]
        products = vectors @ queries[first : first + step, :, None].astype(np.float64)
        scores[first : first + step] = products[:, :, 0]
    scores[rows < 0] = -np.inf
    return scores


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

    The kind follows from the number of rows. Recall is measured against exact search: for sampled
    vectors, each without itself, and for queries that lie elsewhere, which are vectors of the other
    modality or, in a folder of one, sampled vectors far from which noise has moved them.
    """
    faiss = import_faiss()
    path = Path(path)
    with lock_for_writing(path):
        folder = open_folder(path)
        if folder.manifest.num_rows == 0:
            raise ValueError(f"{path} has no rows: embed something first")
        generation = folder.manifest.generation
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
        for older in path.glob("faiss_*.index"):
            if older.name not in kept:
                older.unlink()
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
    """Measures recall with growing effort until it suffices, for queries like the index and not."""
    sample = _sample_rows(folder.manifest.num_rows, SAMPLE_QUERIES)
    near = folder.gather_vectors(sample, modality)
    given = near.any(axis=1)  # Rows without a caption have zeros as their text vector.
    near, sample = near[given], sample[given]
    far = _make_far_queries(folder, modality, near)
    near_neighbors, near_best = _find_neighbors(folder, modality, near, sample)
    no_rows = np.full(len(far), -1)
    far_neighbors, far_best = _find_neighbors(folder, modality, far, no_rows)
    covered = [[shard.number, shard.rows] for shard in folder.shards]
    near_score = (near_best + far_best) / 2
    facts = IndexFacts(
        file, kind, parameters, 0, near_score, 0, covered, 0.0, 0.0, queries=len(near)
    )
    proposals = _Proposals(index, facts, folder.get_vectors(modality), RECALL_K + 1)
    effort, recall = _choose_effort(proposals, near, sample, near_neighbors)
    far_effort, far_recall = _choose_effort(proposals, far, no_rows, far_neighbors)
    return replace(
        facts, effort=effort, far_effort=far_effort, recall=recall, far_recall=far_recall
    )


def _make_far_queries(folder: VectorFolder, modality: str, near: np.ndarray) -> np.ndarray:
    """Returns queries unlike the index: vectors of the other modality, or rows mixed with noise."""
    others = [name for name in folder.manifest.modalities if name != modality]
    if others:
        sample = _sample_rows(folder.manifest.num_rows, SAMPLE_QUERIES)
        vectors = folder.gather_vectors(sample, others[0])
        vectors = vectors[vectors.any(axis=1)]
        if len(vectors):
            return vectors
    noise = np.random.default_rng(1).standard_normal(near.shape).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return FAR_COSINE * near + math.sqrt(1 - FAR_COSINE**2) * noise


def _find_neighbors(
    folder: VectorFolder, modality: str, queries: np.ndarray, rows: np.ndarray
) -> tuple[list[np.ndarray], float]:
    """Returns the nearest rows of queries without the row that each is, and the median best score.

    The latter is 0 where there are no neighbors.
    """
    shards, sketches = folder.get_vectors(modality), folder.get_sketches(modality)
    found, scores = find_best_rows(shards, queries, RECALL_K + 1, sketches=sketches)
    kept = [part != row for part, row in zip(found, rows, strict=True)]
    neighbors = [part[keep] for part, keep in zip(found, kept, strict=True)]
    best = [part[keep].max() for part, keep in zip(scores, kept, strict=True) if keep.any()]
    return neighbors, float(np.median(best)) if best else 0.0


def _choose_effort(
    proposals: _Proposals, queries: np.ndarray, rows: np.ndarray, neighbors: list[np.ndarray]
) -> tuple[int, float]:
    """Returns the least effort at which recall suffices, or the greatest, and recall with it."""
    for effort in EFFORTS[proposals.facts.kind]:
        recall = _measure_recall(proposals, queries, rows, neighbors, effort)
        if recall >= WANTED_RECALL:
            break
    return effort, recall


def _measure_recall(
    proposals: _Proposals,
    queries: np.ndarray,
    rows: np.ndarray,
    neighbors: list[np.ndarray],
    effort: int,
) -> float:
    """Returns the fraction of the nearest neighbors among the best proposed rows."""
    num_hits = num_neighbors = 0
    proposed = zip(rows, neighbors, *proposals.find_with(queries, effort), strict=True)
    for row, nearest, found, scores in proposed:
        best, _ = rank_rows(found[found >= 0], scores[found >= 0], RECALL_K + 1)
        num_hits += len({*best} & {*nearest} - {row})
        num_neighbors += len(nearest)
    return round(num_hits / max(1, num_neighbors), 4)


def _sample_rows(num_rows: int, number: int) -> np.ndarray:
    """Returns some row numbers, sorted; the same ones each time."""
    return np.sort(np.random.default_rng(0).permutation(num_rows)[:number])
