"""`beit3 demo --fast` from end to end: interrupted, resumed, finished, and run again without
training."""

import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from beit3 import cli
from beit3.cli.app import read_command
from beit3.cli.serve import serve
from beit3.demo import tour
from beit3.demo.tables import TASK_SCORES
from beit3.serve.service import parse_weights
from tests.training.runs import find_newest_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "run"


def read_mtimes(out: Path) -> dict[Path, int]:
    """Returns when the tensors of each checkpoint and of all weights were written, in ns."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def interrupt_when_written(path: Path, stop: threading.Event) -> None:
    """Sends Ctrl-C to this process once `path` has a line.

    The file exists before the first step, when nothing can be saved yet.
    """
    while not stop.wait(0.05):
        if path.exists() and path.stat().st_size:
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_ctrl_c_leaves_a_run_that_can_be_resumed(out, capsys):
    # Libraries that earlier tests of this process load may have taken the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Event()
    metrics = out / "vqkd" / "metrics.jsonl"
    watch = threading.Thread(target=interrupt_when_written, args=(metrics, stop))
    watch.start()
    try:
        status = cli.main(["demo", "--fast", "--out", str(out)])
    finally:
        stop.set()
        watch.join()
    captured = capsys.readouterr()
    assert status == 130 and "resumes it" in captured.err
    assert not (out / "pairs").exists()
    assert (find_newest_checkpoint(out / "vqkd") / "checkpoint.json").is_file()


def test_the_same_command_resumes_and_finishes(out, capsys):
    assert cli.main(["demo", "--fast", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    words = shlex.split(printed.splitlines()[-1])
    verb, options = read_command(words[1:])
    assert words[0] == "beit3" and verb is serve
    weights = parse_weights(options["weights"])
    assert weights["vqa"] == str(out / "vqa") and {"retrieval", "coco"} <= set(weights)
    assert set(weights) <= {"vqa", *TASK_SCORES}
    assert "held-out records" in printed and "most frequent" in printed and "report.html" in printed
    page = (out / "report.html").read_text()
    assert len(page) > 50_000
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page, (
        "the page must stand alone"
    )
    for phrase in (
        "Visual tokenizer",
        "Pretraining",
        "question answering",
        "questions answered",
        "from scratch",
        "frequent answer",
        "CIDEr",
        "recall",
    ):
        assert phrase in page


def test_the_command_that_serves_starts_the_program_that_ran(tmp_path, monkeypatch):
    """It is one line for a shell; of an environment that is not active it names the path."""
    runs = [Path("runs/my demo/vqa"), Path("runs/my demo/coco")]
    programs = []
    for folder in ("active", "other"):
        program = tmp_path / folder / "beit3"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        programs.append(str(program))
    monkeypatch.setenv("PATH", str(tmp_path / "active"))
    for started, named in ((programs[0], "beit3"), (programs[1], programs[1])):
        monkeypatch.setattr(sys, "argv", [started, "demo"])
        words = shlex.split(tour.format_serve_command(runs))
        assert words == [named, "serve", "runs/my demo/vqa", "runs/my demo/coco"]
    monkeypatch.setattr(sys, "argv", ["/site-packages/beit3/__main__.py", "demo"])
    assert tour.format_serve_command(runs).startswith("beit3 serve ")


def test_make_demo_installs_what_its_last_line_needs():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (extras,) = re.findall(r"^\$\(VENV\)/\.package:.*\n.*'\.\[(.*)\]'$", makefile, re.M)
    assert set(extras.split(",")) == {"dense", "serve"}


def test_finished_stages_are_not_run_again(out, capfd, monkeypatch):
    """The report, which takes most of the time then, is only asked for."""
    before = read_mtimes(out)
    reported: list[Path] = []

    def list_runs(runs, path, **options):
        reported.extend(runs)
        return path

    monkeypatch.setattr(tour, "write_report", list_runs)
    assert {path.parts[len(out.parts) + 1] for path in before} == {"checkpoints", "last", "best"}
    started = time.monotonic()
    assert cli.main(["demo", "--fast", "--out", str(out)]) == 0
    assert read_mtimes(out) == before
    assert {path.parent for path in out.rglob("recipe.json")} == set(reported)
    assert "step 1/" not in capfd.readouterr().out
    assert time.monotonic() - started < 60  # a bound on hanging, not a timing
