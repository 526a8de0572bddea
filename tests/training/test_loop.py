"""The training loop: steps, the files of a run, initial weights, and errors that end a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit3.data.loader import ExampleDataset, RecordDataset
from beit3.data.sampling import spread_indices
from beit3.data.stores.records import write_records
from beit3.data.text.tokenize import write_tokens
from beit3.model.layers import Block
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig
from beit3.task import grow_vocabulary
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.training import loop
from beit3.training.evaluate import evaluate, to_device
from beit3.training.loop import train
from beit3.training.optim import compute_learning_rate, count_steps, has_weight_decay
from beit3.weights.loading import load_weights
from tests.training.runs import find_newest_checkpoint, load_checkpoint_tensors, read_metrics
from tests.world_root import SMALL, make_pretrain_recipe, make_vqa_recipe, make_vqkd_recipe


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_micro_batches_change_no_metric(root, tmp_path):
    """Eight records in one batch, or in micro-batches of 3, 3 and 2, give the same metrics."""
    for size in (0, 3):
        train(make_vqa_recipe(root, steps=4, micro_batch=size), VQA, out=tmp_path / str(size))
    for expected, values in zip(
        read_metrics(tmp_path / "0")[:4], read_metrics(tmp_path / "3")[:4], strict=True
    ):
        assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_the_loop_is_a_plain_loop_with_clipping(root, tmp_path, micro_batch):
    """The weights of four steps, clipped to a hundredth of the first gradient norms."""
    recipe = make_vqa_recipe(root, steps=4, precision="float64", micro_batch=micro_batch)
    recipe = replace(recipe, optim=replace(recipe.optim, clip=0.01, weight_decay=0.05))
    train(recipe, VQA, out=tmp_path / "run")

    tokenizer = TextTokenizer(root / "text.model")
    task = VQA(VQA.configure(grow_vocabulary(recipe.task, tokenizer), root), tokenizer=tokenizer)
    task.double().init_weights(0)
    examples = ExampleDataset(
        {"main": RecordDataset(root / "vqa/main/train.jsonl", root)}, task.example, seed=0
    )
    matrices = [
        p for name, p in task.named_parameters() if has_weight_decay(name, p, recipe.optim.no_decay)
    ]
    others = [
        p
        for name, p in task.named_parameters()
        if not has_weight_decay(name, p, recipe.optim.no_decay)
    ]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
    )
    norms = []
    for step in range(4):
        batch = task.collate([examples["main", 8 * step + index] for index in range(8)])
        loss = task.train()(to_device(batch, torch.device("cpu"), torch.float64))["losses"]["loss"]
        (loss / 8).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(task.parameters(), 0.01)))
        for group in optimizer.param_groups:
            group["lr"] = compute_learning_rate(step, 4, 2, recipe.optim)
        optimizer.step()
        optimizer.zero_grad()

    logged = [line["gradient_norm"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert logged == pytest.approx(norms, rel=1e-9) and min(norms) > 1
    trained = load_file(tmp_path / "run/last/model.safetensors")
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(
            trained[name].double(), parameter.detach(), rtol=1e-6, atol=1e-8, msg=name
        )


def test_recomputed_activations_change_no_metric(root, tmp_path, monkeypatch):
    """Stochastic depth is the same in the recomputed pass, which only training steps have."""
    forward, num_calls = Block.forward, {"none": 0, "selective": 0, "full": 0}
    for name in num_calls:

        def count_and_forward(self, *arguments, name=name):
            num_calls[name] += self.training
            return forward(self, *arguments)

        monkeypatch.setattr(Block, "forward", count_and_forward)
        recipe = make_vqa_recipe(
            root, steps=3, checkpointing=name, model=replace(SMALL, drop_path_rate=0.5)
        )
        train(recipe, VQA, out=tmp_path / name)
    assert num_calls == {"none": 3 * 2, "selective": 2 * 3 * 2, "full": 2 * 3 * 2}
    for one, *others in zip(
        *(read_metrics(tmp_path / name)[:3] for name in num_calls), strict=True
    ):
        assert all(one == pytest.approx(other) for other in others)
    kept, *others = (
        load_file(tmp_path / name / "last" / "model.safetensors") for name in num_calls
    )
    assert all(kept.keys() == other.keys() for other in others)


# Files of a run -----------------------------------------------------------------------------------


def test_a_run_may_log_its_last_step_alone(root, tmp_path):
    recipe = make_vqa_recipe(root, steps=3)
    train(replace(recipe, run=replace(recipe.run, log_every=0)), VQA, out=tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [3]


def test_a_run_writes_metrics_scores_weights_and_recipe(root, tmp_path):
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
    last_scores = evaluate(
        task, {"main": RecordDataset(root / "vqa/main/val.jsonl", root)}, batch_size=8
    )
    assert scores == {"step": 5, **last_scores} and last_scores["accuracy"] == evaluations[5]
    best_scores = evaluate(
        load_weights(tmp_path / "run" / "best"),
        {"main": RecordDataset(root / "vqa/main/val.jsonl", root)},
        batch_size=8,
    )
    assert best_scores["accuracy"] == max(evaluations.values())
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert Recipe.from_dict(stored["recipe"], VQA.Config) == recipe and stored["task"] == "vqa"


def test_evaluation_changes_no_training_step(root, tmp_path):
    """With stochastic depth, evaluation mode or a changed random state would change the loss."""
    for every in (0, 1):
        recipe = make_vqa_recipe(
            root, steps=4, eval_every=every, model=replace(SMALL, drop_path_rate=0.5)
        )
        train(recipe, VQA, out=tmp_path / str(every))
    without_evaluation, with_evaluation = (
        [line for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("0", "1")
    )
    assert without_evaluation == with_evaluation


def test_limits_take_records_of_the_whole_split(root, tmp_path, monkeypatch):
    seen = set()
    example = VQA.example

    def record_example(self, record, train, *, rng=None):
        seen.add((train, record["id"]))
        return example(self, record, train, rng=rng)

    monkeypatch.setattr(VQA, "example", record_example)
    recipe = make_vqa_recipe(root, steps=4, eval_records=3)
    train(
        replace(recipe, data=replace(recipe.data, limit=5, batch={"main": 4})),
        VQA,
        out=tmp_path / "run",
    )
    records = {
        split: [record["id"] for record in RecordDataset(root / f"vqa/main/{split}.jsonl", root)]
        for split in ("train", "val")
    }
    for split, count in (("train", 5), ("val", 3)):
        read_ids = {record_id for is_train, record_id in seen if is_train == (split == "train")}
        size = len(records[split])
        assert read_ids == {records[split][index] for index in spread_indices(size, count)}
        assert len(read_ids) == count < size and read_ids != set(records[split][:count])


def test_an_epoch_is_one_of_the_largest_source():
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
    assert count_steps(recipe, {"a": 2, "b": 1}) == (2, 0), "an epoch has at least one step"
    with pytest.raises(ValueError, match=r"run\.steps and run\.epochs are both 0"):
        count_steps(replace(recipe, run=RunConfig()), {"a": 43, "b": 10})


@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_learning_rates_follow_the_schedule(warmup):
    config = OptimConfig(lr=2e-3, min_lr=1e-4)
    for step in range(10):
        if step < warmup:
            expected = 2e-3 * (step / warmup)
        else:
            angle = (step - warmup) / (10 - warmup) * math.pi
            expected = 1e-4 + (2e-3 - 1e-4) * (math.cos(angle) + 1) / 2
        assert compute_learning_rate(step, 10, warmup, config) == pytest.approx(expected, rel=1e-12)
    assert compute_learning_rate(10, 10, min(warmup, 9), config) == pytest.approx(1e-4), (
        "the minimum is reached at the step after the last"
    )


def test_scheduled_learning_rates_are_logged(root, tmp_path):
    recipe = make_vqa_recipe(root, steps=5)
    train(recipe, VQA, out=tmp_path / "run")
    expected = [compute_learning_rate(step, 5, 2, recipe.optim) for step in range(5)]
    assert [
        line["lr"] for line in read_metrics(tmp_path / "run") if "lr" in line
    ] == expected and expected[0] == 0


# Initial weights ----------------------------------------------------------------------------------


def test_a_run_starts_from_the_backbone_of_another(root, vqkd_weights, tmp_path):
    train(
        make_pretrain_recipe(root, vqkd_weights, steps=3, eval_records=2),
        Pretrain,
        out=tmp_path / "pretrain",
    )
    start = tmp_path / "pretrain" / "last"
    recipe = make_vqa_recipe(root, steps=1)  # warmup starts at 0, so one step changes nothing
    train(recipe, VQA, out=tmp_path / "vqa", init=start)
    train(recipe, VQA, out=tmp_path / "scratch")
    pretrained, tuned, scratch = (
        load_file(path / "model.safetensors")
        for path in (start, tmp_path / "vqa/last", tmp_path / "scratch/last")
    )
    for name, value in tuned.items():
        assert torch.equal(
            value, pretrained[name] if name.startswith("backbone.") else scratch[name]
        ), name
    assert any(not torch.equal(scratch[name], value) for name, value in tuned.items())
    with pytest.raises(ValueError, match=r"vqa holds another run \(its init differs\)"):
        train(recipe, VQA, out=tmp_path / "vqa")


def test_initial_weights_bring_their_text_tokenizer(root, vqkd_weights, tmp_path):
    """The tokenizer of the records would give other ids than in pretraining."""
    train(
        make_pretrain_recipe(root, vqkd_weights, steps=1, eval_records=2),
        Pretrain,
        out=tmp_path / "pretrain",
    )
    other_tokenizer = TextTokenizer.train(
        ["another tokenizer of other words"] * 3, vocab_size=40, model_type="bpe"
    )
    new_root = tmp_path / "root"
    (new_root / "vqa").mkdir(parents=True)
    records_by_split = {
        split: [dict(record) for record in RecordDataset(root / f"vqa/main/{split}.jsonl", root)]
        for split in ("train", "val")
    }
    for split, records in records_by_split.items():
        write_records(new_root / "vqa/main" / f"{split}.jsonl", records)
    (new_root / "vqa/main/answer2label.txt").write_bytes(
        (root / "vqa/main/answer2label.txt").read_bytes()
    )
    other_tokenizer.save(new_root / "text.model")
    train(
        make_vqa_recipe(new_root, steps=1),
        VQA,
        out=tmp_path / "vqa",
        init=tmp_path / "pretrain" / "last",
    )
    assert (
        load_weights(tmp_path / "vqa" / "last").tokenizer.digest
        == TextTokenizer(root / "text.model").digest
    )


# Errors that end a run ----------------------------------------------------------------------------


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
def test_a_directory_with_another_run_is_refused_unchanged(root, tmp_path, change, field):
    recipe = make_vqa_recipe(root, steps=1)
    train(recipe, VQA, out=tmp_path / "run")
    files = read_files(tmp_path)
    with pytest.raises(
        ValueError, match=rf"run holds another run \(its {field} differs\): give another --out"
    ):
        train(change(recipe), VQA, out=tmp_path / "run")
    assert read_files(tmp_path) == files


def test_a_directory_of_other_files_is_refused_unchanged(root, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="photos is not empty and holds no run: give another --out"
    ):
        train(make_vqa_recipe(root), VQA, out=tmp_path / "photos")
    assert read_files(tmp_path) == {"photos/a.txt": b"mine"}


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_nonfinite_loss_or_gradient_ends_the_run_before_the_update(
    root, tmp_path, monkeypatch, part
):
    forward = VQA.forward

    def spoil_step_4(self, batch):
        result = forward(self, batch)
        if batch["step"] == 3:
            loss = result["losses"]["loss"]
            if part == "loss":
                result["losses"]["loss"] = loss * math.nan
            else:
                loss.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(VQA, "forward", spoil_step_4)
    recipe = make_vqa_recipe(root, save_every=1)
    with pytest.raises(FloatingPointError) as caught:
        train(recipe, VQA, out=tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 4: loss ") and "\n" not in message
    ids = [record["id"] for record in RecordDataset(root / "vqa/main/train.jsonl", root)]
    named_ids = message.split("records ")[1].split(";")[0].split(", ")
    assert len(named_ids) == 8 and set(named_ids) <= set(ids)
    state = load_checkpoint_tensors(find_newest_checkpoint(tmp_path / "run"))
    assert find_newest_checkpoint(tmp_path / "run").name == "step_00000003" and all(
        value.isfinite().all() for value in state.values()
    )


@pytest.fixture
def damaged_root(root, tmp_path) -> Path:
    """Returns a root of 20 records, two of which have truncated image files."""
    records = [dict(record) for record in RecordDataset(root / "vqkd/main/train.jsonl", root)][:20]
    for record in records[3:5]:
        path = tmp_path / f"half-{record['id'].replace('/', '-')}"
        path.write_bytes(Path(record["image"]).read_bytes()[:90])
        record["image"] = str(path)
    write_records(tmp_path / "root/vqkd/main/train.jsonl", records)
    write_records(tmp_path / "root/vqkd/main/val.jsonl", records[10:14])
    return tmp_path / "root"


def test_unreadable_records_are_skipped_and_named_once(damaged_root, tmp_path, capsys):
    recipe = make_vqkd_recipe(damaged_root, steps=5)
    train(replace(recipe, data=replace(recipe.data, bad_share=0.1)), VQKD, out=tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(lines) == 2 and all("half-" in line for line in lines), (
        "there are two epochs, but each record is named once"
    )


def test_too_many_unreadable_records_end_the_run(damaged_root, tmp_path):
    recipe = make_vqkd_recipe(damaged_root, steps=5)
    with pytest.raises(
        ValueError,
        match=r"2 of 20 records of .*train\.jsonl cannot be read, "
        r"data\.bad_share allows 5%: .*half-.*half-",
    ):
        train(
            replace(recipe, data=replace(recipe.data, bad_share=0.05)), VQKD, out=tmp_path / "run"
        )


def test_ids_of_another_text_tokenizer_are_refused_before_anything_is_written(
    vqkd_weights, tmp_path
):
    raw, data = tmp_path / "raw", tmp_path / "root"
    for split in ("train", "val"):
        (raw / split).mkdir(parents=True)
        (raw / split / "a.txt").write_text("One two three. " * 90)
    tokenizers = [
        TextTokenizer.train([text], vocab_size=24, model_type="bpe")
        for text in ("One two three. " * 9, "Four five six seven. " * 9)
    ]
    write_tokens(raw, data / "pretrain/texts", tokenizers[0], pack=16, workers=1)
    tokenizers[1].save(data / "text.model")
    recipe = make_pretrain_recipe(data, vqkd_weights, steps=1)
    recipe = replace(recipe, data=replace(recipe.data, batch={"texts": 4}))
    with pytest.raises(ValueError, match=r"train\.tokens holds ids of another text tokenizer"):
        train(recipe, Pretrain, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_root_without_records_is_named(tmp_path):
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


def test_training_works_outside_the_main_thread(root, tmp_path):
    """Only the main thread can handle signals, so the run does without."""
    from threading import Thread

    thread = Thread(
        target=train, args=(make_vqa_recipe(root, steps=1), VQA), kwargs={"out": tmp_path / "run"}
    )
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "last").is_dir() and loop.StopRequest().requested == 0
