"""Files of queries, dumps of their scores, and recall where the queries say what is relevant."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beit3.data.prepare.formats.delimited import open_table
from beit3.files import atomic_write, read_json_lines, read_lines
from beit3.progress import Advance
from beit3.search.filters import parse_filter
from beit3.search.query import Query, Result, Searcher, rerank_results

if TYPE_CHECKING:
    from beit3.search.rerank import Reranker

TEXT_COLUMNS = ("text", "caption", "query")
RECALLS = (1, 5, 10)
MAX_BATCH_SCORES = 1_000_000
"""Scores that are in memory at once: about 100 MB with their ids."""
MAX_BATCH_QUERIES = 256

SCHEMA = pa.schema(
    [("query", pa.string()), ("id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())]
)
"""Columns of a dump, a row for each query and row of the index."""


@dataclass(frozen=True)
class ListedQuery:
    """A query of a file."""

    id: str
    query: Query
    location: str
    """File and line, for messages."""
    relevant: frozenset[str] = frozenset()
    """Ids of the rows that answer it."""
    relevant_image: str = ""
    """The image whose rows answer it, where the query comes from a record."""


@dataclass(frozen=True)
class Dump:
    """What `dump_scores` did."""

    num_queries: int
    num_scores: int
    recall: dict[str, float]
    """`recall@1`, `recall@5`, `recall@10`: fraction of the queries with a relevant row among the
    best k; empty where no query says what is relevant."""
    num_with_relevant: int
    num_long_texts: int
    """Texts of which the weights read only the beginning."""


# Files of queries -----------------------------------------------------------------------------


def read_queries(path: str | Path, *, modality: str = "image") -> list[ListedQuery]:
    """Reads the queries of a file.

    A .txt file has a text per line. Rows of .csv, .tsv, .jsonl or .parquet have `text` (or
    `caption`, `query`), `image` (relative to the file), or both, and may have `id` and `relevant`,
    an id or a list of ids (in .csv and .tsv as JSON). A record of retrieval (`image` and
    `captions`) makes a query of every caption, whose answer is the image; where texts are searched
    it makes a query of the image, whose answers are its captions.

    Args:
        path: The file.
        modality: `image` or `text`: what is searched.

    Raises:
        ValueError: The file cannot be read, is empty, or a row has neither text nor image.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no queries at {path}: give a .txt, .csv, .tsv, .jsonl or .parquet file")
    queries: list[ListedQuery] = []
    for number, (location, row) in enumerate(_read_rows(path)):
        captions = row.get("captions")
        if isinstance(captions, list | tuple | np.ndarray) and row.get("image"):
            queries += _make_record_queries(path, location, row, str(number), modality)
        else:
            queries.append(_make_query(path, location, row, str(number)))
    if not queries:
        raise ValueError(f"{path} holds no queries: write one a line")
    if len({bool(listed.relevant_image) for listed in queries}) > 1:
        raise ValueError(f"{path} mixes records of retrieval with other rows: write one kind")
    seen: set[str] = set()
    for listed in queries:
        if listed.id in seen:
            raise ValueError(
                f"{listed.location}: a second query has the id {listed.id!r}: rename it"
            )
        seen.add(listed.id)
    return queries


def _read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (location, row) of a file of queries."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                yield f"{path} line {number}", {"text": line.strip()}
    elif suffix in (".csv", ".tsv"):
        table = open_table(path)
        for number, cells in table.rows:
            if len(cells) != len(table.columns):
                raise ValueError(
                    f"{path} line {number} has {len(cells)} cells for {len(table.columns)} columns"
                )
            yield f"{path} line {number}", dict(zip(table.columns, cells, strict=True))
    elif suffix == ".jsonl":
        for location, row in read_json_lines(path):
            if not isinstance(row, dict):
                raise ValueError(f"{location} holds a {type(row).__name__}: write an object a line")
            yield location, row
    elif suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as parquet: {error}") from None
        for number, row in enumerate(rows):
            yield f"{path} row {number}", row
    else:
        raise ValueError(
            f"{path}: queries are read from .txt, .csv, .tsv, .jsonl and .parquet, not {suffix!r}"
        )


def _make_query(path: Path, location: str, row: Mapping[str, Any], number: str) -> ListedQuery:
    """Returns the query of a row."""
    text = next((row[name] for name in TEXT_COLUMNS if row.get(name)), "")
    image = row.get("image") or ""
    if not isinstance(text, str) or not isinstance(image, str) or not (text or image):
        raise ValueError(
            f"{location} has no query: name a text or an image in columns {TEXT_COLUMNS[0]}, image"
        )
    query = Query(text=text, image=_locate_image(path, image) if image else None)
    id = row.get("id")
    return ListedQuery(
        number if id in (None, "") else str(id),
        query,
        location,
        frozenset(_parse_relevant(row.get("relevant"), location)),
    )


def _parse_relevant(value: Any, location: str) -> list[str]:
    """Returns the ids of a cell: one, a list, or a list as JSON."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f'{location}: relevant {value!r:.60} is no JSON list: write ["a", "b"]'
            ) from None
    return [str(id) for id in value] if isinstance(value, list | tuple) else [str(value)]


def _make_record_queries(
    path: Path, location: str, row: Mapping[str, Any], number: str, modality: str
) -> list[ListedQuery]:
    """Returns the queries of a record of retrieval."""
    id, image = str(row.get("id", number)), _locate_image(path, str(row["image"]))
    if modality == "text":
        return [ListedQuery(id, Query(image=image), location, relevant_image=image)]
    return [
        ListedQuery(f"{id}#{index}", Query(text=str(caption)), location, relevant_image=image)
        for index, caption in enumerate(row["captions"])
    ]


def _locate_image(path: Path, image: str) -> str:
    """Returns where an image lies: beside the file, or below the root of the records.

    Records are in root/task/source/split.jsonl, and their paths begin at the root.
    """
    places = [path.parent / image, *(parent / image for parent in path.absolute().parents[2:3])]
    return str(next((place for place in places if place.exists()), places[0]))


# Dumping --------------------------------------------------------------------------------------


def dump_scores(
    searcher: Searcher,
    queries: Sequence[ListedQuery],
    out: str | Path | None = None,
    *,
    k: int = 0,
    where: str = "",
    group_by: str = "",
    modality: str = "image",
    reranker: "Reranker | None" = None,
    rerank_k: int = 50,
    progress: Advance | None = None,
) -> Dump:
    """Searches for every query, writes the scores, and computes recall.

    The file is parquet with the columns query, id, rank and score, the best first within each
    query. It is written under another name and moved to `out` when it is complete.

    Args:
        searcher: The index. Texts longer than the weights read are cut where it allows that
            (`refuse_long_texts=False`).
        queries: What to search for.
        out: The parquet file; None writes none.
        k: Rows of each query; 0 = all rows of the index.
        where: Condition on the metadata.
        group_by: Column of which each value counts once, as for `Searcher.search`.
        modality: `image` or `text`: the vectors to search.
        reranker: Sorts the best `rerank_k` rows of each query anew; only these are written.
        rerank_k: How many rows are re-ranked.
        progress: Receives (queries done, queries).

    Raises:
        ValueError: A query cannot be encoded, or names as relevant what the index does not have.
    """
    if out is not None and Path(out).suffix.lower() != ".parquet":
        raise ValueError(f"{out}: scores are written as .parquet")
    if k < 0:
        raise ValueError(f"k is {k}: give a number of rows, or 0 for all")
    num_rows = searcher.store.num_rows
    num_wanted = k or max(1, num_rows)
    num_searched = max(num_wanted, max(RECALLS)) if reranker is None else rerank_k
    queries, image_order = resolve_relevant(searcher, queries)
    texts = [listed.query.text for listed in queries if listed.query.text]
    searcher.check_texts(texts)
    ranks: list[int] = []
    num_scores = 0
    num_hits = max(1, min(num_searched, searcher.store.num_rows))
    batch_size = max(1, min(MAX_BATCH_QUERIES, MAX_BATCH_SCORES // num_hits))
    with _open_dump(out) as writer:
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            all_hits = _search_past_ties(
                searcher,
                [listed.query for listed in batch],
                num_searched,
                need_ties=bool(image_order) and reranker is None,
                where=where,
                group_by=group_by,
                modality=modality,
            )
            for listed, (ids, scores) in zip(batch, all_hits, strict=True):
                if reranker is not None:
                    ids, scores = _rerank(searcher, reranker, listed.query, ids, scores, modality)
                num_scores += len(ids[:num_wanted])
                writer.write(listed.id, ids[:num_wanted], scores[:num_wanted])
                if listed.relevant:
                    ranks.append(find_rank(ids, scores, listed.relevant, image_order))
            if progress is not None:
                progress(start + len(batch), len(queries))
    recall = {f"recall@{k}": float(np.mean(np.array(ranks) < k)) for k in RECALLS if ranks}
    return Dump(len(queries), num_scores, recall, len(ranks), searcher.count_long_texts(texts))


def _search_past_ties(
    searcher: Searcher, queries: Sequence[Query], k: int, *, need_ties: bool, **options: Any
) -> list[tuple[list[str], np.ndarray]]:
    """Returns hits (ids, scores) of queries.

    With `need_ties` there are enough hits to contain all that score the same as the last rank that
    recall counts.
    """
    num_rows = searcher.store.num_rows
    k += max(RECALLS) if need_ties else 0
    while True:
        all_hits = searcher.find_hits(queries, k=k, **options)
        if not need_ties or k >= num_rows or not any(_ends_in_tie(hits[1]) for hits in all_hits):
            return all_hits
        k *= 4


def _ends_in_tie(scores: np.ndarray) -> bool:
    return len(scores) > max(RECALLS) and scores[-1] == scores[max(RECALLS) - 1]


def find_rank(
    ids: Sequence[str],
    scores: np.ndarray,
    relevant: frozenset[str],
    image_order: Mapping[str, int] | None = None,
) -> int:
    """Returns the rank, from 0, of the best relevant row; the number of hits where there is none.

    Args:
        ids: The hits of a query, the best first.
        scores: Their scores.
        relevant: Ids of the rows that answer the query.
        image_order: Position of each row's image among the records. With it, of equal scores those
            of the earlier records come first, as in `beit3 eval`; else the hits' own order counts.
    """
    best = next((rank for rank, id in enumerate(ids) if id in relevant), None)
    if best is None or not image_order:
        return len(ids) + max(RECALLS) if best is None else best
    own_position = image_order[ids[best]]
    num_better = int((scores > scores[best]).sum())
    tied = [id for id, score in zip(ids, scores, strict=True) if score == scores[best]]
    last = len(image_order)
    return num_better + sum(
        id not in relevant and image_order.get(id, last) < own_position for id in tied
    )


def _rerank(
    searcher: Searcher,
    reranker: "Reranker",
    query: Query,
    ids: list[str],
    scores: np.ndarray,
    modality: str,
) -> tuple[list[str], np.ndarray]:
    """Returns the hits of a query in the order of the network that reads text and image."""
    rows = searcher.store.fetch(ids) if ids else []
    results = [
        Result(rank, id, float(score), row)
        for rank, (id, score, row) in enumerate(zip(ids, scores, rows, strict=True), 1)
    ]
    reranked = rerank_results(results, reranker, query, searcher.locate_image, modality=modality)
    return (
        [result.id for result in reranked],
        np.array([result.score for result in reranked], np.float32),
    )


def _find_rank(ids: Sequence[str], relevant: frozenset[str]) -> int:
    """Returns the rank, from 0, of the best relevant row; the number of hits if none is there."""
    return next((rank for rank, id in enumerate(ids) if id in relevant), max(RECALLS))


class _DumpWriter:
    """Collects the scores of a batch of queries and writes them as one row group."""

    def __init__(self, writer: pq.ParquetWriter | None) -> None:
        self.writer = writer
        self.tables: list[pa.Table] = []
        self.num_rows = 0

    def write(self, query_id: str, ids: Sequence[str], scores: np.ndarray) -> None:
        if self.writer is None:
            return
        columns = [
            pa.array([query_id] * len(ids), pa.string()),
            pa.array(ids, pa.string()),
            pa.array(np.arange(1, len(ids) + 1), pa.int32()),
            pa.array(np.asarray(scores, np.float32), pa.float32()),
        ]
        self.tables.append(pa.table(columns, schema=SCHEMA))
        self.num_rows += len(ids)
        if self.num_rows >= MAX_BATCH_SCORES:
            self.flush()

    def flush(self) -> None:
        if self.writer is not None and self.tables:
            self.writer.write_table(pa.concat_tables(self.tables))
        self.tables, self.num_rows = [], 0


@contextmanager
def _open_dump(out: str | Path | None) -> Iterator[_DumpWriter]:
    """Yields a writer of `out`, which appears when the block ends without an error."""
    if out is None:
        yield _DumpWriter(None)
        return
    with atomic_write(Path(out)) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        dump = _DumpWriter(writer)
        yield dump
        dump.flush()


# What is relevant -----------------------------------------------------------------------------


def resolve_relevant(
    searcher: Searcher, queries: Iterable[ListedQuery]
) -> tuple[list[ListedQuery], dict[str, int]]:
    """Finds the rows that answer queries.

    Returns:
        The queries with the ids of their relevant rows; and, where they come from records, the
        position of each row's image among the records.

    Raises:
        ValueError: The index lacks a relevant id or image, which could never be found.
    """
    queries = list(queries)
    _check_ids(searcher, queries)
    if not any(listed.relevant_image for listed in queries):
        return queries, {}
    store = searcher.store
    ids_by_image: dict[str, list[str]] = {}
    all_ids = store.select_ids(parse_filter("id is not null"))
    for id, row in zip(all_ids, store.fetch(all_ids, ["image_path"]), strict=True):
        ids_by_image.setdefault(os.path.realpath(searcher.locate_image(row)), []).append(id)
    resolved: list[ListedQuery] = []
    positions: dict[str, int] = {}
    for listed in queries:
        image = os.path.realpath(listed.relevant_image)
        if image not in ids_by_image:
            raise ValueError(
                f"{listed.location}: the image {listed.relevant_image} is not in {store.uri}: "
                "embed it, or move the index's root (--image-root)"
            )
        positions.setdefault(image, len(positions))
        resolved.append(replace(listed, relevant=frozenset(ids_by_image[image])))
    image_order = {id: positions[image] for image in positions for id in ids_by_image[image]}
    return resolved, image_order


def _check_ids(searcher: Searcher, queries: Iterable[ListedQuery]) -> None:
    """Raises ValueError where a query names as relevant an id that the index does not have."""
    locations = {id: listed.location for listed in queries for id in listed.relevant}
    try:
        if locations:
            searcher.store.fetch(list(locations), ["id"])
    except ValueError as error:
        location = next((place for id, place in locations.items() if repr(id) in str(error)), "")
        raise ValueError(f"{location}: relevant: {error}") from None
