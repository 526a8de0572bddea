"""Inputs to tokens with positions. Both tables start at row 2 (an inheritance of the release, kept for its weights)."""

import torch
from torch import Tensor, nn

from beit3.model.config import POSITION_OFFSET, ModelConfig
from beit3.ops.positions import resample_positions


class ImageEmbedding(nn.Module):
    """Images [B, 3, H, W] -> [B, 1 + P, D]: class token, then patches in row-major order.

    H and W may be any multiples of the patch size: the position table is resampled to another grid on the fly.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.grid = config.grid
        self.patch = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(
            torch.zeros(POSITION_OFFSET + 1 + config.num_patches, config.dim)
        )

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` [B, P] bool: True replaces a patch's embedding by the mask token, before positions are added."""
        size = self.patch.kernel_size[0]
        if image.shape[2] % size or image.shape[3] % size:
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} px is not a multiple of the {size} px patch"
            )
        patches = self.patch(image)  # [B, D, h, w]
        grid = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        if mask is not None:
            tokens = torch.where(mask.bool()[..., None], self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat(
            (self.class_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens), 1
        )
        table = resample_positions(
            self.positions, self.grid, (grid[0], grid[1]), keep=POSITION_OFFSET + 1
        )
        return tokens + table[POSITION_OFFSET:]


class TextEmbedding(nn.Module):
    """Token ids [B, L] -> [B, L, D]; padded tokens enter the first layer as zeros."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Parameter(torch.zeros(config.text_positions, config.dim))

    def forward(
        self,
        text: Tensor,
        padding: Tensor | None = None,
        *,
        start: int = 0,
        places: Tensor | None = None,
    ) -> Tensor:
        """`padding` [B, L] bool, True = padding. `start`: tokens that came before; or each token's place [L] int64."""
        if places is None:
            stop = start + text.shape[1]
            self.check(stop)
            positions = self.positions[POSITION_OFFSET + start : POSITION_OFFSET + stop]
        else:
            self.check(int(places.max()) + 1)
            positions = self.positions[POSITION_OFFSET + places]
        states = self.tokens(text) + positions
        return states if padding is None else states * ~padding[..., None]

    def check(self, stop: int) -> None:
        """ValueError for a text beyond the table."""
        limit = len(self.positions) - POSITION_OFFSET
        if stop > limit:
            raise ValueError(
                f"text of {stop} tokens is beyond the {limit} that the position table holds: shorten it"
            )
