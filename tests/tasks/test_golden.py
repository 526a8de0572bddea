"""Tests of each task against tensors recorded from the official code: outputs, losses, and the
gradient of every parameter.

Tolerances are 1e-4 for logits and features, 1e-4 of the value for losses and 1e-3 of the value for
gradient norms, since float32 is compared with float32 of other kernels. The recordings themselves
are within 2e-5 of float64.
"""

import json

import pytest
import torch
from torch import Tensor

from beit3.metrics.retrieval import compute_recall
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate
from beit3.ops.losses import drop_worst, label_smoothed_kl_div
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import NLVR2
from beit3.tasks.retrieval import Retrieval
from beit3.weights.loading import load_released
from beit3.weights.release_format import SCALAR_KEY, to_released_state
from tests.golden import find_fixture, load_tensors

TASKS = {
    "nlvr2": NLVR2,
    "captioning": Captioning,
    "retrieval": Retrieval,
    "imageclassification": ImageNet,
}
BEAMS = ["beam1_lp0.6", "beam2_lp1.0", "beam3_lp0.0", "beam3_lp0.6"]


def load_recorded_task(name: str):
    """Loads the recorded weights, all of them and no others, into a task in evaluation mode."""
    task, report = load_released(load_tensors(name, "model"), TASKS[name], num_heads=4)
    assert not report.fresh and not report.ignored
    return task.eval()


def load_batch(name: str) -> dict[str, Tensor]:
    """Returns the recorded inputs under our keys."""
    inputs = load_tensors(name, "inputs")
    if name == "imageclassification":
        return {"image": inputs["image"], "target": inputs["label"]}
    batch = {"text_padding": inputs["padding_mask"].bool(), "step": 0}
    if name == "nlvr2":
        images = torch.stack((inputs["image_a"], inputs["image_b"]), 1)
        return batch | {
            "image": images,
            "text": inputs["text_description"],
            "target": inputs["label"],
        }
    if name == "retrieval":
        return batch | {"image": inputs["image"], "text": inputs["text_description"]}
    is_masked = inputs["language_masked_pos"].bool()
    target = torch.where(is_masked, inputs["language_tokens"], -100)
    return batch | {
        "image": inputs["image"],
        "text": inputs["masked_tokens"],
        "text_target": target,
    }


def compute_mean_loss(task, batch) -> Tensor:
    """Returns the mean loss, as the loop computes it."""
    return task(batch)["losses"]["loss"] / task.targets(batch)["loss"]


@pytest.mark.parametrize("name", ["nlvr2", "imageclassification"])
def test_logits_equal_the_recorded_ones(name):
    with torch.inference_mode():
        logits = load_recorded_task(name).outputs(load_batch(name))["logits"]
    torch.testing.assert_close(logits, load_tensors(name, "outputs")["logits"], rtol=0, atol=1e-4)


def test_captioning_logits_equal_the_recorded_ones():
    expected, batch = load_tensors("captioning", "outputs"), load_batch("captioning")
    with torch.inference_mode():
        logits = load_recorded_task("captioning").outputs(batch)["logits"]
    torch.testing.assert_close(logits, expected["logits_all_positions"], rtol=0, atol=1e-4)
    is_masked = batch["text_target"] != -100
    torch.testing.assert_close(logits[is_masked], expected["logits_masked"], rtol=0, atol=1e-4)
    assert torch.equal(batch["text_target"][is_masked], expected["masked_labels"])


def test_features_and_similarities_equal_the_recorded_ones():
    task, expected = load_recorded_task("retrieval"), load_tensors("retrieval", "outputs")
    with torch.inference_mode():
        results = task.outputs(load_batch("retrieval"))
        torch.testing.assert_close(
            results["image_features"], expected["vision_cls"], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            results["text_features"], expected["language_cls"], rtol=0, atol=1e-5
        )
        similarities = (
            task.logit_scale.exp() * results["image_features"] @ results["text_features"].T
        )
    torch.testing.assert_close(similarities, expected["logits_per_image"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("nlvr2", "loss"),
        ("retrieval", "loss"),
        ("captioning", "loss_ls0_1"),
        ("imageclassification", "loss_label_smoothing_0_1"),
    ],
)
def test_loss_and_every_gradient_equal_the_recorded_ones(name, recorded):
    """ImageNet is in training mode, where labels are smoothed, without mixing."""
    task, batch = load_recorded_task(name), load_batch(name)
    if name == "imageclassification":
        task.train()
        object.__setattr__(task.config, "mixup", 0.0)
        object.__setattr__(task.config, "cutmix", 0.0)
    loss = compute_mean_loss(task, batch)
    torch.testing.assert_close(
        loss.detach(), load_tensors(name, "outputs")[recorded], rtol=1e-4, atol=0
    )
    loss.backward()
    gradients = {
        key: p.grad if p.grad is not None else torch.zeros_like(p)
        for key, p in task.named_parameters()
    }
    official = to_released_state(task, gradients)
    norms = json.loads((find_fixture(name) / "grad_norms.json").read_text())
    assert official.keys() == norms.keys()
    for key, norm in norms.items():
        assert float(official[key].norm()) == pytest.approx(norm or 0.0, rel=1e-3, abs=1e-6), key
    for key, gradient in load_tensors(name, "grads").items():
        torch.testing.assert_close(
            official[key], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()), msg=key
        )


def test_other_losses_equal_the_recorded_ones():
    expected = load_tensors("captioning", "outputs")
    losses = label_smoothed_kl_div(expected["logits_masked"], expected["masked_labels"], 0.1)
    torch.testing.assert_close(losses.mean(), expected["loss_ls0_1"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        drop_worst(losses, 0.2) / len(losses),
        expected["loss_ls0_1_dropworst0_2"],
        rtol=1e-5,
        atol=0,
    )
    plain = label_smoothed_kl_div(expected["logits_masked"], expected["masked_labels"], 0.0)
    torch.testing.assert_close(plain.mean(), expected["loss_ls0"], rtol=1e-5, atol=0)
    task, batch = load_recorded_task("captioning"), load_batch("captioning")
    with torch.no_grad():
        late = compute_mean_loss(task, batch | {"step": task.config.drop_worst_after + 1})
        at = compute_mean_loss(task, batch | {"step": task.config.drop_worst_after})
    torch.testing.assert_close(late, expected["loss_ls0_1_dropworst0_2"], rtol=1e-4, atol=0)
    torch.testing.assert_close(at, expected["loss_ls0_1"], rtol=1e-4, atol=0)
    with torch.no_grad():
        plain = compute_mean_loss(
            load_recorded_task("imageclassification"), load_batch("imageclassification")
        )
    torch.testing.assert_close(
        plain, load_tensors("imageclassification", "outputs")["loss_ce"], rtol=1e-4, atol=0
    )


def make_decoder_state() -> DecoderState:
    task = load_recorded_task("captioning")
    return DecoderState(
        task.backbone,
        task.text_head,
        load_tensors("captioning", "inputs")["image"],
        SpecialTokens(0, 2, 1, 511),
    )


@pytest.mark.parametrize("beams", BEAMS)
def test_beam_search_writes_the_recorded_captions(beams):
    expected = json.loads((find_fixture("captioning") / "beam_search.json").read_text())[beams]
    decoding = Decoding("beam", expected["num_beams"], expected["length_penalty"])
    with torch.inference_mode():
        captions = generate(make_decoder_state(), expected["max_len"], decoding)
    for caption, (score, ids) in zip(captions, expected["finished"], strict=True):
        assert [0, *caption.token_ids, 511] == ids
        assert caption.score == pytest.approx(score, abs=1e-4)


def test_greedy_tokens_and_step_logits_equal_the_recorded_ones():
    """The recording continues after EOS, our decoding does not."""
    expected = load_tensors("captioning", "outputs")
    greedy = expected["decode.greedy_tokens"].tolist()
    with torch.inference_mode():
        captions = generate(make_decoder_state(), 2 + len(greedy[0]), Decoding("greedy"))
        state = make_decoder_state()
        steps = [state.log_probs]
        for token_ids in load_tensors("captioning", "inputs")["decode.forced_tokens"].T:
            state.advance(torch.arange(4), token_ids)
            steps.append(state.log_probs)
    for caption, ids in zip(captions, greedy, strict=True):
        assert caption.token_ids == (ids[: ids.index(2)] if 2 in ids else ids)
    recorded = expected["decode.forced_step_logits"][:, :, 1].log_softmax(-1)
    torch.testing.assert_close(torch.stack(steps), recorded, rtol=0, atol=1e-4)


def test_recall_equals_the_recorded_one():
    inputs = load_tensors("retrieval", "inputs")
    ids, images = inputs["metric.image_ids"].tolist(), inputs["metric.image_feats"].numpy()
    distinct = sorted(set(ids))
    first = [ids.index(id) for id in distinct]
    results = compute_recall(
        images[first], inputs["metric.text_feats"].numpy(), [distinct.index(id) for id in ids]
    )
    expected = json.loads((find_fixture("retrieval") / "metric.json").read_text())
    for k in (1, 5, 10):
        assert 100 * results[f"text_recall@{k}"] == pytest.approx(expected[f"tr_r{k}"], abs=1e-4)
        assert 100 * results[f"image_recall@{k}"] == pytest.approx(expected[f"ir_r{k}"], abs=1e-4)
    assert 100 * results["mean_recall"] == pytest.approx(expected["average_score"], abs=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_exported_weights_equal_the_released_file(name):
    """They are equal to the bit, the scalar temperature included."""
    state = load_tensors(name, "model")
    again = to_released_state(load_recorded_task(name))
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].shape == value.shape and torch.equal(again[key], value), key
    assert SCALAR_KEY not in state or state[SCALAR_KEY].ndim == 0
