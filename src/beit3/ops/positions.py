"""Resamples position tables and patch embeddings to other sizes than they were trained at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.ops.symbolic import is_symbolic


def resample_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, keep: int
) -> Tensor:
    """Returns a position table for another grid: [keep + new rows * columns, D].

    Interpolation is bicubic in float32, with corners not aligned and without antialiasing: the
    release's rule for its image table, whose first three rows are two unused ones and the class
    token's. Equal grids return the table itself. A graph that is exported for any size always
    interpolates, which leaves a table of an equal grid as it is.

    Args:
        table: [keep + old rows * columns, D].
        old: Rows and columns of the table.
        new: Rows and columns of the result, any rectangle.
        keep: Leading rows that are not positions and stay as they are.
    """
    if not is_symbolic(new) and old == new:
        return table
    if table.shape[0] != keep + old[0] * old[1]:
        raise ValueError(
            f"position table has {table.shape[0]} rows, not {keep} + {old[0]} x {old[1]}"
        )
    grid = table[keep:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    rows = grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return torch.cat((table[:keep], rows))


def resample_patches(kernel: Tensor, size: int) -> Tensor:
    """Returns a patch embedding's kernel [D, C, p, p] for patches of `size` pixels, [D, C, size,
    size].

    A patch that is enlarged by bicubic interpolation then gives exactly the output that it gave
    before (FlexiViT, arXiv:2212.08013, section 3.4); for smaller patches the kernel is the least
    squares solution. Computed in float64.
    """
    old_size = kernel.shape[-1]
    if old_size == size:
        return kernel
    pixels = torch.eye(old_size * old_size, dtype=torch.float64).view(-1, 1, old_size, old_size)
    resized = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    resize_matrix = resized.flatten(1)  # [p * p, size * size]
    inverse = torch.linalg.pinv(resize_matrix).T.to(kernel.device)
    resampled = kernel.double().flatten(2) @ inverse
    return resampled.unflatten(2, (size, size)).to(kernel.dtype)
