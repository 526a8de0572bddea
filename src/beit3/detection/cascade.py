"""The cascade of box heads and the mask head: what is in each proposal, where exactly, and which of
its pixels.

Cascade R-CNN (arXiv:1712.00726) with detectron2's values, one mask head (arXiv:1703.06870). Maps
[B, C, *, *] and boxes
[R, 4] of each image -> losses; or boxes [R, 4] with scores [R, C]; or masks [n, 28, 28]. Labels are
0..C-1, C is background.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

from beit3.detection.config import DetectorConfig
from beit3.detection.pyramid import SCALES, ChannelNorm
from beit3.ops.precision import promote_to_float32

POOLED_LEVELS = 4
"""Boxes are pooled from all maps but the coarsest, p2 to p5."""
BOX_SIDE, MASK_SIDE = 7, 14
"""Cells a side that a box is pooled to, for the box heads and for the mask head."""
MASK_OUTPUT = 28
MASKS_AT_ONCE = 16
"""Full-size masks turned into floats at once: a hundred at 1280 px take 655 MB."""


class Target(NamedTuple):
    """An image's objects. Boxes have an area and lie within the image."""

    boxes: Tensor
    """float32 [n, 4], x1 y1 x2 y2 in pixels."""
    labels: Tensor
    """int64 [n], 0..C-1."""
    masks: Tensor | None = None
    """uint8 [n, H, W] of 0 and 1, as large as the padded image; needed by a detector with masks."""


class BoxPredictions(NamedTuple):
    """All that the cascade makes of an image's proposals, before any NMS."""

    boxes: Tensor
    """[R, 4], clipped to the valid area."""
    scores: Tensor
    """[R, C] probabilities; what is missing to 1 is background's."""


class MatchedBoxes(NamedTuple):
    """An image's boxes with what each of them should become."""

    boxes: Tensor
    labels: Tensor
    """[R] int64; C is background."""
    nearest: Tensor
    """[R] int64, the object that overlaps most; 0 where there is none."""
    wanted: Tensor
    """[R, 4], that object's box; the box itself where there is none."""


class Cascade(nn.Module):
    """A box head per stage, each of which starts from the boxes of the one before; boxes are
    refined whatever their class."""

    def __init__(self, num_classes: int, *, patch_size: int, config: DetectorConfig):
        super().__init__()
        self.num_classes, self.config = num_classes, config
        self.pool = Pool(patch_size, config.pooled_cells)
        self.box_heads = nn.ModuleList(BoxHead(num_classes, config) for _ in config.stage_ious)
        self.mask_head = mask_head(num_classes, config) if config.masks else None
        self.coders = [BoxCoder((w, w, w / 2, w / 2)) for w in config.stage_box_weights]
        self.sampler = BalancedPositiveNegativeSampler(
            config.roi_samples, config.roi_positive_share
        )

    # Training -------------------------------------------------------------------------------------

    def losses(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Tensor, targets: Sequence[Target]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums over this process's boxes, and over how many: `box{i}_class`, `box{i}_box` and, with
        masks, `mask`."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        rois = self.sampled(proposals, targets)
        first = rois
        for stage, coder in enumerate(self.coders):
            boxes = [image.boxes for image in rois]
            logits, deltas = self.predicted(stage, maps, boxes)
            labels = torch.cat([image.labels for image in rois])
            positive = labels < self.num_classes
            wanted = coder.encode_single(
                torch.cat([image.wanted for image in rois])[positive], torch.cat(boxes)[positive]
            )
            sums[f"box{stage}_class"] = F.cross_entropy(logits, labels, reduction="sum")
            sums[f"box{stage}_box"] = F.l1_loss(
                deltas[positive], wanted.to(deltas.dtype), reduction="sum"
            )
            counts |= {f"box{stage}_class": len(labels), f"box{stage}_box": len(labels)}
            if stage + 1 < len(self.coders):
                boxes = [
                    with_area(image) for image in self.refined(stage, deltas.detach(), boxes, sizes)
                ]
                rois = self.labelled(boxes, targets, stage + 1)
        if self.mask_head is not None:
            sums["mask"], counts["mask"] = self.mask_loss(maps, first, targets)
        return sums, counts

    def sampled(self, proposals: list[Tensor], targets: Sequence[Target]) -> list[MatchedBoxes]:
        """The first stage's boxes: proposals and the objects themselves, at most `roi_samples` of
        an image."""
        boxes = [
            torch.cat((mine, target.boxes.to(mine.dtype)))
            for mine, target in zip(proposals, targets, strict=True)
        ]
        rois = self.labelled(boxes, targets, 0)
        chosen = zip(
            *self.sampler([(image.labels < self.num_classes).long() for image in rois]), strict=True
        )
        return [
            MatchedBoxes(*(part[(yes + no).bool()] for part in image))
            for image, (yes, no) in zip(rois, chosen, strict=True)
        ]

    def labelled(
        self, boxes: list[Tensor], targets: Sequence[Target], stage: int
    ) -> list[MatchedBoxes]:
        """Each box gets the label of the object that it overlaps most, if by the stage's IoU or
        more."""
        iou, background = self.config.stage_ious[stage], self.num_classes
        return [
            label(mine, target, iou, background)
            for mine, target in zip(boxes, targets, strict=True)
        ]

    def mask_loss(
        self, maps: list[Tensor], rois: Sequence[MatchedBoxes], targets: Sequence[Target]
    ) -> tuple[Tensor, int]:
        """Binary cross-entropy of the right class's mask, a mean over pixels, summed over positive
        boxes; their number."""
        positive = [
            MatchedBoxes(*(part[image.labels < self.num_classes] for part in image))
            for image in rois
        ]
        labels = torch.cat([image.labels for image in positive])
        logits = self.mask_logits(maps, [image.boxes for image in positive], labels)
        wanted = torch.cat(
            [mask_targets(target, image) for target, image in zip(targets, positive, strict=True)]
        )
        loss = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="sum")
        return loss / MASK_OUTPUT**2, len(labels)

    # Inference ------------------------------------------------------------------------------------

    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], sizes: Tensor
    ) -> list[BoxPredictions]:
        """The last stage's boxes with the mean of all stages' probabilities; no box is dropped on
        the way."""
        boxes, stages = proposals, []
        for stage in range(len(self.coders)):
            logits, deltas = self.predicted(stage, maps, boxes)
            stages.append(logits.softmax(1)[:, : self.num_classes])
            boxes = self.refined(stage, deltas, boxes, sizes)
        scores = torch.stack(stages).mean(0).split([len(mine) for mine in boxes])
        return [BoxPredictions(*image) for image in zip(boxes, scores, strict=True)]

    def masks(self, maps: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        """Probabilities [n, 28, 28] that a place within each box belongs to its object."""
        probabilities = self.mask_logits(maps, boxes, torch.cat(labels)).sigmoid()
        return list(probabilities.split([len(mine) for mine in boxes]))

    # Both -----------------------------------------------------------------------------------------

    def predicted(
        self, stage: int, maps: list[Tensor], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits [R, C + 1] and deltas [R, 4] of all images' boxes, in float32.

        Each stage gives the maps its share of the gradient, lest their sum outweigh the proposals'.
        """
        pooled = self.pool(maps, boxes, BOX_SIDE)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.box_heads))
        logits, deltas = self.box_heads[stage](pooled)
        return promote_to_float32(logits), promote_to_float32(deltas)

    def refined(
        self, stage: int, deltas: Tensor, boxes: list[Tensor], sizes: Tensor
    ) -> list[Tensor]:
        """The boxes that a stage's deltas make of those it saw, clipped to their images."""
        moved = (
            self.coders[stage]
            .decode_single(deltas, torch.cat(boxes))
            .split([len(mine) for mine in boxes])
        )
        return [clip(mine, size) for mine, size in zip(moved, sizes, strict=True)]

    def mask_logits(self, maps: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """[n, 28, 28] of all images' boxes, each for its own class, in float32."""
        assert self.mask_head is not None, "a detector of boxes alone was asked for masks"
        logits = self.mask_head(self.pool(maps, boxes, MASK_SIDE))
        return promote_to_float32(logits[torch.arange(len(labels), device=labels.device), labels])


class BoxHead(nn.Module):
    """Pooled boxes [R, C, 7, 7] -> class logits [R, num_classes + 1], background last, and deltas
    [R, 4]."""

    def __init__(self, num_classes: int, config: DetectorConfig):
        super().__init__()
        dim, width = config.pyramid_dim, config.box_dim
        self.body = FastRCNNConvFCHead(
            (dim, BOX_SIDE, BOX_SIDE), [dim] * config.box_convs, [width], norm_layer=ChannelNorm
        )
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        states = self.body(pooled)
        return self.class_logits(states), self.box_deltas(states)


def mask_head(num_classes: int, config: DetectorConfig) -> nn.Module:
    """Pooled boxes [R, C, 14, 14] -> a mask's logits for every class [R, num_classes, 28, 28]."""
    dim = config.pyramid_dim
    body = MaskRCNNHeads(dim, [dim] * config.mask_convs, 1, norm_layer=ChannelNorm)
    return nn.Sequential(body, MaskRCNNPredictor(dim, dim, num_classes))


class Pool(nn.Module):
    """Maps and boxes [R, 4] of each image -> [all R, C, side, side]: every box from the map that
    suits its size (RoIAlign).

    torchvision's `MultiScaleRoIAlign` is without `aligned`, and keeps the first batch's scales for
    good.
    """

    def __init__(self, patch_size: int, cells: float):
        super().__init__()
        self.patch_size = patch_size
        self.level_of = LevelMapper(2, 2 + POOLED_LEVELS - 1, canonical_scale=cells * patch_size)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor], boxes: list[Tensor], side: int) -> Tensor:
        rois = torch.cat(
            [F.pad(mine, (1, 0), value=float(image)) for image, mine in enumerate(boxes)]
        )  # [R, 5]
        levels = self.level_of(boxes)
        places, parts = [], []
        for level, (features, scale) in enumerate(zip(maps[:POOLED_LEVELS], SCALES, strict=False)):
            mine = (levels == level).nonzero()[:, 0]
            features = promote_to_float32(features)  # there is no RoIAlign in bfloat16
            places.append(mine)
            parts.append(
                roi_align(
                    features,
                    rois[mine].to(features.dtype),
                    side,
                    1 / (scale * self.patch_size),
                    sampling_ratio=0,
                    aligned=True,
                )
            )
        return torch.cat(parts)[torch.cat(places).argsort()].to(maps[0].dtype)


def label(boxes: Tensor, target: Target, iou: float, background: int) -> MatchedBoxes:
    """Boxes [R, 4] of one image with the object that each overlaps most."""
    if not len(target.boxes):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return MatchedBoxes(boxes, nothing + background, nothing, boxes)
    best, nearest = box_iou(target.boxes.to(boxes.dtype), boxes).max(0)
    labels = torch.where(best >= iou, target.labels[nearest], background)
    return MatchedBoxes(boxes, labels, nearest, target.boxes[nearest].to(boxes.dtype))


def mask_targets(target: Target, positive: MatchedBoxes) -> Tensor:
    """Which of the 28 x 28 places in each box its object's mask covers at least half: float32 [n,
    28, 28] of 0 and 1."""
    assert target.masks is not None, "a detector with masks is trained on targets with masks"
    wanted = positive.boxes.new_zeros(len(positive.boxes), MASK_OUTPUT, MASK_OUTPUT)
    for start, masks in enumerate(target.masks.split(MASKS_AT_ONCE)):
        place = positive.nearest - start * MASKS_AT_ONCE
        mine = (place >= 0) & (place < len(masks))
        rois = torch.cat((place[mine, None], positive.boxes[mine]), 1)
        covered = roi_align(
            masks[:, None].to(rois.dtype), rois, MASK_OUTPUT, sampling_ratio=0, aligned=True
        )
        wanted[mine] = (covered[:, 0] >= 0.5).to(wanted.dtype)
    return wanted


def clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes [R, 4] within an image of `size` [2], height and width. What is not a number becomes 0:
    RoIAlign would read anywhere."""
    return boxes.nan_to_num(nan=0.0).clamp(min=0).minimum(size[[1, 0, 1, 0]].to(boxes.dtype))


def with_area(boxes: Tensor) -> Tensor:
    """The boxes that are wider and higher than nothing."""
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
