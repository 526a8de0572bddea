"""`beit3 index`: each action by the command line, and wrong input in one line."""

import json
import random

import pytest

from beit3.cli import main
from beit3.search.stores.uri import open_store
from tests.search.filter_cases import make_rows, make_table
from tests.search.test_stores import make_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder("V", make_table(make_rows(40, random.Random(0))), equal=False)
    rows = [{**row, "id": f"new{row['id']}"} for row in make_rows(5, random.Random(1))]
    make_folder("V2", make_table(rows), equal=False)


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["index", *words])
    return (status, *capsys.readouterr())


def test_each_action_changes_the_folder_and_shows_it(folder, capsys):
    status, out, _ = run(capsys, "V")
    assert status == 0 and json.loads(out)["rows"] == 40
    assert json.loads(run(capsys, "V", "--add", "V2")[1])["rows"] == 45
    status, out, error = run(capsys, "V", "--add", "V2")
    assert status == 2 and "has a row with id 'newrow0000' (5 such ids)" in error
    assert json.loads(run(capsys, "V", "--replace", "V2")[1])["rows"] == 45
    assert json.loads(run(capsys, "V", "--delete", "newrow0000", "row0001")[1])["rows"] == 43
    run(capsys, "V", "--delete-where", "id starts with 'new'")
    assert open_store("V").num_rows == 39


def test_a_folder_is_copied_to_milvus_and_changed_there(folder, capsys):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    assert json.loads(run(capsys, "V", "--to", "x.db")[1])["rows"] == 40
    assert json.loads(run(capsys, "x.db", "--add", "V2")[1])["rows"] == 45
    assert json.loads(run(capsys, "x.db", "--delete-where", "year > 0")[1])["rows"] < 45


def test_faiss_is_built_and_its_recall_printed(folder, capsys):
    pytest.importorskip("faiss")
    status, out, error = run(capsys, "V", "--faiss")
    assert status == 0 and "recall@10" in error
    assert json.loads(out)["faiss"]["image"]["kind"] == "hnsw"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing is no index"),
        (["V", "--faiss", "--add", "V2"], "--faiss and --add: give one of them at a time"),
        (["V", "--to", "V3"], "--to copies a folder to Milvus"),
        (["V", "--delete", "x"], "no row with id 'x'"),
        (["V", "--delete-where", "yeer > 3"], "no column 'yeer'"),
    ],
)
def test_wrong_input_is_one_line(folder, capsys, words, message):
    status, out, error = run(capsys, *words)
    assert status == 2 and message in error and len(error.strip().split("\n")) == 1
