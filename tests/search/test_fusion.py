"""Several indexes searched together."""

import numpy as np
import pytest

from beit3.search.fusion import RANK_OFFSET, FusedSearcher
from beit3.search.query import Query
from tests.search.toy_index import make_searcher, make_unit_vectors

NUM_ROWS = 60


@pytest.fixture(scope="module")
def searchers(tmp_path_factory):
    """Two indexes of other weights and other rows: 0 to 59, and 20 to 79 from the back."""
    folder = tmp_path_factory.mktemp("fused")
    all_searchers = []
    for number, rows in enumerate([range(60), range(79, 19, -1)]):
        vectors = make_unit_vectors(np.random.default_rng(number), NUM_ROWS)
        metadata = {
            "id": [f"r{row}" for row in rows],
            "video": [f"v{row % 7}" for row in rows],
            "year": [2000 + row % 10 for row in rows],
            f"only{number}": list(rows),
        }
        options = {"weights": f"w{number}"}
        all_searchers.append(make_searcher(folder / str(number), vectors, metadata, **options))
    return all_searchers


def fuse_slowly(searchers, method, weights, candidates, where=""):
    """Returns (id, score) of all rows, by the definition."""
    totals = {}
    for searcher, weight in zip(searchers, weights, strict=True):
        results = searcher.search("a dog", k=candidates, where=where)
        scores = [result.score for result in results]
        for result in results:
            if method == "rank":
                part = 1 / (RANK_OFFSET + result.rank)
            else:
                part = (result.score - min(scores)) / (max(scores) - min(scores))
            totals[result.id] = totals.get(result.id, 0) + weight * part
    return sorted(totals.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("method", ["rank", "score"])
@pytest.mark.parametrize("weights", [(1, 1), (1, 0.3)])
@pytest.mark.parametrize("candidates", [1000, 25])
@pytest.mark.parametrize("where", ["", "year < 2005"])
def test_fusion_equals_its_definition(searchers, method, weights, candidates, where):
    fused = FusedSearcher(searchers, method=method, weights=weights, candidates=candidates)
    expected = fuse_slowly(searchers, method, weights, candidates, where)
    k = min(candidates, len(expected))
    results = fused.search("a dog", k=k, where=where)
    # Equal sums may be in any order.
    scores = dict(expected)
    assert [result.score for result in results] == pytest.approx(
        [score for _, score in expected[:k]]
    )
    assert all(result.score == pytest.approx(scores[result.id]) for result in results)
    assert len({result.id for result in results}) == k


def test_each_index_uses_its_own_weights(searchers):
    FusedSearcher(searchers).search("a dog")
    assert [searcher.predictor.fingerprint["weights"] for searcher in searchers] == ["w0", "w1"]


def test_an_index_of_weight_zero_changes_no_order(searchers):
    fused = FusedSearcher(searchers, weights=[0, 1], method="score").search("a dog", k=20)
    alone = searchers[1].search("a dog", k=20)
    assert [result.id for result in fused] == [result.id for result in alone]


def test_pages_and_groups(searchers):
    fused = FusedSearcher(searchers)
    everything = fused.search("a dog", k=80)
    pages = [
        result for offset in (0, 30, 60) for result in fused.search("a dog", k=30, offset=offset)
    ]
    assert pages == everything
    groups = fused.search("a dog", k=100, group_by="video")
    expected = {}
    for result in everything:
        expected.setdefault(result.metadata["video"], result.id)
    assert [result.id for result in groups] == list(expected.values())
    assert [result.rank for result in groups] == list(range(1, 8))


def test_metadata_come_from_the_first_index_that_has_the_row(searchers):
    for result in FusedSearcher(searchers).search("a dog", k=80):
        assert ("only0" in result.metadata) == (int(result.id[1:]) < 60)


def test_images_lie_below_the_root_of_their_index(tmp_path):
    searchers = []
    for number, root in enumerate(["/first", "/second"]):
        rng = np.random.default_rng(number)
        ids = [f"r{row}" for row in range(3 * number, 3 * number + 4)]
        metadata = {"id": ids, "image_path": [f"{id}.jpg" for id in ids]}
        folder = tmp_path / str(number)
        vectors = make_unit_vectors(rng, 4)
        searchers.append(make_searcher(folder, vectors, metadata, image_root=root))
    fused = FusedSearcher(searchers)
    paths = {fused.locate_image(result.metadata) for result in fused.search("a dog")}
    expected = {f"/first/r{row}.jpg" for row in range(4)}
    assert paths == expected | {f"/second/r{row}.jpg" for row in range(4, 7)}


def test_neighbors_of_a_row_of_both(searchers):
    results = FusedSearcher(searchers).search(Query(id="r30"), k=80)
    assert "r30" not in {result.id for result in results} and len(results) == 79


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, "1 weights for 2 indexes"),
        ({"weights": [1, -1]}, "must not be negative"),
        ({"weights": [0, 0]}, "all of them 0"),
        ({"method": "vote"}, "neither rank nor score"),
    ],
)
def test_wrong_settings_are_refused(searchers, options, message):
    with pytest.raises(ValueError, match=message):
        FusedSearcher(searchers, **options)


def test_wrong_requests_are_refused(searchers):
    fused = FusedSearcher(searchers, candidates=25)
    with pytest.raises(ValueError, match="beyond the 25 candidates"):
        fused.search("a dog", k=20, offset=10)
    with pytest.raises(ValueError, match="no column 'only0'"):
        fused.search("a dog", group_by="only0")
    with pytest.raises(ValueError, match="'r5'"):
        fused.search(Query(id="r5"))
