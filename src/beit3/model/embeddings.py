"""From inputs to tokens with positions, one embedding per modality.

Both published position tables start at row 2, which the released weights inherit from fairseq.
"""

import importlib

import torch
from torch import Tensor, nn

from beit3.model.config import POSITION_OFFSET, Modality, ModelConfig
from beit3.ops.positions import resample_positions


class Embedding(nn.Module):
    """Turns the input of one modality into tokens. Subclass it to add a modality.

    A subclass is built from the network's config alone and maps its input to tokens [B, n, D],
    positions included. Parameters get BEiT's initial values (normal .02, biases 0, norms 1 and 0).

    An embedding that masks calls the learned vector which replaces masked tokens `mask_token`.
    `BEiT3.find_unused_parameters` looks for this attribute: without masking it gets no gradient.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeds `values`, whose shape and dtype the subclass chooses, as tokens [B, n, D].

        `mask` is bool, True = masked. It covers what can be masked and so no class token: for
        images it is [B, P], one shorter than the n = 1 + P tokens.
        """
        raise NotImplementedError


class ImageEmbedding(Embedding):
    """Images [B, 3, H, W] -> [B, 1 + P, D]: a class token, then the patches in row-major order.

    H and W may be any multiples of the patch size: positions are resampled to the image's grid.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.grid = config.grid
        self.patch = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(
            torch.zeros(POSITION_OFFSET + 1 + config.num_patches, config.dim)
        )

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embeds images; where `mask` [B, P] is True the mask token replaces the patch embedding.

        Raises:
            ValueError: an image that patches do not tile.
        """
        size = self.patch.kernel_size[0]
        if image.shape[2] % size or image.shape[3] % size:
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} px is not a multiple of "
                f"the {size} px patch"
            )
        patches = self.patch(image)  # [B, D, h, w]
        grid = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [B, P, D]
        if mask is not None:
            tokens = torch.where(mask.bool()[..., None], self.mask_token.to(tokens.dtype), tokens)
        class_token = self.class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        tokens = torch.cat((class_token, tokens), 1)
        table = resample_positions(
            self.positions, self.grid, (grid[0], grid[1]), keep=POSITION_OFFSET + 1
        )
        return tokens + table[POSITION_OFFSET:]


class TextEmbedding(Embedding):
    """Token ids [B, L] int64 -> [B, L, D]. Masked tokens are [MASK] ids, so there is no mask."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Parameter(torch.zeros(config.text_positions, config.dim))

    def forward(  # type: ignore[override]
        self, text: Tensor, *, start: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Embeds token ids.

        Args:
            text: [B, L] int64.
            start: number of tokens of the same text that came before.
            position_ids: [L] int64, each token's place in its text; by default start, start + 1 ...

        Raises:
            ValueError: a text beyond the position table.
        """
        if position_ids is None:
            stop = start + text.shape[1]
            self.check_length(stop)
            positions = self.positions[POSITION_OFFSET + start : POSITION_OFFSET + stop]
        else:
            if not torch.compiler.is_compiling():  # reading a value would end an exported graph
                self.check_length(int(position_ids.max()) + 1)
            positions = self.positions[POSITION_OFFSET + position_ids]
        return self.tokens(text) + positions

    def check_length(self, length: int) -> None:
        """Raises a ValueError for a text of more tokens than the position table has rows for."""
        limit = len(self.positions) - POSITION_OFFSET
        if length > limit:
            raise ValueError(
                f"text of {length} tokens is beyond the {limit} that the position table holds: "
                "shorten it"
            )


def make_embedding(modality: Modality, config: ModelConfig) -> Embedding:
    """Builds the embedding of a modality from its dotted path.

    Raises:
        ValueError: a path that leads to no subclass of `Embedding`.
    """
    module, _, name = modality.embedding.rpartition(".")
    try:
        embedding_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        embedding_class = None
    if not (isinstance(embedding_class, type) and issubclass(embedding_class, Embedding)):
        raise ValueError(
            f"modality {modality.name}: {modality.embedding!r} is not the dotted path of a "
            "subclass of beit3.model.embeddings.Embedding"
        )
    return embedding_class(config)
