"""The simple feature pyramid (ViTDet, arXiv:2203.16527, section 3): five maps from the trunk's last
one.

Features [B, h, w, D] -> five maps [B, C, *, *], finest first, whose cells are `SCALES` patches
wide.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Side of a cell of each map, in patches. With patches of 16 px these are the strides 4 to 64 of p2
to p6."""

ChannelNorm = partial(LayerNorm2d, eps=1e-6)
"""Over the channels of each place; ViTDet's replacement of batch norm in pyramid and heads."""


class FeaturePyramid(nn.Module):
    """Transposed convolutions up, max pooling down, and a 1 x 1 and a 3 x 3 convolution to
    `out_dim` channels each.

    A map of odd sides is pooled so that its last row and column have cells of their own. The
    coarsest map is every second
    cell of the one before.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(
                f"a trunk {dim} units wide: the pyramid halves it twice, give a multiple of 4"
            )
        half, quarter = dim // 2, dim // 4
        finest = nn.Sequential(
            _doubled(dim, half), ChannelNorm(half), nn.GELU(), _doubled(half, quarter)
        )
        self.resize = nn.ModuleList(
            (finest, _doubled(dim, half), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True))
        )
        self.project = nn.ModuleList(
            _projection(width, out_dim) for width in (quarter, half, dim, dim)
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        features = features.permute(0, 3, 1, 2)  # [B, D, h, w]
        maps = [
            project(resize(features))
            for resize, project in zip(self.resize, self.project, strict=True)
        ]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def _doubled(dim: int, out_dim: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, out_dim, 2, stride=2)


def _projection(dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(dim, out_dim, 1, bias=False),
        ChannelNorm(out_dim),
        nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
        ChannelNorm(out_dim),
    )
