"""Injector and extractor of ViT-Adapter (arXiv:2205.08534, section 3.4), which exchange features
between the trunk and the spatial prior.

Both sides are sequences [B, N, D] of the cells of maps, located by their `Grids`: the trunk's is
one map, the prior's are three.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.ops.deformable import Grids, Shape, sample_deformable
from beit3.ops.precision import promote_to_float32

NORM_EPS = 1e-6
"""Epsilon of ViT-Adapter's layer norms."""


class DeformableAttention(nn.Module):
    """Lets each query read `num_points` locations near its own on each of `num_maps` maps.

    Values are `inner` wide.
    """

    def __init__(self, dim: int, inner: int, *, num_heads: int, num_maps: int, num_points: int):
        super().__init__()
        self.shape = (num_heads, num_maps, num_points)
        self.offsets = nn.Linear(dim, 2 * math.prod(self.shape))
        self.weights = nn.Linear(dim, math.prod(self.shape))
        self.value = nn.Linear(dim, inner)
        self.out = nn.Linear(inner, dim)

    def forward(self, query: Tensor, locations: Tensor, features: Tensor, grids: Grids) -> Tensor:
        """Attends from each query to features around its location.

        Args:
            query: [B, Q, D].
            locations: [Q, 2], x and y from 0 to 1.
            features: [B, N, D], the cells of `grids`.
            grids: Where the features lie.

        Returns:
            [B, Q, D].
        """
        num_heads = self.shape[0]
        # Offsets are in cells, [B, Q, H, L, K, 2]; locations keep the precision of the grids.
        offsets = self.offsets(query).unflatten(-1, (*self.shape, 2))
        sampling_locations = locations[:, None, None, None] + offsets * grids.cell_sizes[:, None]
        logits = promote_to_float32(self.weights(query)).unflatten(-1, (num_heads, -1))
        weights = logits.softmax(-1).unflatten(-1, self.shape[1:])  # [B, Q, H, L, K]
        values = self.value(features).unflatten(-1, (num_heads, -1))  # [B, N, H, d]
        return self.out(sample_deformable(values, grids.shapes, sampling_locations, weights))

    def make_initial_offsets(self) -> Tensor:
        """Returns the initial bias of the offsets.

        Head h looks in the direction h / H of a full turn, and its point k lies k + 1 cells away,
        measured on a square.
        """
        num_heads, _, num_points = self.shape
        head_indices = torch.arange(num_heads, dtype=torch.float64, device="cpu")
        angles = head_indices * (2 * math.pi / num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # [H, 2]
        distances = torch.arange(1, num_points + 1, dtype=torch.float64, device="cpu")
        offsets = directions[:, None, None] * distances[:, None]
        return offsets.expand(*self.shape, 2).flatten()


class Injector(nn.Module):
    """Adds features read from the prior's maps to the trunk's states, scaled by a gate per
    channel."""

    def __init__(self, dim: int, attention: DeformableAttention):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feature_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(
        self, states: Tensor, trunk_grids: Grids, priors: Tensor, prior_grids: Grids
    ) -> Tensor:
        return states + self.gate * self.attention(
            self.query_norm(states), trunk_grids.centers, self.feature_norm(priors), prior_grids
        )


class Extractor(nn.Module):
    """Adds features read from the trunk's states to the prior's maps, then applies a feed-forward
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

    def forward(
        self, priors: Tensor, prior_grids: Grids, states: Tensor, trunk_grids: Grids
    ) -> Tensor:
        priors = priors + self.attention(
            self.query_norm(priors), prior_grids.centers, self.feature_norm(states), trunk_grids
        )
        residual = self.ffn(self.ffn_norm(priors), prior_grids.shapes)
        if self.training and self.drop_path_rate:
            keep_rate = 1 - self.drop_path_rate
            uniform = torch.rand(len(priors), 1, 1, device=priors.device)
            residual = residual * ((uniform < keep_rate).to(priors.dtype) / keep_rate)
        return priors + residual


class ConvFeedForward(nn.Module):
    """Feed-forward network with a depthwise 3x3 convolution, [B, N, D] -> [B, N, D].

    Linear, the convolution over each map with the same weights, GELU, linear.
    """

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.fc2 = nn.Linear(inner, dim)

    def forward(self, states: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
        maps = sequence_to_maps(self.fc1(states), shapes)
        return self.fc2(F.gelu(maps_to_sequence([self.conv(feature_map) for feature_map in maps])))


def maps_to_sequence(maps: list[Tensor]) -> Tensor:
    """Flattens maps [B, D, h, w] row by row into one sequence [B, N, D]."""
    return torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], 1)


def sequence_to_maps(states: Tensor, shapes: tuple[Shape, ...]) -> list[Tensor]:
    """Splits a sequence [B, N, D] into maps [B, D, h, w]; the inverse of `maps_to_sequence`."""
    sequences = states.split([rows * columns for rows, columns in shapes], 1)
    return [
        sequence.transpose(1, 2).unflatten(2, shape)
        for sequence, shape in zip(sequences, shapes, strict=True)
    ]
