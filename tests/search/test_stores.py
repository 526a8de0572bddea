"""Exact search equals an obvious one, whatever the first pass, the chunks and the selection."""

import random

import numpy as np
import pyarrow as pa
import pytest
import torch

from beit3.search import sketch
from beit3.search.filters import parse_filter
from beit3.search.folder import write_shard
from beit3.search.manifest import Manifest, write_manifest
from beit3.search.sketch import rotate
from beit3.search.stores import passes, scan
from beit3.search.stores.uri import is_milvus_uri, open_store
from tests.search.filter_cases import make_filter, make_rows, make_table

DIM = 24


def make_vectors(number: int, seed: int = 0, *, equal: bool = True) -> np.ndarray:
    """Returns clustered unit vectors, some of them equal."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(8, DIM))
    vectors = centers[rng.integers(0, 8, number)] + 0.3 * rng.normal(size=(number, DIM))
    if equal:
        vectors[rng.integers(0, number, number // 10)] = vectors[0]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_folder(path, metadata: pa.Table, shards=1, *, dtype="float16", equal=True) -> None:
    """Writes a folder of image and text vectors."""
    images, texts = (make_vectors(metadata.num_rows, seed, equal=equal) for seed in range(2))
    listed = []
    for number, rows in enumerate(np.array_split(np.arange(metadata.num_rows), shards)):
        vectors = {"image": images[rows], "text": texts[rows]}
        listed.append(write_shard(path, number, vectors, metadata.take(rows), dtype=dtype))
    manifest = Manifest(
        dim=DIM, dtype=dtype, modalities=("image", "text"), shards=tuple(listed), weights="runs/x"
    )
    write_manifest(path, manifest)


class SlowSearch:
    """An obvious search of a store: all scores, sorted."""

    def __init__(self, store, queries, modality="image"):
        self.alive = store.folder.alive
        vectors = np.concatenate(store.folder.get_vectors(modality)).astype(np.float64)
        self.scores = (queries.astype(np.float64) @ vectors.T).astype(np.float32).tolist()
        self.metadata = store.folder.read_rows(np.arange(len(vectors))).to_pylist()

    def rank(self, query: int, k: int, *, keep=lambda row: True, offset=0):
        """Returns ids and scores of the best rows that are alive and kept."""
        scores = self.scores[query]
        rows = [i for i, row in enumerate(self.metadata) if self.alive[i] and keep(row)]
        ranked = sorted(rows, key=lambda row: (-scores[row], row))[offset : offset + k]
        return [self.metadata[row]["id"] for row in ranked], [scores[row] for row in ranked]


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes chunks, candidates and thresholds change often, and queries come in several passes."""
    monkeypatch.setattr(passes, "MAX_CHUNK_ROWS", 80)
    monkeypatch.setattr(passes, "COPIED_ROWS", 33)
    monkeypatch.setattr(passes.FloatPass, "chunk_rows", 37)
    monkeypatch.setattr(scan, "RUN_ROWS", 3)
    monkeypatch.setattr(scan, "BLOCK_ROWS", 16)
    monkeypatch.setattr(scan, "QUERY_ROWS", 3)
    monkeypatch.setattr(scan, "MAX_CANDIDATES", 20)
    monkeypatch.setattr(scan, "PENDING_PER_QUERY", 4)


@pytest.fixture(params=["int8", "float32", "bfloat16"])
def first_pass(request, monkeypatch):
    """Chooses the number format of the first pass."""
    monkeypatch.setattr(sketch, "MIN_ROWS", 1)
    monkeypatch.setattr(passes, "can_multiply_codes", lambda: request.param == "int8")
    dtype = torch.float32 if request.param == "int8" else getattr(torch, request.param)
    monkeypatch.setattr(passes, "choose_float_dtype", lambda *_: dtype)
    return request.param


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_exact_search_equals_a_loop(tmp_path, small_chunks, first_pass, stored):
    rng = random.Random(0)
    rows = make_rows(400, rng)
    make_folder(tmp_path, make_table(rows), shards=3, dtype=stored)
    store = open_store(str(tmp_path), read_only=False)
    store.delete([row["id"] for row in rng.sample(rows, 50)])
    queries = np.concatenate([make_vectors(5, seed=9), store.get_vectors(["row0001"])])
    queries[1] *= 7
    queries[2] = 0
    slow = SlowSearch(store, queries)
    for _ in range(8):
        text, evaluate = make_filter(rng)
        k, offset = rng.choice([1, 3, 10, 500]), rng.choice([0, 0, 2, 30])
        for where, keep in (
            (None, lambda row: True),
            (parse_filter(text), lambda row: evaluate(row) is True),  # noqa: B023
        ):
            hits = store.search(queries, k, where=where, offset=offset)
            for query, (ids, scores) in enumerate(zip(hits.ids, hits.scores, strict=True)):
                expected = slow.rank(query, k, keep=keep, offset=offset)
                assert (ids, scores.tolist()) == expected


def make_hard_vectors(kind: str, number: int, dim: int) -> np.ndarray:
    """Returns vectors of which some are rounded badly by one common scale."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(number, dim))
    if kind == "outlier":
        vectors[:, 3] = 40
    elif kind == "one of the rotation":
        vectors[0] = rotate(np.eye(dim)[:1])[0]
    elif kind == "zeros":
        vectors[1::2] = 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[::5] *= 3  # shorter than unit vectors
    return (vectors / np.maximum(lengths, 1e-9)).astype(np.float16)


@pytest.mark.parametrize("dim", [7, 24, 768])
@pytest.mark.parametrize("kind", ["plain", "outlier", "one of the rotation", "zeros"])
def test_the_bounds_of_the_first_pass_hold(kind, dim):
    vectors = make_hard_vectors(kind, 300, dim)
    queries = make_hard_vectors("plain", 40, dim).astype(np.float32)
    queries[::3] *= np.linspace(0.01, 9, 14, dtype=np.float32)[:, None]
    queries[1] = vectors[0]
    exact = queries.astype(np.float64) @ vectors.astype(np.float64).T
    made = [passes.SketchPass(sketch.make_sketch(vectors), passes.encode_queries(queries))]
    made += [passes.FloatPass(vectors, queries, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for pass_ in made:
        products = pass_.multiply(np.arange(300))
        errors = np.abs(products.double().numpy() * pass_.scales - exact.T)
        assert (errors.max(axis=0) <= pass_.errors).all()
        # The bound is of use: it is not a thousand times larger than the errors.
        assert pass_.errors.max() < 1000 * errors.max()
        # Every row whose score is at least the threshold reaches the limit.
        thresholds = np.quantile(exact, 0.9, axis=1).astype(np.float32)
        reached = (products >= pass_.compute_limits(thresholds)).numpy()
        assert reached[(exact.astype(np.float32) >= thresholds[:, None]).T].all()


def test_equal_vectors_come_in_the_order_of_their_rows(tmp_path, small_chunks):
    vectors = np.tile(np.eye(DIM, dtype=np.float32)[:1], (300, 1))
    table = pa.table({"id": [f"{row}" for row in range(300)]})
    shard = write_shard(tmp_path, 0, {"image": vectors}, table)
    write_manifest(tmp_path, Manifest(dim=DIM, shards=(shard,)))
    hits = open_store(str(tmp_path)).search(vectors[:1], 5, offset=7)
    assert hits.ids == [["7", "8", "9", "10", "11"]]


def test_texts_take_part_where_there_is_a_caption(tmp_path):
    captions = ["a", None, "", "b"] * 5
    table = pa.table({"id": [f"{row}" for row in range(20)], "caption": captions})
    make_folder(tmp_path, table)
    store = open_store(str(tmp_path))
    query = make_vectors(1, seed=5)
    hits = store.search(query, 20, modality="text")
    slow = SlowSearch(store, query, "text")
    expected = slow.rank(0, 20, keep=lambda row: bool(row["caption"]))
    assert hits.ids[0] == expected[0] and len(hits.ids[0]) == 10
    assert len(store.search(query, 20).ids[0]) == 20


def test_rows_vectors_and_ids_are_fetched_in_the_order_asked_for(tmp_path):
    rows = make_rows(30, random.Random(1))
    make_folder(tmp_path, make_table(rows), shards=2)
    store = open_store(str(tmp_path))
    assert store.fetch(["row0029", "row0000"]) == [rows[29], rows[0]]
    assert store.fetch(["row0003"], ["city"]) == [{"city": rows[3]["city"]}]
    expected = make_vectors(30).astype(np.float16).astype(np.float32)
    assert (store.get_vectors(["row0020", "row0001"]) == expected[[20, 1]]).all()
    assert store.select_ids(parse_filter("year == 1")) == [
        row["id"] for row in rows if row["year"] == 1
    ]
    with pytest.raises(ValueError, match="no row with the id 'x'"):
        store.fetch(["row0001", "x"])


def test_a_store_shows_its_generation_until_it_is_refreshed(tmp_path):
    make_folder(tmp_path, make_table(make_rows(10, random.Random(1))))
    reader, writer = open_store(str(tmp_path)), open_store(str(tmp_path), read_only=False)
    writer.delete(["row0000"])
    assert (reader.num_rows, writer.num_rows) == (10, 9)
    reader.refresh()
    assert reader.num_rows == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"queries": np.zeros((1, 3))},
            r"vectors of length 24, the queries have the shape \[1, 3\]",
        ),
        ({"queries": np.full((1, DIM), np.nan)}, "not finite"),
        ({"k": 0}, "k is at least 1"),
        ({"offset": -1}, "offset at least 0"),
        ({"modality": "sound"}, "holds no sound vectors, only image and text ones"),
        ({"where": parse_filter("yeer > 3")}, "no column 'yeer'; there are id, city"),
    ],
)
def test_a_wrong_search_is_refused_in_one_line(tmp_path, arguments, message):
    make_folder(tmp_path, make_table(make_rows(10, random.Random(1))))
    store = open_store(str(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        store.search(**{"queries": np.zeros((1, DIM)), "k": 3, **arguments})
    assert "\n" not in str(error.value)


def test_a_store_open_for_reading_is_not_changed(tmp_path):
    make_folder(tmp_path, make_table(make_rows(10, random.Random(1))))
    with pytest.raises(ValueError, match="read_only=False"):
        open_store(str(tmp_path)).delete(["row0000"])


@pytest.mark.parametrize("uri", ["nothing", "."])
def test_a_folder_that_is_no_index_is_named(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{uri} is no index"):
        open_store(uri)
    with pytest.raises(ValueError, match="choose one of auto, exact, faiss"):
        open_store(uri, index="hnsw")


def test_uris_of_milvus_are_told_from_folders():
    names = ["x.db", "a/x.db#photos", "http://h:1", "https://h:1/c"]
    assert all(is_milvus_uri(name) for name in names)
    assert not any(is_milvus_uri(name) for name in ["x", "x.db/v", "http", "a#b.db"])
