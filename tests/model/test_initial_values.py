"""Statistics of initial values against closed forms, and the schedule of stochastic depth."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE, ModelConfig
from beit3.model.layers import Block
from beit3.model.layout import Layout
from beit3.model.trunk import ImageTrunk
from beit3.ops.init import trunc_normal
from beit3.task import Task
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.imagenet import ImageNet, ImageNetConfig
from beit3.tasks.nlvr2 import NLVR2, NLVR2Config
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig

WIDTH, FFN, DEPTH = 64, 128, 4
SIZES: dict[str, Any] = {"dim": WIDTH, "num_heads": 2, "ffn_dim": FFN, "depth": DEPTH}
FORMS = {"paper": replace(TINY, **SIZES), "release": replace(TINY_RELEASE, **SIZES)}

CUT_NORMAL = 0.02 * math.sqrt(
    1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5))
)
"""Deviation of a normal distribution of deviation .02 that is cut at one deviation: .0108."""

GAIN = math.sqrt(math.log(2 * DEPTH))
"""Magneto's, for encoders of `DEPTH` layers (arXiv:2210.06423)."""


def compute_deviation(name: str, part: str, shape: torch.Size, config: ModelConfig) -> float:
    """Returns the deviation that the published scheme gives a weight; `part` is q, k, v or ""."""
    if config.init == "torch" and name.endswith(".weight"):
        inputs = math.prod(shape[1:])
        return 1.0 if name.endswith("tokens.weight") else 1 / math.sqrt(3 * inputs)
    if not name.startswith("blocks."):
        return CUT_NORMAL
    layer = int(name.split(".")[1]) + 1
    if config.init == "beit":
        is_rescaled = ".out." in name or ".fc2." in name
        return CUT_NORMAL / math.sqrt(2 * layer) if is_rescaled else CUT_NORMAL
    xavier = math.sqrt(2 / (WIDTH + (FFN if ".fc" in name else WIDTH)))
    return xavier if part in ("q", "k") else GAIN * xavier


@pytest.mark.parametrize("init", ["beit", "magneto", "torch"])
@pytest.mark.parametrize("form", FORMS)
def test_every_weight_has_the_deviation_of_its_scheme(form, init):
    config = replace(FORMS[form], init=init)
    network = BEiT3(config)
    network.init_weights(5)
    parts_seen = set()
    for name, parameter in network.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            is_one = "norm" in name and name.endswith(".weight")
            assert (parameter == float(is_one)).all(), name
            continue
        is_qkv = ".qkv." in name
        parts = dict(zip("qkv", parameter.chunk(3), strict=True)) if is_qkv else {"": parameter}
        for part, values in parts.items():
            expected, count = compute_deviation(name, part, parameter.shape, config), values.numel()
            tolerance = 5 / math.sqrt(2 * count)
            assert values.std(correction=0).item() == pytest.approx(expected, rel=tolerance), name
            assert abs(values.mean().item()) < 5 * expected / math.sqrt(count), name
            parts_seen.add(part)
            if init == "torch" and name.endswith("tokens.weight"):
                continue  # normal, without a limit
            uniform = init != "beit" and name.startswith("blocks.")
            uniform |= init == "torch" and name.endswith(".weight")
            limit = expected * (math.sqrt(3) if uniform else 0.02 / CUT_NORMAL)
            assert 0.8 * limit < values.abs().max() <= limit * (1 + 1e-6), name
    assert parts_seen == {"", "q", "k", "v"}


def test_the_cut_normal_has_its_closed_form():
    values = torch.empty(200_000)
    trunc_normal(values, torch.Generator().manual_seed(0), std=0.5)
    assert values.std().item() == pytest.approx(25 * CUT_NORMAL, rel=0.01)
    assert 0.499 < values.max() <= 0.5 and -0.5 <= values.min() < -0.499
    inner = (values.abs() < 0.25).float().mean().item()
    expected = math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    assert inner == pytest.approx(expected, abs=0.01), "the density is the normal one"


# Heads --------------------------------------------------------------------------------------------

MODEL = FORMS["release"]
UNNORMED = replace(MODEL, final_norm=False)
IMAGE = Preprocessing(32)
HEADS: list[tuple[Task, dict[str, float]]] = [
    (VQA(VQAConfig(model=UNNORMED, image=IMAGE, num_answers=50)), {}),
    (ImageNet(ImageNetConfig(model=UNNORMED, image=IMAGE, num_classes=50)), {"head.": 0.001}),
    (NLVR2(NLVR2Config(model=MODEL, image=IMAGE)), {"head.dense": 0.001}),
    (Captioning(CaptioningConfig(model=MODEL, image=IMAGE)), {}),
    (Retrieval(RetrievalConfig(model=MODEL, image=IMAGE)), {}),
    (Pretrain(PretrainConfig(model=MODEL, image=IMAGE, token_size=32)), {}),
]


@pytest.mark.parametrize(("task", "scales"), HEADS, ids=[type(task).__name__ for task, _ in HEADS])
def test_heads_start_as_beit_does_and_smaller_where_the_release_scales_them(task, scales):
    task.init_weights(3)
    num_weights = 0
    for name, parameter in task.named_parameters():
        if name.startswith("backbone."):
            continue
        if name == "logit_scale":
            assert parameter.item() == pytest.approx(math.log(1 / 0.07))
        elif parameter.ndim == 1:
            module_name, _, kind = name.rpartition(".")
            is_norm = isinstance(task.get_submodule(module_name), nn.LayerNorm)
            assert (parameter == float(is_norm and kind == "weight")).all(), name
        else:
            scale = next((value for start, value in scales.items() if name.startswith(start)), 1.0)
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            deviation = parameter.std(correction=0).item()
            assert deviation == pytest.approx(scale * CUT_NORMAL, rel=tolerance), name
            num_weights += 1
    assert num_weights


# Stochastic depth ---------------------------------------------------------------------------------


@pytest.mark.parametrize("network_class", [BEiT3, ImageTrunk])
@pytest.mark.parametrize("depth", [2, 4, 12])
def test_stochastic_depth_grows_linearly_from_0_at_the_first_layer(network_class, depth):
    config = replace(MODEL, depth=depth, drop_path_rate=0.3, final_norm=False)
    with torch.device("meta"):
        network = network_class(config)
    rates = [block.drop_path_rate for block in network.modules() if isinstance(block, Block)]
    assert rates == pytest.approx([0.3 * layer / (depth - 1) for layer in range(depth)])
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3)


def test_a_single_layer_drops_nothing():
    assert Block(replace(MODEL, depth=1, drop_path_rate=0.3), 0).drop_path_rate == 0


def test_stochastic_depth_keeps_the_mean_and_drops_at_its_rate():
    block = Block(replace(MODEL, drop_path_rate=0.4), DEPTH - 1).train()
    torch.manual_seed(0)
    layout = Layout((("image", 3),), (("image", 3),))
    (result,) = block.add((torch.zeros(4000, 3, WIDTH),), (torch.ones(4000, 3, WIDTH),), layout)
    assert result.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert (result[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert result.mean().item() == pytest.approx(1, abs=0.05)
