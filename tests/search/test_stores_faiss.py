"""The FAISS index of a folder: recall, rows added and deleted later, filters, damage."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from beit3.search.filters import parse_filter
from beit3.search.folder import write_shard
from beit3.search.manifest import Manifest, write_manifest
from beit3.search.stores.uri import open_store
from tests.search.filter_cases import make_rows, make_table
from tests.search.test_stores import DIM, make_folder, make_vectors

pytest.importorskip("faiss")

from beit3.search.stores import faiss as faiss_store

NUM_ROWS = 1500


@pytest.fixture(scope="module", params=["hnsw", "ivf"])
def built(request, tmp_path_factory):
    """Makes a folder with an index of either kind."""
    path = tmp_path_factory.mktemp(request.param)
    table = make_table(make_rows(NUM_ROWS, random.Random(0)))
    make_folder(path, table, shards=2, equal=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faiss_store, "HNSW_ROWS", 10_000 if request.param == "hnsw" else 100)
        facts = faiss_store.build_faiss_index(path)
    assert facts["image"].kind == facts["text"].kind == request.param
    return path


@pytest.fixture
def folder(built, tmp_path):
    """Returns a copy of the folder that a test may change."""
    return shutil.copytree(built, tmp_path / "V")


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


def test_measured_recall_is_that_of_a_search(built):
    exact, approximate = open_both(built)
    for seed, modality in enumerate(("image", "text")):
        facts = approximate.facts[modality]
        near = make_vectors(NUM_ROWS, seed, equal=False)[::25] + 0.02
        far = make_vectors(NUM_ROWS, 1 - seed, equal=False)[::25]
        for queries, recall in ((near, facts.recall), (far, facts.far_recall)):
            expected = exact.search(queries, 10, modality=modality)
            hits = approximate.search(queries, 10, modality=modality)
            assert measure_overlap(expected, hits) >= 0.95
            assert recall >= 0.95
        assert facts.queries == 200


def test_queries_unlike_the_index_are_searched_with_more_effort(built, monkeypatch):
    exact, approximate = open_both(built)
    facts = approximate.facts["image"]
    # Effort 1 misses neighbors; only queries that are told to be far get more.
    facts = replace(facts, effort=1, far_effort=256, near_score=0.9)
    approximate.facts = {"image": facts}
    efforts = []
    find_with = faiss_store._Proposals.find_with

    def record(self, queries, effort):
        efforts.append((len(queries), effort))
        return find_with(self, queries, effort)

    monkeypatch.setattr(faiss_store._Proposals, "find_with", record)
    near = make_vectors(NUM_ROWS, equal=False)[:3]
    far = make_vectors(1, seed=77) * 0.2
    queries = np.concatenate([near, far])
    expected = exact.search(queries, 10)
    monkeypatch.setattr(faiss_store._Proposals, "is_costly", lambda *_: False)
    hits = approximate.search(queries, 10)
    assert efforts == [(4, 1), (1, 256)]
    assert hits.ids[3] == expected.ids[3]
    # Where that would cost more than exact search, it is exact.
    monkeypatch.setattr(faiss_store._Proposals, "is_costly", lambda *_: True)
    hits = approximate.search(queries, 10)
    assert efforts[2:] == [(4, 1)]
    assert hits.ids[3] == expected.ids[3]


def test_a_folder_of_images_only_is_measured_with_noisy_queries(tmp_path):
    vectors = make_vectors(300, equal=False)
    table = pa.table({"id": [f"{row}" for row in range(300)]})
    shard = write_shard(tmp_path, 0, {"image": vectors}, table)
    write_manifest(tmp_path, Manifest(dim=DIM, shards=(shard,)))
    facts = faiss_store.build_faiss_index(tmp_path)["image"]
    assert facts.far_recall >= 0.95 and facts.recall >= 0.95
    scores = open_store(str(tmp_path), index="exact").search(vectors, 2).scores
    others = np.array([score[1] for score in scores])
    assert np.mean(others > facts.near_score) > 0.95
    assert facts.near_score > 0.5 * np.median(others)


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


def test_filtered_searches_are_exact(built, monkeypatch):
    monkeypatch.setattr(faiss_store, "_Proposals", None)
    exact, approximate = open_both(built)
    queries = make_vectors(10, seed=8)
    for text in ("id starts with 'row'", "year > 0 or city contains 'a'", "year == 2019"):
        where = parse_filter(text)
        expected = exact.search(queries, 10, where=where)
        assert approximate.search(queries, 10, where=where).ids == expected.ids


def test_mostly_deleted_rows_are_searched_exactly(folder, monkeypatch):
    store = open_store(str(folder), read_only=False)
    store.delete([f"row{row:04d}" for row in range(1300)])
    monkeypatch.setattr(faiss_store, "_Proposals", None)
    exact, approximate = open_both(folder)
    queries = make_vectors(4, seed=8)
    assert approximate.search(queries, 10).ids == exact.search(queries, 10).ids


def test_half_deleted_rows_are_found_by_the_index(folder):
    open_store(str(folder), read_only=False).delete([f"row{row:04d}" for row in range(0, 1500, 2)])
    exact, approximate = open_both(folder)
    queries = make_vectors(NUM_ROWS, equal=False)[::25] + 0.02
    expected = exact.search(queries, 10)
    assert measure_overlap(expected, approximate.search(queries, 10)) >= 0.95


@pytest.mark.parametrize("k", [1, 10, 200])
def test_recall_holds_for_many_hits_as_well(built, k):
    exact, approximate = open_both(built)
    queries = make_vectors(NUM_ROWS, equal=False)[::25] + 0.02
    assert measure_overlap(exact.search(queries, k), approximate.search(queries, k)) >= 0.95


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
    faiss_store.build_faiss_index(tmp_path)
    open_store(str(tmp_path), index="faiss")


def test_an_index_of_another_version_is_told_from_a_damaged_one(tmp_path):
    make_folder(tmp_path, make_table(make_rows(50, random.Random(0))))
    faiss_store.build_faiss_index(tmp_path)
    path = tmp_path / "faiss.json"
    facts = json.loads(path.read_text())
    del facts["image"]["far_recall"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="of another version of beit3: run `beit3 index .* exact"):
        open_store(str(tmp_path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="is damaged: run `beit3 index"):
        open_store(str(tmp_path))


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
