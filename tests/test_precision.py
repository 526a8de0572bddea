"""Number formats for inference: every task against float32, the choice, and the command line."""

import json
import pickle
import time
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3 import precision
from beit3.model.generation import Decoding
from beit3.model.packed import HalfHead, HalfLinear, pack
from beit3.precision import (
    PrecisionChoice,
    apply_precision,
    choose_precision,
    compare_precisions,
)
from beit3.predict import Predictor, load
from beit3.quantize import check_support
from beit3.task import Task
from beit3.tasks.coco import Coco
from beit3.tasks.nlvr2 import NLVR2
from beit3.tasks.vqkd import VQKD
from beit3.weights.matching import LoadReport
from beit3.weights.store import save_weights
from tests.predict.networks import make_pixels, make_predictor, make_task, write_image

TASKS = (
    "pretrain",
    "vqa",
    "nlvr2",
    "captioning",
    "retrieval",
    "imagenet",
    "coco",
    "ade20k",
    "backbone",
)
MIN_COSINE = {"bfloat16": 0.999, "float16": 0.99999}
"""Lowest cosine of any output with that of float32."""


def make_batch(task: Task) -> dict[str, Any]:
    """Makes tensors as a task's `outputs` takes them."""
    generator, size = torch.Generator().manual_seed(1), task.config.image.image_size
    shape = (3, 2, 3, size, size) if isinstance(task, NLVR2) else (3, 3, size, size)
    return {
        "id": ["a", "b", "c"],
        "image": torch.randn(shape, generator=generator),
        "text": torch.randint(5, 60, (3, 6), generator=generator),
        "text_padding": torch.arange(6) >= torch.tensor([[6], [4], [5]]),
        "num_texts": [1, 1, 1],
    }


def compute_outputs(task: Task) -> dict[str, Tensor]:
    """Returns the outputs of a task; of coco the map that the detector reads.

    Objects come in the order of their scores, which are alike with initial weights.
    """
    batch = make_batch(task)
    if isinstance(task, Coco):
        return {"features": task.backbone(batch["image"])}
    return task.outputs(batch)


def compare_outputs(exact: Task, other: Task, min_cosine: float) -> None:
    """Asserts that outputs have the dtype and the directions of those of float32, rounded."""
    expected, actual = compute_outputs(exact), compute_outputs(other)
    assert expected.keys() == actual.keys()
    for key, tensor in actual.items():
        assert tensor.dtype == expected[key].dtype, f"{key} stays in float32"
        # Two logits of an example nearly cancel at the start: they are compared over the batch.
        first_axis = 0 if tensor[0].numel() == 2 else 1
        rows = [output.flatten(first_axis) for output in (tensor, expected[key])]
        cosines = F.cosine_similarity(*rows, dim=first_axis)
        assert cosines.min() > min_cosine, key
    assert not all(torch.equal(expected[key], tensor) for key, tensor in actual.items())


@pytest.mark.parametrize("name", MIN_COSINE)
@pytest.mark.parametrize("task_name", TASKS)
@torch.inference_mode()
def test_outputs_of_every_task_are_those_of_float32(task_name, name, root):
    exact = make_task(task_name, root).eval()
    half = apply_precision(deepcopy(exact).train(), name)
    assert not half.training and not any(p.requires_grad for p in half.parameters())
    compare_outputs(exact, half, MIN_COSINE[name])


@pytest.mark.slow
@pytest.mark.parametrize("task_name", TASKS)
@torch.inference_mode()
def test_outputs_of_every_task_in_int8(task_name, root):
    try:
        check_support(torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    exact = make_task(task_name, root).eval()
    compare_outputs(exact, apply_precision(deepcopy(exact), "int8"), 0.998)


@pytest.mark.parametrize("name", MIN_COSINE)
@pytest.mark.parametrize("task_name", TASKS)
@torch.inference_mode()
def test_predictions_of_every_task_from_files(task_name, name, root, tmp_path):
    """Runs what a user runs, whose results need not be close with initial weights."""
    predictor = make_predictor(task_name, root, precision=name)
    image = write_image(tmp_path / "a.png", 0)
    inputs = {
        "nlvr2": (image, image, "a red cube"),
        "vqa": (image, "what color is it ?"),
    }.get(task_name, (image,))
    assert predictor.precision == name
    if predictor.task.input_names:
        json.dumps(predictor(*inputs), allow_nan=False)


@pytest.mark.parametrize("decoding", [Decoding("greedy"), Decoding("beam")])
@torch.inference_mode()
def test_captions_with_a_cache_are_those_of_float32(decoding, root):
    exact = make_task("captioning", root).eval()
    exact.config = replace(exact.config, decoding=decoding)
    exact.text_head.weight.mul_(20)  # so that one word is likelier than the others
    batch = make_batch(exact)
    expected = exact.predict(batch)
    half = apply_precision(deepcopy(exact), "bfloat16")
    predictions = half.predict(batch)
    assert [p["caption"] for p in predictions] == [p["caption"] for p in expected]
    assert len({p["caption"] for p in expected}) > 1
    for prediction, expected_prediction in zip(predictions, expected, strict=True):
        assert prediction["score"] == pytest.approx(expected_prediction["score"], rel=0.02)
        assert prediction["score"] != expected_prediction["score"]


def test_blocks_alone_are_halved_and_sums_and_heads_stay_in_float32(root):
    task = apply_precision(make_task("captioning", root), "bfloat16")
    dtypes: dict[torch.dtype, set[str]] = {}
    for name, parameter in task.named_parameters():
        dtypes.setdefault(parameter.dtype, set()).add(name)
    assert all(".attention." in name or ".ffn." in name for name in dtypes[torch.bfloat16])
    assert not any(".attention." in name or ".ffn." in name for name in dtypes[torch.float32])
    assert isinstance(task.text_head, HalfHead)
    assert isinstance(task.backbone.blocks[0].ffn.image.fc1, HalfLinear)


@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.inference_mode()
def test_half_layers_multiply_as_rounded_weights_do(rows):
    torch.manual_seed(rows)
    linear, states = nn.Linear(48, 32), torch.randn(2, rows, 48)
    half = HalfLinear(linear, torch.bfloat16)
    rounded = [linear.weight, linear.bias, states]
    weight, bias, inputs = (tensor.bfloat16().float() for tensor in rounded)
    expected = F.linear(inputs, weight, bias)
    for layer in (half, deepcopy(half), pickle.loads(pickle.dumps(half))):
        for _ in range(2):
            assert layer(states).dtype == torch.bfloat16
            assert torch.allclose(layer(states).float(), expected, rtol=1e-2, atol=1e-2)
    assert half(states[:, :0]).shape == (2, 0, 32)


@torch.inference_mode()
def test_a_copy_follows_its_own_weights():
    half = HalfLinear(nn.Linear(8, 8), torch.bfloat16)
    half(torch.ones(1, 8))
    copy = deepcopy(half)
    copy.weight.zero_()
    copy.bias.zero_()
    assert not copy(torch.ones(1, 8)).any() and half(torch.ones(1, 8)).any()


@pytest.mark.parametrize("rows", [1, 6, 33])
@torch.inference_mode()
def test_heads_over_a_vocabulary_keep_the_resolution_of_logits(rows):
    torch.manual_seed(rows)
    linear, states = nn.Linear(64, 5000), 3 * torch.randn(rows, 64)
    head = HalfHead(deepcopy(linear))
    assert head.weight.dtype == torch.float32
    for layer in (head, deepcopy(head), pickle.loads(pickle.dumps(head))):
        logits = layer(states)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, linear(states), atol=3e-3)  # bfloat16 would be off by 3e-2
    assert torch.equal(logits, linear(states)) == (rows > HalfHead.MAX_ROWS)


# Choosing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "name"), [((1.0, 0.5), "bfloat16"), ((1.0, 0.95), "float32"), ((1, 3), "float32")]
)
def test_the_faster_format_is_chosen(seconds, name, root, monkeypatch):
    task = make_task("captioning", root)
    weights = deepcopy(task.state_dict())

    def take(experts: list[nn.Module], image: Tensor, step: Tensor | None) -> float:
        assert image.shape[1] == 17 and step is not None and step.shape[1] == 6
        is_half = next(experts[0].parameters()).dtype == torch.bfloat16
        return float(seconds[is_half])

    monkeypatch.setattr(precision, "time_experts", take)
    choice = compare_precisions(task)
    assert choice == PrecisionChoice(name, seconds[0] / seconds[1])
    assert f"{seconds[0] / seconds[1]:.2f} times as fast" in str(choice)
    assert choose_precision(task) == name
    assert all(torch.equal(value, weights[key]) for key, value in task.state_dict().items())
    assert load_with(task, "auto").precision == name


def load_with(task: Task, name: str) -> Predictor:
    return Predictor(deepcopy(task), LoadReport("nowhere", (), {}, {}), precision=name)


@pytest.mark.parametrize("packed", [False, True])
def test_measuring_takes_a_second_at_most_and_changes_nothing(packed, root):
    task = make_task("captioning", root)
    started = time.process_time()
    choice = compare_precisions(task, packed=packed and torch.backends.mkl.is_available())
    assert time.process_time() - started < 4
    assert choice.name in ("float32", "bfloat16") and choice.gain > 0
    assert all(parameter.dtype == torch.float32 for parameter in task.parameters())


def test_without_measuring_or_blocks_a_cpu_gets_float32(root):
    assert choose_precision(make_task("vqa", root), measure=False) == "float32"
    assert choose_precision(VQKD(VQKD.recipes["demo"].task)) == "float32"


@pytest.mark.parametrize(("supported", "name"), [(True, "bfloat16"), (False, "float16")])
def test_accelerators_get_bfloat16_where_they_have_it(supported, name, root, monkeypatch):
    with torch.device("meta"):
        task = make_task("retrieval", root).to("meta")
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: supported)
    assert choose_precision(task) == name
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: supported)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    for device in ("cuda", "mps"):
        assert precision.has_bfloat16(torch.device(device)) == supported


def test_what_cannot_be_changed_is_refused(root):
    task = make_task("retrieval", root)
    with pytest.raises(ValueError, match=r"no precision 'bf16'; did you mean bfloat16\?"):
        apply_precision(task, "bf16")
    with pytest.raises(ValueError, match="vqkd has no Transformer blocks to compute in bfloat16"):
        apply_precision(VQKD(VQKD.recipes["demo"].task), "bfloat16")
    half = apply_precision(deepcopy(task), "bfloat16")
    with pytest.raises(ValueError, match="weights are packed or in half precision already"):
        apply_precision(half, "float16")
    if torch.backends.mkl.is_available():
        with pytest.raises(ValueError, match="weights are packed or in half precision already"):
            apply_precision(pack(task), "bfloat16")


# Command line -------------------------------------------------------------------------------------


def test_the_command_line_takes_a_format_and_reports_it(
    root, tmp_path, run_cli, run_failing_cli, capsys
):
    from beit3.cli import main

    task, image = make_task("retrieval", root), write_image(tmp_path / "a.png", 0)
    save_weights(task, tmp_path / "weights")
    arguments = ["predict", str(tmp_path / "weights"), str(image)]
    exact = np.array(json.loads(run_cli(*arguments))[0]["image"])
    for name in ("bfloat16", "auto"):
        assert main([*arguments, "--precision", name]) == 0
        captured = capsys.readouterr()
        features = np.array(json.loads(captured.out)[0]["image"])
        assert features @ exact > 0.999
        lines = [line for line in captured.err.splitlines() if line.startswith("precision ")]
        assert len(lines) == 1
        if name == "auto":
            assert "measured here: bfloat16 is" in lines[0]
        else:
            assert lines == ["precision bfloat16"] and not np.array_equal(features, exact)
    message = "--int8 and --precision bfloat16 disagree: leave one out"
    for verb in (arguments, ["eval", tmp_path / "weights"]):
        assert message in run_failing_cli(*verb, "--int8", "--precision", "bfloat16")
    assert "bf16" in run_failing_cli(*arguments, "--precision", "bf16")


def test_eval_scores_in_the_format(root, tmp_path, run_cli):
    save_weights(make_task("vqa", root), tmp_path / "weights")
    arguments = ("eval", tmp_path / "weights", "--data.root", root, "--predictions")
    run_cli(*arguments, tmp_path / "exact.jsonl")
    run_cli(*arguments, tmp_path / "half.jsonl", "--precision", "bfloat16")
    exact, half = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("exact.jsonl", "half.jsonl")
    )
    assert [row["id"] for row in exact] == [row["id"] for row in half] and exact != half


def test_load_names_the_format_and_rounds_after_the_fingerprint(root, tmp_path):
    save_weights(make_task("retrieval", root), tmp_path / "weights")
    exact, half = (load(tmp_path / "weights", precision=name) for name in ("float32", "bfloat16"))
    assert (exact.precision, half.precision) == ("float32", "bfloat16")
    assert exact.fingerprint == half.fingerprint
    images = [make_pixels(seed) for seed in range(2)]
    pair = [predictor.embed(images)["image"] for predictor in (exact, half)]
    assert ((pair[0] * pair[1]).sum(1) > 0.999).all() and not np.array_equal(*pair)
    assert np.allclose(np.linalg.norm(pair[1], axis=1), 1, atol=1e-6)
