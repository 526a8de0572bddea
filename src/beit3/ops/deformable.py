"""Multi-scale deformable sampling (Deformable DETR, arXiv:2010.04159, section 4.1) in plain
PyTorch: nothing to compile.

Maps of several sizes lie one after the other in a sequence, [B, N, ...] with N the sum of their
rows times columns. Places
are x, y from 0 to 1 over a whole map, whatever its size, and always at least float32: in bfloat16
they would be off by
0.4 cells on a map of 112.
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
    """Where the cells of L maps in a sequence of N lie."""

    shapes: tuple[Shape, ...]
    centres: Tensor  # [N, 2]
    cells: Tensor  # [L, 2] width and height of one cell of each map

    @staticmethod
    def of(shapes: Sequence[Shape], like: Tensor) -> "Grids":
        """On the device of `like` and in its precision, at least float32."""
        empty = promote_to_float32(like.new_empty(0))
        levels = [_centres(shape, empty) for shape in shapes]
        # Half a cell lies before the first centre. A tensor of the shapes' numbers would make an
        # accelerator wait.
        return Grids(
            tuple(shapes), torch.cat(levels), torch.stack([2 * level[0] for level in levels])
        )


def sample_deformable(
    values: Tensor, shapes: Sequence[Shape], places: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples, per head; beyond a map's edge all is 0.

    values [B, N, H, d] of maps of `shapes`; places [B, Q, H, L, K, 2], K samples of each map;
    weights [B, Q, H, L, K].
    Returns [B, Q, H * d] in the type of `values`. Level by level, so that the samples of one map
    alone exist at a time
    where no gradient is asked for.
    """
    batch, _, heads, width = values.shape
    places = (
        promote_to_float32(places).transpose(1, 2).flatten(0, 1) * 2 - 1
    )  # [B * H, Q, L, K, 2], -1..1 as grid_sample has it
    weights = weights.to(places.dtype).transpose(1, 2).flatten(0, 1)  # [B * H, Q, L, K]
    total = torch.zeros((), dtype=places.dtype, device=values.device)
    maps = values.to(places.dtype).split([rows * columns for rows, columns in shapes], 1)
    for level, (cells, (rows, columns)) in enumerate(zip(maps, shapes, strict=True)):
        cells = cells.permute(0, 2, 3, 1).reshape(batch * heads, width, rows, columns)
        samples = F.grid_sample(
            cells, places[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        total = total + (samples * weights[:, None, :, level]).sum(-1)  # [B * H, d, Q]
    return total.view(batch, heads * width, -1).transpose(1, 2).to(values.dtype)


def _centres(shape: Shape, like: Tensor) -> Tensor:
    """[rows * columns, 2] of one map, row by row."""
    y, x = (
        (torch.arange(side, dtype=like.dtype, device=like.device) + 0.5) / side for side in shape
    )
    return torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), -1).flatten(0, 1)
