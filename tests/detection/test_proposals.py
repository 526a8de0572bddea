"""Proposals: anchors beside torchvision's, matching by hand, losses and choice against loops,
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
"""More samples than anchors: nothing is left to chance."""
PATCH = 8


def maps_of(height: int, width: int, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            batch, 8, math.ceil(height / side), math.ceil(width / side), generator=generator
        )
        for side in (2, 4, 8, 16, 32)
    ]


def network(seed: int = 0) -> ProposalNetwork:
    torch.manual_seed(seed)
    proposals = ProposalNetwork(PATCH, config=CONFIG)
    with torch.no_grad():  # larger than at the start, so that boxes move and scores differ
        for name, parameter in proposals.named_parameters():
            parameter.normal_(std=0.1 if name.endswith("weight") else 0.02)
    return proposals.eval()


def test_anchors_are_torchvisions_unrounded():
    sizes, ratios = (32.0, 64.0, 128.0, 256.0, 512.0), (0.5, 1.0, 2.0)
    maps = [torch.zeros(1, 1, 128 // side, 192 // side) for side in (4, 8, 16, 32, 64)]
    generator = TorchvisionAnchors(tuple((int(size),) for size in sizes), (ratios,) * 5)
    expected = generator(ImageList(torch.zeros(1, 3, 128, 192), [(128, 192)]), maps)[0]
    anchors = AnchorGenerator(sizes, ratios, 16)(maps)
    assert anchors.shape == expected.shape and float((anchors - expected).abs().max()) <= 0.5
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    assert torch.allclose(area[: 32 * 48 * 3], torch.tensor(32.0 * 32)), "ratios keep the area"


def test_anchors_of_patches_of_14_pixels():
    """Strides of 3.5, 7, 14, 28 and 56 px."""
    anchors = AnchorGenerator((8.0,) * 5, (1.0,), 14)([torch.zeros(1, 1, 2, 3)] * 5)
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(5, 2, 3, 2)
    for level, stride in enumerate((3.5, 7, 14, 28, 56)):
        assert torch.equal(centres[level, 1, 2], torch.tensor([2 * stride, stride]))


@pytest.mark.parametrize("weight", [1.0, 10.0, 30.0])
def test_encoded_boxes_decode_to_themselves(weight):
    coder = BoxCoder((weight, weight, weight / 2, weight / 2))
    boxes, anchors = random_boxes(50, 100, 0), random_boxes(50, 100, 1)
    torch.testing.assert_close(
        coder.decode_single(coder.encode_single(boxes, anchors), anchors),
        boxes,
        atol=1e-3,
        rtol=1e-4,
    )


def test_matching_by_hand():
    """One object of 10 x 10: overlaps of .8, .5 and .2, and one of 1 on padding. A second object,
    whose best is only .25."""
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
    labels, matched = network().assign(anchors, valid, objects)
    assert labels.tolist() == [1, -1, 0, -1, 1, 0], (
        "in between and padding teach nothing, the best of an object always does"
    )
    assert torch.equal(matched[[0, 4]], objects)
    labels, _ = network().assign(anchors, valid, objects[:0])
    assert labels.tolist() == [0, 0, 0, -1, 0, 0]


def test_overlaps_in_parts_are_overlaps():
    boxes, anchors = random_boxes(70, 50, 0), random_boxes(9, 50, 1)
    expected = torch.tensor([[iou(a, b) for b in anchors.tolist()] for a in boxes.tolist()])
    torch.testing.assert_close(compute_overlaps(boxes, anchors), expected)


def test_losses_equal_a_loop_over_anchors():
    proposals, maps = network(), maps_of(48, 40)
    sizes = torch.tensor([[48, 40], [20, 33]])
    objects = [random_boxes(3, 30, 2), torch.tensor([[3.0, 4, 19, 17]])]
    _, losses = proposals(maps, sizes, objects)

    objectness, deltas = answers(proposals, maps)
    anchors = proposals.anchor_generator(maps)
    expected = {"rpn_objectness": 0.0, "rpn_box": 0.0}
    for image, boxes in enumerate(objects):
        height, width = sizes[image].tolist()
        inside = [
            place
            for place, (x1, y1, x2, y2) in enumerate(anchors.tolist())
            if x1 + x2 < 2 * width and y1 + y2 < 2 * height
        ]
        table = dict(
            zip(inside, compute_overlaps(boxes, anchors[inside]).T.tolist(), strict=True)
        )  # in float32: ties are a matter of digits
        best = [max(row[n] for row in table.values()) for n in range(len(boxes))]
        for place, row in table.items():
            nearest = row.index(max(row))
            positive = max(row) >= 0.7 or any(
                overlap == top for overlap, top in zip(row, best, strict=True)
            )
            if not positive and max(row) >= 0.3:
                continue
            score = objectness[image, place]
            expected["rpn_objectness"] += (
                float(F.softplus(-score if positive else score)) / CONFIG.rpn_samples
            )
            if positive:
                wanted = encoded(boxes[nearest].tolist(), anchors[place].tolist())
                expected["rpn_box"] += (
                    float((deltas[image, place] - torch.tensor(wanted)).abs().sum())
                    / CONFIG.rpn_samples
                )
    assert expected["rpn_box"] > 0
    for name, value in losses.items():
        assert float(value) == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_a_loop(training):
    """The best of each map, clipped; of those that overlap by more than .7 within a map the best;
    the best of all maps."""
    proposals, maps = network(1).train(training), maps_of(48, 40, seed=1)
    sizes = torch.tensor([[48, 40], [20, 33]])
    found, losses = proposals(maps, sizes)
    assert not losses
    objectness, deltas = answers(proposals, maps)
    anchors = proposals.anchor_generator(maps)
    counts = [feature[0, 0].numel() * 3 for feature in maps]
    for image, (height, width) in enumerate(sizes.tolist()):
        inside = find_anchors_inside(anchors, sizes)[image]
        kept = []
        for start, stop in zip(
            torch.tensor([0, *counts]).cumsum(0).tolist(),
            torch.tensor(counts).cumsum(0).tolist(),
            strict=False,
        ):
            places = sorted(
                (p for p in range(start, stop) if inside[p]),
                key=lambda p: -float(objectness[image, p]),
            )  # noqa: B023
            mine: list[tuple[float, list[float]]] = []
            for place in places[: CONFIG.rpn_top_train if training else CONFIG.rpn_top_test]:
                x1, y1, x2, y2 = decoded(deltas[image, place].tolist(), anchors[place].tolist())
                box = [
                    min(max(x1, 0), width),
                    min(max(y1, 0), height),
                    min(max(x2, 0), width),
                    min(max(y2, 0), height),
                ]
                if (
                    box[2] > box[0]
                    and box[3] > box[1]
                    and all(iou(box, other) <= 0.7 for _, other in mine)
                ):
                    mine.append((float(objectness[image, place]), box))
            kept += mine
        kept.sort(key=lambda pair: -pair[0])
        torch.testing.assert_close(
            found[image],
            torch.tensor([box for _, box in kept[: CONFIG.rpn_proposals]]),
            atol=1e-3,
            rtol=1e-4,
        )


def test_padding_proposes_nothing():
    """However sure the head is of it, and even where few anchors are left."""
    proposals, maps = network(), maps_of(64, 64, batch=1)
    sizes = torch.tensor([[9, 17]])

    def sure(maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores = [torch.full((1, 3, *feature.shape[2:]), 9.0) for feature in maps]
        scores[0][
            0, 1, 2, 4
        ] = (
            -9.0
        )  # the cell at x = 8, y = 4: the only one that is on the image and not ruled out below
        for level, side in enumerate((2, 4, 8, 16, 32)):
            rows, columns = math.ceil(9 / side), math.ceil(17 / side)
            scores[level][0, :, :rows, :columns] = torch.where(
                scores[level][0, :, :rows, :columns] == -9, -9.0, -1000.0
            )
        return scores, [torch.zeros(1, 12, *feature.shape[2:]) for feature in maps]

    proposals.head.forward = sure
    assert proposals(maps, sizes)[0][0].tolist() == [[4.0, 0.0, 12.0, 8.0]]


def answers(proposals: ProposalNetwork, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The head's scores [B, N] and deltas [B, N, 4], row by row, anchor by anchor."""
    with torch.no_grad():
        scores, deltas = proposals.head(maps)
    order = [level.permute(0, 2, 3, 1).flatten(1) for level in scores]
    moves = [level.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas]
    return torch.cat(order, 1), torch.cat(moves, 1)


def random_boxes(count: int, side: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * side * 0.6
    return torch.cat(
        (corners, corners + 1 + torch.rand(count, 2, generator=generator) * side * 0.4), 1
    )


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def encoded(box: list[float], anchor: list[float]) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    return [
        (box[0] + box[2] - anchor[0] - anchor[2]) / 2 / width,
        (box[1] + box[3] - anchor[1] - anchor[3]) / 2 / height,
        math.log((box[2] - box[0]) / width),
        math.log((box[3] - box[1]) / height),
    ]


def decoded(deltas: list[float], anchor: list[float]) -> tuple[float, float, float, float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = (
        (anchor[0] + anchor[2]) / 2 + deltas[0] * width,
        (anchor[1] + anchor[3]) / 2 + deltas[1] * height,
    )
    width, height = width * math.exp(deltas[2]), height * math.exp(deltas[3])
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
