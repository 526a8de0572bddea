"""Sizes and thresholds of a detector; the defaults are the published full size.

Sources: ViTDet's release for the network and its training, EVA (arXiv:2211.07636) for Soft-NMS,
whose values BEiT-3 does not state.
"""

from dataclasses import dataclass
from typing import Literal

from beit3.detection.pyramid import SCALES


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes are in pixels of the network's input, scores and overlaps are from 0 to 1."""

    masks: bool = True
    """Whether to predict instance masks; off where the data has boxes alone (Objects365)."""
    pyramid_dim: int = 256
    """Channels of every map of the pyramid."""

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor of each map, finest first: two strides of a patch-16 pyramid and
    up."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width of the anchors; all have the same area."""
    rpn_convs: int = 2
    rpn_positive_iou: float = 0.7
    """An anchor with at least this IoU with an object is positive, and so is the best anchor of
    each object."""
    rpn_negative_iou: float = 0.3
    """An anchor with less than this IoU with every object is negative; anchors in between are not
    trained on."""
    rpn_samples: int = 256
    """Anchors per image that the loss samples, at most half of them positive."""
    rpn_top_train: int = 2000
    """The best anchors of each map that enter the proposals' NMS in training."""
    rpn_top_test: int = 1000
    """The same at inference."""
    rpn_proposals: int = 1000
    """Proposals per image after NMS."""
    rpn_nms_iou: float = 0.7

    pooled_cells: float = 14.0
    """Side, in patches, of a box that is pooled from the map of the trunk's own stride: 224 px with
    patches of 16 (arXiv:1612.03144, equation 1)."""
    roi_samples: int = 512
    """Proposals per image that the box heads are trained on."""
    roi_positive_share: float = 0.25
    """Largest fraction of them that is positive."""
    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """IoU from which a box is positive, for each stage of the cascade."""
    stage_box_weights: tuple[float, ...] = (10.0, 20.0, 30.0)
    """Factor of the regressed centers for each stage; the factor of the sizes is half of it."""
    box_convs: int = 4
    box_dim: int = 1024
    """Width of the linear layer of the box heads."""
    mask_convs: int = 4

    candidate_score: float = 0.0
    """Class scores up to this value do not enter NMS."""
    nms: Literal["linear", "gaussian", "hard"] = "linear"
    """Decay of Soft-NMS (arXiv:1704.04503), or ordinary ("hard") NMS."""
    nms_iou: float = 0.6
    """IoU above which linear Soft-NMS lowers a score and hard NMS drops a box."""
    nms_sigma: float = 0.5
    """Width of the gaussian decay."""
    min_score: float = 1e-3
    """Detections of a lower score are dropped."""
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != len(SCALES):
            raise ValueError(
                f"anchor_sizes {self.anchor_sizes}: give {len(SCALES)}, one for each map of the "
                "pyramid"
            )
        if not self.anchor_ratios or min(*self.anchor_sizes, *self.anchor_ratios) <= 0:
            raise ValueError(
                f"anchor_sizes {self.anchor_sizes} and anchor_ratios {self.anchor_ratios}: "
                "give positive numbers"
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
        for name in ("rpn_samples", "roi_samples", "rpn_proposals", "detections_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
