"""The detector: unusual targets, precision, processes, initial values, sizes, and learning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from beit3.config import from_dict, to_dict
from beit3.detection.cascade import BoxPredictions
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.matching import Target
from beit3.detection.proposals import compute_overlaps
from beit3.model.config import GIANT, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.seeding import make_generator
from tests.detection.test_proposals import make_boxes

SMALL = DetectorConfig(
    pyramid_dim=16,
    anchor_sizes=(12.0, 24.0, 48.0, 96.0, 128.0),
    rpn_convs=1,
    rpn_samples=64,
    rpn_top_train=100,
    rpn_top_test=100,
    rpn_proposals=60,
    roi_samples=32,
    box_convs=1,
    box_dim=32,
    mask_convs=1,
)
SAMPLE_ALL = replace(SMALL, rpn_samples=4000, roi_samples=400, roi_positive_share=0.5)
"""It samples more boxes than there are, so that sampling is not random."""
PATCH_SIZE, NUM_CLASSES, DIM = 16, 3, 32
NO_OBJECTS = Target(
    torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 96, 80, dtype=torch.uint8)
)
PIXEL_OBJECTS = Target(
    torch.tensor([[49.0, 69, 50, 70], [0, 0, 1, 1]]),
    torch.tensor([0, 2]),
    torch.ones(2, 96, 80, dtype=torch.uint8),
)


def make_detector(config: DetectorConfig = SMALL, dtype: torch.dtype = torch.float32) -> Detector:
    detector = Detector(DIM, patch_size=PATCH_SIZE, num_classes=NUM_CLASSES, config=config)
    initialize(detector.to(dtype))
    return detector


def initialize(detector: Detector, seed: int = 0) -> None:
    for name, parameter in detector.named_parameters():
        detector.init_parameter(name, parameter.data, make_generator(seed, name))


def make_features(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of images of 96 x 80 px, and the images' sizes, of which the first is smaller."""
    sizes = torch.tensor([[96, 80]]).repeat(batch, 1)
    sizes[0] = torch.tensor([70, 50])
    return torch.randn(batch, 6, 5, DIM, generator=torch.Generator().manual_seed(seed)), sizes


def make_target(count: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(count, 96, 80, generator=generator) > 0.5).to(torch.uint8)
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return Target(make_boxes(count, 50, seed), labels, masks)


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        [make_target(3), make_target(5, 1)],
        [make_target(2), NO_OBJECTS],
        [NO_OBJECTS, NO_OBJECTS],
        [PIXEL_OBJECTS, make_target(60)],
    ],
    ids=["objects", "one image without objects", "no objects", "tiny and many objects"],
)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_every_parameter_has_a_finite_gradient(targets, masks):
    detector = make_detector(replace(SMALL, masks=masks)).train()
    losses = detector.compute_losses(*make_features(2), targets)
    names = ["rpn_objectness", "rpn_box"]
    names += [f"box{stage}_{part}" for stage in range(3) for part in ("class", "box")]
    assert list(losses) == names + ["mask"] * masks
    sum_losses(losses).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not sum(len(target.boxes) for target in targets):
        assert not losses["rpn_box"] and not losses["box0_box"] and not losses.get("mask", 0)
        assert losses["rpn_objectness"] > 0 and losses["box2_class"] > 0
    assert all(loss.isfinite() for loss in losses.values())


def test_without_proposals_and_objects_losses_are_zero():
    detector = make_detector().train()
    features, sizes = make_features(2)
    maps = detector.pyramid(features)
    no_proposals = [torch.zeros(0, 4)] * 2
    sums, counts = detector.cascade.compute_losses(
        maps, no_proposals, sizes, [NO_OBJECTS, NO_OBJECTS]
    )
    assert not any(counts.values())
    sum_losses(sums).backward()
    for name, parameter in detector.cascade.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    with torch.no_grad():
        predictions = detector.cascade.predict_boxes(maps, no_proposals, sizes)
    assert [tuple(predicted.scores.shape) for predicted in predictions] == [(0, 3)] * 2


def test_detectors_of_boxes_need_no_masks():
    detector = make_detector(replace(SMALL, masks=False))
    assert not [name for name, _ in detector.named_parameters() if "mask" in name]
    targets = [make_target(2)._replace(masks=None), NO_OBJECTS._replace(masks=None)]
    detector.compute_losses(*make_features(2), targets)
    maps = detector.pyramid(make_features(1)[0])
    with pytest.raises(AssertionError, match="boxes alone"):
        detector.predict_masks(maps, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])


def test_losses_are_sums_over_images():
    detector = make_detector(SAMPLE_ALL)
    features, sizes = make_features(1)
    single = detector.compute_losses(features, sizes, [make_target(4)])
    double = detector.compute_losses(
        features.repeat(2, 1, 1, 1), sizes.repeat(2, 1), [make_target(4)] * 2
    )
    for name, loss in single.items():
        torch.testing.assert_close(double[name], 2 * loss, msg=name)
    # At the start each is the mean over boxes or pixels of a guess.
    assert float(single["box0_class"].detach()) == pytest.approx(np.log(NUM_CLASSES + 1), rel=0.2)
    assert float(single["mask"].detach()) == pytest.approx(np.log(2), rel=0.1)


def test_bfloat16_changes_losses_little():
    detector = make_detector(SAMPLE_ALL).train()
    features, sizes = make_features(2)
    targets = [make_target(4), make_target(3, 1)]
    exact = detector.compute_losses(features, sizes, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = detector.compute_losses(features, sizes, targets)
        with torch.no_grad():
            predicted = detector.predict_boxes(detector.pyramid(features), sizes)[0]
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        # Those of later stages depend on which boxes have just crossed a threshold.
        if not name.startswith(("box1", "box2")):
            torch.testing.assert_close(rounded[name], loss, atol=0.02, rtol=0.05, msg=name)
    assert predicted.boxes.dtype == predicted.scores.dtype == torch.float32


def test_two_processes_equal_one(tmp_path: Path):
    """With one and two images, the losses and their gradients sum to those of all three images."""
    mp.spawn(_run_process, (tmp_path,), nprocs=2)
    expected = compute_gradients(make_detector(SAMPLE_ALL, torch.float64), range(3))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in expected.items():
        torch.testing.assert_close(
            first[name] + second[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def compute_gradients(detector: Detector, images: range) -> dict[str, Tensor]:
    """The losses of these of three images, and the gradients of their sum divided by 3."""
    features, sizes = make_features(3)
    targets = [make_target(4), make_target(1, 1), make_target(7, 2)]
    indices = list(images)
    losses = detector.compute_losses(
        features[indices].double(), sizes[indices], [targets[index] for index in indices]
    )
    (sum_losses(losses) / 3).backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def _run_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images = range(1) if rank == 0 else range(1, 3)
    gradients = compute_gradients(make_detector(SAMPLE_ALL, torch.float64), images)
    torch.save(gradients, folder / f"{rank}.pt")
    dist.destroy_process_group()


# Predictions --------------------------------------------------------------------------------------


@torch.no_grad()
def test_predictions_lie_within_their_image_and_do_not_depend_on_others():
    detector = make_detector().eval()
    features, sizes = make_features(2)
    predictions = detector.predict_boxes(detector.pyramid(features), sizes)
    for index, predicted in enumerate(predictions):
        boxes, scores = predicted
        height, width = sizes[index].tolist()
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert 0 < len(boxes) <= SMALL.rpn_proposals
        assert scores.shape == (len(boxes), NUM_CLASSES)
        assert (scores > 0).all() and (scores.sum(1) < 1).all()
        maps = detector.pyramid(features[index : index + 1])
        alone = detector.predict_boxes(maps, sizes[index : index + 1])[0]
        torch.testing.assert_close(alone, predicted, atol=1e-3, rtol=1e-4)
        (masks,) = detector.predict_masks(maps, [boxes[:4]], [torch.tensor([0, 1, 2, 0])])
        assert masks.shape == (4, 28, 28) and 0 < masks.min() and masks.max() < 1


# Parameters and config ----------------------------------------------------------------------------


def test_initial_values_follow_the_table():
    detector = make_detector()
    values = {name: parameter.clone() for name, parameter in detector.named_parameters()}
    assert values.keys() == detector.state_dict().keys()  # nothing but parameters is stored
    initialize(detector)
    for name, parameter in detector.named_parameters():
        assert torch.equal(parameter, values[name]), name
    for name, value in values.items():
        if value.ndim > 1:
            assert value.unique().numel() > 0.9 * value.numel(), name
            continue
        module = detector.get_submodule(name.rpartition(".")[0])
        is_norm_weight = isinstance(module, torch.nn.LayerNorm) and name.endswith("weight")
        assert torch.equal(value, torch.full_like(value, float(is_norm_weight))), name
    for part, std in (
        ("proposals.head", 0.01),
        ("class_logits", 0.01),
        ("box_deltas", 0.001),
        ("mask_fcn_logits", 0.001),
    ):
        weights = [value.flatten() for name, value in values.items() if part in name]
        weights = torch.cat([weight for weight in weights if weight.any()])  # without biases
        assert float(weights.std()) == pytest.approx(std, rel=0.3), part


@torch.no_grad()
def test_a_detector_built_on_meta_equals_one_built_on_cpu():
    with torch.device("meta"):
        detector = Detector(DIM, patch_size=PATCH_SIZE, num_classes=NUM_CLASSES, config=SMALL)
    detector._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
    initialize(detector)
    features, sizes = make_features(2)
    predictions, expected = (
        network.eval().predict_boxes(network.pyramid(features), sizes)
        for network in (detector, make_detector())
    )
    for predicted, expected_boxes in zip(predictions, expected, strict=True):
        torch.testing.assert_close(predicted, expected_boxes)


@torch.no_grad()
def test_the_giant_has_the_expected_shapes_at_1280_pixels():
    """On meta, with the paper's patches of 14 px instead of 16, which are 91 per side."""
    with torch.device("meta"):
        detector = Detector(GIANT.dim, patch_size=14, num_classes=80, config=DetectorConfig())
        maps = detector.pyramid(torch.empty(1, 91, 91, GIANT.dim))
        assert [features.shape[2] for features in maps] == [364, 182, 91, 46, 23]
        scores, deltas = detector.proposals.head(maps)
        num_anchors = len(detector.proposals.anchor_generator(maps))
        assert sum(level.numel() for level in scores) == num_anchors
        assert sum(level.numel() for level in deltas) == 4 * num_anchors
        logits, boxes = detector.cascade.box_heads[2](torch.empty(512, 256, 7, 7))
        assert logits.shape == (512, 81) and boxes.shape == (512, 4)
        masks = detector.cascade.mask_head(torch.empty(9, 256, 14, 14))
        assert masks.shape == (9, 80, 28, 28)


def test_the_config_is_plain_and_validated():
    assert from_dict(DetectorConfig, to_dict(SMALL)) == SMALL
    with pytest.raises(ValueError, match="anchor_sizes .*give 5"):
        replace(SMALL, anchor_sizes=(8.0, 16.0))
    with pytest.raises(ValueError, match="one of each per stage"):
        replace(SMALL, stage_ious=(0.5,))
    with pytest.raises(ValueError, match="roi_samples 0: give at least 1"):
        replace(SMALL, roi_samples=0)


# Learning -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_images_are_learned():
    """Rectangles and ellipses on 96 px: after 300 steps each is detected at an IoU of .75.

    The label and the mask are right, and no other label has a higher score there.
    """
    torch.manual_seed(0)
    config = ModelConfig(dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=96, patch_size=8)
    trunk = ImageTrunk(config, window=4, num_global=1)
    trunk.init_weights()
    small = replace(SMALL, pyramid_dim=24, anchor_sizes=(8.0, 16.0, 32.0, 64.0, 96.0), box_dim=64)
    detector = Detector(config.dim, patch_size=8, num_classes=2, config=small)
    initialize(detector)
    images, targets = make_shapes(8)
    train_on_shapes(trunk, detector, images, targets)
    trunk.eval()
    detector.eval()
    with torch.no_grad():
        maps = detector.pyramid(trunk(images))
        predictions = detector.predict_boxes(maps, torch.full((8, 2), 96))
        masks = detector.predict_masks(
            maps, [target.boxes for target in targets], [target.labels for target in targets]
        )
    recalls = [
        compute_recall(predicted, target)
        for predicted, target in zip(predictions, targets, strict=True)
    ]
    assert sum(recalls) / 8 >= 0.9
    mask_accuracies = [
        ((mask > 0.5) == draw_masks(target)).float().mean()
        for mask, target in zip(masks, targets, strict=True)
    ]
    assert torch.stack(mask_accuracies).mean() > 0.9


def train_on_shapes(
    trunk: ImageTrunk, detector: Detector, images: Tensor, targets: list[Target]
) -> None:
    parameters = [*trunk.parameters(), *detector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (0.1 if step >= 240 else 1)
        start = 2 * (step % 4)
        losses = detector.compute_losses(
            trunk(images[start : start + 2]), torch.full((2, 2), 96), targets[start : start + 2]
        )
        optimizer.zero_grad()
        (sum_losses(losses) / 2).backward()
        optimizer.step()


def make_shapes(count: int) -> tuple[Tensor, list[Target]]:
    """Images [count, 3, 96, 96] with two or three shapes each.

    A shape of label 0 fills its box, one of label 1 is the ellipse in it.
    """
    rng = np.random.default_rng(0)
    images = 0.1 * torch.from_numpy(rng.standard_normal((count, 3, 96, 96))).float()
    targets = []
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    for image in images:
        boxes, labels, masks = [], [], []
        for corner in rng.permutation(4)[: rng.integers(2, 4)]:
            left = 48 * (corner % 2) + rng.integers(0, 12)
            top = 48 * (corner // 2) + rng.integers(0, 12)
            width, height = rng.integers(20, 36, 2)
            label = int(rng.integers(2))
            mask = (x > left) & (x < left + width) & (y > top) & (y < top + height)
            if label:
                u = (x - left - width / 2) / (width / 2)
                v = (y - top - height / 2) / (height / 2)
                mask = u**2 + v**2 < 1
            image[:, mask] = torch.from_numpy(rng.uniform(0.5, 1.0, 3)).float()[:, None]
            boxes.append([left, top, left + width, top + height])
            labels.append(label)
            masks.append(mask.to(torch.uint8))
        boxes = torch.tensor(np.array(boxes)).float()
        targets.append(Target(boxes, torch.tensor(labels), torch.stack(masks)))
    return images, targets


def compute_recall(predicted: BoxPredictions, target: Target) -> float:
    """Fraction of objects whose best detection is accurate and has the right label on top."""
    num_detected = 0
    overlaps = compute_overlaps(target.boxes, predicted.boxes)
    for row, label in zip(overlaps, target.labels.tolist(), strict=True):
        near = row > 0.3
        if near.any():
            scores = predicted.scores[near]
            best = int(scores[:, label].argmax())
            is_accurate = row[near][best] >= 0.75 and scores[best, label] > 0.5
            num_detected += bool(is_accurate and scores[best].argmax() == label)
    return num_detected / len(target.labels)


def draw_masks(target: Target) -> Tensor:
    """The true mask over each box, the ellipse or all of it: bool [n, 28, 28]."""
    side = (torch.arange(28) - 13.5) / 14
    y, x = torch.meshgrid(side, side, indexing="ij")
    ellipse = (x**2 + y**2 < 1).expand(len(target.labels), 28, 28)
    return ellipse | (target.labels == 0)[:, None, None]
