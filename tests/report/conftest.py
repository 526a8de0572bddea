"""Run directories as `beit3 train` leaves them, with tiny untrained networks: what a report is made
of."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

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
SHAPES, SCENES = ("<cross>", "bar"), ("sky & sea", "grass", "road")


def images_of(html: str) -> list[np.ndarray]:
    """The pixels of every `<img>` of a fragment."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def write_run(path: Path, task: Task, data: DataConfig, *, init: str = "") -> Path:
    """A run of ten logged steps and two evaluations."""
    store.save_weights(task, path / "best")
    recipe = Recipe(task=task.config, data=data).to_dict()
    (path / "recipe.json").write_text(
        json.dumps({"task": task_name(type(task)), "init": init, "recipe": recipe})
    )
    lines = [
        {"step": n, "loss": 9 / n, "loss/text": 9 / n, "text/accuracy": n / 10}
        for n in range(1, 11)
    ]
    lines += [{"step": step, f"val/{task.headline}": 0.1 * step} for step in (5, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"step": 10, "text_accuracy": 0.5, task.headline: 1.0, "pairs/text_loss": 2.0}
    (path / "scores.json").write_text(json.dumps(scores))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([CAPTION, "what is the ball ? it is red"], vocab_size=60)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Records of every task over eight random pictures; statements are on canvases of two pictures
    each."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    images = [f"{index}.png" for index in range(8)]
    for name in images:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name)
    pictures = [{"id": name, "image": name} for name in images]
    pairs = [record | {"text": CAPTION} for record in pictures]
    questions = [
        record | {"text": "what is <i>", "answers": {"red & blue": 1.0}} for record in pictures
    ]
    statements, captioned = [], []
    for index, record in enumerate(pictures):
        canvas = np.concatenate(
            [np.array(Image.open(root / images[place])) for place in (index, index - 1)], axis=1
        )
        Image.fromarray(canvas).save(root / f"canvas{index}.png")
        halves = {
            "image": f"canvas{index}.png",
            "image2": f"canvas{index}.png",
            "boxes": [[0, 0, 16, 16], [16, 0, 32, 16]],
        }
        statements.append(
            {"id": record["id"]}
            | halves
            | {"text": "one is <i>", "label": index % 2, "group": str(index)}
        )
        captioned.append(
            record | {"image_id": index, "captions": [f"{CAPTION} {index}", "what is <i>"]}
        )
    for split in ("train", "val"):
        write_records(root / "nlvr2" / "main" / f"{split}.jsonl", statements)
        write_records(root / "captioning" / "main" / f"{split}.jsonl", captioned)
        write_records(root / "retrieval" / "main" / f"{split}.jsonl", captioned)
        labelled = [
            record | {"label": index % len(CLASSES)} for index, record in enumerate(pictures)
        ]
        write_records(root / "imagenet" / "main" / f"{split}.jsonl", labelled)
        write_records(root / "vqkd" / "main" / f"{split}.jsonl", pictures)
        write_records(root / "pretrain" / "images" / f"{split}.jsonl", pictures)
        write_records(root / "pretrain" / "pairs" / f"{split}.jsonl", pairs)
        write_records(root / "vqa" / "main" / f"{split}.jsonl", questions)
    write_dense(root, rng, images)
    return root


def write_dense(root: Path, rng: np.random.Generator, images: list[str]) -> None:
    """Two objects in every picture, and a map of two bands below pixels without a label."""
    shapes, scenes = [], []
    for index, name in enumerate(images):
        boxes = [[1, 2, 6, 5], [8, 9, 5, 6]]
        rows = [
            {
                "id": 2 * index + label + 1,
                "box": box,
                "label": label,
                "area": 30.0 - label,
                "crowd": False,
                "segmentation": [outline(box)],
            }
            for label, box in enumerate(boxes)
        ]
        shapes.append({"id": str(index), "image": name, "width": 16, "height": 16, "objects": rows})
        labels = np.repeat(np.array([0, 1, 2, 255], np.uint8), 4)[:, None].repeat(16, 1)
        Image.fromarray(labels).save(root / f"labels{index}.png")
        scenes.append(
            {
                "id": str(index),
                "image": name,
                "label_map": f"labels{index}.png",
                "labels": {"num_classes": 3},
            }
        )
    for split in ("train", "val"):
        write_records(root / "coco" / "main" / f"{split}.jsonl", shapes)
        write_records(root / "ade20k" / "main" / f"{split}.jsonl", scenes)


def outline(box: list[int]) -> list[int]:
    """A box's corners as a polygon."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    return [left, top, right, top, right, bottom, left, bottom]


@pytest.fixture(scope="session")
def coco(tmp_path_factory, root) -> Path:
    small = {
        "pyramid_dim": 8,
        "box_dim": 8,
        "box_convs": 1,
        "mask_convs": 1,
        "rpn_convs": 1,
        "rpn_top_test": 20,
        "rpn_proposals": 10,
    }
    detector = DetectorConfig(
        anchor_sizes=(4, 8, 16, 24, 32), detections_per_image=5, min_score=0.001, **small
    )
    config = CocoConfig(
        model=UNNORMED,
        image=Preprocessing(16, resize="fit"),
        detector=detector,
        categories=SHAPES,
        num_classes=2,
        window=0,
    )
    task = Coco(config)
    task.init_weights(0)
    return write_run(
        tmp_path_factory.mktemp("runs") / "coco",
        task,
        DataConfig(root=str(root), batch={"main": 4}),
    )


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory, root) -> Path:
    pytest.importorskip("transformers")
    config = Ade20kConfig(
        model=UNNORMED,
        image=Preprocessing(16),
        adapter=AdapterConfig(inplanes=4, num_interactions=2),
        head=HeadConfig(32, 2, 1, 16, 1, 16, num_queries=4),
        classes=SCENES,
        num_classes=3,
        views=InferenceConfig(16, 16, 16, 64),
    )
    task = Ade20k(config)
    task.init_weights(0)
    return write_run(
        tmp_path_factory.mktemp("runs") / "ade20k",
        task,
        DataConfig(root=str(root), batch={"main": 4}),
    )


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
    task = VQKD(VQKDConfig(model=sizes, image=Preprocessing(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))))  # type: ignore[arg-type]
    task.init_weights(0)
    return write_run(
        tmp_path_factory.mktemp("runs") / "vqkd",
        task,
        DataConfig(root=str(root), batch={"main": 4}),
    )


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


def fresh(kind: type[Task], config: TaskConfig, tokenizer: TextTokenizer, seed: int = 0) -> Task:
    task = kind(config, tokenizer=tokenizer)
    task.init_weights(seed)
    return task


def write_two(
    tmp_path_factory, root: Path, tokenizer: TextTokenizer, kind: type[Task], config: TaskConfig
) -> tuple[Path, Path]:
    """Two runs of one name in two folders."""
    base, data, name = (
        tmp_path_factory.mktemp("two"),
        DataConfig(root=str(root), batch={"main": 4}),
        task_name(kind),
    )
    first, second = (
        write_run(
            base / folder / name,
            fresh(kind, config, tokenizer, seed),
            data,
            init="there/last" if seed else "",
        )
        for seed, folder in enumerate(("pretrained", "scratch"))
    )
    return first, second


@pytest.fixture(scope="session")
def vqa(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    answers = ("red & blue", "no")
    config = VQAConfig(
        model=UNNORMED, image=Preprocessing(16), text_length=16, num_answers=2, answers=answers
    )
    return write_two(tmp_path_factory, root, tokenizer, VQA, config)


@pytest.fixture(scope="session")
def nlvr2(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    return write_two(
        tmp_path_factory,
        root,
        tokenizer,
        NLVR2,
        NLVR2Config(model=MODEL, image=Preprocessing(16), text_length=16),
    )


@pytest.fixture(scope="session")
def captioning(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = CaptioningConfig(
        model=MODEL, image=Preprocessing(16), text_length=8, decoding=Decoding("greedy")
    )
    return write_two(tmp_path_factory, root, tokenizer, Captioning, config)


@pytest.fixture(scope="session")
def retrieval(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = RetrievalConfig(model=MODEL, image=Preprocessing(16), text_length=24)
    return write_two(tmp_path_factory, root, tokenizer, Retrieval, config)


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory, root, tokenizer) -> tuple[Path, Path]:
    config = ImageNetConfig(
        model=UNNORMED, image=Preprocessing(16), num_classes=len(CLASSES), classes=CLASSES
    )
    return write_two(tmp_path_factory, root, tokenizer, ImageNet, config)
