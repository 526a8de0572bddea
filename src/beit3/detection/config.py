"""What a detector is beside its trunk: one frozen dataclass. The defaults are the published full
size.

Sources: ViTDet's release for the network and its training, EVA's (arXiv:2211.07636) for Soft-NMS,
whose values BEiT-3 leaves out.
"""

from dataclasses import dataclass
from typing import Literal

from beit3.detection.pyramid import SCALES


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes are in pixels of the network's input, widths in units, scores and overlaps in [0,
    1]."""

    masks: bool = True
    """Whether outlines are learnt; off where the data holds boxes alone (Objects365)."""
    pyramid_dim: int = 256

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor of each map, finest first: two strides of a patch-16 pyramid and
    up."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width; the area stays."""
    rpn_convs: int = 2
    rpn_positive_iou: float = 0.7
    """An anchor that overlaps an object so much stands for it; so does the best of each object."""
    rpn_negative_iou: float = 0.3
    """An anchor that overlaps every object less is background; those in between teach nothing."""
    rpn_samples: int = 256
    """Anchors of an image that are learnt from, at most half of them positive."""
    rpn_top_train: int = 2000
    """The best anchors of each map that enter the proposals' NMS."""
    rpn_top_test: int = 1000
    rpn_proposals: int = 1000
    """Proposals of an image that leave it."""
    rpn_nms_iou: float = 0.7

    pooled_cells: float = 14.0
    """A box of so many patches a side is pooled from the map of the trunk's own stride: 224 px of
    16 (arXiv:1612.03144, equation 1)."""
    roi_samples: int = 512
    """Proposals of an image that the heads learn from."""
    roi_positive_share: float = 0.25
    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """Overlap from which on a box is positive, for each stage of the cascade."""
    stage_box_weights: tuple[float, ...] = (10.0, 20.0, 30.0)
    """Factor of the regressed centres of each stage; that of the sizes is half of it."""
    box_convs: int = 4
    box_dim: int = 1024
    """Width of the box heads' linear layer."""
    mask_convs: int = 4

    candidate_score: float = 0.0
    """Scores of classes up to this one never enter NMS."""
    nms: Literal["linear", "gaussian", "hard"] = "linear"
    """Soft-NMS (arXiv:1704.04503) of that decay, or the ordinary one."""
    nms_iou: float = 0.6
    """Overlap from which on linear Soft-NMS lowers a score and hard NMS drops a box."""
    nms_sigma: float = 0.5
    min_score: float = 1e-3
    """A detection whose score falls below it is dropped."""
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != len(SCALES):
            raise ValueError(
                f"anchor_sizes {self.anchor_sizes}: give {len(SCALES)}, one for each map of the "
                "pyramid"
            )
        if not self.anchor_ratios or min(*self.anchor_sizes, *self.anchor_ratios) <= 0:
            raise ValueError(
                f"anchor_sizes {self.anchor_sizes} and anchor_ratios {self.anchor_ratios}: give "
                "positive numbers"
            )
        if not self.stage_ious or len(self.stage_ious) != len(self.stage_box_weights):
            raise ValueError(
                f"stage_ious {self.stage_ious} and stage_box_weights {self.stage_box_weights}: "
                "give one of each per stage"
            )
        if self.pooled_cells <= 0:
            raise ValueError(f"pooled_cells {self.pooled_cells}: give a number above 0")
        if not 0 <= self.rpn_negative_iou <= self.rpn_positive_iou <= 1:
            raise ValueError(
                f"rpn_negative_iou {self.rpn_negative_iou} must lie between 0 and "
                f"rpn_positive_iou {self.rpn_positive_iou}"
            )
        if (
            min(self.rpn_samples, self.roi_samples, self.rpn_proposals, self.detections_per_image)
            < 1
        ):
            raise ValueError(
                "rpn_samples, roi_samples, rpn_proposals and detections_per_image: give at least "
                "1 each"
            )
