"""EfficientNet-Lite0 against a second implementation, against the package that published its
weights, and by the statistics of its outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.efficientnet import (
    LAST,
    MIDDLE,
    EfficientNetLite0,
    compute_statistics,
    load_efficientnet,
)

BLOCKS = (
    (3, 1, 32, 16),
    *((3, 2, 16, 24), (3, 1, 24, 24)),
    *((5, 2, 24, 40), (5, 1, 40, 40)),
    *((3, 2, 40, 80), (3, 1, 80, 80), (3, 1, 80, 80)),
    *((5, 1, 80, 112), (5, 1, 112, 112), (5, 1, 112, 112)),
    *((5, 2, 112, 192), (5, 1, 192, 192), (5, 1, 192, 192), (5, 1, 192, 192)),
)
"""Kernel, stride, and channels of the input and the output of each block."""


def make_state() -> dict[str, Tensor]:
    """Returns random tensors in the names and shapes of the published file, classifier included."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def add_conv(name: str, *shape: int) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5

    def add_norm(name: str, channels: int) -> None:
        for kind in ("weight", "running_var"):
            state[f"{name}.{kind}"] = 0.5 + torch.rand(channels, generator=generator)
        for kind in ("bias", "running_mean"):
            state[f"{name}.{kind}"] = 0.3 * torch.randn(channels, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    add_conv("_conv_stem", 32, 3, 3, 3)
    add_norm("_bn0", 32)
    for index, (kernel, _, inputs, outputs) in enumerate((*BLOCKS, (3, 1, 192, 320))):
        name, wide = f"_blocks.{index}", inputs * (6 if index else 1)
        if index:
            add_conv(f"{name}._expand_conv", wide, inputs, 1, 1)
            add_norm(f"{name}._bn0", wide)
        add_conv(f"{name}._depthwise_conv", wide, 1, kernel, kernel)
        add_norm(f"{name}._bn1", wide)
        add_conv(f"{name}._project_conv", outputs, wide, 1, 1)
        add_norm(f"{name}._bn2", outputs)
    add_conv("_conv_head", 1280, 320, 1, 1)
    add_norm("_bn1", 1280)
    state["_fc.weight"], state["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return state


def make_images(height: int = 64, width: int = 96) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def compute_slowly(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    """Returns the output of every block, by the formulas."""

    def normalize(x: Tensor, name: str) -> Tensor:
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-3).sqrt()
        shift = state[f"{name}.bias"] - state[f"{name}.running_mean"] * scale
        return x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def convolve(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        padding = []
        for length in (x.shape[3], x.shape[2]):  # TensorFlow's SAME
            kernel, num_outputs = weight.shape[2], -(-length // stride)
            total = max(0, (num_outputs - 1) * stride + kernel - length)
            padding += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, padding), weight, stride=stride, groups=groups)

    x = normalize(convolve(images, "_conv_stem", 2), "_bn0").clamp(0, 6)
    outputs = []
    for index, (_, stride, inputs, channels) in enumerate(BLOCKS):
        name, y = f"_blocks.{index}", x
        if index:
            y = normalize(convolve(y, f"{name}._expand_conv"), f"{name}._bn0").clamp(0, 6)
        y = normalize(convolve(y, f"{name}._depthwise_conv", stride), f"{name}._bn1").clamp(0, 6)
        y = normalize(convolve(y, f"{name}._project_conv"), f"{name}._bn2")
        x = x + y if stride == 1 and inputs == channels else y
        outputs.append(x)
    return outputs


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_features_equal_a_second_implementation():
    state = make_state()
    features = load_efficientnet(state)(make_images())
    outputs = compute_slowly(state, make_images())
    assert features.middle.shape == (2, 112, 4, 6) and features.last.shape == (2, 192, 2, 3)
    close(features.middle, outputs[10])
    close(features.last, outputs[14])


def test_features_equal_those_of_the_published_code():
    published = pytest.importorskip(
        "efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed"
    )
    state = make_state()
    network = published.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(state)
    outputs = {}
    for index in (10, 14):
        network._blocks[index].register_forward_hook(
            lambda module, inputs, output, index=index: outputs.__setitem__(index, output)
        )
    images = make_images(224, 224)
    with torch.no_grad():
        network.eval()(images)
    features = load_efficientnet(state)(images)
    close(features.middle, outputs[10])
    close(features.last, outputs[14])


def test_statistics_are_those_of_batches_that_are_normalized():
    """In training mode each batch has the statistics that the running ones have on all data."""
    network = load_efficientnet(make_state()).train()
    images = torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    features = network(images)
    for index, outputs in ((MIDDLE, features.middle), (LAST, features.last)):
        mean, std = compute_statistics(network.stages[index])
        torch.testing.assert_close(outputs.mean((0, 2, 3)), mean, atol=1e-3, rtol=1e-3)
        ratio = outputs.std((0, 2, 3)) / std  # summands are nearly uncorrelated
        assert 0.9 < ratio.mean() < 1.1 and 0.6 < ratio.min() < ratio.max() < 1.4


def test_the_network_is_frozen():
    network = load_efficientnet(make_state())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_other_states_are_refused_by_name():
    state = make_state()
    with pytest.raises(ValueError, match=r"not EfficientNet-Lite0: .*stages\.5\.3\.project\.conv"):
        load_efficientnet(
            {k: v for k, v in state.items() if k != "_blocks.14._project_conv.weight"}
        )
    with pytest.raises(ValueError, match=r"misshapen stem\.conv\.weight"):
        load_efficientnet(state | {"_conv_stem.weight": torch.ones(40, 3, 3, 3)})
    with pytest.raises(ValueError, match="not EfficientNet-Lite0"):
        load_efficientnet({"weight": torch.ones(1)})


def test_a_size_that_strides_do_not_divide_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="112 x 96 px is not a multiple"):
        EfficientNetLite0()(torch.empty(1, 3, 112, 96))


def test_all_weights_are_buffers():
    """Parameters would be initialized, optimized and sharded."""
    network = EfficientNetLite0()
    assert not list(network.parameters())
    assert "stem.conv.weight" in network.state_dict()
