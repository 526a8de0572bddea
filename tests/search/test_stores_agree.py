"""Exact search, FAISS and Milvus return the same ids for the same filtered queries."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3.search.filters import parse_filter
from beit3.search.folder import delete_rows, write_shard
from beit3.search.manifest import Manifest, write_manifest
from beit3.search.stores.uri import open_store
from tests.search.filter_cases import make_filter, make_rows, make_table

pytest.importorskip("faiss")
pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from beit3.search.copying import copy_to_milvus
from beit3.search.stores.faiss import build_faiss_index

NUM_ROWS, DIM = 200, 16


def make_distinct_vectors(seed: int) -> np.ndarray:
    """Returns unit vectors whose first two elements, which are scores, differ by 0.006 or more."""
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.permutation(np.linspace(-0.6, 0.6, NUM_ROWS)) for _ in range(2)], axis=1)
    rest = rng.normal(size=(NUM_ROWS, DIM - 2))
    length = np.sqrt(1 - np.square(scores).sum(axis=1, keepdims=True))
    rest *= length / np.linalg.norm(rest, axis=1, keepdims=True)
    return np.concatenate([scores, rest], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Returns the same rows in a folder, in a folder with an index, and in Milvus Lite."""
    path = tmp_path_factory.mktemp("agree")
    folder, uri = path / "V", str(path / "x.db")
    table = make_table(make_rows(NUM_ROWS, random.Random(0)))
    vectors = {"image": make_distinct_vectors(0), "text": make_distinct_vectors(1)}
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        part = {modality: array[rows] for modality, array in vectors.items()}
        shards.append(write_shard(folder, number, part, table.take(rows)))
    manifest = Manifest(dim=DIM, modalities=("image", "text"), shards=tuple(shards))
    write_manifest(folder, manifest)
    build_faiss_index(folder)
    delete_rows(folder, ["row0010", "row0150"])
    copy_to_milvus(str(folder), uri)
    return (
        open_store(str(folder), index="exact"),
        open_store(str(folder), index="faiss"),
        open_store(uri),
    )


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rng=st.randoms(use_true_random=False),
    k=st.sampled_from([1, 7, 300]),
    offset=st.sampled_from([0, 2]),
    modality=st.sampled_from(["image", "text"]),
)
def test_filtered_queries_find_the_same_ids(stores, rng, k, offset, modality):
    exact, faiss, milvus = stores
    text, evaluate = make_filter(rng)
    where = parse_filter(text)
    queries = np.eye(2, DIM, dtype=np.float32)

    def search(store):
        return store.search(queries, k, where=where, offset=offset, modality=modality).ids

    expected = search(exact)
    rows = exact.fetch(sorted(exact.select_ids(where)))
    passed = [row["id"] for row in rows]
    assert all(evaluate(row) is True for row in rows)
    assert all(len(ids) == max(0, min(k, len(passed) - offset)) for ids in expected)
    assert all({*ids} <= {*passed} for ids in expected)
    assert search(faiss) == expected
    if "\\" in text and "contains" in text:
        # Milvus may be asked for what it cannot compare: it refuses, or answers the same.
        try:
            found = search(milvus)
        except ValueError as error:
            assert "no text with a backslash by `contains`" in str(error)
            return
        assert found == expected
    else:
        assert search(milvus) == expected
