"""Proposals: anchors against torchvision's, assignment by hand, losses and selection against loops,
padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from beit3.detection.config import DetectorConfig
from beit3.detection.proposals import (
    AnchorGenerator,
    ProposalNetwork,
    compute_overlaps,
    find_anchors_inside,
)

CONFIG = DetectorConfig(
    pyramid_dim=8,
    anchor_sizes=(8.0, 16.0, 32.0, 64.0, 128.0),
    rpn_samples=4000,
    rpn_top_train=40,
    rpn_top_test=20,
    rpn_proposals=30,
)
"""It samples more anchors than there are, so that sampling is not random."""
PATCH_SIZE = 8
STRIDES = (2, 4, 8, 16, 32)


def make_maps(height: int, width: int, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            batch, 8, math.ceil(height / stride), math.ceil(width / stride), generator=generator
        )
        for stride in STRIDES
    ]


def make_network(seed: int = 0) -> ProposalNetwork:
    torch.manual_seed(seed)
    network = ProposalNetwork(PATCH_SIZE, config=CONFIG)
    with torch.no_grad():  # larger than initial values, so that boxes move and scores differ
        for name, parameter in network.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("weight") else 0.02)
    return network.eval()


# Anchors ------------------------------------------------------------------------------------------


def test_anchors_equal_torchvisions_before_rounding():
    sizes, ratios = (32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0)
    maps = [torch.zeros(1, 1, 128 // stride, 192 // stride) for stride in (4, 8, 16, 32, 64)]
    generator = TorchvisionAnchors(tuple((int(size),) for size in sizes), (ratios,) * 5)
    expected = generator(ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)]), maps)[0]
    anchors = AnchorGenerator(sizes, ratios, 16)(maps)
    assert anchors.shape == expected.shape and float((anchors - expected).abs().max()) <= 0.5
    areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    # All ratios have the same area.
    assert torch.allclose(areas[: 32 * 48 * 3], torch.tensor(32.0 * 32))


def test_patches_of_14_pixels_give_strides_of_half_pixels():
    anchors = AnchorGenerator((8.0,) * 5, (1.0,), 14)([torch.zeros(1, 1, 2, 3)] * 5)
    centers = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(5, 2, 3, 2)
    for level, stride in enumerate((3.5, 7, 14, 28, 56)):
        assert torch.equal(centers[level, 1, 2], torch.tensor([2 * stride, stride]))


@pytest.mark.parametrize("weight", [1.0, 10.0, 30.0])
def test_encoded_boxes_decode_to_themselves(weight):
    coder = BoxCoder((weight, weight, weight / 2, weight / 2))
    boxes, anchors = make_boxes(50, 100, 0), make_boxes(50, 100, 1)
    decoded = coder.decode_single(coder.encode_single(boxes, anchors), anchors)
    torch.testing.assert_close(decoded, boxes, atol=1e-3, rtol=1e-4)


# Assignment and losses ----------------------------------------------------------------------------


def test_anchors_are_assigned_to_objects():
    """An object of 10 x 10 has overlaps of .8, .5 and .2, and of 1 with an anchor on padding.

    A second object overlaps its best anchor by only .25.
    """
    anchors = torch.tensor(
        [
            [0.0, 0, 10, 8],
            [0, 0, 10, 5],
            [0, 0, 10, 2],
            [0, 0, 10, 10],
            [50, 50, 60, 65],
            [50, 40, 60, 45],
        ]
    )
    valid = torch.tensor([True, True, True, False, True, True])
    objects = torch.tensor([[0.0, 0, 10, 10], [50, 60, 60, 75]])
    network = make_network()
    labels, object_boxes = network.assign_anchors(anchors, valid, objects)
    # Overlaps in between and padding are ignored; the best anchor of an object is always positive.
    assert labels.tolist() == [1, -1, 0, -1, 1, 0]
    assert torch.equal(object_boxes[[0, 4]], objects)
    labels, _ = network.assign_anchors(anchors, valid, objects[:0])
    assert labels.tolist() == [0, 0, 0, -1, 0, 0]


def test_overlaps_in_blocks_equal_a_loop():
    boxes, anchors = make_boxes(70, 50, 0), make_boxes(9, 50, 1)
    expected = torch.tensor(
        [[iou(box, anchor) for anchor in anchors.tolist()] for box in boxes.tolist()]
    )
    torch.testing.assert_close(compute_overlaps(boxes, anchors), expected)


def test_losses_equal_a_loop_over_anchors():
    network, maps = make_network(), make_maps(48, 40)
    sizes = torch.tensor([[48, 40], [20, 33]])
    objects = [make_boxes(3, 30, 2), torch.tensor([[3.0, 4, 19, 17]])]
    _, losses = network(maps, sizes, objects)

    objectness, deltas = run_head(network, maps)
    anchors = network.anchor_generator(maps)
    objectness_loss = box_loss = 0.0
    for image, boxes in enumerate(objects):
        for index, nearest in label_with_loop(anchors, sizes[image].tolist(), boxes).items():
            positive = nearest is not None
            score = objectness[image, index]
            objectness_loss += float(F.softplus(-score if positive else score))
            if positive:
                target = encode_box(boxes[nearest].tolist(), anchors[index].tolist())
                box_loss += float((deltas[image, index] - torch.tensor(target)).abs().sum())
    assert box_loss > 0
    assert losses.keys() == {"rpn_objectness", "rpn_box"}
    expected = objectness_loss / CONFIG.rpn_samples
    assert float(losses["rpn_objectness"]) == pytest.approx(expected, rel=1e-4)
    assert float(losses["rpn_box"]) == pytest.approx(box_loss / CONFIG.rpn_samples, rel=1e-4)


def label_with_loop(anchors: Tensor, size: list[int], boxes: Tensor) -> dict[int, int | None]:
    """Maps sampled anchors to the index of their object, or to None where they are negative."""
    height, width = size
    inside = [
        index
        for index, (x1, y1, x2, y2) in enumerate(anchors.tolist())
        if x1 + x2 < 2 * width and y1 + y2 < 2 * height
    ]
    # Overlaps are in float32, because ties depend on the last digits.
    overlaps = compute_overlaps(boxes, anchors[inside]).T.tolist()
    best = [max(column) for column in zip(*overlaps, strict=True)]
    objects: dict[int, int | None] = {}
    for index, row in zip(inside, overlaps, strict=True):
        is_best = any(overlap == top for overlap, top in zip(row, best, strict=True))
        if max(row) >= 0.7 or is_best:
            objects[index] = row.index(max(row))
        elif max(row) < 0.3:
            objects[index] = None
    return objects


# Selection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_a_loop(training):
    """The best anchors of each map go through NMS at .7 within the map; the best of all remain."""
    network, maps = make_network(1).train(training), make_maps(48, 40, seed=1)
    sizes = torch.tensor([[48, 40], [20, 33]])
    proposals, losses = network(maps, sizes)
    assert not losses
    objectness, deltas = run_head(network, maps)
    anchors = network.anchor_generator(maps)
    inside = find_anchors_inside(anchors, sizes)
    anchors_per_map = [features[0, 0].numel() * 3 for features in maps]
    limit = CONFIG.rpn_top_train if training else CONFIG.rpn_top_test
    for image, size in enumerate(sizes.tolist()):
        selected = []
        for indices in torch.arange(len(anchors)).split(anchors_per_map):
            candidates = [index for index in indices.tolist() if inside[image, index]]
            scores = objectness[image].tolist()
            candidates.sort(key=scores.__getitem__, reverse=True)
            boxes = [
                (scores[index], decode_and_clip(deltas[image, index], anchors[index], size))
                for index in candidates[:limit]
            ]
            selected += suppress_with_loop(boxes)
        selected.sort(key=lambda pair: -pair[0])
        expected = torch.tensor([box for _, box in selected[: CONFIG.rpn_proposals]])
        torch.testing.assert_close(proposals[image], expected, atol=1e-3, rtol=1e-4)


def decode_and_clip(deltas: Tensor, anchor: Tensor, size: list[int]) -> list[float]:
    height, width = size
    x1, y1, x2, y2 = decode_box(deltas.tolist(), anchor.tolist())
    return [
        min(max(x1, 0), width),
        min(max(y1, 0), height),
        min(max(x2, 0), width),
        min(max(y2, 0), height),
    ]


def suppress_with_loop(boxes: list[tuple[float, list[float]]]) -> list[tuple[float, list[float]]]:
    """The boxes, best first, that have an area and overlap no better one by more than .7."""
    kept: list[tuple[float, list[float]]] = []
    for score, box in boxes:
        has_area = box[2] > box[0] and box[3] > box[1]
        if has_area and all(iou(box, kept_box) <= 0.7 for _, kept_box in kept):
            kept.append((score, box))
    return kept


def test_padding_is_never_proposed():
    """Even if its objectness is high and few other anchors are left."""
    network, maps = make_network(), make_maps(64, 64, batch=1)
    height, width = 9, 17

    def predict_padding(maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores = [torch.full((1, 3, *features.shape[2:]), 9.0) for features in maps]
        for level, stride in enumerate(STRIDES):
            on_image = (..., slice(math.ceil(height / stride)), slice(math.ceil(width / stride)))
            scores[level][on_image] = -1000.0
        scores[0][0, 1, 2, 4] = -9.0  # the cell at x = 8, y = 4, the only possible one on the image
        return scores, [torch.zeros(1, 12, *features.shape[2:]) for features in maps]

    network.head.forward = predict_padding
    proposals, _ = network(maps, torch.tensor([[height, width]]))
    assert proposals[0].tolist() == [[4.0, 0.0, 12.0, 8.0]]


# Boxes --------------------------------------------------------------------------------------------


def run_head(network: ProposalNetwork, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The head's scores [B, N] and deltas [B, N, 4], row by row, anchor by anchor."""
    with torch.no_grad():
        scores, deltas = network.head(maps)
    scores = [level.permute(0, 2, 3, 1).flatten(1) for level in scores]
    deltas = [level.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
    return torch.cat(scores, 1), torch.cat(deltas, 1)


def make_boxes(count: int, side: float, seed: int) -> Tensor:
    """Random boxes [count, 4] within a square of the given side."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * side * 0.6
    box_sizes = 1 + torch.rand(count, 2, generator=generator) * side * 0.4
    return torch.cat((corners, corners + box_sizes), 1)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return intersection / (sum(areas) - intersection)


def encode_box(box: list[float], anchor: list[float]) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return [
        (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / width,
        (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / height,
        math.log((box[2] - box[0]) / width),
        math.log((box[3] - box[1]) / height),
    ]


def decode_box(deltas: list[float], anchor: list[float]) -> tuple[float, float, float, float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (anchor[0] + anchor[2]) / 2 + deltas[0] * width
    y = (anchor[1] + anchor[3]) / 2 + deltas[1] * height
    width, height = width * math.exp(deltas[2]), height * math.exp(deltas[3])
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
