"""The whole detector: hard targets, precision, processes, initial values, sizes, and that it
learns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from beit3.config import from_dict, to_dict
from beit3.detection.cascade import BoxPredictions, Target
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.proposals import compute_overlaps
from beit3.model.config import GIANT, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.seeding import make_generator
from tests.detection.test_proposals import random_boxes

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
EVERYTHING = replace(SMALL, rpn_samples=4000, roi_samples=400, roi_positive_share=0.5)
"""More samples than there are: nothing is left to chance."""
PATCH, CLASSES, DIM = 16, 3, 32
NOTHING = Target(
    torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 96, 80, dtype=torch.uint8)
)


def detector(config: DetectorConfig = SMALL, dtype: torch.dtype = torch.float32) -> Detector:
    network = Detector(DIM, patch_size=PATCH, num_classes=CLASSES, config=config).to(dtype)
    initialise(network)
    return network


def initialise(network: Detector, seed: int = 0) -> None:
    for name, parameter in network.named_parameters():
        network.init_parameter(name, parameter.data, make_generator(seed, name))


def features_of(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of images of 96 x 80, and their valid sizes, the first smaller."""
    sizes = torch.tensor([[96, 80]]).repeat(batch, 1)
    sizes[0] = torch.tensor([70, 50])
    return torch.randn(batch, 6, 5, DIM, generator=torch.Generator().manual_seed(seed)), sizes


def target(count: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(count, 96, 80, generator=generator) > 0.5).to(torch.uint8)
    return Target(
        random_boxes(count, 50, seed),
        torch.randint(0, CLASSES, (count,), generator=generator),
        masks,
    )


PIXEL = Target(
    torch.tensor([[49.0, 69, 50, 70], [0, 0, 1, 1]]),
    torch.tensor([0, 2]),
    torch.ones(2, 96, 80, dtype=torch.uint8),
)


@pytest.mark.parametrize(
    "targets",
    [[target(3), target(5, 1)], [target(2), NOTHING], [NOTHING, NOTHING], [PIXEL, target(60)]],
    ids=["some", "an image without", "none", "pixels and a crowd"],
)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_every_parameter_has_a_finite_gradient(targets, masks):
    network = detector(replace(SMALL, masks=masks)).train()
    losses = network.losses(*features_of(2), targets)
    names = [
        "rpn_objectness",
        "rpn_box",
        "box0_class",
        "box0_box",
        "box1_class",
        "box1_box",
        "box2_class",
        "box2_box",
    ]
    assert list(losses) == names + ["mask"] * masks
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not sum(len(one.boxes) for one in targets):
        assert not losses["rpn_box"] and not losses["box0_box"] and not losses.get("mask", 0)
        assert losses["rpn_objectness"] > 0 and losses["box2_class"] > 0
    assert all(value.isfinite() for value in losses.values())


def test_no_proposals_and_no_objects():
    network = detector().train()
    maps = network.pyramid(features_of(2)[0])
    sums, counts = network.cascade.losses(
        maps, [torch.zeros(0, 4)] * 2, features_of(2)[1], [NOTHING, NOTHING]
    )
    assert not any(counts.values())
    torch.stack(list(sums.values())).sum().backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any()
        for parameter in network.cascade.parameters()
    )
    with torch.no_grad():
        assert [
            tuple(raw.scores.shape)
            for raw in network.cascade.detect(maps, [torch.zeros(0, 4)] * 2, features_of(2)[1])
        ] == [(0, 3)] * 2


def test_boxes_alone_need_no_masks():
    network = detector(replace(SMALL, masks=False))
    assert not [name for name, _ in network.named_parameters() if "mask" in name]
    network.losses(*features_of(2), [target(2)._replace(masks=None), NOTHING._replace(masks=None)])
    with pytest.raises(AssertionError, match="boxes alone"):
        network.masks(
            network.pyramid(features_of(1)[0]),
            [torch.zeros(0, 4)],
            [torch.zeros(0, dtype=torch.int64)],
        )


def test_losses_are_sums_over_images():
    network = detector(EVERYTHING)
    features, sizes = features_of(1)
    once = network.losses(features, sizes, [target(4)])
    twice = network.losses(features.repeat(2, 1, 1, 1), sizes.repeat(2, 1), [target(4)] * 2)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], 2 * value, msg=name)
    assert float(once["box0_class"].detach()) == pytest.approx(np.log(CLASSES + 1), rel=0.2), (
        "a mean over boxes, at the start"
    )
    assert float(once["mask"].detach()) == pytest.approx(np.log(2), rel=0.1)


@torch.no_grad()
def test_detections_lie_on_their_image_and_do_not_depend_on_others():
    network = detector().eval()
    features, sizes = features_of(2)
    found = network.detect(network.pyramid(features), sizes)
    for image, raw in enumerate(found):
        height, width = sizes[image].tolist()
        assert (
            raw.boxes.min() >= 0
            and raw.boxes[:, 2].max() <= width
            and raw.boxes[:, 3].max() <= height
        )
        assert (
            raw.scores.shape == (len(raw.boxes), CLASSES)
            and 0 < len(raw.boxes) <= SMALL.rpn_proposals
        )
        assert (raw.scores > 0).all() and (raw.scores.sum(1) < 1).all()
        alone = network.detect(
            network.pyramid(features[image : image + 1]), sizes[image : image + 1]
        )[0]
        torch.testing.assert_close(alone, raw, atol=1e-3, rtol=1e-4)
        masks = network.masks(
            network.pyramid(features[image : image + 1]),
            [raw.boxes[:4]],
            [torch.tensor([0, 1, 2, 0])],
        )
        assert masks[0].shape == (4, 28, 28) and 0 < masks[0].min() and masks[0].max() < 1


def test_bfloat16_changes_little():
    network = detector(EVERYTHING).train()
    features, sizes = features_of(2)
    exact = network.losses(features, sizes, [target(4), target(3, 1)])
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.losses(features, sizes, [target(4), target(3, 1)])
        with torch.no_grad():
            raw = network.detect(network.pyramid(features), sizes)[0]
    for name, value in exact.items():
        assert rough[name].dtype == torch.float32
        if (
            "1" not in name and "2" not in name
        ):  # those depend on which boxes have just crossed a threshold
            torch.testing.assert_close(rough[name], value, atol=0.02, rtol=0.05, msg=name)
    assert raw.boxes.dtype == raw.scores.dtype == torch.float32


def test_two_processes_equal_one(tmp_path: Path):
    """One and two images: gradients of the losses' means, and the losses, for all three."""
    mp.spawn(_process, (tmp_path,), nprocs=2)
    network = detector(EVERYTHING, torch.float64)
    expected = gradients(network, range(3))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in expected.items():
        torch.testing.assert_close(
            parts[0][name] + parts[1][name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def gradients(network: Detector, images: range) -> dict[str, Tensor]:
    """What these of the three images give of a step's losses and gradients."""
    features, sizes = features_of(3)
    targets = [target(4), target(1, 1), target(7, 2)]
    chosen = list(images)
    losses = network.losses(
        features[chosen].double(), sizes[chosen], [targets[image] for image in chosen]
    )
    (torch.stack(list(losses.values())).sum() / 3).backward()
    return {name: value.detach() for name, value in losses.items()} | {
        name: p.grad for name, p in network.named_parameters()
    }


def _process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(
        gradients(detector(EVERYTHING, torch.float64), range(1) if rank == 0 else range(1, 3)),
        folder / f"{rank}.pt",
    )
    dist.destroy_process_group()


def test_initial_values():
    network = detector()
    values = {name: parameter.clone() for name, parameter in network.named_parameters()}
    assert values.keys() == network.state_dict().keys(), "nothing but parameters is stored"
    initialise(network)
    assert all(
        torch.equal(parameter, values[name]) for name, parameter in network.named_parameters()
    )
    for name, value in values.items():
        if value.ndim == 1:
            norm = isinstance(network.get_submodule(name.rpartition(".")[0]), torch.nn.LayerNorm)
            assert torch.equal(
                value, torch.full_like(value, float(norm and name.endswith("weight")))
            ), name
        else:
            assert value.unique().numel() > 0.9 * value.numel(), name
    for part, deviation in (
        ("proposals.head", 0.01),
        ("class_logits", 0.01),
        ("box_deltas", 0.001),
        ("mask_fcn_logits", 0.001),
    ):
        drawn = torch.cat(
            [value.flatten() for name, value in values.items() if part in name and value.ndim > 1]
        )
        assert float(drawn.std()) == pytest.approx(deviation, rel=0.3), part


@torch.no_grad()
def test_built_on_meta_equals_built_at_once():
    with torch.device("meta"):
        network = Detector(DIM, patch_size=PATCH, num_classes=CLASSES, config=SMALL)
    network._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
    initialise(network)
    features, sizes = features_of(2)
    found, others = (
        each.eval().detect(each.pyramid(features), sizes) for each in (network, detector())
    )
    for raw, expected in zip(found, others, strict=True):
        torch.testing.assert_close(raw, expected)


@torch.no_grad()
def test_the_giant_at_1280_pixels_on_meta():
    """All that has a fixed shape, at the paper's patch of 14 px in place of 16: 91 patches a
    side."""
    with torch.device("meta"):
        network = Detector(GIANT.dim, patch_size=14, num_classes=80, config=DetectorConfig())
        maps = network.pyramid(torch.empty(1, 91, 91, GIANT.dim))
        assert [feature.shape[2] for feature in maps] == [364, 182, 91, 46, 23]
        scores, deltas = network.proposals.head(maps)
        anchors = network.proposals.anchor_generator(maps)
        assert (
            sum(level.numel() for level in scores)
            == len(anchors)
            == sum(level.numel() for level in deltas) // 4
        )
        logits, boxes = network.cascade.box_heads[2](torch.empty(512, 256, 7, 7))
        assert logits.shape == (512, 81) and boxes.shape == (512, 4)
        assert network.cascade.mask_head(torch.empty(9, 256, 14, 14)).shape == (9, 80, 28, 28)


def test_the_config_is_plain_and_checked():
    assert from_dict(DetectorConfig, to_dict(SMALL)) == SMALL
    with pytest.raises(ValueError, match="anchor_sizes .*give 5"):
        replace(SMALL, anchor_sizes=(8.0, 16.0))
    with pytest.raises(ValueError, match="one of each per stage"):
        replace(SMALL, stage_ious=(0.5,))
    with pytest.raises(ValueError, match="at least 1"):
        replace(SMALL, roi_samples=0)


@pytest.mark.slow
def test_it_learns_eight_images():
    """Squares and bars of two kinds on 96 px: after 300 steps each is found at IoU .75, with its
    label, outline and no rival."""
    torch.manual_seed(0)
    config = ModelConfig(dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=96, patch_size=8)
    trunk = ImageTrunk(config, window=4, num_global=1)
    trunk.init_weights()
    small = replace(SMALL, pyramid_dim=24, anchor_sizes=(8.0, 16.0, 32.0, 64.0, 96.0), box_dim=64)
    network = Detector(config.dim, patch_size=8, num_classes=2, config=small)
    initialise(network)
    images, targets = pictures(8)
    sizes = torch.full((8, 2), 96)
    optimizer = torch.optim.AdamW(
        [*trunk.parameters(), *network.parameters()], lr=1e-3, weight_decay=0.01
    )
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * (0.1 if step >= 240 else 1)
        chosen = [2 * (step % 4), 2 * (step % 4) + 1]
        losses = network.losses(
            trunk(images[chosen]), sizes[chosen], [targets[image] for image in chosen]
        )
        optimizer.zero_grad()
        (torch.stack(list(losses.values())).sum() / 2).backward()
        optimizer.step()
    trunk.eval(), network.eval()
    with torch.no_grad():
        features = trunk(images)
        found = network.detect(network.pyramid(features), sizes)
        shares = [recalled(raw, truth) for raw, truth in zip(found, targets, strict=True)]
        masks = network.masks(
            network.pyramid(features),
            [truth.boxes for truth in targets],
            [truth.labels for truth in targets],
        )
    assert sum(shares) / 8 >= 0.9
    agreement = [
        ((mask > 0.5) == outline(truth)).float().mean()
        for mask, truth in zip(masks, targets, strict=True)
    ]
    assert torch.stack(agreement).mean() > 0.9


def pictures(count: int) -> tuple[Tensor, list[Target]]:
    """Images [count, 3, 96, 96] with two or three shapes each: label 0 fills its box, 1 is the
    ellipse in it."""
    rng = np.random.default_rng(0)
    images = (
        torch.zeros(count, 3, 96, 96)
        + 0.1 * torch.from_numpy(rng.standard_normal((count, 3, 96, 96))).float()
    )
    targets = []
    y, x = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    for image in images:
        boxes, labels, masks = [], [], []
        for corner in rng.permutation(4)[: rng.integers(2, 4)]:
            left, top = (
                48 * (corner % 2) + rng.integers(0, 12),
                48 * (corner // 2) + rng.integers(0, 12),
            )
            width, height = rng.integers(20, 36, 2)
            kind = int(rng.integers(2))
            inside = (x > left) & (x < left + width) & (y > top) & (y < top + height)
            if kind:
                inside = ((x - left - width / 2) / (width / 2)) ** 2 + (
                    (y - top - height / 2) / (height / 2)
                ) ** 2 < 1
            image[:, inside] = torch.from_numpy(rng.uniform(0.5, 1.0, 3)).float()[:, None]
            boxes.append([left, top, left + width, top + height])
            labels.append(kind)
            masks.append(inside.to(torch.uint8))
        targets.append(
            Target(torch.tensor(np.array(boxes)).float(), torch.tensor(labels), torch.stack(masks))
        )
    return images, targets


def recalled(raw: BoxPredictions, truth: Target) -> float:
    """Share of objects that the best detection of their label and place finds, if it is also surer
    than any other label's there."""
    table = compute_overlaps(truth.boxes, raw.boxes)
    hits = 0
    for row, kind in zip(table, truth.labels.tolist(), strict=True):
        near = row > 0.3
        if near.any():
            scores = raw.scores[near]
            best = int(scores[:, kind].argmax())
            hits += bool(
                row[near][best] >= 0.75
                and scores[best, kind] > 0.5
                and scores[best].argmax() == kind
            )
    return hits / len(truth.labels)


def outline(truth: Target) -> Tensor:
    """What a mask over each box should be: the ellipse or all of it, [n, 28, 28] bool."""
    y, x = torch.meshgrid(
        (torch.arange(28) - 13.5) / 14, (torch.arange(28) - 13.5) / 14, indexing="ij"
    )
    return (x**2 + y**2 < 1).expand(len(truth.labels), 28, 28) | (truth.labels == 0)[:, None, None]
