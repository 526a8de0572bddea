"""Pretraining of a network without modality experts: images and texts share all of a block."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call

from beit3.model.config import IMAGE, TEXT
from beit3.model.layout import Parts
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer


class Tied(nn.Module):
    """One layer for all parts: the mean of the experts of images and texts.

    Both get the same gradient, so experts that begin alike stay alike. They keep their names, and
    so the weights serve every task.
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        for name in (IMAGE, TEXT):
            self.add_module(name, experts.get_submodule(name))

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:
        """Maps each part [B, n, D] by the same layer."""
        image, text = self.get_submodule(IMAGE), self.get_submodule(TEXT)
        pairs = zip(image.named_parameters(), text.parameters(), strict=True)
        mean = {name: (parameter + other) / 2 for (name, parameter), other in pairs}
        return tuple(functional_call(image, mean, (part,)) for part in parts)


class OneFFN(Pretrain):
    """`Pretrain` with `Tied` layers in place of experts. It needs `model.fusion_layers` 0."""

    records_from: ClassVar[Mapping[str, str]] = dict.fromkeys(Pretrain.sources, "pretrain")

    def __init__(self, config: PretrainConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        if config.model.fusion_layers or not config.model.shared_attention:
            raise ValueError("one FFN for all needs fusion_layers 0 and shared_attention")
        for block in self.backbone.blocks:
            block.norm2, block.ffn = Tied(block.norm2), Tied(block.ffn)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initializes as `Pretrain` does; the experts of texts begin as those of images."""
        super().init_weights(seed)
        for block in self.backbone.blocks:
            for layer in (block.norm2, block.ffn):
                layer.get_submodule(TEXT).load_state_dict(layer.get_submodule(IMAGE).state_dict())
