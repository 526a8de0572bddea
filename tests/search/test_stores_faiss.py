"""The FAISS index of a folder: recall, rows added and deleted later, filters, damage."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest

from beit3.search.filters import parse_filter
from beit3.search.stores.uri import open_store
from tests.search.filter_cases import make_filter, make_rows, make_table
from tests.search.test_stores import make_folder, make_vectors

pytest.importorskip("faiss")

from beit3.search.stores import faiss as faiss_store

NUM_ROWS = 1500


@pytest.fixture(params=["hnsw", "ivf"])
def folder(request, tmp_path, monkeypatch):
    """Makes a folder with an index of either kind, which small selections use as well."""
    monkeypatch.setattr(faiss_store, "HNSW_ROWS", 10_000 if request.param == "hnsw" else 100)
    table = make_table(make_rows(NUM_ROWS, random.Random(0)))
    make_folder(tmp_path, table, shards=2, equal=False)
    facts = faiss_store.build_faiss_index(tmp_path)
    assert facts["image"].kind == facts["text"].kind == request.param
    monkeypatch.setattr(faiss_store, "EXACT_ROWS", 10)
    return tmp_path


def open_both(path):
    stores = open_store(str(path), index="exact"), open_store(str(path))
    assert [type(store).__name__ for store in stores] == ["ExactStore", "FaissStore"]
    return stores


def measure_overlap(expected, hits) -> float:
    """Returns the fraction of the expected ids; scores of those found have to be exact."""
    overlap = []
    for ids, scores, other_ids, other_scores in zip(
        expected.ids, expected.scores, hits.ids, hits.scores, strict=True
    ):
        exact = dict(zip(ids, scores.tolist(), strict=True))
        found = dict(zip(other_ids, other_scores.tolist(), strict=True))
        assert len(ids) == len(other_ids)
        assert all(found[name] == exact[name] for name in exact.keys() & found.keys())
        overlap.append(len(exact.keys() & found.keys()) / len(exact) if exact else 1.0)
    return float(np.mean(overlap))


def test_measured_recall_is_that_of_a_search(folder):
    exact, approximate = open_both(folder)
    for seed, modality in enumerate(("image", "text")):
        # Recall is measured with vectors of the index, and holds for queries like them.
        queries = make_vectors(NUM_ROWS, seed, equal=False)[::25] + 0.02
        expected = exact.search(queries, 10, modality=modality)
        overlap = measure_overlap(expected, approximate.search(queries, 10, modality=modality))
        assert overlap >= 0.95
        assert approximate.facts[modality].recall >= 0.95
    assert approximate.facts["image"].queries == 400


def test_rows_that_came_and_went_later_are_respected(folder):
    store = open_store(str(folder), read_only=False)
    query = make_vectors(NUM_ROWS, equal=False)[[10]] + 0.2 * make_vectors(1, seed=4)
    query /= np.linalg.norm(query)
    best = store.search(query, 3).ids[0]
    store.delete([best[0]])
    vectors = {"image": query, "text": query}
    store.add(vectors, pa.table({"id": ["new"]}))
    store.replace(vectors, pa.table({"id": [best[1]]}))
    exact, approximate = open_both(folder)
    expected = exact.search(query, 10)
    assert expected.ids[0][:2] == ["new", best[1]] and best[0] not in expected.ids[0]
    assert approximate.search(query, 10).ids == store.search(query, 10).ids == expected.ids
    assert approximate.search(query, 5, offset=1).ids[0] == expected.ids[0][1:6]
    assert len(approximate.search(query, 5000).ids[0]) == NUM_ROWS


@pytest.mark.parametrize("seed", range(3))
def test_filtered_searches_find_what_exact_search_finds(folder, seed):
    rng = random.Random(seed)
    exact, approximate = open_both(folder)
    queries = make_vectors(10, seed=seed)
    for _ in range(10):
        where = parse_filter(make_filter(rng)[0])
        expected = exact.search(queries, 10, where=where)
        assert measure_overlap(expected, approximate.search(queries, 10, where=where)) >= 0.9


def test_small_selections_are_searched_exactly(folder, monkeypatch):
    monkeypatch.setattr(faiss_store, "EXACT_ROWS", 50_000)
    monkeypatch.setattr(faiss_store, "_propose_rows", None)
    exact, approximate = open_both(folder)
    queries, where = make_vectors(10, seed=8), parse_filter("year > 0 or city contains 'a'")
    expected = exact.search(queries, 10, where=where)
    assert approximate.search(queries, 10, where=where).ids == expected.ids


def test_a_second_build_replaces_the_first(folder):
    store = open_store(str(folder), index="exact", read_only=False)
    store.delete(["row0000"])
    faiss_store.build_faiss_index(folder)
    files = sorted(path.name for path in folder.glob("faiss_*"))
    assert files == ["faiss_image_1.index", "faiss_text_1.index"]
    assert json.loads((folder / "faiss.json").read_text())["image"]["file"] == files[0]
    assert "row0000" not in open_store(str(folder)).search(make_vectors(1), 5000).ids[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("faiss.json", b"{"),
        ("faiss.json", b'{"image": {"file": "x"}}'),
        ("faiss_image_0.index", b""),
        ("faiss_image_0.index", b"IxFI" + b"\0" * 50),
        ("faiss_image_0.index", None),
    ],
)
def test_a_damaged_index_is_named_in_one_line(tmp_path, name, content):
    make_folder(tmp_path, make_table(make_rows(50, random.Random(0))))
    faiss_store.build_faiss_index(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        open_store(str(tmp_path))
    assert "\n" not in str(error.value)
    open_store(str(tmp_path), index="exact")


def test_an_index_of_other_vectors_is_refused(tmp_path):
    make_folder(tmp_path, make_table(make_rows(50, random.Random(0))))
    with pytest.raises(ValueError, match="has no FAISS index: run `beit3 index"):
        open_store(str(tmp_path), index="faiss")
    faiss_store.build_faiss_index(tmp_path)
    make_folder(tmp_path, make_table(make_rows(40, random.Random(0))))
    with pytest.raises(ValueError, match="is of other vectors than the folder's: run `beit3 index"):
        open_store(str(tmp_path))


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    make_folder(tmp_path, make_table(make_rows(50, random.Random(0))))
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match=r"pip install 'beit3\[faiss\]'"):
        faiss_store.build_faiss_index(tmp_path)
