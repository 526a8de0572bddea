"""From class scores of windows to one label map: sliding windows, several scales, mirrored views.

The network is a callable: pixels [B, 3, S, S], normalised -> scores [B, C, h, w], usually a quarter
of a patch apart. Scores
of windows are averaged where these overlap, and resized bilinearly, to the view and then to the
image; the best class is
taken at the image's own size (ViT-Adapter's evaluation, without the second softmax that mmseg takes
of scores).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.views.segmentation import compute_evaluation_size, resize_image

Scores = Callable[[Tensor], Tensor]

PIECE = 1 << 26
"""Numbers that a resized piece has at most, 268 MB in float32: a few classes of a window, a few
rows of an image."""


@dataclass(frozen=True)
class InferenceConfig:
    """What of an image the network is shown, in pixels. The defaults are ViT-Adapter's for ADE20K
    at 896."""

    crop: int = 896
    """Side of a window; smaller images are padded to it with zeros."""
    stride: int = 512
    short: int = 896
    """The shorter side that an image is resized to, as long as the longer one stays within
    `long`."""
    long: int = 3584
    multiple: int = 32
    """Both sides are rounded up to it."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of `short` and `long`: a view each."""
    flip: bool = False
    """Whether every view is also seen mirrored."""
    windows: int = 1
    """That go through the network at once."""

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


@torch.no_grad()
def segment_image(
    image: Tensor, scores: Scores, views: InferenceConfig, *, normalize: Callable[[Tensor], Tensor]
) -> Tensor:
    """uint8 [3, H, W], on the device that computes -> labels [H, W] int64, the best class of the
    mean over all views.

    `normalize` makes the network's pixels of uint8. Views are added up at the image's size, or
    where that is larger than
    every view, at the largest view's, so that one map [C, ...] is held beside that of a view.
    """
    shape = image.shape[1], image.shape[2]
    sizes = [
        compute_evaluation_size(
            *shape, short=views.short * each, long=views.long * each, multiple=views.multiple
        )
        for each in views.scales
    ]
    canvas = min(shape, max(sizes, key=area), key=area)
    total: Tensor | None = None
    for size in sizes:
        pixels = normalize(resize_image(image, *size))
        found = slide_windows(pixels, scores, views)
        if views.flip:
            found += slide_windows(pixels.flip(-1), scores, views).flip(-1)
        if total is None and size == canvas:
            total = found
            continue
        if total is None:
            total = found.new_zeros((len(found), *canvas))
        add_resized(total, found)
    assert total is not None
    return best(total, *shape)


def count_passes(height: int, width: int, views: InferenceConfig) -> int:
    """How often `segment` calls the network for an image of this size."""
    count = 0
    for each in views.scales:
        size = compute_evaluation_size(
            height, width, short=views.short * each, long=views.long * each, multiple=views.multiple
        )
        tops, lefts = (
            len(window_starts(max(side, views.crop), views.crop, views.stride)) for side in size
        )
        count += -(-tops * lefts // views.windows)
    return count * (1 + views.flip)


def slide_windows(pixels: Tensor, scores: Scores, views: InferenceConfig) -> Tensor:
    """[3, H, W] -> mean scores [C, H, W], float32, over the windows that see a place."""
    crop, (height, width) = views.crop, pixels.shape[1:]
    pixels = F.pad(pixels, (0, max(0, crop - width), 0, max(0, crop - height)))
    tops, lefts = (window_starts(side, crop, views.stride) for side in pixels.shape[1:])
    corners = [(top, left) for top in tops for left in lefts]
    total: Tensor | None = None
    for first in range(0, len(corners), views.windows):
        some = corners[first : first + views.windows]
        found = scores(
            torch.stack([pixels[:, top : top + crop, left : left + crop] for top, left in some])
        )
        if total is None:
            total = pixels.new_zeros((found.shape[1], *pixels.shape[1:]), dtype=torch.float32)
        for (top, left), each in zip(some, found, strict=True):
            add_resized(total[:, top : top + crop, left : left + crop], each)
    assert total is not None
    rows, columns = (
        seen(begins, crop, side)
        for begins, side in zip((tops, lefts), pixels.shape[1:], strict=True)
    )
    total /= torch.outer(rows, columns).to(total)
    return total[:, :height, :width]


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along a side >= `crop`: every `stride`, and the last moved inside."""
    return [*range(0, side - crop, stride), side - crop]


def seen(begins: list[int], crop: int, side: int) -> Tensor:
    """How many windows see each place of a side."""
    counts = torch.zeros(side)
    for begin in begins:
        counts[begin : begin + crop] += 1
    return counts


def add_resized(total: Tensor, scores: Tensor) -> None:
    """Add scores [C, h, w] to `total` [C, H, W], in place and a few classes at a time."""
    size = total.shape[1:]
    count = max(1, PIECE // area(size))
    for first in range(0, len(total), count):
        some = scores[None, first : first + count].float()
        total[first : first + count] += F.interpolate(
            some, size=size, mode="bilinear", align_corners=False
        )[0]


def best(scores: Tensor, height: int, width: int) -> Tensor:
    """The best class of scores [C, h, w] at another size: labels [height, width] int64, a few rows
    at a time."""
    if scores.shape[1:] == (height, width):
        return scores.argmax(0)
    rows = max(1, PIECE // (len(scores) * width))
    last = scores.shape[1] - 1
    position = (
        (torch.arange(height, device=scores.device) + 0.5) * scores.shape[1] / height - 0.5
    ).clamp(0, last)
    labels = []
    for some in position.split(rows):
        above = some.long()
        between = torch.lerp(
            scores[:, above], scores[:, (above + 1).clamp(max=last)], (some - above)[:, None]
        )  # [C, rows, w]
        labels.append(
            F.interpolate(
                between[None], size=(len(some), width), mode="bilinear", align_corners=False
            )[0].argmax(0)
        )
    return torch.cat(labels)


def area(size: Sequence[int]) -> int:
    """Pixels of a height and a width."""
    return size[0] * size[1]
