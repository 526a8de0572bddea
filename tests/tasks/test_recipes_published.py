"""Every recipe's resolved fields against the published tables, held here as data.

A field that no table names is marked as ours. So each field of each recipe that changes what is
learned or scored has its value here. The sources:

- README: the commands and tables of the release's README, its code's defaults where they are silent
  (batch, epochs, rates, drop path; AdamW 0.9/0.999, eps 1e-8, cosine to 1e-6, no clipping).
- Table n: the tables of the paper and of its appendix (arXiv 2208.10442).
- BEiT v2: the scripts of the visual tokenizer's and of the masked image models' training.
- ViTDet, ViT-Adapter: their published configurations, which the paper says it follows.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from beit3.task import load_task
from tests.world_root import list_trainable_tasks

Fields = Mapping[str, Any]

NO_EFFECT = (
    *("task.model.modalities", "task.answers", "task.classes", "task.categories"),
    *("task.category_ids", "task.visual_tokenizer", "task.teacher_weights", "note"),
    *("data.root", "data.text_model", "data.workers", "data.bad_share", "data.limit"),
    *("data.weights", "data.shuffle_window", "run.micro_batch", "run.seed", "run.precision"),
    *("run.device", "run.checkpointing", "run.compile", "run.log_every", "run.eval_every"),
    *("run.eval_records", "run.save_every", "run.keep", "run.async_save"),
    *("task.adapter.recompute", "task.head.checkpointing", "task.views.windows"),
    *("task.names_per_pass", "task.cache_codes", "task.cache_features"),
)
"""Fields of speed, memory, files and reports. They do not change what a run learns."""


def flatten(values: Fields, prefix: str = "") -> dict[str, Any]:
    """Returns {dotted name: value}; mappings of batches stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in ("data.batch", "data.weights"):
            flat |= flatten(value, f"{name}.")
        elif name not in NO_EFFECT:
            flat[name] = value
    return flat


def model(**fields: Any) -> dict[str, Any]:
    return {f"task.model.{name}": value for name, value in fields.items()}


def task(**fields: Any) -> dict[str, Any]:
    return {f"task.{name}": value for name, value in fields.items()}


def optim(**fields: Any) -> dict[str, Any]:
    return {f"optim.{name}": value for name, value in fields.items()}


def run(batch: int | Fields, *, epochs: float = 0, steps: int = 0) -> dict[str, Any]:
    """Records of a step, and the length; `batch` alone is that of the source main."""
    batch = {"main": batch} if isinstance(batch, int) else batch
    return {"data.batch": batch, "run.epochs": epochs, "run.steps": steps}


def size(pixels: int) -> dict[str, Any]:
    """The image size of tasks whose network is configured for it."""
    return {"task.model.image_size": pixels, "task.image.image_size": pixels}


# Networks -----------------------------------------------------------------------------------------

RELEASED = model(
    shared_attention=False, shared_norms=False, sub_ln=True, fusion_layers=0, init="magneto"
)
PAPER = model(shared_attention=True, shared_norms=True, sub_ln=False)
COMMON = model(norm_eps=1e-5, vocab_size=64010, text_positions=1024, final_norm=True)
BASE = RELEASED | COMMON | model(dim=768, depth=12, num_heads=12, ffn_dim=3072, patch_size=16)
LARGE = RELEASED | COMMON | model(dim=1024, depth=24, num_heads=16, ffn_dim=4096, patch_size=16)
GIANT = (  # table 2
    PAPER
    | COMMON
    | model(dim=1408, depth=40, num_heads=16, ffn_dim=6144, patch_size=14)
    | model(fusion_layers=3, init="beit")
)
# Ours: the paper's form with PyTorch's values or Magneto's (docs/decisions.md).
TINY = (
    PAPER
    | model(dim=128, depth=4, num_heads=4, ffn_dim=512, patch_size=8, fusion_layers=1)
    | model(init="torch", norm_eps=1e-5, vocab_size=512, text_positions=130, final_norm=True)
    | model(drop_path_rate=0)
)
SMALL = (
    PAPER
    | model(dim=192, depth=6, num_heads=3, ffn_dim=768, patch_size=16, fusion_layers=1)
    | model(init="magneto", norm_eps=1e-5, vocab_size=8010, text_positions=514, final_norm=True)
    | model(drop_path_rate=0)
)
MEDIUM = (
    PAPER
    | model(dim=512, depth=12, num_heads=8, ffn_dim=2048, patch_size=16, fusion_layers=2)
    | model(init="magneto", norm_eps=1e-5, vocab_size=16010, text_positions=514, final_norm=True)
)
NO_FINAL_NORM = model(final_norm=False)

# What the release's trainer does in all tasks (README and code).

HALF = {"task.image.mean": [0.5] * 3, "task.image.std": [0.5] * 3}
IMAGENET = {
    "task.image.mean": [0.485, 0.456, 0.406],
    "task.image.std": [0.229, 0.224, 0.225],
}
ADAMW = optim(
    name="adamw",
    betas=[0.9, 0.999],
    eps=1e-8,
    min_lr=1e-6,
    schedule="cosine",
    drops=[0.889, 0.963],
    warmup_steps=0,
    warmup_epochs=0,
    layer_decay=1,
    head_lr_scale=1,
    clip=0,
    weight_decay=0.05,
    no_decay=["image_embedding.positions", "image_embedding.class_token", "logit_scale"],
)
SQUASHED = HALF | {
    "task.image.resize": "squash",
    "task.image.interpolation": "bicubic",
    "task.image.crop_pct": 1,
}
TRAINER = ADAMW | SQUASHED | task(text_length=64, crop=[0.5, 1.0], flip=0.5)

# Ours: recipes of minutes on a laptop.
SMALL_RUN = TRAINER | optim(betas=[0.9, 0.98], clip=3)
DEMO = SMALL_RUN | TINY | size(32) | task(crop=[1.0, 1.0], flip=0)
LAPTOP = SMALL_RUN | SMALL | size(112)


# Visual question answering (README; giant: table 12, head rate of the release) --------------------

_VQA = (
    TRAINER
    | task(num_answers=3129, rand_augment=True)
    | run(128, epochs=10)
    | optim(betas=[0.9, 0.98], weight_decay=0.01, warmup_epochs=1, head_lr_scale=20)
)
_VQA_SMALL = task(num_answers=1, rand_augment=False) | optim(lr=3e-4, weight_decay=0.01)
VQA = {
    "demo": DEMO
    | _VQA_SMALL
    | NO_FINAL_NORM
    | task(text_length=16)
    | run(32, steps=200)
    | optim(warmup_steps=20, head_lr_scale=20),
    "laptop": LAPTOP
    | _VQA_SMALL
    | NO_FINAL_NORM
    | task(text_length=24, crop=[0.8, 1.0], flip=0)
    | run(32, steps=3000)
    | optim(warmup_steps=100, head_lr_scale=4),
    "base_480": _VQA
    | BASE
    | NO_FINAL_NORM
    | size(480)
    | model(drop_path_rate=0.1)
    | optim(lr=3e-5),
    "large_480": _VQA
    | LARGE
    | NO_FINAL_NORM
    | size(480)
    | model(drop_path_rate=0.15)
    | optim(lr=2e-5),
    "large_768": _VQA
    | LARGE
    | NO_FINAL_NORM
    | size(768)
    | model(drop_path_rate=0.15)
    | optim(lr=2e-5),
    "giant_756": _VQA
    | GIANT
    | NO_FINAL_NORM
    | size(756)
    | model(drop_path_rate=0.4)
    | optim(lr=1e-5, betas=[0.9, 0.999]),
}

# Captions (README; giant: table 14) ---------------------------------------------------------------

_DECODING = {
    "task.decoding.method": "beam",
    "task.decoding.num_beams": 3,
    "task.decoding.length_penalty": 0.6,
    "task.decoding.temperature": 1,
    "task.decoding.top_p": 1,
    "task.decoding.seed": 0,
}
_CAPTIONS = (
    TRAINER
    | _DECODING
    | task(text_length=32, mask_rate=0.7, label_smoothing=0.1, rand_augment=True)
    | task(drop_worst=0.2, drop_worst_after=12000)
    | run(256, epochs=10)
    | optim(weight_decay=0.05, warmup_epochs=1)
    | size(480)
    | model(drop_path_rate=0.1)
)
_CAPTIONS_SMALL = _DECODING | task(
    mask_rate=0.7, rand_augment=False, drop_worst=0, drop_worst_after=12000
)
CAPTIONING = {
    "demo": DEMO
    | _CAPTIONS_SMALL
    | {"task.decoding.method": "greedy"}
    | task(text_length=20, label_smoothing=0)
    | run(64, steps=200)
    | optim(lr=1e-3, weight_decay=0.01, warmup_steps=20),
    "laptop": LAPTOP
    | _CAPTIONS_SMALL
    | task(text_length=28, label_smoothing=0.1, crop=[0.6, 1.0], flip=0.5)
    | run(32, steps=600)
    | optim(lr=5e-4, weight_decay=0.05, warmup_steps=100),
    "base_480": _CAPTIONS | BASE | optim(lr=4e-5),
    "large_480": _CAPTIONS | LARGE | optim(lr=8e-6),
    "base_480_nocaps": _CAPTIONS | BASE | optim(lr=1e-5),
    "large_480_nocaps": _CAPTIONS | LARGE | optim(lr=8e-6),
    "giant_392": _CAPTIONS
    | GIANT
    | size(392)
    | model(drop_path_rate=0.3)
    | task(mask_rate=0.6, drop_worst=0, rand_augment=False)
    | run(256, steps=16_000)
    | optim(lr=8e-6, weight_decay=0.01, warmup_epochs=0, warmup_steps=1600),
}

# Statements on two images (README; giant: table 12) -----------------------------------------------

_NLVR2 = (
    TRAINER
    | size(224)
    | run(256, epochs=20)
    | optim(weight_decay=0.2, warmup_epochs=5)
    | model(drop_path_rate=0.2)
)
NLVR2 = {
    "demo": DEMO
    | task(text_length=28)
    | run(32, steps=600)
    | optim(name="muon", lr=1e-3, weight_decay=0.01, warmup_steps=20),
    "laptop": LAPTOP
    | task(text_length=32, crop=[0.9, 1.0], flip=0)
    | run(32, steps=400)
    | optim(lr=3e-4, weight_decay=0.05, warmup_steps=50),
    "base_224": _NLVR2 | BASE | optim(lr=7e-4, layer_decay=0.65),
    "base_224_indomain": _NLVR2 | BASE | optim(lr=5e-4, layer_decay=0.65),
    "large_224": _NLVR2 | LARGE | optim(lr=3e-4, layer_decay=0.85),
    "large_224_indomain": _NLVR2 | LARGE | optim(lr=1e-4, layer_decay=0.85),
    "giant_224": _NLVR2
    | GIANT
    | model(drop_path_rate=0.4)
    | optim(lr=1e-3, layer_decay=0.8, weight_decay=0.05),
}

# Retrieval (README; giant and contrastive tuning: table 13 and appendix) --------------------------

_COCO_RUN = run(3072, epochs=15) | optim(warmup_epochs=3)
_FLICKR_RUN = run(3072, epochs=20) | optim(warmup_epochs=5)
_NO_MATCHING = task(matching=False, matching_negatives=1, matching_hardness=1, matching_weight=1)
_MATCHING = task(matching=True)  # ours
_SMALL_MATCHING = task(matching=True, matching_hardness=0.5, matching_weight=5)
_RETRIEVAL = TRAINER | _NO_MATCHING | size(384) | model(drop_path_rate=0.2)
_GIANT_RETRIEVAL = (
    TRAINER
    | _NO_MATCHING
    | GIANT
    | size(420)
    | model(drop_path_rate=0.3)
    | optim(lr=1e-5, layer_decay=0.95)
)
_ITC = (
    TRAINER
    | _NO_MATCHING
    | size(224)
    | model(drop_path_rate=0.3)
    | run({"pairs": 16384}, epochs=5)
    | optim(lr=3e-5, warmup_epochs=1, layer_decay=0.95)
)
_RETRIEVAL_DEMO = (
    DEMO
    | _NO_MATCHING
    | task(text_length=20)
    | run(64, steps=200)
    | optim(name="muon", lr=2e-3, weight_decay=0.05, warmup_steps=20)
)
_RETRIEVAL_LAPTOP = (
    LAPTOP
    | _NO_MATCHING
    | task(text_length=32)
    | run(64, steps=200)
    | optim(lr=3e-4, weight_decay=0.05, warmup_steps=20)
)
RETRIEVAL = {
    "demo": _RETRIEVAL_DEMO,
    "demo_itc": _RETRIEVAL_DEMO | run({"pairs": 64}, steps=300) | optim(warmup_steps=30),
    "demo_matching": _RETRIEVAL_DEMO | _SMALL_MATCHING | optim(name="adamw", lr=1e-3),
    "laptop": _RETRIEVAL_LAPTOP,
    "laptop_matching": _RETRIEVAL_LAPTOP | _SMALL_MATCHING | optim(lr=5e-4),
    "laptop_itc": LAPTOP
    | _NO_MATCHING
    | task(text_length=32)
    | run({"pairs": 64}, steps=400)
    | optim(lr=5e-4, weight_decay=0.05, warmup_steps=40),
    "base_384_coco": _RETRIEVAL | BASE | _COCO_RUN | optim(lr=2e-4, layer_decay=0.65),
    "base_384_coco_matching": _RETRIEVAL
    | BASE
    | _COCO_RUN
    | _MATCHING
    | optim(lr=2e-4, layer_decay=0.65),
    "large_384_coco": _RETRIEVAL | LARGE | _COCO_RUN | optim(lr=5e-5, layer_decay=0.85),
    "giant_420_coco": _GIANT_RETRIEVAL | _COCO_RUN,
    "base_384_flickr30k": _RETRIEVAL | BASE | _FLICKR_RUN | optim(lr=1e-4, layer_decay=0.65),
    "large_384_flickr30k": _RETRIEVAL | LARGE | _FLICKR_RUN | optim(lr=5e-5, layer_decay=0.85),
    "giant_420_flickr30k": _GIANT_RETRIEVAL | _FLICKR_RUN,
    "base_224_itc": _ITC | BASE,
    "large_224_itc": _ITC | LARGE,
    "giant_224_itc": _ITC | GIANT,
}

# ImageNet (README; giant: tables 17 and 18) -------------------------------------------------------

_IMAGENET = (
    TRAINER
    | IMAGENET
    | {"task.image.resize": "crop"}
    | NO_FINAL_NORM
    | size(224)
    | task(head="linear", num_classes=1000, prompt="{}", text_length=32)
    | task(crop=[0.08, 1.0], auto_augment=True, erasing=0.25, mixup=0.8, cutmix=1.0)
    | task(label_smoothing=0.1)
    | run(1024, epochs=50)
    | optim(weight_decay=0.05, warmup_epochs=5)
)
_IMAGENET_GIANT = (
    _IMAGENET
    | GIANT
    | model(drop_path_rate=0.4)
    | task(head="names", mixup=0, cutmix=0, label_smoothing=0.1)
)
_IMAGENET_SMALL = (
    task(head="linear", num_classes=1, prompt="{}", text_length=12, auto_augment=False)
    | task(erasing=0, mixup=0, cutmix=0, label_smoothing=0.1)
    | optim(lr=5e-4, weight_decay=0.05, warmup_steps=20)
    | NO_FINAL_NORM
)
_NAMES = task(head="names") | model(final_norm=True)
_IMAGENET_LAPTOP = LAPTOP | _IMAGENET_SMALL | task(crop=[0.6, 1.0]) | run(64, steps=400)
IMAGENET_RECIPES = {
    "demo": DEMO | _IMAGENET_SMALL | run(64, steps=200) | optim(name="muon", lr=3e-3),
    "demo_names": DEMO | _IMAGENET_SMALL | _NAMES | run(64, steps=200),
    "laptop": _IMAGENET_LAPTOP,
    "laptop_names": _IMAGENET_LAPTOP | _NAMES,
    "base_224": _IMAGENET
    | BASE
    | NO_FINAL_NORM
    | model(drop_path_rate=0.15)
    | optim(lr=7e-4, layer_decay=0.65),
    "large_224": _IMAGENET
    | LARGE
    | NO_FINAL_NORM
    | model(drop_path_rate=0.25)
    | optim(lr=2e-4, layer_decay=0.8),
    "giant_224_in21k": _IMAGENET_GIANT
    | run(16384, epochs=50)
    | optim(lr=5e-5, layer_decay=0.85, eps=1e-6, betas=[0.9, 0.98]),
    "giant_336": _IMAGENET_GIANT
    | size(336)
    | run(2048, epochs=15)
    | optim(lr=3e-5, layer_decay=0.95, warmup_epochs=3),
}

# Detection (ViTDet; giant: tables 15 and 16) ------------------------------------------------------


def detector(**fields: Any) -> dict[str, Any]:
    return {f"task.detector.{name}": value for name, value in fields.items()}


_VITDET = (
    ADAMW
    | SQUASHED
    | IMAGENET
    | {"task.image.resize": "fit", "task.model.image_size": 224, "task.text_length": 64}
    | task(window=16, num_global=4, scale=[0.1, 2.0], flip=0.5, test_sizes=[], test_flip=False)
    | task(num_classes=80, resize_patch=False)
    | optim(lr=1e-4, min_lr=0, weight_decay=0.1, warmup_steps=250, schedule="steps")
    | run(64, epochs=100)
    | {"task.image.image_size": 1024}
    # Cascade Mask R-CNN of detectron2; Soft-NMS with EVA's values.
    | detector(pyramid_dim=256, anchor_sizes=[32, 64, 128, 256, 512], rpn_convs=2)
    | detector(rpn_samples=256, rpn_top_train=2000, rpn_top_test=1000, rpn_proposals=1000)
    | detector(pooled_cells=14, roi_samples=512, box_convs=4, box_dim=1024, mask_convs=4)
    | detector(masks=True, min_score=0.001, detections_per_image=100)
    | detector(anchor_ratios=[0.5, 1, 2], rpn_positive_iou=0.7, rpn_negative_iou=0.3)
    | detector(rpn_nms_iou=0.7, roi_positive_share=0.25, stage_ious=[0.5, 0.6, 0.7])
    | detector(stage_box_weights=[10, 20, 30], candidate_score=0, nms="linear", nms_iou=0.6)
    | detector(nms_sigma=0.5)
)
_COCO_GIANT = (
    _VITDET
    | GIANT
    | NO_FINAL_NORM
    | model(patch_size=16, drop_path_rate=0.6)
    | task(resize_patch=True)
    | optim(layer_decay=0.9)
)
_COCO_SMALL = (
    _VITDET
    | HALF
    | task(window=0, num_classes=1, scale=[0.7, 1.3])
    | optim(lr=1e-3, min_lr=1e-6, weight_decay=0.05, warmup_steps=30, schedule="cosine")
    | optim(clip=3, layer_decay=0.8)
    | detector(box_dim=128, box_convs=1, rpn_convs=1, mask_convs=2, min_score=0.01)
)
COCO = {
    "demo": _COCO_SMALL
    | TINY
    | NO_FINAL_NORM
    | model(image_size=32)
    | {"task.image.image_size": 64}
    | run(16, steps=400)
    | detector(pyramid_dim=48, anchor_sizes=[8, 16, 24, 32, 48], rpn_samples=64, roi_samples=32)
    | detector(rpn_top_train=200, rpn_top_test=100, rpn_proposals=50, detections_per_image=20),
    "laptop": _COCO_SMALL
    | SMALL
    | NO_FINAL_NORM
    | model(image_size=112)
    | {"task.image.image_size": 320}
    | run(4, steps=400)
    | detector(pyramid_dim=96, anchor_sizes=[16, 32, 64, 128, 256], rpn_samples=128)
    | detector(rpn_top_train=500, rpn_top_test=300, rpn_proposals=150, pooled_cells=5)
    | detector(roi_samples=64, box_convs=2, box_dim=256),
    "base_1024": _VITDET
    | BASE
    | NO_FINAL_NORM
    | model(drop_path_rate=0.1)
    | optim(layer_decay=0.7),
    "large_1024": _VITDET
    | LARGE
    | NO_FINAL_NORM
    | model(drop_path_rate=0.4)
    | optim(layer_decay=0.8),
    "giant_1024_objects365": _COCO_GIANT | detector(masks=False) | run(64, epochs=15),
    "giant_1280": _COCO_GIANT
    | {"task.image.image_size": 1280}
    | run(64, epochs=20)
    | optim(lr=5e-5),
}

# Segmentation (ViT-Adapter; giant: tables 15 and 16) ----------------------------------------------


def head(**fields: Any) -> dict[str, Any]:
    return {f"task.head.{name}": value for name, value in fields.items()}


def adapter(**fields: Any) -> dict[str, Any]:
    return {f"task.adapter.{name}": value for name, value in fields.items()}


def windows(crop: int, stride: int) -> dict[str, Any]:
    """Crops of training, and windows of evaluation with shorter sides of the same size."""
    views = {"crop": crop, "stride": stride, "short": crop, "long": 4 * crop}
    train_view = {"crop": crop, "short": crop, "long": 4 * crop}
    return {f"task.views.{name}": value for name, value in views.items()} | {
        f"task.train_view.{name}": value for name, value in train_view.items()
    }


_ADAPTER = (
    ADAMW
    | SQUASHED
    | IMAGENET
    | {"task.model.image_size": 224, "task.image.image_size": 896, "task.text_length": 64}
    | task(num_classes=150, resize_patch=False, published_decay=False)
    | adapter(inplanes=64, num_heads=0, num_points=4, deform_ratio=0.5, ffn_ratio=0.25)
    | adapter(num_interactions=4, num_extra_extractors=2, gate_init=0, drop_path_rate=0)
    | head(encoder_layers=6, decoder_layers=9, no_object_weight=0.1, class_weight=2)
    | head(mask_weight=5, dice_weight=5, num_points=12544, oversample=3, importance=0.75)
    | {"task.train_view.scale": [0.5, 2.0], "task.train_view.largest_share": 0.75}
    | {"task.train_view.flip": 0.5, "task.train_view.distort": True}
    | {"task.views.multiple": 32, "task.views.scales": [1.0], "task.views.flip": False}
    | optim(weight_decay=0.05, min_lr=0, warmup_steps=1500, schedule="linear", layer_decay=0.9)
)
_MASK2FORMER = head(hidden_dim=256, num_heads=8, encoder_ffn=1024, decoder_ffn=2048)
_WIDE_HEAD = head(hidden_dim=1024, num_heads=32, encoder_ffn=4096, decoder_ffn=4096)
_ADE_SMALL = (
    _ADAPTER
    | HALF
    | task(num_classes=1)
    | adapter(inplanes=16)
    | head(encoder_layers=2, decoder_layers=3, num_heads=4)
    | {"task.train_view.scale": [0.75, 1.5], "task.train_view.largest_share": 1}
    | {"task.train_view.distort": False}
    | optim(lr=1e-3, min_lr=1e-6, warmup_steps=20, schedule="cosine", layer_decay=1, clip=3)
)
ADE20K = {
    "demo": _ADE_SMALL
    | TINY
    | model(image_size=32)
    | {"task.image.image_size": 64}
    | windows(64, 48)
    | head(hidden_dim=64, encoder_ffn=128, decoder_ffn=128, num_queries=10, num_points=256)
    | head(class_weight=4)
    | run(8, steps=1400),
    "laptop": _ADE_SMALL
    | SMALL
    | model(image_size=112)
    | {"task.image.image_size": 256}
    | windows(256, 192)
    | head(hidden_dim=128, encoder_ffn=256, decoder_ffn=256, num_queries=30, num_points=2048)
    | run(4, steps=400),
    "base_512": _ADAPTER
    | BASE
    | _MASK2FORMER
    | head(num_queries=100)
    | windows(512, 292)
    | model(drop_path_rate=0.2)
    | adapter(drop_path_rate=0.2)
    | run(16, steps=160_000)
    | optim(lr=6e-5),
    "large_512": _ADAPTER
    | LARGE
    | _MASK2FORMER
    | head(num_queries=100)
    | windows(512, 292)
    | model(drop_path_rate=0.3)
    | adapter(drop_path_rate=0.3)
    | run(16, steps=160_000)
    | optim(lr=2e-5),
    "large_896": _ADAPTER
    | LARGE
    | _WIDE_HEAD
    | head(num_queries=200)
    | windows(896, 512)
    | model(drop_path_rate=0.3)
    | adapter(drop_path_rate=0.3)
    | run(16, steps=80_000)
    | optim(lr=2e-5),
    "giant_896": _ADAPTER
    | GIANT
    | _WIDE_HEAD
    | head(num_queries=200)
    | windows(896, 512)
    | task(resize_patch=True)
    | model(patch_size=16, drop_path_rate=0.5)
    | adapter(drop_path_rate=0.5)
    | run(16, steps=80_000)
    | optim(lr=1e-5, layer_decay=0.95),
}

# Pretraining (section 2.3 and table 11; views, blocks and rates of BEiT v2) -----------------------

_NO_DECAY = [  # the class token, the mask token and all positions, as in BEiT
    "image_embedding.positions",
    "text_embedding.positions",
    "image_embedding.class_token",
    "image_embedding.mask_token",
]
_PRETRAIN = (
    ADAMW
    | SQUASHED
    | task(image_mask_rate=0.4, text_mask_rate=0.15, pair_text_mask_rate=0.5)
    | task(mask_token_rate=0.8)
    | task(pair_masking="both", min_mask_block=16, num_codes=8192, token_size=224)
    | task(text_length=64, monomodal_text_length=512)
    | task(image_crop=[0.2, 1.0], pair_crop=[0.5, 1.0], image_flip=0.5, pair_flip=0.5)
    | task(color_jitter=0.4)
    | task(image_weight=1, text_weight=1, pair_image_weight=1, pair_text_weight=1)
    | task(visible_weight=0)
    | optim(lr=1e-3, min_lr=1e-5, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.05, clip=3)
    | optim(warmup_steps=10_000, no_decay=_NO_DECAY)
    | run({"images": 2048, "texts": 2048, "pairs": 2048}, steps=1_000_000)
    | size(224)
    | model(drop_path_rate=0.1)
)
_TEXT_ONLY = task(pair_masking="text_only", color_jitter=0)
_PRETRAIN_DEMO = (
    _PRETRAIN
    | _TEXT_ONLY
    | TINY
    | size(32)
    | task(num_codes=64, token_size=32, min_mask_block=1, text_length=20)
    | task(monomodal_text_length=48, image_crop=[1.0, 1.0], pair_crop=[1.0, 1.0])
    | task(image_flip=0, pair_flip=0)
    | task(mask_token_rate=1)
    | optim(name="muon", lr=1.5e-3, warmup_steps=50)
)
_PRETRAIN_PHOTOS = _PRETRAIN | _TEXT_ONLY | task(image_crop=[0.4, 1.0], pair_crop=[0.6, 1.0])
PRETRAIN = {
    "demo": _PRETRAIN_DEMO | run({"images": 32, "texts": 32, "pairs": 64}, steps=600),
    "demo_pairs": _PRETRAIN_DEMO | run({"pairs": 64}, steps=1600) | optim(lr=3e-3),
    "laptop": _PRETRAIN_PHOTOS
    | SMALL
    | size(112)
    | model(init="torch")
    | task(num_codes=256, token_size=112, min_mask_block=4, text_length=32)
    | task(mask_token_rate=1, visible_weight=1)
    | run({"images": 32, "texts": 1, "pairs": 32}, steps=800)
    | optim(name="muon", lr=2e-3, warmup_steps=50),
    "gpu_hour": _PRETRAIN_PHOTOS
    | MEDIUM
    | task(num_codes=1024)
    | run({"images": 512, "texts": 128, "pairs": 512}, steps=8000)
    | optim(warmup_steps=200),
    "base_224": _PRETRAIN | BASE,
    "base_224_indomain": _PRETRAIN | BASE,
    "large_224": _PRETRAIN | LARGE,
    "giant_224": _PRETRAIN | GIANT | task(token_size=256),
}

# The visual tokenizer (BEiT v2) -------------------------------------------------------------------

_VQKD = (
    ADAMW
    | SQUASHED
    | {"task.image.mean": [0.0] * 3, "task.image.std": [1.0] * 3, "task.text_length": 64}
    | size(224)
    | model(patch_size=16, ln_eps=1e-6, decay=0.99, beta=1, code_dim=32, num_codes=8192)
    | model(dim=768, depth=12, num_heads=12, ffn_dim=3072, decoder_depth=3, teacher_dim=512)
    | model(revive_after=0, encoder_network="vit")
    | task(teacher="clip", crop=[0.08, 1.0], flip=0.5, num_views=0)
    | run(512, epochs=100)
    | optim(lr=2e-4, min_lr=1e-5, betas=[0.9, 0.99], weight_decay=1e-4, warmup_epochs=10)
)
_VQKD_SMALL = (
    _VQKD
    | task(teacher="gradients")
    | model(decoder_depth=1, teacher_dim=45, code_dim=16, num_heads=4, revive_after=20)
    | optim(lr=1e-3, warmup_epochs=0)
)
_VQKD_DEMO = (
    _VQKD_SMALL
    | size(32)
    | model(patch_size=8, dim=96, depth=2, ffn_dim=384, num_codes=64)
    | task(crop=[1.0, 1.0], flip=0)
    | run(64, steps=400)
    | optim(warmup_steps=20)
)
_VQKD_LAPTOP = (
    _VQKD_SMALL
    | size(112)
    | model(dim=128, depth=3, ffn_dim=512, num_codes=256)
    | task(crop=[0.4, 1.0])
    | run(64, steps=800)
    | optim(warmup_steps=50)
)
VQKD = {
    "demo": _VQKD_DEMO,
    "demo_beit3": _VQKD_DEMO | task(teacher="beit3") | model(teacher_dim=128),
    "laptop": _VQKD_LAPTOP,
    "laptop_efficientnet": _VQKD_LAPTOP
    | task(teacher="efficientnet", num_views=4)
    | model(depth=0, encoder_network="efficientnet", teacher_dim=304),
    "laptop_beit3": _VQKD_LAPTOP | task(teacher="beit3", num_views=4) | model(teacher_dim=192),
    "gpu_hour": _VQKD_SMALL
    | model(dim=384, depth=6, num_heads=6, ffn_dim=1536, code_dim=32, num_codes=1024)
    | model(revive_after=100)
    | task(crop=[0.2, 1.0])
    | run(512, steps=3000)
    | optim(warmup_steps=200),
    # BEiT v2 decays neither positions nor class token; the small recipes keep the default names.
    "base_224_clip": _VQKD | optim(no_decay=["class_token", "positions"]),
}

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "ade20k": ADE20K,
    "captioning": CAPTIONING,
    "coco": COCO,
    "imagenet": IMAGENET_RECIPES,
    "nlvr2": NLVR2,
    "pretrain": PRETRAIN,
    "retrieval": RETRIEVAL,
    "vqa": VQA,
    "vqkd": VQKD,
}


def test_every_recipe_is_in_the_tables():
    assert {load_task(name).__name__ for name in PUBLISHED} == {
        task_class.__name__ for task_class in list_trainable_tasks()
    }
    for name, recipes in PUBLISHED.items():
        assert set(recipes) == set(load_task(name).recipes), name


@pytest.mark.parametrize(
    ("task_name", "recipe_name"),
    [(task_name, recipe_name) for task_name, table in PUBLISHED.items() for recipe_name in table],
)
def test_fields_are_the_published_ones(task_name, recipe_name):
    recipe = load_task(task_name).recipes[recipe_name]
    actual, expected = flatten(recipe.to_dict()), PUBLISHED[task_name][recipe_name]
    names = actual.keys() | expected.keys()
    assert {
        name: (actual.get(name, "no such field"), expected.get(name, "not in the table"))
        for name in names
        if name not in actual or name not in expected or actual[name] != expected[name]
    } == {}
