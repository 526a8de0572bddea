"""A process killed anywhere (SIGKILL) and started again ends in the same run, bit for bit;
benchmarks/drill.py does the killing."""

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
    """Six steps of the demo's own network: a checkpoint of 20 MB takes long enough to be hit."""
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
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def trials(job, place) -> list[Trial]:
    """Two kills; `place` then holds the run left alone."""
    return trials_of(job, place, ("file", "file"))


def trials_of(job: Job, place: Path, aims: Sequence[str]) -> list[Trial]:
    return drill(job, place, kill_and_resume, aims, seed=0, jobs=2)[1]


def check(trials: Sequence[Trial]) -> None:
    """Every run ended equal and left no file that the run left alone does not have."""
    assert [trial for trial in trials if trial.wrong or trial.left] == []


def test_killed_while_a_checkpoint_is_written(trials):
    """Both kills aim at it; a machine that writes in a blink may be missed once."""
    check(trials)
    assert any(trial.writing for trial in trials), trials


def test_the_drill_sees_one_bit(trials, place):
    """One bit of the optimizer, and one digit of a metric."""
    shutil.copytree(place / "whole", place / "other")
    (file,) = find_newest_checkpoint(place / "other").glob("*.safetensors")
    state = load_checkpoint_tensors(find_newest_checkpoint(place / "other"))
    name = next(name for name in state if name.endswith(".exp_avg"))
    state[name].numpy().reshape(-1).view("uint8")[0] ^= 1
    save_file(state, file)
    rows = [json.loads(line) for line in (place / "other/metrics.jsonl").read_text().splitlines()]
    rows[2]["loss"] += 1e-9
    (place / "other/metrics.jsonl").write_text(
        "".join(json.dumps(row | {"seconds": 0}) + "\n" for row in rows)
    )
    assert find_differences(place / "whole", place / "other") == [
        "metrics.jsonl line 3",
        f"{find_newest_checkpoint(place / 'whole').name}/{name}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_twenty_kills(job, tmp_path, asynchronous):
    trials = trials_of(
        replace(job, asynchronous=asynchronous, steps=12),
        tmp_path,
        [AIMS[number % len(AIMS)] for number in range(20)],
    )
    check(trials)
    assert sum(trial.writing for trial in trials) >= len(trials) / 3
