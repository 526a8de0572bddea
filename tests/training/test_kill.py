"""A run killed anywhere by SIGKILL and resumed ends equal to the bit (benchmarks/drill.py)."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from benchmarks.drill import AIMS, Job, Trial, drill, find_differences, kill_and_resume
from tests.training.runs import find_newest_checkpoint, load_checkpoint_tensors
from tests.world_root import NUM_CODES


@pytest.fixture(scope="module")
def job(root, vqkd_weights) -> Job:
    """Returns six steps of the demo network; writing its checkpoint of 20 MB takes long enough."""
    data = (
        "--data.root",
        str(root),
        "--data.batch.images",
        "4",
        "--data.batch.texts",
        "4",
        "--data.batch.pairs",
        "4",
    )
    tokens = ("--task.visual_tokenizer", str(vqkd_weights), "--task.num_codes", str(NUM_CODES))
    return Job((*data, *tokens), steps=6, save_every=2, eval_every=3, eval_records=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def trials(job, folder) -> list[Trial]:
    """Runs two kills; `folder` then holds the uninterrupted run as well."""
    return run_trials(job, folder, ("file", "file"))


def run_trials(job: Job, folder: Path, aims: Sequence[str]) -> list[Trial]:
    return drill(job, folder, kill_and_resume, aims, seed=0, jobs=2)[1]


def assert_equal_runs(trials: Sequence[Trial]) -> None:
    """Asserts that every run ended equal, with the files of the uninterrupted run only."""
    assert [trial for trial in trials if trial.wrong or trial.left] == []


def test_runs_killed_while_a_checkpoint_is_written_end_equal(trials):
    """Both kills aim at the write; one may miss it on a machine that writes fast."""
    assert_equal_runs(trials)
    assert any(trial.writing for trial in trials), trials


def test_one_changed_bit_is_found(trials, folder):
    """The changes are one bit of the optimizer and one digit of a metric."""
    shutil.copytree(folder / "whole", folder / "other")
    (file,) = find_newest_checkpoint(folder / "other").glob("*.safetensors")
    state = load_checkpoint_tensors(find_newest_checkpoint(folder / "other"))
    name = next(name for name in state if name.endswith(".exp_avg"))
    state[name].numpy().reshape(-1).view("uint8")[0] ^= 1
    save_file(state, file)
    rows = [json.loads(line) for line in (folder / "other/metrics.jsonl").read_text().splitlines()]
    rows[2]["loss"] += 1e-9
    (folder / "other/metrics.jsonl").write_text(
        "".join(json.dumps(line | {"seconds": 0}) + "\n" for line in rows)
    )
    assert find_differences(folder / "whole", folder / "other") == [
        "metrics.jsonl line 3",
        f"{find_newest_checkpoint(folder / 'whole').name}/{name}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_runs_killed_anywhere_end_equal(job, tmp_path, asynchronous):
    trials = run_trials(
        replace(job, asynchronous=asynchronous, steps=12),
        tmp_path,
        [AIMS[number % len(AIMS)] for number in range(20)],
    )
    assert_equal_runs(trials)
    assert sum(trial.writing for trial in trials) >= len(trials) / 3
