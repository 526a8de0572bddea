"""Everything above a trunk that finds objects: ViTDet's pyramid, proposals, cascade and masks
(arXiv:2203.16527; BEiT-3, section 3.3).

Features [B, h, w, D] and valid sizes [B, 2] (height and width in pixels; the rest of each image is
padding) -> losses in
training, boxes with scores, masks of chosen boxes. Boxes are x1 y1 x2 y2 in pixels of the network's
input.
"""

import torch
from torch import Tensor, nn

from beit3.detection.cascade import BoxPredictions, Cascade, Target
from beit3.detection.config import DetectorConfig
from beit3.detection.proposals import ProposalNetwork
from beit3.detection.pyramid import FeaturePyramid
from beit3.ops.collectives import all_reduce

DEVIATIONS = {
    "proposals.": 0.01,
    "class_logits": 0.01,
    "box_deltas": 0.001,
    "mask_fcn_logits": 0.001,
}
"""Normal initial weights, by part of the name (detectron2)."""


class Detector(nn.Module):
    """`dim` and `patch_size` are the trunk's; labels are 0..num_classes - 1."""

    def __init__(self, dim: int, *, patch_size: int, num_classes: int, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.pyramid = FeaturePyramid(dim, config.pyramid_dim)
        self.proposals = ProposalNetwork(patch_size, config=config)
        self.cascade = Cascade(num_classes, patch_size=patch_size, config=config)

    def losses(self, features: Tensor, sizes: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Each loss as a SUM over this process's images, of which the mean over the step's images
        is the usual loss.

        `rpn_objectness` and `rpn_box` are per sampled anchor; `box{i}_class` and `box{i}_box` of
        each stage per box, `mask`
        per positive box, counted over all processes, each of which must call this as often as the
        others.
        """
        maps = self.pyramid(features)
        proposals, losses = self.proposals(maps, sizes, [target.boxes for target in targets])
        sums, counts = self.cascade.losses(maps, proposals, sizes, targets)
        own = torch.tensor(
            [len(targets), *counts.values()], device=features.device, dtype=losses["rpn_box"].dtype
        )
        totals = all_reduce(own)
        shares = totals[0] / totals[1:].clamp(min=1)  # images per box
        return losses | {
            name: sums[name] * share for name, share in zip(counts, shares, strict=True)
        }

    def detect(self, maps: list[Tensor], sizes: Tensor) -> list[BoxPredictions]:
        """Each image's boxes [R, 4] with probabilities [R, C] of all classes, from the pyramid's
        `maps`.

        R differs from image to image, and no NMS has been done.
        """
        return self.cascade.detect(maps, self.proposals(maps, sizes)[0], sizes)

    def masks(self, maps: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        """Probabilities [n, 28, 28] of each image's `boxes` [n, 4] with `labels` [n], over the
        boxes' own area."""
        return self.cascade.masks(maps, boxes, labels)

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Values for the parameter of this name, below this module, as detectron2 draws them.

        | parameter                         | value                                 |
        |-----------------------------------|---------------------------------------|
        | norms; biases                     | 1, 0; 0                               |
        | proposals, predictors             | normal, `DEVIATIONS`                  |
        | pyramid                           | uniform, of torch's own range         |
        | linear layers; other convolutions | uniform by inputs; normal by outputs (He) |
        """
        module = self.get_submodule(name.rpartition(".")[0])
        deviations = [deviation for part, deviation in DEVIATIONS.items() if part in name]
        if parameter.ndim == 1:
            nn.init.constant_(
                parameter, float(isinstance(module, nn.LayerNorm) and name.endswith("weight"))
            )
        elif deviations:
            nn.init.normal_(parameter, std=deviations[0], generator=generator)
        elif name.startswith("pyramid."):
            nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(parameter, a=1, generator=generator)
        else:
            nn.init.kaiming_normal_(
                parameter, mode="fan_out", nonlinearity="relu", generator=generator
            )
