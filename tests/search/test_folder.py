"""Folders of vectors: writes are whole or not seen, and damage is named in one line."""

import datetime
import json
import math
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beit3.search.folder import (
    append_rows,
    change_rows,
    delete_rows,
    find_shard,
    lock_for_writing,
    open_folder,
    replace_rows,
    write_shard,
)
from beit3.search.manifest import (
    Manifest,
    check_fingerprint,
    read_manifest,
    write_manifest,
)
from tests.search import index_process

DIM = 8


def make_unit_vectors(number: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(number, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_folder(path, ids: list[str], **columns: list) -> None:
    """Writes a folder of one shard."""
    table = pa.table({"id": ids, **columns})
    shard = write_shard(path, 0, {"image": make_unit_vectors(len(ids))}, table)
    write_manifest(path, Manifest(dim=DIM, shards=(shard,)))


def read_all(path) -> dict[str, tuple]:
    """Returns id -> (vector, row of metadata) of the rows that are alive."""
    folder = open_folder(path)
    rows = np.flatnonzero(folder.alive)
    vectors = folder.gather_vectors(rows)
    table = folder.read_rows(rows).to_pylist()
    return {row["id"]: (vector.tolist(), row) for row, vector in zip(table, vectors, strict=True)}


def test_random_writes_leave_what_a_dictionary_holds(tmp_path):
    rng = random.Random(0)
    make_folder(tmp_path, ["a", "b"])
    model = {name: row[0] for name, row in read_all(tmp_path).items()}
    for step in range(60):
        names = rng.sample([f"n{number}" for number in range(12)], rng.randint(1, 4))
        vectors = make_unit_vectors(len(names), seed=step)
        stored = dict(zip(names, vectors.astype(np.float16).astype(float).tolist(), strict=True))
        table = pa.table({"id": names})
        if rng.random() < 0.4:
            chosen = rng.sample(sorted(model), min(len(model), 2))
            assert delete_rows(tmp_path, chosen) == len(chosen)
            for name in chosen:
                del model[name]
        elif set(names) & set(model):
            with pytest.raises(ValueError, match="has a row with id"):
                append_rows(tmp_path, {"image": vectors}, table)
            replace_rows(tmp_path, {"image": vectors}, table)
            model.update(stored)
        else:
            append_rows(tmp_path, {"image": vectors}, table)
            model.update(stored)
        assert {name: row[0] for name, row in read_all(tmp_path).items()} == model
        assert open_folder(tmp_path).num_rows == len(model)
    assert len(list(tmp_path.glob("deleted_*.npy"))) <= 1


def test_find_rows_gives_minus_one_for_unknown_and_deleted_ids(tmp_path):
    make_folder(tmp_path, ["a", "b", "c"])
    delete_rows(tmp_path, ["b"])
    assert open_folder(tmp_path).find_rows(["c", "b", "x", "a"]).tolist() == [2, -1, -1, 0]
    with pytest.raises(ValueError, match="no row with id 'b'"):
        delete_rows(tmp_path, ["a", "b"])
    assert open_folder(tmp_path).num_rows == 2


def test_vectors_are_in_the_layout_of_clip_retrieval(tmp_path):
    make_folder(tmp_path, ["a", "b"], caption=["x", "y"])
    vectors = np.load(tmp_path / "img_emb" / "img_emb_0.npy")
    assert vectors.dtype == np.float16 and vectors.shape == (2, DIM)
    assert pq.read_table(tmp_path / "metadata" / "metadata_0.parquet").column_names == [
        "id",
        "caption",
    ]


def test_columns_become_text_numbers_or_truth_values(tmp_path):
    moment = datetime.datetime(2024, 3, 1, 10, 0)
    make_folder(
        tmp_path,
        ["a", "b"],
        day=[datetime.date(2024, 3, 1), None],
        moment=[moment, None],
        fraction=[moment.replace(microsecond=500), moment],
        small=pa.array([1, 2], pa.int8()),
        number=[math.nan, 0.5],
        tags=[["x", "y"], None],
        label=pa.array(["p", "q"]).dictionary_encode(),
    )
    first, second = (row for _, row in read_all(tmp_path).values())
    assert first == {
        "id": "a",
        "day": "2024-03-01",
        "moment": "2024-03-01 10:00:00",
        "fraction": "2024-03-01 10:00:00.000500",
        "small": 1,
        "number": None,
        "tags": '["x", "y"]',
        "label": "p",
    }
    assert second["tags"] is None and second["number"] == 0.5


def test_new_columns_are_null_in_older_rows_and_types_must_agree(tmp_path):
    make_folder(tmp_path, ["a"], year=[1])
    append_rows(
        tmp_path, {"image": make_unit_vectors(1)}, pa.table({"id": ["b"], "year": [1.5], "x": [2]})
    )
    rows = [row for _, row in read_all(tmp_path).values()]
    assert rows == [{"id": "a", "year": 1.0, "x": None}, {"id": "b", "year": 1.5, "x": 2}]
    with pytest.raises(ValueError, match="column 'year' holds number in some rows and text"):
        append_rows(
            tmp_path, {"image": make_unit_vectors(1)}, pa.table({"id": ["c"], "year": ["x"]})
        )


@pytest.mark.parametrize(
    ("vectors", "table", "message"),
    [
        (np.ones((1, DIM)), {"id": ["x"]}, "should have the length 1, row 0 has 2.828"),
        (np.full((1, DIM), np.nan), {"id": ["x"]}, "should have the length 1"),
        (np.zeros((1, DIM)), {"id": ["x", "y"]}, "for 2 rows of metadata"),
        (np.zeros((1, 3)), {"id": ["x"]}, "vectors of length 8"),
        (np.zeros((2, DIM)), {"id": ["x", "x"]}, "two rows have the id 'x'"),
        (np.zeros((1, DIM)), {"name": ["x"]}, "no column 'id'; there are name"),
        (np.zeros((1, DIM)), {"id": [None]}, "1 rows have no id"),
        (np.zeros((1, DIM)), {"id": [""]}, "empty id"),
        (np.zeros((1, DIM)), {"id": ["x"], "b": [b"1"]}, "column 'b' holds binary"),
    ],
)
def test_wrong_rows_are_refused_and_change_nothing(tmp_path, vectors, table, message):
    make_folder(tmp_path, ["a"])
    before = read_manifest(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        append_rows(tmp_path, {"image": vectors}, pa.table(table))
    assert "\n" not in str(error.value)
    assert read_manifest(tmp_path) == before
    open_folder(tmp_path)


def test_a_write_that_ends_before_its_commit_is_not_seen_and_can_be_repeated(tmp_path):
    make_folder(tmp_path, ["a"])
    write_shard(tmp_path, 1, {"image": make_unit_vectors(3)}, pa.table({"id": ["x", "y", "z"]}))
    assert find_shard(tmp_path, 1, ["image"]).rows == 3
    assert find_shard(tmp_path, 2, ["image"]) is None
    assert list(read_all(tmp_path)) == ["a"]
    append_rows(tmp_path, {"image": make_unit_vectors(1)}, pa.table({"id": ["b"]}))
    assert list(read_all(tmp_path)) == ["a", "b"]


def test_several_batches_are_one_generation(tmp_path):
    make_folder(tmp_path, ["a", "b"])
    batches = [
        ({"image": make_unit_vectors(1)}, pa.table({"id": [name]})) for name in ("b", "c", "d")
    ]
    assert change_rows(tmp_path, batches, replace=True).generation == 1
    assert list(read_all(tmp_path)) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="id 'e'"):
        twice = [({"image": make_unit_vectors(1)}, pa.table({"id": ["e"]}))] * 2
        change_rows(tmp_path, twice, replace=True)
    assert read_manifest(tmp_path).generation == 1


@pytest.mark.parametrize(
    ("name", "remains"),
    [
        ("img_emb/img_emb_0.npy", 100),
        ("img_emb/img_emb_0.npy", 10),
        ("img_emb/img_emb_0.npy", 0),
        ("img_emb/img_emb_0.npy", None),
        ("metadata/metadata_0.parquet", 100),
        ("metadata/metadata_0.parquet", 0),
        ("metadata/metadata_0.parquet", None),
        ("deleted_1.npy", 20),
        ("deleted_1.npy", None),
        ("manifest.json", 20),
        ("manifest.json", None),
    ],
)
def test_a_truncated_or_missing_file_is_named_in_one_line(tmp_path, name, remains):
    make_folder(tmp_path, ["a", "b", "c"])
    delete_rows(tmp_path, ["a"])
    if remains is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:remains])
    with pytest.raises(ValueError, match=name.rpartition("/")[2]) as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"dim": 0},
        {"dtype": "int8"},
        {"modalities": ["sound"]},
        {"shards": [{"number": 0, "rows": -1}]},
        {"shards": [3]},
        {"unknown": 1},
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(tmp_path, change):
    make_folder(tmp_path, ["a"])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="manifest.json is no manifest of vectors"):
        open_folder(tmp_path)


def test_rows_that_disagree_with_the_manifest_are_refused(tmp_path):
    make_folder(tmp_path, ["a", "b"])
    write_shard(tmp_path, 0, {"image": make_unit_vectors(3)}, pa.table({"id": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match=r"img_emb_0.npy holds float16 \[3, 8\]"):
        open_folder(tmp_path)


def test_fingerprints_that_differ_name_what_differs():
    stored = {"weights": "1", "image": "a", "text": "t"}
    check_fingerprint(stored, dict(stored), "V")
    with pytest.raises(ValueError, match="the weights and the preprocessing of images differ"):
        check_fingerprint(stored, {"weights": "2", "image": "b", "text": "t"}, "V")
    with pytest.raises(ValueError, match="use runs/x"):
        check_fingerprint(stored, {"weights": "1", "image": "a"}, "V", weights="runs/x")
    for without_tokenizer in (stored | {"text": ""}, stored):
        check_fingerprint(without_tokenizer, stored | {"text": ""}, "V")
        with pytest.raises(ValueError, match="the weights differ"):
            check_fingerprint(without_tokenizer, {"weights": "2", "image": "a", "text": ""}, "V")


def test_a_second_writer_is_refused_at_once(tmp_path):
    make_folder(tmp_path, ["a"])
    command = [sys.executable, "-m", index_process.__name__, "lock", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match="is being written by another process"):
                delete_rows(tmp_path, ["a"])
            assert list(read_all(tmp_path)) == ["a"]
        finally:
            process.kill()
    with lock_for_writing(tmp_path):
        pass
    assert delete_rows(tmp_path, ["a"]) == 1


def test_a_reader_sees_whole_writes_only_while_another_process_writes(tmp_path):
    make_folder(tmp_path, ["a"], write=[-1])
    command = [sys.executable, "-m", index_process.__name__, "write", str(tmp_path), "30"]
    seen = set()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            folder = open_folder(tmp_path)
            rows = np.flatnonzero(folder.alive)
            writes = folder.read_rows(rows, ["write"]).column("write").to_numpy()
            vectors = folder.gather_vectors(rows)
            counts = dict(zip(*np.unique(writes[1:], return_counts=True), strict=True))
            assert all(count == index_process.ROWS for count in counts.values()), counts
            for write, vector in zip(writes[1:], vectors[1:], strict=True):
                assert vector[write % 8] == 1
            seen.add(folder.manifest.generation)
    assert process.returncode == 0
    assert len(seen) > 3
    assert read_manifest(tmp_path).generation == 55
