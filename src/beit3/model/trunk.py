"""The image side of BEiT-3 as a trunk for detection and segmentation: pictures -> one map of features, at any size.

Only the image's experts are held, under the names they have in `BEiT3`, so its weights load here. No class token goes
through the blocks. With `window` > 0 most blocks attend within windows of that many patches a side, and `num_global` evenly
spaced ones, the last always among them, over the whole map (ViTDet, arXiv:2203.16527, section 3).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.backbone import Backbone
from beit3.model.config import IMAGE, ModelConfig
from beit3.model.embeddings import ImageEmbedding
from beit3.model.layers import Block
from beit3.model.multiway import norm


class ImageTrunk(Backbone):
    """Images [B, 3, H, W] -> features [B, h, w, D], h = H / patch and w = W / patch; H and W are multiples of the patch.

    `num_global` blocks of a windowed trunk see the whole map. `unused` names what no gradient reaches.
    """

    unused_parameters = {
        "image_embedding.class_token": "a trunk has no class token",
        "image_embedding.mask_token": "nothing is masked",
    }

    def __init__(self, config: ModelConfig, *, window: int = 0, num_global: int = 4):
        super().__init__(config)
        if window < 0 or (window and not 0 < num_global <= config.depth):
            raise ValueError(
                f"window {window} with {num_global} global blocks of {config.depth}: give a window >= 0 and 1 to all of them"
            )
        whole = global_layers(config.depth, num_global) if window else ()
        self.image_embedding = ImageEmbedding(config)
        self.blocks = nn.ModuleList(
            ImageBlock(config, layer, window=0 if layer in whole else window)
            for layer in range(config.depth)
        )
        self.norm = (
            norm(config.dim, config.norm_eps, (IMAGE,), shared=config.shared_norms)
            if config.final_norm
            else None
        )

    def embed(self, image: Tensor) -> Tensor:
        """Patches with their positions [B, h, w, D]: the first block's input."""
        size = self.config.patch_size
        return self.image_embedding(image)[:, 1:].unflatten(
            1, (image.shape[2] // size, image.shape[3] // size)
        )

    def forward(self, image: Tensor) -> Tensor:
        states = self.embed(image)
        for block in self.blocks:
            states = block(states)
        return self.finished(states)

    def finished(self, states: Tensor) -> Tensor:
        """States [B, h, w, D] through the final norm, where the config has one."""
        return states if self.norm is None else self.norm((states,), ((IMAGE, 1),))[0]


class ImageBlock(Block):
    """A block over a map [B, h, w, D], which attends within windows of `window` x `window` patches, or with 0 over all of it."""

    def __init__(self, config: ModelConfig, layer: int, *, window: int = 0):
        super().__init__(config, layer, experts=(IMAGE,))
        self.window = window

    def forward(self, states: Tensor) -> Tensor:  # type: ignore[override]
        height, width = states.shape[1:3]
        spans = ((IMAGE, height * width),)
        normed = self.norm1((states,), spans)[0]
        windows = split_windows(normed, self.window) if self.window else normed
        side, across = windows.shape[1:3]
        attended = self.attention((windows.flatten(1, 2),), ((IMAGE, side * across),))[0].unflatten(
            1, (side, across)
        )
        if self.window:
            attended = join_windows(attended, height, width)
        middle = self.add((states,), (attended,))
        return self.add(middle, self.ffn(self.norm2(middle, spans), spans))[0]


def global_layers(depth: int, count: int) -> tuple[int, ...]:
    """The layers of the global blocks: the last of each of `count` nearly equal groups, (2, 5, 8, 11) of 12."""
    return tuple((depth * (group + 1)) // count - 1 for group in range(count))


def split_windows(states: Tensor, window: int) -> Tensor:
    """[B, h, w, D] -> [B * windows, window, window, D], row by row; zeros fill up at the bottom and on the right.

    The zeros are attended to like any token, as ViTDet's are.
    """
    batch, height, width, dim = states.shape
    if height % window or width % window:
        states = F.pad(states, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = states.shape[1] // window, states.shape[2] // window
    return (
        states.view(batch, rows, window, columns, window, dim)
        .transpose(2, 3)
        .reshape(-1, window, window, dim)
    )


def join_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `split_windows` for a map of `height` x `width`: [B, h, w, D]."""
    window, dim = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    states = windows.view(-1, rows, columns, window, window, dim).transpose(2, 3)
    return states.reshape(-1, rows * window, columns * window, dim)[:, :height, :width]
