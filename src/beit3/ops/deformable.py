"""Multi-scale deformable sampling (Deformable DETR, arXiv:2010.04159, section 4.1) in plain
PyTorch, without a kernel to compile.

Maps of several sizes are concatenated to a sequence [B, N, ...], where N is the sum of their rows
times columns. Locations are x, y from 0 to 1 over a whole map, whatever its size, and always at
least float32: bfloat16 would be off by 0.4 cells on a map of 112.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.ops.precision import promote_to_float32

Shape = tuple[int, int]
"""Rows and columns of a map."""


@dataclass(frozen=True)
class Grids:
    """Locations of the cells of L maps that form a sequence of N cells."""

    shapes: tuple[Shape, ...]
    centers: Tensor
    """[N, 2], x and y of the center of each cell."""
    cell_sizes: Tensor
    """[L, 2], width and height of a cell of each map."""

    @staticmethod
    def from_shapes(shapes: Sequence[Shape], like: Tensor) -> "Grids":
        """Returns the grids of maps on the device of `like`, in its precision, at least float32."""
        empty = promote_to_float32(like.new_empty(0))
        map_centers = [_make_centers(shape, empty) for shape in shapes]
        # The first center lies half a cell from the corner. A tensor made of the shapes' numbers
        # would synchronize an accelerator with the CPU.
        cell_sizes = torch.stack([2 * centers[0] for centers in map_centers])
        return Grids(tuple(shapes), torch.cat(map_centers), cell_sizes)


def sample_deformable(
    values: Tensor, shapes: Sequence[Shape], locations: Tensor, weights: Tensor
) -> Tensor:
    """Returns weighted sums of bilinear samples, per head; values beyond a map's edge are 0.

    Without gradients, the samples of only one map exist at a time.

    Args:
        values: [B, N, H, d], the cells of all maps.
        shapes: Rows and columns of the maps.
        locations: [B, Q, H, L, K, 2], K samples on each map.
        weights: [B, Q, H, L, K].

    Returns:
        [B, Q, H * d] in the type of `values`.
    """
    batch_size, _, num_heads, width = values.shape
    # -1 to 1 as grid_sample takes them, [B * H, Q, L, K, 2].
    locations = promote_to_float32(locations).transpose(1, 2).flatten(0, 1) * 2 - 1
    weights = weights.to(locations.dtype).transpose(1, 2).flatten(0, 1)  # [B * H, Q, L, K]
    total = torch.zeros((), dtype=locations.dtype, device=values.device)
    maps = values.to(locations.dtype).split([rows * columns for rows, columns in shapes], 1)
    for level, (cells, (rows, columns)) in enumerate(zip(maps, shapes, strict=True)):
        feature_map = cells.permute(0, 2, 3, 1).reshape(
            batch_size * num_heads, width, rows, columns
        )
        samples = F.grid_sample(
            feature_map,
            locations[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        total = total + (samples * weights[:, None, :, level]).sum(-1)  # [B * H, d, Q]
    return total.view(batch_size, num_heads * width, -1).transpose(1, 2).to(values.dtype)


def _make_centers(shape: Shape, like: Tensor) -> Tensor:
    """Returns the centers [rows * columns, 2] of one map's cells, row by row."""
    y, x = (
        (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side for side in shape
    )
    return torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), -1).flatten(0, 1)
