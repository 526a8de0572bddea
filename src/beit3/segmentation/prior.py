"""The spatial prior of ViT-Adapter (arXiv:2205.08534, section 3.3): a small convolutional pyramid
beside the trunk.

Images [B, 3, H, W] -> four maps [B, D, h, w] at strides s, 2s, 4s and 8s, s being the power of two
nearest to a quarter of
the patch: 4 for patches of 14 and 16, 2 for 8. Each halving rounds up, so any image will do.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """3x3 convolution, batch norm, ReLU; `stride` 2 halves a map."""

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(maps)))


class SpatialPrior(nn.Module):
    """`inplanes` channels at the first stride, then twice and four times as many; projected to
    `dim` at each."""

    def __init__(self, dim: int, inplanes: int, patch_size: int):
        super().__init__()
        halvings = max(0, round(math.log2(patch_size / 4)))
        stem = [
            ConvNorm(3, inplanes, stride=2 if halvings else 1),
            ConvNorm(inplanes, inplanes),
            ConvNorm(inplanes, inplanes),
        ]
        self.stem = nn.Sequential(*stem, *(nn.MaxPool2d(3, 2, 1) for _ in range(halvings - 1)))
        widths = (inplanes, 2 * inplanes, 4 * inplanes, 4 * inplanes)
        self.halves = nn.ModuleList(
            ConvNorm(*pair, stride=2) for pair in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)
        self.strides = tuple(2 ** (halvings + level) for level in range(4))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = [self.stem(image)]
        for half in self.halves:
            maps.append(half(maps[-1]))
        return tuple(
            projection(each) for projection, each in zip(self.projections, maps, strict=True)
        )


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """Within, `module` works on copies of its buffers: what is computed again must not count twice
    in running averages."""
    buffers = [
        (part, name, buffer)
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    for part, name, buffer in buffers:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in buffers:
            setattr(part, name, buffer)
