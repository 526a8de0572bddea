"""The evaluations of a run: after the checkpoint of their step, repeated after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.recipe import Recipe
from beit3.tasks.captioning import Captioning
from beit3.tasks.vqa import VQA
from beit3.training import loop
from beit3.training.loop import train
from tests.training.runs import assert_same_run, find_newest_checkpoint, read_metrics
from tests.world_root import make_finetuning_recipe, make_vqa_recipe

SCORES = (0.2, 0.6, 0.4)
"""Scores of the evaluations after steps 2, 4 and 6: the second is the best."""


class Killed(BaseException):
    """Ends training as SIGKILL would; nothing catches it."""


@pytest.fixture
def recipe(root) -> Recipe:
    return make_vqa_recipe(root, steps=6, eval_every=2, save_every=1, eval_records=4)


def script_scores(monkeypatch: pytest.MonkeyPatch, *, kill_at: int = 0, when: str = "") -> None:
    """Makes evaluations give `SCORES`; one that is killed ends before, or after its log line."""
    write, save_weights = loop.Log.write, loop.save_weights
    step = 0

    def evaluate(task, sources, **options) -> dict[str, float]:
        if when == "before" and step == kill_at:
            raise Killed
        return {"accuracy": SCORES[step // 2 - 1]}

    def evaluate_step(self, num_done: int) -> None:
        nonlocal step
        step = num_done
        run_evaluation(self, num_done)

    def write_or_die(self, num_done, values) -> None:
        write(self, num_done, values)
        if "val/accuracy" in values and when == "logged" and step == kill_at:
            raise Killed

    def save_or_die(task, directory: Path) -> None:
        save_weights(task, directory)
        if directory.name == "best" and when == "saved" and step == kill_at:
            raise Killed

    run_evaluation = loop.Trainer.evaluate
    monkeypatch.setattr(loop.Trainer, "evaluate", evaluate_step)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop.Log, "write", write_or_die)
    monkeypatch.setattr(loop, "save_weights", save_or_die)


@pytest.mark.parametrize("kill_at", [2, 4, 6])
@pytest.mark.parametrize("when", ["before", "logged", "saved"])
def test_a_run_killed_in_an_evaluation_ends_equal(recipe, tmp_path, monkeypatch, kill_at, when):
    """The best score is neither forgotten nor taken twice, and no line of scores is doubled."""
    with monkeypatch.context() as patch:
        script_scores(patch)
        train(recipe, VQA, out=tmp_path / "whole")
    if (kill_at, when) == (6, "saved"):
        return  # the last score does not lead
    with monkeypatch.context() as patch, pytest.raises(Killed):
        script_scores(patch, kill_at=kill_at, when=when)
        train(recipe, VQA, out=tmp_path / "run")
    assert find_newest_checkpoint(tmp_path / "run").name == f"step_{kill_at:08d}"
    with monkeypatch.context() as patch:
        script_scores(patch)
        train(recipe, VQA, out=tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    logged = [line["val/accuracy"] for line in read_metrics(tmp_path / "run") if "loss" not in line]
    assert logged == list(SCORES)


def test_the_best_score_outlives_a_kill_between_evaluations(recipe, tmp_path, monkeypatch):
    """The lower score of step 6 must not replace the best weights, those of step 4."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        script_scores(patch)
        kill_at_step(patch, 5)
        train(recipe, VQA, out=tmp_path / "run")
    best = (tmp_path / "run/best/model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        script_scores(patch)
        train(recipe, VQA, out=tmp_path / "run")
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == best
    description = find_newest_checkpoint(tmp_path / "run") / "checkpoint.json"
    assert json.loads(description.read_text())["best"] == max(SCORES)


def test_an_equal_score_later_does_not_replace_the_best_weights(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda task, sources, **options: {"accuracy": 0.5})
    saved: list[str] = []
    save_weights = loop.save_weights

    def record_and_save(task, directory: Path) -> None:
        saved.append(directory.name)
        save_weights(task, directory)

    monkeypatch.setattr(loop, "save_weights", record_and_save)
    train(recipe, VQA, out=tmp_path / "run")
    assert saved.count("best") == 1


def kill_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    seed_step = loop.seed_step

    def seed_or_die(seed: int, current_step: int) -> None:
        if current_step == step:
            raise Killed
        seed_step(seed, current_step)

    monkeypatch.setattr(loop, "seed_step", seed_or_die)


def test_a_failing_evaluation_loses_no_step(recipe, tmp_path, monkeypatch):
    """Without `save_every` the checkpoint of the evaluation's step is there as well."""

    def fail(*arguments, **options) -> dict[str, float]:
        raise ValueError("no score")

    recipe = replace(recipe, run=replace(recipe.run, save_every=0))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no score"):
        patch.setattr(loop, "evaluate", fail)
        train(recipe, VQA, out=tmp_path / "run")
    assert find_newest_checkpoint(tmp_path / "run").name == "step_00000002"
    train(recipe, VQA, out=tmp_path / "run")
    train(recipe, VQA, out=tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_val_records_without_a_score_end_a_run_before_its_first_step(root, tmp_path):
    copy_records(root, tmp_path / "root", "captioning", lambda record: record | {"captions": []})
    recipe = make_finetuning_recipe("captioning", tmp_path / "root", steps=2)
    with pytest.raises(ValueError, match=r"val\.jsonl line 1 \(record .*field captions is empty"):
        train(recipe, Captioning, out=tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()), "the same command starts once the line is mended"


def copy_records(root: Path, new_root: Path, task: str, change_first_val) -> None:
    """Copies a task's records with absolute paths; changes the first one of val."""
    for split in ("train", "val"):
        records = list(RecordDataset(root / task / f"main/{split}.jsonl", root))
        if split == "val":
            records[0] = change_first_val(records[0])
        write_records(new_root / task / f"main/{split}.jsonl", records)
    (new_root / "text.model").write_bytes((root / "text.model").read_bytes())


def test_a_run_that_is_never_scored_needs_no_val_split(root, tmp_path):
    copy_records(root, tmp_path / "root", "captioning", dict)
    (tmp_path / "root/captioning/main/val.jsonl").unlink()
    recipe = make_finetuning_recipe("captioning", tmp_path / "root", steps=2, eval_every=-1)
    assert train(recipe, Captioning, out=tmp_path / "run") == {"step": 2}
    assert train(recipe, Captioning, out=tmp_path / "run") == {"step": 2}, "it is finished"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "last" in names and not {"best", "scores.json"} & names
