"""`beit3 search`: from words, images and ids to rows of an index."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from beit3.cli.embed import make_load_options
from beit3.cli.options import NOT_RELEASED, Amount, Count, ReleasedOptions, Size, Word

if TYPE_CHECKING:
    from beit3.search.fusion import FusedSearcher
    from beit3.search.query import Query, Result, Searcher
    from beit3.search.sequence import SequenceResult

OUT_SUFFIXES = (".json", ".csv", ".html")


@dataclass(frozen=True)
class Output:
    """Where results go, and what a contact sheet says above them.

    Raises ValueError for a file that is written in no known form.
    """

    path: str
    """A .json, .csv or .html file; "" prints them."""
    as_json: bool
    """Whether a terminal is given JSON too."""
    lead: str

    def __post_init__(self) -> None:
        if self.path and self.suffix not in OUT_SUFFIXES:
            raise ValueError(f"--out {self.path}: results are written as {', '.join(OUT_SUFFIXES)}")

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix.lower()

    @property
    def prints_table(self) -> bool:
        """Whether results become a table on a terminal."""
        return not self.path and not self.as_json and sys.stdout.isatty()


def search(
    uri: str,
    text: Word = "",
    /,
    *,
    image: str = "",
    id: str = "",
    not_: Annotated[list[str], Parameter(name="--not")] = [],  # noqa: B006
    not_image: list[str] = [],  # noqa: B006
    where: str = "",
    k: Annotated[Count | None, Parameter(name=("-k", "--k"))] = None,
    offset: Size = 0,
    group_by: str = "",
    in_: Annotated[Literal["image", "text"], Parameter(name="--in")] = "image",
    weights: str = "",
    image_root: str = "",
    text_weight: Amount = 1.0,
    image_weight: Amount = 1.0,
    not_weight: Amount = 0.5,
    rerank: str = "",
    rerank_k: Count = 50,
    fuse: list[str] = [],  # noqa: B006
    fuse_by: Literal["rank", "score"] = "rank",
    fuse_weights: str = "",
    then: list[str] = [],  # noqa: B006
    within: Amount = 30.0,
    video_column: str = "video",
    time_column: str = "time",
    queries: str = "",
    scores: str = "",
    index: Literal["auto", "exact", "faiss"] = "auto",
    json: bool = False,
    out: str = "",
    released: ReleasedOptions = NOT_RELEASED,
) -> None:
    """Search an index by words, by an image, by both, or by one of its rows.

    ```
    beit3 search vectors "a dog in the snow" -k 20 --where "year >= 2019"
    beit3 search vectors --image query.jpg --not "people" --out hits.html
    beit3 search vectors "a man opens a door" --then "a dog runs out" --within 30
    beit3 search vectors --queries queries.csv --scores scores.parquet
    ```

    Prints a table on a terminal and JSON elsewhere. docs/search.md explains queries and filters.

    Args:
        uri: A folder of vectors, a Milvus Lite file, or http:// of a Milvus server.
        text: What to look for.
        image: An image to look for, alone or together with words.
        id: A row of the index, whose neighbors to look for.
        not_: Words for what not to find; may be repeated.
        not_image: An image of what not to find; may be repeated.
        where: Condition on the metadata, such as "year >= 2019 and city in ('Hue', 'Hanoi')".
        k: Results, or groups, or videos; 10 by default. Of --queries the rows of each query; all
            by default.
        offset: Results to pass over.
        group_by: Column of which each value is shown once, by its best row.
        in_: Search the images' vectors, or those of their captions.
        weights: The weights, where those that the index names have moved.
        image_root: Where the images lie now.
        text_weight: Weight of the words beside the image.
        image_weight: Weight of the image beside the words.
        not_weight: Weight of what not to find.
        rerank: Weights that score the best results again, reading image and words together.
        rerank_k: How many are scored again.
        fuse: A further index, made by any weights, whose rows have the same ids; may be repeated.
        fuse_by: Add reciprocal ranks, or scores from 0 to 1.
        fuse_weights: Weight of each index, beginning with the first: 1,0.5.
        then: What happens next in the same video; may be repeated.
        within: Longest time from the first to the last step, in the unit of the time column.
        video_column: Column that names the video.
        time_column: Column of the frame's time.
        queries: File of many queries: .txt, .csv, .tsv, .jsonl or .parquet, or records of
            retrieval. Prints recall where they say what is relevant.
        scores: Write the scores of the queries to this .parquet file.
        index: Which index of a folder: its FAISS index where one is up to date, or exactly.
        json: Print JSON also on a terminal.
        out: Write the results to this .json, .csv or .html file (a contact sheet).
    """
    from beit3.search.query import Query

    check_combination(
        {
            "--queries": bool(queries),
            "--then": bool(then),
            "--fuse": bool(fuse),
            "a query": bool(text or image or id or not_ or not_image),
            "--rerank": bool(rerank),
            "--out": bool(out),
            "--offset": bool(offset),
            "--group-by": bool(group_by),
            "--in text": in_ == "text",
            "--scores": bool(scores),
            "--fuse-weights": bool(fuse_weights),
        }
    )
    query = Query(
        text=text,
        image=image or None,
        id=id,
        negative_text=tuple(not_),
        negative_image=tuple(not_image),
        text_weight=text_weight,
        image_weight=image_weight,
        negative_weight=not_weight,
    )
    uris = (uri, *fuse)
    output = Output(out, json, make_lead(uris, where))
    searchers = open_searchers(
        uris,
        index=index,
        weights=weights,
        image_root=image_root,
        refuse_long_texts=not queries,
        load_options=make_load_options(released),
    )
    rows: dict[str, Any] = {"where": where, "group_by": group_by, "modality": in_}
    reranking: dict[str, Any] = {"rerank": rerank, "rerank_k": rerank_k}
    page: dict[str, Any] = {"k": k or 10, "offset": offset}
    if queries:
        dump_queries(searchers[0], queries, scores, k=k or 0, **rows, **reranking)
    elif then:
        steps = [query, *(Query(text=step) for step in then)]
        columns = {"video_column": video_column, "time_column": time_column}
        videos = find_videos(searchers[0], steps, within=within, where=where, **columns, **page)
        names = [step.describe() for step in steps]
        write_videos(videos, names, output, searchers[0].locate_image)
    else:
        searcher = fuse_searchers(searchers, fuse_by, fuse_weights)
        results = find_results(searcher, query, **rows, **reranking, **page)
        write_results(results, query.describe(), output, searcher.locate_image)


EXCLUSIVE = {
    "--queries": (
        "a query",
        "--then",
        "--fuse",
        "--out",
        "--offset",
    ),
    "--then": ("--fuse", "--rerank", "--group-by", "--in text"),
}
"""Option -> options that have no meaning beside it."""

NEEDED = {"--scores": "--queries", "--fuse-weights": "--fuse"}
"""Option -> the option that it belongs to."""


def check_combination(is_given: dict[str, bool]) -> None:
    """Raises ValueError for options that have no meaning together."""
    for name, others in EXCLUSIVE.items():
        for other in others:
            if is_given[name] and is_given[other]:
                raise ValueError(f"{name} and {other} do not go together: leave one out")
    for name, other in NEEDED.items():
        if is_given[name] and not is_given[other]:
            raise ValueError(f"{name} belongs to {other}: give that too")


def read_weights(text: str, count: int) -> list[float]:
    """Reads "1,0.5", a weight for each of `count` indexes; "" gives all the weight 1."""
    try:
        weights = [float(word) for word in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise ValueError(f"--fuse-weights {text}: give numbers with commas between them") from None
    return weights


# Searching ----------------------------------------------------------------------------------------


def open_searchers(
    uris: Sequence[str], *, index: str, weights: str, **options: Any
) -> list["Searcher"]:
    """Opens indexes; `weights` replaces those that the first one names."""
    from beit3.recipe import RunConfig
    from beit3.search.query import Searcher
    from beit3.search.stores.uri import open_store
    from beit3.training.launch import init_device

    device = init_device(RunConfig())
    return [
        Searcher(
            open_store(uri, index=index),
            weights=weights if position == 0 else "",
            device=device,
            **options,
        )
        for position, uri in enumerate(uris)
    ]


def fuse_searchers(
    searchers: Sequence["Searcher"], method: Literal["rank", "score"], weights: str
) -> "Searcher | FusedSearcher":
    """Returns what searches all indexes together; the index itself where there is one."""
    from beit3.search.fusion import FusedSearcher

    if len(searchers) == 1:
        return searchers[0]
    return FusedSearcher(searchers, method=method, weights=read_weights(weights, len(searchers)))


def find_results(
    searcher: "Searcher | FusedSearcher",
    query: "Query",
    *,
    k: int,
    offset: int,
    where: str,
    group_by: str,
    modality: str,
    rerank: str,
    rerank_k: int,
) -> list["Result"]:
    """Searches, and re-ranks the best where weights for that are given."""
    from beit3.search.query import rerank_results
    from beit3.search.rerank import load_reranker

    if not rerank:
        return searcher.search(
            query, k=k, offset=offset, where=where, group_by=group_by, modality=modality
        )
    wanted = k + offset
    if wanted > rerank_k:
        raise ValueError(
            f"-k {k} and --offset {offset} are beyond --rerank-k {rerank_k}: re-rank more"
        )
    candidates = searcher.search(
        query, k=rerank_k, where=where, group_by=group_by, modality=modality
    )
    reranker = load_reranker(rerank)
    reranked = rerank_results(candidates, reranker, query, searcher.locate_image, modality=modality)
    return reranked[offset:wanted]


def find_videos(
    searcher: "Searcher", steps: Sequence["Query"], **options: Any
) -> list["SequenceResult"]:
    """Searches for a sequence, and says so where the answer may not be the best."""
    from beit3.search.sequence import search_sequence

    videos, is_exact = search_sequence(searcher, steps, **options)
    if not is_exact:
        print("beit3: more frames than were compared may hold better videos", file=sys.stderr)
    return videos


def dump_queries(
    searcher: "Searcher", queries: str, scores: str, *, modality: str, rerank: str, **options: Any
) -> None:
    """Searches for the queries of a file, writes their scores, and prints counts and recall."""
    from beit3.progress import show_progress
    from beit3.search.rerank import load_reranker
    from beit3.search.scores import dump_scores, read_queries

    listed = read_queries(queries, modality=modality)
    if not scores and not any(query.relevant or query.relevant_image for query in listed):
        raise ValueError(
            f"{queries} says of no query what is relevant, so there is no recall: write the "
            "scores (--scores scores.parquet)"
        )
    reranker = load_reranker(rerank) if rerank else None
    with show_progress("queries") as advance:
        dump = dump_scores(
            searcher,
            listed,
            scores or None,
            modality=modality,
            reranker=reranker,
            progress=advance,
            **options,
        )
    if dump.num_long_texts:
        print(
            f"beit3: {dump.num_long_texts} of the queries are longer than the weights read, and "
            "only their beginning was used",
            file=sys.stderr,
        )
    summary: dict[str, Any] = {"queries": dump.num_queries}
    if scores:
        summary["scores"] = dump.num_scores
    if dump.num_with_relevant not in (0, dump.num_queries):
        summary["with_relevant"] = dump.num_with_relevant
    print(json.dumps(summary | dump.recall, indent=1))


# Output -------------------------------------------------------------------------------------------


def make_lead(uris: Sequence[str], where: str) -> str:
    """Returns the line that says in which rows was searched."""
    indexes = ", ".join(uris)
    return f"{indexes} · where {where}" if where else indexes


def write_results(
    results: Sequence["Result"],
    title: str,
    output: Output,
    locate_image: Callable[[dict[str, Any]], str],
) -> None:
    """Writes results to a file, or prints them."""
    from beit3.search.sheet import write_sheet

    if output.suffix == ".html":
        path = Path(output.path)
        print(write_sheet(path, results, locate_image, title=title, lead=output.lead))
    else:
        write_rows([result.to_row() for result in results], output)


def write_videos(
    videos: Sequence["SequenceResult"],
    steps: Sequence[str],
    output: Output,
    locate_image: Callable[[dict[str, Any]], str],
) -> None:
    """Writes the videos of a sequence to a file, or prints them."""
    from beit3.search.sheet import write_sequence_sheet

    if output.suffix == ".html":
        path = Path(output.path)
        print(write_sequence_sheet(path, videos, locate_image, steps=steps, lead=output.lead))
        return
    rows = [video.to_row() for video in videos]
    if output.suffix == ".csv" or output.prints_table:
        # A table has a row for every frame.
        rows = [
            {name: row[name] for name in ("rank", "video", "score")}
            | {f"frame_{name}" if name in row else name: value for name, value in frame.items()}
            for row in rows
            for frame in row["frames"]
        ]
    write_rows(rows, output)


def write_rows(rows: Sequence[dict[str, Any]], output: Output) -> None:
    """Writes rows to a .json or .csv file; without one prints a table or JSON."""
    from beit3.files import write_text

    if output.path:
        is_csv = output.suffix == ".csv"
        write_text(output.path, format_csv(rows) if is_csv else format_json(rows) + "\n")
        print(output.path)
    elif output.prints_table:
        print_table(rows)
    else:
        print(format_json(rows))


def format_json(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as readable JSON."""
    return json.dumps(rows, indent=1, ensure_ascii=False)


def format_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as CSV; the columns of all of them, in the order in which they are named."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["rank", "id", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows as a table; columns without values, hashes and sizes are left out."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not rows:
        print("nothing was found")
        return
    names = dict.fromkeys(name for row in rows for name in row)
    hidden = {"hash", "width", "height"}
    if all(row.get("image_path") == row.get("id") for row in rows):
        hidden.add("image_path")
    columns = [
        name
        for name in names
        if name not in hidden and any(row.get(name) not in (None, "") for row in rows)
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        is_number = isinstance(rows[0].get(name), int | float)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(row.get(name)) for name in columns))
    Console(highlight=False, markup=False).print(table)


def format_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
