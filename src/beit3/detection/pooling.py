"""RoIAlign over the maps of a pyramid: every box is pooled from the map that suits its size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from beit3.detection.pyramid import SCALES
from beit3.ops.precision import promote_to_float32

POOLED_LEVELS = 4
"""Boxes are pooled from all maps but the coarsest, p2 to p5."""


class RoIPooler(nn.Module):
    """Pools boxes from a pyramid.

    torchvision's `MultiScaleRoIAlign` does not align, and keeps the scales of its first batch.
    """

    def __init__(self, patch_size: int, pooled_cells: float):
        super().__init__()
        self.patch_size = patch_size
        canonical_size: int = pooled_cells * patch_size  # type: ignore[assignment]
        self.map_levels = LevelMapper(2, 2 + POOLED_LEVELS - 1, canonical_scale=canonical_size)

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor], size: int) -> Tensor:
        """Pools the boxes of all images.

        Args:
            maps: The pyramid's maps [B, C, *, *], finest first.
            boxes: Boxes [R, 4] of each image, in pixels of the network's input.
            size: Side of the pooled features, in cells.

        Returns:
            Features [sum of R, C, size, size] in the type of the maps.
        """
        # [sum of R, 5]: each box after the index of its image.
        rois = torch.cat(
            [
                F.pad(image_boxes, (1, 0), value=float(index))
                for index, image_boxes in enumerate(boxes)
            ]
        )
        levels = self.map_levels(boxes)
        positions, pooled = [], []
        for level, (features, scale) in enumerate(zip(maps[:POOLED_LEVELS], SCALES, strict=False)):
            on_level = (levels == level).nonzero()[:, 0]
            features = promote_to_float32(features)  # RoIAlign does not support bfloat16
            positions.append(on_level)
            pooled.append(
                roi_align(
                    features,
                    rois[on_level].to(features.dtype),
                    size,
                    1 / (scale * self.patch_size),
                    sampling_ratio=0,
                    aligned=True,
                )
            )
        return torch.cat(pooled)[torch.cat(positions).argsort()].to(maps[0].dtype)
