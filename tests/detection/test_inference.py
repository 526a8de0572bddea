"""Merging of views, with fake detectors that find colored areas, and once with a real network."""

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
    """The features of the fake trunk are the pixels."""
    return pixels.permute(0, 2, 3, 1)


class FakeDetector:
    """A detector whose pyramid is the features themselves."""

    def pyramid(self, features):
        return features


class ColorDetector(FakeDetector):
    """Detects label c where channel c is above .5, with exact boxes and masks from the pixels."""

    def __init__(self, scores=(0.9, 0.8, 0.7)):
        self.scores, self.num_mask_calls = scores, 0

    def predict_boxes(self, features, sizes):
        return [
            self.predict_image_boxes(image[:height, :width])
            for image, (height, width) in zip(features, sizes.tolist(), strict=True)
        ]

    def predict_image_boxes(self, image):
        boxes, scores = torch.zeros(0, 4), torch.zeros(0, 3)
        for label in range(3):
            rows, columns = (image[..., label] > 0.5).nonzero().unbind(1)
            if len(rows):
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                boxes = torch.cat([boxes, torch.tensor([box]).float()])
                scores = torch.cat([scores, torch.eye(3)[label : label + 1] * self.scores[label]])
        return BoxPredictions(boxes, scores)

    def predict_masks(self, features, boxes, labels):
        self.num_mask_calls += 1
        maps = features.permute(0, 3, 1, 2)
        return [
            roi_align(image[None], [image_boxes], 28, aligned=True)[
                torch.arange(len(image_boxes)), image_labels
            ]
            for image, image_boxes, image_labels in zip(maps, boxes, labels, strict=True)
        ]


class ConstantDetector(FakeDetector):
    """Returns the given predictions for one view after another, and constant masks."""

    def __init__(self, *predictions, masks=(1.0,)):
        self.predictions, self.mask_values = iter(predictions), iter(masks)

    def predict_boxes(self, features, sizes):
        return [next(self.predictions) for _ in sizes]

    def predict_masks(self, features, boxes, labels):
        value = next(self.mask_values)
        return [torch.full((len(image_boxes), 28, 28), value) for image_boxes in boxes]


def make_image():
    """An image [3, 24, 40] with a rectangle, a triangle and a bar, one per channel, asymmetric."""
    image = torch.zeros(3, 24, 40)
    image[0, 4:12, 6:18] = 1
    image[1, 8:24, 20:36] = torch.tril(torch.ones(16, 16))
    image[2, 20:22, 0:10] = 1
    return image


def make_view(*images, factors, side=SIDE, flipped=False):
    """A view of images that are enlarged by integer factors; the padding has random content."""
    pixels = torch.full((len(images), 3, side, side), 0.9)
    sizes = []
    for index, (image, factor) in enumerate(zip(images, factors, strict=True)):
        enlarged = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        height, width = enlarged.shape[1:]
        pixels[index, :, :height, :width] = enlarged
        sizes.append((height, width))
    view = ImageView(pixels, torch.tensor(sizes))
    return flip_view(view) if flipped else view


def make_blank_view(side=16, size=None, flipped=False):
    size = size or side
    return ImageView(torch.zeros(1, 3, side, side), torch.tensor([[size, size]]), flipped)


def get_sizes(*images):
    return torch.tensor([image.shape[1:] for image in images])


# Views --------------------------------------------------------------------------------------------


def test_flipping_leaves_the_padding_in_place():
    view = ImageView(torch.rand(3, 3, 8, 8), torch.tensor([[8, 8], [3, 5], [2, 1]]))
    flipped = flip_view(view)
    for before, after, (height, width) in zip(
        view.pixels, flipped.pixels, view.sizes.tolist(), strict=True
    ):
        assert torch.equal(after[:, :height, :width], before[:, :height, :width].flip(-1))
        assert torch.equal(after[:, :, width:], before[:, :, width:])
    assert flipped.flipped and torch.equal(flipped.sizes, view.sizes)
    restored = flip_view(flipped)
    assert torch.equal(restored.pixels, view.pixels) and not restored.flipped


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("factors", [(1, 1), (1, 2), (2, 1)])
def test_detections_are_in_the_pixels_of_the_image(factors, flipped):
    """Boxes and masks are the drawn areas at any size of the view, flipped or not."""
    images = make_image(), make_image().flip(1)[:, :, :30]
    view = make_view(*images, factors=factors, side=96, flipped=flipped)
    detections = detect_objects(trunk, ColorDetector(), [view], get_sizes(*images), CONFIG)
    for image, detected in zip(images, detections, strict=True):
        assert detected.labels.tolist() == [0, 1, 2]
        assert detected.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
        for label, box in enumerate(detected.boxes.tolist()):
            rows, columns = image[label].nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            rle = detected.masks[label]
            assert rle["size"] == list(image.shape[1:])
            num_wrong = (decode_rle(rle).bool() != image[label].bool()).sum()
            # On the slope of the triangle the mask's cells lie across pixels.
            assert num_wrong <= (16 if label == 1 else 0)


def test_many_views_agree_with_one():
    images = make_image(), make_image().flip(2)
    views = [
        make_view(*images, factors=(factor, factor), side=side, flipped=flipped)
        for factor, side in ((1, 64), (2, 96), (3, 128))
        for flipped in (False, True)
    ]
    sizes = get_sizes(*images)
    single = detect_objects(trunk, ColorDetector(), views[:1], sizes, CONFIG)
    merged = detect_objects(trunk, ColorDetector(), views, sizes, CONFIG)
    for expected, detected in zip(single, merged, strict=True):
        assert torch.equal(detected.boxes, expected.boxes)
        assert torch.equal(detected.labels, expected.labels)
        for label in (0, 2):
            masks = decode_rle(detected.masks[label]), decode_rle(expected.masks[label])
            assert torch.equal(*masks)


# Merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "gaussian", "hard"])
def test_boxes_of_all_views_go_through_one_nms(kind):
    generator = torch.Generator().manual_seed(0)
    predictions = []
    for side in (20, 40):
        corners = torch.rand(30, 2, generator=generator) * side / 2
        boxes = torch.cat([corners, corners + side / 2], 1)
        predictions.append(BoxPredictions(boxes, torch.rand(30, 3, generator=generator)))
    config = replace(CONFIG, nms=kind, detections_per_image=40, masks=False)
    views = [make_blank_view(64, 20), make_blank_view(64, 40, flipped=True)]
    (detected,) = detect_objects(
        trunk, ConstantDetector(*predictions), views, torch.tensor([[80, 60]]), config
    )
    plain_boxes = predictions[0].boxes * torch.tensor([3, 4, 3, 4])
    flipped_boxes = predictions[1].boxes[:, [2, 1, 0, 3]] * torch.tensor([-1.5, 2, -1.5, 2])
    flipped_boxes += torch.tensor([60, 0, 60, 0])
    expected = soft_nms(
        torch.cat([plain_boxes, flipped_boxes]),
        torch.cat([predicted.scores for predicted in predictions]),
        kind=kind,
        limit=40,
    )
    assert detected.masks is None and len(expected[0]) == 40
    for part, expected_part in zip(
        (detected.boxes, detected.scores, detected.labels), expected, strict=True
    ):
        torch.testing.assert_close(part, expected_part, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "mask_values, is_full", [((0.2, 0.9), True), ((0.2, 0.7), False), ((0.5,), True)]
)
def test_mask_probabilities_are_averaged(mask_values, is_full):
    predicted = BoxPredictions(torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([[0.9]]))
    views = [make_blank_view() for _ in mask_values]
    detector = ConstantDetector(*[predicted] * len(views), masks=mask_values)
    (detected,) = detect_objects(trunk, detector, views, torch.tensor([[32, 32]]), CONFIG)
    assert detected.boxes.tolist() == [[8, 8, 24, 24]]
    assert decode_rle(detected.masks[0]).sum() == (256 if is_full else 0)


def test_boxes_are_clipped_and_empty_ones_dropped():
    boxes = torch.tensor([[-3.0, 4, 12, 99], [20, 0, 30, 9], [3, 3, 3, 8]])
    predicted = BoxPredictions(boxes, torch.tensor([[0.9], [0.8], [0.7]]))
    (detected,) = detect_objects(
        trunk,
        ConstantDetector(predicted),
        [make_blank_view()],
        torch.tensor([[32, 32]]),
        CONFIG,
    )
    assert detected.boxes.tolist() == [[0, 8, 24, 32]]


# Special cases ------------------------------------------------------------------------------------


def test_masks_are_not_predicted_without_detections():
    images = torch.zeros(3, 10, 20), make_image()
    detector = ColorDetector()
    view = make_view(*images, factors=(1, 1))
    empty, full = detect_objects(trunk, detector, [view], get_sizes(*images), CONFIG)
    assert empty.boxes.shape == (0, 4) and empty.masks == []
    assert len(full.masks) == 3 and detector.num_mask_calls == 1
    view = make_view(images[0], factors=(1,))
    (empty,) = detect_objects(trunk, detector, [view], get_sizes(images[0]), CONFIG)
    assert empty.masks == [] and empty.labels.dtype == torch.long
    assert detector.num_mask_calls == 1


def test_masks_are_not_predicted_by_detectors_of_boxes():
    detector, image = ColorDetector(), make_image()
    view = make_view(image, factors=(1,))
    config = replace(CONFIG, masks=False)
    (detected,) = detect_objects(trunk, detector, [view], get_sizes(image), config)
    assert detected.masks is None and len(detected.boxes) == 3 and detector.num_mask_calls == 0


@pytest.mark.parametrize("field", ["boxes", "scores"])
def test_outputs_that_are_not_finite_are_refused(field):
    predicted = BoxPredictions(torch.tensor([[4.0, 4, 12, 12]]), torch.tensor([[0.9]]))
    predicted = predicted._replace(**{field: getattr(predicted, field) * torch.nan})
    with pytest.raises(ValueError, match="not finite"):
        detect_objects(
            trunk,
            ConstantDetector(predicted),
            [make_blank_view()],
            torch.tensor([[32, 32]]),
            CONFIG,
        )


def test_a_real_network_detects_within_each_image():
    """Two sizes, each also flipped: boxes lie within the images, masks have their sizes."""
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
    views += [flip_view(view) for view in views]
    sizes = torch.tensor([[50, 25], [20, 80]])
    detections = detect_objects(network, detector, views, sizes, config)
    for detected, (height, width) in zip(detections, sizes.tolist(), strict=True):
        boxes, scores = detected.boxes, detected.scores
        assert len(boxes) == len(detected.masks) == 7 and not boxes.requires_grad
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert (scores[:-1] >= scores[1:]).all()
        assert all(rle["size"] == [height, width] for rle in detected.masks)
