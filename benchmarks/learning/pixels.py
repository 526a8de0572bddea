"""Pretraining that regresses the pixels of masked patches instead of predicting codes."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.ops.precision import promote_to_float32
from beit3.task import Batch
from beit3.tasks.pretrain import MaskedLosses, Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer


class Pixels(Pretrain):
    """`Pretrain` with MAE's target: each patch's pixels, normalized by their mean and deviation."""

    records_from: ClassVar[Mapping[str, str]] = dict.fromkeys(Pretrain.sources, "pretrain")

    def __init__(self, config: PretrainConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.image_head = nn.Linear(config.model.dim, 3 * config.model.patch_size**2)

    def compute_masked_losses(
        self, batch: Batch, *, with_visible: bool = False
    ) -> Iterator[MaskedLosses]:
        """Yields the mean squared error of each masked patch; "correct" is below 1, the error of
        the patch's own mean. Texts are those of `Pretrain`."""
        if "image_mask" in batch:
            mask = batch["image_mask"].bool()
            states = self.encode(batch).of("image")[:, 1:][mask]  # [M, D]
            targets = self.compute_pixels(self.normalize_images(batch))[mask]
            losses = (promote_to_float32(self.image_head(states)) - targets).square().mean(-1)
            yield MaskedLosses("image", losses, losses < 1, mask)
        texts = {name: value for name, value in batch.items() if name != "image_mask"}
        yield from super().compute_masked_losses(texts)

    def compute_pixels(self, images: Tensor) -> Tensor:
        """Returns the normalized pixels [B, P, 3 * patch²] of images [B, 3, H, W]."""
        side = self.config.model.patch_size
        pixels = F.unfold(images, side, stride=side).transpose(1, 2)
        deviation = torch.sqrt(pixels.var(-1, keepdim=True) + 1e-6)
        return (pixels - pixels.mean(-1, keepdim=True)) / deviation
