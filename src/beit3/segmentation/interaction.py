"""What trunk and spatial prior tell each other in ViT-Adapter (arXiv:2205.08534, section 3.4):
injector and extractor.

Both sides are sequences [B, N, D] of maps whose cells lie where their `Grids` say: the trunk's is
one map, the prior's are
three.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.ops.deformable import Grids, Shape, sample_deformable
from beit3.ops.precision import promote_to_float32

NORM_EPS = 1e-6
"""Of ViT-Adapter's layer norms."""


class DeformableAttention(nn.Module):
    """Each query reads `num_points` places of each of `num_maps` maps near its own, through values
    `inner` wide."""

    def __init__(self, dim: int, inner: int, *, num_heads: int, num_maps: int, num_points: int):
        super().__init__()
        self.shape = (num_heads, num_maps, num_points)
        self.offsets = nn.Linear(dim, 2 * math.prod(self.shape))
        self.weights = nn.Linear(dim, math.prod(self.shape))
        self.value = nn.Linear(dim, inner)
        self.out = nn.Linear(inner, dim)

    def forward(self, query: Tensor, places: Tensor, features: Tensor, grids: Grids) -> Tensor:
        """query [B, Q, D] at places [Q, 2], features [B, N, D] on `grids` -> [B, Q, D]."""
        offsets = self.offsets(query).unflatten(
            -1, (*self.shape, 2)
        )  # in cells, [B, Q, H, L, K, 2]; as places, in the grids' precision
        places = places[:, None, None, None] + offsets * grids.cells[:, None]
        weights = (
            promote_to_float32(self.weights(query)).unflatten(-1, (self.shape[0], -1)).softmax(-1)
        )
        values = self.value(features).unflatten(-1, (self.shape[0], -1))  # [B, N, H, d]
        return self.out(
            sample_deformable(values, grids.shapes, places, weights.unflatten(-1, self.shape[1:]))
        )

    def directions(self) -> Tensor:
        """The offsets' initial bias: head h looks h / H of the way round, its point k lies k + 1
        cells away (on a square)."""
        angles = torch.arange(self.shape[0], dtype=torch.float64, device="cpu") * (
            2 * math.pi / self.shape[0]
        )
        ways = torch.stack((angles.cos(), angles.sin()), -1)
        ways = ways / ways.abs().amax(-1, keepdim=True)  # [H, 2]
        steps = torch.arange(1, self.shape[2] + 1, dtype=torch.float64, device="cpu")
        return (ways[:, None, None] * steps[:, None]).expand(*self.shape, 2).flatten()


class Injector(nn.Module):
    """Adds to the trunk's states what they read of the prior's maps, scaled by a gate per
    channel."""

    def __init__(self, dim: int, attention: DeformableAttention):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, states: Tensor, here: Grids, priors: Tensor, there: Grids) -> Tensor:
        return states + self.gate * self.attention(
            self.query_norm(states), here.centres, self.feature_norm(priors), there
        )


class Extractor(nn.Module):
    """Adds to the prior's maps what they read of the trunk's states, then a feed-forward
    network."""

    def __init__(
        self, dim: int, attention: DeformableAttention, *, ffn_dim: int, drop_path_rate: float = 0.0
    ):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = ConvFeedForward(dim, ffn_dim)
        self.drop_path_rate = drop_path_rate

    def forward(self, priors: Tensor, here: Grids, states: Tensor, there: Grids) -> Tensor:
        priors = priors + self.attention(
            self.query_norm(priors), here.centres, self.feature_norm(states), there
        )
        change = self.ffn(self.ffn_norm(priors), here.shapes)
        if self.training and self.drop_path_rate:
            kept = 1 - self.drop_path_rate
            draws = torch.rand(len(priors), 1, 1, device=priors.device)
            change = change * ((draws < kept).to(priors.dtype) / kept)
        return priors + change


class ConvFeedForward(nn.Module):
    """Linear, a depthwise 3x3 convolution over each map with the same weights, GELU, linear: [B, N,
    D] -> [B, N, D]."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, states: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        maps = sequence_to_maps(self.fc1(states), shapes)
        return self.fc2(F.gelu(maps_to_sequence([self.conv(each) for each in maps])))


def maps_to_sequence(maps: list[Tensor]) -> Tensor:
    """Maps [B, D, h, w] one after the other, row by row: [B, N, D]."""
    return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)


def sequence_to_maps(states: Tensor, shapes: tuple[Shape, ...]) -> list[Tensor]:
    """The inverse of `maps_to_sequence`."""
    parts = states.split([rows * columns for rows, columns in shapes], 1)
    return [
        part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)
    ]
