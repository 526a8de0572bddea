"""8-bit sketches: their error is known, they belong to their shard, and nobody depends on them."""

import json

import numpy as np
import pyarrow as pa
import pytest

from beit3.search import sketch
from beit3.search.folder import open_folder, write_shard
from beit3.search.manifest import Manifest, write_manifest
from beit3.search.stores.uri import open_store

ROWS, DIM = 100, 48


def make_vectors(number: int = ROWS, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a folder of one shard with a sketch."""
    monkeypatch.setattr(sketch, "MIN_ROWS", ROWS)
    write_folder(tmp_path, ROWS)
    return tmp_path


def write_folder(path, number: int, seed: int = 0) -> None:
    table = pa.table({"id": [f"{row}" for row in range(number)]})
    shard = write_shard(path, 0, {"image": make_vectors(number, seed)}, table)
    write_manifest(path, Manifest(dim=DIM, shards=(shard,)))


@pytest.mark.parametrize("dim", [1, 7, 24, 768, 1024, 2048])
def test_a_rotation_keeps_products(dim):
    vectors = make_vectors(20, dim=dim).astype(np.float64)
    rotated = sketch.rotate(vectors)
    np.testing.assert_allclose(rotated @ rotated.T, vectors @ vectors.T, atol=1e-14)
    assert rotated.shape == vectors.shape
    assert np.abs(sketch.rotate(vectors.astype(np.float32)) - rotated).max() < 1e-6


def test_the_rotation_of_a_folder_written_today_is_the_one_of_tomorrow():
    # A change of these numbers makes every sketch on disk wrong.
    rotated = sketch.rotate(np.arange(12, dtype=np.float64)[None])[0]
    np.testing.assert_allclose(rotated, [0, 2, 1, -3, 11, -1, -2, 0, 8, 10, 9, -11])


def test_the_error_of_a_sketch_is_the_largest_of_its_rows():
    vectors = make_vectors(3000, dim=768)
    made = sketch.make_sketch(vectors)
    restored = made.codes.astype(np.float64) * made.scale
    errors = np.linalg.norm(restored - sketch.rotate(vectors.astype(np.float64)), axis=1)
    assert errors.max() <= made.error <= errors.max() + 1e-5
    assert made.error < 0.015


def test_one_large_dimension_does_not_spoil_the_others():
    vectors = make_vectors(1000, dim=768)
    vectors[:, 5] = 0.7
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert sketch.make_sketch(vectors).error < 0.015


def test_a_sketch_does_not_depend_on_chunks(monkeypatch):
    vectors = make_vectors(300)
    made = sketch.make_sketch(vectors)
    monkeypatch.setattr(sketch, "CHUNK_ROWS", 7)
    again = sketch.make_sketch(vectors)
    assert (made.codes == again.codes).all()
    assert (made.scale, made.error) == (again.scale, again.error)


def test_a_shard_of_few_rows_has_none_and_loses_an_older_one(folder):
    files = {path.name for path in (folder / "img_int8").iterdir()}
    assert files == {"img_int8_0.npy", "img_int8_0.json"}
    write_folder(folder, ROWS - 1)
    assert not list((folder / "img_int8").iterdir())
    assert open_folder(folder).get_sketches() == [None]


def test_search_is_the_same_without_a_sketch(folder):
    queries = make_vectors(5, seed=1)
    hits = open_store(str(folder)).search(queries, 10)
    assert open_store(str(folder)).folder.get_sketches()[0] is not None
    (folder / "img_int8" / "img_int8_0.json").unlink()
    other = open_store(str(folder)).search(queries, 10)
    assert open_store(str(folder)).folder.get_sketches() == [None]
    assert hits.ids == other.ids
    assert [list(part) for part in hits.scores] == [list(part) for part in other.scores]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("img_int8_0.npy", None),
        ("img_int8_0.npy", b""),
        ("img_int8_0.npy", b"\x93NUMPY"),
        ("img_int8_0.json", b"{"),
        ("img_int8_0.json", b"{}"),
        ("img_int8_0.json", b"3"),
        ("img_int8_0.json", b'{"scale": "x", "error": 1}'),
        ("img_int8_0.json", b'{"scale": 0, "error": 1}'),
        ("img_int8_0.json", b'{"scale": 1, "error": NaN}'),
    ],
)
def test_a_damaged_sketch_is_named_in_one_line(folder, name, content):
    path = folder / "img_int8" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"img_int8_0.npy.*remove .*img_int8") as error:
        open_folder(folder)
    assert "\n" not in str(error.value)


def test_a_sketch_of_other_vectors_is_refused(folder):
    np.save(folder / "img_emb" / "img_emb_0.npy", make_vectors(seed=3).astype(np.float16))
    with pytest.raises(ValueError, match="img_int8_0.npy is not of the vectors"):
        open_folder(folder)
    facts = folder / "img_int8" / "img_int8_0.json"
    facts.write_text(json.dumps({"scale": 0.5, "error": 0.1}))
    with pytest.raises(ValueError, match="img_int8_0.npy is not of the vectors"):
        open_folder(folder)
