"""Two processes train like one: the same records, gradients, files and checkpoints.

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
from beit3.task import Task, task_name
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
    "matching": Retrieval,
    "imagenet": ImageNet,
}
NUM_STEPS = 5
BY_NAMES = {"model": MODEL, "head": "names", "names_per_pass": 3}
"""Ten class names are divided over two processes and encoded three at a time."""
MATCHING = {"model": MODEL, "matching": True}
"""In micro-batches of two each pair has the other as its negative, so that none are drawn."""


def torchrun(*arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs two gloo processes to their end; skips the test where they cannot connect."""
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
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if process.returncode and any(
        message in process.stderr
        for message in ("Address already in use", "RendezvousConnectionError", "hostname")
    ):
        pytest.skip(f"two processes cannot connect: {process.stderr[-300:]}")
    return process


def assert_close(lines: list[dict], expected_lines: list[dict], tolerance: float) -> None:
    assert [(line["step"], sorted(line)) for line in lines] == [
        (line["step"], sorted(line)) for line in expected_lines
    ]
    for line, expected in zip(lines, expected_lines, strict=True):
        for name, value in line.items():
            assert expected[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (
                line["step"],
                name,
            )


def make_command(root: Path, out: Path) -> list[str]:
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


def make_recipes(root: Path, visual: Path, precision: str) -> dict[str, Recipe]:
    """Every objective, drop path 0, two micro-batches a process where a task allows it."""
    run: dict[str, Any] = {"steps": NUM_STEPS, "save_every": 2, "precision": precision}
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
        "matching": make_finetuning_recipe("retrieval", root, task=MATCHING, micro_batch=2, **run),
        "imagenet": make_finetuning_recipe("imagenet", root, task=BY_NAMES, micro_batch=3, **run),
    }


@pytest.fixture(scope="module")
def runs(root, vqkd_weights, tmp_path_factory) -> Path:
    """Returns a directory <precision>/<task>/{one,two} of runs of one and of two processes.

    The gradients of their first steps lie beside them.
    """
    folder = tmp_path_factory.mktemp("runs")
    jobs: list[tuple[str, dict, str, bool]] = []

    def add_job(name: str, recipe: Recipe, out: Path, *, record: bool = False) -> None:
        jobs.append((task_name(TASKS[name]), recipe.to_dict(), str(out), record))

    for precision in ("float64", "float32"):
        for name, recipe in make_recipes(root, vqkd_weights, precision).items():
            out = folder / precision / name
            add_job(name, recipe, out / "two", record=True)
            with RecordedGradients(out / "one"):
                loop.train(recipe, TASKS[name], out=out / "one")
    float32_recipes = make_recipes(root, vqkd_weights, "float32")
    vqa = float32_recipes["vqa"]
    add_job("vqa", replace(vqa, run=replace(vqa.run, async_save=True)), folder / "asynchronous")
    bfloat16 = make_finetuning_recipe("captioning", root, steps=2, precision="bfloat16")
    add_job("captioning", bfloat16, folder / "bfloat16" / "two")
    loop.train(bfloat16, Captioning, out=folder / "bfloat16" / "one")
    for name, recipe in float32_recipes.items():  # two processes resume what one began
        out = folder / "float32" / name
        copy_unfinished(out / "one", out / "one_then_two")
        add_job(name, recipe, out / "one_then_two")
    (folder / "cli").mkdir()
    assert main(make_command(root, folder / "cli" / "one")) == 0
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = torchrun(
        str(SCRIPT), str(folder / "jobs.json"), *make_command(root, folder / "cli" / "two")
    )
    assert process.returncode == 0, process.stderr[-4000:]
    assert process.stdout.count('"step": 2') == 1, (
        "the command line's first process prints the scores"
    )
    return folder


class RecordedGradients:
    """Stores the gradients of the first step, summed over processes, in `<out>.gradients.pt`."""

    def __init__(self, out: Path):
        self.out = out

    def __enter__(self) -> None:
        from tests.training.two_processes import store_gradients

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(loop, "measure_gradient_norms", store_gradients(self.out))

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def copy_unfinished(run: Path, out: Path) -> None:
    """Copies a run without its last weights and newest checkpoint, as if killed before them."""
    shutil.copytree(run, out)
    shutil.rmtree(find_newest_checkpoint(out))
    shutil.rmtree(out / "last")


CANCELING_TERMS = {"nlvr2 head.dense2.bias": 1 / 16}
"""Gradients that are sums of terms of this size, which cancel but for a millionth at the start."""

CASES = [(precision, name) for precision in ("float64", "float32") for name in TASKS]


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_two_processes_train_the_same_weights_as_one(runs, precision, name):
    """All logged values of every step are equal, and in float64 all final weights.

    Only the order of sums differs: 1e-9 in float64. In float32 rounding grows over steps of AdamW,
    whose first steps divide by gradients near zero: the first step agrees to 1e-5, later ones to
    1e-3.
    """
    one_process, two_processes = runs / precision / name / "one", runs / precision / name / "two"
    if precision == "float64":
        assert_close(read_metrics(one_process), read_metrics(two_processes), 1e-9)
        weights = [
            load_file(run / "last" / "model.safetensors") for run in (one_process, two_processes)
        ]
        assert weights[0].keys() == weights[1].keys() and any(
            weight.dtype == torch.float64 for weight in weights[0].values()
        )
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-9, atol=1e-9, msg=key)
    else:
        assert_close(read_metrics(one_process)[:1], read_metrics(two_processes)[:1], 1e-5)
        assert_close(read_metrics(one_process), read_metrics(two_processes), 1e-3)


@pytest.mark.parametrize(("precision", "name"), CASES)
def test_two_processes_have_the_same_gradients_as_one(runs, precision, name):
    one_process, two_processes = (
        torch.load(runs / precision / name / f"{run}.gradients.pt", weights_only=True)
        for run in ("one", "two")
    )
    assert one_process.keys() == two_processes.keys() and any(
        gradient.any() for gradient in one_process.values()
    )
    for key, gradient in one_process.items():
        # In float32: similarities to names nearly cancel (1e-4), and NLVR2's head starts a thousand
        # times smaller than its terms (3e-5).
        tolerance = {
            "float64": 1e-12,
            "float32": 1e-4 if name == "imagenet" else 3e-5 if name == "nlvr2" else 1e-5,
        }[precision]
        size = CANCELING_TERMS.get(f"{name} {key}", float(gradient.abs().max()))
        torch.testing.assert_close(
            two_processes[key], gradient, rtol=tolerance, atol=tolerance * size, msg=key
        )


def test_processes_have_different_numbers_of_targets(runs, root, vqkd_weights):
    """So the mean of the means of two processes would be another loss."""
    recipe = make_recipes(root, vqkd_weights, "float32")["pretrain"]
    counts = json.loads((runs / "float32" / "pretrain" / "two.targets.json").read_text())
    assert len(counts) == 2 and counts[0] != counts[1], recipe


@pytest.mark.parametrize("name", [*TASKS, "cli"])
def test_only_one_process_writes_files(runs, name):
    folder = runs / "cli" if name == "cli" else runs / "float32" / name
    one_process, two_processes = folder / "one", folder / "two"

    def list_files(run: Path) -> list[str]:
        return sorted(
            str(path.relative_to(run))
            for path in run.rglob("*")
            if not {"tensorboard", "checkpoints"} & set(path.parts)
        )

    assert list_files(one_process) == list_files(two_processes)
    assert len(list((two_processes / "tensorboard").iterdir())) == 1
    assert json.loads((two_processes / "recipe.json").read_text())["environment"]["processes"] == 2
    assert len(list(find_newest_checkpoint(two_processes).glob("*.safetensors"))) == 2


def test_bfloat16_trains_and_is_evaluated_sharded(runs):
    """Products in bfloat16 have 8 bits, so losses agree to 2 %. Gathered weights are evaluated."""
    one_process, two_processes = (read_metrics(runs / "bfloat16" / run) for run in ("one", "two"))
    assert [line["step"] for line in two_processes] == [line["step"] for line in one_process]
    assert "val/cider" in two_processes[-1] and two_processes[0]["loss"] == pytest.approx(
        one_process[0]["loss"], rel=0.02
    )


def test_asynchronous_checkpoints_of_two_processes_equal_synchronous_ones(runs):
    checkpoint, expected = (
        find_newest_checkpoint(runs / "asynchronous"),
        find_newest_checkpoint(runs / "float32" / "vqa" / "two"),
    )
    assert [file.name for file in sorted(checkpoint.iterdir())] == [
        file.name for file in sorted(expected.iterdir())
    ]
    for file in checkpoint.glob("*.safetensors"):
        assert_equal(load_file(file), load_file(expected / file.name))


@pytest.mark.parametrize("name", TASKS)
def test_one_process_resumes_a_run_of_two(runs, root, vqkd_weights, tmp_path, name):
    run = runs / "float32" / name / "two"
    copy_unfinished(run, tmp_path / "again")
    loop.train(
        make_recipes(root, vqkd_weights, "float32")[name], TASKS[name], out=tmp_path / "again"
    )
    assert_close(read_metrics(tmp_path / "again"), read_metrics(run), 1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_resume_a_run_of_one(runs, name):
    folder = runs / "float32" / name
    assert (
        json.loads(
            (find_newest_checkpoint(folder / "one_then_two") / "checkpoint.json").read_text()
        )["processes"]
        == 2
    )
    assert_close(read_metrics(folder / "one_then_two"), read_metrics(folder / "one"), 1e-5)


def test_torchrun_restarts_a_run_after_one_process_was_killed(root, tmp_path, runs):
    """Rank 1 is killed in step 4; rank 0 reports it, and after the restart the run is the same."""
    recipe = replace(
        make_vqa_recipe(root, steps=NUM_STEPS, save_every=2, eval_every=2, micro_batch=3), note=""
    )
    jobs = [("vqa", recipe.to_dict(), str(tmp_path / "run"), False)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    process = torchrun(
        str(SCRIPT), str(tmp_path / "jobs.json"), "kill", options=("--max-restarts", "1")
    )
    assert process.returncode == 0, process.stderr[-4000:]
    errors = " ".join(process.stderr.split())
    assert "another process of this run has ended (this was 0 of 2)" in errors, errors[-3000:]
    assert (tmp_path / "killed").exists(), "it was killed once"
    assert_close(
        read_metrics(tmp_path / "run"), read_metrics(runs / "float32" / "vqa" / "two"), 1e-5
    )


def test_two_processes_evaluate_like_one(runs, root, capsys, tmp_path):
    """Scores and predictions are those of one process; only the first process prints."""
    command = [
        "eval",
        str(runs / "float32" / "nlvr2" / "one"),
        "--data.root",
        str(root),
        "--batch",
        "3",
        "--predictions",
    ]
    assert main([*command, str(tmp_path / "one.jsonl")]) == 0
    process = torchrun("-m", "beit3", *command, str(tmp_path / "two.jsonl"))
    assert process.returncode == 0, process.stderr[-4000:]
    assert json.loads(process.stdout) == pytest.approx(json.loads(capsys.readouterr().out))
    one_process, two_processes = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [(prediction["id"], prediction["answer"]) for prediction in one_process] == [
        (prediction["id"], prediction["answer"]) for prediction in two_processes
    ]


# One process --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_precision_on_cpu(precision, dtype):
    with make_autocast(replace(RunConfig(), precision=precision), torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_frozen_parts_keep_their_weights_when_a_task_is_materialized(root, vqkd_weights):
    recipe = make_pretrain_recipe(root, vqkd_weights)
    task = build_task(Pretrain, recipe.task, None, recipe.run, torch.device("cpu"))
    materialize(task, torch.device("cpu"), 0)
    stored = load_file(vqkd_weights / "model.safetensors")
    assert task.visual_tokenizer is not None and not any(
        tensor.is_meta for tensor in task.state_dict().values()
    )
    for name, tensor in task.visual_tokenizer.state_dict().items():
        assert torch.equal(tensor, stored[f"backbone.{name}"]), name


def test_a_task_built_on_meta_has_the_usual_initial_values(root, vqkd_weights):
    """All parameters and the buffers of a codebook equal those of a task built on CPU."""
    for name, recipe in make_recipes(root, vqkd_weights, "float32").items():
        config = TASKS[name].configure(recipe.task, root)
        task = build_task(TASKS[name], config, None, recipe.run, torch.device("cpu"))
        materialize(task, torch.device("cpu"), recipe.run.seed)
        plain = TASKS[name](config)
        plain.init_weights(recipe.run.seed)
        expected = dict(plain.state_dict())
        assert task.state_dict().keys() == expected.keys()
        for key, tensor in task.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


def test_blocks_are_found_in_every_network_that_trains(root, vqkd_weights):
    all_recipes = make_recipes(root, vqkd_weights, "float32")
    counts = {
        name: len(find_blocks(TASKS[name](recipe.task))) for name, recipe in all_recipes.items()
    }
    assert counts == dict.fromkeys(TASKS, 2), "encoder and decoder; the frozen tokenizer has none"
