"""Milvus by the same calls as a folder: a file of Milvus Lite, and a server at MILVUS_URI."""

import os
import random
import socket
import subprocess
import sys
import time
import uuid

import numpy as np
import pyarrow as pa
import pytest

from beit3.search.filters import parse_filter
from beit3.search.folder import delete_rows
from beit3.search.stores.uri import open_store
from tests.search.filter_cases import CITIES, make_filter, make_rows, make_table
from tests.search.test_stores import DIM, make_folder, make_vectors

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from beit3.search import copying
from beit3.search.stores import milvus
from beit3.search.stores.milvus import MilvusStore, split_uri

SERVERS = [
    "file",
    pytest.param(
        "server",
        marks=pytest.mark.skipif(
            not os.environ.get("MILVUS_URI"), reason="MILVUS_URI names no server"
        ),
    ),
]


@pytest.fixture(params=SERVERS)
def uri(request, tmp_path):
    """Returns a URI where a collection can be made; it is removed afterwards."""
    if request.param == "file":
        yield str(tmp_path / "index.db")
        return
    uri = f"{os.environ['MILVUS_URI'].rstrip('/')}/beit3_test_{uuid.uuid4().hex}"
    yield uri
    store = MilvusStore(uri, unfinished=True)
    store.client.drop_collection(store.collection)


@pytest.fixture
def rows():
    return make_rows(120, random.Random(0))


@pytest.fixture
def folder(tmp_path, rows):
    """Makes a folder without equal vectors, whose order stores may choose."""
    path = tmp_path / "V"
    make_folder(path, make_table(rows), shards=2, equal=False)
    delete_rows(path, ["row0010", "row0100"])
    return path


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Returns a folder and its copy in Milvus Lite, which no test changes."""
    path = tmp_path_factory.mktemp("milvus")
    make_folder(path / "V", make_table(make_rows(120, random.Random(0))), shards=2, equal=False)
    copying.copy_to_milvus(str(path / "V"), str(path / "x.db"))
    return path / "V", str(path / "x.db")


def test_random_filters_find_the_same_ids_as_in_the_folder(uri, folder):
    copying.copy_to_milvus(str(folder), uri)
    exact, store = open_store(str(folder)), open_store(uri)
    assert store.num_rows == exact.num_rows < 120
    queries = make_vectors(2, seed=3)
    rng = random.Random(1)
    for _ in range(40):
        text, _ = make_filter(rng)
        if "\\" in text and "contains" in text:
            continue  # what is refused, test_stores_agree.py tests
        where = parse_filter(text)
        assert store.select_ids(where) == exact.select_ids(where), text
        for modality in ("image", "text"):
            expected = exact.search(queries, 7, where=where, offset=2, modality=modality)
            hits = store.search(queries, 7, where=where, offset=2, modality=modality)
            assert hits.ids == expected.ids, text
            for scores, exact_scores in zip(hits.scores, expected.scores, strict=True):
                np.testing.assert_allclose(scores, exact_scores, atol=1e-5)


@pytest.mark.parametrize("word", ["==", "contains", "not contains", "starts with", "in", ">"])
def test_every_special_character_is_compared_as_itself(copied, word):
    folder, uri = copied
    exact, store = open_store(str(folder)), open_store(uri)
    for city in CITIES:
        value = "'" + city.replace("'", "''") + "'"
        where = parse_filter(f"city {word} {f'({value})' if word == 'in' else value}")
        if "contains" in word and "\\" in city:
            with pytest.raises(ValueError, match="no text with a backslash by `contains`"):
                store.select_ids(where)
            continue
        assert store.select_ids(where) == exact.select_ids(where), city


def test_facts_rows_and_vectors_are_those_of_the_folder(uri, folder, rows):
    copying.copy_to_milvus(str(folder), uri)
    exact, store = open_store(str(folder)), open_store(uri)
    for name in ("dim", "num_rows", "columns", "modalities", "fingerprint", "weights"):
        assert getattr(store, name) == getattr(exact, name), name
    assert store.fetch(["row0007", "row0002"]) == [rows[7], rows[2]]
    assert store.fetch(["row0007"], ["city"]) == [{"city": rows[7]["city"]}]
    ids = ["row0005", "row0003"]
    assert (store.get_vectors(ids, "text") == exact.get_vectors(ids, "text")).all()
    with pytest.raises(ValueError, match="no row with the id 'x'"):
        store.fetch(["x"])


def test_rows_are_added_replaced_and_deleted(uri, folder):
    copying.copy_to_milvus(str(folder), uri)
    store = open_store(uri, read_only=False)
    number = store.num_rows
    query = make_vectors(1, seed=4)
    vectors = {"image": query, "text": query}
    store.add(vectors, pa.table({"id": ["new"], "year": [7]}))
    assert store.search(query, 1).ids == [["new"]] and store.num_rows == number + 1
    with pytest.raises(ValueError, match="has a row with id 'new'"):
        store.add(vectors, pa.table({"id": ["new"]}))
    store.replace(vectors, pa.table({"id": ["new"], "year": [8]}))
    assert store.fetch(["new"], ["year", "city"]) == [{"year": 8, "city": None}]
    assert store.delete(["new", "row0003"]) == 2 and store.num_rows == number - 1
    with pytest.raises(ValueError, match="no row with the id 'new'"):
        store.delete(["new"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["x"], "color": ["red"]}, "has no column 'color', and its columns are fixed"),
        ({"id": ["x"], "year": ["red"]}, "column 'year' holds text, it should hold int64"),
        ({"id": ["x"], "city": ["x" * 70000]}, "text of 70000 bytes, Milvus stores 65535"),
    ],
)
def test_rows_that_do_not_fit_are_refused(copied, table, message):
    _, uri = copied
    vectors = {"image": make_vectors(1), "text": make_vectors(1)}
    with pytest.raises(ValueError, match=message):
        open_store(uri, read_only=False).add(vectors, pa.table(table))
    with pytest.raises(ValueError, match="read_only=False"):
        open_store(uri).delete(["row0001"])
    with pytest.raises(ValueError, match="at most 16384 hits"):
        open_store(uri).search(make_vectors(1), 10_000, offset=10_000)


def test_an_interrupted_copy_goes_on_and_is_not_searched_before(uri, folder, monkeypatch):
    monkeypatch.setattr(copying, "BATCH_ROWS", 20)
    copy_rows = copying._copy_rows
    calls = []

    def copy_then_fail(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        copy_rows(*arguments)

    monkeypatch.setattr(copying, "_copy_rows", copy_then_fail)
    with pytest.raises(KeyboardInterrupt):
        copying.copy_to_milvus(str(folder), uri)
    with pytest.raises(ValueError, match="copy that was interrupted: repeat"):
        open_store(uri)
    assert copying.copy_to_milvus(str(folder), uri) == open_store(uri).num_rows > 40
    with pytest.raises(ValueError, match="has that collection already"):
        copying.copy_to_milvus(str(folder), uri)


def test_no_connection_is_left_open(tmp_path, folder, monkeypatch):
    clients = []

    def connect_and_keep(address):
        clients.append(connect(address))
        return clients[-1]

    connect = milvus.connect
    for module in (milvus, copying):
        monkeypatch.setattr(module, "connect", connect_and_keep)
    uri = str(tmp_path / "x.db")
    copying.copy_to_milvus(str(folder), uri)
    copying.add_folder(uri, str(folder), replace=True)
    with pytest.raises(ValueError, match="already"):
        copying.copy_to_milvus(str(folder), uri)
    with pytest.raises(ValueError, match="no collection"):
        open_store(f"{uri}#other")
    assert len(clients) >= 6
    for client in clients:
        with pytest.raises(Exception, match="create connection first"):
            client.list_collections()


def test_a_copy_of_a_changed_folder_does_not_go_on(tmp_path, folder, monkeypatch):
    uri = str(tmp_path / "x.db")
    with monkeypatch.context() as patch:
        patch.setattr(copying, "_copy_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            copying.copy_to_milvus(str(folder), uri)
    delete_rows(folder, ["row0001"])
    with pytest.raises(ValueError, match="has changed since its copy"):
        copying.copy_to_milvus(str(folder), uri)


def test_one_file_holds_several_collections(tmp_path, folder):
    uri = str(tmp_path / "x.db")
    copying.copy_to_milvus(str(folder), f"{uri}#first")
    copying.copy_to_milvus(str(folder), f"{uri}#second")
    open_store(f"{uri}#first", read_only=False).delete(["row0001"])
    assert open_store(f"{uri}#second").fetch(["row0001"], ["id"]) == [{"id": "row0001"}]
    with pytest.raises(ValueError, match="no collection 'third'; it has first, second"):
        open_store(f"{uri}#third")


def test_uris_are_split():
    assert split_uri("a/x.db") == ("a/x.db", "beit3")
    assert split_uri("a/x.db#c1") == ("a/x.db", "c1")
    assert split_uri("http://h:19530") == ("http://h:19530", "beit3")
    assert split_uri("https://h:19530/c1/") == ("https://h:19530", "c1")
    with pytest.raises(ValueError, match="letters, digits and _ only"):
        split_uri("x.db#a-b")
    with pytest.raises(ValueError, match="should be http://host:port"):
        split_uri("http://h/a/b")


def test_a_uri_that_does_not_answer_is_told_within_seconds_and_quietly(
    capfd, tmp_path, monkeypatch
):
    monkeypatch.setattr(milvus, "CONNECT_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"http://127.0.0.1:{port} does not answer") as error:
            open_store(f"http://127.0.0.1:{port}")
    assert time.monotonic() - start < 15 and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not answer.*does the server run"):
        open_store("http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"none.db does not exist"):
        open_store(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()
    assert capfd.readouterr() == ("", "")


def test_a_file_that_another_process_has_open_is_named(copied):
    _, uri = copied
    open_store(uri)
    code = f"from beit3.search.stores.uri import open_store; open_store({uri!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stderr.strip().split("\n")[-1]
    assert "does not answer" in last and "is it open in another process?" in last


def test_a_file_of_something_else_is_no_index(tmp_path):
    path = tmp_path / "photos.db"
    path.write_bytes(b"SQLite format 3\0" + b"\0" * 100)
    with pytest.raises(ValueError, match="photos.db") as error:
        open_store(str(path))
    assert "\n" not in str(error.value)


def test_columns_that_milvus_cannot_name_are_refused(tmp_path):
    vectors = make_vectors(3)
    table = pa.table({"id": ["a", "b", "c"], "my column": [1, 2, 3]})
    make_folder(tmp_path / "V", table)
    assert len(vectors[0]) == DIM
    with pytest.raises(ValueError, match="takes no column 'my column': rename it"):
        copying.copy_to_milvus(str(tmp_path / "V"), str(tmp_path / "x.db"))
