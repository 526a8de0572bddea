"""The image side of BEiT-3 as a trunk for detection and segmentation: images to one feature map.

The trunk holds only the image's experts, under the names they have in `BEiT3`, so its weights load
here. No class token enters the blocks. With `window` > 0 most blocks attend within windows of that
many patches a side; `num_global` evenly spaced blocks, the last always among them, attend over the
whole map (ViTDet, arXiv:2203.16527, section 3).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model.backbone import MultiwayBackbone
from beit3.model.config import IMAGE, ModelConfig
from beit3.model.embeddings import ImageEmbedding
from beit3.model.layers import Block
from beit3.model.layout import Layout
from beit3.model.multiway import make_norm
from beit3.ops.symbolic import is_symbolic


class ImageTrunk(MultiwayBackbone):
    """Images [B, 3, H, W] -> features [B, h, w, D] with h = H / patch and w = W / patch."""

    unused_parameters = {
        "image_embedding.class_token": "a trunk has no class token",
        "image_embedding.mask_token": "nothing is masked",
    }
    """Parameters without a gradient, each with the reason."""

    def __init__(self, config: ModelConfig, *, window: int = 0, num_global: int = 4):
        """Builds the trunk.

        Args:
            config: of the network whose weights are loaded.
            window: patches a side of an attention window; 0: all blocks attend globally.
            num_global: number of blocks of a windowed trunk that attend globally.
        """
        super().__init__(config)
        if window < 0 or (window and not 0 < num_global <= config.depth):
            raise ValueError(
                f"window {window} with {num_global} global blocks of {config.depth}: "
                "give a window >= 0 and 1 to all of them"
            )
        global_layers = space_global_layers(config.depth, num_global)
        self.image_embedding = ImageEmbedding(config)
        self.blocks = nn.ModuleList(
            ImageBlock(config, layer, window=0 if layer in global_layers else window)
            for layer in range(config.depth)
        )
        self.norm = (
            make_norm(config.dim, config.norm_eps, (IMAGE,), shared=config.shared_norms)
            if config.final_norm
            else None
        )

    def embed(self, image: Tensor) -> Tensor:
        """Returns the first block's input [B, h, w, D]: patches with their positions."""
        size = self.config.patch_size
        grid = (image.shape[2] // size, image.shape[3] // size)
        return self.image_embedding(image)[:, 1:].unflatten(1, grid)

    def forward(self, image: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] to features [B, h, w, D]."""
        states = self.embed(image)
        for block in self.blocks:
            states = block(states)
        return self.apply_final_norm(states)

    def apply_final_norm(self, states: Tensor) -> Tensor:
        """Norms states [B, h, w, D] where the config has a final norm, else returns them."""
        return states if self.norm is None else self.norm((states,), (IMAGE,))[0]


class ImageBlock(Block):
    """A block over a feature map [B, h, w, D] that attends within windows or globally."""

    def __init__(self, config: ModelConfig, layer: int, *, window: int = 0):
        """`window`: patches a side of an attention window; 0: the whole map."""
        super().__init__(config, layer, experts=(IMAGE,))
        self.window = window

    def forward(self, states: Tensor) -> Tensor:  # type: ignore[override]
        """Maps [B, h, w, D] -> [B, h, w, D]."""
        height, width = states.shape[1:3]
        normed = self.norm1((states,), (IMAGE,))[0]
        windows = split_windows(normed, self.window) if self.window else normed
        rows, columns = windows.shape[1:3]
        window_layout = make_image_layout(rows * columns)
        attended = self.attention((windows.flatten(1, 2),), window_layout)[0]
        attended = attended.unflatten(1, (rows, columns))
        if self.window:
            attended = join_windows(attended, height, width)
        layout = make_image_layout(height * width)
        parts = self.add((states,), (attended,), layout)
        return self.add(parts, self.ffn(self.norm2(parts, (IMAGE,)), (IMAGE,)), layout)[0]


def make_image_layout(num_tokens: int) -> Layout:
    """Returns the layout of a sequence of image tokens alone."""
    spans = ((IMAGE, num_tokens),)
    return Layout(spans, spans)


def space_global_layers(depth: int, count: int) -> tuple[int, ...]:
    """Returns `count` evenly spaced layers, the last one included: (2, 5, 8, 11) of 12."""
    return tuple((depth * (group + 1)) // count - 1 for group in range(count))


def split_windows(states: Tensor, window: int) -> Tensor:
    """Splits a map [B, h, w, D] into [B * windows, window, window, D], row by row.

    Zeros fill up incomplete windows at the bottom and on the right. As in ViTDet, they are attended
    to like any token.
    """
    batch, height, width, dim = states.shape
    if is_symbolic((height, width)) or height % window or width % window:
        states = F.pad(states, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = states.shape[1] // window, states.shape[2] // window
    states = states.view(batch, rows, window, columns, window, dim).transpose(2, 3)
    return states.reshape(-1, window, window, dim)


def join_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Joins windows to a map [B, height, width, D]; the inverse of `split_windows`."""
    window, dim = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    states = windows.view(-1, rows, columns, window, window, dim).transpose(2, 3)
    return states.reshape(-1, rows * window, columns * window, dim)[:, :height, :width]
