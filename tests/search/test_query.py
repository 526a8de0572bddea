"""Queries of one index: their vectors, pages, groups, filters, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from beit3.search import query as query_module
from beit3.search.copying import copy_to_milvus
from beit3.search.query import Query, Searcher
from beit3.search.stores.exact import ExactStore
from beit3.search.stores.faiss import build_faiss_index
from beit3.search.stores.uri import open_store
from tests.search.toy_index import (
    MAX_TEXT_IDS,
    ToyPredictor,
    encode,
    make_searcher,
    make_unit_vectors,
    write_index,
)

NUM_ROWS = 200


@pytest.fixture(scope="module")
def rows():
    """Vectors and metadata: eleven videos of very different length, and rows of none."""
    rng = np.random.default_rng(3)
    videos = [f"v{min(int(value), 10)}" for value in rng.exponential(2.5, NUM_ROWS)]
    metadata = {
        "id": [f"r{index}" for index in range(NUM_ROWS)],
        "image_path": [f"{index}.jpg" for index in range(NUM_ROWS)],
        "video": [None if index % 50 == 7 else video for index, video in enumerate(videos)],
        "year": [2000 + index % 20 for index in range(NUM_ROWS)],
    }
    return make_unit_vectors(rng, NUM_ROWS), metadata


@pytest.fixture(scope="module")
def searcher(rows, tmp_path_factory):
    vectors, metadata = rows
    folder = tmp_path_factory.mktemp("index") / "v"
    texts = make_unit_vectors(np.random.default_rng(5), NUM_ROWS)
    return make_searcher(folder, vectors, metadata, text_vectors=texts, image_root="photos")


def rank_rows(vectors, query_vector, keep=None):
    """Returns the rows by falling score, the slow way."""
    scores = [float(np.float32(vector.astype(float) @ query_vector)) for vector in vectors]
    kept = range(len(vectors)) if keep is None else keep
    return sorted(kept, key=lambda row: (-scores[row], row))


def get_rows(results):
    return [int(result.id[1:]) for result in results]


def normalize(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("query", "vector"),
    [
        (Query("a dog"), encode("a dog")),
        (Query(image="a.jpg"), encode("a.jpg")),
        (Query("a dog", image="a.jpg"), normalize(encode("a dog") + encode("a.jpg"))),
        (
            Query("a dog", image="a.jpg", text_weight=0.25),
            normalize(0.25 * encode("a dog") + encode("a.jpg")),
        ),
        (
            Query("a dog", negative_text=["snow"], negative_image=["b.jpg"]),
            normalize(encode("a dog") - 0.5 * encode("snow") - 0.5 * encode("b.jpg")),
        ),
        (
            Query("a dog", negative_text=["snow"], negative_weight=2),
            normalize(encode("a dog") - 2 * encode("snow")),
        ),
    ],
)
def test_query_is_a_weighted_sum_of_unit_vectors(searcher, rows, query, vector):
    results = searcher.search(query, k=NUM_ROWS)
    expected = rank_rows(rows[0], vector.astype(float))
    assert get_rows(results) == expected
    scores = [result.score for result in results]
    assert np.allclose(scores, rows[0][expected] @ vector, atol=1e-6)
    assert [result.rank for result in results] == list(range(1, NUM_ROWS + 1))
    assert results[0].metadata["year"] == rows[1]["year"][expected[0]]


def test_neighbors_of_a_row_leave_the_row_out(searcher, rows):
    vectors = rows[0]
    expected = [row for row in rank_rows(vectors, vectors[17].astype(float)) if row != 17]
    assert get_rows(searcher.search(Query(id="r17"), k=5)) == expected[:5]
    assert get_rows(searcher.search(Query(id="r17"), k=5, offset=5)) == expected[5:10]
    both = searcher.search_many([Query(id="r17"), Query("a dog")], k=5)
    assert get_rows(both[0]) == expected[:5]
    assert both[1] == searcher.search("a dog", k=5)


def test_neighbors_need_no_weights(rows, tmp_path):
    write_index(tmp_path / "v", *rows)
    searcher = Searcher(ExactStore(tmp_path / "v"))
    assert len(searcher.search(Query(id="r17"), k=3)) == 3


def test_captions_are_searched_on_request(searcher):
    text_vectors = searcher.store.get_vectors([f"r{row}" for row in range(NUM_ROWS)], "text")
    results = searcher.search("a dog", k=20, modality="text")
    assert get_rows(results) == rank_rows(text_vectors, encode("a dog").astype(float))[:20]


def choose_best_of_groups(ranking, videos):
    """Returns the best row of each video, and rows of none, in the order of the ranking."""
    chosen = []
    for row in ranking:
        if videos[row] is None or videos[row] not in {videos[other] for other in chosen}:
            chosen.append(row)
    return chosen


@pytest.mark.parametrize("k", [1, 3, 10, 15, 50])
@pytest.mark.parametrize("where", ["", "year >= 2015"])
def test_groups_equal_the_slow_way(searcher, rows, k, where):
    vectors, metadata = rows
    for text in ("a dog", "a cat", "a tree", "a very long day"):
        keep = [row for row in range(NUM_ROWS) if not where or metadata["year"][row] >= 2015]
        ranking = rank_rows(vectors, encode(text).astype(float), keep)
        expected = choose_best_of_groups(ranking, metadata["video"])
        results = searcher.search(text, k=k, group_by="video", where=where)
        assert get_rows(results) == expected[:k]


@pytest.mark.parametrize("max_hits", [10**6, 300])
def test_groups_of_many_queries_equal_those_of_single_ones(searcher, max_hits, monkeypatch):
    monkeypatch.setattr(query_module, "MAX_GROUP_HITS", max_hits)
    queries = [Query(f"text {number}") for number in range(9)] + [Query(id="r3")]
    together = searcher.search_many(queries, k=12, group_by="video")
    assert together == [searcher.search(query, k=12, group_by="video") for query in queries]


def test_pages_of_groups_do_not_overlap(searcher):
    everything = searcher.search("a dog", k=100, group_by="video")
    pages = []
    while page := searcher.search("a dog", k=3, offset=len(pages), group_by="video"):
        pages += page
    assert pages == everything


@pytest.mark.parametrize("kind", ["faiss", "milvus"])
def test_groups_of_other_stores_equal_the_slow_way(rows, tmp_path, kind):
    pytest.importorskip("faiss" if kind == "faiss" else "milvus_lite")
    vectors, metadata = rows
    uri = str(write_index(tmp_path / "v", vectors, metadata))
    if kind == "faiss":
        build_faiss_index(uri)
    else:
        copy_to_milvus(uri, uri := str(tmp_path / "v.db"))
    searcher = Searcher(open_store(uri), ToyPredictor())
    ranking = rank_rows(vectors, encode("a dog").astype(float))
    expected = choose_best_of_groups(ranking, metadata["video"])
    for k, offset in ((3, 0), (3, 3), (50, 0)):
        results = searcher.search("a dog", k=k, offset=offset, group_by="video")
        assert get_rows(results) == expected[offset : offset + k]


def test_too_few_groups_among_the_hits_that_a_store_returns(rows, tmp_path):
    searcher = make_searcher(tmp_path / "v", *rows)
    searcher.store.max_hits = 5
    assert len(searcher.search("a dog", k=1, group_by="video")) == 1
    with pytest.raises(ValueError, match="the best 5 rows.*hold only .* of 12 groups"):
        searcher.search("a dog", k=12, group_by="video")


def test_an_index_without_rows(rows, tmp_path):
    searcher = make_searcher(tmp_path / "v", *rows)
    store = ExactStore(tmp_path / "v", read_only=False)
    store.delete(rows[1]["id"])
    searcher = Searcher(store, ToyPredictor())
    assert searcher.search("a dog") == searcher.search("a dog", group_by="video") == []


def test_filter_and_pages(searcher, rows):
    keep = [row for row in range(NUM_ROWS) if rows[1]["year"][row] == 2003]
    expected = rank_rows(rows[0], encode("a dog").astype(float), keep)
    first = searcher.search("a dog", k=4, where="year == 2003")
    second = searcher.search("a dog", k=100, offset=4, where="year == 2003")
    assert get_rows(first + second) == expected
    assert [result.rank for result in second] == list(range(5, len(expected) + 1))


def test_texts_are_encoded_once(rows, tmp_path):
    searcher = make_searcher(tmp_path / "v", *rows)
    searcher.search_many(["a dog"] * 5 + ["a cat"])
    assert searcher.predictor.num_encoded == 2


def test_images_lie_below_the_root(searcher, rows, tmp_path):
    result = searcher.search("a dog", k=1)[0]
    name = result.metadata["image_path"]
    assert searcher.locate_image(result.metadata) == f"photos/{name}"
    moved = Searcher(searcher.store, ToyPredictor(), image_root="/elsewhere")
    assert moved.locate_image(result.metadata) == f"/elsewhere/{name}"


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (Query(), {}, "nothing to search for"),
        (Query(negative_text=["snow"]), {}, "only what is not wanted"),
        (Query(id="r999"), {}, "r999"),
        (Query("a dog"), {"k": 0}, "k is 0"),
        (Query("a dog"), {"k": -3}, "k is -3"),
        (Query("a dog"), {"offset": -1}, "offset is -1"),
        (Query("a dog"), {"group_by": "vide"}, "no column 'vide'; did you mean video?"),
        (Query("a dog"), {"where": "season > 2000"}, "season"),
        (Query("a dog", negative_text=["a dog"], negative_weight=1.0), {}, "cancel out"),
        (Query("a " * MAX_TEXT_IDS), {}, f"has {MAX_TEXT_IDS + 2} token ids"),
        (Query("a dog", negative_text=["a " * MAX_TEXT_IDS]), {}, "shorten it"),
        (Query("a dog"), {"modality": "sound"}, "no sound vectors"),
    ],
)
def test_wrong_queries_are_refused_in_one_line(searcher, query, options, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        searcher.search(query, **options)
    assert message in str(error.value)


def test_texts_of_the_largest_length_are_taken(searcher):
    assert searcher.search(" ".join("a" * (MAX_TEXT_IDS - 2)))


def test_long_texts_are_counted_where_they_are_cut(searcher):
    lenient = Searcher(searcher.store, ToyPredictor(), refuse_long_texts=False)
    texts = ["a dog", "a " * MAX_TEXT_IDS]
    assert lenient.count_long_texts(texts) == 1
    assert len(lenient.search_many(texts)) == 2


def test_index_without_captions(rows, tmp_path):
    searcher = make_searcher(tmp_path / "v", *rows)
    with pytest.raises(ValueError, match="no text vectors.*embed images with captions"):
        searcher.search("a dog", modality="text")


def test_other_weights_are_refused(searcher):
    with pytest.raises(ValueError, match="other weights or preprocessing.*use toy-weights"):
        Searcher(searcher.store, ToyPredictor(weights="another"))


def test_missing_weights_are_named(searcher):
    with pytest.raises(ValueError, match="toy-weights.*--weights"):
        Searcher(searcher.store).search("a dog")


def test_weights_without_a_common_space_search_their_own_modality(rows, tmp_path):
    searcher = make_searcher(tmp_path / "v", *rows, task="backbone")
    assert searcher.search(Query(image="a.jpg"), k=2)
    with pytest.raises(ValueError, match="weights of backbone.*one space"):
        searcher.search("a dog")


def test_parts_are_described(searcher):
    query = Query("a dog", image="photos/a.jpg", id="r3", negative_text=["snow"])
    assert query.describe() == "a dog + a.jpg + like r3, not snow"
    row = replace(searcher.search("a dog", k=1)[0], search_score=0.5).to_row()
    assert list(row)[:4] == ["rank", "id", "score", "search_score"]
