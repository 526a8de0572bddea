"""EfficientNet-Lite0 up to its last stage of 192 channels, as a source of frozen features.

Tan and Le 2019, arXiv:1905.11946. The Lite variant has no squeeze-and-excitation and ReLU6 in the
place of swish, and its stem has a fixed width. Images [B, 3, H, W] of any multiple of 32 pixels
become the outputs of two stages: 112 channels at stride 16 and 192 channels at stride 32.

All its weights are buffers, so nothing initializes, optimizes or shards them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 32
"""Pixels of the image per position of the last stage."""

STEM_CHANNELS = 32

NORM_EPS = 1e-3
"""TensorFlow's default, with which the published weights were trained."""


@dataclass(frozen=True)
class Stage:
    """Blocks of one width. The first of them has the stride, and changes the width."""

    num_blocks: int
    kernel_size: int
    stride: int
    expansion: int
    """Channels between a block's two pointwise convolutions, as a multiple of its input's."""
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
)
"""The table of the paper's B0 without the last stage, which only the classifier reads."""

MIDDLE, LAST = 4, 5
"""Indices of the stages whose outputs are features, at strides 16 and 32."""


class Features(NamedTuple):
    """The outputs of two stages, before any activation."""

    middle: Tensor  # [B, 112, H / 16, W / 16]
    last: Tensor  # [B, 192, H / 32, W / 32]


class EfficientNetLite0(nn.Module):
    """Stem and six stages of inverted residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, STEM_CHANNELS, kernel_size=3, stride=2, has_activation=True)
        self.stages = nn.ModuleList()
        in_channels = STEM_CHANNELS
        for stage in STAGES:
            blocks = nn.Sequential()
            for index in range(stage.num_blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(Block(in_channels, stage, stride=stride))
                in_channels = stage.channels
            self.stages.append(blocks)
        _turn_into_buffers(self)

    def forward(self, images: Tensor) -> Features:
        """Returns the features of normalized images [B, 3, H, W].

        Raises ValueError for sizes that are no multiple of 32 pixels.
        """
        height, width = images.shape[2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(
                f"image of {height} x {width} px is not a multiple of {STRIDE} px: resize it"
            )
        states = self.stem(images)
        outputs = []
        for stage in self.stages:
            states = stage(states)
            outputs.append(states)
        return Features(outputs[MIDDLE], outputs[LAST])


class Block(nn.Module):
    """An inverted residual block: widen, convolve each channel, and narrow without activation.

    The input is added where it has the output's shape.
    """

    def __init__(self, in_channels: int, stage: Stage, *, stride: int):
        super().__init__()
        channels = in_channels * stage.expansion
        self.is_residual = stride == 1 and in_channels == stage.channels
        self.expand: ConvNorm | None = None
        if stage.expansion != 1:
            self.expand = ConvNorm(in_channels, channels, has_activation=True)
        self.depthwise = ConvNorm(
            channels,
            channels,
            kernel_size=stage.kernel_size,
            stride=stride,
            groups=channels,
            has_activation=True,
        )
        self.project = ConvNorm(channels, stage.channels, has_activation=False)

    def forward(self, states: Tensor) -> Tensor:
        widened = states if self.expand is None else self.expand(states)
        narrowed = self.project(self.depthwise(widened))
        return states + narrowed if self.is_residual else narrowed


class ConvNorm(nn.Module):
    """A convolution without bias, batch normalization, and ReLU6 with `has_activation`.

    Padding is TensorFlow's for even sizes: with stride 2 one pixel less before than behind.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        has_activation: bool,
    ):
        super().__init__()
        before, behind = (kernel_size - stride) // 2, (kernel_size - 1) // 2
        self.padding = (before, behind, before, behind)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=NORM_EPS)
        self.has_activation = has_activation

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(self.conv(F.pad(states, self.padding)))
        return F.relu6(states) if self.has_activation else states


def _turn_into_buffers(network: nn.Module) -> None:
    """Turns all parameters into buffers."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


# Statistics --------------------------------------------------------------------------------------


def compute_statistics(stage: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation [C] of a stage's output, by the weights alone.

    The output is the sum of its blocks' batch normalizations, each of which has its bias as mean
    and its scale as deviation on the data that the network was trained with. So the mean is exact
    there, and the deviation is so where the summands are uncorrelated.
    """
    norms = [block.project.norm for block in stage.children() if isinstance(block, Block)]
    mean = torch.stack([norm.bias for norm in norms]).sum(0)
    variance = torch.stack([norm.weight.square() for norm in norms]).sum(0)
    return mean, variance.sqrt()


# Weights -----------------------------------------------------------------------------------------


def load_efficientnet(state: Mapping[str, Tensor]) -> EfficientNetLite0:
    """Returns the network, in evaluation mode, of tensors in the names of the published file.

    Raises ValueError, naming the tensors, where they are not those of EfficientNet-Lite0.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    tensors = _rename(state)
    expected_shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name, shape in expected_shapes.items() if shapes.get(name) != shape)
    if wrong:
        raise ValueError(f"not EfficientNet-Lite0: missing or misshapen {', '.join(wrong[:3])}")
    # Copies, because a mapped file's tensors may lie anywhere in memory, on which sums depend.
    values = {name: tensors[name].clone() for name in expected_shapes}
    network.load_state_dict(values, assign=True)
    return network.eval()


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the stem and the blocks under our names."""
    places = [
        f"stages.{stage_index}.{index}"
        for stage_index, stage in enumerate(STAGES)
        for index in range(stage.num_blocks)
    ]
    parts = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    tensors = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", name)
        if match is not None and int(match[1]) < len(places) and match[2] in parts:
            tensors[f"{places[int(match[1])]}.{parts[match[2]]}.{match[3]}"] = tensor
        elif name.startswith("_conv_stem."):
            tensors[name.replace("_conv_stem", "stem.conv")] = tensor
        elif name.startswith("_bn0."):
            tensors[name.replace("_bn0", "stem.norm")] = tensor
    return tensors
