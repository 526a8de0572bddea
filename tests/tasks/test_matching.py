"""Tests of retrieval's matching head: which pairs it judges, its loss, and old weights without
it."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beit3.data.loader import RecordDataset
from beit3.ops.negatives import draw_negatives
from beit3.recipe import OptimConfig
from beit3.task import Batch, grow_vocabulary
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.training.optim import clip_gradients, make_optimizer
from beit3.training.step import backward, sum_targets
from beit3.weights.loading import load_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.world_root import make_finetuning_recipe

FLOAT32 = torch.autocast("cpu", enabled=False)


def build_task(root, **fields: Any) -> Retrieval:
    tokenizer = TextTokenizer(root / "text.model")
    recipe = make_finetuning_recipe("retrieval", root, task={"matching": True} | fields)
    task = Retrieval(grow_vocabulary(recipe.task, tokenizer), tokenizer=tokenizer)
    task.init_weights(0)
    return task


@pytest.fixture
def task(root) -> Retrieval:
    return build_task(root)


def make_batch(task: Retrieval, root, indices: list[int]) -> Batch:
    """Returns training records; three in a row are captions of one image."""
    source = RecordDataset(root / "retrieval/main/train.jsonl", root)
    return task.collate([task.example(source[index], False) for index in indices])


# Negatives ----------------------------------------------------------------------------------------


def test_negatives_are_drawn_in_proportion_to_their_similarity():
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0]]).expand(20_000, 4)
    is_match = torch.tensor([[True, False, False, False]]).expand(20_000, 4)
    drawn = draw_negatives(logits, is_match, 2)
    assert drawn.shape == (20_000, 2) and (drawn[:, 0] != drawn[:, 1]).all() and drawn.min() == 1
    frequencies = torch.bincount(drawn[:, 0], minlength=4)[1:] / 20_000
    torch.testing.assert_close(frequencies, torch.tensor([0.0, 1, 2]).softmax(0), atol=0.01, rtol=0)


def test_other_captions_of_an_image_are_no_negatives(task, root):
    batch = make_batch(task, root, [0, 1, 3, 6])
    torch.manual_seed(0)
    for _ in range(20):
        images, texts, is_match = task.draw_pairs(batch, task.outputs(batch))
        assert len(images) == task.targets(batch)["matching"] == 12
        assert images[:4].tolist() == texts[:4].tolist() == [0, 1, 2, 3]
        assert images[4:8].tolist() == texts[8:].tolist() == [0, 1, 2, 3]
        assert is_match.tolist() == [True] * 4 + [False] * 8
        for image, text in zip(images[4:].tolist(), texts[4:].tolist(), strict=True):
            assert image != text and {image, text} != {0, 1}


def test_a_pair_without_a_wrong_partner_is_judged_as_the_pair_that_it_is(task, root):
    for indices in ([0], [0, 1, 2]):
        batch = make_batch(task, root, indices)
        assert task.draw_pairs(batch, task.outputs(batch))[2].all()
        assert task.targets(batch) == {"loss": len(indices), "matching": 3 * len(indices)}


# Loss ---------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_pairs_read_one_at_a_time(root):
    task = build_task(root, matching_negatives=2).eval()
    batch = make_batch(task, root, [0, 3, 6, 9])
    torch.manual_seed(5)
    losses = task(batch)["losses"]
    torch.manual_seed(5)
    images, texts, is_match = task.draw_pairs(batch, task.outputs(batch))
    total = torch.zeros(())
    for image, text, label in zip(images, texts, is_match, strict=True):
        real = ~batch["text_padding"][text]
        states = task.backbone(
            task.normalize_images(batch)[image][None], batch["text"][text][real][None]
        )
        logit = task.matching_head(states.of("image")[0, 0])[0]
        total = total - F.logsigmoid(logit if label else -logit)
    assert len(images) == 4 * 5
    torch.testing.assert_close(losses["matching"], total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        losses["loss"], task.compare(task.outputs(batch))["losses"]["loss"], rtol=1e-6, atol=1e-6
    )


def test_every_parameter_gets_a_gradient(task, root):
    task.train()
    batch = make_batch(task, root, [0, 3, 6, 9])
    sum(task(batch)["losses"].values()).backward()
    assert not task.unused_parameters.keys() & {"matching_head"}
    unused = tuple(f"{prefix}." for prefix in task.unused_parameters)
    for name, parameter in task.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient != f"{name}.".startswith(unused), name


def test_cached_features_and_micro_batches_give_the_sum_of_all_losses(root):
    """With all wrong partners as negatives nothing is drawn by chance."""
    task = build_task(root, matching_negatives=7, matching_weight=0.5).double().train()
    parts = [make_batch(task, root, indices) for indices in ([0, 3, 6], [9, 12, 15], [18])]
    totals = sum_targets(task, parts)
    assert totals == {"loss": 7, "matching": 2 * 3 * 7 + 3}
    outputs = [task.outputs(part) for part in parts]
    features = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    loss = task.compare(features)["losses"]["loss"] / 7
    matching, num_correct = torch.zeros((), dtype=torch.float64), 0
    for part, output in zip(parts, outputs, strict=True):
        result = task.compute_further_losses(part, output)
        matching = matching + result["losses"]["matching"] / totals["matching"]
        num_correct += int(result["metrics"]["matching/accuracy"])
    (loss + 0.5 * matching).backward()
    expected = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}

    task.zero_grad()
    values, losses = backward(task, parts, totals, FLOAT32)
    assert values["loss"] == pytest.approx(float((loss + 0.5 * matching).detach()), rel=1e-9)
    assert values["loss/matching"] == pytest.approx(float(matching.detach()), rel=1e-9)
    assert values["loss/loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert values["matching/accuracy"] == pytest.approx(num_correct / totals["matching"])
    assert len(losses) == 3
    for name, parameter in task.named_parameters():
        assert (parameter.grad is None) == (name not in expected), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_the_same_step_draws_the_same_negatives(task, root):
    """A resumed run repeats a step exactly, because torch's random state is seeded per step."""
    parts = [make_batch(task, root, indices) for indices in ([0, 3, 6], [9, 12, 15])]
    values = []
    for _ in range(2):
        torch.manual_seed(7)
        values.append(backward(task.train(), parts, sum_targets(task, parts), FLOAT32)[0])
    assert values[0] == values[1]


def test_the_head_learns_to_tell_pairs_apart(root):
    task = build_task(root, matching_negatives=5)
    batch = make_batch(task, root, [0, 3, 6, 9, 12, 15])
    optimizer = make_optimizer(task.train(), OptimConfig(lr=2e-3, weight_decay=0.0))
    torch.manual_seed(0)
    for _ in range(150):
        result = task(batch)["losses"]
        (result["loss"] / 6 + result["matching"] / 66).backward()
        clip_gradients(task.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    task.eval()
    grid = [(image, text) for image in range(6) for text in range(6)]
    images, texts = zip(*grid, strict=True)
    with torch.no_grad():
        logits = task.match(
            {
                "image": batch["image"][list(images)],
                "text": batch["text"][list(texts)],
                "text_padding": batch["text_padding"][list(texts)],
            }
        )
    assert ((logits > 0) == torch.eye(6).bool().flatten()).float().mean() > 0.95


# Weights ------------------------------------------------------------------------------------------


def test_one_directory_searches_and_judges_pairs(task, root, tmp_path):
    save_weights(task.eval(), tmp_path / "weights")
    loaded = load_weights(tmp_path / "weights").eval()
    batch = make_batch(task, root, [0, 3])
    with torch.no_grad():
        assert torch.equal(loaded.match(batch), task.match(batch))
        assert loaded.predict(batch)[0].keys() == {"id", "image", "texts"}


def test_weights_and_recipes_from_before_the_head_load_as_they_are(root, tmp_path):
    plain = build_task(root, matching=False).eval()
    save_weights(plain, tmp_path / "weights")
    file = tmp_path / "weights" / "config.json"
    stored = json.loads(file.read_text())
    for name in ("matching", "matching_negatives", "matching_hardness", "matching_weight"):
        del stored["config"][name]
    file.write_text(json.dumps(stored))
    loaded = load_weights(tmp_path / "weights").eval()
    assert loaded.config == plain.config
    batch = make_batch(plain, root, [0, 3, 6])
    assert "image_id" not in batch and plain.targets(batch) == {"loss": 3}
    assert plain(batch)["losses"].keys() == {"loss"}
    with pytest.raises(ValueError, match=r"no matching head: train one with a recipe \*_matching"):
        loaded.match(batch)


def test_plain_retrieval_starts_the_head_of_new_weights(root, tmp_path):
    """The contrastive part of both networks is the same to the bit."""
    plain, task = build_task(root, matching=False), build_task(root)
    state = plain.state_dict()
    assert task.state_dict().keys() - state.keys() == {"matching_head.weight", "matching_head.bias"}
    for name, value in state.items():
        assert torch.equal(task.state_dict()[name], value), name


def test_the_head_has_no_name_in_the_release(root):
    model = build_task(root).config.model
    release = replace(
        model, shared_attention=False, shared_norms=False, sub_ln=True, fusion_layers=0
    )
    with pytest.raises(ValueError, match="matching_head.weight has no counterpart"):
        to_released_state(build_task(root, model=release))


def test_recipes_with_the_head_differ_from_those_without_in_its_fields_and_the_optimizer():
    for name, recipe in Retrieval.recipes.items():
        if name.endswith("_matching"):
            plain = Retrieval.recipes[name.removesuffix("_matching")]
            assert recipe.task.matching
            defaults = {
                field.name: field.default
                for field in fields(recipe.task)
                if field.name.startswith("matching")
            }
            task = replace(recipe.task, **defaults)
            optim = replace(recipe.optim, name=plain.optim.name, lr=plain.optim.lr)
            assert replace(recipe, task=task, optim=optim, note=plain.note) == plain


@pytest.mark.parametrize(
    "setting", [{"matching_negatives": 0}, {"matching_hardness": -1.0}, {"matching_weight": -1.0}]
)
def test_settings_out_of_range_are_one_line(setting):
    with pytest.raises(ValueError, match=f"task.{next(iter(setting))}"):
        RetrievalConfig(**setting)
