"""The loop: one number however a step is cut, what a run leaves on disk, and what stops it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit3.data.loader import RecordDataset
from beit3.data.stores.records import write_records
from beit3.model.layers import Block
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.training import loop
from beit3.training.evaluate import evaluate
from beit3.training.loop import train
from beit3.training.optim import compute_learning_rate, count_steps
from beit3.weights.loading import load_weights
from tests.training.runs import find_newest_checkpoint, load_checkpoint_tensors, read_metrics
from tests.world_root import SMALL, make_pretrain_recipe, make_vqa_recipe, make_vqkd_recipe


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_micro_batches_end_to_end(root, tmp_path):
    """The same with loader, optimizer and log, for questions: 8 at once, or 3 + 3 + 2."""
    for size in (0, 3):
        train(make_vqa_recipe(root, steps=4, micro_batch=size), VQA, out=tmp_path / str(size))
    for whole, parts in zip(
        read_metrics(tmp_path / "0")[:4], read_metrics(tmp_path / "3")[:4], strict=True
    ):
        assert parts == pytest.approx(whole, rel=1e-4)


def test_recomputed_activations_change_nothing(root, tmp_path, monkeypatch):
    """Drop path is drawn alike in the second pass, which only the training steps make."""
    forward, calls = Block.forward, {"none": 0, "selective": 0, "full": 0}
    for name in calls:

        def counting(self, *given, name=name):
            calls[name] += self.training
            return forward(self, *given)

        monkeypatch.setattr(Block, "forward", counting)
        recipe = make_vqa_recipe(
            root, steps=3, checkpointing=name, model=replace(SMALL, drop_path_rate=0.5)
        )
        train(recipe, VQA, out=tmp_path / name)
    assert calls == {"none": 3 * 2, "selective": 2 * 3 * 2, "full": 2 * 3 * 2}
    for one, *others in zip(*(read_metrics(tmp_path / name)[:3] for name in calls), strict=True):
        assert all(one == pytest.approx(other) for other in others)
    kept, *others = (load_file(tmp_path / name / "last" / "model.safetensors") for name in calls)
    assert all(kept.keys() == other.keys() for other in others)


# What a run leaves --------------------------------------------------------------------------------


def test_a_run_logs_scores_and_keeps_its_weights(root, tmp_path):
    recipe = replace(
        make_vqa_recipe(root, steps=5), run=RunConfig(steps=5, log_every=2, eval_every=2)
    )
    scores = train(recipe, VQA, out=tmp_path / "run")
    steps = [(line["step"], "loss" in line) for line in read_metrics(tmp_path / "run")]
    assert steps == [(2, True), (2, False), (4, True), (4, False), (5, True), (5, False)], (
        "the last step is always logged"
    )
    evaluations = {
        line["step"]: line["val/accuracy"]
        for line in read_metrics(tmp_path / "run")
        if "val/accuracy" in line
    }
    task = load_weights(tmp_path / "run" / "last")
    again = evaluate(task, {"main": RecordDataset(root / "vqa/main/val.jsonl", root)}, batch_size=8)
    assert scores == {"step": 5, **again} and again["accuracy"] == evaluations[5]
    best = evaluate(
        load_weights(tmp_path / "run" / "best"),
        {"main": RecordDataset(root / "vqa/main/val.jsonl", root)},
        batch_size=8,
    )
    assert best["accuracy"] == max(evaluations.values())
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert Recipe.from_dict(kept["recipe"], VQA.Config) == recipe and kept["task"] == "vqa"


def test_evaluation_leaves_training_alone(root, tmp_path):
    """With drop path a network left in evaluation mode, or a disturbed random state, would show."""
    for every in (0, 1):
        recipe = make_vqa_recipe(
            root, steps=4, eval_every=every, model=replace(SMALL, drop_path_rate=0.5)
        )
        train(recipe, VQA, out=tmp_path / str(every))
    one, two = (
        [line for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("0", "1")
    )
    assert one == two


def test_limits_on_records(root, tmp_path, monkeypatch):
    seen = set()
    example = VQA.example

    def noting(self, record, train, *, rng=None):
        seen.add((train, record["id"]))
        return example(self, record, train, rng=rng)

    monkeypatch.setattr(VQA, "example", noting)
    recipe = make_vqa_recipe(root, steps=4, eval_records=3)
    train(
        replace(recipe, data=replace(recipe.data, limit=5, batch={"main": 4})),
        VQA,
        out=tmp_path / "run",
    )
    records = {
        split: [r["id"] for r in RecordDataset(root / f"vqa/main/{split}.jsonl", root)]
        for split in ("train", "val")
    }
    assert {key for is_train, key in seen if is_train} == set(records["train"][:5])
    assert {key for is_train, key in seen if not is_train} == set(records["val"][:3])


def test_epochs_are_of_the_largest_source():
    recipe = Recipe(
        data=DataConfig(batch={"a": 4, "b": 2}),
        run=RunConfig(epochs=1.5),
        optim=OptimConfig(warmup_epochs=0.5),
    )
    assert count_steps(recipe, {"a": 43, "b": 10}) == (15, 5)
    assert count_steps(replace(recipe, run=RunConfig(steps=7)), {"a": 43, "b": 10}) == (7, 5)
    assert count_steps(
        replace(recipe, optim=OptimConfig(warmup_steps=3, warmup_epochs=9)), {"a": 43, "b": 10}
    ) == (15, 3)
    assert count_steps(recipe, {"a": 2, "b": 1}) == (2, 0), (
        "less than a batch of records is an epoch of one step"
    )
    with pytest.raises(ValueError, match=r"run\.steps and run\.epochs are both 0"):
        count_steps(replace(recipe, run=RunConfig()), {"a": 43, "b": 10})


@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_learning_rates_follow_the_schedule(warmup):
    config = OptimConfig(lr=2e-3, min_lr=1e-4)
    for step in range(10):
        if step < warmup:
            wanted = 2e-3 * (step / warmup)
        else:
            angle = (step - warmup) / (10 - warmup) * math.pi
            wanted = 1e-4 + (2e-3 - 1e-4) * (math.cos(angle) + 1) / 2
        assert compute_learning_rate(step, 10, warmup, config) == pytest.approx(wanted, rel=1e-12)
    assert compute_learning_rate(10, 10, min(warmup, 9), config) == pytest.approx(1e-4), (
        "and would reach the floor at the next step"
    )


def test_the_schedule_reaches_the_optimizer(root, tmp_path):
    recipe = make_vqa_recipe(root, steps=5)
    train(recipe, VQA, out=tmp_path / "run")
    wanted = [compute_learning_rate(step, 5, 2, recipe.optim) for step in range(5)]
    assert [
        line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line
    ] == wanted and wanted[0] == 0


# Starting from weights ----------------------------------------------------------------------------


def test_init_takes_another_runs_backbone(root, vqkd_weights, tmp_path):
    train(
        make_pretrain_recipe(root, vqkd_weights, steps=3, eval_records=2),
        Pretrain,
        out=tmp_path / "pretrain",
    )
    start = tmp_path / "pretrain" / "last"
    recipe = make_vqa_recipe(root, steps=1)  # warmup starts at 0, so one step changes nothing
    train(recipe, VQA, out=tmp_path / "vqa", init=start)
    train(recipe, VQA, out=tmp_path / "scratch")
    theirs, ours, scratch = (
        load_file(path / "model.safetensors")
        for path in (start, tmp_path / "vqa/last", tmp_path / "scratch/last")
    )
    for name, value in ours.items():
        assert torch.equal(
            value, theirs[name] if name.startswith("backbone.") else scratch[name]
        ), name
    assert any(not torch.equal(scratch[name], value) for name, value in ours.items())
    with pytest.raises(ValueError, match=r"vqa holds another run \(its init differs\)"):
        train(recipe, VQA, out=tmp_path / "vqa")


def test_init_brings_its_own_text_tokenizer(root, vqkd_weights, tmp_path):
    """The records' own tokenizer would give the words other ids than the weights know."""
    train(
        make_pretrain_recipe(root, vqkd_weights, steps=1, eval_records=2),
        Pretrain,
        out=tmp_path / "pretrain",
    )
    other = TextTokenizer.train(
        ["another tokenizer of other words"] * 3, vocab_size=40, model_type="bpe"
    )
    moved = tmp_path / "root"
    (moved / "vqa").mkdir(parents=True)
    rows = {
        split: [dict(record) for record in RecordDataset(root / f"vqa/main/{split}.jsonl", root)]
        for split in ("train", "val")
    }
    for split, records in rows.items():
        write_records(moved / "vqa/main" / f"{split}.jsonl", records)
    (moved / "vqa/main/answer2label.txt").write_bytes(
        (root / "vqa/main/answer2label.txt").read_bytes()
    )
    other.save(moved / "text.model")
    train(
        make_vqa_recipe(moved, steps=1),
        VQA,
        out=tmp_path / "vqa",
        init=tmp_path / "pretrain" / "last",
    )
    assert (
        load_weights(tmp_path / "vqa" / "last").tokenizer.digest
        == TextTokenizer(root / "text.model").digest
    )


# What stops a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: replace(r, optim=replace(r.optim, lr=1e-5)), r"recipe\.optim\.lr"),
        (
            lambda r: replace(r, data=replace(r.data, batch={"main": 4})),
            r"recipe\.data\.batch\.main",
        ),
        (
            lambda r: replace(r, task=replace(r.task, model=replace(r.task.model, depth=3))),
            r"recipe\.task\.model\.depth",
        ),
    ],
)
def test_another_run_in_the_directory_is_left_alone(root, tmp_path, change, field):
    recipe = make_vqa_recipe(root, steps=1)
    train(recipe, VQA, out=tmp_path / "run")
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=rf"run holds another run \(its {field} differs\): give another --out"
    ):
        train(change(recipe), VQA, out=tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_a_directory_of_something_else_is_left_alone(root, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="photos is not empty and holds no run: give another --out"
    ):
        train(make_vqa_recipe(root), VQA, out=tmp_path / "photos")
    assert snapshot(tmp_path) == {"photos/a.txt": b"mine"}


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_it_spreads(root, tmp_path, monkeypatch, part):
    forward = VQA.forward

    def failing(self, batch):
        result = forward(self, batch)
        if batch["step"] == 3:
            loss = result["losses"]["loss"]
            if part == "loss":
                result["losses"]["loss"] = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(VQA, "forward", failing)
    recipe = make_vqa_recipe(root, save_every=1)
    with pytest.raises(FloatingPointError) as caught:
        train(recipe, VQA, out=tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 4: loss ") and "\n" not in message
    ids = [record["id"] for record in RecordDataset(root / "vqa/main/train.jsonl", root)]
    named = message.split("records ")[1].split(";")[0].split(", ")
    assert len(named) == 8 and set(named) <= set(ids)
    state = load_checkpoint_tensors(find_newest_checkpoint(tmp_path / "run"))
    assert find_newest_checkpoint(tmp_path / "run").name == "step_00000003" and all(
        value.isfinite().all() for value in state.values()
    )


@pytest.fixture
def damaged(root, tmp_path) -> Path:
    """Records of which two name an image whose data ends too early."""
    rows = [dict(record) for record in RecordDataset(root / "vqkd/main/train.jsonl", root)][:20]
    for row in rows[3:5]:
        path = tmp_path / f"half-{row['id'].replace('/', '-')}"
        path.write_bytes(Path(row["image"]).read_bytes()[:90])
        row["image"] = str(path)
    write_records(tmp_path / "root/vqkd/main/train.jsonl", rows)
    write_records(tmp_path / "root/vqkd/main/val.jsonl", rows[10:14])
    return tmp_path / "root"


def test_broken_records_are_named_once_and_passed_over(damaged, tmp_path, capsys):
    recipe = make_vqkd_recipe(damaged, steps=5)
    train(replace(recipe, data=replace(recipe.data, bad_share=0.1)), VQKD, out=tmp_path / "run")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(said) == 2 and all("half-" in line for line in said), (
        "two epochs, but each record once"
    )


def test_too_many_broken_records_end_the_run(damaged, tmp_path):
    recipe = make_vqkd_recipe(damaged, steps=5)
    with pytest.raises(
        ValueError,
        match=r"2 of 20 records of .*train\.jsonl cannot be read, data\.bad_share allows 5%: .*half-.*half-",
    ):
        train(
            replace(recipe, data=replace(recipe.data, bad_share=0.05)), VQKD, out=tmp_path / "run"
        )


def test_a_root_without_records(tmp_path):
    with pytest.raises(
        ValueError, match=r"no vqa/main/train\.jsonl under .*: write it with `beit3 prepare vqa"
    ):
        train(make_vqa_recipe(tmp_path / "nothing"), VQA, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda"])
def test_devices_that_are_not_here_are_the_users_fault(root, tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"run\.device {device} .*: use auto or cpu"):
        train(make_vqa_recipe(root, device=device), VQA, out=tmp_path / "run")


def test_loops_handlers_survive_other_threads(root, tmp_path):
    """Signals belong to the main thread: elsewhere a run goes without them."""
    from threading import Thread

    thread = Thread(
        target=train, args=(make_vqa_recipe(root, steps=1), VQA), kwargs={"out": tmp_path / "run"}
    )
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "last").is_dir() and loop.StopRequest().requested == 0
