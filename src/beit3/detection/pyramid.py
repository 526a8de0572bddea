"""The simple feature pyramid (ViTDet, arXiv:2203.16527, section 3): five maps from the trunk's last
feature map.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Side of a cell of each map, in patches. For patches of 16 px these are strides 4 to 64, p2 to
p6."""

ChannelNorm = partial(LayerNorm2d, eps=1e-6)
"""Layer norm over the channels of each position, which ViTDet uses instead of batch norm."""


class FeaturePyramid(nn.Module):
    """Features [B, h, w, D] to five maps [B, C, *, *], finest first.

    The cells of the maps are `SCALES` patches wide.

    Transposed convolutions upsample, max pooling downsamples, and a 1 x 1 and a 3 x 3 convolution
    project each map to `out_dim` channels. A map of odd sides is pooled such that its last row and
    column get cells of their own. The coarsest map is every second cell of the one before.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(
                f"the pyramid halves the trunk's dim {dim} twice: give a multiple of 4"
            )
        half, quarter = dim // 2, dim // 4
        finest = nn.Sequential(
            _make_upsampling(dim, half),
            ChannelNorm(half),
            nn.GELU(),
            _make_upsampling(half, quarter),
        )
        downsampling = nn.MaxPool2d(2, ceil_mode=True)
        self.resize = nn.ModuleList(
            (finest, _make_upsampling(dim, half), nn.Identity(), downsampling)
        )
        self.project = nn.ModuleList(
            _make_projection(width, out_dim) for width in (quarter, half, dim, dim)
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        features = features.permute(0, 3, 1, 2)  # [B, D, h, w]
        maps = [
            project(resize(features))
            for resize, project in zip(self.resize, self.project, strict=True)
        ]
        return [*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)]


def _make_upsampling(dim: int, out_dim: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, out_dim, 2, stride=2)


def _make_projection(dim: int, out_dim: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(dim, out_dim, 1, bias=False),
        ChannelNorm(out_dim),
        nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
        ChannelNorm(out_dim),
    )
