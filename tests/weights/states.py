"""Small state dicts under released names."""

import json
from dataclasses import replace

import torch
from torch import Tensor

from beit3.model.config import TINY_RELEASE
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.weights.loading import load_released
from beit3.weights.release_format import to_released_state
from tests.golden import find_fixture

State = dict[str, Tensor]


def assert_equal_tensors(state: State, expected: State) -> None:
    """Asserts equal names and tensors, to the bit."""
    assert state.keys() == expected.keys()
    for name in state:
        assert state[name].dtype == expected[name].dtype and torch.equal(
            state[name], expected[name]
        ), name


BACKBONE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=2,
    ffn_dim=32,
    image_size=16,
    vocab_size=30,
    text_positions=12,
)


def make_backbone(**changes) -> Backbone:
    task = Backbone(TaskConfig(model=replace(BACKBONE, **changes)))
    task.init_weights(0)
    return task


def add_pretraining_heads(state: State, codes: int = 9) -> State:
    vocab_size, dim = state["beit3.text_embed.weight"].shape
    heads = {"mlm_head": vocab_size, "mim_head": codes}
    return state | {
        f"{name}.{part}": torch.randn((num_rows, dim) if part == "weight" else (num_rows,))
        for name, num_rows in heads.items()
        for part in ("weight", "bias")
    }


def make_retrieval_state(backbone_state: State) -> State:
    """Returns the state dict of a released retrieval file."""
    task, _ = load_released(backbone_state, "retrieval")
    return to_released_state(task)


def drop_final_norm(backbone_state: State) -> State:
    return {
        key: tensor for key, tensor in backbone_state.items() if "encoder.layer_norm." not in key
    }


def load_released_shapes() -> dict[str, dict[str, list[int]]]:
    return json.loads((find_fixture("state_dict_shapes") / "shapes.json").read_text())
