"""Released files are identified by their keys and written under the same names."""

import json
from dataclasses import replace

import pytest
import torch

from beit3.data.views.preprocessing import IMAGENET_MEAN_STD, VL_MEAN_STD
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY
from beit3.model.generation import Decoding
from beit3.recipe import TaskConfig
from beit3.task import Task, task_name
from beit3.tasks.backbone import Backbone
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqa import VQA
from beit3.weights.loading import load_released
from beit3.weights.release_format import identify_checkpoint, infer_model_config, to_released_state
from tests.golden import find_fixture, load_tensors
from tests.weights.states import (
    BACKBONE,
    add_pretraining_heads,
    assert_equal_tensors,
    load_released_shapes,
    make_backbone,
)

# Identification -----------------------------------------------------------------------------------


TASK_NAMES = {"vqav2": "vqa", "imageclassification": "imagenet"}


def test_released_models_are_identified_by_their_keys():
    for name, shapes in load_released_shapes().items():
        task = name.rsplit("_", 1)[-1]
        assert identify_checkpoint(shapes) == TASK_NAMES.get(task, task), name
    bare_keys = [key.removeprefix("beit3.") for key in shapes if key.startswith("beit3.")]
    assert identify_checkpoint(bare_keys) == "backbone"
    assert identify_checkpoint([*shapes, "mlm_head.weight", "mim_head.weight"]) == "pretrain"
    assert identify_checkpoint(load_tensors("vqkd", "model")) == "vqkd"
    with pytest.raises(ValueError, match="not BEiT-3 weights: the keys begin with conv1.weight"):
        identify_checkpoint(["conv1.weight"])
    with pytest.raises(ValueError, match="this package's own tensors: give the directory"):
        identify_checkpoint(["backbone.text_embedding.positions"])


def test_sizes_are_inferred_from_shapes(backbone_state):
    assert infer_model_config(backbone_state) == BACKBONE
    assert infer_model_config(
        {key.removeprefix("beit3."): tensor for key, tensor in backbone_state.items()}, 2
    ) == replace(BACKBONE, num_heads=2)
    plain = to_released_state(make_backbone(sub_ln=False, final_norm=False))
    assert infer_model_config(plain) == replace(BACKBONE, sub_ln=False, final_norm=False)
    assert_equal_tensors(to_released_state(load_released(plain)[0]), plain)


# Export under released names ----------------------------------------------------------------------


def test_released_models_keep_names_shapes_and_preprocessing():
    counts = json.loads((find_fixture("state_dict_shapes") / "param_counts.json").read_text())
    for name, shapes in load_released_shapes().items():
        with torch.device("meta"):
            state = {key: torch.empty(shape) for key, shape in shapes.items()}
            task, report = load_released(state)
        assert task_name(type(task)) == identify_checkpoint(shapes)
        assert {
            key: list(tensor.shape) for key, tensor in to_released_state(task).items()
        } == shapes, name
        assert not report.ignored and not report.fresh, name
        assert sum(parameter.numel() for parameter in task.parameters()) == counts[name], name
        image = task.config.image
        assert task.config.model.image_size == image.image_size == int(name.split("_")[3])
        crop = name.endswith("imageclassification")
        assert (image.mean, image.std) == (IMAGENET_MEAN_STD if crop else VL_MEAN_STD)
        assert (image.resize, image.interpolation, image.crop_pct) == (
            "crop" if crop else "squash",
            "bicubic",
            1.0,
        )
        lengths = {
            "captioning": 64,
            "imagenet": 32,
        }  # the release's evaluation; texts of ImageNet are names
        assert task.config.text_length == lengths.get(identify_checkpoint(shapes), 64)
        assert identify_checkpoint(shapes) != "captioning" or task.config.decoding == Decoding(
            "beam", 3, 0.6
        )


def test_released_backbones_have_40_tensors_a_layer():
    """There are 40 tensors a layer, 7 of embeddings, and 4 of the final norm."""
    for name, shapes in load_released_shapes().items():
        backbone = [key for key in shapes if key.startswith("beit3.")]
        depth = 24 if "large" in name else 12
        norm = 0 if name.endswith(("vqav2", "imageclassification")) else 4
        with torch.device("meta"):
            task, _ = load_released({key: torch.empty(shapes[key]) for key in backbone})
            assert len(to_released_state(task)) == 40 * depth + 7 + norm


def test_exported_states_equal_the_loaded_ones(backbone_state):
    vqa = load_tensors("vqa", "model")
    layers = {
        f"beit3.{name}": tensor for name, tensor in load_tensors("backbone_layers", "model").items()
    }
    pretrain = add_pretraining_heads(backbone_state)
    for state, task_class in (
        (vqa, VQA),
        (layers, Backbone),
        (pretrain, Pretrain),
        (backbone_state, Backbone),
    ):
        task, report = load_released(state)
        assert type(task) is task_class
        assert not report.ignored and not report.fresh
        assert_equal_tensors(to_released_state(task), state)


def test_exported_states_do_not_share_memory(backbone_state):
    task, _ = load_released(backbone_state)
    copy = to_released_state(task)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
    assert_equal_tensors(copy, backbone_state)


def test_networks_with_shared_attention_have_no_released_names():
    task: Task = Backbone(TaskConfig(model=TINY))
    with pytest.raises(ValueError, match="norm1.weight has no counterpart in the released files"):
        to_released_state(task)


def test_exported_tensors_hold_every_parameter_once():
    task = make_backbone()
    assert isinstance(task.backbone, BEiT3)
    assert len(to_released_state(task)) == 40 * 2 + 7 + 4
    assert sum(tensor.numel() for tensor in to_released_state(task).values()) == sum(
        p.numel() for p in task.parameters()
    )
