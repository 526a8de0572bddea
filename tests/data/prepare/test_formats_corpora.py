"""Corpora give the same documents however they are written and wherever they are cut;
what is not a document is a fault."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from beit3.data.prepare.formats import corpora, documents
from beit3.data.prepare.formats.corpora import Corpus
from beit3.data.prepare.formats.documents import Fault

TEXTS = [
    "One two.",
    "",
    "Zwei „drei“ 語\n\nvier",
    "x" * 300,
    "five\r\nsix",
    "  ",
    "\ufeffseven",
    "\U0001f600",
]
DECODED_TEXTS = [text.replace("\r\n", "\n") for text in TEXTS]


def encode_lines(texts: list[str], field: str = "text") -> bytes:
    """Returns texts as JSON lines, written in two ways, with blank lines between."""
    lines = [
        json.dumps({"n": n, field: text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(texts)
    ]
    return "\n\n".join(lines).encode() + b"\r\n"


def read_documents(raw: Path, field: str = "text") -> tuple[list[str], list[Fault]]:
    corpus = Corpus.open(raw, field)
    texts_read, faults = [], []
    for span in corpus.spans:
        for document in corpus.read_documents(span):
            if isinstance(document, Fault):
                faults.append(document)
            else:
                texts_read.append(document.read())
    return texts_read, faults


def test_json_lines_are_read_plain_and_compressed(tmp_path):
    for name in ("a.jsonl", "b.ndjson", "deep/c.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + encode_lines(TEXTS))
    for name in ("d.jsonl.gz", "e.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(encode_lines(TEXTS)))
    (tmp_path / "no.json").write_text("{}")
    assert read_documents(tmp_path) == (5 * DECODED_TEXTS, [])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30).filter(str.isprintable), max_size=12),
    part=st.integers(1, 200),
)
def test_every_line_is_read_once_wherever_a_file_is_cut(tmp_path_factory, texts, part):
    raw = tmp_path_factory.mktemp("cut")
    (raw / "a.jsonl").write_bytes(encode_lines(texts, "body") + b"{}\n")
    expected = read_documents(raw, "body")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PART_BYTES", part)
        patch.setattr(documents, "SKIP_BYTES", 7)
        texts_read, faults = read_documents(raw, "body")
        assert len(Corpus.open(raw).spans) == -(-(raw / "a.jsonl").stat().st_size // part)
    assert (texts_read, len(faults)) == (expected[0], 1) and expected[0] == texts


def test_lines_that_are_not_documents_are_faults(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(documents, "SKIP_BYTES", 40)
    lines = [
        '{"text": "one"}',
        "{",
        '{"txt": "x", "id": 7}',
        "[1]",
        "[" * 60,
        f'{{"text": "{"x" * 500}"}}',
        '{"text": "\\ud800"}',
        "null",
    ]
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n{"text": 3}\n{"text": "two"}'
    )
    texts_read, faults = read_documents(tmp_path)
    assert texts_read == ["one", "two"]
    assert [fault.location for fault in faults] == [f"a.jsonl line {n}" for n in range(2, 11)]
    reasons = [
        "not JSON",
        "no text 'text' (--field), but txt, id",
        "but a list",
        "not JSON",
        "longer than 100 bytes",
        "'\\ud800'",
    ]
    reasons += ["but a NoneType", "not UTF-8 (invalid continuation byte 0xe9)", "but text"]
    assert all(words in fault.reason for words, fault in zip(reasons, faults, strict=True)), faults


@pytest.mark.parametrize("cut", [-30, 40])
def test_a_cut_compressed_file_gives_the_documents_before_the_cut(tmp_path, cut):
    texts = [f"{n} " + "some words " * n for n in range(2000)]
    expected = gzip.compress(encode_lines(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(expected[:cut])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    texts_read, (first, second) = read_documents(tmp_path)
    assert texts_read == texts[: len(texts_read)] and (len(texts_read) > 1500) == (cut < 0)
    assert first.location == "a.jsonl.gz" and second.location == "b.jsonl.gz"
    assert "cannot be read beyond line" in first.reason and "get the file again" in first.reason


def test_a_text_that_is_not_utf8_is_skipped_as_a_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\n\r\ntwo")
    (tmp_path / "b.txt").write_bytes(b"fine\n" * 1_000_000 + b"caf\xe9\n")
    (tmp_path / "c.TXT").write_bytes(b"")
    texts_read, (fault,) = read_documents(tmp_path)
    assert texts_read == ["One\n\ntwo", ""]
    assert (
        fault.location == "b.txt"
        and "not UTF-8 (invalid continuation byte 0xe9): convert it" in fault.reason
    )


def test_splits_come_from_folders_names_and_hash(tmp_path):
    names = [
        "train/a.txt",
        "test/a.jsonl",
        "c4-validation.00000.json.gz",
        "c4-train.jsonl",
        "test.txt",
        "x.jsonl",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "gz" not in name else gzip.compress(b""))
    corpus = Corpus.open(tmp_path)
    split_by_file = {span.file: span.split for span in corpus.spans}
    assert [split_by_file[name] for name in names] == [
        "train",
        "test",
        "val",
        "train",
        "train",
        "train",
    ]
    assert {corpus.name_record(corpus.spans[1], n)[0] for n in range(500)} == {
        corpus.spans[1].split
    }, "there is a val already"
    (tmp_path / "c4-validation.00000.json.gz").unlink()
    corpus = Corpus.open(tmp_path)
    span = next(span for span in corpus.spans if span.file == "x.jsonl")
    assert (
        corpus.name_record(span, 7)[1] == "x.jsonl:7"
        and corpus.name_record(span._replace(start=9), 7)[1] == "x.jsonl@9:7"
    )
    assert 20 < sum(corpus.name_record(span, n)[0] == "val" for n in range(1000)) < 80


def test_a_smaller_fraction_of_large_corpora_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "HELD_OUT_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 1000)
    assert Corpus.open(tmp_path).held_out == 0.01
    (tmp_path / "a.txt").write_text("x" * 20)
    assert Corpus.open(tmp_path).held_out == 0.05


# Parquet, Zstandard -------------------------------------------------------------------------------


def test_parquet_rows_are_documents(tmp_path, monkeypatch):
    table = arrow.table({"n": [*range(9)], "text": [*TEXTS, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    raw = [("b", "data"), ("c", "data")]
    wrong = arrow.table(
        {
            name: arrow.array([b"\xff", b"ok"], arrow.binary()).view(arrow.string())
            for name, _ in raw[:1]
        }
    )
    parquet.write_table(wrong.rename_columns(["text"]), tmp_path / "b.parquet")
    parquet.write_table(arrow.table({"body": ["x"]}), tmp_path / "c.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    texts_read, faults = read_documents(tmp_path)
    assert texts_read == [*DECODED_TEXTS, "ok"]
    assert [fault.location for fault in faults] == [
        "a.parquet row 9",
        "b.parquet row 1",
        "c.parquet",
        "e.parquet",
    ]
    reasons = [
        "no text 'text'",
        "not UTF-8",
        "no column 'text' (--field), but body",
        "cannot be read beyond row 0",
    ]
    assert all(words in fault.reason for words, fault in zip(reasons, faults, strict=True)), faults
    monkeypatch.setattr(corpora, "PART_BYTES", 1)
    monkeypatch.setattr(documents, "BATCH_ROWS", 1)
    assert read_documents(tmp_path)[0] == texts_read
    assert [span.name for span in Corpus.open(tmp_path).spans][:3] == [
        "a.parquet",
        "a.parquet@1",
        "a.parquet@2",
    ]


def test_zstandard_lines_are_documents(tmp_path):

    expected = encode_lines([f"{n} words" for n in range(5000)])
    packed = arrow.compress(expected[:9000], "zstd", asbytes=True) + arrow.compress(
        expected[9000:], "zstd", asbytes=True
    )
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read_documents(tmp_path)[0] == [f"{n} words" for n in range(5000)]
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-100])
    (tmp_path / "b.jsonl.zst").write_bytes(io.BytesIO(b"none").read())
    texts_read, faults = read_documents(tmp_path)
    assert 0 < len(texts_read) < 5000 and [fault.location for fault in faults] == [
        "a.jsonl.zst",
        "b.jsonl.zst",
    ]
