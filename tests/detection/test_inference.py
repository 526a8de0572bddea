"""Views and their merging, with a stand-in that finds coloured areas, and once with the whole
network."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import roi_align

from beit3.data.stores.rle import decode_rle
from beit3.detection.cascade import BoxPredictions
from beit3.detection.config import DetectorConfig
from beit3.detection.detector import Detector
from beit3.detection.inference import ImageView, detect_objects, flip_view
from beit3.detection.nms import soft_nms
from beit3.model.config import TINY
from beit3.model.trunk import ImageTrunk

CONFIG = DetectorConfig(nms="hard")
SIDE = 64


def trunk(pixels):
    """The stand-in's features are the pixels."""
    return pixels.permute(0, 2, 3, 1)


class Flat:
    """A detector whose pyramid is the features themselves."""

    def pyramid(self, features):
        return features


class Finder(Flat):
    """Label c is where channel c is above .5; its box is exact, its mask is read from the
    pixels."""

    def __init__(self, scores=(0.9, 0.8, 0.7)):
        self.scores, self.asked = scores, 0

    def detect(self, features, sizes):
        found = []
        for image, (height, width) in zip(features, sizes.tolist(), strict=True):
            boxes, scores = [], []
            for label in range(3):
                rows, columns = (image[:height, :width, label] > 0.5).nonzero().unbind(1)
                if len(rows):
                    boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    scores.append(torch.eye(3)[label] * self.scores[label])
            found.append(
                BoxPredictions(
                    torch.tensor(boxes).float().view(-1, 4),
                    torch.stack(scores) if scores else torch.zeros(0, 3),
                )
            )
        return found

    def masks(self, features, boxes, labels):
        self.asked += 1
        maps = features.permute(0, 3, 1, 2)
        return [
            roi_align(image[None], [own], 28, aligned=True)[torch.arange(len(own)), label]
            for image, own, label in zip(maps, boxes, labels, strict=True)
        ]


class Fixed(Flat):
    """Gives each view in turn what it was told to, boxes in the view's pixels, and constant
    masks."""

    def __init__(self, *raws, masks=(1.0,)):
        self.raws, self.constants = iter(raws), iter(masks)

    def detect(self, features, sizes):
        return [next(self.raws) for _ in sizes]

    def masks(self, features, boxes, labels):
        constant = next(self.constants)
        return [torch.full((len(own), 28, 28), constant) for own in boxes]


def picture():
    """[3, 24, 40]: a rectangle, a triangle and a bar, one channel each, nowhere symmetric."""
    image = torch.zeros(3, 24, 40)
    image[0, 4:12, 6:18] = 1
    image[1, 8:24, 20:36] = torch.tril(torch.ones(16, 16))
    image[2, 20:22, 0:10] = 1
    return image


def shown(*images, factors, side=SIDE, mirrored=False):
    """A view of these images, each enlarged by a whole factor, at the top left of a square full of
    nonsense."""
    pixels = torch.full((len(images), 3, side, side), 0.9)
    sizes = []
    for place, (image, factor) in enumerate(zip(images, factors, strict=True)):
        large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        pixels[place, :, : large.shape[1], : large.shape[2]] = large
        sizes.append(large.shape[1:])
    view = ImageView(pixels, torch.tensor(sizes))
    return flip_view(view) if mirrored else view


def sizes_of(*images):
    return torch.tensor([image.shape[1:] for image in images])


# Views --------------------------------------------------------------------------------------------


def test_mirror_keeps_to_the_valid_width():
    view = ImageView(torch.rand(3, 3, 8, 8), torch.tensor([[8, 8], [3, 5], [2, 1]]))
    turned = flip_view(view)
    for before, after, (height, width) in zip(
        view.pixels, turned.pixels, view.sizes.tolist(), strict=True
    ):
        assert torch.equal(after[:, :height, :width], before[:, :height, :width].flip(-1))
        assert torch.equal(after[:, :, width:], before[:, :, width:])
    assert turned.mirrored and torch.equal(turned.sizes, view.sizes)
    assert torch.equal(flip_view(turned).pixels, view.pixels) and not flip_view(turned).mirrored


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("factors", [(1, 1), (1, 2), (2, 1)])
def test_one_view_gives_the_images_own_pixels(factors, mirrored):
    """Boxes and masks are the areas that were painted, whatever the view's size and side."""
    images = picture(), picture().flip(1)[:, :, :30]
    view = shown(*images, factors=factors, side=96, mirrored=mirrored)
    for image, found in zip(
        images, detect_objects(trunk, Finder(), [view], sizes_of(*images), CONFIG), strict=True
    ):
        assert found.labels.tolist() == [0, 1, 2] and found.scores.tolist() == pytest.approx(
            [0.9, 0.8, 0.7]
        )
        for label, (box, rle) in enumerate(zip(found.boxes.tolist(), found.masks, strict=True)):
            rows, columns = image[label].nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert rle["size"] == list(image.shape[1:])
            missed = decode_rle(rle).bool() != image[label].bool()
            assert missed.sum() <= (0 if label != 1 else 16), (
                "on the triangle's slope cells of the mask lie across pixels"
            )


def test_many_views_agree_with_one():
    image, other = picture(), picture().flip(2)
    views = [
        shown(image, other, factors=(f, f), side=s, mirrored=m)
        for f, s in ((1, 64), (2, 96), (3, 128))
        for m in (False, True)
    ]
    one = detect_objects(trunk, Finder(), views[:1], sizes_of(image, other), CONFIG)
    many = detect_objects(trunk, Finder(), views, sizes_of(image, other), CONFIG)
    for single, merged in zip(one, many, strict=True):
        assert torch.equal(single.boxes, merged.boxes) and torch.equal(single.labels, merged.labels)
        for label in (0, 2):
            assert torch.equal(decode_rle(single.masks[label]), decode_rle(merged.masks[label]))


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "gaussian", "hard"])
def test_the_union_goes_through_one_nms(kind):
    generator = torch.Generator().manual_seed(0)
    raws = []
    for side in (20, 40):
        corner = torch.rand(30, 2, generator=generator) * side / 2
        raws.append(
            BoxPredictions(
                torch.cat([corner, corner + side / 2], 1), torch.rand(30, 3, generator=generator)
            )
        )
    config = replace(CONFIG, nms=kind, detections_per_image=40)
    views = [
        ImageView(torch.zeros(1, 3, 64, 64), torch.tensor([[side, side]]), mirrored)
        for side, mirrored in ((20, False), (40, True))
    ]
    (found,) = detect_objects(
        trunk, Fixed(*raws), views, torch.tensor([[80, 60]]), replace(config, masks=False)
    )
    turned = raws[1].boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.5, 2, -1.5, 2]) + torch.tensor(
        [60, 0, 60, 0]
    )
    union = torch.cat([raws[0].boxes * torch.tensor([3, 4, 3, 4]), turned])
    wanted = soft_nms(union, torch.cat([raws[0].scores, raws[1].scores]), kind=kind, limit=40)
    assert found.masks is None and len(wanted[0]) == 40
    for part, expected in zip((found.boxes, found.scores, found.labels), wanted, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("values, full", [((0.2, 0.9), True), ((0.2, 0.7), False), ((0.5,), True)])
def test_probabilities_are_averaged(values, full):
    raw = BoxPredictions(torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([[0.9]]))
    views = [ImageView(torch.zeros(1, 3, 16, 16), torch.tensor([[16, 16]])) for _ in values]
    (found,) = detect_objects(
        trunk, Fixed(*[raw] * len(values), masks=values), views, torch.tensor([[32, 32]]), CONFIG
    )
    assert found.boxes.tolist() == [[8, 8, 24, 24]] and decode_rle(found.masks[0]).sum() == (
        256 if full else 0
    )


def test_boxes_end_at_the_image():
    raw = BoxPredictions(
        torch.tensor([[-3.0, 4, 12, 99], [20, 0, 30, 9], [3, 3, 3, 8]]),
        torch.tensor([[0.9], [0.8], [0.7]]),
    )
    (found,) = detect_objects(
        trunk,
        Fixed(raw),
        [ImageView(torch.zeros(1, 3, 16, 16), torch.tensor([[16, 16]]))],
        torch.tensor([[32, 32]]),
        CONFIG,
    )
    assert found.boxes.tolist() == [[0, 8, 24, 32]], "what lies outside or has no area is left out"


# What is odd --------------------------------------------------------------------------------------


def test_nothing_found():
    images = torch.zeros(3, 10, 20), picture()
    finder = Finder()
    empty, full = detect_objects(
        trunk, finder, [shown(*images, factors=(1, 1))], sizes_of(*images), CONFIG
    )
    assert (
        empty.boxes.shape == (0, 4)
        and empty.masks == []
        and len(full.masks) == 3
        and finder.asked == 1
    )
    alone = detect_objects(
        trunk, finder, [shown(images[0], factors=(1,))], sizes_of(images[0]), CONFIG
    )
    assert alone[0].masks == [] and alone[0].labels.dtype == torch.long and finder.asked == 1


def test_boxes_alone():
    finder = Finder()
    (found,) = detect_objects(
        trunk,
        finder,
        [shown(picture(), factors=(1,))],
        sizes_of(picture()),
        replace(CONFIG, masks=False),
    )
    assert found.masks is None and len(found.boxes) == 3 and finder.asked == 0


@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_not_finite(field):
    raw = BoxPredictions(torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([[0.9]]))
    raw = raw._replace(**{field: getattr(raw, field) * torch.nan})
    with pytest.raises(ValueError, match="not finite"):
        detect_objects(
            trunk,
            Fixed(raw),
            [ImageView(torch.zeros(1, 3, 16, 16), torch.tensor([[16, 16]]))],
            torch.tensor([[32, 32]]),
            CONFIG,
        )


def test_the_whole_network():
    """Two sizes and both sides: boxes within each image, masks of its size, no gradient."""
    torch.manual_seed(0)
    config = DetectorConfig(
        pyramid_dim=16,
        anchor_sizes=(16.0, 24.0, 32.0, 64.0, 96.0),
        rpn_top_test=40,
        rpn_proposals=30,
        box_convs=1,
        box_dim=16,
        mask_convs=1,
        detections_per_image=7,
    )
    network = ImageTrunk(replace(TINY, image_size=64, patch_size=16), window=2, num_global=1).eval()
    detector = Detector(network.config.dim, patch_size=16, num_classes=3, config=config).eval()
    for module in (network, detector):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    views = [
        ImageView(
            torch.randn(2, 3, side, side), torch.tensor([[side, side // 2], [side // 4, side]])
        )
        for side in (64, 128)
    ]
    originals = torch.tensor([[50, 25], [20, 80]])
    found = detect_objects(network, detector, [*views, *map(flip_view, views)], originals, config)
    for image, (height, width) in zip(found, originals.tolist(), strict=True):
        assert len(image.boxes) == len(image.masks) == 7 and not image.boxes.requires_grad
        assert (
            (image.boxes >= 0).all()
            and (image.boxes[:, 2] <= width).all()
            and (image.boxes[:, 3] <= height).all()
        )
        assert (image.scores[:-1] >= image.scores[1:]).all() and all(
            rle["size"] == [height, width] for rle in image.masks
        )
