"""The directory of a run: one run at a time, its own run only, and a process that is asked to stop
leaves it whole."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.cli import main
from beit3.tasks.vqa import VQA
from beit3.tokenizer.text import TextTokenizer
from beit3.training import directory
from beit3.training.directory import (
    LOCK_FILE,
    RECIPE_FILE,
    USER_FILE,
    check_same_run,
    describe_environment,
    describe_git_commit,
    describe_inputs,
    find_first_difference,
    is_finished,
    lock_run_directory,
)
from tests.training.runs import assert_same_run, read_metrics
from tests.world_root import make_vqa_recipe

SOURCE = Path(__file__).resolve().parents[2] / "src"
CPU = torch.device("cpu")
MINE = {"task": "vqa", "recipe": {"optim": {"lr": 0.1}, "run": {"steps": 3}}}

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
"""Another process that has the lock; starting torch for it would take seconds."""

HELD = """
import sys, time
from pathlib import Path
from beit3 import cli
from beit3.training import loop
hold, seed_step = Path(sys.argv.pop(1)), loop.seed_step
def held(seed, step):
    while step == 2 and hold.exists():
        time.sleep(0.02)
    seed_step(seed, step)
loop.seed_step = held
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command line, whose third step lasts as long as a file exists."""


def until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not there():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=1)
        time.sleep(0.02)


# One run at a time --------------------------------------------------------------------------------


def test_a_claim_writes_who_and_what_and_lets_go(tmp_path, monkeypatch):
    out = tmp_path / "runs" / "run"
    with lock_run_directory(out, MINE, CPU):
        assert (out / USER_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        kept = json.loads((out / RECIPE_FILE).read_text())
        assert kept.pop("environment")["device"] == "cpu" and kept == MINE
        with pytest.raises(ValueError) as error, lock_run_directory(out, MINE, CPU):
            raise AssertionError("both are in")
        assert str(error.value) == (
            f"{out} is in use by process {os.getpid()} on {socket.gethostname()}: wait for it, "
            "stop it, or give another --out"
        )
        assert (out / USER_FILE).exists(), "the first is undisturbed"
    assert sorted(path.name for path in out.iterdir()) == sorted([LOCK_FILE, RECIPE_FILE]), (
        "the user goes, the lock file stays"
    )
    written = (out / RECIPE_FILE).read_text()
    monkeypatch.setattr(sys, "argv", ["another command"])
    with pytest.raises(KeyError), lock_run_directory(out, MINE, CPU):
        raise KeyError
    with lock_run_directory(out, MINE, CPU):
        assert (out / RECIPE_FILE).read_text() == written, (
            "a resume keeps where the run was started"
        )


def test_another_process_has_the_directory_until_it_is_killed(tmp_path):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / LOCK_FILE)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for user in ("another process", "process 7 on elsewhere"):
            with (
                pytest.raises(ValueError, match=f"run is in use by {user}: wait for it"),
                lock_run_directory(tmp_path / "run", MINE, CPU),
            ):
                raise AssertionError("both are in")
            (tmp_path / "run" / USER_FILE).write_text("process 7 on elsewhere")
        assert not (tmp_path / "run" / RECIPE_FILE).exists(), (
            "nothing is written before the lock is ours"
        )
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock_run_directory(tmp_path / "run", MINE, CPU):
            assert (tmp_path / "run" / USER_FILE).read_text().startswith(f"process {os.getpid()} ")
    finally:
        holder.kill()
        holder.communicate()


# Its own run only ---------------------------------------------------------------------------------


def test_an_empty_or_new_directory_is_taken(tmp_path):
    check_same_run(tmp_path / "new", MINE)
    for name in (LOCK_FILE, USER_FILE):
        (tmp_path / name).touch()
        check_same_run(tmp_path, MINE)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run: give another --out"):
        check_same_run(tmp_path, MINE)
    with pytest.raises(ValueError, match="photo.jpg is not empty and holds no run"):
        check_same_run(tmp_path / "photo.jpg", MINE)


def test_another_run_is_refused_by_the_field_that_differs(tmp_path):
    with lock_run_directory(tmp_path, MINE, CPU):
        pass
    check_same_run(tmp_path, MINE)
    before = (tmp_path / RECIPE_FILE).read_text()
    other = MINE | {"recipe": {"optim": {"lr": 0.2}, "run": {"steps": 3}}}
    with pytest.raises(
        ValueError, match=r"holds another run \(its recipe\.optim\.lr differs\): give another --out"
    ):
        check_same_run(tmp_path, other)
    with pytest.raises(ValueError) as error, lock_run_directory(tmp_path, other, CPU):
        raise AssertionError("it holds another run")
    assert (tmp_path / RECIPE_FILE).read_text() == before and not (tmp_path / USER_FILE).exists()
    with lock_run_directory(tmp_path, MINE, CPU):
        assert "recipe.optim.lr" in str(error.value), (
            "the refused claim has let go of the lock, though its error is still there"
        )


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / RECIPE_FILE).write_text('{"task": "vqa",')
    with pytest.raises(ValueError, match=r"recipe\.json is not JSON"):
        check_same_run(tmp_path, MINE)


@pytest.mark.parametrize(
    ("theirs", "mine", "field"),
    [
        ({"a": 1}, {"a": 2}, "a"),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, "a.b.c"),
        ({"a": 1, "b": 2}, {"a": 1}, "b"),
        ({"a": 1}, {"a": 1, "b": 2}, "b"),
        ({"a": {"b": 1}}, {"a": 3}, "a"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a"),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, "a"),
        ({"a": {}}, {"a": {"b": None}}, "a"),
    ],
)
def test_the_first_field_that_differs(theirs, mine, field):
    assert find_first_difference(theirs, mine) == field


def test_a_run_is_finished_with_its_last_checkpoint_and_its_weights(tmp_path):
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "config.json").touch()
    assert is_finished(tmp_path, 2) and not is_finished(tmp_path, 3)
    (tmp_path / "last" / "config.json").unlink()
    assert not is_finished(tmp_path, 2)


def test_what_a_run_reads_beside_its_recipe(root):
    tokenizer = TextTokenizer(root / "text.model")
    config = replace(make_vqa_recipe(root).task, num_answers=2)
    task = VQA(config, tokenizer=tokenizer)
    inputs = describe_inputs(task)
    assert (
        inputs["tokenizer"] == tokenizer.digest
        and inputs["frozen"] == {}
        and inputs["config"]["num_answers"] == 2
    )
    assert json.loads(json.dumps(inputs)) == inputs, "it is compared with what was written"
    assert describe_inputs(VQA(config))["tokenizer"] is None


# Where it was started -----------------------------------------------------------------------------


def test_environment(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["beit3", "train", "vqa"])
    found = describe_environment(CPU)
    assert found["torch"] == torch.__version__ and found["python"].split(".") >= ["3", "11"]
    assert (found["device"], found["processes"], found["threads"]) == (
        "cpu",
        1,
        torch.get_num_threads(),
    )
    assert (
        found["command"] == ["beit3", "train", "vqa"] and found["platform"] and found["processor"]
    )
    assert (
        abs(time.mktime(time.strptime(found["started"][:19], "%Y-%m-%d %H:%M:%S")) - time.time())
        < 60
    )
    assert json.loads(json.dumps(found)) == found


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A folder whose package `code` holds what stands for the module."""
    if shutil.which("git") is None:
        pytest.skip("git is not at hand")
    file = tmp_path / "code" / "train" / "directory.py"
    file.parent.mkdir(parents=True)
    file.write_text("one\n")
    (tmp_path / "code" / "model.py").write_text("two\n")
    (tmp_path / "notes.md").write_text("three\n")
    monkeypatch.setattr(directory, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def ask(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_commit_and_whether_the_package_differs_from_it(repository):
    assert describe_git_commit() is None, "no repository"
    ask(repository, "init", "--quiet")
    ask(repository, "add", "notes.md")
    ask(repository, "commit", "--quiet", "-m", "notes")
    assert describe_git_commit() is None, "somebody's repository, whose file this is not"
    ask(repository, "add", ".")
    ask(repository, "commit", "--quiet", "-m", "first")
    commit = ask(repository, "rev-parse", "HEAD")
    assert describe_git_commit() == {"commit": commit, "changed": False}
    (repository / "notes.md").write_text("other\n")
    assert describe_git_commit() == {"commit": commit, "changed": False}, "notes are no code"
    (repository / "code" / "model.py").write_text("other\n")
    assert describe_git_commit() == {"commit": commit, "changed": True}, (
        "another room of the package counts"
    )


def test_without_git_there_is_no_commit(repository, monkeypatch):
    ask(repository, "init", "--quiet")
    monkeypatch.setenv("PATH", str(repository))
    assert describe_git_commit() is None


# Processes ----------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_stopped_one_goes_on(root, tmp_path, capsys):
    """While a process trains, the same command is turned away; SIGTERM saves and ends it with 143;
    then the command finishes."""
    command = [
        "train",
        "vqkd",
        "--data.root",
        str(root),
        "--data.batch.main",
        "4",
        "--run.steps",
        "5",
        "--run.log_every",
        "1",
        "--task.model.dim",
        "32",
        "--task.model.num_heads",
        "2",
        "--task.model.depth",
        "1",
        "--out",
    ]
    out, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    threads = str(torch.get_num_threads())  # sums in another order differ in their last bit
    describe_environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [sys.executable, "-c", HELD, str(hold), *command, str(out)]
    first = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=describe_environment,
    )
    try:
        until(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) == 2, first)
        assert main([*command, str(out)]) == 2
        said = capsys.readouterr().err
        assert said == (
            f"beit3: {out} is in use by process {first.pid} on {socket.gethostname()}: wait for "
            "it, stop it, or give another --out\n"
        )
        first.send_signal(signal.SIGTERM)
        hold.unlink()
        _, errors = first.communicate(timeout=300)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 128 + signal.SIGTERM, errors
    assert f"{out} stopped after step 3 of 5; the same command resumes it" in errors
    assert not (out / USER_FILE).exists() and [
        path.name for path in (out / "checkpoints").iterdir()
    ] == ["step_00000003"]
    for place in (out, tmp_path / "alone"):
        assert main([*command, str(place)]) == 0
    assert_same_run(out, tmp_path / "alone")
