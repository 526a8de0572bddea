"""Mask2Former's losses for label maps: queries matched to the classes of an image, masks compared
at sampled places.

As in the original (arXiv:2112.01527, section 3.3), with three differences. Ignored pixels count
nowhere: not in the
matching, nor in either loss of masks; there they are background. Places within half a pixel of the
rim take the nearest
pixel's values; there masks fade to logits of 0. And a mask is read from the label map where it is
sampled, so that no mask of
the size of the image is ever made. Every loss is a sum, with a count that the labels alone decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.ops.precision import promote_to_float32
from beit3.segmentation.config import HeadConfig

UNIT = 1000
"""Weights of the class loss are counted in thousandths, because counts are whole numbers."""


@dataclass(frozen=True)
class MaskPredictions:
    """What the queries say before the first layer and after each, the last at the end."""

    masks: tuple[Tensor, ...]
    """Logits [B, Q, h, w]."""
    classes: tuple[Tensor, ...]
    """Logits [B, Q, C + 1], the last "no object"."""


@dataclass(frozen=True)
class Matches:
    """Queries and the classes they stand for, of all images in one row; each [M] int64."""

    image: Tensor
    query: Tensor
    label: Tensor


def set_losses(
    predicted: MaskPredictions, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> dict[str, Tensor]:
    """Sums of `mask`, `dice` and `class` over what `counts` counts, each the mean over layers;
    float32, under autocast too."""
    found = present(label_map, predicted.classes[-1].shape[-1] - 1, ignore)
    label_map = label_map.long()
    sums = []
    with torch.autocast(label_map.device.type, enabled=False):
        for masks, classes in zip(predicted.masks, predicted.classes, strict=True):
            masks, classes = promote_to_float32(masks), promote_to_float32(classes)
            matches = match(masks, classes, label_map, found, config, ignore=ignore)
            sums.append(
                (
                    *mask_losses(masks, matches, label_map, config, ignore=ignore),
                    class_loss(classes, matches, config),
                )
            )
    return {
        name: torch.stack(layers).mean()
        for name, layers in zip(("mask", "dice", "class"), zip(*sums, strict=True), strict=True)
    }


def counts(
    label_map: Tensor, num_classes: int, config: HeadConfig, *, ignore: int
) -> dict[str, int]:
    """Masks that are matched, for both losses of masks; and all queries' weights, in
    thousandths."""
    matched = sum(
        min(len(each), config.num_queries) for each in present(label_map, num_classes, ignore)
    )
    others = len(label_map) * config.num_queries - matched
    return {"mask": matched, "dice": matched, "class": matched * UNIT + others * no_object(config)}


def no_object(config: HeadConfig) -> int:
    """The weight of "no object" in thousandths, at least one of them."""
    return max(1, round(config.no_object_weight * UNIT))


def present(label_map: Tensor, num_classes: int, ignore: int) -> list[Tensor]:
    """The classes of each image [n], ascending. ValueError for labels that are neither a class nor
    ignored."""
    if 0 <= ignore < num_classes:
        raise ValueError(
            f"the label {ignore} for ignored pixels is one of the {num_classes} classes: give "
            "another"
        )
    found = []
    for image in label_map:
        labels = image.unique().long()
        labels = labels[labels != ignore]
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"label {int(wrong[0])} is none of the {num_classes} classes, nor {ignore} for "
                "ignored: check num_classes"
            )
        found.append(labels)
    return found


# Matching -----------------------------------------------------------------------------------------


@torch.no_grad()
def match(
    masks: Tensor,
    classes: Tensor,
    label_map: Tensor,
    found: Sequence[Tensor],
    config: HeadConfig,
    *,
    ignore: int,
) -> Matches:
    """The cheapest queries for the classes of each image; of more classes than queries some stay
    without."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for index, labels in enumerate(found):
        points = draw((config.num_points,), masks)
        truth, valid = read(label_map[index], points, labels, ignore)
        cost = costs(
            sampled(masks[index][None], points)[0],
            classes[index],
            labels,
            truth.to(masks),
            valid.to(masks),
            config,
        )
        queries, columns = assign(cost)
        rows.append((torch.full_like(queries, index), queries, labels[columns.to(labels.device)]))
    image, query, label = (
        torch.cat([each.to(masks.device) for each in column]) for column in zip(*rows, strict=True)
    )
    return Matches(image, query, label)


def costs(
    logits: Tensor,
    classes: Tensor,
    labels: Tensor,
    truth: Tensor,
    valid: Tensor,
    config: HeadConfig,
) -> Tensor:
    """What it would cost if query q stood for class n: logits [Q, P], classes [Q, C + 1], truth [n,
    P], valid [P] -> [Q, n]."""
    probabilities = logits.sigmoid()
    crossed = F.softplus(-logits) @ truth.T + F.softplus(logits) @ (valid - truth).T
    overlap = 2 * probabilities @ truth.T + 1
    total = (probabilities @ valid)[:, None] + truth.sum(1) + 1
    cost = config.mask_weight * crossed / at_least_some(valid.sum()) + config.dice_weight * (
        1 - overlap / total
    )
    return cost - config.class_weight * classes.softmax(-1)[:, labels]


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [min(Q, n)] of the cheapest assignment of a matrix [Q, n]; what is not
    finite is chosen last."""
    from scipy.optimize import linear_sum_assignment

    most = torch.finfo(torch.float32).max
    rows, columns = linear_sum_assignment(cost.float().nan_to_num(most, most, most).cpu().numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


# Losses -------------------------------------------------------------------------------------------


def mask_losses(
    masks: Tensor, matches: Matches, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, averaged over the places of a mask, and dice, both summed over the matched
    masks."""
    chosen = masks[matches.image, matches.query][:, None]  # [M, 1, h, w]
    points = places(chosen.detach(), matches, label_map, config, ignore=ignore)  # [M, K, 2]
    truth, valid = (
        each.to(masks) for each in read(label_map, points, matches.label, ignore, matches.image)
    )
    logits = sampled(chosen, points)[:, 0]  # [M, K]
    crossed = truth * F.softplus(-logits) + (valid - truth) * F.softplus(logits)
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities * truth).sum(1) + 1) / (
        (probabilities * valid).sum(1) + truth.sum(1) + 1
    )
    return (crossed.sum(1) / at_least_some(valid.sum(1))).sum(), dice.sum()


def class_loss(classes: Tensor, matches: Matches, config: HeadConfig) -> Tensor:
    """Cross-entropy of all queries, those without a mask towards "no object", summed with weights
    in thousandths."""
    weight = torch.full(classes.shape[-1:], float(UNIT), device=classes.device, dtype=classes.dtype)
    weight[-1] = no_object(config)
    target = torch.full(classes.shape[:2], classes.shape[-1] - 1, device=classes.device)
    target[matches.image, matches.query] = matches.label
    return F.cross_entropy(classes.flatten(0, 1), target.flatten(), weight, reduction="sum")


def places(
    masks: Tensor, matches: Matches, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> Tensor:
    """Where masks [M, 1, h, w] are compared, [M, K, 2]: most where they are least certain, ignored
    places last of all."""
    certain = int(config.importance * config.num_points)
    points = draw((len(masks), int(config.num_points * config.oversample)), masks)
    doubt = -sampled(masks, points)[:, 0].abs()
    valid = read(label_map, points, matches.label, ignore, matches.image)[1]
    best = doubt.masked_fill(valid == 0, -torch.inf).topk(certain, dim=1).indices
    chosen = points.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, draw((len(masks), config.num_points - certain), masks)), 1)


# Sampling -----------------------------------------------------------------------------------------


def draw(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Places [*shape, 2] anywhere in an image: x and y as parts of its width and height."""
    return torch.rand(*shape, 2, device=like.device)


def sampled(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [M, C, h, w] at points [M, K, 2], or the same [K, 2] for all -> [M, C, K], bilinear."""
    grid = (2 * points - 1).to(maps).expand(len(maps), -1, -1)
    return F.grid_sample(maps, grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]


def read(
    label_map: Tensor, points: Tensor, labels: Tensor, ignore: int, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The masks of `labels` at points, and how much of a point is not ignored: what sampling both
    as maps would give.

    One image: label_map [H, W], points [K, 2], labels [n] -> [n, K], [K]. Or label_map [B, H, W]
    with the image [M] of each
    mask: points [M, K, 2], labels [M] -> [M, K] both.
    """
    height, width = label_map.shape[-2:]
    position = points * points.new_tensor((width, height)) - 0.5
    first = position.floor()
    share = position - first
    start = 0 if image is None else (image * height * width)[:, None]
    mask = valid = points.new_zeros(())
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = first[..., 0].long() + right, first[..., 1].long() + down
        weight = (share[..., 0] if right else 1 - share[..., 0]) * (
            share[..., 1] if down else 1 - share[..., 1]
        )
        found = label_map.reshape(-1)[
            start + y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        ]
        mask = mask + weight * (found == labels[:, None])
        valid = valid + weight * (found != ignore)
    return mask, valid


def at_least_some(sums: Tensor) -> Tensor:
    """Sums of what is not ignored as divisors: where they are 0, so is what they divide."""
    return sums.clamp(min=1e-6)
