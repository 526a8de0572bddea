"""Files of queries, dumps of scores, and recall."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beit3.metrics.retrieval import compute_recall
from beit3.search import scores as scores_module
from beit3.search.filters import parse_filter
from beit3.search.inputs import InputOptions, list_items
from beit3.search.query import Searcher
from beit3.search.scores import dump_scores, read_queries
from tests.search.toy_index import (
    MAX_TEXT_IDS,
    ToyPredictor,
    encode,
    make_searcher,
    make_unit_vectors,
)

# Files of queries -----------------------------------------------------------------------------


def test_a_text_file_has_a_query_per_line(tmp_path):
    (tmp_path / "q.txt").write_text("a dog\n\n  a cat \n")
    queries = read_queries(tmp_path / "q.txt")
    assert [(listed.id, listed.query.text) for listed in queries] == [
        ("0", "a dog"),
        ("1", "a cat"),
    ]


ROWS = [
    {"id": "q1", "text": "a dog", "image": "", "relevant": "r1"},
    {"id": "q2", "text": "", "image": "a.jpg", "relevant": ["r1", "r 2"]},
    {"id": "q3", "text": "a, cat", "image": "sub/b.jpg", "relevant": ""},
]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        lists = [
            [value] if isinstance(value, str) and value else value or None
            for value in (row["relevant"] for row in rows)
        ]
        columns = {name: [row[name] or None for row in rows] for name in ("id", "text", "image")}
        pq.write_table(pa.table(columns | {"relevant": lists}), path)
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            if path.suffix == ".tsv":
                file.write("\t".join(rows[0]) + "\n")
            else:
                writer.writeheader()
            for row in rows:
                relevant = row["relevant"]
                cell = json.dumps(relevant) if isinstance(relevant, list) else relevant
                if path.suffix == ".tsv":
                    file.write("\t".join([row["id"], row["text"], row["image"], cell]) + "\n")
                else:
                    writer.writerow(row | {"relevant": cell})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_have_texts_images_and_relevant_rows(tmp_path, suffix):
    path = tmp_path / f"q{suffix}"
    write_rows(path, ROWS)
    queries = read_queries(path)
    assert [listed.id for listed in queries] == ["q1", "q2", "q3"]
    assert [listed.query.text for listed in queries] == ["a dog", "", "a, cat"]
    assert [listed.query.image for listed in queries] == [
        None,
        str(tmp_path / "a.jpg"),
        str(tmp_path / "sub/b.jpg"),
    ]
    assert [sorted(listed.relevant) for listed in queries] == [["r1"], ["r 2", "r1"], []]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", "\n \n", "holds no queries"),
        ("q.csv", "text,id\na dog,1\na cat,1\n", "line 3: a second query has the id '1'"),
        ("q.csv", "text,id\n,1\n", "line 2 has no query"),
        ("q.csv", "text,relevant\na dog,[1\n", "no JSON list"),
        ("q.csv", "words\na dog\n", "no query"),
        ("q.jsonl", '{"text": "a dog"}\n{"text', "line 2 is not JSON"),
        ("q.jsonl", "[1]\n", "line 1 holds a list"),
        ("q.jsonl", '{"text": 3}\n', "line 1 has no query"),
        ("q.parquet", "no parquet", "cannot be read as parquet"),
        ("q.doc", "a dog", "not '.doc'"),
        (
            "q.jsonl",
            '{"text": "a"}\n{"id": 7, "image": "a.jpg", "captions": ["b"]}\n',
            "mixes records",
        ),
    ],
)
def test_faulty_files_are_refused_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        read_queries(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no queries at .*q.csv"):
        read_queries(tmp_path / "q.csv")


# Dumps ----------------------------------------------------------------------------------------

NUM_ROWS = 50


@pytest.fixture
def searcher(tmp_path):
    vectors = make_unit_vectors(np.random.default_rng(0), NUM_ROWS)
    metadata = {
        "id": [f"r{index}" for index in range(NUM_ROWS)],
        "image_path": [f"{index // 2}.jpg" for index in range(NUM_ROWS)],
        "year": [2000 + index % 5 for index in range(NUM_ROWS)],
    }
    return make_searcher(tmp_path / "v", vectors, metadata, image_root=str(tmp_path))


TEXTS = ["a dog", "a cat", "a tree"]


@pytest.mark.parametrize("k", [0, 1, 7])
def test_dump_equals_the_product_of_all_vectors(searcher, tmp_path, k, monkeypatch):
    monkeypatch.setattr(scores_module, "MAX_BATCH_SCORES", 60)  # several batches and row groups
    (tmp_path / "q.txt").write_text("\n".join(TEXTS))
    dump = dump_scores(searcher, read_queries(tmp_path / "q.txt"), tmp_path / "s.parquet", k=k)
    table = pq.read_table(tmp_path / "s.parquet")
    num_kept = k or NUM_ROWS
    assert dump.num_scores == table.num_rows == 3 * num_kept and dump.recall == {}
    vectors = searcher.store.get_vectors([f"r{row}" for row in range(NUM_ROWS)])
    rows = table.to_pylist()
    for number, text in enumerate(TEXTS):
        own = [row for row in rows if row["query"] == str(number)]
        scores = vectors @ encode(text)
        order = np.argsort(-scores, kind="stable")[:num_kept]
        assert [row["id"] for row in own] == [f"r{row}" for row in order]
        assert [row["rank"] for row in own] == list(range(1, num_kept + 1))
        assert [row["score"] for row in own] == pytest.approx(list(scores[order]), abs=1e-6)
    assert not list(tmp_path.glob("*.partial"))


def test_filter_and_groups_of_a_dump(searcher, tmp_path):
    (tmp_path / "q.txt").write_text("a dog")
    queries = read_queries(tmp_path / "q.txt")
    out = tmp_path / "s.parquet"
    assert dump_scores(searcher, queries, out, where="year == 2001").num_scores == 10
    assert dump_scores(searcher, queries, out, group_by="image_path").num_scores == 25


def test_recall_counts_queries_with_a_relevant_row(searcher, tmp_path):
    best = [result.id for result in searcher.search("a dog", k=NUM_ROWS)]
    rows = [
        {"id": "first", "text": "a dog", "relevant": best[0]},
        {"id": "third", "text": "a dog", "relevant": [best[30], best[2]]},
        {"id": "eleventh", "text": "a dog", "relevant": [best[10]]},
        {"id": "unknown", "text": "a dog"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in (0, 1):  # recall does not depend on how much is written
        dump = dump_scores(searcher, read_queries(tmp_path / "q.jsonl"), k=k)
        assert dump.recall == {"recall@1": 1 / 3, "recall@5": 2 / 3, "recall@10": 2 / 3}
        assert (dump.num_queries, dump.num_with_relevant) == (4, 3)


def test_unknown_relevant_rows_are_refused(searcher, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "a dog", "relevant": "r99"}\n')
    with pytest.raises(ValueError, match="q.jsonl line 1: relevant: .*'r99'"):
        dump_scores(searcher, read_queries(tmp_path / "q.jsonl"))
    (tmp_path / "q.jsonl").write_text('{"id": 1, "image": "z.jpg", "captions": ["a dog"]}\n')
    with pytest.raises(ValueError, match="line 1: the image .*z.jpg is not in .*--image-root"):
        dump_scores(searcher, read_queries(tmp_path / "q.jsonl"))


def test_long_queries_are_counted(searcher, tmp_path):
    (tmp_path / "q.txt").write_text("a dog\n" + "a " * MAX_TEXT_IDS)
    queries = read_queries(tmp_path / "q.txt")
    with pytest.raises(ValueError, match="shorten it"):
        dump_scores(searcher, queries)
    lenient = Searcher(searcher.store, ToyPredictor(), refuse_long_texts=False)
    assert dump_scores(lenient, queries).num_long_texts == 1


def test_other_kinds_of_files_are_refused(searcher, tmp_path):
    with pytest.raises(ValueError, match=r"s\.npy: scores are written as \.parquet"):
        dump_scores(searcher, [], tmp_path / "s.npy")
    with pytest.raises(ValueError, match="k is -1"):
        dump_scores(searcher, [], k=-1)


# Recall of records ----------------------------------------------------------------------------


def write_records(tmp_path, seed):
    """Writes records of 30 images, and an index with a row for each caption.

    Few distinct captions and copies of images make many ties. The rows are in another order than
    the captions of the records, as `embed` puts copies last.
    """
    rng = np.random.default_rng(seed)
    root = tmp_path / f"root{seed}"
    (root / "retrieval/main").mkdir(parents=True)
    captions = [[f"t{rng.integers(12)}" for _ in range(rng.integers(1, 4))] for _ in range(30)]
    contents = [int(content) for content in rng.integers(0, 20, 30)]
    records = [
        {"id": str(number), "image": f"images/{number}.jpg", "captions": texts}
        for number, texts in enumerate(captions)
    ]
    path = root / "retrieval/main/test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "images").mkdir()
    for number in range(30):
        (root / f"images/{number}.jpg").touch()
    pairs = [(number, text) for number, texts in enumerate(captions) for text in texts]
    # Vectors of half of all captions lie near their images, or recall would be 0 at 1.
    images = np.stack([encode(f"image {content}") for content in contents])
    texts = {f"t{number}": encode(f"t{number}") for number in range(12)}
    order = rng.permutation(len(pairs))
    metadata = {
        "id": [f"p{index}" for index in order],
        "image_path": [f"images/{pairs[index][0]}.jpg" for index in order],
        "caption": [pairs[index][1] for index in order],
    }
    searcher = make_searcher(
        tmp_path / f"v{seed}",
        images[[pairs[index][0] for index in order]],
        metadata,
        text_vectors=np.stack([texts[pairs[index][1]] for index in order]),
        image_root=str(root),
    )
    expected = compute_recall(
        images,
        np.stack([texts[text] for _, text in pairs]),
        np.array([number for number, _ in pairs]),
    )
    content_of = {str(root / f"images/{number}.jpg"): contents[number] for number in range(30)}
    return path, searcher, expected, content_of


@pytest.mark.parametrize("seed", range(6))
def test_recall_of_records_equals_the_metric_in_spite_of_ties(tmp_path, seed, monkeypatch):
    path, searcher, expected, content_of = write_records(tmp_path, seed)

    class Predictor(ToyPredictor):
        def embed(self, images=(), texts=()):
            contents = [f"image {content_of[str(image)]}" for image in images]
            return super().embed(contents, texts)

    searcher = Searcher(searcher.store, Predictor())
    by_text = dump_scores(searcher, read_queries(path), group_by="image_path")
    by_image = dump_scores(searcher, read_queries(path, modality="text"), modality="text")
    assert by_image.num_queries == 30
    for k in (1, 5, 10):
        assert by_text.recall[f"recall@{k}"] == expected[f"image_recall@{k}"]
        assert by_image.recall[f"recall@{k}"] == expected[f"text_recall@{k}"]


def test_records_are_embedded_with_a_row_for_each_caption(tmp_path):
    path, *_ = write_records(tmp_path, 0)
    root = path.parents[2]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    items = list_items([path], InputOptions(image_root=str(root)))
    expected = [
        (f"{record['id']}#{number}", str(root / record["image"]), caption)
        for record in records
        for number, caption in enumerate(record["captions"])
    ]
    rows = items.table.to_pylist()
    assert [
        (row["id"], path, row["caption"])
        for row, path in zip(rows, items.list_paths(), strict=True)
    ] == expected


def test_recall_after_reranking_in_both_directions(tmp_path):
    """A reranker that knows the answer brings it to the front where it is among the candidates."""
    path, searcher, _, content_of = write_records(tmp_path, 1)
    captions = {
        str(searcher.locate_image(row)): set()
        for row in searcher.store.fetch(searcher.store.select_ids(parse_filter("id is not null")))
    }
    for record in map(json.loads, path.read_text().splitlines()):
        captions[searcher.locate_image({"image_path": record["image"]})] |= set(record["captions"])

    class KnowingReranker:
        weight = 1000.0

        def score(self, texts, images):
            pairs = zip(texts, images, strict=True)
            return np.array([float(text in captions[str(image)]) for text, image in pairs])

    for modality, group_by in (("image", "image_path"), ("text", "")):
        queries = read_queries(path, modality=modality)
        num_rows = searcher.store.num_rows
        dump = dump_scores(
            searcher,
            queries,
            group_by=group_by,
            modality=modality,
            reranker=KnowingReranker(),
            rerank_k=num_rows,
        )
        assert dump.num_scores == len(queries) * (30 if group_by else num_rows)
        # Several images may have the caption: that of the query is among them.
        assert dump.recall["recall@10"] > 0.9
