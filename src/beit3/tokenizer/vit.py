"""A pre-norm Vision Transformer: VQ-KD's encoder and decoder (BEiT v2), CLIP's and DINO's towers.

Images [B, C, H, W] of any multiple of the patch size become normed token states [B, 1 + P, D], the
class token first, then the patches in row-major order. The last norm works token by token, so that
BEiT v2's norm of patch tokens and CLIP's and DINO's norms are the same module.

| style | bias of keys | bias of the patch embedding | norm before the blocks | activation |
|-------|--------------|-----------------------------|------------------------|------------|
| beit  | none         | yes                         | no                     | exact GELU |
| dino  | yes          | yes                         | no                     | exact GELU |
| clip  | yes          | no                          | yes                    | quick GELU |
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True)
class ViTConfig:
    """Sizes, in pixels of the input. The pixels of a code map are its codes."""

    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    ffn_dim: int
    in_channels: int = 3
    ln_eps: float = 1e-6
    """1e-6 in BEiT v2 and DINO, 1e-5 in CLIP."""
    style: Literal["beit", "dino", "clip"] = "beit"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ViT(nn.Module):
    """Patch embedding, class token, learned positions, blocks and a final norm."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        clip = config.style == "clip"
        self.patch = nn.Conv2d(
            config.in_channels,
            config.dim,
            config.patch_size,
            stride=config.patch_size,
            bias=not clip,
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, eps=config.ln_eps) if clip else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.ln_eps)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the normed states [B, 1 + P, D] of images [B, C, H, W].

        Raises ValueError for a size that patches do not tile.
        """
        grid = compute_patch_grid(images, self.config.patch_size)
        patches = self.patch(images).flatten(2).transpose(1, 2)  # [B, P, D]
        class_token = self.class_token.expand(len(patches), -1, -1)
        states = torch.cat((class_token, patches), 1)
        states = states + resample_learned_positions(self.positions, grid)
        if self.pre_norm is not None:
            states = self.pre_norm(states)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class Block(nn.Module):
    """A pre-norm block of attention and feed-forward network, on states [B, N, D]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.attention = Attention(config.dim, config.num_heads, key_bias=config.style != "beit")
        self.norm2 = nn.LayerNorm(config.dim, eps=config.ln_eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim, quick_gelu=config.style == "clip")

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(self.norm1(states))
        return states + self.ffn(self.norm2(states))


class Attention(nn.Module):
    """Self-attention. Without `key_bias`, only queries and values have biases, of their own."""

    def __init__(self, dim: int, num_heads: int, *, key_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.query_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.value_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        bias: Tensor | None = self.qkv.bias
        if self.query_bias is not None and self.value_bias is not None:
            bias = torch.cat((self.query_bias, torch.zeros_like(self.query_bias), self.value_bias))
        qkv = F.linear(states, self.qkv.weight, bias)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, H, D/H]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, H, N, D/H]
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around GELU, or around CLIP's approximation of it with `quick_gelu`."""

    def __init__(self, dim: int, ffn_dim: int, *, quick_gelu: bool):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        states = self.fc1(states)
        if self.quick_gelu:
            states = states * torch.sigmoid(1.702 * states)
        else:
            states = F.gelu(states)
        return self.fc2(states)


def compute_patch_grid(images: Tensor, patch_size: int) -> Grid:
    """Returns the rows and columns of patches of images [B, C, H, W].

    Raises ValueError where patches do not tile the image.
    """
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"image of {height} x {width} px is not a multiple of the {patch_size} px patch: "
            "resize it"
        )
    return height // patch_size, width // patch_size


def resample_learned_positions(positions: Tensor, grid: Grid) -> Tensor:
    """Resamples positions [1, 1 + n * n, D] to a grid: [1, 1 + rows * columns, D].

    The class token's row is kept. Interpolation is bicubic by the scale (rows + 0.1) / n, as in
    DINO and BEiT v2. They add the tenth against rounding, but it also moves the sampling points,
    so the codes of 256 px images depend on it.
    """
    side = isqrt(positions.shape[1] - 1)
    if grid == (side, side):
        return positions
    table = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, n, n]
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
    patch_rows = table.flatten(2).transpose(1, 2).to(positions.dtype)  # [1, rows * columns, D]
    return torch.cat((positions[:, :1], patch_rows), 1)


def to_unit_range(images: Tensor) -> Tensor:
    """Returns images [B, 3, H, W], given as uint8 or as floats in [0, 1], as floats in [0, 1].

    Raises ValueError for values outside, beyond a thousandth for rounding: they mean that the
    images were normalized, which would give wrong codes without a sign.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {list(images.shape)}, not [batch, 3, height, width]")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give uint8, or floats in [0, 1]")
    if images.numel():
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"image values span {low:.3g} to {high:.3g}: "
                "give pixels in [0, 1], not normalized ones"
            )
    return images
