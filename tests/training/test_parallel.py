"""Two processes train what one trains: the same records, the same gradients, one set of files,
either's checkpoints.

Starting torch takes longer than these runs, so one pair of gloo processes trains them all.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from beit3.cli import main
from beit3.recipe import Recipe, RunConfig
from beit3.task import Task, load_task
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import NLVR2
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.retrieval import Retrieval
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.training import loop
from beit3.training.parallel import build_task, find_blocks, make_autocast, materialize
from tests.training.runs import assert_equal, find_newest_checkpoint, read_metrics
from tests.world_root import SMALL as MODEL
from tests.world_root import (
    make_finetuning_recipe,
    make_pretrain_recipe,
    make_vqa_recipe,
    make_vqkd_recipe,
)

SOURCE = Path(__file__).resolve().parents[2] / "src"
SCRIPT = Path(__file__).with_name("two_processes.py")
TASKS: dict[str, type[Task]] = {
    "vqkd": VQKD,
    "pretrain": Pretrain,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "captioning": Captioning,
    "retrieval": Retrieval,
    "imagenet": ImageNet,
}
STEPS = 5
BY_NAMES = {"model": MODEL, "head": "names", "names_per_pass": 3}
"""Ten names over two processes, three at a time and recomputed."""


def torchrun(*arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Two gloo processes on this machine, to their end; the tests are skipped where they cannot
    meet."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
        *arguments,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode and any(
        word in done.stderr
        for word in ("Address already in use", "RendezvousConnectionError", "hostname")
    ):
        pytest.skip(f"no two processes can meet here: {done.stderr[-300:]}")
    return done


def close(one: list[dict], two: list[dict], tolerance: float) -> None:
    assert [(line["step"], sorted(line)) for line in one] == [
        (line["step"], sorted(line)) for line in two
    ]
    for left, right in zip(one, two, strict=True):
        for name, value in left.items():
            assert right[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (
                left["step"],
                name,
            )


def command_line(root: Path, out: Path) -> list[str]:
    return [
        "train",
        "vqkd",
        "--out",
        str(out),
        "--data.root",
        str(root),
        "--data.batch.main",
        "4",
        "--run.steps",
        "2",
        "--task.model.dim",
        "32",
        "--task.model.num_heads",
        "2",
        "--task.model.depth",
        "1",
    ]


def recipes(root: Path, visual: Path, precision: str) -> dict[str, Recipe]:
    """Every objective, drop path 0, two micro-batches a process where a task allows it."""
    run: dict[str, Any] = {"steps": STEPS, "save_every": 2, "precision": precision}
    return {
        "vqkd": make_vqkd_recipe(root, **run),
        "pretrain": make_pretrain_recipe(root, visual, eval_records=4, micro_batch=2, **run),
        "vqa": make_vqa_recipe(root, micro_batch=3, eval_every=2, **run),
        "nlvr2": make_finetuning_recipe("nlvr2", root, task={"crop": (0.5, 1.0)}, **run),
        "captioning": make_finetuning_recipe(
            "captioning", root, task={"label_smoothing": 0.1}, micro_batch=3, **run
        ),
        "retrieval": make_finetuning_recipe(
            "retrieval", root, micro_batch=3, **run
        ),  # features are collected first
        "imagenet": make_finetuning_recipe("imagenet", root, task=BY_NAMES, micro_batch=3, **run),
    }


@pytest.fixture(scope="module")
def place(root, vqkd_weights, tmp_path_factory) -> Path:
    """<precision>/<task>/{one,two}: runs by one process and by two, with the gradients of their
    first step."""
    place = tmp_path_factory.mktemp("runs")
    jobs, given = [], {}
    for precision in ("float64", "float32"):
        for name, recipe in recipes(root, vqkd_weights, precision).items():
            out = place / precision / name
            jobs.append((name, recipe.to_dict(), str(out / "two"), True))
            given[out / "one"] = name, recipe
    for out, (name, recipe) in given.items():
        with recorded_gradients(out):
            loop.train(recipe, TASKS[name], out=out)
    beside = recipes(root, vqkd_weights, "float32")["vqa"]
    jobs.append(
        (
            "vqa",
            replace(beside, run=replace(beside.run, async_save=True)).to_dict(),
            str(place / "asynchronous"),
            False,
        )
    )
    half = make_finetuning_recipe("captioning", root, steps=2, precision="bfloat16")
    jobs.append(("captioning", half.to_dict(), str(place / "bfloat16" / "two"), False))
    loop.train(half, Captioning, out=place / "bfloat16" / "one")
    for name in TASKS:  # two go on with what one began
        begun(place / "float32" / name / "one", place / "float32" / name / "one_then_two")
        jobs.append(
            (
                name,
                given[place / "float32" / name / "one"][1].to_dict(),
                str(place / "float32" / name / "one_then_two"),
                False,
            )
        )
    (place / "cli").mkdir()
    assert main(command_line(root, place / "cli" / "one")) == 0
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(
        str(SCRIPT), str(place / "jobs.json"), *command_line(root, place / "cli" / "two")
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('"step": 2') == 1, "the command line's first process prints the scores"
    return place


class recorded_gradients:
    """Keeps the gradients of a run's first step, summed over processes, in `<out>.gradients.pt`."""

    def __init__(self, out: Path):
        self.out = out

    def __enter__(self) -> None:
        from tests.training.two_processes import recording

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(loop, "measure_gradient_norms", recording(self.out))

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def begun(whole: Path, out: Path) -> None:
    """A copy of a run as it was when it was killed after its second-newest checkpoint."""
    shutil.copytree(whole, out)
    shutil.rmtree(find_newest_checkpoint(out))
    shutil.rmtree(out / "last")


CANCELS = {"nlvr2 head.dense2.bias": 1 / 16}
"""Gradients that are sums of terms of this size and opposite signs, of which a millionth is left at
the start."""

CASES = [(precision, name) for precision in ("float64", "float32") for name in TASKS]


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_two_processes_equal_one(place, precision, name):
    """Losses and all logged values of every step; in float64 every weight at the end.

    Only the order of sums differs: 1e-9 in float64. In float32 rounding grows over steps of AdamW,
    whose first steps
    divide by gradients near zero, so the first step is held to 1e-5 and the later ones to what is
    left of it.
    """
    one, two = place / precision / name / "one", place / precision / name / "two"
    if precision == "float64":
        close(read_metrics(one), read_metrics(two), 1e-9)
        weights = [load_file(run / "last" / "model.safetensors") for run in (one, two)]
        assert weights[0].keys() == weights[1].keys() and any(
            w.dtype == torch.float64 for w in weights[0].values()
        )
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-9, atol=1e-9, msg=key)
    else:
        close(read_metrics(one)[:1], read_metrics(two)[:1], 1e-5)
        close(read_metrics(one), read_metrics(two), 1e-3)


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_gradients_are_the_same(place, precision, name):
    one, two = (
        torch.load(place / precision / name / f"{run}.gradients.pt", weights_only=True)
        for run in ("one", "two")
    )
    assert one.keys() == two.keys() and any(gradient.any() for gradient in one.values())
    for key, gradient in one.items():
        # In float32: similarities to names nearly cancel (1e-4), and NLVR2's head starts a thousand
        # times smaller than its terms (3e-5).
        tolerance = {
            "float64": 1e-12,
            "float32": 1e-4 if name == "imagenet" else 3e-5 if name == "nlvr2" else 1e-5,
        }[precision]
        size = CANCELS.get(f"{name} {key}", float(gradient.abs().max()))
        torch.testing.assert_close(
            two[key], gradient, rtol=tolerance, atol=tolerance * size, msg=key
        )


def test_targets_differ_between_processes(place, root, vqkd_weights):
    """Averaging the means of two processes would give another number."""
    recipe = recipes(root, vqkd_weights, "float32")["pretrain"]
    counts = json.loads((place / "float32" / "pretrain" / "two.targets.json").read_text())
    assert len(counts) == 2 and counts[0] != counts[1], recipe


@pytest.mark.parametrize("name", [*TASKS, "cli"])
def test_one_of_them_writes(place, name):
    folder = place / "cli" if name == "cli" else place / "float32" / name
    one, two = folder / "one", folder / "two"

    def files(run: Path) -> list[str]:
        return sorted(
            str(path.relative_to(run))
            for path in run.rglob("*")
            if not {"tensorboard", "checkpoints"} & set(path.parts)
        )

    assert files(one) == files(two)
    assert len(list((two / "tensorboard").iterdir())) == 1
    assert json.loads((two / "recipe.json").read_text())["environment"]["processes"] == 2
    assert len(list(find_newest_checkpoint(two).glob("*.safetensors"))) == 2


def test_bfloat16_trains_and_is_evaluated_sharded(place):
    """Products in bfloat16 have 8 bits: losses to 2 %. What is gathered for training must also do
    for evaluation."""
    one, two = (read_metrics(place / "bfloat16" / run) for run in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert "val/cider" in two[-1] and two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.02)


def test_two_write_beside_their_training_what_they_write_in_turn(place):
    mine, theirs = (
        find_newest_checkpoint(place / "asynchronous"),
        find_newest_checkpoint(place / "float32" / "vqa" / "two"),
    )
    assert [file.name for file in sorted(mine.iterdir())] == [
        file.name for file in sorted(theirs.iterdir())
    ]
    for file in mine.glob("*.safetensors"):
        assert_equal(load_file(file), load_file(theirs / file.name))


@pytest.mark.parametrize("name", TASKS)
def test_one_goes_on_with_a_run_of_two(place, root, vqkd_weights, tmp_path, name):
    two = place / "float32" / name / "two"
    begun(two, tmp_path / "again")
    loop.train(recipes(root, vqkd_weights, "float32")[name], TASKS[name], out=tmp_path / "again")
    close(read_metrics(tmp_path / "again"), read_metrics(two), 1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_two_go_on_with_a_run_of_one(place, name):
    folder = place / "float32" / name
    assert (
        json.loads(
            (find_newest_checkpoint(folder / "one_then_two") / "checkpoint.json").read_text()
        )["processes"]
        == 2
    )
    close(read_metrics(folder / "one_then_two"), read_metrics(folder / "one"), 1e-5)


def test_a_killed_process_ends_the_other_and_torchrun_goes_on(root, tmp_path, place):
    """Rank 1 is killed in step 4; the other says so, and with --max-restarts the run ends as if
    nothing had happened."""
    recipe = replace(
        make_vqa_recipe(root, steps=STEPS, save_every=2, eval_every=2, micro_batch=3), note=""
    )
    jobs = [("vqa", recipe.to_dict(), str(tmp_path / "run"), False)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(
        str(SCRIPT), str(tmp_path / "jobs.json"), "kill", options=("--max-restarts", "1")
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = " ".join(done.stderr.split())
    assert "another process of this run has ended (this was 0 of 2)" in said, said[-3000:]
    assert (tmp_path / "killed").exists(), "it was killed once"
    close(read_metrics(tmp_path / "run"), read_metrics(place / "float32" / "vqa" / "two"), 1e-5)


def test_two_processes_share_an_evaluation(place, root, capsys, tmp_path):
    """Scores and predictions are those of one process; only the first speaks."""
    verb = [
        "eval",
        str(place / "float32" / "nlvr2" / "one"),
        "--data.root",
        str(root),
        "--batch",
        "3",
        "--predictions",
    ]
    assert main([*verb, str(tmp_path / "one.jsonl")]) == 0
    done = torchrun("-m", "beit3", *verb, str(tmp_path / "two.jsonl"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == pytest.approx(json.loads(capsys.readouterr().out))
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [(row["id"], row["answer"]) for row in one] == [
        (row["id"], row["answer"]) for row in two
    ]


# One process --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_precision_on_a_processor(precision, wanted):
    with make_autocast(replace(RunConfig(), precision=precision), torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == wanted


def test_a_task_is_built_without_its_frozen_part_being_emptied(root, vqkd_weights):
    recipe = make_pretrain_recipe(root, vqkd_weights)
    task = build_task(Pretrain, recipe.task, None, recipe.run, torch.device("cpu"))
    materialize(task, torch.device("cpu"), 0)
    theirs = load_file(vqkd_weights / "model.safetensors")
    assert task.visual_tokenizer is not None and not any(
        tensor.is_meta for tensor in task.state_dict().values()
    )
    for name, tensor in task.visual_tokenizer.state_dict().items():
        assert torch.equal(tensor, theirs[f"backbone.{name}"]), name


def test_a_task_built_on_meta_is_the_task(root, vqkd_weights):
    """Every parameter, and the buffers of a codebook, have the values that a task built in place
    gets."""
    for name, recipe in recipes(root, vqkd_weights, "float32").items():
        config = load_task(name).configure(recipe.task, root)
        built = build_task(TASKS[name], config, None, recipe.run, torch.device("cpu"))
        materialize(built, torch.device("cpu"), recipe.run.seed)
        plain = TASKS[name](config)
        plain.init_weights(recipe.run.seed)
        theirs = dict(plain.state_dict())
        assert built.state_dict().keys() == theirs.keys()
        for key, tensor in built.state_dict().items():
            assert torch.equal(tensor, theirs[key]), key


def test_blocks_of_all_networks_that_train(root, vqkd_weights):
    all_recipes = recipes(root, vqkd_weights, "float32")
    counts = {
        name: len(find_blocks(TASKS[name](recipe.task))) for name, recipe in all_recipes.items()
    }
    assert counts == dict.fromkeys(TASKS, 2), (
        "encoder and decoder; the frozen tokenizer is none of ours"
    )
