"""Position tables and patch embeddings of images at other sizes than they were learnt at."""

import torch
import torch.nn.functional as F
from torch import Tensor, cat


def resample_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], *, keep: int
) -> Tensor:
    """A table [keep + old rows * columns, D] for the grid `new`, any rectangle; the first `keep`
    rows are kept.

    Bicubic, corners not aligned, no antialiasing, computed in float32: the release's rule for its
    image table, whose
    first three rows are two dead ones and the class token's. Equal grids return the table itself.
    """
    if old == new:
        return table
    if table.shape[0] != keep + old[0] * old[1]:
        raise ValueError(
            f"position table has {table.shape[0]} rows, not {keep} + {old[0]} x {old[1]}"
        )
    grid = table[keep:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return cat(
        (table[:keep], grid.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype))
    )


def resample_patches(kernel: Tensor, size: int) -> Tensor:
    """A patch embedding's kernel [D, C, p, p] for patches of `size` pixels: [D, C, size, size].

    A patch made larger by bicubic interpolation then gives what the patch gave before, exactly
    (FlexiViT, arXiv:2212.08013,
    section 3.4); of smaller ones it is the least squares' answer. Computed in float64.
    """
    old = kernel.shape[-1]
    if old == size:
        return kernel
    pixels = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    grown = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False).flatten(
        1
    )  # [p * p, size * size]
    resampled = kernel.double().flatten(2) @ torch.linalg.pinv(grown).T.to(kernel.device)
    return resampled.unflatten(2, (size, size)).to(kernel.dtype)
