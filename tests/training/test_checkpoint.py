"""A run that was stopped anywhere and resumed equals an uninterrupted one to the bit."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from beit3.files import compute_sha256
from beit3.recipe import Recipe
from beit3.task import Task, grow_vocabulary
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.training import checkpoint, loop
from beit3.training.loop import train
from beit3.training.optim import make_optimizer
from beit3.training.stop import Interrupted
from tests.training.runs import (
    assert_equal,
    assert_same_run,
    find_newest_checkpoint,
    load_checkpoint_tensors,
)
from tests.world_root import SMALL, make_pretrain_recipe, make_vqa_recipe, make_vqkd_recipe

NUM_STEPS, SAVE_EVERY = 6, 2
MODEL = replace(SMALL, drop_path_rate=0.5)
TASKS = {"vqkd": VQKD, "pretrain": Pretrain, "vqa": VQA}


class Killed(BaseException):
    """Raised in place of the end of the process."""


@pytest.fixture(scope="module")
def recipes(root, vqkd_weights) -> dict[str, Recipe]:
    """Recipes in which a step depends on all random states, counters and buffers."""
    pretrain = make_pretrain_recipe(
        root,
        vqkd_weights,
        steps=NUM_STEPS,
        save_every=SAVE_EVERY,
        model=MODEL,
        micro_batch=4,
        eval_records=4,
    )
    return {
        "vqkd": make_vqkd_recipe(root, steps=NUM_STEPS, save_every=SAVE_EVERY),
        "pretrain": replace(pretrain, task=replace(pretrain.task, pair_masking="alternate")),
        "vqa": make_vqa_recipe(
            root, steps=NUM_STEPS, save_every=SAVE_EVERY, eval_every=3, model=MODEL
        ),
    }


@pytest.fixture(scope="module")
def finished_runs(recipes, tmp_path_factory) -> dict[str, Path]:
    """Returns the directories of uninterrupted runs."""
    runs = {name: tmp_path_factory.mktemp(name) / "whole" for name in recipes}
    for name, out in runs.items():
        train(recipes[name], TASKS[name], out=out)
    return runs


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes training raise Killed in the middle of `step`, counted from 0."""
    seed_step = loop.seed_step

    def seed_or_kill(seed: int, current_step: int) -> None:
        if current_step == step:
            raise Killed
        seed_step(seed, current_step)

    monkeypatch.setattr(loop, "seed_step", seed_or_kill)


def train_killed_and_resumed(
    recipe: Recipe, task: type[Task], out: Path, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, kill)
        train(recipe, task, out=out)
    train(recipe, task, out=out)


@pytest.mark.parametrize(
    ("name", "kill"),
    [("vqkd", 3), ("vqkd", 5), ("pretrain", 1), ("pretrain", 4), ("vqa", 2), ("vqa", 5)],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    recipes, finished_runs, tmp_path, monkeypatch, name, kill
):
    """In step 1 there is no checkpoint yet; in 3 and 5 a logged step is lost; in 2 and 4 none."""
    train_killed_and_resumed(recipes[name], TASKS[name], tmp_path / "run", monkeypatch, kill)
    assert_same_run(tmp_path / "run", finished_runs[name])


@pytest.mark.parametrize(
    ("name", "number"),
    [("vqa", signal.SIGINT), ("pretrain", signal.SIGTERM), ("vqkd", signal.SIGTERM)],
)
def test_a_stopped_run_saves_and_can_be_resumed(
    recipes, finished_runs, tmp_path, monkeypatch, name, number
):
    learning_rate, handler = loop.compute_learning_rate, signal.getsignal(number)

    def raise_signal(step: int, *arguments: Any) -> float:
        if step == 2:
            signal.raise_signal(number)
        return learning_rate(step, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"stopped after step 3 of 6; the same command resumes it"),
    ):
        patch.setattr(loop, "compute_learning_rate", raise_signal)
        train(recipes[name], TASKS[name], out=tmp_path / "run")
    assert find_newest_checkpoint(tmp_path / "run").name == "step_00000003"
    assert not (tmp_path / "run" / "last").exists()
    assert signal.getsignal(number) is handler, "the handlers are restored"
    train(recipes[name], TASKS[name], out=tmp_path / "run")
    assert_same_run(tmp_path / "run", finished_runs[name])


def test_a_run_stopped_in_its_last_step_is_finished(recipes, finished_runs, tmp_path, monkeypatch):
    learning_rate = loop.compute_learning_rate

    def raise_signal(step: int, *arguments: Any) -> float:
        if step == NUM_STEPS - 1:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, *arguments)

    monkeypatch.setattr(loop, "compute_learning_rate", raise_signal)
    train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert_same_run(tmp_path / "run", finished_runs["vqa"])


def test_a_second_ctrl_c_ends_the_run_at_once(recipes, tmp_path, monkeypatch):
    def raise_signal(step: int, *arguments: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("never reached")

    monkeypatch.setattr(loop, "compute_learning_rate", raise_signal)
    with pytest.raises(KeyboardInterrupt):
        train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_half_written_files_of_a_killed_run_are_ignored(
    recipes, finished_runs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train(recipes["vqa"], VQA, out=out)
    for name in (
        "checkpoints/step_00000004.part/x.safetensors",
        "metrics.tmp",
        "scores.json.1.partial",
        ".best.new/model.safetensors",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(recipes["vqa"], VQA, out=out)
    assert_same_run(out, finished_runs["vqa"])
    assert not list((out / "checkpoints").glob("*.part"))


def test_a_finished_run_returns_its_scores_at_once(recipes, finished_runs, monkeypatch):
    out = finished_runs["vqa"]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(VQA, "forward", lambda *_, **__: pytest.fail("nothing is trained"))
    assert train(recipes["vqa"], VQA, out=out) == json.loads((out / "scores.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_a_run_killed_before_its_last_weights_writes_them_when_resumed(
    recipes, finished_runs, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    save = loop.store.save_weights

    def save_or_kill(task: Task, directory: Path, **options: Any) -> None:
        if directory.name == "last":
            raise Killed
        save(task, directory, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.store, "save_weights", save_or_kill)
        train(recipes["vqa"], VQA, out=out)
    train(recipes["vqa"], VQA, out=out)
    assert_same_run(out, finished_runs["vqa"])


def test_only_the_newest_checkpoints_are_kept(root, tmp_path):
    train(make_vqa_recipe(root, steps=5, save_every=1, keep=2), VQA, out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_checkpoints_leave_frozen_parts_out(finished_runs):
    names = load_checkpoint_tensors(find_newest_checkpoint(finished_runs["pretrain"]))
    assert names and not [name for name in names if "visual_tokenizer" in name]


def copy_unfinished(finished_run: Path, out: Path, change: Callable[[Path], None]) -> Path:
    """Copies a finished run without its last weights, as if killed before them, and changes it."""
    shutil.copytree(finished_run, out)
    shutil.rmtree(out / "last")
    change(out)
    return out


def test_a_checkpoint_of_another_network_is_refused(recipes, finished_runs, tmp_path):
    """This happens after an update of the package: the recipe is the same, parameters differ."""

    def rename(out: Path) -> None:
        path = find_newest_checkpoint(out)
        state = load_checkpoint_tensors(path)
        state["task.head.9.bias"] = state.pop("task.head.3.bias")
        (file,) = path.glob("*.safetensors")
        save_file(state, file)
        description = json.loads((path / "checkpoint.json").read_text())
        description["files"] = {file.name: compute_sha256(file)}
        (path / "checkpoint.json").write_text(json.dumps(description))

    out = copy_unfinished(finished_runs["vqa"], tmp_path / "run", rename)
    with pytest.raises(
        ValueError,
        match=r"step_00000006 does not fit this run: it lacks task\.head\.3\.bias; "
        "use another --out",
    ):
        train(recipes["vqa"], VQA, out=out)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    recipes, finished_runs, tmp_path, capsys
):
    def damage(out: Path) -> None:
        (file,) = find_newest_checkpoint(out).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    out = copy_unfinished(finished_runs["vqa"], tmp_path / "run", damage)
    train(recipes["vqa"], VQA, out=out)
    output = " ".join(capsys.readouterr().out.split())
    assert "step_00000006 is damaged" in output and "resuming from step_00000004" in output, output
    assert_same_run(out, finished_runs["vqa"])


@pytest.mark.parametrize("file", ["checkpoint.json", "shard"])
def test_an_incomplete_checkpoint_is_replaced_by_the_one_before(
    recipes, finished_runs, tmp_path, capsys, file
):
    out = copy_unfinished(
        finished_runs["vqkd"],
        tmp_path / "run",
        lambda out: next(find_newest_checkpoint(out).glob(f"{file}*")).unlink(),
    )
    train(recipes["vqkd"], VQKD, out=out)
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(out, finished_runs["vqkd"])


def test_damaged_checkpoints_do_not_count_among_those_kept(root, tmp_path):
    """Two checkpoints are kept: two newer damaged ones are deleted, an intact older one stays."""
    recipe = make_vqa_recipe(root, steps=8, save_every=1, keep=4)
    train(recipe, VQA, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "last")
    for step in (7, 8):
        next((tmp_path / f"run/checkpoints/step_0000000{step}").glob("*.safetensors")).write_bytes(
            b""
        )
    checkpoints = checkpoint.Checkpointer(tmp_path / "run", keep=2, info=lambda text: None)
    task = VQA(
        VQA.configure(grow_vocabulary(recipe.task, TextTokenizer(root / "text.model")), root)
    )
    optimizer = make_optimizer(task, recipe.optim)
    assert checkpoints.restore(task, optimizer)[0] == 6
    checkpoints.save(6, task, optimizer, None)
    assert [path.name for path in checkpoints.list_checkpoints()] == [
        "step_00000005",
        "step_00000006",
    ]


def test_nothing_is_deleted_when_every_checkpoint_is_damaged(recipes, finished_runs, tmp_path):
    def damage(out: Path) -> None:
        for file in out.glob("checkpoints/*/*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])

    out = copy_unfinished(finished_runs["vqa"], tmp_path / "run", damage)
    kept = sorted(out.glob("checkpoints/*/*"))
    with pytest.raises(
        ValueError,
        match=r"step_00000004 is damaged \(.*is not what was written\) and there is no other",
    ):
        train(recipes["vqa"], VQA, out=out)
    assert sorted(out.glob("checkpoints/*/*")) == kept


@pytest.mark.parametrize("where", ["data", "description"])
def test_the_error_for_a_full_disk_names_the_last_good_checkpoint(
    recipes, finished_runs, tmp_path, monkeypatch, where
):
    """The disk becomes full while the second checkpoint is written."""
    writes = 0
    target = {"data": (checkpoint.dcp, "save"), "description": (checkpoint, "flush_to_disk")}[where]
    write = getattr(*target)

    def write_or_fail(*arguments: Any, **options: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes == {"data": 2, "description": 5}[where]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    out = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            OSError, match="is full; step_00000002 is the last good checkpoint: free some"
        ),
    ):
        patch.setattr(*target, write_or_fail)
        train(recipes["vqa"], VQA, out=out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    train(recipes["vqa"], VQA, out=out)
    assert_same_run(out, finished_runs["vqa"])


def test_asynchronous_checkpoints_equal_synchronous_ones(
    recipes, finished_runs, tmp_path, monkeypatch
):
    recipe, save, written = recipes["vqa"], checkpoint.dcp.async_save, []

    def note_and_save(*arguments: Any, **options: Any) -> Any:
        written.append(Path(options["storage_writer"].path).stem)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "async_save", note_and_save)
    train(replace(recipe, run=replace(recipe.run, async_save=True)), VQA, out=tmp_path / "run")
    assert written == [f"step_{step:08d}" for step in (2, 3, 4, 6)], "with the evaluation's"
    assert not list((tmp_path / "run/checkpoints").glob("*.part"))
    for folder in ("step_00000004", "step_00000006"):
        assert_equal(
            load_checkpoint_tensors(tmp_path / "run/checkpoints" / folder),
            load_checkpoint_tensors(finished_runs["vqa"] / "checkpoints" / folder),
        )


def test_an_asynchronous_checkpoint_that_fails_ends_the_run(recipes, tmp_path, monkeypatch):
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush_to_disk", fail)
    recipe = recipes["vqa"]
    with pytest.raises(OSError, match="is full; there is no checkpoint yet"):
        train(replace(recipe, run=replace(recipe.run, async_save=True)), VQA, out=tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir()), "half-written files are removed"


def test_a_second_run_in_a_directory_is_refused_while_the_first_trains(
    recipes, tmp_path, monkeypatch
):
    """The first run continues undisturbed."""
    learning_rate, refusals = loop.compute_learning_rate, []

    def start_another_run(step: int, *arguments: Any) -> float:
        if step == 2 and not refusals:
            refusals.append(step)
            with pytest.raises(
                ValueError,
                match=r"run is in use by process \d+ on .*: "
                "wait for it, stop it, or give another --out",
            ):
                train(recipes["vqa"], VQA, out=tmp_path / "run")
        return learning_rate(step, *arguments)

    monkeypatch.setattr(loop, "compute_learning_rate", start_another_run)
    train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert refusals and (tmp_path / "run" / "last").exists()


def test_a_run_is_not_resumed_with_another_answer_list(root, tmp_path):
    shutil.copytree(root, tmp_path / "root", symlinks=True)
    for path in (tmp_path / "root").rglob("*.jsonl"):
        lines = (json.loads(line) for line in path.read_text().splitlines())
        records = [
            line | {"image": str((root / line["image"]).resolve())} if "image" in line else line
            for line in lines
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in records))
    recipe = make_vqa_recipe(tmp_path / "root", steps=2)
    train(recipe, VQA, out=tmp_path / "run")
    labels = tmp_path / "root" / "vqa" / "main" / "answer2label.txt"
    answers = [json.loads(line)["answer"] for line in labels.read_text().splitlines()]
    labels.write_text("".join(answer + "\n" for answer in reversed(answers)))
    with pytest.raises(ValueError, match=r"another run \(its inputs\.config\.answers differs\)"):
        train(recipe, VQA, out=tmp_path / "run")


def test_micro_batches_are_refused_for_a_task_with_a_codebook(root, tmp_path):
    recipe = make_vqkd_recipe(root, micro_batch=4)
    with pytest.raises(
        ValueError, match=r"run\.micro_batch 4: vqkd needs all 8 records of a process at once"
    ):
        train(recipe, VQKD, out=tmp_path / "run")
