"""The frozen teachers whose patch features the visual tokenizer learns to predict.

BEiT v2, section 3.1. A teacher turns images [B, 3, H, W], uint8 or floats in [0, 1], into float32
features [B, P, F] on the tokenizer's grid of patches, in row-major order. `teacher_loading` lists
the teachers, each of which has a module of its own beside this one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from beit3.tokenizer.vit import compute_patch_grid


class Teacher(nn.Module):
    """A frozen network that is always in evaluation mode."""

    dim: int
    """Channels F of the features."""

    def extract_features(self, images: Tensor) -> Tensor:
        """Returns the features [B, P, F] of images, without gradient."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)


def resize_to_patch_size(pixels: Tensor, patch_size: int, new_patch_size: int) -> Tensor:
    """Resizes images so that patches of a new size make the same grid as those of `patch_size`."""
    if new_patch_size == patch_size:
        return pixels
    rows, columns = compute_patch_grid(pixels, patch_size)
    size = (rows * new_patch_size, columns * new_patch_size)
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
