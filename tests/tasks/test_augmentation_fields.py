"""Every augmentation field of every task: it changes the examples, and its extreme is what it says.

The image's red is its x and its green its y, so a crop's area and a mirror image can be read from
its colors. With all fields off, an example of training is that of evaluation.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from beit3.data.views.augment import rand_augment, rand_augment_timm
from beit3.data.views.masking import draw_block_mask
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.segmentation import (
    SegmentationAugmentation,
    distort_colors,
    resize_image,
)
from beit3.data.views.transforms import make_two_views
from beit3.images import open_image
from beit3.model.config import TINY
from beit3.task import Task, load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizerConfig
from tests.tasks.dense import ade20k_config, coco_config

SIDE, IMAGE_SIDE, NUM_SEEDS = 32, 96, 16
MODEL = replace(TINY, dim=16, depth=2, num_heads=2, ffn_dim=16)
OFF: dict[str, Any] = {"crop": (1.0, 1.0), "flip": 0.0}
PRETRAIN_OFF: dict[str, Any] = {
    **{"image_crop": (1.0, 1.0), "pair_crop": (1.0, 1.0), "image_flip": 0.0, "pair_flip": 0.0},
    **{"color_jitter": 0.0, "pair_masking": "both", "token_size": SIDE},
}
PLAIN: dict[str, dict[str, Any]] = {
    "vqa": {**OFF, "rand_augment": False, "num_answers": 2},
    "captioning": {**OFF, "rand_augment": False},
    "imagenet": {
        **{**OFF, "auto_augment": False, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
        "num_classes": 4,
    },
    "nlvr2": OFF,
    "retrieval": OFF,
    "images": PRETRAIN_OFF,
    "pairs": PRETRAIN_OFF,
    "vqkd": OFF,
    "coco": {"scale": (1.0, 1.0), "flip": 0.0},
    "ade20k": {
        "train_view": SegmentationAugmentation(
            *(SIDE, SIDE, 4 * SIDE, (1.0, 1.0)), largest_share=1.0, flip=0.0, distort=False
        )
    },
}
"""Task, or source of pretraining -> fields that turn every augmentation off."""

CROPS = [
    *((name, "crop") for name in ("vqa", "captioning", "imagenet", "nlvr2", "retrieval", "vqkd")),
    *(("images", "image_crop"), ("pairs", "pair_crop")),
]
FLIPS = [
    *((name, "flip") for name in ("vqa", "captioning", "imagenet", "nlvr2", "retrieval", "vqkd")),
    *(("images", "image_flip"), ("pairs", "pair_flip"), ("coco", "flip"), ("ade20k", "flip")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Returns a folder with an image, the label map of its quarters, and a text tokenizer."""
    folder = tmp_path_factory.mktemp("augmentation")
    ramp = np.linspace(0, 255, IMAGE_SIDE).round().astype(np.uint8)
    pixels = np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None], ramp[:, None]
    pixels[: IMAGE_SIDE // 3, : IMAGE_SIDE // 4, 2] = 200
    Image.fromarray(pixels).save(folder / "image.png")
    half = np.arange(IMAGE_SIDE) // (IMAGE_SIDE // 2)
    Image.fromarray((2 * half[:, None] + half[None]).astype(np.uint8)).save(folder / "map.png")
    texts = ["a red circle left of a blue square"] * 4
    TextTokenizer.train(texts, vocab_size=60, model_type="bpe").save(folder / "text.model")
    return folder


def make_task(name: str, files: Path, **fields: Any) -> Task:
    """Makes a task whose augmentation is off but for `fields`."""
    if name == "ade20k" and "train_view" not in fields:
        fields = {"train_view": replace(PLAIN[name]["train_view"], **fields)}
    fields = PLAIN[name] | fields
    if name == "ade20k":
        return load_task(name)(ade20k_config(**fields))
    if name == "coco":
        image = Preprocessing(SIDE, resize="fit")
        return load_task(name)(coco_config(image=image, **fields))
    task_class = load_task("pretrain" if name in ("images", "pairs") else name)
    model: Any = replace(MODEL, final_norm=name != "imagenet")
    if name == "vqkd":
        model = VisualTokenizerConfig(
            **{"image_size": SIDE, "patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2},
            **{"ffn_dim": 16, "decoder_depth": 1, "num_codes": 8, "code_dim": 4, "teacher_dim": 45},
        )
        fields = {**fields, "teacher": "gradients"}
    config = task_class.Config(**{"model": model, "image": Preprocessing(SIDE)} | fields)
    tokenizer = TextTokenizer(files / "text.model")
    return task_class(config, tokenizer=None if name == "vqkd" else tokenizer)


def make_record(name: str, files: Path) -> dict[str, Any]:
    image = str(files / "image.png")
    record: dict[str, Any] = {"id": "1", "image": image}
    if name in ("vqa", "captioning", "nlvr2", "retrieval", "pairs"):
        record["text"] = "a red circle left of a blue square"
    if name == "nlvr2":
        record["image2"] = image
    if name == "coco":
        box = [0.0, 0.0, IMAGE_SIDE / 2, IMAGE_SIDE / 4]
        corners = [[0, 0, box[2], 0, box[2], box[3], 0, box[3]]]
        record["objects"] = [{"label": 1, "box": box, "crowd": False, "segmentation": corners}]
    if name == "ade20k":
        record |= {"label_map": str(files / "map.png"), "labels": {"num_classes": 4}}
    return record


def make_example(name: str, task: Task, files: Path, seed: int, train: bool = True) -> Any:
    return task.example(make_record(name, files), train, rng=np.random.default_rng(seed))


def list_images(example: Mapping[str, Tensor]) -> list[Tensor]:
    """Returns the images of an example: two of NLVR2, and both views of pretraining."""
    images = [example[key] for key in ("image", "token_image") if key in example]
    return [image for stack in images for image in (stack if stack.ndim == 4 else [stack])]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def mirror(images: list[Tensor]) -> list[Tensor]:
    return [image.flip(-1) for image in images]


def get_plain(name: str, files: Path) -> list[Tensor]:
    return list_images(make_example(name, make_task(name, files), files, 0))


def measure_area(image: Tensor) -> float:
    """Returns the fraction of the whole image's area that a crop shows."""
    red, green = ((image[c].max() - image[c].min()).item() / 255 for c in (0, 1))
    return red * green


@pytest.mark.parametrize("name", PLAIN)
def test_with_all_fields_off_training_sees_what_evaluation_sees(name, files):
    task = make_task(name, files)
    for seed in range(3):
        images = list_images(make_example(name, task, files, seed))
        if name == "ade20k":  # evaluation takes the whole image and resizes it later
            expected = [resize_image(open_image(str(files / "image.png")), SIDE, SIDE)]
        else:
            expected = list_images(make_example(name, task, files, 0, train=False))
        assert equal(images, expected)


@pytest.mark.parametrize(("name", "field"), CROPS)
def test_a_crop_shows_the_fraction_of_the_area_that_it_names(name, field, files):
    for scale in ((0.3, 0.3), (0.6, 0.6)):
        task = make_task(name, files, **{field: scale})
        per_seed = [list_images(make_example(name, task, files, seed)) for seed in range(NUM_SEEDS)]
        areas = [measure_area(image) for images in per_seed for image in images]
        assert np.mean(areas) == pytest.approx(scale[0], rel=0.12)
        assert len({images[0].numpy().tobytes() for images in per_seed}) > NUM_SEEDS // 2
        plain = list_images(make_example(name, task, files, 0, train=False))
        assert equal(plain, get_plain(name, files)), "evaluation crops nothing"
    task = make_task(name, files, **{field: (0.2, 1.0)})
    areas = [
        measure_area(list_images(make_example(name, task, files, seed))[0])
        for seed in range(2 * NUM_SEEDS)
    ]
    assert min(areas) < 0.45 and max(areas) > 0.75, "crops fill the range"


@pytest.mark.parametrize(("name", "field"), FLIPS)
def test_a_flip_of_rate_1_mirrors_and_of_one_half_mirrors_half(name, field, files):
    plain = get_plain(name, files)
    always, half = (make_task(name, files, **{field: rate}) for rate in (1.0, 0.5))
    num_flipped = num_images = 0
    for seed in range(NUM_SEEDS):
        assert equal(list_images(make_example(name, always, files, seed)), mirror(plain))
        for image, straight in zip(
            list_images(make_example(name, half, files, seed)), plain, strict=True
        ):
            flipped = torch.equal(image, straight.flip(-1))
            assert flipped or torch.equal(image, straight)
            num_flipped, num_images = num_flipped + flipped, num_images + 1
    assert 0.2 < num_flipped / num_images < 0.8
    assert name == "ade20k" or equal(
        list_images(make_example(name, always, files, 0, train=False)), plain
    )


def test_crops_and_flips_of_pretraining_belong_to_their_sources(files):
    """Fields of images leave pairs as they are, and the other way round."""
    for name, other in (("images", "pair"), ("pairs", "image")):
        fields = {f"{other}_crop": (0.3, 0.3), f"{other}_flip": 1.0}
        task = make_task(name, files, **fields)
        assert equal(list_images(make_example(name, task, files, 1)), get_plain(name, files))


@pytest.mark.parametrize("name", ["images", "pairs"])
def test_color_jitter_changes_the_colors_of_images_and_pairs_by_its_strength(name, files):
    image, plain = open_image(str(files / "image.png")), get_plain(name, files)
    for strength in (0.1, 0.4):
        task = make_task(name, files, color_jitter=strength)
        for seed in range(4):
            images = list_images(make_example(name, task, files, seed))
            views = make_two_views(
                image,
                np.random.default_rng(seed),
                image_size=SIDE,
                token_size=SIDE,
                scale=(1.0, 1.0),
                hflip=0.0,
                color_jitter=strength,
            )
            assert equal(images, list(views)) and not equal(images, plain)


@pytest.mark.parametrize(
    ("name", "field", "augment"),
    [
        ("vqa", "rand_augment", rand_augment),
        ("captioning", "rand_augment", rand_augment),
        ("imagenet", "auto_augment", rand_augment_timm),
    ],
)
def test_two_random_operations_change_training_images(name, field, augment, files):
    task, image = make_task(name, files, **{field: True}), open_image(str(files / "image.png"))
    plain, num_changed = get_plain(name, files), 0
    for seed in range(NUM_SEEDS):
        images = list_images(make_example(name, task, files, seed))
        expected = augment(image, np.random.default_rng(seed))
        assert equal(images, [Preprocessing(SIDE).preprocess(expected)])
        num_changed += not equal(images, plain)
    assert num_changed > NUM_SEEDS // 3
    assert equal(list_images(make_example(name, task, files, 0, train=False)), plain)


def test_erasing_fills_a_box_with_noise_as_often_as_it_says(files):
    counts = {}
    for rate in (0.0, 0.5, 1.0):
        task = make_task("imagenet", files, erasing=rate)
        boxes = [
            make_example("imagenet", task, files, seed).get("erased") for seed in range(NUM_SEEDS)
        ]
        counts[rate] = sum(box is not None for box in boxes)
    assert counts[0.0] == 0 and 0 < counts[0.5] < counts[1.0] == NUM_SEEDS
    assert "erased" not in make_example("imagenet", task, files, 0, train=False)
    example = make_example("imagenet", task, files, 0)
    top, left, noise = example["erased"]
    pixels = task.normalize_images(task.collate([example]))
    plain = task.normalize_images({"image": example["image"][None]})
    changed = (pixels != plain).any(1)[0]
    expected = torch.zeros_like(changed)
    expected[top : top + noise.shape[1], left : left + noise.shape[2]] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_mixing_takes_its_strengths_and_smoothing_from_the_config(
    mixup, cutmix, files, monkeypatch
):
    task = make_task("imagenet", files, mixup=mixup, cutmix=cutmix, label_smoothing=0.2)
    calls: list[dict[str, Any]] = []

    def record_call(images: Tensor, targets: Tensor, generator: Any, **options: Any):
        calls.append(options)
        return images, targets

    monkeypatch.setattr("beit3.tasks.imagenet.mix_batch", record_call)
    task.init_weights(0)
    batch = {"image": torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), "target": torch.arange(2)}
    task.eval()(batch)
    assert calls == [], "evaluation mixes nothing"
    task.train()(batch)
    assert calls == [{"mixup": mixup, "cutmix": cutmix, "smoothing": 0.2}]


def test_smoothing_spreads_probability_with_and_without_mixing(files):
    """The head's bias is a distribution, so that the loss shows the target."""
    batch = {"image": torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), "target": torch.zeros(2)}
    batch["target"] = batch["target"].long()
    log_probabilities = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
    expected = -2 * (0.85 * log_probabilities[0] + 0.15 * log_probabilities[1])
    for mixup in (0.0, 0.8):  # the images and labels of the batch are alike: mixing changes nothing
        task: Any = make_task("imagenet", files, mixup=mixup, label_smoothing=0.2)
        task.init_weights(0)
        with torch.no_grad():
            task.head.weight.zero_()
            task.head.bias.copy_(log_probabilities)
        loss = task.train()(batch)["losses"]["loss"]
        torch.testing.assert_close(loss, expected)
        sharp = task.eval()(batch)["losses"]["loss"]
        torch.testing.assert_close(sharp, -2 * log_probabilities[0])


@pytest.mark.parametrize(("factor", "side"), [(0.5, 16), (1.0, 32), (2.0, 32)])
def test_large_scale_jitter_scales_images_and_objects(factor, side, files):
    task = make_task("coco", files, scale=(factor, factor))
    for seed in range(4):
        example = make_example("coco", task, files, seed)
        assert example["size"].tolist() == [side, side]
        area = measure_area(example["image"][:, :side, :side])
        assert area == pytest.approx(min(1, 1 / factor**2), rel=0.15)
        if factor <= 1:
            assert example["boxes"][0].tolist() == pytest.approx([0, 0, side / 2, side / 4], abs=1)


def test_large_scale_jitter_draws_from_its_whole_range(files):
    task = make_task("coco", files, scale=(0.25, 1.0))
    sides = [int(make_example("coco", task, files, seed)["size"][0]) for seed in range(40)]
    assert min(sides) < 14 and max(sides) > 26 and min(sides) >= 8


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_segmentation_scales_and_crops_images_and_label_maps(factor, files):
    task = make_task("ade20k", files, scale=(factor, factor))
    side = min(SIDE, int(SIDE * factor))
    maps = []
    for seed in range(NUM_SEEDS):
        example = make_example("ade20k", task, files, seed)
        assert example["size"].tolist() == [side, side]
        area = measure_area(example["image"][:, :side, :side])
        assert area == pytest.approx(min(1, 1 / factor**2), rel=0.15)
        assert (example["label_map"][side:] == 255).all()
        maps.append(example["label_map"].numpy().tobytes())
    assert (len(set(maps)) > 4) == (factor > 1), "crops lie anywhere"


def test_segmentation_avoids_crops_of_one_class(files):
    """At four times the size most crops lie in one quarter of the image, a class of its own."""
    share: dict[float, list[float]] = {}
    for largest_share in (0.75, 1.0):
        task = make_task("ade20k", files, scale=(4.0, 4.0), largest_share=largest_share)
        examples = [make_example("ade20k", task, files, seed) for seed in range(NUM_SEEDS)]
        share[largest_share] = [
            float(torch.bincount(example["label_map"].flatten().long()).max()) / SIDE**2
            for example in examples
        ]
    assert np.mean(share[0.75]) < 0.8 < np.mean(share[1.0])
    assert sum(value < 0.75 for value in share[0.75]) > NUM_SEEDS // 2


def test_distortion_changes_the_colors_of_segmentation_and_no_label(files):
    task, plain = make_task("ade20k", files, distort=True), make_task("ade20k", files)
    num_changed = 0
    for seed in range(8):
        distorted = make_example("ade20k", task, files, seed)
        straight = make_example("ade20k", plain, files, seed)
        assert torch.equal(distorted["label_map"], straight["label_map"])
        num_changed += not torch.equal(distorted["image"], straight["image"])
    assert num_changed == 8
    rng = np.random.default_rng(0)
    assert not torch.equal(distort_colors(straight["image"], rng), straight["image"])


@pytest.mark.parametrize(
    ("name", "field", "key"),
    [
        ("images", "image_mask_rate", "image_mask"),
        ("pairs", "image_mask_rate", "image_mask"),
        ("pairs", "pair_text_mask_rate", "text_target"),
        ("captioning", "mask_rate", "text_target"),
    ],
)
def test_masks_hide_the_fraction_that_they_name(name, field, key, files):
    for rate in (0.25, 0.75):
        task = make_task(name, files, **{field: rate})
        for seed in range(4):
            example = make_example(name, task, files, seed)
            if key == "image_mask":
                assert int(example[key].sum()) == int(rate * len(example[key]))
                continue
            num_tokens = int((~example["text_padding"]).sum())
            num_maskable = num_tokens - 2
            expected = round(rate * num_maskable)
            if name == "captioning":  # rounds half up, over all tokens
                expected = int(num_tokens * rate + 0.5)
            assert int((example[key] != -100).sum()) == expected


@pytest.mark.parametrize("min_block", [1, 4, 16])
@pytest.mark.parametrize("name", ["images", "pairs"])
def test_blocks_of_patches_have_the_smallest_area_of_the_config(name, min_block, files):
    model = replace(MODEL, image_size=128)
    fields = {"model": model, "image": Preprocessing(128), "image_mask_rate": 0.4}
    task = make_task(name, files, min_mask_block=min_block, **fields)
    for seed in range(4):
        example = make_example(name, task, files, seed)
        expected = draw_block_mask((16, 16), 102, np.random.default_rng(seed), min_block=min_block)
        assert torch.equal(example["image_mask"], torch.from_numpy(expected.reshape(-1)))


def test_pretraining_replaces_tokens_by_pieces_alone_and_masks_every_piece(files):
    """The fields of a text's rates belong to texts, and those of a pair to pairs."""
    tokenizer = TextTokenizer(files / "text.model")
    first, end = tokenizer.first_piece, tokenizer.mask
    task = make_task("images", files, text_mask_rate=1.0, monomodal_text_length=128)
    record = {"id": "1", "text": [first, *range(first, end), first] * 2}
    replaced: set[int] = set()
    for seed in range(60):
        example = task.example(record, True, rng=np.random.default_rng(seed))
        text, target = example["text"], example["text_target"]
        is_piece = ~example["text_padding"]
        is_piece[int(is_piece.sum()) - 1] = is_piece[0] = False
        assert torch.equal(target != -100, is_piece), "all pieces, the first one included"
        changed = is_piece & (text != target) & (text != tokenizer.mask)
        replaced |= set(text[changed].tolist())
    assert min(replaced) == first and max(replaced) == end - 1
    half = make_task("images", files, text_mask_rate=0.5, monomodal_text_length=128)
    example = half.example(record, True, rng=np.random.default_rng(0))
    num_pieces = int((~example["text_padding"]).sum()) - 2
    assert int((example["text_target"] != -100).sum()) == round(0.5 * num_pieces)
