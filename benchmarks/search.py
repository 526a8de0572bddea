"""Search over synthetic vectors: exact, FAISS, Milvus Lite; 100,000 and 1,000,000 rows, on CPU.

    pip install 'beit3[faiss,milvus]'
    python benchmarks/search.py FOLDER --json benchmarks/search.json

Vectors are float16 of 768 dimensions in clusters, as those of images are: no approximate index can
serve uniform noise. Queries are other vectors of the same clusters; far queries are those mixed
with noise to a cosine of 0.3, as a text and a picture have it. Each store is measured in a process
of its own, so that its peak memory is its own; before every search of all queries the memory-mapped
vectors are read once, which is the time that exact search is held against. A million rows are not
copied to Milvus Lite, which takes 22 minutes and then 11 GB of memory, unless `--stores` asks for
it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from probe import measure_product_rate, read_peak_memory, save_results, seconds

from beit3.search.folder import open_folder, write_shard
from beit3.search.manifest import MANIFEST, Manifest, Shard, write_manifest
from beit3.search.stores.faiss import build_faiss_index
from beit3.search.stores.passes import share_memory
from beit3.search.stores.store import Store
from beit3.search.stores.uri import open_store

DIM, SHARD_ROWS, NUM_QUERIES, K = 768, 50_000, 64, 10
ROWS_PER_CLUSTER = 200
NOISE = 0.7
"""Length of what sets a vector apart from its cluster's center, which has the length 1."""
SIZES = (100_000, 1_000_000)
STORES = ("exact", "faiss", "milvus")
MILVUS_ROWS = 100_000
FAR_COSINE = 0.3
READ_BYTES = 1 << 24


# Vectors ------------------------------------------------------------------------------------------


def make_vectors(num_rows: int, num_clusters: int, seed: int) -> np.ndarray:
    """Makes unit vectors [num_rows, DIM] around centers that do not depend on `seed`."""
    centers = _make_unit_vectors(num_clusters, 0)
    cluster_of_row = np.random.default_rng(seed).integers(num_clusters, size=num_rows)
    vectors = centers[cluster_of_row] + NOISE * _make_unit_vectors(num_rows, seed + 1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _make_unit_vectors(number: int, seed: int) -> np.ndarray:
    """Draws vectors [number, DIM] of length 1, evenly over all directions."""
    vectors = np.random.default_rng(seed).standard_normal((number, DIM), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_far_queries(queries: np.ndarray) -> np.ndarray:
    """Mixes queries with noise, far from which their neighbors are."""
    noise = _make_unit_vectors(len(queries), 7)
    return FAR_COSINE * queries + np.sqrt(1 - FAR_COSINE**2, dtype=np.float32) * noise


def write_folder(folder: Path, num_rows: int) -> None:
    """Writes a folder of vectors, unless it is there."""
    if (folder / MANIFEST).exists():
        return
    shards: list[Shard] = []
    for number, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        rows = range(start, min(num_rows, start + SHARD_ROWS))
        vectors = make_vectors(len(rows), num_rows // ROWS_PER_CLUSTER, seed=2 * number + 1)
        metadata = pa.table(
            {"id": [f"{row:07d}" for row in rows], "year": [1990 + row % 35 for row in rows]}
        )
        shards.append(write_shard(folder, number, {"image": vectors}, metadata))
    write_manifest(folder, Manifest(dim=DIM, shards=tuple(shards)))


# Measuring ----------------------------------------------------------------------------------------


def measure_store(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Builds and searches one store; returns times in seconds and memory in bytes."""
    manifest = open_folder(folder).manifest
    uri = str(folder.with_name(f"{folder.name}.db")) if kind == "milvus" else str(folder)
    figures: dict[str, Any] = {"rows": manifest.num_rows, "store": kind, "build": 0.0}
    if kind == "faiss":
        figures["build"] = seconds(lambda: build_faiss_index(folder))
    if kind == "milvus" and not Path(uri).exists():
        # In a process of its own: the file is open in one process at a time.
        copy = [sys.executable, "-m", "beit3", "index", str(folder), "--to", uri]
        figures["build"] = seconds(lambda: subprocess.run(copy, check=True, capture_output=True))
    figures["build_memory"] = read_peak_memory()
    command = [sys.executable, __file__, str(folder), "--uri", uri, "--index", kind]
    answer = subprocess.run([*command, "--rounds", str(rounds)], check=True, capture_output=True)
    return figures | json.loads(answer.stdout.splitlines()[-1])


def search_store(folder: Path, uri: str, kind: str, rounds: int) -> dict[str, Any]:
    """Searches one store in this process, interleaved with reading the vectors."""
    num_clusters = open_folder(folder).manifest.num_rows // ROWS_PER_CLUSTER
    queries = make_vectors(NUM_QUERIES, num_clusters, seed=1_000_001)
    far = make_far_queries(queries)
    store = open_store(uri, index="auto" if kind == "milvus" else kind)
    store.search(queries[:1], K)  # the first search opens files
    memory = read_peak_memory()
    read = make_reader(folder)
    searches = {
        "64 queries": queries,
        "64 far queries": far,
        "1 query": queries[:1],
        "1 far query": far[:1],
    }
    times: dict[str, list[float]] = {"read": [], **{name: [] for name in searches}}
    for _ in range(rounds):
        times["read"].append(seconds(read))
        for name, vectors in searches.items():
            times[name].append(seconds(partial(store.search, vectors, K)))
    return {
        "memory": memory,
        "recall": measure_recall(store, folder, queries),
        "far_recall": measure_recall(store, folder, far),
        "product_gflops": measure_product_rate() / 1e9,
        "times": times,
    }


def make_reader(folder: Path) -> Callable[[], None]:
    """Returns a function that reads all bytes of the vectors once, on all cores."""
    shards = [np.asarray(vectors).reshape(-1) for vectors in open_folder(folder).get_vectors()]

    def read() -> None:
        for shard in shards:
            words = share_memory(shard.view(np.int64))
            for part in words.split(READ_BYTES):
                part.sum()

    return read


def measure_recall(store: Store, folder: Path, queries: np.ndarray) -> float:
    """Returns the fraction of the exact best rows that the store finds."""
    exact = open_store(str(folder), index="exact").search(queries, K).ids
    ids = store.search(queries, K).ids
    num_hits = sum(len({*ours} & {*theirs}) for ours, theirs in zip(ids, exact, strict=True))
    return num_hits / (K * len(queries))


# Table --------------------------------------------------------------------------------------------


def format_table(results: list[dict[str, Any]]) -> str:
    """Formats one row a store and size; times are medians with their quartiles."""
    lines = [
        "| rows | store | build (s) | 64 queries (ms) | 64 far queries (ms) | 1 query (ms) | 1 far "
        "query (ms) | recall@10 | recall@10, far | 64 queries / reading the vectors once | peak "
        "memory (GB) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for figures in results:
        ratios = [
            search / read
            for search, read in zip(
                figures["times"]["64 queries"], figures["times"]["read"], strict=True
            )
        ]
        cells = [
            f"{figures['rows']:,}",
            figures["store"],
            f"{figures['build']:.0f}" if figures["build"] else "-",
            format_spread(figures["times"]["64 queries"], 1000),
            format_spread(figures["times"]["64 far queries"], 1000),
            format_spread(figures["times"]["1 query"], 1000, digits=1),
            format_spread(figures["times"]["1 far query"], 1000, digits=1),
            f"{figures['recall']:.3f}",
            f"{figures['far_recall']:.3f}",
            format_spread(ratios, 1, digits=2),
            f"{figures['memory'] / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_spread(values: list[float], factor: float, digits: int = 0) -> str:
    """Formats the median and the quartiles of values."""
    low, middle, high = (factor * value for value in statistics.quantiles(values, n=4))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where vectors are written and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=SIZES)
    parser.add_argument("--stores", nargs="*", choices=STORES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--index", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.uri:
        print(json.dumps(search_store(options.folder, options.uri, options.index, options.rounds)))
        return
    results = []
    for num_rows in options.rows:
        folder = options.folder / f"vectors_{num_rows}"
        write_folder(folder, num_rows)
        small = num_rows <= MILVUS_ROWS
        for kind in options.stores or (STORES if small else ("exact", "faiss")):
            # Searching is measured in a process of its own, building in another.
            results.append(measure_store(folder, kind, options.rounds))
            print(format_table(results[-1:]).splitlines()[-1], flush=True)
    table = format_table(results)
    print(table)
    if options.json:
        save_results(options.json, table, results)


if __name__ == "__main__":
    main()
