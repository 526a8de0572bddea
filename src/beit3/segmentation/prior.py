"""The spatial prior of ViT-Adapter (arXiv:2205.08534, section 3.3): a small convolutional pyramid
beside the trunk.

It maps images [B, 3, H, W] to four maps [B, D, h, w] at strides s, 2s, 4s and 8s, where s is the
power of two nearest to a quarter of the patch: 4 for patches of 14 and 16, 2 for 8. Each halving
rounds up, so images of any size are accepted.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """3x3 convolution, batch norm and ReLU; `stride` 2 halves the map."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(maps)))


class SpatialPrior(nn.Module):
    """Computes four maps of an image by convolutions.

    The maps have `inplanes` channels at the first stride, then twice and four times as many, and
    are projected to `dim` channels.
    """

    def __init__(self, dim: int, inplanes: int, patch_size: int):
        super().__init__()
        num_halvings = max(0, round(math.log2(patch_size / 4)))
        stem = [
            ConvNorm(3, inplanes, stride=2 if num_halvings else 1),
            ConvNorm(inplanes, inplanes),
            ConvNorm(inplanes, inplanes),
        ]
        self.stem = nn.Sequential(*stem, *(nn.MaxPool2d(3, 2, 1) for _ in range(num_halvings - 1)))
        widths = (inplanes, 2 * inplanes, 4 * inplanes, 4 * inplanes)
        self.halves = nn.ModuleList(
            ConvNorm(in_channels, channels, stride=2)
            for in_channels, channels in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.strides = tuple(2 ** (num_halvings + level) for level in range(4))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = [self.stem(image)]
        for halve in self.halves:
            maps.append(halve(maps[-1]))
        return tuple(
            project(feature_map)
            for project, feature_map in zip(self.projections, maps, strict=True)
        )


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Lets `module` work on copies of its buffers inside the context.

    A forward pass that is recomputed must not count twice in running averages.
    """
    buffers = [
        (submodule, name, buffer)
        for submodule in module.modules()
        for name, buffer in submodule.named_buffers(recurse=False)
    ]
    for submodule, name, buffer in buffers:
        setattr(submodule, name, buffer.clone())
    try:
        yield
    finally:
        for submodule, name, buffer in buffers:
            setattr(submodule, name, buffer)
