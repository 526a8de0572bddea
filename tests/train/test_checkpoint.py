"""A run that was stopped anywhere and started again equals one that was not: weights, optimizer and log, bit for bit."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from beit3.recipe import Recipe
from beit3.task import Task
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.train import loop
from beit3.train.checkpoint import newest
from beit3.train.loop import Interrupted, train
from tests.world_root import SMALL, pretrain_recipe, vqa_recipe, vqkd_recipe

STEPS, SAVE = 6, 2
DROPPING = replace(SMALL, drop_path_rate=0.5)
TASKS = {"vqkd": VQKD, "pretrain": Pretrain, "vqa": VQA}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def recipes(root, visual) -> dict[str, Recipe]:
    """Everything that a step may depend on is in use: drop path, random views, alternating masks, revival of codes."""
    pretrain = pretrain_recipe(root, visual, steps=STEPS, save_every=SAVE, model=DROPPING, micro_batch=4, eval_records=4)
    return {
        "vqkd": vqkd_recipe(root, steps=STEPS, save_every=SAVE),
        "pretrain": replace(pretrain, task=replace(pretrain.task, pair_masking="alternate")),
        "vqa": vqa_recipe(root, steps=STEPS, save_every=SAVE, eval_every=3, model=DROPPING),
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


def resumed(recipe: Recipe, task: type[Task], out: Path, monkeypatch: pytest.MonkeyPatch, kill: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, kill)
        train(recipe, task, out=out)
    train(recipe, task, out=out)


def same(one: Any, two: Any) -> None:
    """Equality to the bit, through nested containers."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            same(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


def same_run(one: Path, two: Path) -> None:
    for folder in ("last", "best"):
        same(load_file(one / folder / "model.safetensors"), load_file(two / folder / "model.safetensors"))
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    assert (one / "scores.json").read_text() == (two / "scores.json").read_text()
    checkpoints = [torch.load(newest(run), weights_only=True) for run in (one, two)]
    assert checkpoints[0]["optimizer"]["state"], "there is an optimizer state to compare"
    same(*checkpoints)


@pytest.mark.parametrize(
    ("name", "kill"), [("vqkd", 3), ("vqkd", 5), ("pretrain", 1), ("pretrain", 4), ("vqa", 2), ("vqa", 5)]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, whole, tmp_path, monkeypatch, name, kill):
    """Killed in step 1 there is no checkpoint yet, in 3 and 5 a logged step is lost, in 2 and 4 nothing is."""
    resumed(recipes[name], TASKS[name], tmp_path / "run", monkeypatch, kill)
    same_run(tmp_path / "run", whole[name])


@pytest.mark.parametrize(("name", "number"), [("vqa", signal.SIGINT), ("pretrain", signal.SIGTERM), ("vqkd", signal.SIGTERM)])
def test_a_run_asked_to_stop_saves_and_goes_on(recipes, whole, tmp_path, monkeypatch, name, number):
    learning_rate, before = loop.learning_rate, signal.getsignal(number)

    def asking(step: int, *rest: Any) -> float:
        if step == 2:
            signal.raise_signal(number)
        return learning_rate(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"stopped after step 3 of 6; the same command goes on"):
        patch.setattr(loop, "learning_rate", asking)
        train(recipes[name], TASKS[name], out=tmp_path / "run")
    assert newest(tmp_path / "run").stem == "step_00000003"
    assert not (tmp_path / "run" / "last").exists()
    assert signal.getsignal(number) is before, "the handlers are put back"
    train(recipes[name], TASKS[name], out=tmp_path / "run")
    same_run(tmp_path / "run", whole[name])


def test_a_stop_in_the_last_step_is_a_finished_run(recipes, whole, tmp_path, monkeypatch):
    learning_rate = loop.learning_rate

    def asking(step: int, *rest: Any) -> float:
        if step == STEPS - 1:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(step, *rest)

    monkeypatch.setattr(loop, "learning_rate", asking)
    train(recipes["vqa"], VQA, out=tmp_path / "run")
    same_run(tmp_path / "run", whole["vqa"])


def test_a_second_ctrl_c_acts_at_once(recipes, tmp_path, monkeypatch):
    def asking(step: int, *rest: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("never reached")

    monkeypatch.setattr(loop, "learning_rate", asking)
    with pytest.raises(KeyboardInterrupt):
        train(recipes["vqa"], VQA, out=tmp_path / "run")
    assert newest(tmp_path / "run") is None


def test_what_a_kill_left_half_written_does_no_harm(recipes, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train(recipes["vqa"], VQA, out=out)
    for name in ("checkpoints/step_00000004.tmp", "metrics.tmp", "scores.tmp", "recipe.tmp", ".best.new/model.safetensors"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(recipes["vqa"], VQA, out=out)
    same_run(out, whole["vqa"])
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp" and path.parent.name == "checkpoints"]


def test_a_finished_run_returns_its_scores_at_once(recipes, whole, monkeypatch):
    out = whole["vqa"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr(VQA, "forward", lambda *_, **__: pytest.fail("nothing is trained"))
    assert train(recipes["vqa"], VQA, out=out) == json.loads((out / "scores.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_killed_before_its_last_weights_writes_them(recipes, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    save = loop.store.save

    def killing(task: Task, directory: Path) -> None:
        if directory.name == "last":
            raise Killed
        save(task, directory)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.store, "save", killing)
        train(recipes["vqa"], VQA, out=out)
    train(recipes["vqa"], VQA, out=out)
    same_run(out, whole["vqa"])


def test_only_the_newest_checkpoints_are_kept(root, tmp_path):
    train(vqa_recipe(root, steps=5, save_every=1, keep=2), VQA, out=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000004.pt", "step_00000005.pt"]


def test_checkpoints_leave_frozen_parts_out(whole):
    names = torch.load(newest(whole["pretrain"]), weights_only=True)["task"]
    assert names and not [name for name in names if name.startswith("visual_tokenizer")]


def test_a_checkpoint_of_another_network_is_refused(recipes, whole, tmp_path):
    """As after an update of the package: the recipe is the same, the parameters are not."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "recipe.json").write_text((whole["vqa"] / "recipe.json").read_text())
    state = torch.load(newest(whole["vqa"]), weights_only=True)
    state["task"]["head.9.bias"] = state["task"].pop("head.3.bias")
    torch.save(state | {"step": 4}, out / "checkpoints" / "step_00000004.pt")
    with pytest.raises(ValueError, match=r"step_00000004\.pt does not fit this run: missing \['head\.3\.bias'\].*use another --out"):
        train(recipes["vqa"], VQA, out=out)


def test_a_resume_notices_another_answer_list(root, tmp_path):


    shutil.copytree(root, tmp_path / "root", symlinks=True)
    for path in (tmp_path / "root").rglob("*.jsonl"):
        lines = (json.loads(line) for line in path.read_text().splitlines())
        moved = [line | {"image": str((root / line["image"]).resolve())} if "image" in line else line for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in moved))
    recipe = vqa_recipe(tmp_path / "root", steps=2)
    train(recipe, VQA, out=tmp_path / "run")
    labels = tmp_path / "root" / "vqa" / "main" / "answer2label.txt"
    answers = [json.loads(line)["answer"] for line in labels.read_text().splitlines()]
    labels.write_text("".join(answer + "\n" for answer in reversed(answers)))
    with pytest.raises(ValueError, match=r"another run \(its inputs\.config\.answers differs\)"):
        train(recipe, VQA, out=tmp_path / "run")


def test_a_codebook_sees_its_share_at_once(root, tmp_path):
    recipe = vqkd_recipe(root, micro_batch=4)
    with pytest.raises(ValueError, match=r"run\.micro_batch 4: vqkd needs its share of 8 records at once"):
        train(recipe, VQKD, out=tmp_path / "run")
