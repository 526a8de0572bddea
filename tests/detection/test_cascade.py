"""The cascade: which map a box is pooled from and what comes out, labels of each stage, its losses,
masks to learn."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.detection.cascade import (
    MASKS_AT_ONCE,
    BoxPredictions,
    Cascade,
    MatchedBoxes,
    Pool,
    Target,
    clip,
    label,
    mask_targets,
)
from beit3.detection.config import DetectorConfig
from tests.detection.test_proposals import decoded, encoded, iou, random_boxes

CONFIG = DetectorConfig(
    pyramid_dim=8, roi_samples=400, roi_positive_share=0.5, box_convs=1, box_dim=16, mask_convs=1
)
"""More samples than boxes: nothing is left to chance."""
PATCH, CLASSES = 8, 3


def cascade(seed: int = 0) -> Cascade:
    torch.manual_seed(seed)
    heads = Cascade(CLASSES, patch_size=PATCH, config=CONFIG)
    with torch.no_grad():
        for head in heads.box_heads:
            head.box_deltas.weight.mul_(5)  # boxes move from stage to stage
    return heads


def maps_of(side: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 8, side // stride, side // stride, generator=generator)
        for stride in (2, 4, 8, 16, 32)
    ]


def targets_of(seed: int = 0, side: int = 96) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    boxes = [random_boxes(count, 90, seed + count) for count in (3, 2)]
    masks = [
        (torch.rand(len(mine), side, side, generator=generator) > 0.4).to(torch.uint8)
        for mine in boxes
    ]
    return [
        Target(mine, torch.arange(len(mine)), mask) for mine, mask in zip(boxes, masks, strict=True)
    ]


@pytest.mark.parametrize(
    ("patch", "sides"),
    [(16, (111, 112, 223, 224, 447, 448, 900)), (8, (55, 56, 111, 112, 223, 224, 450))],
)
def test_larger_boxes_are_pooled_from_coarser_maps(patch, sides):
    boxes = torch.tensor([[5.0, 5.0, 5.0 + side, 5.0 + side] for side in sides])
    assert Pool(patch, 14).level_of([boxes]).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert Pool(patch, 7).level_of([boxes / 2]).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert Pool(patch, 14).level_of([torch.tensor([[3.0, 3, 3, 3]])]).tolist() == [0], (
        "a box without area"
    )


def test_pooling_equals_a_loop_over_samples():
    maps = maps_of(512)
    first = torch.tensor([[10.3, 20.1, 31.7, 35.2], [100.0, 50, 400, 500]])
    boxes = [first, torch.tensor([[0.0, 0, 100, 90], [60, 5, 180, 200], [7, 7, 8, 8]])]
    pooled = Pool(PATCH, 14)(maps, boxes, 3)
    expected = [
        slow_pool(maps, image, box, 3) for image, mine in enumerate(boxes) for box in mine.tolist()
    ]
    torch.testing.assert_close(pooled, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert Pool(PATCH, 14)(maps, [boxes[0][:0]] * 2, 3).shape == (0, 8, 3, 3)


def test_labels_of_each_stage():
    """Overlaps of .55, .65 and .75 with one object, and none; the nearest of two counts."""
    target = Target(torch.tensor([[0.0, 0, 10, 100], [200, 0, 210, 100]]), torch.tensor([1, 0]))
    boxes = torch.tensor(
        [[0.0, 0, 10, 55], [0, 0, 10, 65], [0, 0, 10, 75], [100, 0, 110, 100], [200, 0, 210, 90]]
    )
    for iou_, expected in ((0.5, [1, 1, 1, 3, 0]), (0.6, [3, 1, 1, 3, 0]), (0.7, [3, 3, 1, 3, 0])):
        found = label(boxes, target, iou_, CLASSES)
        assert found.labels.tolist() == expected
        assert found.nearest[:3].tolist() == [0, 0, 0] and torch.equal(
            found.wanted[4], target.boxes[1]
        )
    nothing = label(boxes, Target(boxes[:0], torch.zeros(0, dtype=torch.int64)), 0.5, CLASSES)
    assert nothing.labels.tolist() == [3] * 5 and torch.equal(nothing.wanted, boxes)


def test_losses_equal_a_loop_over_boxes():
    """Three stages, box by box: the second and third see what the one before made of its boxes,
    labelled anew."""
    heads, maps, sizes, targets = (
        cascade(),
        maps_of(96),
        torch.tensor([[96, 96], [80, 64]]),
        targets_of(),
    )
    proposals = [random_boxes(12, 90, 7), random_boxes(9, 60, 8)]
    sums, counts = heads.losses(maps, proposals, sizes, targets)

    boxes = [
        torch.cat((mine, target.boxes)).tolist()
        for mine, target in zip(proposals, targets, strict=True)
    ]
    refined_positives = 0
    for stage, (threshold, weight) in enumerate(
        zip(CONFIG.stage_ious, CONFIG.stage_box_weights, strict=True)
    ):
        classes = distances = 0.0
        moved: list[list[list[float]]] = [[], []]
        for image, target in enumerate(targets):
            height, width = sizes[image].tolist()
            for box in boxes[image]:
                pooled = slow_pool(maps, image, box, 7)[None]
                logits, deltas = (values[0].double() for values in heads.box_heads[stage](pooled))
                row = [iou(box, other) for other in target.boxes.tolist()]
                nearest = row.index(max(row))
                truth = int(target.labels[nearest]) if max(row) >= threshold else CLASSES
                classes += float(logits.logsumexp(0) - logits[truth])
                scale = torch.tensor([weight, weight, weight / 2, weight / 2])
                if truth < CLASSES:
                    wanted = torch.tensor(encoded(target.boxes[nearest].tolist(), box)) * scale
                    distances += float((deltas - wanted).abs().sum())
                    refined_positives += stage > 0
                x1, y1, x2, y2 = decoded((deltas / scale).tolist(), box)
                new = [
                    min(max(x1, 0), width),
                    min(max(y1, 0), height),
                    min(max(x2, 0), width),
                    min(max(y2, 0), height),
                ]
                if new[2] > new[0] and new[3] > new[1]:
                    moved[image].append(new)
        assert counts[f"box{stage}_class"] == counts[f"box{stage}_box"] == sum(map(len, boxes))
        assert float(sums[f"box{stage}_class"]) == pytest.approx(classes, rel=1e-4)
        assert float(sums[f"box{stage}_box"]) == pytest.approx(distances, rel=1e-3)
        boxes = moved
    assert refined_positives > 0


def test_boxes_that_leave_the_image_go_no_further():
    """Those of the second image, which the first stage moves to the right of it."""
    heads, targets = cascade(), targets_of()
    with torch.no_grad():
        heads.box_heads[0].box_deltas.bias[0] = 40.0  # four times their width
    proposals = [
        torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1),
        torch.tensor([[30.0, 0, 50, 10]]).repeat(4, 1),
    ]
    sizes = torch.tensor([[96, 96], [96, 60]])
    _, counts = heads.losses(
        maps_of(96),
        proposals,
        sizes,
        [target._replace(boxes=target.boxes[:0]) for target in targets],
    )
    assert (counts["box0_class"], counts["box1_class"], counts["box1_box"]) == (8, 4, 4)
    assert len(heads.detect(maps_of(96), proposals, sizes)[1].boxes) == 4, (
        "at inference scores and boxes stay aligned"
    )


def test_mask_loss_equals_a_loop_over_positives():
    heads, maps, sizes, targets = (
        cascade(),
        maps_of(96),
        torch.tensor([[96, 96], [96, 96]]),
        targets_of(),
    )
    sums, counts = heads.losses(maps, [random_boxes(0, 90, 7)] * 2, sizes, targets)
    assert counts["mask"] == 5, "the objects themselves"
    expected = 0.0
    for image, target in enumerate(targets):
        for box, kind, mask in zip(
            target.boxes.tolist(), target.labels.tolist(), target.masks, strict=True
        ):
            logits = heads.mask_head(slow_pool(maps, image, box, 14)[None])[0, kind]
            wanted = bilinear_bins(mask[None].float(), box, 28)[0] >= 0.5
            expected += float(F.softplus(torch.where(wanted, -logits, logits)).mean())
    assert float(sums["mask"]) == pytest.approx(expected, rel=1e-3)


def test_masks_to_learn_by_hand():
    """Object k is the left half of its box; there are more than are turned into floats at once."""
    count = MASKS_AT_ONCE + 3
    masks = torch.zeros(count, 64, 64, dtype=torch.uint8)
    masks[:, 8:36, 4:18] = 1
    masks[-1] = 1
    target = Target(
        torch.tensor([[4.0, 8, 32, 36]]).repeat(count, 1),
        torch.zeros(count, dtype=torch.int64),
        masks,
    )
    order = torch.arange(count).flip(0)
    wanted = mask_targets(target, MatchedBoxes(target.boxes, target.labels, order, target.boxes))
    half = (torch.arange(28) < 14).float().expand(28, 28)
    assert torch.equal(wanted[0], torch.ones(28, 28)) and torch.equal(
        wanted[1:], half.expand(count - 1, 28, 28)
    )


def test_only_positives_up_to_the_share_are_sampled():
    heads = cascade()
    heads.sampler.batch_size_per_image, heads.sampler.positive_fraction = 8, 0.25
    target = Target(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([2]))
    proposals = torch.cat(
        (
            torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1),
            torch.tensor([[50.0, 50, 60, 60]]).repeat(20, 1),
        )
    )
    (found,) = heads.sampled([proposals], [target])
    assert sorted(found.labels.tolist()) == [2] * 2 + [CLASSES] * 6


def test_each_stage_gives_a_third_of_its_gradient():
    heads, boxes = cascade(), [random_boxes(4, 90, 1), random_boxes(3, 90, 2)]
    gradients = []
    for predict in (
        lambda maps: heads.predicted(1, maps, boxes),
        lambda maps: heads.box_heads[1](heads.pool(maps, boxes, 7)),
    ):
        maps = [feature.requires_grad_() for feature in maps_of(96)]
        heads.zero_grad()
        sum(values.square().sum() for values in predict(maps)).backward()
        gradients.append((maps[0].grad, heads.box_heads[1].box_deltas.weight.grad.clone()))
    torch.testing.assert_close(gradients[0][0] * 3, gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])  # the head itself gets all of it


@torch.no_grad()
def test_detections_are_the_last_boxes_with_the_mean_score():
    heads, maps, sizes = cascade().eval(), maps_of(96), torch.tensor([[96, 96], [40, 50]])
    proposals = [random_boxes(6, 90, 3), torch.tensor([[30.0, 30, 45, 38], [49, 39, 50, 40]])]
    found = heads.detect(maps, proposals, sizes)
    for image, raw in enumerate(found):
        boxes, scores = proposals[image], 0
        for stage, coder in enumerate(heads.coders):
            alone = [boxes if other == image else boxes[:0] for other in range(2)]
            logits, deltas = heads.predicted(stage, maps, alone)
            scores = scores + logits.softmax(1)[:, :-1] / 3
            boxes = clip(coder.decode_single(deltas, boxes), sizes[image])
        torch.testing.assert_close(raw, BoxPredictions(boxes, scores), atol=1e-4, rtol=1e-4)
        assert len(raw.boxes) == len(proposals[image])


@torch.no_grad()
def test_masks_are_of_their_own_label():
    heads, maps = cascade().eval(), maps_of(96)
    boxes = random_boxes(3, 90, 3)
    found = heads.masks(
        maps, [boxes[:0], boxes], [torch.zeros(0, dtype=torch.int64), torch.tensor([2, 0, 1])]
    )
    every = heads.mask_head(heads.pool(maps, [boxes[:0], boxes], 14)).sigmoid()
    assert found[0].shape == (0, 28, 28)
    torch.testing.assert_close(found[1], torch.stack((every[0, 2], every[1, 0], every[2, 1])))


def test_clipping():
    boxes = torch.tensor([[-5.0, 3, 70, 90], [float("nan"), 1, float("inf"), 2]])
    assert clip(boxes, torch.tensor([40, 60])).tolist() == [[0, 3, 60, 40], [0, 1, 60, 2]]


def slow_pool(maps: list[Tensor], image: int, box: list[float], side: int) -> Tensor:
    """[C, side, side]: the level by the paper's formula, then the mean of samples in each bin."""
    width, height = box[2] - box[0], box[3] - box[1]
    level = (
        min(max(math.floor(4 + math.log2(math.sqrt(width * height) / (14 * PATCH)) + 1e-6), 2), 5)
        - 2
    )
    stride = PATCH * 2.0 ** (level - 2)
    return bilinear_bins(maps[level][image], [value / stride for value in box], side)


def bilinear_bins(feature: Tensor, box: list[float], side: int) -> Tensor:
    """The mean over ceil(bin) x ceil(bin) samples of each of side x side bins; cell centres lie at
    halves."""
    x1, y1, x2, y2 = box
    bin_width, bin_height = (x2 - x1) / side, (y2 - y1) / side
    across, down = math.ceil(bin_width), math.ceil(bin_height)
    pooled = torch.zeros(feature.shape[0], side, side)
    for row in range(side):
        for column in range(side):
            for i in range(down):
                for j in range(across):
                    y = y1 + (row + (i + 0.5) / down) * bin_height - 0.5
                    x = x1 + (column + (j + 0.5) / across) * bin_width - 0.5
                    pooled[:, row, column] += bilinear(feature, y, x) / (down * across)
    return pooled


def bilinear(feature: Tensor, y: float, x: float) -> Tensor:
    """The value between cells; beyond the outer centres that of the border."""
    y, x = min(max(y, 0), feature.shape[1] - 1), min(max(x, 0), feature.shape[2] - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, feature.shape[1] - 1), min(left + 1, feature.shape[2] - 1)
    upper = feature[:, top, left] * (1 - (x - left)) + feature[:, top, right] * (x - left)
    lower = feature[:, bottom, left] * (1 - (x - left)) + feature[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)
