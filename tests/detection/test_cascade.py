"""The cascade: losses of all stages and masks against loops, sampling, gradients and inference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.detection.cascade import BoxPredictions, Cascade
from beit3.detection.config import DetectorConfig
from beit3.detection.matching import Target, clip_boxes
from tests.detection.test_pooling import PATCH_SIZE, average_samples, make_maps, pool_with_loop
from tests.detection.test_proposals import decode_box, encode_box, iou, make_boxes

CONFIG = DetectorConfig(
    pyramid_dim=8, roi_samples=400, roi_positive_share=0.5, box_convs=1, box_dim=16, mask_convs=1
)
"""It samples more boxes than there are, so that sampling is not random."""
NUM_CLASSES = 3


def make_cascade(seed: int = 0) -> Cascade:
    torch.manual_seed(seed)
    cascade = Cascade(NUM_CLASSES, patch_size=PATCH_SIZE, config=CONFIG)
    with torch.no_grad():
        for head in cascade.box_heads:
            head.box_deltas.weight.mul_(5)  # so that boxes move between the stages
    return cascade


def make_targets(seed: int = 0, side: int = 96) -> list[Target]:
    """The objects of two images, 3 and 2 boxes with random masks."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in (3, 2):
        boxes = make_boxes(count, 90, seed + count)
        masks = torch.rand(count, side, side, generator=generator) > 0.4
        targets.append(Target(boxes, torch.arange(count), masks.to(torch.uint8)))
    return targets


def test_losses_equal_a_loop_over_boxes():
    """The second and third stage match the refined boxes of the stage before them anew."""
    cascade, maps, targets = make_cascade(), make_maps(96), make_targets()
    sizes = torch.tensor([[96, 96], [80, 64]])
    proposals = [make_boxes(12, 90, 7), make_boxes(9, 60, 8)]
    sums, counts = cascade.compute_losses(maps, proposals, sizes, targets)

    boxes = [
        torch.cat((image_proposals, target.boxes)).tolist()
        for image_proposals, target in zip(proposals, targets, strict=True)
    ]
    num_refined_positives = 0
    for stage in range(3):
        class_loss, box_loss, refined, num_positives = run_stage_with_loop(
            cascade, stage, maps, boxes, sizes, targets
        )
        num_boxes = sum(map(len, boxes))
        assert counts[f"box{stage}_class"] == counts[f"box{stage}_box"] == num_boxes
        assert float(sums[f"box{stage}_class"]) == pytest.approx(class_loss, rel=1e-4)
        assert float(sums[f"box{stage}_box"]) == pytest.approx(box_loss, rel=1e-3)
        num_refined_positives += num_positives if stage else 0
        boxes = refined
    assert num_refined_positives > 0


def run_stage_with_loop(cascade, stage, maps, boxes, sizes, targets):
    """The losses of a stage, its refined boxes per image and the number of positive boxes."""
    weight = CONFIG.stage_box_weights[stage]
    scale = torch.tensor([weight, weight, weight / 2, weight / 2])
    class_loss, box_loss, num_positives = 0.0, 0.0, 0
    refined: list[list[list[float]]] = [[] for _ in targets]
    for image, target in enumerate(targets):
        for box in boxes[image]:
            pooled = pool_with_loop(maps, image, box, 7)[None]
            logits, deltas = (values[0].double() for values in cascade.box_heads[stage](pooled))
            ious = [iou(box, object_box) for object_box in target.boxes.tolist()]
            nearest = ious.index(max(ious))
            label = NUM_CLASSES
            if max(ious) >= CONFIG.stage_ious[stage]:
                label = int(target.labels[nearest])
            class_loss += float(logits.logsumexp(0) - logits[label])
            if label < NUM_CLASSES:
                delta_targets = (
                    torch.tensor(encode_box(target.boxes[nearest].tolist(), box)) * scale
                )
                box_loss += float((deltas - delta_targets).abs().sum())
                num_positives += 1
            moved = clip_with_min_max(decode_box((deltas / scale).tolist(), box), sizes[image])
            if moved[2] > moved[0] and moved[3] > moved[1]:
                refined[image].append(moved)
    return class_loss, box_loss, refined, num_positives


def clip_with_min_max(box, size):
    height, width = size.tolist()
    limits = (width, height, width, height)
    return [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]


def test_boxes_outside_the_image_are_dropped_in_training():
    """The first stage moves the boxes of the second image beyond its right edge."""
    cascade, targets = make_cascade(), make_targets()
    with torch.no_grad():
        cascade.box_heads[0].box_deltas.bias[0] = 40.0  # four times the boxes' width
    proposals = [
        torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1),
        torch.tensor([[30.0, 0, 50, 10]]).repeat(4, 1),
    ]
    sizes = torch.tensor([[96, 96], [96, 60]])
    no_objects = [target._replace(boxes=target.boxes[:0]) for target in targets]
    _, counts = cascade.compute_losses(make_maps(96), proposals, sizes, no_objects)
    assert (counts["box0_class"], counts["box1_class"], counts["box1_box"]) == (8, 4, 4)
    # At inference all boxes remain, so that they stay aligned with the scores.
    assert len(cascade.predict_boxes(make_maps(96), proposals, sizes)[1].boxes) == 4


def test_mask_loss_equals_a_loop_over_positives():
    cascade, maps, targets = make_cascade(), make_maps(96), make_targets()
    sizes = torch.tensor([[96, 96], [96, 96]])
    sums, counts = cascade.compute_losses(maps, [make_boxes(0, 90, 7)] * 2, sizes, targets)
    assert counts["mask"] == 5  # without proposals the positives are the objects themselves
    expected = 0.0
    for image, target in enumerate(targets):
        for box, label, mask in zip(
            target.boxes.tolist(), target.labels.tolist(), target.masks, strict=True
        ):
            pooled = pool_with_loop(maps, image, box, 14)[None]
            logits = cascade.mask_head(pooled)[0, label]
            mask_target = average_samples(mask[None].float(), box, 28)[0] >= 0.5
            expected += float(F.softplus(torch.where(mask_target, -logits, logits)).mean())
    assert float(sums["mask"]) == pytest.approx(expected, rel=1e-3)


def test_positives_are_sampled_up_to_their_fraction():
    cascade = make_cascade()
    cascade.sampler.batch_size_per_image, cascade.sampler.positive_fraction = 8, 0.25
    target = Target(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([2]))
    positives = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    negatives = torch.tensor([[50.0, 50, 60, 60]]).repeat(20, 1)
    (sampled,) = cascade.sample_proposals([torch.cat((positives, negatives))], [target])
    assert sorted(sampled.labels.tolist()) == [2] * 2 + [NUM_CLASSES] * 6


def test_each_stage_passes_a_third_of_its_gradient_to_the_maps():
    cascade, boxes = make_cascade(), [make_boxes(4, 90, 1), make_boxes(3, 90, 2)]

    def compute_gradients(run):
        maps = [features.requires_grad_() for features in make_maps(96)]
        cascade.zero_grad()
        sum(values.square().sum() for values in run(maps)).backward()
        return maps[0].grad, cascade.box_heads[1].box_deltas.weight.grad.clone()

    map_gradient, head_gradient = compute_gradients(
        lambda maps: cascade.run_box_head(1, maps, boxes)
    )
    full_map_gradient, full_head_gradient = compute_gradients(
        lambda maps: cascade.box_heads[1](cascade.pooler(maps, boxes, 7))
    )
    torch.testing.assert_close(map_gradient * 3, full_map_gradient)
    torch.testing.assert_close(head_gradient, full_head_gradient)


@torch.no_grad()
def test_predictions_are_the_last_boxes_with_the_mean_score():
    cascade, maps = make_cascade().eval(), make_maps(96)
    sizes = torch.tensor([[96, 96], [40, 50]])
    proposals = [make_boxes(6, 90, 3), torch.tensor([[30.0, 30, 45, 38], [49, 39, 50, 40]])]
    predictions = cascade.predict_boxes(maps, proposals, sizes)
    for image, predicted in enumerate(predictions):
        boxes, scores = proposals[image], torch.zeros(())
        for stage, coder in enumerate(cascade.coders):
            image_boxes: list[Tensor] = [boxes[:0], boxes[:0]]
            image_boxes[image] = boxes
            logits, deltas = cascade.run_box_head(stage, maps, image_boxes)
            scores = scores + logits.softmax(1)[:, :-1] / 3
            boxes = clip_boxes(coder.decode_single(deltas, boxes), sizes[image])
        torch.testing.assert_close(predicted, BoxPredictions(boxes, scores), atol=1e-4, rtol=1e-4)
        assert len(predicted.boxes) == len(proposals[image])


@torch.no_grad()
def test_each_mask_is_that_of_its_label():
    cascade, maps = make_cascade().eval(), make_maps(96)
    boxes = make_boxes(3, 90, 3)
    labels = [torch.zeros(0, dtype=torch.int64), torch.tensor([2, 0, 1])]
    masks = cascade.predict_masks(maps, [boxes[:0], boxes], labels)
    all_masks = cascade.mask_head(cascade.pooler(maps, [boxes[:0], boxes], 14)).sigmoid()
    assert masks[0].shape == (0, 28, 28)
    expected = torch.stack((all_masks[0, 2], all_masks[1, 0], all_masks[2, 1]))
    torch.testing.assert_close(masks[1], expected)
