"""Mask2Former's head (arXiv:2112.01527) on the maps of the adapter: queries that are each a mask
and a class.

Features: four maps [B, D, h, w], each half as large as the one before; the largest, one place per
quarter of a patch, is the
masks' grid. The labels' maps are [B, H, W] at the size of the pixels. The layers are transformers'
(mask2former.py), the
losses our own (losses.py).
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from beit3.ops.precision import promote_to_float32
from beit3.seeding import make_generator
from beit3.segmentation import losses
from beit3.segmentation.config import HeadConfig
from beit3.segmentation.losses import MaskPredictions

OLDEST = (5, 23)
"""Of transformers: before, projections of other widths did not train and query and level embeddings
started elsewhere."""


class MaskHead(nn.Module):
    """Features of width `dim` -> for every layer, masks and classes of all queries; `num_classes`
    without "no object"."""

    def __init__(self, dim: int, num_classes: int, config: HeadConfig):
        super().__init__()
        check_transformers()
        self.num_classes = num_classes
        self.config = config
        from beit3.segmentation.mask2former import parts  # seconds

        self.pixels, self.queries = parts(dim, config)
        self.classes = nn.Linear(config.hidden_dim, num_classes + 1)

    def forward(self, features: Sequence[Tensor]) -> MaskPredictions:
        """Four maps, largest first -> what the queries say before the first layer and after
        each."""
        with torch.autocast(
            features[0].device.type, enabled=False
        ):  # sampling locations need all bits
            pixels = self.pixels([promote_to_float32(each) for each in features])
        found = self.queries(pixels.multi_scale_features, pixels.mask_features)
        classes = tuple(
            self.classes(states.transpose(0, 1)) for states in found.intermediate_hidden_states
        )
        return MaskPredictions(masks=tuple(found.masks_queries_logits), classes=classes)

    # Training -------------------------------------------------------------------------------------

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the means of `losses`: with them the total is the published sum over all
        layers."""
        config, layers = self.config, self.config.decoder_layers + 1
        return {
            "mask": config.mask_weight * layers,
            "dice": config.dice_weight * layers,
            "class": config.class_weight * layers,
        }

    def losses(
        self, predicted: MaskPredictions, label_map: Tensor, *, ignore: int = 255
    ) -> dict[str, Tensor]:
        """Sums `mask`, `dice` and `class`, each the mean over layers; `counts` says over how many.

        label_map: integers [B, H, W] in 0..C-1, or `ignore`, whose pixels count nowhere. ValueError
        for any other label.
        """
        return losses.set_losses(predicted, label_map, self.config, ignore=ignore)

    def counts(self, label_map: Tensor, *, ignore: int = 255) -> dict[str, int]:
        """What the sums of `losses` are divided by: masks, masks, and queries by their weights in
        thousandths."""
        return losses.counts(label_map, self.num_classes, self.config, ignore=ignore)

    # Inference ------------------------------------------------------------------------------------

    def scores(self, predicted: MaskPredictions) -> Tensor:
        """Scores [B, C, h, w] of the last layer: over all queries, the class's probability times
        the mask's."""
        with torch.autocast(predicted.masks[-1].device.type, enabled=False):
            classes = promote_to_float32(predicted.classes[-1]).softmax(-1)[..., :-1]  # [B, Q, C]
            return torch.einsum(
                "bqc,bqhw->bchw", classes, promote_to_float32(predicted.masks[-1]).sigmoid()
            )

    # Parameters -----------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initial values, each parameter from its own generator."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The release of Mask2Former, in place.

        | parameter                                        | values                                |
        |--------------------------------------------------|---------------------------------------|
        | norms; biases                                    | 1, 0; 0                               |
        | query and level embeddings                       | normal, deviation 1                   |
        | deformable attention: offsets; its weights     | 0, bias in each head's own direction; 0 |
        | mask MLP and classes, with their biases   | uniform within 1 / sqrt(inputs), torch's own |
        | every other matrix and kernel                    | Xavier, uniform                       |
        """
        from beit3.segmentation.mask2former import offsets

        module, _, kind = name.rpartition(".")
        if (
            kind == "level_embed"
            or "level_embed" in module
            or module.startswith("queries.queries_")
        ):
            parameter.normal_(generator=generator)
        elif module.endswith("sampling_offsets") and kind == "bias":
            parameter.copy_(offsets(self.config.num_heads))
        elif module.endswith(("sampling_offsets", "attention_weights")):
            parameter.zero_()
        elif module == "classes" or "mask_embedder" in module:
            bound = 1 / math.sqrt(self.get_submodule(module).in_features)  # type: ignore[arg-type]
            parameter.uniform_(-bound, bound, generator=generator)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            norm = isinstance(self.get_submodule(module), nn.LayerNorm | nn.GroupNorm)
            parameter.fill_(float(norm and kind == "weight"))


def check_transformers() -> None:
    """ValueError where transformers is not installed or older than `OLDEST`."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if not numbers or (int(numbers[1]), int(numbers[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ValueError(
            f"segmentation needs transformers {wanted} or later, here is {found}: pip install "
            "'beit3[dense]'"
        )
