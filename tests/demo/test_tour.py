"""`beit3 demo --fast`, whole: stopped, gone on with, finished, and run again without work."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from beit3 import cli
from tests.training.runs import find_newest_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "run"


def stored(out: Path) -> dict[Path, int]:
    """When the tensors of each checkpoint and of all weights were written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def interrupt_when(path, stop: threading.Event) -> None:
    """Send Ctrl-C to this process once `path` has a line: the file is there before the first step,
    when nothing can be saved yet."""
    while not stop.wait(0.05):
        if path.exists() and path.stat().st_size:
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_ctrl_c_leaves_a_run_that_goes_on(out, capsys):
    stop = threading.Event()
    watch = threading.Thread(target=interrupt_when, args=(out / "vqkd" / "metrics.jsonl", stop))
    watch.start()
    try:
        status = cli.main(["demo", "--fast", "--out", str(out)])
    finally:
        stop.set()
        watch.join()
    captured = capsys.readouterr()
    assert status == 130 and "resumes it" in captured.err
    assert (
        not (out / "pairs").exists()
        and (find_newest_checkpoint(out / "vqkd") / "checkpoint.json").is_file()
    )


def test_the_same_command_finishes_it(out, capsys):
    assert cli.main(["demo", "--fast", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "held-out records" in printed and "most frequent" in printed and "report.html" in printed
    page = (out / "report.html").read_text()
    assert len(page) > 50_000
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page, (
        "the page must stand alone"
    )
    words = (
        "Visual tokenizer",
        "Pretraining",
        "question answering",
        "questions answered, from scratch",
        "frequent answer",
    )
    for word in (*words, "CIDEr", "recall", "statements"):
        assert word in page


def test_finished_stages_are_not_run_again(out, capsys):
    before = stored(out)
    assert {path.parts[len(out.parts) + 1] for path in before} == {"checkpoints", "last", "best"}
    started = time.monotonic()
    assert cli.main(["demo", "--fast", "--out", str(out)]) == 0
    assert stored(out) == before
    assert "step 1/" not in capsys.readouterr().out
    assert time.monotonic() - started < 60  # a bound on hanging, not a timing
