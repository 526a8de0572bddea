"""Mask2Former's head (arXiv:2112.01527) on the adapter's maps: each query is a mask and a class.

Features are four maps [B, D, h, w], each half as large as the one before; the largest, with one
cell per quarter of a patch, is the grid of the masks. Label maps are [B, H, W] at the size of the
image. The layers are transformers' (mask2former.py), the losses are our own (losses.py).
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn
from torch.func import functional_call

from beit3.ops.precision import promote_to_float32
from beit3.seeding import make_generator
from beit3.segmentation import losses
from beit3.segmentation.config import HeadConfig
from beit3.segmentation.losses import MaskPredictions

MIN_TRANSFORMERS = (5, 23)
"""Oldest version of transformers that works. Before it, projections of other widths did not train,
and query and level embeddings had other initial values."""


class MaskHead(nn.Module):
    """Predicts masks and classes of all queries, for every layer, from features of width `dim`.

    `num_classes` does not include "no object".
    """

    def __init__(self, dim: int, num_classes: int, config: HeadConfig):
        super().__init__()
        check_transformers()
        self.num_classes = num_classes
        self.config = config
        from beit3.segmentation.mask2former import build_decoders  # takes seconds

        self.pixels, self.queries = build_decoders(dim, config)
        self.classes = nn.Linear(config.hidden_dim, num_classes + 1)

    def forward(self, features: Sequence[Tensor]) -> MaskPredictions:
        """Returns the queries' predictions before the first layer and after each.

        `features` are four maps [B, D, h, w], largest first.
        """
        multi_scale_features, mask_features = self.decode_pixels(features)
        decoded = self.queries(multi_scale_features, mask_features)
        classes = tuple(
            self.classes(states.transpose(0, 1)) for states in decoded.intermediate_hidden_states
        )
        return MaskPredictions(masks=tuple(decoded.masks_queries_logits), classes=classes)

    def decode_pixels(self, features: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Returns the pixel decoder's maps for the queries and for the masks.

        It computes in float32 because sampling locations need it, whatever the precision of its
        weights; the maps have the precision of the head's weights.
        """
        dtype = self.classes.weight.dtype
        with torch.autocast(features[0].device.type, enabled=False):
            inputs = [promote_to_float32(feature_map) for feature_map in features]
            if dtype in (torch.float16, torch.bfloat16):
                weights = {
                    name: promote_to_float32(parameter)
                    for name, parameter in self.pixels.named_parameters()
                }
                decoded = functional_call(self.pixels, weights, (inputs,))
            else:
                decoded = self.pixels(inputs)
        maps = [feature_map.to(dtype) for feature_map in decoded.multi_scale_features]
        return maps, decoded.mask_features.to(dtype)

    # Training -------------------------------------------------------------------------------------

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weights of the losses' means; with them the total is the published sum over layers."""
        config, num_layers = self.config, self.config.decoder_layers + 1
        return {
            "mask": config.mask_weight * num_layers,
            "dice": config.dice_weight * num_layers,
            "class": config.class_weight * num_layers,
        }

    def compute_losses(
        self, predictions: MaskPredictions, label_map: Tensor, *, ignore: int = 255
    ) -> dict[str, Tensor]:
        """Returns the sums `mask`, `dice` and `class`, each the mean over layers.

        Args:
            predictions: What `forward` returns.
            label_map: Integers [B, H, W] in 0..C-1, or `ignore`.
            ignore: Label of pixels that count nowhere.

        Raises:
            ValueError: If the label map has any other label.
        """
        return losses.compute_losses(predictions, label_map, self.config, ignore=ignore)

    def count_targets(self, label_map: Tensor, *, ignore: int = 255) -> dict[str, int]:
        """Returns the divisors of the sums of `compute_losses`.

        `mask` and `dice` count masks; `class` counts queries by their weights in thousandths.
        """
        return losses.count_targets(label_map, self.num_classes, self.config, ignore=ignore)

    # Inference ------------------------------------------------------------------------------------

    def compute_scores(self, predictions: MaskPredictions) -> Tensor:
        """Returns the last layer's class scores [B, C, h, w], float32.

        A score is the sum over queries of the class's probability times the mask's.
        """
        masks, classes = predictions.masks[-1], predictions.classes[-1]
        with torch.autocast(masks.device.type, enabled=False):
            class_probabilities = promote_to_float32(classes).softmax(-1)[..., :-1]  # [B, Q, C]
            mask_probabilities = promote_to_float32(masks).sigmoid()
            return torch.einsum("bqc,bqhw->bchw", class_probabilities, mask_probabilities)

    # Parameters -----------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initializes all parameters, each from its own generator."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initializes the parameter of this name in place, as Mask2Former's release does.

        | parameter                                  | values                                      |
        |--------------------------------------------|---------------------------------------------|
        | norms; biases                              | 1, 0; 0                                     |
        | query and level embeddings                 | normal, deviation 1                         |
        | deformable attention: offsets; its weights | 0, bias in each head's own direction; 0     |
        | mask MLP and classes, with their biases    | uniform within 1 / sqrt(inputs), as torch's |
        | every other matrix and kernel              | Xavier, uniform                             |
        """
        from beit3.segmentation.mask2former import make_initial_offsets

        module_path, _, kind = name.rpartition(".")
        if is_embedding(module_path, kind):
            parameter.normal_(generator=generator)
        elif module_path.endswith("sampling_offsets") and kind == "bias":
            parameter.copy_(make_initial_offsets(self.config.num_heads))
        elif module_path.endswith(("sampling_offsets", "attention_weights")):
            parameter.zero_()
        elif module_path == "classes" or "mask_embedder" in module_path:
            linear = self.get_submodule(module_path)
            bound = 1 / math.sqrt(linear.in_features)  # type: ignore[arg-type]
            parameter.uniform_(-bound, bound, generator=generator)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            is_norm = isinstance(self.get_submodule(module_path), nn.LayerNorm | nn.GroupNorm)
            parameter.fill_(1.0 if is_norm and kind == "weight" else 0.0)


def is_embedding(module_path: str, kind: str) -> bool:
    """Whether a parameter is a query or level embedding."""
    if kind == "level_embed" or "level_embed" in module_path:
        return True
    return module_path.startswith("queries.queries_")


def check_transformers() -> None:
    """Raises ValueError if transformers is not installed or older than `MIN_TRANSFORMERS`."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = "none"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if not numbers or (int(numbers[1]), int(numbers[2])) < MIN_TRANSFORMERS:
        required = ".".join(map(str, MIN_TRANSFORMERS))
        raise ValueError(
            f"segmentation needs transformers {required} or later (installed: {installed}): "
            "pip install 'beit3[dense]'"
        )
