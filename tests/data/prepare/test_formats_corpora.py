"""Corpora: however they are written and wherever they are cut, the same documents; what is no
document is named."""

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3.data.prepare.formats import corpora
from beit3.data.prepare.formats.corpora import Corpus, Fault

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
READ = [text.replace("\r\n", "\n") for text in TEXTS]


def written(texts: list[str], field: str = "text") -> bytes:
    """As JSON lines, spelled in two ways, with blank lines between."""
    lines = [
        json.dumps({"n": n, field: text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(texts)
    ]
    return "\n\n".join(lines).encode() + b"\r\n"


def documents(raw: Path, field: str = "text") -> tuple[list[str], list[Fault]]:
    corpus = Corpus.open(raw, field)
    found, faults = [], []
    for span in corpus.spans:
        for document in corpus.documents(span):
            if isinstance(document, Fault):
                faults.append(document)
            else:
                found.append(document.read())
    return found, faults


def test_json_lines_and_their_packed_forms(tmp_path):
    for name in ("a.jsonl", "b.ndjson", "deep/c.JSONL"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + written(TEXTS))
    for name in ("d.jsonl.gz", "e.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(written(TEXTS)))
    (tmp_path / "no.json").write_text("{}")
    assert documents(tmp_path) == (5 * READ, [])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=30).filter(str.isprintable), max_size=12),
    part=st.integers(1, 200),
)
def test_wherever_a_file_is_cut_every_line_is_read_once(tmp_path_factory, texts, part):
    raw = tmp_path_factory.mktemp("cut")
    (raw / "a.jsonl").write_bytes(written(texts, "body") + b"{}\n")
    whole = documents(raw, "body")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PART", part)
        patch.setattr(corpora, "SKIP", 7)
        found, faults = documents(raw, "body")
        assert len(Corpus.open(raw).spans) == -(-(raw / "a.jsonl").stat().st_size // part)
    assert (found, len(faults)) == (whole[0], 1) and whole[0] == texts


def test_lines_that_are_no_documents_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST", 100)
    monkeypatch.setattr(corpora, "SKIP", 40)
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
    found, faults = documents(tmp_path)
    assert found == ["one", "two"]
    assert [fault.place for fault in faults] == [f"a.jsonl line {n}" for n in range(2, 11)]
    said = [
        "not JSON",
        "no text 'text' (--field), but txt, id",
        "but a list",
        "not JSON",
        "longer than 100 bytes",
        "'\\ud800'",
    ]
    said += ["but a NoneType", "not UTF-8 (invalid continuation byte 0xe9)", "but text"]
    assert all(words in fault.why for words, fault in zip(said, faults, strict=True)), faults


@pytest.mark.parametrize("cut", [-30, 40])
def test_a_packed_file_that_is_cut_gives_what_it_holds(tmp_path, cut):
    texts = [f"{n} " + "some words " * n for n in range(2000)]
    whole = gzip.compress(written(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:cut])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    found, (one, two) = documents(tmp_path)
    assert found == texts[: len(found)] and (len(found) > 1500) == (cut < 0)
    assert one.place == "a.jsonl.gz" and two.place == "b.jsonl.gz"
    assert "cannot be read behind line" in one.why and "get the file again" in one.why


def test_a_text_that_is_not_utf8_is_passed_over_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\r\n\r\ntwo")
    (tmp_path / "b.txt").write_bytes(b"fine\n" * 1_000_000 + b"caf\xe9\n")
    (tmp_path / "c.TXT").write_bytes(b"")
    found, (fault,) = documents(tmp_path)
    assert found == ["One\n\ntwo", ""]
    assert (
        fault.place == "b.txt"
        and "not UTF-8 (invalid continuation byte 0xe9): convert it" in fault.why
    )


def test_splits_by_folders_names_and_hash(tmp_path):
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
    found = {span.file: span.split for span in corpus.spans}
    assert [found[name] for name in names] == ["train", "test", "val", "train", "train", "train"]
    assert {corpus.named(corpus.spans[1], n)[0] for n in range(500)} == {corpus.spans[1].split}, (
        "there is a val already"
    )
    (tmp_path / "c4-validation.00000.json.gz").unlink()
    corpus = Corpus.open(tmp_path)
    span = next(span for span in corpus.spans if span.file == "x.jsonl")
    assert (
        corpus.named(span, 7)[1] == "x.jsonl:7"
        and corpus.named(span._replace(start=9), 7)[1] == "x.jsonl@9:7"
    )
    assert 20 < sum(corpus.named(span, n)[0] == "val" for n in range(1000)) < 80


def test_of_large_corpora_less_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "HELD_OUT_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 1000)
    assert Corpus.open(tmp_path).held_out == 0.01
    (tmp_path / "a.txt").write_text("x" * 20)
    assert Corpus.open(tmp_path).held_out == 0.05


def test_packages_that_are_absent_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError,
        match=r"a.parquet needs a package that is not there: pip install 'beit3\[parquet\]'",
    ):
        Corpus.open(tmp_path)


# With pyarrow -------------------------------------------------------------------------------------


def test_parquet(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet")
    from pyarrow import parquet

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
    found, faults = documents(tmp_path)
    assert found == [*READ, "ok"]
    assert [fault.place for fault in faults] == [
        "a.parquet row 9",
        "b.parquet row 1",
        "c.parquet",
        "e.parquet",
    ]
    said = [
        "no text 'text'",
        "not UTF-8",
        "no column 'text' (--field), but body",
        "cannot be read behind row 0",
    ]
    assert all(words in fault.why for words, fault in zip(said, faults, strict=True)), faults
    monkeypatch.setattr(corpora, "PART", 1)
    monkeypatch.setattr(corpora, "ROWS", 1)
    assert documents(tmp_path)[0] == found
    assert [span.name for span in Corpus.open(tmp_path).spans][:3] == [
        "a.parquet",
        "a.parquet@1",
        "a.parquet@2",
    ]


def test_zstandard(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow reads Zstandard")
    whole = written([f"{n} words" for n in range(5000)])
    packed = arrow.compress(whole[:9000], "zstd", asbytes=True) + arrow.compress(
        whole[9000:], "zstd", asbytes=True
    )
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert documents(tmp_path)[0] == [f"{n} words" for n in range(5000)]
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-100])
    (tmp_path / "b.jsonl.zst").write_bytes(io.BytesIO(b"none").read())
    found, faults = documents(tmp_path)
    assert 0 < len(found) < 5000 and [fault.place for fault in faults] == [
        "a.jsonl.zst",
        "b.jsonl.zst",
    ]
