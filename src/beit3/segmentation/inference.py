"""Inference of one label map from class scores of windows: sliding windows, several scales,
mirrored views.

The network is a callable that takes normalized pixels [B, 3, S, S] and returns scores [B, C, h, w],
usually a quarter of a patch apart. Scores are averaged where windows overlap, and resized
bilinearly, to the view and then to the image. The best class is selected at the image's own size.
This is ViT-Adapter's evaluation, without the second softmax that mmseg applies to scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.views.segmentation import compute_evaluation_size, resize_image

ScoreFunction = Callable[[Tensor], Tensor]
"""Maps normalized pixels [B, 3, S, S] to scores [B, C, h, w]."""

MAX_PIECE_NUMEL = 1 << 26
"""Most elements of a map that is resized at once, 268 MB in float32: a few classes of a window, or
a few rows of an image."""


@dataclass(frozen=True)
class InferenceConfig:
    """Windows and views of an image that the network is given; lengths are in pixels.

    The defaults are ViT-Adapter's for ADE20K at 896.
    """

    crop: int = 896
    """Side of a window; smaller images are padded to it with zeros."""
    stride: int = 512
    """Distance between windows."""
    short: int = 896
    """The shorter side that an image is resized to, as long as the longer one stays within
    `long`."""
    long: int = 3584
    multiple: int = 32
    """Both sides are rounded up to a multiple of it."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of `short` and `long`, one for each view."""
    flip: bool = False
    """Whether every view is also evaluated mirrored."""
    windows: int = 1
    """Windows in one batch of the network."""

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.crop:
            raise ValueError(
                f"stride {self.stride} of windows of {self.crop} pixels: give 1 to {self.crop}, "
                "more leaves gaps"
            )
        if not 0 < self.short <= self.long or self.multiple < 1 or self.windows < 1:
            sizes = (
                f"short {self.short}, long {self.long}, multiple {self.multiple}, windows "
                f"{self.windows}"
            )
            raise ValueError(f"{sizes}: give 1 or more, and no short above long")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales {self.scales}: give one factor above 0 or more")

    def compute_view_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Returns height and width of an image of this size in each view."""
        return [
            compute_evaluation_size(
                height,
                width,
                short=self.short * scale,
                long=self.long * scale,
                multiple=self.multiple,
            )
            for scale in self.scales
        ]


@torch.no_grad()
def segment_image(
    image: Tensor,
    score_windows: ScoreFunction,
    config: InferenceConfig,
    *,
    normalize: Callable[[Tensor], Tensor],
) -> Tensor:
    """Returns the labels [H, W] int64 of an image: the best class of the mean over all views.

    Views are summed at the image's size, or where that is larger than every view, at the largest
    view's. So only one map [C, ...] is held in memory beside that of a view.

    Args:
        image: uint8 [3, H, W], on the device that computes.
        score_windows: The network.
        config: Windows and views.
        normalize: Converts uint8 pixels into the network's input.
    """
    image_size = image.shape[1], image.shape[2]
    view_sizes = config.compute_view_sizes(*image_size)
    total_size = min(image_size, max(view_sizes, key=count_pixels), key=count_pixels)
    total: Tensor | None = None
    for view_size in view_sizes:
        pixels = normalize(resize_image(image, *view_size))
        scores = slide_windows(pixels, score_windows, config)
        if config.flip:
            scores += slide_windows(pixels.flip(-1), score_windows, config).flip(-1)
        if total is None and view_size == total_size:
            total = scores
            continue
        if total is None:
            total = scores.new_zeros((len(scores), *total_size))
        add_resized(total, scores)
    assert total is not None
    return find_best_classes(total, *image_size)


def count_passes(height: int, width: int, config: InferenceConfig) -> int:
    """Returns how often `segment_image` calls the network for an image of this size."""
    num_batches = 0
    for view_size in config.compute_view_sizes(height, width):
        num_windows = 1
        for side in view_size:
            num_windows *= len(
                list_window_starts(max(side, config.crop), config.crop, config.stride)
            )
        num_batches += -(-num_windows // config.windows)
    return num_batches * (1 + config.flip)


def slide_windows(pixels: Tensor, score_windows: ScoreFunction, config: InferenceConfig) -> Tensor:
    """Returns the scores [C, H, W] of pixels [3, H, W], float32.

    The scores of a pixel are the mean over the windows that contain it.
    """
    crop, (height, width) = config.crop, pixels.shape[1:]
    pixels = F.pad(pixels, (0, max(0, crop - width), 0, max(0, crop - height)))
    padded_height, padded_width = pixels.shape[1:]
    tops = list_window_starts(padded_height, crop, config.stride)
    lefts = list_window_starts(padded_width, crop, config.stride)
    corners = [(top, left) for top in tops for left in lefts]
    total: Tensor | None = None
    for start in range(0, len(corners), config.windows):
        batch_corners = corners[start : start + config.windows]
        windows = [pixels[:, top : top + crop, left : left + crop] for top, left in batch_corners]
        batch_scores = score_windows(torch.stack(windows))
        if total is None:
            shape = (batch_scores.shape[1], padded_height, padded_width)
            total = pixels.new_zeros(shape, dtype=torch.float32)
        for (top, left), scores in zip(batch_corners, batch_scores, strict=True):
            add_resized(total[:, top : top + crop, left : left + crop], scores)
    assert total is not None
    row_counts = count_windows(tops, crop, padded_height)
    column_counts = count_windows(lefts, crop, padded_width)
    total /= torch.outer(row_counts, column_counts).to(total)
    return total[:, :height, :width]


def list_window_starts(side: int, crop: int, stride: int) -> list[int]:
    """Returns where windows start along a side >= `crop`: every `stride`, the last moved inside."""
    return [*range(0, side - crop, stride), side - crop]


def count_windows(starts: list[int], crop: int, side: int) -> Tensor:
    """Returns how many windows contain each position of a side, [side]."""
    counts = torch.zeros(side)
    for start in starts:
        counts[start : start + crop] += 1
    return counts


def add_resized(total: Tensor, scores: Tensor) -> None:
    """Adds scores [C, h, w], resized, to `total` [C, H, W] in place, a few classes at a time."""
    size = total.shape[1:]
    num_classes = max(1, MAX_PIECE_NUMEL // count_pixels(size))
    for start in range(0, len(total), num_classes):
        piece = scores[None, start : start + num_classes].float()
        total[start : start + num_classes] += F.interpolate(
            piece, size=size, mode="bilinear", align_corners=False
        )[0]


def find_best_classes(scores: Tensor, height: int, width: int) -> Tensor:
    """Returns the best class [height, width] int64 of scores [C, h, w] resized to that size.

    The scores are resized a few rows at a time, to save memory.
    """
    if scores.shape[1:] == (height, width):
        return scores.argmax(0)
    num_rows = max(1, MAX_PIECE_NUMEL // (len(scores) * width))
    last_row = scores.shape[1] - 1
    centers = torch.arange(height, device=scores.device) + 0.5
    positions = (centers * scores.shape[1] / height - 0.5).clamp(0, last_row)
    labels = []
    for row_positions in positions.split(num_rows):
        above = row_positions.long()
        below = (above + 1).clamp(max=last_row)
        fractions = (row_positions - above)[:, None]
        rows = torch.lerp(scores[:, above], scores[:, below], fractions)  # [C, rows, w]
        resized = F.interpolate(
            rows[None], size=(len(row_positions), width), mode="bilinear", align_corners=False
        )
        labels.append(resized[0].argmax(0))
    return torch.cat(labels)


def count_pixels(size: Sequence[int]) -> int:
    """Returns the number of pixels of a height and a width."""
    return size[0] * size[1]
