"""Writes the embedded world in the file formats of public datasets, so that there is one data path.

Layout under `out` (each part and split has its own scenes; all images are PNG):
  images/{train,val}/NNNNNN.png                images alone
  texts/{train,val}/NNN.txt                    documents separated by a blank line
  pairs/dataset_world.json, pairs/images/      Karpathy's caption file (train, val, test)
  vqa/, vqa/<split>2014/                       VQAv2 questions and annotations, images
  nlvr2/{train,dev}.json                       JSON lines; images/train/<directory>/, dev/
  imagenet/{train,val}/<color>_<shape>/        ten class folders
  coco/annotations/, coco/{train,val}/         COCO instances and captions
  ade20k/{images,annotations}/{training,validation}/, ade20k/classes.txt
  shards/train-NNNNNN.tar                      WebDataset tars of png, txt and json members
"""

import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit3.world.language import (
    Question,
    ask_questions,
    describe_object,
    make_statement,
    write_captions,
    write_paragraph,
)
from beit3.world.render import SEMANTIC_CLASSES, compute_outline, render, render_semantic_map
from beit3.world.scene import NUM_OBJECTS, SHAPES, Object, Scene, make_scene

IMAGENET_CLASSES = tuple(f"{color}_{shape}" for color in ("blue", "red") for shape in SHAPES)
CAPTIONS_PER_IMAGE = 3
QUESTIONS_PER_IMAGE = 3
MAX_LABELED = 600
"""Labeled images of ImageNet, COCO and ADE20K: few, as labels are where pretraining matters."""
DOCUMENTS_PER_FILE = 1000
PAIRS_PER_SHARD = 300
SEEDS_PER_STREAM = 2**32
SEEDS_PER_WORLD = 2**40
"""Scene seeds reserved for one stream, and for all streams of one world."""


@dataclass(frozen=True)
class WorldSizes:
    """Sizes of all parts. Parts that only show a format take a fixed fraction of the images."""

    num_train: int
    num_val: int
    num_test: int
    num_questions: int

    @property
    def vqa(self) -> tuple[int, int]:
        """Number of images of VQA's train and val."""
        return self.num_questions // QUESTIONS_PER_IMAGE, self.num_val

    @property
    def nlvr2(self) -> tuple[int, int]:
        """Number of statements, each about two images, of NLVR2's train and dev."""
        return max(1, self.num_train // 4), self.num_val

    @property
    def small(self) -> tuple[int, int]:
        """Number of images of ImageNet, COCO and ADE20K, train and val; the tars have the first."""
        minimum = len(IMAGENET_CLASSES)
        num_train = min(self.num_train // 10, MAX_LABELED)
        return max(minimum, num_train), max(minimum, self.num_val // 5)

    def count_steps(self) -> int:
        """Returns the number of steps that `progress` counts: one per image or document."""
        num_pairs = self.num_train + self.num_val + self.num_test
        num_images_and_texts = 2 * (self.num_train + self.num_val)
        num_labeled = sum(self.vqa) + sum(self.nlvr2) + 3 * sum(self.small)
        return num_images_and_texts + num_pairs + num_labeled + self.small[0]


def write_world(
    out: str | Path,
    *,
    num_train: int = 16_000,
    num_val: int = 1000,
    num_test: int = 500,
    num_questions: int = 9000,
    image_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the world to a new directory: completely or, when interrupted, not at all.

    The same arguments give the same bytes.

    Args:
        out: The directory to write.
        num_train: Number of training images, texts and pairs.
        num_val: Number of validation images, texts and pairs.
        num_test: Number of test pairs.
        num_questions: Number of VQA training questions, three per image.
        image_size: Width and height of the images in pixels.
        seed: Seed of the world; no two seeds share a scene.
        progress: Called with the number of steps done and the total number of steps.

    Raises:
        ValueError: A size is below 1 (below 3 for questions), the seed is negative, or `out` exists
            and is not an empty directory.
    """
    out = Path(out).absolute()
    _check_arguments(out, seed, num_train=num_train, num_val=num_val, num_test=num_test)
    if num_questions < QUESTIONS_PER_IMAGE:
        raise ValueError(
            f"num_questions: {num_questions} is below the {QUESTIONS_PER_IMAGE} of one image"
        )
    sizes = WorldSizes(num_train, num_val, num_test, num_questions)
    # A sibling of `out`, so that the rename is atomic.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        writer = _Writer(partial, image_size, seed)
        for num_done, _ in enumerate(_write_parts(writer, sizes), start=1):
            if progress is not None:
                progress(num_done, sizes.count_steps())
        os.replace(partial, out)
    except BaseException:  # an interrupt from the keyboard included
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Writer:
    """Makes scenes and writes files below `root`."""

    root: Path
    image_size: int
    seed: int

    def make_scenes(
        self, stream: str, count: int, *, num_objects: tuple[float, float, float] = NUM_OBJECTS
    ) -> Iterator[tuple[int, Scene, np.random.Generator]]:
        """Yields (index, scene, generator for its texts) of a stream.

        No two streams, of any `seed`, share a scene seed.
        """
        first = self.seed * SEEDS_PER_WORLD + STREAMS.index(stream) * SEEDS_PER_STREAM
        for index in range(count):
            scene = make_scene(first + index, num_objects=num_objects)
            yield index, scene, np.random.default_rng((first + index, 1))

    def render_scene(self, scene: Scene, path: str) -> None:
        self.save_image(render(scene, self.image_size), path)

    def save_image(self, image: Image.Image, path: str) -> None:
        self.make_parent(path)
        # This level is twice as fast as the default, with files 5 % larger.
        image.save(self.root / path, compress_level=1)

    def write_text(self, text: str, path: str) -> None:
        self.make_parent(path)
        (self.root / path).write_text(text, encoding="utf-8")

    def make_parent(self, path: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)


STREAMS = (
    "images/train",
    "images/val",
    "texts/train",
    "texts/val",
    "pairs/train",
    "pairs/val",
    "pairs/test",
    "vqa/train",
    "vqa/val",
    "nlvr2/train",
    "nlvr2/train/right",
    "nlvr2/dev",
    "nlvr2/dev/right",
    "imagenet/train",
    "imagenet/val",
    "coco/train",
    "coco/val",
    "ade20k/train",
    "ade20k/val",
    "shards/train",
)
"""Names of all streams of scenes. A stream's index decides its scenes: only append new ones."""


def _check_arguments(out: Path, seed: int, **counts: int) -> None:
    for field, count in counts.items():
        if count < 1:
            raise ValueError(f"{field}: {count} is too few; give 1 or more")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative; give 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists already; name a new folder or remove that one")


# Parts: each yields once per image or document ----------------------------------------------------


def _write_parts(writer: _Writer, sizes: WorldSizes) -> Iterator[None]:
    """Writes all parts."""
    for split, count in (("train", sizes.num_train), ("val", sizes.num_val)):
        yield from _write_images(writer, split, count)
        yield from _write_texts(writer, split, count)
    yield from _write_pairs(
        writer, {"train": sizes.num_train, "val": sizes.num_val, "test": sizes.num_test}
    )
    for split, count in zip(("train", "val"), sizes.vqa, strict=True):
        yield from _write_vqa(writer, split, count)
    for split, count in zip(("train", "dev"), sizes.nlvr2, strict=True):
        yield from _write_nlvr2(writer, split, count)
    for split, count in zip(("train", "val"), sizes.small, strict=True):
        yield from _write_imagenet(writer, split, count)
        yield from _write_coco(writer, split, count)
        yield from _write_ade20k(writer, split, count)
    yield from _write_shards(writer, sizes.small[0])


def _write_images(writer: _Writer, split: str, count: int) -> Iterator[None]:
    for index, scene, _ in writer.make_scenes(f"images/{split}", count):
        writer.render_scene(scene, f"images/{split}/{index:06d}.png")
        yield


def _write_texts(writer: _Writer, split: str, count: int) -> Iterator[None]:
    documents = []
    for index, scene, rng in writer.make_scenes(f"texts/{split}", count):
        documents.append(write_paragraph(scene, rng))
        if len(documents) == DOCUMENTS_PER_FILE or index == count - 1:
            writer.write_text(
                "\n\n".join(documents) + "\n",
                f"texts/{split}/{index // DOCUMENTS_PER_FILE:03d}.txt",
            )
            documents = []
        yield


def _write_pairs(writer: _Writer, counts: dict[str, int]) -> Iterator[None]:
    records: list[dict[str, Any]] = []
    for split, count in counts.items():
        for _, scene, rng in writer.make_scenes(f"pairs/{split}", count):
            imgid = len(records)
            filename = f"{imgid:06d}.png"
            writer.render_scene(scene, f"pairs/images/{filename}")
            sentids = [imgid * CAPTIONS_PER_IMAGE + k for k in range(CAPTIONS_PER_IMAGE)]
            sentences = [
                {"tokens": _tokenize(raw), "raw": raw, "imgid": imgid, "sentid": sentid}
                for raw, sentid in zip(
                    write_captions(scene, rng, CAPTIONS_PER_IMAGE), sentids, strict=True
                )
            ]
            head = {
                "filepath": "images",
                "filename": filename,
                "split": split,
                "imgid": imgid,
                "cocoid": imgid,
            }
            records.append({**head, "sentids": sentids, "sentences": sentences})
            yield
    writer.write_text(
        json.dumps({"dataset": "world", "images": records}), "pairs/dataset_world.json"
    )


def _tokenize(raw: str) -> list[str]:
    """Returns Karpathy's tokens: the words without punctuation."""
    return [word for word in raw.split() if word.isalnum()]


def _write_vqa(writer: _Writer, split: str, count: int) -> Iterator[None]:
    subset = f"{split}2014"
    questions, annotations = [], []
    for index, scene, rng in writer.make_scenes(f"vqa/{split}", count):
        # Like COCO's ids, these are unique over both splits and not consecutive.
        image_id = 2 * (index + 1) + (split == "val")
        writer.render_scene(scene, f"vqa/{subset}/COCO_{subset}_{image_id:012d}.png")
        for k, question in enumerate(ask_questions(scene, rng, QUESTIONS_PER_IMAGE)):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + k}
            questions.append({**ids, "question": question.text})
            annotations.append({**ids, **_make_annotation(question)})
        yield
    head = {
        "info": {"description": "embedded world"},
        "license": {},
        "data_type": "mscoco",
        "data_subtype": subset,
    }
    body = {**head, "task_type": "Open-Ended", "questions": questions}
    writer.write_text(json.dumps(body), f"vqa/v2_OpenEnded_mscoco_{subset}_questions.json")
    writer.write_text(
        json.dumps({**head, "annotations": annotations}), f"vqa/v2_mscoco_{subset}_annotations.json"
    )


def _make_annotation(question: Question) -> dict[str, Any]:
    """Returns VQAv2's annotation fields.

    Ten annotators agree; the question type is the question's first two words.
    """
    answer = question.answer
    answer_type = "number" if answer.isdigit() else "other"
    if answer in ("yes", "no"):
        answer_type = "yes/no"
    votes = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    opening = " ".join(question.text.split()[:2])
    return {
        "question_type": opening,
        "answer_type": answer_type,
        "multiple_choice_answer": answer,
        "answers": votes,
    }


def _write_nlvr2(writer: _Writer, split: str, count: int) -> Iterator[None]:
    records = []
    lefts = writer.make_scenes(f"nlvr2/{split}", count)
    rights = writer.make_scenes(f"nlvr2/{split}/right", count)
    for (index, left, rng), (_, right, _) in zip(lefts, rights, strict=True):
        sentence, label = make_statement(left, right, rng)
        directory = index % 100
        folder = f"nlvr2/images/train/{directory}" if split == "train" else f"nlvr2/{split}"
        for side, scene in enumerate((left, right)):
            writer.render_scene(scene, f"{folder}/{split}-{index}-0-img{side}.png")
        record: dict[str, Any] = {
            "sentence": sentence,
            "label": str(label),
            "identifier": f"{split}-{index}-0-0",
        }
        if split == "train":  # dev has no directory
            record["directory"] = directory
        records.append(record)
        yield
    writer.write_text(_format_json_lines(records), f"nlvr2/{split}.json")


def _format_json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write_imagenet(writer: _Writer, split: str, count: int) -> Iterator[None]:
    for index, scene, _ in writer.make_scenes(
        f"imagenet/{split}", count, num_objects=(1.0, 0.0, 0.0)
    ):
        label = IMAGENET_CLASSES[index % len(IMAGENET_CLASSES)]
        color, shape = label.split("_")
        scene = replace(scene, objects=(replace(scene.objects[0], color=color, shape=shape),))
        writer.render_scene(scene, f"imagenet/{split}/{label}/{label}_{index:06d}.png")
        yield


def _write_coco(writer: _Writer, split: str, count: int) -> Iterator[None]:
    size = writer.image_size
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index, scene, rng in writer.make_scenes(f"coco/{split}", count):
        image_id = 2 * (index + 1) + (split == "val")
        file_name = f"{image_id:012d}.png"
        writer.render_scene(scene, f"coco/{split}/{file_name}")
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for item in scene.objects:
            instances.append(
                {"id": len(instances) + 1, "image_id": image_id, **_make_instance(item, size)}
            )
        for caption in write_captions(scene, rng, CAPTIONS_PER_IMAGE):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption})
        yield
    categories = [
        {"id": k, "name": shape, "supercategory": "shape"}
        for k, shape in enumerate(SHAPES, start=1)
    ]
    head = {"info": {"description": "embedded world"}, "licenses": [], "images": images}
    body = {**head, "annotations": instances, "categories": categories}
    writer.write_text(json.dumps(body), f"coco/annotations/instances_{split}.json")
    if split == "val":
        writer.write_text(
            json.dumps({**head, "annotations": captions}), "coco/annotations/captions_val.json"
        )


def _make_instance(item: Object, size: int) -> dict[str, Any]:
    """Returns COCO's fields of an object: polygon, its box xywh and area, in rounded pixels."""
    corners = (size * compute_outline(item)).round(2)  # [V, 2]
    low, high = corners.min(axis=0), corners.max(axis=0)
    x, y = corners.T
    area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return {
        "category_id": 1 + SHAPES.index(item.shape),
        "segmentation": [[float(value) for value in corners.ravel()]],
        "bbox": [round(float(value), 2) for value in (*low, *(high - low))],
        "area": round(area, 4),
        "iscrowd": 0,
    }


def _write_ade20k(writer: _Writer, split: str, count: int) -> Iterator[None]:
    folder = {"train": "training", "val": "validation"}[split]
    writer.write_text(
        "".join(f"{name}\n" for name in SEMANTIC_CLASSES),
        "ade20k/classes.txt",
    )
    for index, scene, _ in writer.make_scenes(f"ade20k/{split}", count):
        stem = f"{folder}/ADE_{split}_{index + 1:08d}.png"
        writer.render_scene(scene, f"ade20k/images/{stem}")
        writer.save_image(
            Image.fromarray(render_semantic_map(scene, writer.image_size)),
            f"ade20k/annotations/{stem}",
        )
        yield


def _write_shards(writer: _Writer, count: int) -> Iterator[None]:
    scenes = writer.make_scenes("shards/train", count)
    for shard in range(math.ceil(count / PAIRS_PER_SHARD)):
        path = f"shards/train-{shard:06d}.tar"
        writer.make_parent(path)
        with tarfile.open(writer.root / path, "w") as tar:
            for index, scene, rng in islice(scenes, PAIRS_PER_SHARD):
                caption = write_captions(scene, rng, 1)[0]
                record = {
                    "key": f"{index:09d}",
                    "caption": caption,
                    "objects": [describe_object(item) for item in scene.objects],
                }
                buffer = io.BytesIO()
                render(scene, writer.image_size).save(buffer, format="PNG", compress_level=1)
                _add_member(tar, f"{index:09d}.png", buffer.getvalue())
                _add_member(tar, f"{index:09d}.txt", caption.encode())
                _add_member(tar, f"{index:09d}.json", json.dumps(record).encode())
                yield


def _add_member(tar: tarfile.TarFile, member: str, content: bytes) -> None:
    header = tarfile.TarInfo(member)  # its time stays 0, so that the same world has the same bytes
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
