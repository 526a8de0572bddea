"""The box heads and the mask head: class, exact box and mask of each proposal.

Cascade R-CNN (arXiv:1712.00726) with detectron2's values, and one mask head (arXiv:1703.06870).
Labels are 0 to C - 1; label C is background.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from beit3.detection.config import DetectorConfig
from beit3.detection.matching import (
    MASK_SIZE,
    MatchedBoxes,
    Target,
    clip_boxes,
    compute_mask_targets,
    drop_empty_boxes,
    match_boxes,
)
from beit3.detection.pooling import RoIPooler
from beit3.detection.pyramid import ChannelNorm
from beit3.ops.precision import promote_to_float32

BOX_POOL_SIZE, MASK_POOL_SIZE = 7, 14
"""Side of the features that a box is pooled to, for the box heads and for the mask head."""


class BoxPredictions(NamedTuple):
    """The refined proposals of an image before NMS."""

    boxes: Tensor
    """[R, 4], clipped to the image."""
    scores: Tensor
    """[R, C] class probabilities; what they lack to a sum of 1 is background's."""


class Cascade(nn.Module):
    """Box heads, each of which refines the boxes of the previous one, and a mask head.

    Boxes are refined independently of their class.
    """

    def __init__(self, num_classes: int, *, patch_size: int, config: DetectorConfig):
        super().__init__()
        self.num_classes, self.config = num_classes, config
        self.pooler = RoIPooler(patch_size, config.pooled_cells)
        self.box_heads = nn.ModuleList(BoxHead(num_classes, config) for _ in config.stage_ious)
        self.mask_head = make_mask_head(num_classes, config) if config.masks else None
        self.coders = [BoxCoder((w, w, w / 2, w / 2)) for w in config.stage_box_weights]
        self.sampler = BalancedPositiveNegativeSampler(
            config.roi_samples, config.roi_positive_share
        )

    # Training -------------------------------------------------------------------------------------

    def compute_losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Tensor, targets: Sequence[Target]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Computes the losses of all stages over this process's boxes.

        Args:
            maps: The pyramid's maps [B, C, *, *].
            proposals: Proposed boxes [R, 4] of each image.
            sizes: Height and width of each image without padding, [B, 2].
            targets: The annotated objects of each image.

        Returns:
            The sums `box{i}_class`, `box{i}_box` and, with masks, `mask`, and the number of boxes
            that each is a sum over.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        sampled = self.sample_proposals(proposals, targets)
        matched = sampled
        for stage in range(len(self.coders)):
            boxes = [image.boxes for image in matched]
            logits, deltas = self.run_box_head(stage, maps, boxes)
            class_loss, box_loss = self._compute_box_losses(stage, logits, deltas, matched)
            sums |= {f"box{stage}_class": class_loss, f"box{stage}_box": box_loss}
            counts |= {f"box{stage}_class": len(logits), f"box{stage}_box": len(logits)}
            if stage + 1 < len(self.coders):
                refined = self.refine_boxes(stage, deltas.detach(), boxes, sizes)
                refined = [drop_empty_boxes(image_boxes) for image_boxes in refined]
                matched = self.match_to_targets(refined, targets, stage + 1)
        if self.mask_head is not None:
            sums["mask"], counts["mask"] = self.compute_mask_loss(maps, sampled, targets)
        return sums, counts

    def _compute_box_losses(
        self, stage: int, logits: Tensor, deltas: Tensor, matched: Sequence[MatchedBoxes]
    ) -> tuple[Tensor, Tensor]:
        """Returns the classification and the box regression loss of a stage, both sums."""
        labels = torch.cat([image.labels for image in matched])
        positive = labels < self.num_classes
        boxes = torch.cat([image.boxes for image in matched])[positive]
        object_boxes = torch.cat([image.object_boxes for image in matched])[positive]
        delta_targets = self.coders[stage].encode_single(object_boxes, boxes)
        class_loss = F.cross_entropy(logits, labels, reduction="sum")
        box_loss = F.l1_loss(deltas[positive], delta_targets.to(deltas.dtype), reduction="sum")
        return class_loss, box_loss

    def sample_proposals(
        self, proposals: list[Tensor], targets: Sequence[Target]
    ) -> list[MatchedBoxes]:
        """Samples the first stage's boxes: at most `roi_samples` per image.

        They are drawn from the proposals and the objects' own boxes.
        """
        boxes = [
            torch.cat((image_proposals, target.boxes.to(image_proposals.dtype)))
            for image_proposals, target in zip(proposals, targets, strict=True)
        ]
        matched = self.match_to_targets(boxes, targets, 0)
        positives, negatives = self.sampler(
            [(image.labels < self.num_classes).long() for image in matched]
        )
        return [
            image.select((positive + negative).bool())
            for image, positive, negative in zip(matched, positives, negatives, strict=True)
        ]

    def match_to_targets(
        self, boxes: list[Tensor], targets: Sequence[Target], stage: int
    ) -> list[MatchedBoxes]:
        """Matches the boxes of each image to its objects by a stage's IoU threshold."""
        iou = self.config.stage_ious[stage]
        return [
            match_boxes(image_boxes, target, iou, background=self.num_classes)
            for image_boxes, target in zip(boxes, targets, strict=True)
        ]

    def compute_mask_loss(
        self, maps: list[Tensor], matched: Sequence[MatchedBoxes], targets: Sequence[Target]
    ) -> tuple[Tensor, int]:
        """Returns the mask loss, summed over the positive boxes, and their number.

        It is the binary cross-entropy of the mask of the box's class, averaged over its cells.
        """
        positives = [image.select(image.labels < self.num_classes) for image in matched]
        labels = torch.cat([image.labels for image in positives])
        logits = self.compute_mask_logits(maps, [image.boxes for image in positives], labels)
        mask_targets = torch.cat(
            [
                compute_mask_targets(target, image)
                for target, image in zip(targets, positives, strict=True)
            ]
        )
        loss = F.binary_cross_entropy_with_logits(
            logits, mask_targets.to(logits.dtype), reduction="sum"
        )
        return loss / MASK_SIZE**2, len(labels)

    # Inference ------------------------------------------------------------------------------------

    def predict_boxes(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Tensor
    ) -> list[BoxPredictions]:
        """Returns the last stage's boxes with the mean of all stages' probabilities.

        No box is dropped between the stages.
        """
        boxes, stage_scores = proposals, []
        for stage in range(len(self.coders)):
            logits, deltas = self.run_box_head(stage, maps, boxes)
            stage_scores.append(logits.softmax(1)[:, : self.num_classes])
            boxes = self.refine_boxes(stage, deltas, boxes, sizes)
        scores = torch.stack(stage_scores).mean(0).split(list(map(len, boxes)))
        return [BoxPredictions(*image) for image in zip(boxes, scores, strict=True)]

    def predict_masks(
        self, maps: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> list[Tensor]:
        """Returns mask probabilities [n, 28, 28] over the boxes of each image."""
        probabilities = self.compute_mask_logits(maps, boxes, torch.cat(labels)).sigmoid()
        return list(probabilities.split(list(map(len, boxes))))

    # Both -----------------------------------------------------------------------------------------

    def run_box_head(
        self, stage: int, maps: list[Tensor], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns logits [R, C + 1] and deltas [R, 4] of all images' boxes in float32.

        The gradient into the maps is divided by the number of stages, as in detectron2, so that
        their sum does not outweigh the proposals' gradient.
        """
        pooled = self.pooler(maps, boxes, BOX_POOL_SIZE)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.box_heads))
        logits, deltas = self.box_heads[stage](pooled)
        return promote_to_float32(logits), promote_to_float32(deltas)

    def refine_boxes(
        self, stage: int, deltas: Tensor, boxes: list[Tensor], sizes: Tensor
    ) -> list[Tensor]:
        """Applies a stage's deltas to its boxes and clips the result to the images."""
        refined = self.coders[stage].decode_single(deltas, torch.cat(boxes))
        return [
            clip_boxes(image_boxes, size)
            for image_boxes, size in zip(refined.split(list(map(len, boxes))), sizes, strict=True)
        ]

    def compute_mask_logits(
        self, maps: list[Tensor], boxes: list[Tensor], labels: Tensor
    ) -> Tensor:
        """Returns mask logits [n, 28, 28] of all images' boxes, each of its own class, float32."""
        assert self.mask_head is not None, "this detector predicts boxes alone"
        logits = self.mask_head(self.pooler(maps, boxes, MASK_POOL_SIZE))
        return promote_to_float32(logits[torch.arange(len(labels), device=labels.device), labels])


class BoxHead(nn.Module):
    """Features [R, C, 7, 7] to logits [R, num_classes + 1], background last, and deltas [R, 4].

    The deltas do not depend on the class.
    """

    def __init__(self, num_classes: int, config: DetectorConfig):
        super().__init__()
        dim, width = config.pyramid_dim, config.box_dim
        self.body = FastRCNNConvFCHead(
            (dim, BOX_POOL_SIZE, BOX_POOL_SIZE),
            [dim] * config.box_convs,
            [width],
            norm_layer=ChannelNorm,
        )
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        states = self.body(pooled)
        return self.class_logits(states), self.box_deltas(states)


def make_mask_head(num_classes: int, config: DetectorConfig) -> nn.Module:
    """Returns a head from pooled features [R, C, 14, 14] to logits [R, num_classes, 28, 28]."""
    dim = config.pyramid_dim
    body = MaskRCNNHeads(dim, [dim] * config.mask_convs, 1, norm_layer=ChannelNorm)
    return nn.Sequential(body, MaskRCNNPredictor(dim, dim, num_classes))
