"""The region proposal network: where something might be, whatever it is (ViTDet's values of Faster
R-CNN, arXiv:1506.01497).

Maps [B, C, *, *] and valid sizes [B, 2] -> boxes [R, 4] of each image, clipped to it. Anchors
centred on padding take no part.
Built on torchvision's; the losses are detectron2's: binary cross-entropy and L1, both over the
anchors of a whole image's share.
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

OVERLAP_ROWS = 32
"""Objects whose overlaps with all anchors are computed at once: half a million anchors times 300
objects take gigabytes."""

IMPOSSIBLE = 1e-38
"""Objectness below it is that of an anchor on padding, which is 0."""


class ProposalNetwork(RegionProposalNetwork):
    """Its head `head` looks at every map; `Anchors` are computed at each call, so nothing but
    parameters is stored."""

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
            score_thresh=IMPOSSIBLE,
        )
        self.samples = config.rpn_samples
        self.box_similarity = compute_overlaps

    def forward(  # type: ignore[override]
        self, maps: list[Tensor], sizes: Tensor, objects: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image, best first, and with its `objects` (boxes [n, 4]) the losses,
        summed over images."""
        levels = self.head(maps)
        counts = [scores[0].numel() for scores in levels[0]]
        objectness, deltas = concat_box_prediction_layers(*levels)
        objectness, deltas = (
            objectness.view(len(sizes), -1),
            deltas.view(len(sizes), -1, 4),
        )  # [B, N], [B, N, 4]
        anchors = self.anchor_generator(maps)
        inside = find_anchors_inside(anchors, sizes)

        decoded = self.box_coder.decode_single(
            deltas.detach().flatten(0, 1), anchors.repeat(len(sizes), 1)
        ).view_as(deltas)
        ranked = objectness.detach().masked_fill(~inside, -torch.inf)
        proposals, _ = self.filter_proposals(decoded.nan_to_num(), ranked, sizes.tolist(), counts)
        return proposals, {} if objects is None else self.losses(
            objectness, deltas, anchors, inside, objects
        )

    def losses(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        inside: Tensor,
        objects: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`rpn_objectness` and `rpn_box`: sums over sampled anchors, and positive ones, divided by
        `rpn_samples`."""
        assigned = [
            self.assign(anchors, valid, boxes) for valid, boxes in zip(inside, objects, strict=True)
        ]
        chosen = self.fg_bg_sampler([labels for labels, _ in assigned])
        positive, negative = (torch.stack(kind).bool() for kind in chosen)  # [B, N]
        sampled = positive | negative
        matched = torch.stack([boxes for _, boxes in assigned])[positive]
        wanted = self.box_coder.encode_single(matched, anchors.expand_as(deltas)[positive])
        guesses, truth = objectness[sampled], positive[sampled].to(objectness.dtype)
        return {
            "rpn_objectness": F.binary_cross_entropy_with_logits(guesses, truth, reduction="sum")
            / self.samples,
            "rpn_box": F.l1_loss(deltas[positive], wanted.to(deltas.dtype), reduction="sum")
            / self.samples,
        }

    def assign(self, anchors: Tensor, valid: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """An image's labels [N] (1 object, 0 background, -1 neither or not `valid`), and each
        anchor's object [N, 4]."""
        labels, matched = anchors.new_full((len(anchors),), -1), torch.zeros_like(anchors)
        found = self.assign_targets_to_anchors(
            [anchors[valid]], [{"boxes": boxes.to(anchors.dtype)}]
        )
        labels[valid], matched[valid] = found[0][0], found[1][0].to(anchors.dtype)
        return labels, matched


class ProposalHead(RPNHead):
    """torchvision's, whose answers are at least float32: boxes are decoded from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [promote_to_float32(level) for level in objectness], [
            promote_to_float32(level) for level in deltas
        ]


class AnchorGenerator(nn.Module):
    """Boxes around each cell's upper left corner, a size per map and a box per ratio: float32 [N,
    4], not clipped.

    As detectron2's: map by map, row by row, ratio by ratio. torchvision's rounds them, and the
    strides of patches of 14 px.
    """

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], patch_size: int):
        super().__init__()
        self.sizes, self.ratios, self.patch_size = sizes, ratios, patch_size

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        device = maps[0].device
        ratios = torch.tensor(self.ratios, device=device)
        half = (
            torch.stack((ratios.rsqrt(), ratios.sqrt()), 1) / 2
        )  # [A, 2], width and height of the unit square
        levels = []
        for feature, size, scale in zip(maps, self.sizes, SCALES, strict=True):
            rows, columns = (
                torch.arange(side, device=device) * (self.patch_size * scale)
                for side in feature.shape[2:]
            )
            corners = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 1, 2)
            levels.append(torch.cat((corners - size * half, corners + size * half), -1).view(-1, 4))
        return torch.cat(levels)


def find_anchors_inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Which anchors' centres lie on each image rather than on its padding: [B, N] bool."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centres < sizes[:, None, [1, 0]]).all(-1)


def compute_overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU [n, N], some rows at a time."""
    return torch.cat([box_iou(rows, anchors) for rows in boxes.split(OVERLAP_ROWS)])
