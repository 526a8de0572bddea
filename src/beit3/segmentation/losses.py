"""Mask2Former's losses for label maps: queries are matched to the classes of an image, and masks
are compared at sampled points.

They are the original's (arXiv:2112.01527, section 3.3), with three differences:

- Ignored pixels count nowhere, neither in the matching nor in the two mask losses. In the original
  they are background.
- Points within half a pixel of the border take the nearest pixel's values. In the original, masks
  fade to logits of 0 there.
- A mask is read from the label map at the sampled points, so no mask of the size of the image is
  created.

Every loss is a sum, with a count that depends on the labels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.ops.precision import promote_to_float32
from beit3.segmentation.config import HeadConfig

WEIGHT_UNIT = 1000
"""Weights of the class loss are counted in thousandths, because counts are whole numbers."""


@dataclass(frozen=True)
class MaskPredictions:
    """The queries' predictions before the first layer and after each, the last layer's last."""

    masks: tuple[Tensor, ...]
    """Logits [B, Q, h, w]."""
    classes: tuple[Tensor, ...]
    """Logits [B, Q, C + 1], the last "no object"."""


@dataclass(frozen=True)
class Matches:
    """The M matched queries of all images, with their classes; each field is [M] int64."""

    image: Tensor
    """Index of the image in the batch."""
    query: Tensor
    label: Tensor


def compute_losses(
    predictions: MaskPredictions, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> dict[str, Tensor]:
    """Returns the sums of `mask`, `dice` and `class`, each the mean over layers.

    Their divisors come from `count_targets`. They are float32, under autocast too.
    """
    num_classes = predictions.classes[-1].shape[-1] - 1
    present_classes = find_present_classes(label_map, num_classes, ignore)
    label_map = label_map.long()
    sums: dict[str, list[Tensor]] = {"mask": [], "dice": [], "class": []}
    with torch.autocast(label_map.device.type, enabled=False):
        for masks, classes in zip(predictions.masks, predictions.classes, strict=True):
            masks, classes = promote_to_float32(masks), promote_to_float32(classes)
            matches = match_queries(
                masks, classes, label_map, present_classes, config, ignore=ignore
            )
            mask_sum, dice_sum = compute_mask_losses(
                masks, matches, label_map, config, ignore=ignore
            )
            sums["mask"].append(mask_sum)
            sums["dice"].append(dice_sum)
            sums["class"].append(compute_class_loss(classes, matches, config))
    return {name: torch.stack(layer_sums).mean() for name, layer_sums in sums.items()}


def count_targets(
    label_map: Tensor, num_classes: int, config: HeadConfig, *, ignore: int
) -> dict[str, int]:
    """Returns the number of matched masks, for both mask losses, and the weights of all queries in
    thousandths."""
    present_classes = find_present_classes(label_map, num_classes, ignore)
    num_matched = sum(min(len(labels), config.num_queries) for labels in present_classes)
    num_unmatched = len(label_map) * config.num_queries - num_matched
    class_weights = num_matched * WEIGHT_UNIT + num_unmatched * compute_no_object_weight(config)
    return {"mask": num_matched, "dice": num_matched, "class": class_weights}


def compute_no_object_weight(config: HeadConfig) -> int:
    """Returns the weight of "no object" in thousandths, at least 1."""
    return max(1, round(config.no_object_weight * WEIGHT_UNIT))


def find_present_classes(label_map: Tensor, num_classes: int, ignore: int) -> list[Tensor]:
    """Returns the classes of each image, [n] int64, ascending.

    Raises ValueError for labels that are neither a class nor ignored.
    """
    if 0 <= ignore < num_classes:
        raise ValueError(
            f"the label {ignore} for ignored pixels is one of the {num_classes} classes: give "
            "another"
        )
    present_classes = []
    for image_labels in label_map:
        labels = image_labels.unique().long()
        labels = labels[labels != ignore]
        invalid = labels[(labels < 0) | (labels >= num_classes)]
        if len(invalid):
            raise ValueError(
                f"label {int(invalid[0])} is none of the {num_classes} classes, nor {ignore} for "
                "ignored: check num_classes"
            )
        present_classes.append(labels)
    return present_classes


# Matching -----------------------------------------------------------------------------------------


@torch.no_grad()
def match_queries(
    masks: Tensor,
    classes: Tensor,
    label_map: Tensor,
    present_classes: Sequence[Tensor],
    config: HeadConfig,
    *,
    ignore: int,
) -> Matches:
    """Assigns the cheapest queries to the classes of each image.

    Where an image has more classes than queries, some classes get no query.

    Args:
        masks: Logits [B, Q, h, w].
        classes: Logits [B, Q, C + 1].
        label_map: Int64 [B, H, W].
        present_classes: For each image its classes, [n].
        config: The head's config.
        ignore: Label of pixels that count nowhere.
    """
    images, queries, labels = [], [], []
    for index, image_classes in enumerate(present_classes):
        points = draw_points((config.num_points,), masks)
        targets, valid = sample_class_masks(label_map[index], points, image_classes, ignore)
        cost = compute_match_costs(
            sample_maps(masks[index][None], points)[0],
            classes[index],
            image_classes,
            targets.to(masks),
            valid.to(masks),
            config,
        )
        query_indices, class_indices = assign(cost)
        images.append(torch.full_like(query_indices, index))
        queries.append(query_indices)
        labels.append(image_classes[class_indices.to(image_classes.device)])
    image, query, label = (
        torch.cat([indices.to(masks.device) for indices in per_image])
        for per_image in (images, queries, labels)
    )
    return Matches(image, query, label)


def compute_match_costs(
    logits: Tensor,
    classes: Tensor,
    labels: Tensor,
    targets: Tensor,
    valid: Tensor,
    config: HeadConfig,
) -> Tensor:
    """Returns the cost of assigning each query to each class of an image, [Q, n].

    Args:
        logits: The queries' mask logits at P points, [Q, P].
        classes: Class logits [Q, C + 1].
        labels: The classes, [n].
        targets: The classes' masks at the points, [n, P].
        valid: How much of each point is not ignored, [P].
        config: Holds the weights of the three costs.
    """
    probabilities = logits.sigmoid()
    cross_entropy = F.softplus(-logits) @ targets.T + F.softplus(logits) @ (valid - targets).T
    overlap = 2 * probabilities @ targets.T + 1
    total = (probabilities @ valid)[:, None] + targets.sum(1) + 1
    mask_cost = config.mask_weight * cross_entropy / clamp_divisor(valid.sum())
    dice_cost = config.dice_weight * (1 - overlap / total)
    return mask_cost + dice_cost - config.class_weight * classes.softmax(-1)[:, labels]


def assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows and columns [min(Q, n)] of the cheapest assignment of a cost matrix [Q, n].

    Entries that are not finite are chosen last.
    """
    from scipy.optimize import linear_sum_assignment

    largest = torch.finfo(torch.float32).max
    finite_cost = cost.float().nan_to_num(largest, largest, largest)
    rows, columns = linear_sum_assignment(finite_cost.cpu().numpy())
    return torch.from_numpy(rows), torch.from_numpy(columns)


# Losses -------------------------------------------------------------------------------------------


def compute_mask_losses(
    masks: Tensor, matches: Matches, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> tuple[Tensor, Tensor]:
    """Returns cross-entropy, averaged over the points of a mask, and dice, both summed over the
    matched masks."""
    matched = masks[matches.image, matches.query][:, None]  # [M, 1, h, w]
    points = select_points(matched.detach(), matches, label_map, config, ignore=ignore)  # [M, K, 2]
    targets, valid = sample_class_masks(label_map, points, matches.label, ignore, matches.image)
    targets, valid = targets.to(masks), valid.to(masks)
    logits = sample_maps(matched, points)[:, 0]  # [M, K]
    cross_entropy = targets * F.softplus(-logits) + (valid - targets) * F.softplus(logits)
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(1) + 1
    total = (probabilities * valid).sum(1) + targets.sum(1) + 1
    dice = 1 - overlap / total
    return (cross_entropy.sum(1) / clamp_divisor(valid.sum(1))).sum(), dice.sum()


def compute_class_loss(classes: Tensor, matches: Matches, config: HeadConfig) -> Tensor:
    """Returns the cross-entropy of all queries, summed with weights in thousandths.

    The target of a query without a match is "no object".
    """
    weight = torch.full(
        classes.shape[-1:], float(WEIGHT_UNIT), device=classes.device, dtype=classes.dtype
    )
    weight[-1] = compute_no_object_weight(config)
    targets = torch.full(classes.shape[:2], classes.shape[-1] - 1, device=classes.device)
    targets[matches.image, matches.query] = matches.label
    return F.cross_entropy(classes.flatten(0, 1), targets.flatten(), weight, reduction="sum")


def select_points(
    masks: Tensor, matches: Matches, label_map: Tensor, config: HeadConfig, *, ignore: int
) -> Tensor:
    """Returns the points [M, K, 2] at which masks [M, 1, h, w] are compared.

    A fraction `importance` of them are the least certain of many candidates, of which ignored ones
    come last; the others are uniform.
    """
    num_uncertain = int(config.importance * config.num_points)
    candidates = draw_points((len(masks), int(config.num_points * config.oversample)), masks)
    uncertainty = -sample_maps(masks, candidates)[:, 0].abs()
    _, valid = sample_class_masks(label_map, candidates, matches.label, ignore, matches.image)
    uncertainty = uncertainty.masked_fill(valid == 0, -torch.inf)
    indices = uncertainty.topk(num_uncertain, dim=1).indices
    uncertain = candidates.gather(1, indices[..., None].expand(-1, -1, 2))
    uniform = draw_points((len(masks), config.num_points - num_uncertain), masks)
    return torch.cat((uncertain, uniform), 1)


# Sampling -----------------------------------------------------------------------------------------


def draw_points(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draws uniform points [*shape, 2] in an image: x and y from 0 to 1."""
    return torch.rand(*shape, 2, device=like.device)


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps [M, C, h, w] bilinearly at points [M, K, 2], or at the same [K, 2] for all.

    Returns [M, C, K].
    """
    grid = (2 * points - 1).to(maps).expand(len(maps), -1, -1)
    return F.grid_sample(maps, grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]


def sample_class_masks(
    label_map: Tensor, points: Tensor, labels: Tensor, ignore: int, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Samples the masks of classes bilinearly at points, without creating the masks.

    Args:
        label_map: Int64 [H, W] of one image, or [B, H, W] together with `image`.
        points: [K, 2] for one image, or [M, K, 2] for the M masks.
        labels: Classes [n] whose masks are sampled in one image, or [M], one for each mask.
        ignore: Label of pixels that count nowhere.
        image: [M], index of each mask's image.

    Returns:
        The masks at the points, [n, K] or [M, K]; and how much of a point is not ignored, [K] or
        [M, K].
    """
    height, width = label_map.shape[-2:]
    positions = points * points.new_tensor((width, height)) - 0.5
    corners = positions.floor()
    fractions = positions - corners
    image_start = 0 if image is None else (image * height * width)[:, None]
    mask = valid = points.new_zeros(())
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = corners[..., 0].long() + right, corners[..., 1].long() + down
        x_weight = fractions[..., 0] if right else 1 - fractions[..., 0]
        y_weight = fractions[..., 1] if down else 1 - fractions[..., 1]
        weight = x_weight * y_weight
        pixel_indices = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        pixel_labels = label_map.reshape(-1)[image_start + pixel_indices]
        mask = mask + weight * (pixel_labels == labels[:, None])
        valid = valid + weight * (pixel_labels != ignore)
    return mask, valid


def clamp_divisor(sums: Tensor) -> Tensor:
    """Clamps sums to at least 1e-6, so that dividing 0 by a sum of 0 gives 0."""
    return sums.clamp(min=1e-6)
