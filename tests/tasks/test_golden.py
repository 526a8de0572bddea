"""Each task against tensors recorded from the official code: outputs, losses, and the gradient of
every parameter.

Tolerances: logits and features 1e-4, losses 1e-4 relative to their size, gradient norms 1e-3
relative (float32 against
float32 on other kernels; the recordings themselves are within 2e-5 of float64).
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


def built(name: str):
    """The task with the recorded weights, in evaluation mode: every tensor of the file has its
    place, and none is fresh."""
    task, report = load_released(load_tensors(name, "model"), TASKS[name], num_heads=4)
    assert not report.fresh and not report.ignored
    return task.eval()


def batch_of(name: str) -> dict[str, Tensor]:
    """The recorded inputs under our keys."""
    given = load_tensors(name, "inputs")
    if name == "imageclassification":
        return {"image": given["image"], "target": given["label"]}
    batch = {"text_padding": given["padding_mask"].bool(), "step": 0}
    if name == "nlvr2":
        images = torch.stack((given["image_a"], given["image_b"]), 1)
        return batch | {
            "image": images,
            "text": given["text_description"],
            "target": given["label"],
        }
    if name == "retrieval":
        return batch | {"image": given["image"], "text": given["text_description"]}
    chosen = given["language_masked_pos"].bool()
    target = torch.where(chosen, given["language_tokens"], -100)
    return batch | {"image": given["image"], "text": given["masked_tokens"], "text_target": target}


def mean_loss(task, batch) -> Tensor:
    """As the loop forms it."""
    return task(batch)["losses"]["loss"] / task.targets(batch)["loss"]


@pytest.mark.parametrize("name", ["nlvr2", "imageclassification"])
def test_logits(name):
    with torch.inference_mode():
        logits = built(name).outputs(batch_of(name))["logits"]
    torch.testing.assert_close(logits, load_tensors(name, "outputs")["logits"], rtol=0, atol=1e-4)


def test_word_logits():
    expected, batch = load_tensors("captioning", "outputs"), batch_of("captioning")
    with torch.inference_mode():
        logits = built("captioning").outputs(batch)["logits"]
    torch.testing.assert_close(logits, expected["logits_all_positions"], rtol=0, atol=1e-4)
    chosen = batch["text_target"] != -100
    torch.testing.assert_close(logits[chosen], expected["logits_masked"], rtol=0, atol=1e-4)
    assert torch.equal(batch["text_target"][chosen], expected["masked_labels"])


def test_features_and_similarities():
    task, expected = built("retrieval"), load_tensors("retrieval", "outputs")
    with torch.inference_mode():
        found = task.outputs(batch_of("retrieval"))
        torch.testing.assert_close(
            found["image_features"], expected["vision_cls"], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            found["text_features"], expected["language_cls"], rtol=0, atol=1e-5
        )
        similarities = task.logit_scale.exp() * found["image_features"] @ found["text_features"].T
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
def test_loss_and_every_gradient(name, recorded):
    """ImageNet's in training mode, where labels are smoothed, without mixing."""
    task, batch = built(name), batch_of(name)
    if name == "imageclassification":
        task.train()
        object.__setattr__(task.config, "mixup", 0.0)
        object.__setattr__(task.config, "cutmix", 0.0)
    loss = mean_loss(task, batch)
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


def test_other_losses_of_captions_and_classes():
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
    task, batch = built("captioning"), batch_of("captioning")
    with torch.no_grad():
        late = mean_loss(task, batch | {"step": task.config.drop_worst_after + 1})
        at = mean_loss(task, batch | {"step": task.config.drop_worst_after})
    torch.testing.assert_close(late, expected["loss_ls0_1_dropworst0_2"], rtol=1e-4, atol=0)
    torch.testing.assert_close(at, expected["loss_ls0_1"], rtol=1e-4, atol=0)
    with torch.no_grad():
        plain = mean_loss(built("imageclassification"), batch_of("imageclassification"))
    torch.testing.assert_close(
        plain, load_tensors("imageclassification", "outputs")["loss_ce"], rtol=1e-4, atol=0
    )


def slots() -> DecoderState:
    task = built("captioning")
    return DecoderState(
        task.backbone,
        task.text_head,
        load_tensors("captioning", "inputs")["image"],
        SpecialTokens(0, 2, 1, 511),
    )


@pytest.mark.parametrize("beams", BEAMS)
def test_beam_search(beams):
    expected = json.loads((find_fixture("captioning") / "beam_search.json").read_text())[beams]
    decoding = Decoding("beam", expected["num_beams"], expected["length_penalty"])
    with torch.inference_mode():
        captions = generate(slots(), expected["max_len"], decoding)
    for caption, (score, ids) in zip(captions, expected["finished"], strict=True):
        assert [0, *caption.token_ids, 511] == ids
        assert caption.score == pytest.approx(score, abs=1e-4)


def test_greedy_words_and_step_logits():
    """The recording goes on after an end mark, ours does not."""
    expected = load_tensors("captioning", "outputs")
    greedy = expected["decode.greedy_tokens"].tolist()
    with torch.inference_mode():
        captions = generate(slots(), 2 + len(greedy[0]), Decoding("greedy"))
        asked = slots()
        steps = [asked.log_probs]
        for words in load_tensors("captioning", "inputs")["decode.forced_tokens"].T:
            asked.advance(torch.arange(4), words)
            steps.append(asked.log_probs)
    for caption, ids in zip(captions, greedy, strict=True):
        assert caption.token_ids == (ids[: ids.index(2)] if 2 in ids else ids)
    recorded = expected["decode.forced_step_logits"][:, :, 1].log_softmax(-1)
    torch.testing.assert_close(torch.stack(steps), recorded, rtol=0, atol=1e-4)


def test_recall():
    given = load_tensors("retrieval", "inputs")
    ids, images = given["metric.image_ids"].tolist(), given["metric.image_feats"].numpy()
    distinct = sorted(set(ids))
    first = [ids.index(id) for id in distinct]
    found = compute_recall(
        images[first], given["metric.text_feats"].numpy(), [distinct.index(id) for id in ids]
    )
    expected = json.loads((find_fixture("retrieval") / "metric.json").read_text())
    for k in (1, 5, 10):
        assert 100 * found[f"text_recall@{k}"] == pytest.approx(expected[f"tr_r{k}"], abs=1e-4)
        assert 100 * found[f"image_recall@{k}"] == pytest.approx(expected[f"ir_r{k}"], abs=1e-4)
    assert 100 * found["mean_recall"] == pytest.approx(expected["average_score"], abs=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_back_into_the_file(name):
    """Byte for byte, the scalar temperature included."""
    state = load_tensors(name, "model")
    again = to_released_state(built(name))
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].shape == value.shape and torch.equal(again[key], value), key
    assert SCALAR_KEY not in state or state[SCALAR_KEY].ndim == 0
