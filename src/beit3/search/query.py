"""What to look for, and the search of one index: by text, by image, by both or by a stored row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit3.config import suggest
from beit3.images import ImageInput
from beit3.search.filters import Filter, parse_filter
from beit3.search.input_tables import read_image
from beit3.search.manifest import check_fingerprint
from beit3.search.stores.store import QueryError, Store
from beit3.weights.names import is_there

if TYPE_CHECKING:
    import torch

    from beit3.predict import Predictor
    from beit3.search.rerank import Reranker

NEGATIVE_WEIGHT = 0.5
"""Default weight of what a query leaves out, beside 1 for what it asks for."""

GROUP_CANDIDATES = 4
"""Candidates for each wanted group at first; where they are too few, four times as many."""

MAX_GROUP_HITS = 1_000_000
"""Candidates of several queries that are in memory at once."""

MAX_UNIT_ERROR = 1e-3
"""How far a vector's length may be from 1 before it is normalized again."""


@dataclass(frozen=True)
class Query:
    """What is looked for: any of text, image and a stored row, less what is not wanted."""

    text: str = ""
    image: ImageInput | None = None
    id: str = ""
    """A row of the index, whose neighbors are looked for. The row itself is not among them."""
    negative_text: Sequence[str] = ()
    negative_image: Sequence[ImageInput] = ()
    text_weight: float = 1.0
    image_weight: float = 1.0
    negative_weight: float = NEGATIVE_WEIGHT
    """Weight of each text and image that is not wanted."""

    def list_texts(self) -> list[str]:
        return [self.text, *self.negative_text] if self.text else list(self.negative_text)

    def list_images(self) -> list[ImageInput]:
        images = list(self.negative_image)
        return images if self.image is None else [self.image, *images]

    def describe(self) -> str:
        """Returns the query in a few words, as the title of its results."""
        parts = [self.text] if self.text else []
        if self.image is not None:
            parts.append(_name_image(self.image))
        if self.id:
            parts.append(f"like {self.id}")
        title = " + ".join(parts)
        negatives = [*self.negative_text, *map(_name_image, self.negative_image)]
        return title + "".join(f", not {negative}" for negative in negatives)


@dataclass(frozen=True)
class Result:
    """A row that was found."""

    rank: int
    """1 for the best; counts on over pages."""
    id: str
    score: float
    """Cosine of query and row; after fusion or re-ranking their score."""
    metadata: dict[str, Any]
    """The row's columns, `id` included."""
    search_score: float | None = None
    """After re-ranking, the score of the search."""

    def to_row(self) -> dict[str, Any]:
        """Returns one flat row: rank, id, score, and the metadata."""
        row: dict[str, Any] = {"rank": self.rank, "id": self.id, "score": self.score}
        if self.search_score is not None:
            row["search_score"] = self.search_score
        return row | {name: value for name, value in self.metadata.items() if name not in row}


class Searcher:
    """Searches one index with the weights that made it.

    Args:
        store: The index, as `open_store` returns it.
        predictor: The loaded weights. Without them those of `weights` are loaded when a query
            first needs them.
        weights: Path of the weights; by default the one that the index names.
        image_root: Directory that image paths are relative to now; by default the index's.
        device: Where the weights that are loaded here run.
        refuse_long_texts: Whether a text longer than the weights read is an error. Otherwise its
            beginning is used; `count_long_texts` tells how many there are.
        load_options: Arguments of `beit3.predict.load`, such as `text_model` for released files.
    """

    def __init__(
        self,
        store: Store,
        predictor: "Predictor | None" = None,
        *,
        weights: str = "",
        image_root: str = "",
        device: "torch.device | str" = "cpu",
        refuse_long_texts: bool = True,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.store = store
        self.weights = weights or store.weights
        self.image_root = image_root or store.image_root
        self.device = device
        self.refuse_long_texts = refuse_long_texts
        self.load_options = load_options or {}
        self._predictor = predictor
        if predictor is not None:
            self._check_weights(predictor)

    @property
    def predictor(self) -> "Predictor":
        """The weights. Raises ValueError where they are not those of the index."""
        if self._predictor is None:
            from beit3.predict import load

            if not self.weights or not is_there(self.weights):
                raise ValueError(
                    f"{self.store.uri} was made by the weights {self.weights or '(not named)'}, "
                    "which are not there: name them (--weights)"
                )
            predictor = load(self.weights, **self.load_options).to(self.device)
            self._check_weights(predictor)
            self._predictor = predictor
        return self._predictor

    def _check_weights(self, predictor: "Predictor") -> None:
        store = self.store
        check_fingerprint(
            store.fingerprint, predictor.fingerprint, store.uri, weights=store.weights
        )

    # Searching ------------------------------------------------------------------------------------

    def search(
        self,
        query: Query | str,
        *,
        k: int = 10,
        offset: int = 0,
        where: str | Filter | None = None,
        group_by: str = "",
        modality: str = "image",
    ) -> list[Result]:
        """Returns the rows that are nearest to the query, the best first.

        Args:
            query: What to look for; a plain text is one.
            k: How many rows, or groups.
            offset: How many of the best to pass over. Pages do not overlap.
            where: Condition on the metadata, as `parse_filter` reads it.
            group_by: Column of which each value is shown once, by its best row; rows without a
                value are shown alone.
            modality: `image` or `text`: the vectors to search.

        Raises:
            ValueError: There is nothing to look for, a text is longer than the weights read, an
                image cannot be read, or the index lacks the id, the column or the modality.
        """
        return self.search_many(
            [query], k=k, offset=offset, where=where, group_by=group_by, modality=modality
        )[0]

    def search_many(
        self,
        queries: Sequence[Query | str],
        *,
        k: int = 10,
        offset: int = 0,
        where: str | Filter | None = None,
        group_by: str = "",
        modality: str = "image",
    ) -> list[list[Result]]:
        """Returns the results of several queries, which are encoded together."""
        all_hits = self.find_hits(
            queries, k=k, offset=offset, where=where, group_by=group_by, modality=modality
        )
        all_results = []
        for ids, scores in all_hits:
            rows = self.store.fetch(ids) if ids else []
            all_results.append(
                [
                    Result(offset + index + 1, id, float(score), row)
                    for index, (id, score, row) in enumerate(zip(ids, scores, rows, strict=True))
                ]
            )
        return all_results

    def find_hits(
        self,
        queries: Sequence[Query | str],
        *,
        k: int,
        offset: int = 0,
        where: str | Filter | None = None,
        group_by: str = "",
        modality: str = "image",
    ) -> list[tuple[list[str], np.ndarray]]:
        """Returns (ids, scores) of each query, without metadata. Arguments as for `search`."""
        self.check_request(k, offset, group_by, modality)
        condition = read_filter(where)
        parsed = [Query(query) if isinstance(query, str) else query for query in queries]
        vectors = self.make_vectors(parsed, modality)
        wanted = k + offset
        if group_by:
            all_hits = self._find_groups(vectors, wanted, parsed, condition, group_by, modality)
        else:
            all_hits = self._find_rows(vectors, wanted, parsed, condition, modality)
        return [(ids[offset:wanted], scores[offset:wanted]) for ids, scores in all_hits]

    def check_request(self, k: int, offset: int, group_by: str, modality: str) -> None:
        """Raises ValueError for what the index cannot answer."""
        check_count(k, offset)
        if modality not in self.store.modalities:
            remedy = "embed images with captions" if modality == "text" else "search --in text"
            raise ValueError(
                f"{self.store.uri} has no {modality} vectors, only "
                f"{' and '.join(self.store.modalities)} ones: {remedy}"
            )
        if group_by:
            check_column(self.store, group_by)

    def _find_rows(
        self,
        vectors: np.ndarray,
        wanted: int,
        queries: Sequence[Query],
        condition: Filter | None,
        modality: str,
    ) -> list[tuple[list[str], np.ndarray]]:
        """Returns the best rows of each query without the rows that the queries name."""
        num_own = int(any(query.id for query in queries))
        hits = self.store.search(vectors, wanted + num_own, where=condition, modality=modality)
        return [
            _leave_out(ids, scores, query.id)
            for query, ids, scores in zip(queries, hits.ids, hits.scores, strict=True)
        ]

    def _find_groups(
        self,
        vectors: np.ndarray,
        wanted: int,
        queries: Sequence[Query],
        condition: Filter | None,
        group_by: str,
        modality: str,
    ) -> list[tuple[list[str], np.ndarray]]:
        """Returns the best row of each of the `wanted` best groups, for each query.

        Asks for more candidates until there are enough groups. The candidates of a longer list
        begin with those of a shorter one, so pages do not depend on how many were needed.
        """
        found: dict[int, tuple[list[str], np.ndarray]] = {}
        pending = list(range(len(queries)))
        limit = max(1, min(self.store.num_rows, self.store.max_hits))
        num_candidates = min(limit, GROUP_CANDIDATES * wanted + 1)
        while pending:
            batch = pending[: max(1, MAX_GROUP_HITS // num_candidates)]
            hits = self.store.search(
                vectors[batch], num_candidates, where=condition, modality=modality
            )
            groups = self._fetch_groups(hits.ids, group_by)
            for index, all_ids, all_scores in zip(batch, hits.ids, hits.scores, strict=True):
                ids, scores = _leave_out(all_ids, all_scores, queries[index].id)
                chosen = _choose_groups([groups[id] for id in ids], wanted)
                # A filter leaves fewer rows than candidates.
                are_all = num_candidates >= self.store.num_rows or len(all_ids) < num_candidates
                if len(chosen) >= wanted or are_all:
                    found[index] = [ids[position] for position in chosen], scores[chosen]
                elif num_candidates == limit:
                    raise QueryError(
                        f"{self.store.uri}: the best {limit} rows, the most that are returned, "
                        f"hold only {len(chosen)} of {wanted} groups: ask for fewer, or add a "
                        "filter"
                    )
            if batch[-1] == pending[-1]:
                num_candidates = min(limit, GROUP_CANDIDATES * num_candidates)
                pending = [index for index in range(len(queries)) if index not in found]
            else:
                pending = pending[len(batch) :]
        return [found[index] for index in range(len(queries))]

    def _fetch_groups(self, all_ids: Sequence[Sequence[str]], group_by: str) -> dict[str, Any]:
        """Returns the group of each hit by its id."""
        ids = list({id: None for ids in all_ids for id in ids})
        rows = self.store.fetch(ids, [group_by]) if ids else []
        return {id: row[group_by] for id, row in zip(ids, rows, strict=True)}

    # Vectors --------------------------------------------------------------------------------------

    def make_vectors(self, queries: Sequence[Query], modality: str = "image") -> np.ndarray:
        """Returns unit vectors of queries, float32 [Q, D].

        Parts of a query are added with their weights, and what is not wanted is subtracted.
        """
        for query in queries:
            if not query.text and query.image is None and not query.id:
                negatives = "; it has only what is not wanted" if query.list_texts() else ""
                raise ValueError(
                    f"there is nothing to search for{negatives}: give a text, an image or an id"
                )
        texts = list(dict.fromkeys(text for query in queries for text in query.list_texts()))
        images = [image for query in queries for image in query.list_images()]
        text_vectors = dict(zip(texts, self._encode_texts(texts, modality), strict=True))
        image_vectors = iter(self._encode_images(images, modality))
        vectors = []
        for query in queries:
            parts = []
            if query.text:
                parts.append((query.text_weight, text_vectors[query.text]))
            if query.image is not None:
                parts.append((query.image_weight, next(image_vectors)))
            if query.id:
                parts.append((1.0, self.store.get_vectors([query.id], modality)[0]))
            for text in query.negative_text:
                parts.append((-query.negative_weight, text_vectors[text]))
            parts += [(-query.negative_weight, next(image_vectors)) for _ in query.negative_image]
            vectors.append(_combine(parts))
        return np.stack(vectors)

    def _encode_texts(self, texts: list[str], modality: str) -> np.ndarray:
        """Returns the vectors of texts [T, D]."""
        if not texts:
            return np.empty((0, self.store.dim), np.float32)
        self.check_space("text", modality)
        self.check_texts(texts)
        return self.predictor.embed(texts=texts)["text"]

    def _encode_images(self, images: list[ImageInput], modality: str) -> np.ndarray:
        if not images:
            return np.empty((0, self.store.dim), np.float32)
        self.check_space("image", modality)
        opened = [
            read_image(str(image)) if isinstance(image, str | Path) else image for image in images
        ]
        return self.predictor.embed(images=opened)["image"]

    def check_space(self, query_modality: str, modality: str) -> None:
        """Raises ValueError where vectors of the two modalities do not lie in one space."""
        task = self.store.fingerprint.get("task", "retrieval")
        if task == "backbone" and query_modality != modality:
            raise ValueError(
                f"{self.store.uri} was made by weights of {task}, whose texts and images do not "
                f"lie in one space: embed with weights of retrieval, or search by {modality}"
            )

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raises ValueError for a text longer than the weights read, where that is refused."""
        for text in texts if self.refuse_long_texts else ():
            num_ids = len(self.predictor.task.tokenizer.encode(text))
            if num_ids > self.predictor.task.config.text_length:
                raise ValueError(
                    f"the text {text[:40]!r}... has {num_ids} token ids and the weights read "
                    f"{self.predictor.task.config.text_length}: shorten it"
                )

    def count_long_texts(self, texts: Sequence[str]) -> int:
        """Returns how many texts are longer than the weights read."""
        if not texts:
            return 0
        task = self.predictor.task
        return sum(len(task.tokenizer.encode(text)) > task.config.text_length for text in texts)

    def locate_image(self, metadata: dict[str, Any]) -> str:
        """Returns where the image of a row lies now; "" where the row names none."""
        path = metadata.get("image_path") or ""
        return str(Path(self.image_root, path)) if path else ""


def read_filter(where: str | Filter | None) -> Filter | None:
    """Returns a condition as a filter; None for an empty text."""
    if isinstance(where, str):
        return parse_filter(where) if where else None
    return where


def check_count(k: int, offset: int) -> None:
    """Raises ValueError unless k is positive and the offset is not negative."""
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least 1 result")
    if offset < 0:
        raise ValueError(f"offset is {offset}: it is the number of results to pass over, from 0")


def check_column(store: Store, name: str) -> None:
    """Raises ValueError where the index has no such column."""
    if name not in store.columns:
        columns = list(store.columns)
        raise ValueError(
            f"{store.uri} has no column {name!r}{suggest(name, columns)}; its columns are "
            f"{', '.join(columns)}"
        )


def _choose_groups(groups: Sequence[Any], wanted: int) -> list[int]:
    """Returns the indices of the first row of each group, at most `wanted`.

    Rows whose group is None are groups of their own.
    """
    chosen: list[int] = []
    seen: set[Any] = set()
    for index, group in enumerate(groups):
        if group is None or group not in seen:
            chosen.append(index)
        if group is not None:
            seen.add(group)
        if len(chosen) == wanted:
            break
    return chosen


def _leave_out(ids: list[str], scores: np.ndarray, own_id: str) -> tuple[list[str], np.ndarray]:
    """Returns hits without the row `own_id`."""
    if not own_id or own_id not in ids:
        return ids, scores
    index = ids.index(own_id)
    return ids[:index] + ids[index + 1 :], np.delete(scores, index)


def _combine(parts: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """Returns the unit vector of a weighted sum of unit vectors."""
    weight, vector = parts[0]
    if len(parts) > 1 or weight != 1:
        vector = sum((weight * vector for weight, vector in parts), np.zeros_like(vector))
    length = float(np.linalg.norm(vector))
    if not length > 1e-6:
        raise ValueError(
            "the parts of the query cancel out: nothing is left to search for; give other weights"
        )
    is_unit = abs(length - 1) <= MAX_UNIT_ERROR and len(parts) == 1
    return vector if is_unit else (vector / length).astype(np.float32)


def _name_image(image: ImageInput) -> str:
    return Path(image).name if isinstance(image, str | Path) else "an image"


def rerank_results(
    results: Sequence[Result],
    reranker: "Reranker",
    query: Query,
    locate_image: Callable[[dict[str, Any]], str],
    *,
    modality: str = "image",
    weight: float | None = None,
) -> list[Result]:
    """Sorts results of one query anew by the network that reads text and image together.

    Args:
        results: What the search found.
        reranker: As `load_reranker` returns it.
        query: The query: a text where images were searched, an image where texts were.
        locate_image: Returns the file of a row's image.
        modality: What was searched.
        weight: Factor of the fused scores, see `beit3.search.rerank.rerank`.

    Raises:
        ValueError: The query or a row lacks what the reranker reads, or an image cannot be read.
    """
    from beit3.search.rerank import rerank

    if not results:
        return []
    texts: list[str]
    images: list[Any]
    if modality == "image":
        if not query.text:
            raise ValueError("re-ranking reads images with words: give the query a text")
        texts = [query.text] * len(results)
        images = [locate_image(result.metadata) for result in results]
    else:
        if query.image is None:
            raise ValueError("re-ranking reads texts with an image: give the query an image")
        texts = [str(result.metadata.get("caption") or "") for result in results]
        images = [query.image] * len(results)
    for result, text, image in zip(results, texts, images, strict=True):
        if not text or image in ("", None):
            lacking = "image_path" if text else "caption"
            raise ValueError(f"row {result.id} has no {lacking}, which re-ranking reads")
    reranked = rerank(reranker, texts, images, [result.score for result in results], weight=weight)
    return [
        replace(
            results[index],
            rank=rank,
            score=float(reranked.scores[index]),
            search_score=results[index].score,
        )
        for rank, index in enumerate(reranked.order.tolist(), 1)
    ]
