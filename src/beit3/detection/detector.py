"""The detector above a trunk: pyramid, proposals, cascade and masks (ViTDet, arXiv:2203.16527;
BEiT-3, section 3.2).

Boxes are x1 y1 x2 y2 in pixels of the network's input. The size of an image (height, width) is that
of its pixels without the padding at the bottom and on the right.
"""

import torch
from torch import Tensor, nn

from beit3.detection.cascade import BoxPredictions, Cascade
from beit3.detection.config import DetectorConfig
from beit3.detection.matching import Target
from beit3.detection.proposals import ProposalNetwork
from beit3.detection.pyramid import FeaturePyramid
from beit3.ops.collectives import all_reduce

INIT_STDS = {
    "proposals.": 0.01,
    "class_logits": 0.01,
    "box_deltas": 0.001,
    "mask_fcn_logits": 0.001,
}
"""Standard deviation of normal initial weights, by a part of the parameter's name (detectron2)."""


class Detector(nn.Module):
    """Everything between a trunk's features [B, h, w, D] and boxes with scores and masks.

    `dim` and `patch_size` are the trunk's; labels are 0 to `num_classes` - 1.
    """

    def __init__(self, dim: int, *, patch_size: int, num_classes: int, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.pyramid = FeaturePyramid(dim, config.pyramid_dim)
        self.proposals = ProposalNetwork(patch_size, config=config)
        self.cascade = Cascade(num_classes, patch_size=patch_size, config=config)

    def compute_losses(
        self, features: Tensor, sizes: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Computes all losses as sums over this process's images.

        Divided by the number of images in the step they are the usual losses: `rpn_objectness` and
        `rpn_box` per sampled anchor, `box{i}_class` and `box{i}_box` of each stage per box, `mask`
        per positive box. Boxes are counted over all processes, so each process must call this
        equally often.

        Args:
            features: The trunk's features [B, h, w, D].
            sizes: Sizes of the images [B, 2].
            targets: The annotated objects of each image.
        """
        maps = self.pyramid(features)
        proposals, losses = self.proposals(maps, sizes, [target.boxes for target in targets])
        sums, counts = self.cascade.compute_losses(maps, proposals, sizes, targets)
        local_counts = torch.tensor(
            [len(targets), *counts.values()], device=features.device, dtype=losses["rpn_box"].dtype
        )
        totals = all_reduce(local_counts)
        images_per_box = totals[0] / totals[1:].clamp(min=1)
        for name, factor in zip(counts, images_per_box, strict=True):
            losses[name] = sums[name] * factor
        return losses

    def predict_boxes(self, maps: list[Tensor], sizes: Tensor) -> list[BoxPredictions]:
        """Returns boxes [R, 4] with probabilities [R, C] for each image, from the pyramid's maps.

        R differs between images, and NMS is not applied.
        """
        return self.cascade.predict_boxes(maps, self.proposals(maps, sizes)[0], sizes)

    def predict_masks(
        self, maps: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> list[Tensor]:
        """Returns mask probabilities [n, 28, 28] over each image's boxes [n, 4] of labels [n]."""
        return self.cascade.predict_masks(maps, boxes, labels)

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initializes the parameter of this name (relative to this module) as detectron2 does.

        | parameter             | value                          |
        |-----------------------|--------------------------------|
        | norms                 | weight 1, bias 0               |
        | other biases          | 0                              |
        | proposals, predictors | normal with `INIT_STDS`        |
        | pyramid               | uniform in torch's own range   |
        | linear layers         | uniform, scaled by inputs      |
        | other convolutions    | normal, scaled by outputs (He) |
        """
        module = self.get_submodule(name.rpartition(".")[0])
        stds = [std for part, std in INIT_STDS.items() if part in name]
        if parameter.ndim == 1:
            is_norm_weight = isinstance(module, nn.LayerNorm) and name.endswith("weight")
            nn.init.constant_(parameter, float(is_norm_weight))
        elif stds:
            nn.init.normal_(parameter, std=stds[0], generator=generator)
        elif name.startswith("pyramid."):
            nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(parameter, a=1, generator=generator)
        else:
            nn.init.kaiming_normal_(
                parameter, mode="fan_out", nonlinearity="relu", generator=generator
            )
