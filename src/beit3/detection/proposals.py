"""The region proposal network (arXiv:1506.01497) with ViTDet's values.

Built on torchvision's. The losses are detectron2's: binary cross-entropy and L1, both divided by
the number of anchors that an image may sample. Anchors centered on padding take no part.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import box_iou

from beit3.detection.config import DetectorConfig
from beit3.detection.pyramid import SCALES
from beit3.ops.precision import promote_to_float32

OBJECTS_PER_BLOCK = 32
"""Objects whose overlaps with all anchors are computed at once: half a million anchors times 300
objects take gigabytes."""

MIN_OBJECTNESS = 1e-38
"""Proposals below it are dropped; the objectness of an anchor on padding is 0."""


class ProposalNetwork(RegionProposalNetwork):
    """Proposes boxes that may contain an object of any class.

    The head `head` is applied to every map. Anchors are computed at each call, so that nothing but
    parameters is stored.
    """

    def __init__(self, patch_size: int, *, config: DetectorConfig):
        super().__init__(
            AnchorGenerator(config.anchor_sizes, config.anchor_ratios, patch_size),
            ProposalHead(
                config.pyramid_dim, len(config.anchor_ratios), conv_depth=config.rpn_convs
            ),
            fg_iou_thresh=config.rpn_positive_iou,
            bg_iou_thresh=config.rpn_negative_iou,
            batch_size_per_image=config.rpn_samples,
            positive_fraction=0.5,
            pre_nms_top_n={"training": config.rpn_top_train, "testing": config.rpn_top_test},
            post_nms_top_n={"training": config.rpn_proposals, "testing": config.rpn_proposals},
            nms_thresh=config.rpn_nms_iou,
            score_thresh=MIN_OBJECTNESS,
        )
        self.samples_per_image = config.rpn_samples
        self.box_similarity = compute_overlaps

    def forward(  # type: ignore[override]
        self, maps: list[Tensor], sizes: Tensor, objects: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposes boxes for each image.

        Args:
            maps: The pyramid's maps [B, C, *, *].
            sizes: Height and width of each image without padding, [B, 2].
            objects: The objects' boxes [n, 4] of each image, in training.

        Returns:
            Proposals [R, 4] of each image, best first and clipped to it, and with `objects` the
            losses, summed over the images.
        """
        levels = self.head(maps)
        anchors_per_level = [scores[0].numel() for scores in levels[0]]
        objectness, deltas = concat_box_prediction_layers(*levels)
        objectness = objectness.view(len(sizes), -1)  # [B, N]
        deltas = deltas.view(len(sizes), -1, 4)  # [B, N, 4]
        anchors = self.anchor_generator(maps)
        valid = find_anchors_inside(anchors, sizes)

        boxes = self.box_coder.decode_single(
            deltas.detach().flatten(0, 1), anchors.repeat(len(sizes), 1)
        ).view_as(deltas)
        ranking = objectness.detach().masked_fill(~valid, -torch.inf)
        proposals, _ = self.filter_proposals(
            boxes.nan_to_num(), ranking, sizes.tolist(), anchors_per_level
        )
        if objects is None:
            return proposals, {}
        return proposals, self.compute_losses(objectness, deltas, anchors, valid, objects)

    def compute_losses(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        valid: Tensor,
        objects: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Computes `rpn_objectness` and `rpn_box`.

        They are sums over the sampled and over the positive anchors, divided by `rpn_samples`.
        """
        assigned = [
            self.assign_anchors(anchors, image_valid, boxes)
            for image_valid, boxes in zip(valid, objects, strict=True)
        ]
        samples = self.fg_bg_sampler([labels for labels, _ in assigned])
        positive, negative = (torch.stack(kind).bool() for kind in samples)  # [B, N]
        sampled = positive | negative
        object_boxes = torch.stack([boxes for _, boxes in assigned])[positive]
        delta_targets = self.box_coder.encode_single(
            object_boxes, anchors.expand_as(deltas)[positive]
        )
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness[sampled], positive[sampled].to(objectness.dtype), reduction="sum"
        )
        box_loss = F.l1_loss(deltas[positive], delta_targets.to(deltas.dtype), reduction="sum")
        return {
            "rpn_objectness": objectness_loss / self.samples_per_image,
            "rpn_box": box_loss / self.samples_per_image,
        }

    def assign_anchors(
        self, anchors: Tensor, valid: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Assigns the anchors of one image to its objects.

        Returns labels [N] (1 positive, 0 negative, -1 ignored or not `valid`) and each anchor's
        object [N, 4].
        """
        labels, object_boxes = anchors.new_full((len(anchors),), -1), torch.zeros_like(anchors)
        valid_labels, valid_boxes = self.assign_targets_to_anchors(
            [anchors[valid]], [{"boxes": boxes.to(anchors.dtype)}]
        )
        labels[valid], object_boxes[valid] = valid_labels[0], valid_boxes[0].to(anchors.dtype)
        return labels, object_boxes


class ProposalHead(RPNHead):
    """torchvision's head with outputs of at least float32, because boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return list(map(promote_to_float32, objectness)), list(map(promote_to_float32, deltas))


class AnchorGenerator(nn.Module):
    """Boxes around the upper left corner of each cell: one size per map and one box per ratio.

    As detectron2's, they are ordered by map, row, column and ratio. torchvision's generator rounds
    the boxes, and the strides of patches of 14 px.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], patch_size: int):
        super().__init__()
        self.sizes, self.ratios, self.patch_size = sizes, ratios, patch_size

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns the anchors of all maps, float32 [N, 4], not clipped."""
        device = maps[0].device
        ratios = torch.tensor(self.ratios, device=device)
        # [A, 2]: half the width and the height of an anchor of area 1.
        half_sides = torch.stack((ratios.rsqrt(), ratios.sqrt()), 1) / 2
        levels = []
        for features, size, scale in zip(maps, self.sizes, SCALES, strict=True):
            rows, columns = (
                torch.arange(side, device=device) * (self.patch_size * scale)
                for side in features.shape[2:]
            )
            corners = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 1, 2)
            offsets = size * half_sides
            levels.append(torch.cat((corners - offsets, corners + offsets), -1).view(-1, 4))
        return torch.cat(levels)


def find_anchors_inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Tells which anchors' centers lie on each image rather than on its padding: bool [B, N]."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centers < sizes[:, None, [1, 0]]).all(-1)


def compute_overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Computes the IoU [n, N] of boxes and anchors, `OBJECTS_PER_BLOCK` boxes at a time."""
    return torch.cat([box_iou(block, anchors) for block in boxes.split(OBJECTS_PER_BLOCK)])
