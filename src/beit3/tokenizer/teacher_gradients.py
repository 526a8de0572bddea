"""The teacher of hand-made features, which needs no weights and is the default of small recipes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.teacher import Teacher
from beit3.tokenizer.vit import compute_patch_grid, to_unit_range


class Gradients(Teacher):
    """Hand-made features of 2 x 2 cells per patch: mean colors and edge directions.

    Edge directions are histograms of 8 bins, as in HOG. Colors and edges each have at most unit
    length, so both count in a cosine. A small constant keeps a flat gray patch defined.
    """

    num_orientations = 8
    constant = 0.25
    softening = 0.05
    """Edges of this strength per patch count half. Patches below it are flat, and their noise must
    not be amplified."""

    def __init__(self, patch_size: int):
        super().__init__()
        if patch_size < 4 or patch_size % 2:
            raise ValueError(
                f"patch_size {patch_size} has no 2 x 2 cells: "
                "the gradients teacher needs an even one"
            )
        self.patch_size = patch_size
        self.dim = 4 * 3 + 4 * self.num_orientations + 1

    @torch.no_grad()
    def extract_features(self, images: Tensor) -> Tensor:
        pixels = to_unit_range(images)
        compute_patch_grid(pixels, self.patch_size)  # refuses images that patches do not tile
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            colors = self._average_cells(pixels - 0.5) / math.sqrt(3)  # 12 values within +-0.5
            edges = self._average_cells(self._compute_edges(pixels.mean(1)))
            edges = edges / (edges.norm(dim=2, keepdim=True) + self.softening)
            constant = colors.new_full((*colors.shape[:2], 1), self.constant)
            return torch.cat((colors, edges, constant), 2)

    def _compute_edges(self, gray: Tensor) -> Tensor:
        """Returns the edge strength [B, 8, H, W] per direction of gray images [B, H, W].

        Each pixel's strength is divided between the two nearest directions.
        """
        padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        dx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        dy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        angle = torch.atan2(dy, dx) * (self.num_orientations / math.pi)  # 180 degrees are 8
        bins = torch.arange(self.num_orientations, device=gray.device).view(1, -1, 1, 1)
        offset = (angle[:, None] - bins).remainder(self.num_orientations)
        distance = torch.minimum(offset, self.num_orientations - offset)
        return (1 - distance).clamp_min(0) * torch.hypot(dx, dy)[:, None]

    def _average_cells(self, maps: Tensor) -> Tensor:
        """Returns the means [B, P, C * 4] over the cells of maps [B, C, H, W]."""
        means = F.avg_pool2d(maps, self.patch_size // 2)
        return F.unfold(means, 2, stride=2).transpose(1, 2)
