"""Run directories as `beit3 train` writes them, with tiny untrained networks."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3.data.stores.records import write_records
from beit3.data.views.preprocessing import Preprocessing
from beit3.detection.config import DetectorConfig
from beit3.model.config import TINY
from beit3.model.generation import Decoding
from beit3.recipe import DataConfig, Recipe, TaskConfig
from beit3.segmentation.adapter import AdapterConfig
from beit3.segmentation.config import HeadConfig
from beit3.segmentation.inference import InferenceConfig
from beit3.task import Task, task_name
from beit3.tasks.ade20k import Ade20k, Ade20kConfig
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.coco import Coco, CocoConfig
from beit3.tasks.imagenet import ImageNet, ImageNetConfig
from beit3.tasks.nlvr2 import NLVR2, NLVR2Config
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.weights import store

MODEL = replace(
    TINY, dim=32, depth=2, num_heads=2, ffn_dim=32, image_size=16, patch_size=4, vocab_size=64
)
UNNORMED = replace(MODEL, final_norm=False)
CAPTION = "a red cube & <b>one</b> blue ball"
CLASSES = ("red <i>cube</i>", "blue ball", "yellow one", "hat")
CATEGORIES, SEMANTIC_CLASSES = ("<cross>", "bar"), ("sky & sea", "grass", "road")


def decode_images(html: str) -> list[np.ndarray]:
    """Returns the pixels of every `<img>` of a piece of HTML."""
    encoded_images = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in encoded_images]


# Records --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([CAPTION, "what is the ball ? it is red"], vocab_size=60)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Records of every task over eight random images of 16 x 16 pixels."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(8)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name)
    images = [{"id": name, "image": name} for name in names]
    captioned = [
        record | {"image_id": index, "captions": [f"{CAPTION} {index}", "what is <i>"]}
        for index, record in enumerate(images)
    ]
    question = {"text": "what is <i>", "answers": {"red & blue": 1.0}}
    records = {
        "vqkd/main": images,
        "pretrain/images": images,
        "pretrain/pairs": [record | {"text": CAPTION} for record in images],
        "vqa/main": [record | question for record in images],
        "nlvr2/main": make_statements(root, names),
        "captioning/main": captioned,
        "retrieval/main": captioned,
        "imagenet/main": [
            record | {"label": index % len(CLASSES)} for index, record in enumerate(images)
        ],
        "coco/main": make_detection_records(names),
        "ade20k/main": make_segmentation_records(root, names),
    }
    for source, source_records in records.items():
        for split in ("train", "val"):
            write_records(root / source / f"{split}.jsonl", source_records)
    return root


def make_statements(root: Path, names: list[str]) -> list[dict[str, Any]]:
    """Returns NLVR2 records; the two images of a statement are the halves of a canvas."""
    statements = []
    for index, name in enumerate(names):
        halves = [np.array(Image.open(root / names[number])) for number in (index, index - 1)]
        canvas = f"canvas{index}.png"
        Image.fromarray(np.concatenate(halves, axis=1)).save(root / canvas)
        statements.append(
            {
                "id": name,
                "image": canvas,
                "image2": canvas,
                "boxes": [[0, 0, 16, 16], [16, 0, 32, 16]],
                "text": "one is <i>",
                "label": index % 2,
                "group": str(index),
            }
        )
    return statements


def make_detection_records(names: list[str]) -> list[dict[str, Any]]:
    """Returns COCO records with two rectangular objects in every image."""
    records = []
    for index, name in enumerate(names):
        objects = [
            {
                "id": 2 * index + label + 1,
                "box": box,
                "label": label,
                "area": 30.0 - label,
                "crowd": False,
                "segmentation": [make_polygon(box)],
            }
            for label, box in enumerate([[1, 2, 6, 5], [8, 9, 5, 6]])
        ]
        record = {"id": str(index), "image": name, "width": 16, "height": 16, "objects": objects}
        records.append(record)
    return records


def make_polygon(box: list[int]) -> list[int]:
    """Returns the corners of a box [x, y, width, height] as a polygon."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    return [left, top, right, top, right, bottom, left, bottom]


def make_segmentation_records(root: Path, names: list[str]) -> list[dict[str, Any]]:
    """Returns ADE20K records; label maps have a band of each class and one without a label."""
    records = []
    for index, name in enumerate(names):
        bands = np.repeat(np.array([0, 1, 2, 255], np.uint8), 4)
        label_map = f"labels{index}.png"
        Image.fromarray(bands[:, None].repeat(16, 1)).save(root / label_map)
        records.append(
            {
                "id": str(index),
                "image": name,
                "label_map": label_map,
                "labels": {"num_classes": 3},
            }
        )
    return records


# Runs -----------------------------------------------------------------------------------------


def write_run(path: Path, task: Task, data: DataConfig, *, init: str = "") -> Path:
    """Writes a run of ten logged steps and two evaluations, and returns its directory."""
    store.save_weights(task, path / "best")
    recipe = Recipe(task=task.config, data=data).to_dict()
    (path / "recipe.json").write_text(
        json.dumps({"task": task_name(type(task)), "init": init, "recipe": recipe})
    )
    lines = [
        {"step": step, "loss": 9 / step, "loss/text": 9 / step, "text/accuracy": step / 10}
        for step in range(1, 11)
    ]
    lines += [{"step": step, f"val/{task.headline}": 0.1 * step} for step in (5, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"step": 10, "text_accuracy": 0.5, task.headline: 1.0, "pairs/text_loss": 2.0}
    (path / "scores.json").write_text(json.dumps(scores))
    return path


def make_task(
    task_class: type[Task], config: TaskConfig, tokenizer: TextTokenizer, seed: int = 0
) -> Task:
    task = task_class(config, tokenizer=tokenizer)
    task.init_weights(seed)
    return task


def write_two_runs(
    tmp_path_factory,
    root: Path,
    tokenizer: TextTokenizer,
    task_class: type[Task],
    config: TaskConfig,
) -> tuple[Path, Path]:
    """Writes two runs of one name in two directories; the second has initial weights."""
    parent = tmp_path_factory.mktemp("two")
    data = DataConfig(root=str(root), batch={"main": 4})
    name = task_name(task_class)
    first = make_task(task_class, config, tokenizer, seed=0)
    second = make_task(task_class, config, tokenizer, seed=1)
    return (
        write_run(parent / "pretrained" / name, first, data),
        write_run(parent / "scratch" / name, second, data, init="there/last"),
    )


@pytest.fixture(scope="session")
def coco(tmp_path_factory, root) -> Path:
    detector = DetectorConfig(
        anchor_sizes=(4, 8, 16, 24, 32),
        detections_per_image=5,
        min_score=0.001,
        pyramid_dim=8,
        box_dim=8,
        box_convs=1,
        mask_convs=1,
        rpn_convs=1,
        rpn_top_test=20,
        rpn_proposals=10,
    )
    config = CocoConfig(
        model=UNNORMED,
        image=Preprocessing(16, resize="fit"),
        detector=detector,
        categories=CATEGORIES,
        num_classes=2,
        window=0,
    )
    task = Coco(config)
    task.init_weights(0)
    data = DataConfig(root=str(root), batch={"main": 4})
    return write_run(tmp_path_factory.mktemp("runs") / "coco", task, data)


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory, root) -> Path:
    pytest.importorskip("transformers")
    head = HeadConfig(
        hidden_dim=32,
        num_heads=2,
        encoder_layers=1,
        encoder_ffn=16,
        decoder_layers=1,
        decoder_ffn=16,
        num_queries=4,
    )
    config = Ade20kConfig(
        model=UNNORMED,
        image=Preprocessing(16),
        adapter=AdapterConfig(inplanes=4, num_interactions=2),
        head=head,
        classes=SEMANTIC_CLASSES,
        num_classes=3,
        views=InferenceConfig(crop=16, stride=16, short=16, long=64),
    )
    task = Ade20k(config)
    task.init_weights(0)
    data = DataConfig(root=str(root), batch={"main": 4})
    return write_run(tmp_path_factory.mktemp("runs") / "ade20k", task, data)


@pytest.fixture(scope="session")
def vqkd(tmp_path_factory, root) -> Path:
    sizes = VisualTokenizerConfig(
        image_size=16,
        patch_size=4,
        dim=32,
        depth=1,
        num_heads=2,
        ffn_dim=32,
        decoder_depth=1,
        code_dim=8,
        num_codes=12,
        teacher_dim=45,
    )
    image = Preprocessing(16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    task = VQKD(VQKDConfig(model=sizes, image=image))
    task.init_weights(0)
    data = DataConfig(root=str(root), batch={"main": 4})
    return write_run(tmp_path_factory.mktemp("runs") / "vqkd", task, data)


@pytest.fixture(scope="session")
def pretrain(tmp_path_factory, root, vqkd, tokenizer) -> Path:
    config = PretrainConfig(
        model=MODEL,
        image=Preprocessing(16),
        visual_tokenizer=str(vqkd / "best"),
        num_codes=12,
        token_size=16,
        min_mask_block=2,
        text_length=24,
    )
    task = Pretrain(config, tokenizer=tokenizer)
    task.init_weights(0)
    data = DataConfig(root=str(root), batch={"images": 4, "pairs": 4})
    return write_run(tmp_path_factory.mktemp("runs") / "pretrain", task, data)


@pytest.fixture(scope="session")
def vqa(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    answers = ("red & blue", "no")
    config = VQAConfig(
        model=UNNORMED, image=Preprocessing(16), text_length=16, num_answers=2, answers=answers
    )
    return write_two_runs(tmp_path_factory, root, tokenizer, VQA, config)


@pytest.fixture(scope="session")
def nlvr2(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = NLVR2Config(model=MODEL, image=Preprocessing(16), text_length=16)
    return write_two_runs(tmp_path_factory, root, tokenizer, NLVR2, config)


@pytest.fixture(scope="session")
def captioning(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = CaptioningConfig(
        model=MODEL, image=Preprocessing(16), text_length=8, decoding=Decoding("greedy")
    )
    return write_two_runs(tmp_path_factory, root, tokenizer, Captioning, config)


@pytest.fixture(scope="session")
def retrieval(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = RetrievalConfig(model=MODEL, image=Preprocessing(16), text_length=24)
    return write_two_runs(tmp_path_factory, root, tokenizer, Retrieval, config)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = ImageNetConfig(
        model=UNNORMED, image=Preprocessing(16), num_classes=len(CLASSES), classes=CLASSES
    )
    return write_two_runs(tmp_path_factory, root, tokenizer, ImageNet, config)
