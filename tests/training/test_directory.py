"""A run directory serves one run, by one process at a time, and describes its environment."""

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
RUN = {"task": "vqa", "recipe": {"optim": {"lr": 0.1}, "run": {"steps": 3}}}

HOLD_LOCK = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
"""Holds the lock in another process, without torch, whose import would take seconds."""

PAUSED_CLI = """
import sys, time
from pathlib import Path
from beit3 import cli
from beit3.training import loop
hold, seed_step = Path(sys.argv.pop(1)), loop.seed_step
def wait_and_seed(seed, step):
    while step == 2 and hold.exists():
        time.sleep(0.02)
    seed_step(seed, step)
loop.seed_step = wait_and_seed
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command line with a third step that lasts as long as a file exists."""


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=1)
        time.sleep(0.02)


# One run at a time --------------------------------------------------------------------------------


def test_a_lock_writes_user_and_recipe_and_removes_the_user(tmp_path, monkeypatch):
    out = tmp_path / "runs" / "run"
    with lock_run_directory(out, RUN, CPU):
        assert (out / USER_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        stored = json.loads((out / RECIPE_FILE).read_text())
        assert stored.pop("environment")["device"] == "cpu" and stored == RUN
        with pytest.raises(ValueError) as error, lock_run_directory(out, RUN, CPU):
            raise AssertionError("two locks at once")
        assert str(error.value) == (
            f"{out} is in use by process {os.getpid()} on {socket.gethostname()}: wait for it, "
            "stop it, or give another --out"
        )
        assert (out / USER_FILE).exists(), "the first lock stays"
    assert sorted(path.name for path in out.iterdir()) == sorted([LOCK_FILE, RECIPE_FILE]), (
        "the user file is removed, the lock file stays"
    )
    written = (out / RECIPE_FILE).read_text()
    monkeypatch.setattr(sys, "argv", ["another command"])
    with pytest.raises(KeyError), lock_run_directory(out, RUN, CPU):
        raise KeyError
    with lock_run_directory(out, RUN, CPU):
        assert (out / RECIPE_FILE).read_text() == written, (
            "a resumed run keeps its first environment"
        )


def test_a_directory_is_locked_until_the_other_process_ends(tmp_path):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "run" / LOCK_FILE)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for user in ("another process", "process 7 on elsewhere"):
            with (
                pytest.raises(ValueError, match=f"run is in use by {user}: wait for it"),
                lock_run_directory(tmp_path / "run", RUN, CPU),
            ):
                raise AssertionError("two locks at once")
            (tmp_path / "run" / USER_FILE).write_text("process 7 on elsewhere")
        assert not (tmp_path / "run" / RECIPE_FILE).exists(), "nothing is written without the lock"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock_run_directory(tmp_path / "run", RUN, CPU):
            assert (tmp_path / "run" / USER_FILE).read_text().startswith(f"process {os.getpid()} ")
    finally:
        holder.kill()
        holder.communicate()


# One run a directory ------------------------------------------------------------------------------


def test_only_an_empty_or_new_directory_is_accepted(tmp_path):
    check_same_run(tmp_path / "new", RUN)
    for name in (LOCK_FILE, USER_FILE):
        (tmp_path / name).touch()
        check_same_run(tmp_path, RUN)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run: give another --out"):
        check_same_run(tmp_path, RUN)
    with pytest.raises(ValueError, match="photo.jpg is not empty and holds no run"):
        check_same_run(tmp_path / "photo.jpg", RUN)


def test_the_error_for_another_run_names_the_field_that_differs(tmp_path):
    with lock_run_directory(tmp_path, RUN, CPU):
        pass
    check_same_run(tmp_path, RUN)
    stored = (tmp_path / RECIPE_FILE).read_text()
    other_recipe = RUN | {"recipe": {"optim": {"lr": 0.2}, "run": {"steps": 3}}}
    with pytest.raises(
        ValueError, match=r"holds another run \(its recipe\.optim\.lr differs\): give another --out"
    ):
        check_same_run(tmp_path, other_recipe)
    with pytest.raises(ValueError) as error, lock_run_directory(tmp_path, other_recipe, CPU):
        raise AssertionError("it holds another run")
    assert (tmp_path / RECIPE_FILE).read_text() == stored and not (tmp_path / USER_FILE).exists()
    with lock_run_directory(tmp_path, RUN, CPU):
        assert "recipe.optim.lr" in str(error.value), (
            "the lock is released although the error is still referenced"
        )


def test_a_malformed_recipe_is_named(tmp_path):
    (tmp_path / RECIPE_FILE).write_text('{"task": "vqa",')
    with pytest.raises(ValueError, match=r"recipe\.json is not JSON"):
        check_same_run(tmp_path, RUN)


@pytest.mark.parametrize(
    ("stored", "recipe", "field"),
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
def test_the_first_field_that_differs_is_found(stored, recipe, field):
    assert find_first_difference(stored, recipe) == field


def test_a_finished_run_has_its_last_checkpoint_and_weights(tmp_path):
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "config.json").touch()
    assert is_finished(tmp_path, 2) and not is_finished(tmp_path, 3)
    (tmp_path / "last" / "config.json").unlink()
    assert not is_finished(tmp_path, 2)


def test_inputs_hold_tokenizer_frozen_weights_and_config(root):
    tokenizer = TextTokenizer(root / "text.model")
    config = replace(make_vqa_recipe(root).task, num_answers=2)
    task = VQA(config, tokenizer=tokenizer)
    inputs = describe_inputs(task)
    assert (
        inputs["tokenizer"] == tokenizer.digest
        and inputs["frozen"] == {}
        and inputs["config"]["num_answers"] == 2
    )
    assert json.loads(json.dumps(inputs)) == inputs, "inputs are compared with stored JSON"
    assert describe_inputs(VQA(config))["tokenizer"] is None


# Environment --------------------------------------------------------------------------------------


def test_the_environment_is_described(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["beit3", "train", "vqa"])
    environment = describe_environment(CPU)
    assert environment["torch"] == torch.__version__ and environment["python"].split(".") >= [
        "3",
        "11",
    ]
    assert (environment["device"], environment["processes"], environment["threads"]) == (
        "cpu",
        1,
        torch.get_num_threads(),
    )
    assert (
        environment["command"] == ["beit3", "train", "vqa"]
        and environment["platform"]
        and environment["processor"]
    )
    assert (
        abs(
            time.mktime(time.strptime(environment["started"][:19], "%Y-%m-%d %H:%M:%S"))
            - time.time()
        )
        < 60
    )
    assert json.loads(json.dumps(environment)) == environment


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Returns a folder with a package `code` in place of beit3."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    file = tmp_path / "code" / "train" / "directory.py"
    file.parent.mkdir(parents=True)
    file.write_text("one\n")
    (tmp_path / "code" / "model.py").write_text("two\n")
    (tmp_path / "notes.md").write_text("three\n")
    monkeypatch.setattr(directory, "__file__", str(file))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def run_git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_commit_is_described_with_changes_of_the_package(repository):
    assert describe_git_commit() is None, "no repository"
    run_git(repository, "init", "--quiet")
    run_git(repository, "add", "notes.md")
    run_git(repository, "commit", "--quiet", "-m", "notes")
    assert describe_git_commit() is None, "somebody's repository, whose file this is not"
    run_git(repository, "add", ".")
    run_git(repository, "commit", "--quiet", "-m", "first")
    commit = run_git(repository, "rev-parse", "HEAD")
    assert describe_git_commit() == {"commit": commit, "changed": False}
    (repository / "notes.md").write_text("other\n")
    assert describe_git_commit() == {"commit": commit, "changed": False}, "notes are no code"
    (repository / "code" / "model.py").write_text("other\n")
    assert describe_git_commit() == {"commit": commit, "changed": True}, (
        "changes in other folders of the package count"
    )


def test_without_git_there_is_no_commit(repository, monkeypatch):
    run_git(repository, "init", "--quiet")
    monkeypatch.setenv("PATH", str(repository))
    assert describe_git_commit() is None


# Processes ----------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_a_stopped_run_is_resumed(root, tmp_path, capsys):
    """SIGTERM makes the first process save and end with status 143."""
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
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = [sys.executable, "-c", PAUSED_CLI, str(hold), *command, str(out)]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        wait_until(
            lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) == 2, process
        )
        assert main([*command, str(out)]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"beit3: {out} is in use by process {process.pid} on {socket.gethostname()}: wait for "
            "it, stop it, or give another --out\n"
        )
        process.send_signal(signal.SIGTERM)
        hold.unlink()
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert f"{out} stopped after step 3 of 5; the same command resumes it" in errors
    assert not (out / USER_FILE).exists() and [
        path.name for path in (out / "checkpoints").iterdir()
    ] == ["step_00000003"]
    for run in (out, tmp_path / "alone"):
        assert main([*command, str(run)]) == 0
    assert_same_run(out, tmp_path / "alone")
