"""`beit3 search`: output as table, JSON, CSV and contact sheet, and errors in one line."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import beit3.cli.search
import beit3.predict
from beit3.search import rerank
from beit3.search.sheet import MAX_SIDE
from tests.search.toy_index import (
    MAX_TEXT_IDS,
    ToyPredictor,
    make_unit_vectors,
    write_index,
)

NUM_ROWS = 24


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with an index `v`, its images and its weights; returns the directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy-weights").mkdir()
    (tmp_path / "photos").mkdir()
    for index in range(NUM_ROWS):
        image = Image.new("RGB", (900, 500), (10 * index, 0, 0))
        image.save(tmp_path / f"photos/{index}.jpg")
    rng = np.random.default_rng(1)
    metadata = {
        "id": [f"r{index}" for index in range(NUM_ROWS)],
        "image_path": [f"{index}.jpg" for index in range(NUM_ROWS)],
        "caption": [f"picture <{index}>" for index in range(NUM_ROWS)],
        "video": [f"v{index % 4}" for index in range(NUM_ROWS)],
        "time": [float(index // 4) for index in range(NUM_ROWS)],
        "hash": ["00"] * NUM_ROWS,
    }
    write_index(
        tmp_path / "v",
        make_unit_vectors(rng, NUM_ROWS),
        metadata,
        image_root=str(tmp_path / "photos"),
    )
    monkeypatch.setattr(beit3.predict, "load", LoadedPredictor)
    return tmp_path


class LoadedPredictor(ToyPredictor):
    """What the replaced `load` returns: the fingerprint is named by the path."""

    def __init__(self, path, **options):
        super().__init__(weights="toy" if path == "toy-weights" else str(path))

    def to(self, device):
        return self


def read_ids(output):
    return [row["id"] for row in json.loads(output)]


def test_json_where_output_is_no_terminal(folder, run_cli):
    rows = json.loads(run_cli("search", "v", "a dog", "-k", 3))
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {"rank", "id", "score", "image_path", "caption", "video", "time", "hash"}
    assert rows[0]["score"] > rows[1]["score"]
    assert read_ids(run_cli("search", "v", "a dog", "--k", 2, "--offset", 1)) == [
        row["id"] for row in rows[1:]
    ]


def test_table_on_a_terminal(folder, run_cli, monkeypatch):
    monkeypatch.setattr(beit3.cli.search.sys.stdout, "isatty", lambda: True, raising=False)
    output = run_cli("search", "v", "a dog", "-k", 3)
    assert "caption" in output and "picture <" in output and "hash" not in output
    assert len([line for line in output.splitlines() if ".jpg" in line]) == 3
    assert json.loads(run_cli("search", "v", "a dog", "--json"))


def test_csv(folder, run_cli):
    run_cli("search", "v", "a dog", "-k", 3, "--out", "sub/hits.csv")
    rows = list(csv.DictReader(io.StringIO((folder / "sub/hits.csv").read_text())))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] and rows[0]["caption"]


def test_json_file_equals_the_output(folder, run_cli):
    run_cli("search", "v", "a dog", "--out", "hits.json")
    assert (folder / "hits.json").read_text() == run_cli("search", "v", "a dog")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.text, self.links = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.text += data


def test_contact_sheet_is_one_self_contained_file(folder, run_cli):
    (folder / "photos/5.jpg").unlink()
    (folder / "photos/6.jpg").write_bytes(b"no image")
    run_cli("search", "v", "a <dog>", "-k", NUM_ROWS, "--out", "hits.html")
    content = (folder / "hits.html").read_text()
    page = Page(content)
    assert len(page.images) == NUM_ROWS - 2
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "<script" not in content and "url(" not in content
    for image in page.images:
        assert image["alt"].startswith("picture <") and int(image["width"]) == MAX_SIDE
    assert len(content) < NUM_ROWS * 10_000
    assert "a <dog>" in page.text and "picture <5>" in page.text
    assert "No such file" in page.text and "0.jpg" in page.text and "video" in page.text
    assert "prefers-color-scheme:dark" in content and "width=device-width" in content


def test_sheet_without_results(folder, run_cli):
    run_cli("search", "v", "a dog", "--where", "time > 100", "--out", "hits.html")
    assert "Nothing was found" in (folder / "hits.html").read_text()


def test_image_root_can_move(folder, run_cli):
    (folder / "photos").rename(folder / "moved")
    run_cli("search", "v", "a dog", "--out", "hits.html", "--image-root", "moved")
    assert len(Page((folder / "hits.html").read_text()).images) == 10


def test_weights_can_move(folder, run_cli, run_failing_cli):
    (folder / "toy-weights").rmdir()
    assert "--weights" in run_failing_cli("search", "v", "a dog")
    (folder / "other").mkdir()
    assert "other weights" in run_failing_cli("search", "v", "a dog", "--weights", "other")
    assert run_cli("search", "v", "--id", "r3")


def test_all_kinds_of_queries(folder, run_cli):
    both = read_ids(run_cli("search", "v", "a dog", "--image", "photos/3.jpg"))
    text = read_ids(run_cli("search", "v", "a dog"))
    heavy = read_ids(
        run_cli("search", "v", "a dog", "--image", "photos/3.jpg", "--image-weight", 0)
    )
    assert heavy == text != both
    negative = read_ids(run_cli("search", "v", "a dog", "--not", "snow", "--not", "rain"))
    image = read_ids(run_cli("search", "v", "a dog", "--not-image", "photos/3.jpg"))
    assert len({tuple(ids) for ids in (both, text, negative, image)}) == 4
    neighbors = read_ids(run_cli("search", "v", "--id", "r3", "-k", 100))
    assert len(neighbors) == NUM_ROWS - 1 and "r3" not in neighbors
    groups = json.loads(run_cli("search", "v", "a dog", "--group-by", "video"))
    assert sorted(row["video"] for row in groups) == ["v0", "v1", "v2", "v3"]
    later = json.loads(run_cli("search", "v", "a dog", "--where", "time >= 4 and video != 'v1'"))
    assert all(row["time"] >= 4 and row["video"] != "v1" for row in later) and len(later) == 6


def test_sequence(folder, run_cli):
    command = ["search", "v", "a dog", "--then", "a cat", "--then", "a bird", "--within", 4]
    rows = json.loads(run_cli(*command, "-k", 2, "--json"))
    assert [row["rank"] for row in rows] == [1, 2]
    times = [frame["time"] for frame in rows[0]["frames"]]
    assert len(times) == 3 and times == sorted(set(times)) and times[-1] - times[0] <= 4
    run_cli(*command, "-k", 2, "--out", "hits.csv")
    table = list(csv.DictReader(io.StringIO((folder / "hits.csv").read_text())))
    assert [row["step"] for row in table] == ["1", "2", "3"] * 2
    run_cli(*command, "--out", "hits.html")
    page = Page((folder / "hits.html").read_text())
    assert "a dog, then a cat, then a bird" in page.text and len(page.images) == 12


def test_fusion(folder, run_cli):
    rng = np.random.default_rng(2)
    ids = {"id": [f"r{index}" for index in range(NUM_ROWS)]}
    (folder / "w2").mkdir()
    write_index(folder / "v2", make_unit_vectors(rng, NUM_ROWS), ids, weights="toy")
    first = read_ids(run_cli("search", "v", "a dog"))
    second = read_ids(run_cli("search", "v2", "a dog"))
    fused = read_ids(run_cli("search", "v", "a dog", "--fuse", "v2"))
    assert fused not in (first, second)
    options = ["--fuse", "v2", "--fuse-by", "score", "--fuse-weights"]
    assert read_ids(run_cli("search", "v", "a dog", *options, "1,0")) == first
    assert read_ids(run_cli("search", "v", "a dog", *options, "0,1")) == second


def test_the_sheet_of_a_fusion_shows_the_images_of_every_index(folder, run_cli):
    (folder / "others").mkdir()
    for index in range(4):
        Image.new("RGB", (40, 30), (0, 60 * index, 0)).save(folder / f"others/s{index}.jpg")
    metadata = {
        "id": [f"s{index}" for index in range(4)],
        "image_path": [f"s{index}.jpg" for index in range(4)],
    }
    vectors = make_unit_vectors(np.random.default_rng(2), 4)
    write_index(folder / "v2", vectors, metadata, image_root=str(folder / "others"))
    run_cli("search", "v", "a dog", "--fuse", "v2", "-k", 28, "--out", "hits.html")
    assert len(Page((folder / "hits.html").read_text()).images) == 28


class ToyReranker:
    """Prefers images of large numbers."""

    weight = 100.0

    def score(self, texts, images):
        assert set(texts) == {"a dog"}
        return np.array([float(re.search(r"(\d+)\.jpg", str(image))[1]) for image in images])


def test_reranking_sorts_the_best_anew(folder, run_cli, run_failing_cli, monkeypatch):
    monkeypatch.setattr(rerank, "load_reranker", lambda weights: ToyReranker())
    best = read_ids(run_cli("search", "v", "a dog", "-k", 8))
    options = ["--rerank", "w", "--rerank-k", 8]
    rows = json.loads(run_cli("search", "v", "a dog", "-k", 5, *options))
    expected = sorted(best, key=lambda id: -int(id[1:]))
    assert [row["id"] for row in rows] == expected[:5]
    assert all("search_score" in row for row in rows)
    page = read_ids(run_cli("search", "v", "a dog", "-k", 3, "--offset", 5, *options))
    assert page == expected[5:]
    assert "beyond --rerank-k 8" in run_failing_cli("search", "v", "a dog", "-k", 9, *options)
    assert "text" in run_failing_cli("search", "v", "--id", "r1", "-k", 3, *options)
    (folder / "q.jsonl").write_text(json.dumps({"text": "a dog", "relevant": expected[0]}))
    summary = json.loads(run_cli("search", "v", "--queries", "q.jsonl", *options))
    assert summary["recall@1"] == 1.0


def test_queries_of_a_file(folder, run_cli):
    (folder / "q.csv").write_text("id,text\nq1,a dog\nq2,a cat\n")
    summary = json.loads(run_cli("search", "v", "--queries", "q.csv", "--scores", "s.parquet"))
    assert summary == {"queries": 2, "scores": 2 * NUM_ROWS}
    table = pq.read_table(folder / "s.parquet").to_pylist()
    best = read_ids(run_cli("search", "v", "a cat", "-k", NUM_ROWS))
    assert [row["id"] for row in table if row["query"] == "q2"] == best
    summary = json.loads(
        run_cli("search", "v", "--queries", "q.csv", "--scores", "s.parquet", "-k", 3)
    )
    assert summary == {"queries": 2, "scores": 6}


def test_long_queries_of_a_file_are_reported(folder, capsys):
    from beit3.cli import main

    (folder / "q.txt").write_text("a dog\n" + "a " * MAX_TEXT_IDS)
    assert main(["search", "v", "--queries", "q.txt", "--scores", "s.parquet"]) == 0
    assert "1 of the queries are longer than the weights read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v"], "nothing to search for"),
        (["v", "--not", "snow"], "only what is not wanted"),
        (["v", "a dog", "-k", "0"], "at least 1"),
        (["v", "a dog", "-k", "-2"], "at least 1"),
        (["v", "a dog", "--offset", "-2"], "at least 0"),
        (["v", "a " * 40], "42 token ids and the weights read 8"),
        (["v", "--id", "r99"], "'r99'"),
        (["v", "--image", "absent.jpg", "--in", "text"], "no text vectors"),
        (["v", "a dog", "--in", "sound"], "sound"),
        (["v", "a dog", "--group-by", "videos"], "did you mean video?"),
        (["v", "a dog", "--where", "tme > 3"], "tme"),
        (["v", "a dog", "--where", "time >"], "time >"),
        (["nowhere", "a dog"], "nowhere"),
        (["v", "a dog", "--out", "hits.pdf"], "--out hits.pdf: results are written as .json"),
        (["v", "a dog", "--fuse", "nowhere"], "nowhere"),
        (["v", "a dog", "--fuse-weights", "1,2"], "--fuse-weights belongs to --fuse"),
        (["v", "a dog", "--fuse", "v", "--fuse-weights", "1,x"], "--fuse-weights 1,x"),
        (["v", "a dog", "--fuse", "v", "--fuse-weights", "1"], "1 weights for 2 indexes"),
        (["v", "a dog", "--then", "b", "--fuse", "v"], "--then and --fuse do not go together"),
        (["v", "a dog", "--then", "b", "--video-column", "clip"], "no column 'clip'"),
        (["v", "a dog", "--then", "b", "--within", "0"], "within is 0"),
        (["v", "--then", "b"], "nothing to search for"),
        (["v", "a dog", "--queries", "q.txt"], "--queries and a query do not go together"),
        (["v", "--queries", "absent.txt"], "no queries at absent.txt"),
        (["v", "--queries", "q.txt"], "what is relevant"),
        (["v", "a dog", "--scores", "s.parquet"], "--scores belongs to --queries"),
        (["v", "--queries", "q.txt", "--scores", "s.npy"], "written as .parquet"),
    ],
)
def test_wrong_commands_are_one_line(folder, run_failing_cli, words, message):
    (folder / "q.txt").write_text("a dog\n")
    before = sorted(path.name for path in folder.iterdir())
    assert message in run_failing_cli("search", *words)
    assert sorted(path.name for path in folder.iterdir()) == before
