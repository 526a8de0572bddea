"""Searches several indexes together, each with its own weights, and joins their rows by id."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from beit3.search.filters import Filter
from beit3.search.query import Query, Result, Searcher, check_count

Method = Literal["rank", "score"]

RANK_OFFSET = 60
"""Constant of reciprocal rank fusion (Cormack et al., 2009)."""

CANDIDATES = 1000
"""Best rows of each index that take part in the fusion."""


class FusedSearcher:
    """Searches several indexes together.

    The same `candidates` rows of each index take part whatever page is asked for, so that pages do
    not overlap.

    Args:
        searchers: The indexes.
        method: `rank` adds weight / (60 + rank) of each index. `score` adds weight times the
            score, which is 1 for the index's best candidate and 0 for its last one. A row that is
            not among an index's candidates gets nothing from it.
        weights: Weight of each index; by default 1.
        candidates: Best rows of each index that take part.

    Raises:
        ValueError: The numbers of weights and indexes differ, a weight is negative, or all are 0.
    """

    def __init__(
        self,
        searchers: Sequence[Searcher],
        *,
        method: Method = "rank",
        weights: Sequence[float] = (),
        candidates: int = CANDIDATES,
    ) -> None:
        self.searchers = list(searchers)
        self.method = method
        self.weights = list(weights) or [1.0] * len(self.searchers)
        self.candidates = candidates
        self._owners: dict[str, Searcher] = {}
        if len(self.weights) != len(self.searchers):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.searchers)} indexes: give one for each"
            )
        if min(self.weights) < 0 or not any(self.weights):
            raise ValueError(
                f"weights {self.weights}: they must not be negative, nor all of them 0"
            )
        if method not in ("rank", "score"):
            raise ValueError(f"method {method!r} is neither rank nor score")

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
        """Returns the best rows of all indexes together. Arguments as for `Searcher.search`.

        Metadata are those of the first index that has the row.

        Raises:
            ValueError: As `Searcher.search`, or the page lies beyond the candidates.
        """
        check_count(k, offset)
        if k + offset > self.candidates:
            raise ValueError(
                f"k {k} at offset {offset} is beyond the {self.candidates} candidates of each "
                "index: ask for fewer results or more candidates"
            )
        all_ids = []
        totals: dict[str, float] = {}
        for searcher, weight in zip(self.searchers, self.weights, strict=True):
            # Each index checks the column, so that the message names the index.
            searcher.check_request(k, offset, group_by, modality)
            ids, scores = searcher.find_hits(
                [query], k=self.candidates, where=where, modality=modality
            )[0]
            all_ids.append(ids)
            for id, part in zip(ids, self._score(scores), strict=True):
                totals[id] = totals.get(id, 0.0) + weight * float(part)
        # Rows of equal score stay in the order of the indexes.
        ranking = sorted(totals, key=totals.__getitem__, reverse=True)
        wanted = k + offset
        if group_by:
            ranking = self._choose_groups(ranking, all_ids, wanted, group_by)
        page = ranking[offset:wanted]
        rows = self._fetch(page, all_ids)
        self._owners = {
            id: searcher
            for searcher, ids in reversed(list(zip(self.searchers, all_ids, strict=True)))
            for id in ids
        }
        return [
            Result(offset + index + 1, id, totals[id], rows[id]) for index, id in enumerate(page)
        ]

    def locate_image(self, metadata: dict[str, Any]) -> str:
        """Returns where the image of a row of the last search lies.

        Its path is relative to the root of the index from which its metadata come.
        """
        searcher = self._owners.get(metadata.get("id", ""), self.searchers[0])
        return searcher.locate_image(metadata)

    def _score(self, scores: np.ndarray) -> np.ndarray:
        """Returns what an index adds for each of its hits, which are sorted by score."""
        if self.method == "rank":
            return 1 / (RANK_OFFSET + 1 + np.arange(len(scores)))
        if not len(scores):
            return scores
        scores = scores.astype(np.float64)
        span = scores[0] - scores[-1]
        return (scores - scores[-1]) / span if span > 0 else np.ones_like(scores)

    def _choose_groups(
        self, ranking: list[str], all_ids: list[list[str]], wanted: int, group_by: str
    ) -> list[str]:
        """Returns the best row of each group; rows without a value are groups of their own."""
        rows = self._fetch(ranking, all_ids, [group_by])
        chosen: list[str] = []
        seen: set[Any] = set()
        for id in ranking:
            value = rows[id][group_by]
            if value is None or value not in seen:
                chosen.append(id)
            if value is not None:
                seen.add(value)
        return chosen[:wanted]

    def _fetch(
        self, ids: list[str], all_ids: list[list[str]], columns: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Returns the metadata of rows, each from the first index that has it among its hits."""
        rows: dict[str, dict[str, Any]] = {}
        for searcher, own_ids in zip(self.searchers, all_ids, strict=True):
            own = set(own_ids)
            missing = [id for id in ids if id in own and id not in rows]
            if missing:
                rows |= zip(missing, searcher.store.fetch(missing, columns), strict=True)
        return rows
