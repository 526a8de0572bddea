"""Two processes train what one trains: the same records, the same losses, one set of files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.cli import main
from beit3.recipe import Recipe, RunConfig
from beit3.task import Task
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqkd import VQKD
from beit3.train.launch import autocast, seed_step, start
from beit3.train.loop import train
from beit3.weights.store import load
from tests.world_root import pretrain_recipe, vqkd_recipe

SOURCE = Path(__file__).resolve().parents[2] / "src"
SCRIPT = """
import json, runpy, sys
from beit3.recipe import Recipe
from beit3.task import load
from beit3.train.loop import train
for task, recipe, out in json.loads(sys.argv.pop(1)):
    kind = load(task)
    print(json.dumps(train(Recipe.from_dict(recipe, kind.Config), kind, out=out)))
runpy.run_module("beit3", run_name="__main__", alter_sys=True)
"""
"""Starting torch takes longer than these runs, so one pair of processes trains them all, the last one as `python -m beit3` does."""


def torchrun(*arguments: str) -> str:
    """What two gloo processes on this machine print; the tests are skipped where they cannot meet."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    if done.returncode and any(word in done.stderr for word in ("Address already in use", "RendezvousConnectionError", "hostname")):
        pytest.skip(f"no two processes can meet here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def close(one: list[dict], two: list[dict], tolerance: float = 1e-5) -> None:
    assert [(line["step"], sorted(line)) for line in one] == [(line["step"], sorted(line)) for line in two]
    for left, right in zip(one, two, strict=True):
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (left["step"], name)


def command_line(root: Path, out: Path) -> list[str]:
    return [
        "train", "vqkd", "--out", str(out), "--data.root", str(root), "--data.batch.main", "4", "--run.steps", "2",
        "--task.model.dim", "32", "--task.model.num_heads", "2", "--task.model.depth", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(root, visual, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """task -> (run by one process, run by two)."""
    place = tmp_path_factory.mktemp("runs")
    recipes: dict[str, tuple[type[Task], Recipe]] = {
        "vqkd": (VQKD, vqkd_recipe(root, steps=5, save_every=2)),
        "pretrain": (Pretrain, pretrain_recipe(root, visual, steps=5, save_every=2, eval_records=4)),
    }
    for name, (task, recipe) in recipes.items():
        train(recipe, task, out=place / name / "one")
    (place / "script.py").write_text(SCRIPT)
    jobs = [(name, recipe.to_dict(), str(place / name / "two")) for name, (_, recipe) in recipes.items()]
    (place / "cli").mkdir()
    assert main(command_line(root, place / "cli" / "one")) == 0
    said = torchrun(str(place / "script.py"), json.dumps(jobs), *command_line(root, place / "cli" / "two"))
    assert said.count('"step": 5') == 4, "every process has the scores"
    assert said.count('"step": 2') == 1, "the command line's first process prints them"
    return {name: (place / name / "one", place / name / "two") for name in (*recipes, "cli")}


@pytest.mark.parametrize("name", ["vqkd", "pretrain", "cli"])
def test_two_processes_equal_one(runs, name):
    one, two = runs[name]
    close(lines(one), lines(two))
    for left, right in zip(load(one / "last").parameters(), load(two / "last").parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    close([json.loads((one / "scores.json").read_text())], [json.loads((two / "scores.json").read_text())], 1e-3)


@pytest.mark.parametrize("name", ["vqkd", "pretrain", "cli"])
def test_one_of_them_writes(runs, name):
    one, two = runs[name]
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tensorboard" not in path.parts) for run in runs[name]]
    assert files[0] == files[1]
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert json.loads((two / "recipe.json").read_text())["environment"]["processes"] == 2


def test_one_goes_on_with_a_run_of_two(runs, tmp_path, root):
    """A checkpoint knows nothing of the number of processes."""
    one, two = runs["vqkd"]
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    for file in ("recipe.json", "metrics.jsonl", "checkpoints/step_00000004.pt"):
        (again / file).write_bytes((two / file).read_bytes())
    train(vqkd_recipe(root, steps=5, save_every=2), VQKD, out=again)
    close(lines(again), lines(one))


def test_alone_nothing_is_joined():
    assert start(RunConfig(device="cpu")) == torch.device("cpu")
    assert not torch.distributed.is_initialized()


def test_a_step_seeds_everything_by_its_number():
    draws = []
    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        seed_step(seed, step)
        draws.append(float(torch.rand(1)))
    assert draws[0] == draws[1] and len(set(draws)) == 3


@pytest.mark.parametrize(("precision", "wanted"), [("auto", False), ("float32", False), ("bfloat16", True)])
def test_precision_on_a_processor(precision, wanted):
    context = autocast(replace(RunConfig(), precision=precision), torch.device("cpu"))
    with context:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if wanted else torch.float32)
