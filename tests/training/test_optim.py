"""Parameter groups: layer decay, weight decay and learning rate factors of each task."""

import json
from dataclasses import replace

import pytest
import torch

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE, TINY, TINY_RELEASE
from beit3.recipe import OptimConfig, TaskConfig
from beit3.task import Task, list_tasks, load_task
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD
from beit3.training.optim import (
    clip_gradients,
    get_lr_scale,
    make_optimizer,
    make_parameter_groups,
    set_learning_rate,
)
from beit3.weights.release_format import find_released_keys
from tests.golden import find_fixture

WRAPPERS = {
    "vqa": "BEiT3ForVisualQuestionAnswering",
    "nlvr2": "BEiT3ForVisualReasoning",
    "captioning": "BEiT3ForCaptioning",
    "retrieval": "BEiT3ForRetrieval",
    "imagenet": "BEiT3ForImageClassification",
}
"""Task -> class of the original code."""

RELEASE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=4,
    ffn_dim=256,
    image_size=64,
    patch_size=16,
    vocab_size=512,
    text_positions=1024,
)


def collect_settings(task: Task, config: OptimConfig) -> dict[str, tuple[float, bool]]:
    """Returns parameter name -> (learning rate factor, whether it decays)."""
    settings = {}
    for group in make_parameter_groups(task, config):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert name not in settings and parameter is task.get_parameter(name)
            settings[name] = (group["lr_scale"], group["weight_decay"] > 0)
    assert settings.keys() == {name for name, _ in task.trainable_parameters()}, (
        "every parameter is in one group"
    )
    return settings


def rename_to_released(task: Task, settings: dict[str, tuple[float, bool]]) -> dict[str, list]:
    """Returns released name -> [layer, factor, decay]."""
    released = {}
    for name, (scale, decays) in settings.items():
        keys = find_released_keys(name, task.released_names)
        assert keys, name
        released |= {key: [task.layer_of(name)[0], scale, int(decays)] for key in keys}
    return released


@pytest.mark.parametrize("name", WRAPPERS)
def test_layer_decay_equals_the_recorded_one(name):
    expected = json.loads((find_fixture("optim") / "layer_decay.json").read_text())
    task_class = load_task(name)
    config = task_class.Config()
    config = replace(
        config,
        model=replace(RELEASE, final_norm=config.model.final_norm),
        image=replace(config.image, image_size=RELEASE.image_size),
    )
    with torch.device("meta"):
        task = task_class(config)
    layers = rename_to_released(
        task,
        collect_settings(task, OptimConfig(layer_decay=expected["layer_decay"], weight_decay=0.05)),
    )
    expected_layers = expected["params"][WRAPPERS[name]]
    assert expected["columns"] == ["layer_id", "lr_scale", "weight_decay_applied"]
    assert layers.keys() == expected_layers.keys()
    for key, (layer, scale, decays) in expected_layers.items():
        assert layers[key][0] == layer and layers[key][2] == decays, key
        assert layers[key][1] == pytest.approx(scale, abs=1e-12), key


def test_layer_decay_follows_the_position_of_a_parameter():
    """Embeddings are layer 0, block i is layer i + 1, the head is the last."""
    with torch.device("meta"):
        task = VQA(VQAConfig(model=replace(TINY, final_norm=False), num_answers=5))
    for name, (scale, decays) in collect_settings(task, OptimConfig(layer_decay=0.5)).items():
        parts = name.split(".")
        layer = (
            0
            if "embedding" in parts[1]
            else int(parts[2]) + 1
            if parts[1] == "blocks"
            else TINY.depth + 1
        )
        assert scale == 0.5 ** (TINY.depth + 1 - layer), name
        has_no_decay = (
            name.endswith((".bias", "image_embedding.positions", "image_embedding.class_token"))
            or ".norm" in name
        )
        assert decays == (not has_no_decay and name != "head.1.weight"), name


def test_pretraining_spares_more_parameters_from_decay():
    """Fine-tuning decays the text positions and the mask token, as released; pretraining does
    not."""
    with torch.device("meta"):
        task = Pretrain(PretrainConfig(model=TINY, image=Preprocessing(32)))
    tuned = {
        name for name, (_, decays) in collect_settings(task, OptimConfig()).items() if not decays
    }
    pretrained = {
        name
        for name, (_, decays) in collect_settings(task, Pretrain.recipes["base_224"].optim).items()
        if not decays
    }
    embedding = "backbone.image_embedding."
    assert (
        pretrained - tuned == {f"{embedding}mask_token", "backbone.text_embedding.positions"}
        and tuned <= pretrained
    )
    assert {
        f"{embedding}positions",
        f"{embedding}class_token",
        f"{embedding}patch.bias",
        "text_head.bias",
    } <= tuned
    assert (
        not {
            f"{embedding}patch.weight",
            "backbone.text_embedding.tokens.weight",
            "text_head.weight",
        }
        & pretrained
    )


@pytest.mark.parametrize("name", [name for name in list_tasks() if name != "backbone"])
def test_only_recipes_of_pretraining_name_parameters_without_decay(name):
    for label, recipe in load_task(name).recipes.items():
        is_spared = {"text_embedding.positions", "image_embedding.mask_token"} <= set(
            recipe.optim.no_decay
        )
        assert is_spared == (name == "pretrain"), label


def test_only_the_head_has_a_higher_learning_rate():
    """The released factor is for names that begin with `head`, so not for the pooler."""
    with torch.device("meta"):
        task = VQA(VQAConfig(model=replace(BASE, depth=2, final_norm=False)))
    for name, (scale, _) in collect_settings(task, VQA.recipes["base_480"].optim).items():
        assert scale == (20 if name.startswith("head.") else 1), name


def test_a_visual_tokenizer_has_no_layer_decay():
    with torch.device("meta"):
        task = VQKD(VQKD.recipes["demo"].task)
    assert {
        scale for scale, _ in collect_settings(task, OptimConfig(layer_decay=0.5)).values()
    } == {1.0}
    assert get_lr_scale(task, "backbone.encoder.positions", OptimConfig(layer_decay=0.5)) == 1


def test_frozen_parts_are_in_no_group(vqkd_weights):
    recipe = Pretrain.recipes["demo"].task
    task = Pretrain(replace(recipe, visual_tokenizer=str(vqkd_weights), num_codes=16))
    assert not [
        name
        for group in make_parameter_groups(task, OptimConfig())
        for name in group["names"]
        if "tokenizer" in name
    ]


def test_groups_have_labels_rates_and_decay():
    task = Backbone(TaskConfig(model=replace(TINY, depth=2)))
    config = OptimConfig(lr=0.1, layer_decay=0.5, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-5)
    optimizer = make_optimizer(task, config)
    set_learning_rate(optimizer, 0.2)
    labels = [group["label"] for group in optimizer.param_groups]
    assert len(labels) == len(set(labels)) and {
        "layer_0",
        "layer_0_no_decay",
        "layer_2",
        "head_no_decay",
    } <= set(labels)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.2 * group["lr_scale"])
        assert group["weight_decay"] == (0 if group["label"].endswith("_no_decay") else 0.3)
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)


def test_steps_equal_adamw_written_out():
    torch.manual_seed(0)
    task = Backbone(TaskConfig(model=replace(TINY, dim=8, num_heads=2, ffn_dim=8, depth=1)))
    config = OptimConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-5)
    parameter = task.backbone.blocks[0].ffn.image.fc1.weight
    value, first, second = (
        parameter.detach().clone(),
        torch.zeros_like(parameter),
        torch.zeros_like(parameter),
    )
    optimizer = make_optimizer(task, config)
    for step in (1, 2, 3):
        gradient = torch.randn_like(parameter)
        parameter.grad = gradient.clone()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        value = value * (1 - 0.1 * 0.3) - 0.1 * (first / (1 - 0.8**step)) / (
            (second / (1 - 0.9**step)).sqrt() + 1e-5
        )
        torch.testing.assert_close(parameter.detach(), value)


@pytest.mark.parametrize(("limit", "factor"), [(0, 1.0), (100.0, 1.0), (1.0, 0.2)])
def test_gradients_are_clipped_to_the_limit(limit, factor):
    parameters = [
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, limit) == pytest.approx(5)
    assert [float(p.grad) for p in parameters[:2]] == pytest.approx(
        [3 * factor, 4 * factor], rel=1e-5
    )
