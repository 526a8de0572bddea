"""A run that was stopped anywhere and started again equals one that was not: weights, optimizer and
log, bit for bit."""

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

STEPS, SAVE = 6, 2
DROPPING = replace(SMALL, drop_path_rate=0.5)
TASKS = {"vqkd": VQKD, "pretrain": Pretrain, "vqa": VQA}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def recipes(root, vqkd_weights) -> dict[str, Recipe]:
    """Everything that a step may depend on is in use: drop path, random views, alternating masks,
    revival of codes."""
    pretrain = make_pretrain_recipe(
        root,
        vqkd_weights,
        steps=STEPS,
        save_every=SAVE,
        model=DROPPING,
        micro_batch=4,
        eval_records=4,
    )
    return {
        "vqkd": make_vqkd_recipe(root, steps=STEPS, save_every=SAVE),
        "pretrain": replace(pretrain, task=replace(pretrain.task, pair_masking="alternate")),
        "vqa": make_vqa_recipe(root, steps=STEPS, save_every=SAVE, eval_every=3, model=DROPPING),
    }


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory) -> dict[str, Path]:
    """Uninterrupted runs."""
    runs = {name: tmp_path_factory.mktemp(name) / "whole" for name in recipes}
    for name, out in runs.items():
        train(recipes[name], TASKS[name], out=out)
    return runs


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the process in the middle of `step`, counted from 0."""
    seed_step = loop.seed_step

    def killing(seed: int, at: int) -> None:
        if at == step:
            raise Killed
        seed_step(seed, at)

    monkeypatch.setattr(loop, "seed_step", killing)


def resumed(
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
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    recipes, whole, tmp_path, monkeypatch, name, kill
):
    """Killed in step 1 there is no checkpoint yet, in 3 and 5 a logged step is lost, in 2 and 4
    nothing is."""
    resumed(recipes[name], TASKS[name], tmp_path / "run", monkeypatch, kill)
    assert_same_run(tmp_path / "run", whole[name])


@pytest.mark.parametrize(
    ("name", "number"),
    [("vqa", signal.SIGINT), ("pretrain", signal.SIGTERM), ("vqkd", signal.SIGTERM)],
)
def test_a_run_asked_to_stop_saves_and_goes_on(recipes, whole, tmp_path, monkeypatch, name, number):
    learning_rate, before = loop.compute_learning_rate, signal.getsignal(number)

    def asking(step: int, *rest: Any) -> float:
        if step == 2:
            signal.raise_signal(number)
        return learning_rate(step, *rest)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=r"stopped after step 3 of 6; the same command resumes it"),
    ):
        patch.setattr(loop, "compute_learning_rate", asking)
        train(recipes[name], TASKS[name], out=tmp_path / "run")
    assert find_newest_checkpoint(tmp_path / "run").name == "step_00000003"
    assert not (tmp_path / "run" / "last").exists()
    assert signal.getsignal(number) is before, "the handlers are put back"
    train(recipes[name], TASKS[name], out=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[name])


def test_a_stop_in_the_last_step_is_a_finished_run(recipes, whole, tmp_path, monkeypatch):
    learning_rate = loop.compute_learning_rate

    def asking(step: int, *rest: Any) -> float:
        if step == STEPS - 1:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, *rest)

    monkeypatch.setattr(loop, "compute_learning_rate", asking)
    train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert_same_run(tmp_path / "run", whole["vqa"])


def test_a_second_ctrl_c_acts_at_once(recipes, tmp_path, monkeypatch):
    def asking(step: int, *rest: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("never reached")

    monkeypatch.setattr(loop, "compute_learning_rate", asking)
    with pytest.raises(KeyboardInterrupt):
        train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_what_a_kill_left_half_written_does_no_harm(recipes, whole, tmp_path, monkeypatch):
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
    assert_same_run(out, whole["vqa"])
    assert not list((out / "checkpoints").glob("*.part"))


def test_a_finished_run_returns_its_scores_at_once(recipes, whole, monkeypatch):
    out = whole["vqa"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(VQA, "forward", lambda *_, **__: pytest.fail("nothing is trained"))
    assert train(recipes["vqa"], VQA, out=out) == json.loads((out / "scores.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_killed_before_its_last_weights_writes_them(recipes, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = loop.store.save_weights

    def killing(task: Task, directory: Path, **named: Any) -> None:
        if directory.name == "last":
            raise Killed
        save(task, directory, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.store, "save_weights", killing)
        train(recipes["vqa"], VQA, out=out)
    train(recipes["vqa"], VQA, out=out)
    assert_same_run(out, whole["vqa"])


def test_only_the_newest_checkpoints_are_kept(root, tmp_path):
    train(make_vqa_recipe(root, steps=5, save_every=1, keep=2), VQA, out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_checkpoints_leave_frozen_parts_out(whole):
    names = load_checkpoint_tensors(find_newest_checkpoint(whole["pretrain"]))
    assert names and not [name for name in names if "visual_tokenizer" in name]


def restored(whole: Path, out: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a finished run that looks as if it had been killed after its last checkpoint, with
    one thing changed."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "last")
    change(out)
    return out


def test_a_checkpoint_of_another_network_is_refused(recipes, whole, tmp_path):
    """As after an update of the package: the recipe is the same, the parameters are not."""

    def rename(out: Path) -> None:
        path = find_newest_checkpoint(out)
        state = load_checkpoint_tensors(path)
        state["task.head.9.bias"] = state.pop("task.head.3.bias")
        (file,) = path.glob("*.safetensors")
        save_file(state, file)
        description = json.loads((path / "checkpoint.json").read_text())
        description["files"] = {file.name: compute_sha256(file)}
        (path / "checkpoint.json").write_text(json.dumps(description))

    out = restored(whole["vqa"], tmp_path / "run", rename)
    with pytest.raises(
        ValueError,
        match=r"step_00000006 does not fit this run: it lacks task\.head\.3\.bias; use another --out",
    ):
        train(recipes["vqa"], VQA, out=out)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(recipes, whole, tmp_path, capsys):
    def damage(out: Path) -> None:
        (file,) = find_newest_checkpoint(out).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    out = restored(whole["vqa"], tmp_path / "run", damage)
    train(recipes["vqa"], VQA, out=out)
    said = " ".join(capsys.readouterr().out.split())
    assert "step_00000006 is damaged" in said and "resuming from step_00000004" in said, said
    assert_same_run(out, whole["vqa"])


@pytest.mark.parametrize("file", ["checkpoint.json", "shard"])
def test_a_checkpoint_without_one_of_its_files_gives_way_too(
    recipes, whole, tmp_path, capsys, file
):
    out = restored(
        whole["vqkd"],
        tmp_path / "run",
        lambda out: next(find_newest_checkpoint(out).glob(f"{file}*")).unlink(),
    )
    train(recipes["vqkd"], VQKD, out=out)
    assert "is damaged" in capsys.readouterr().out
    assert_same_run(out, whole["vqkd"])


def test_damaged_checkpoints_do_not_crowd_out_whole_ones(root, tmp_path):
    """Two are kept; after two damaged ones that are newer the next whole one stays, and they go."""
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


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(recipes, whole, tmp_path):
    def damage(out: Path) -> None:
        for file in out.glob("checkpoints/*/*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1])

    out = restored(whole["vqa"], tmp_path / "run", damage)
    kept = sorted(out.glob("checkpoints/*/*"))
    with pytest.raises(
        ValueError,
        match=r"step_00000004 is damaged \(.*is not what was written\) and there is no other",
    ):
        train(recipes["vqa"], VQA, out=out)
    assert sorted(out.glob("checkpoints/*/*")) == kept


@pytest.mark.parametrize("where", ["data", "description"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_says_so(
    recipes, whole, tmp_path, monkeypatch, where
):
    """The disk fills while the second checkpoint is written."""
    writes = 0
    name = {"data": (checkpoint.dcp, "save"), "description": (checkpoint, "flush_to_disk")}[where]
    real = getattr(*name)

    def filling(*given: Any, **named: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes == {"data": 2, "description": 5}[where]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given, **named)

    out = tmp_path / "run"
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            OSError, match="is full; step_00000002 is the last good checkpoint: free some"
        ),
    ):
        patch.setattr(*name, filling)
        train(recipes["vqa"], VQA, out=out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    train(recipes["vqa"], VQA, out=out)
    assert_same_run(out, whole["vqa"])


def test_an_asynchronous_checkpoint_is_the_same(recipes, whole, tmp_path):
    recipe = recipes["vqa"]
    train(replace(recipe, run=replace(recipe.run, async_save=True)), VQA, out=tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("*.part"))
    for folder in ("step_00000004", "step_00000006"):
        assert_equal(
            load_checkpoint_tensors(tmp_path / "run/checkpoints" / folder),
            load_checkpoint_tensors(whole["vqa"] / "checkpoints" / folder),
        )


def test_an_asynchronous_checkpoint_that_fails_ends_the_run(recipes, tmp_path, monkeypatch):
    def failing(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "flush_to_disk", failing)
    recipe = recipes["vqa"]
    with pytest.raises(OSError, match="is full; there is no checkpoint yet"):
        train(replace(recipe, run=replace(recipe.run, async_save=True)), VQA, out=tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir()), "what was half-written went"


def test_one_directory_serves_one_run_at_a_time(recipes, tmp_path, monkeypatch):
    """The second of two runs started at once is turned away while the first goes on."""
    learning_rate, refusals = loop.compute_learning_rate, []

    def starting_another(step: int, *rest: Any) -> float:
        if step == 2 and not refusals:
            refusals.append(step)
            with pytest.raises(
                ValueError,
                match=r"run is in use by process \d+ on .*: wait for it, stop it, or give another --out",
            ):
                train(recipes["vqa"], VQA, out=tmp_path / "run")
        return learning_rate(step, *rest)

    monkeypatch.setattr(loop, "compute_learning_rate", starting_another)
    train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert refusals and (tmp_path / "run" / "last").exists()


def test_a_resume_notices_another_answer_list(root, tmp_path):
    shutil.copytree(root, tmp_path / "root", symlinks=True)
    for path in (tmp_path / "root").rglob("*.jsonl"):
        lines = (json.loads(line) for line in path.read_text().splitlines())
        moved = [
            line | {"image": str((root / line["image"]).resolve())} if "image" in line else line
            for line in lines
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in moved))
    recipe = make_vqa_recipe(tmp_path / "root", steps=2)
    train(recipe, VQA, out=tmp_path / "run")
    labels = tmp_path / "root" / "vqa" / "main" / "answer2label.txt"
    answers = [json.loads(line)["answer"] for line in labels.read_text().splitlines()]
    labels.write_text("".join(answer + "\n" for answer in reversed(answers)))
    with pytest.raises(ValueError, match=r"another run \(its inputs\.config\.answers differs\)"):
        train(recipe, VQA, out=tmp_path / "run")


def test_a_codebook_sees_its_share_at_once(root, tmp_path):
    recipe = make_vqkd_recipe(root, micro_batch=4)
    with pytest.raises(
        ValueError, match=r"run\.micro_batch 4: vqkd needs all 8 records of a process at once"
    ):
        train(recipe, VQKD, out=tmp_path / "run")
