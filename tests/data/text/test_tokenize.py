"""Tokenizing corpora equals a slow implementation, in parallel and after interruptions."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from beit3.cli import main
from beit3.data.prepare.formats import corpora
from beit3.data.prepare.statistics import RecordStatistics, TokenCounter, describe
from beit3.data.stores.records import Records, write_records
from beit3.data.stores.tokens import Tokens
from beit3.data.text import tokenize
from beit3.data.text.packing import Packer
from beit3.data.text.tokenize import remove_unused_arrays, write_tokens
from beit3.tasks.pretrain import Pretrain
from beit3.tokenizer.text import TextTokenizer

DOCUMENTS = sorted((Path(__file__).resolve().parents[3] / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    texts = [line for path in DOCUMENTS for line in path.read_text().splitlines()]
    return TextTokenizer.train(texts, vocab_size=500, model_type="bpe")


@pytest.fixture
def raw(tmp_path) -> Path:
    """Writes the documents of this project as text, JSON lines and gzip; one line is not JSON."""
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [path.read_text()[:6000] for path in DOCUMENTS]
    for name, text in zip("abc", texts[:3], strict=True):
        (raw / f"{name}.txt").write_text(text)
    lines = [
        json.dumps({"text": line}) for text in texts[3:6] for line in [*text.splitlines(), "", " "]
    ]
    (raw / "d.jsonl").write_text("\n".join([*lines, "no JSON"]))
    (raw / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[6]}).encode()))
    return raw


@pytest.fixture
def parts(monkeypatch) -> None:
    """Makes parts of 3000 bytes."""
    monkeypatch.setattr(corpora, "PART_BYTES", 3000)
    monkeypatch.setattr(tokenize, "PART_BYTES", 3000)


def hash_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(call: Callable[[], object], *phrases: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and all(phrase in str(error.value) for phrase in phrases), (
        error.value
    )


# What is written ------------------------------------------------------------------------------


def tokenize_slowly(
    raw: Path, tokenizer: TextTokenizer, pack: int
) -> tuple[list[dict], RecordStatistics]:
    """Returns the records of `raw` and their statistics, one document at a time, without parts."""
    records, numbers = [], Counter[str]()
    statistics = RecordStatistics(
        TokenCounter(
            tokenizer.encode_pieces, pack, tokenizer.unk, tokenizer.mask - tokenizer.first_piece
        )
    )
    for path in sorted(raw.iterdir()):
        content = (
            gzip.decompress(path.read_bytes()).decode()
            if path.suffix == ".gz"
            else path.read_text()
        )
        lines = content.split("\n") if ".jsonl" in path.name else [json.dumps({"text": content})]
        for line in lines:
            if line.startswith("{"):
                for ids in Packer(tokenizer.encode_pieces, pack).pack(
                    io.StringIO(json.loads(line)["text"])
                ):
                    numbers[path.name] += 1
                    text = np.frombuffer(ids, np.uint16).tolist()
                    records.append({"id": f"{path.name}:{numbers[path.name]}", "text": text})
                    statistics.sizes[len(text) + 2] += 1
                    statistics.tokens, statistics.unknown = (
                        statistics.tokens + len(text),
                        statistics.unknown + text.count(tokenizer.unk),
                    )
                    statistics.seen.update(text)
    return records, statistics


@pytest.mark.parametrize("pack", [16, 512])
def test_tokens_equal_a_slow_second_implementation(raw, tokenizer, tmp_path, pack):
    report = write_tokens(raw, tmp_path / "texts", tokenizer, pack=pack, workers=1, bad_share=0.1)
    records, statistics = tokenize_slowly(raw, tokenizer, pack)
    written = {split: [*Tokens(tmp_path / f"texts/{split}.tokens")] for split in report["records"]}
    assert {split: len(rows) for split, rows in written.items()} == report["records"]
    assert written.keys() <= {"train", "val"}
    assert sorted(
        (row for rows in written.values() for row in rows), key=lambda row: row["id"]
    ) == sorted(records, key=lambda row: row["id"])
    for rows in written.values():
        indices = [records.index(row) for row in rows]
        assert indices == sorted(indices), "in the order of the files"
    assert report | statistics.report() == report and report["tokens"] == statistics.tokens
    assert report["documents"] == 4 + len((raw / "d.jsonl").read_text().split("\n")) - 1
    (fault,) = report["passed_over"]
    assert fault.startswith("d.jsonl line ") and "is not JSON" in fault
    assert fault in describe(report) and f"tokens       {statistics.tokens}" in describe(report)


def test_the_size_of_parts_changes_only_the_ids_of_records(raw, tokenizer, tmp_path, parts):
    write_tokens(raw, tmp_path / "texts", tokenizer, pack=64, workers=1, bad_share=0.1)
    rows = [row for path in sorted((tmp_path / "texts").glob("*.tokens")) for row in Tokens(path)]
    records, _ = tokenize_slowly(raw, tokenizer, 64)
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in records)
    assert len({row["id"] for row in rows}) == len(rows) and any(
        "d.jsonl@3000:1" == row["id"] for row in rows
    )


def test_two_processes_equal_one(raw, tokenizer, tmp_path, parts):
    reports = [
        write_tokens(raw, tmp_path / f"{n}", tokenizer, pack=64, workers=n, bad_share=0.1)
        for n in (1, 2)
    ]
    assert reports[0] == reports[1] and hash_files(tmp_path / "1") == hash_files(tmp_path / "2")
    assert len(hash_files(tmp_path / "1")) == 4 * len(reports[0]["records"]), (
        "no other file is left"
    )


class LargeTokenizer:
    """A tokenizer of more than 65536 pieces, which are numbers."""

    unk, first_piece, mask, digest, vocab_size = 3, 4, 99_999, "wide", 100_000

    def encode_pieces(self, text: str) -> list[int]:
        return [int(word) if word.isdecimal() else 4 for word in text.split()]

    def id_to_piece(self, id: int) -> str:
        return f" {id}"


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    (tmp_path / "raw/val").mkdir(parents=True)
    (tmp_path / "raw/val/a.txt").write_text("70000 5 99998 65536")
    write_tokens(tmp_path / "raw", tmp_path / "texts", LargeTokenizer(), pack=5, workers=1)
    tokens = Tokens(tmp_path / "texts/val.tokens")
    assert [row["text"] for row in tokens] == [[70000, 5, 99998], [65536]]
    assert np.load(tmp_path / "texts/tokens-1/val.ids.npy").dtype == np.uint32


# Interrupted runs -----------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in place of a power failure."""


def test_a_run_killed_anywhere_and_continued_has_the_same_result(
    raw, tokenizer, tmp_path, parts, monkeypatch
):
    """It is killed before and after each write; old records stay in use until the end."""

    def run(folder: Path) -> dict:
        return write_tokens(raw, folder, tokenizer, pack=64, workers=1, bad_share=0.1)

    def count_steps(call: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            step()
            result = call(*args, **kwargs)
            step()
            return result

        return wrapped

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == deadline:
            os._exit(9)

    def call_and_log(job: tokenize.TokenizeJob, number: int, spans: tuple) -> None:
        call(job, number, spans)
        with log.open("a") as file:
            file.write(f"{number}\n")

    expected, folder, log = run(tmp_path / "whole"), tmp_path / "texts", tmp_path / "log"
    write_records(folder / "train.jsonl", [{"id": "old", "text": "old"}])
    call = tokenize.TokenizeJob.__call__
    monkeypatch.setattr(tokenize.TokenizeJob, "__call__", call_and_log)
    for module, name in (
        (tokenize, "write_text"),
        (os, "fsync"),
        (Path, "unlink"),
        (Path, "replace"),
    ):
        monkeypatch.setattr(module, name, count_steps(getattr(module, name)))
    status, deadline = 9, 2
    while (
        status == 9 and not (folder / "train.tokens").exists()
    ):  # every time from where the last one was killed
        steps, deadline, child = 0, deadline + 11, os.fork()
        if not child:
            os._exit(0 if run(folder) == expected else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert (folder / "train.jsonl").exists() or len(
            Tokens(folder / "train.tokens")
        ) == expected["records"]["train"]
    assert status in (0, 9) and deadline > 50, "it may be killed while it cleans up"
    complete, resumed = hash_files(tmp_path / "whole/tokens-1"), hash_files(folder / "tokens-1")
    assert {name: resumed[name] for name in complete} == complete
    assert status or resumed == complete
    finished = log.read_text().split()
    assert len(set(finished)) == len(finished) > 5, "no part is tokenized twice"


def test_other_files_or_settings_start_again(raw, tokenizer, tmp_path, parts, monkeypatch):
    def run(pack: int, *, stop: int = -1) -> None:
        job = tokenize.TokenizeJob.__call__
        with monkeypatch.context() as patch:
            patch.setattr(
                tokenize.TokenizeJob,
                "__call__",
                lambda self, n, spans: killed() if n == stop else job(self, n, spans),
            )
            write_tokens(raw, tmp_path / "texts", tokenizer, pack=pack, workers=1, bad_share=0.1)

    def killed() -> None:
        raise Killed

    for pack in (64, 32):
        with pytest.raises(Killed):
            run(pack, stop=2)
    (raw / "f.txt").write_text("More.")
    run(32)
    write_tokens(raw, tmp_path / "whole", tokenizer, pack=32, workers=1, bad_share=0.1)
    assert [*Tokens(tmp_path / "texts/train.tokens")] == [*Tokens(tmp_path / "whole/train.tokens")]
    assert [path.name for path in (tmp_path / "texts").glob("tokens-*")] == ["tokens-3"], (
        "unfinished arrays are removed"
    )


@pytest.mark.slow
def test_the_workers_of_a_killed_run_end_and_the_next_run_continues(tokenizer, tmp_path):
    """Finished parts are not tokenized again."""
    (tmp_path / "raw").mkdir()
    for n in range(40):
        (tmp_path / f"raw/{n}.txt").write_text(" ".join(f"word{n}x{i}." for i in range(40_000)))
    tokenizer.save(tmp_path / "root/text.model")
    code = f"""
from pathlib import Path
from beit3.data.text import tokenize
from beit3.tokenizer.text import TextTokenizer
if __name__ == "__main__":
    tokenize.PART = 1
    folder = Path({str(tmp_path)!r})
    tokenizer = TextTokenizer(folder / "root/text.model")
    tokenize.write_tokens(folder / "raw", folder / "texts", tokenizer, pack=512, workers=2)
"""
    (tmp_path / "run.py").write_text(code)
    first = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], start_new_session=True)
    place = tmp_path / "texts/tokens-1"
    while not (place / "000004.json").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(3)
    summaries = {path.name: path.stat().st_mtime_ns for path in place.glob("0*.json")}
    time.sleep(2)
    assert (
        summaries == {path.name: path.stat().st_mtime_ns for path in place.glob("0*.json")}
        and len(summaries) < 40
    )
    assert not (tmp_path / "texts/train.tokens").exists()
    subprocess.run([sys.executable, str(tmp_path / "run.py")], check=True)
    expected = write_tokens(tmp_path / "raw", tmp_path / "whole", tokenizer, pack=512, workers=1)
    assert len(Tokens(tmp_path / "texts/train.tokens")) == expected["records"]["train"]
    assert hash_files(tmp_path / "texts") == hash_files(tmp_path / "whole")


# Refusals -------------------------------------------------------------------------------------


def test_too_many_faults_leave_existing_records(raw, tokenizer, tmp_path):
    folder = tmp_path / "root/pretrain/texts"
    write_records(folder / "train.jsonl", [{"id": "old", "text": "old"}])
    before = hash_files(tmp_path)

    def run(**options) -> object:
        return write_tokens(raw, folder, tokenizer, **{"pack": 64, "workers": 1} | options)

    assert_refused(
        lambda: run(bad_share=0.001),
        "1 of ",
        "0% are allowed (--bad_share), nothing was written: d.jsonl line ",
    )
    assert_refused(
        lambda: run(field="body"), "documents are unusable", "no text 'body' (--field), but text"
    )
    assert_refused(lambda: run(pack=2), "pack 2 leaves no room")
    assert hash_files(tmp_path) == before
    for path in raw.iterdir():
        path.unlink()
    assert_refused(run, "no texts found for pretrain", "check --raw")
    assert_refused(
        lambda: write_tokens(raw / "absent", tmp_path / "new/texts", tokenizer, pack=64),
        "raw folder",
        "does not exist",
    )
    assert_refused(
        lambda: write_tokens(raw, tmp_path / "new/texts", tokenizer, pack=64), "no texts found"
    )
    assert (
        hash_files(tmp_path).keys() == {"root/pretrain/texts/train.jsonl"}
        and not (tmp_path / "new").exists()
    )


def test_a_wrong_field_is_reported_early(raw, tokenizer, tmp_path, parts, monkeypatch):
    monkeypatch.setattr(tokenize, "MAX_NAMED_FAULTS", 3)
    (raw / "0.jsonl").write_text('{"body": "x"}\n' * 5)
    (raw / "1.txt").write_text("x" * 3000)
    assert_refused(
        lambda: write_tokens(raw, tmp_path / "texts", tokenizer, pack=64, workers=1),
        "none of the first 3 documents can be used: 0.",
    )
    (raw / "0.jsonl").write_text('{"body": "x"}\n' * 5 + '{"text": "x"}\n')
    report = write_tokens(raw, tmp_path / "texts", tokenizer, pack=64, workers=1, bad_share=0.5)
    assert report["more_passed_over"] == 2 and len(report["passed_over"]) == 3 + 1


def test_two_runs_at_once_are_refused(raw, tokenizer, tmp_path, monkeypatch):
    def run_again(*args) -> None:
        assert_refused(
            lambda: write_tokens(raw, tmp_path / "texts", tokenizer, pack=64),
            "tokens-1 is being written by another process",
        )
        remove_unused_arrays(tmp_path / "texts")
        assert (tmp_path / "texts/tokens-1/plan.json").exists()
        raise Killed

    monkeypatch.setattr(tokenize.TokenizeJob, "__call__", run_again)
    with pytest.raises(Killed):
        write_tokens(raw, tmp_path / "texts", tokenizer, pack=64, workers=1)
    with FileLock(tmp_path / "texts/tokens-1/lock", timeout=0):
        pass


def test_a_tokenizer_that_joins_words_is_refused(raw, tmp_path):
    class Joining(LargeTokenizer):
        def id_to_piece(self, id: int) -> str:
            return " of the" if id == 7 else f" {id}"

    class Bare(LargeTokenizer):
        def encode_pieces(self, text: str) -> list[int]:
            return [4] * len(text)

    for tokenizer in (Joining(), Bare()):
        assert_refused(
            lambda tokenizer=tokenizer: write_tokens(raw, tmp_path / "texts", tokenizer, pack=64),
            "joins words",
            "--pack 0",
        )


# The command line -----------------------------------------------------------------------------


def test_prepare_writes_token_ids_or_paragraphs_and_replaces_the_other(tokenizer, tmp_path, capsys):
    raw, root = tmp_path / "raw", tmp_path / "root"
    raw.mkdir()
    (raw / "one.txt").write_text("One two three. Four five.\n\nSix seven.\n")
    (raw / "more.jsonl").write_text('{"body": "Eight."}\n')
    command = [
        "prepare",
        "pretrain",
        "--raw",
        str(raw),
        "--root",
        str(root),
        "--source",
        "texts",
        "--field",
        "body",
    ]
    assert (
        main(command) == 2
        and f"write {root / 'text.model'} first" in capsys.readouterr().err
        and not root.exists()
    )
    tokenizer.save(root / "text.model")
    texts = root / "pretrain/texts"

    def prepare(*options: str) -> list[str]:
        assert main([*command, *options]) == 0
        assert json.loads(capsys.readouterr().out)["records"] == {
            "train": len(rows := [*(Tokens if not options else Records)(path())])
        }
        return sorted(row["text"] if options else tokenizer.decode(row["text"]) for row in rows)

    def path() -> Path:
        (file,) = (path for path in texts.iterdir() if path.is_file())
        return file

    for _ in range(2):
        assert prepare() == ["Eight.", "One two three. Four five. Six seven."]
        assert sorted(path.suffix for path in texts.iterdir()) == ["", ".tokens"]
        assert prepare("--pack", "0") == ["Eight.", "One two three. Four five.", "Six seven."]
        assert sorted(path.name for path in texts.iterdir()) == ["train.jsonl"]
    for options, message in (
        (("--pack", "2"), "leaves no room"),
        (("--pack", "-3"), "a whole number"),
        (("--field",), "expected a name"),
    ):
        assert main([*command, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert Pretrain.prepare(raw, root, "texts", field="body", workers=1)["records"] == {"train": 2}
