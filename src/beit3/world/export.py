"""Writes the embedded world to disk in the public datasets' own file formats, so that there is only
one data path.

Layout under `out` (every part and split has scenes of its own; pictures are PNG throughout):
  images/{train,val}/NNNNNN.png                plain pictures
  texts/{train,val}/NNN.txt                    documents separated by a blank line
  pairs/dataset_world.json, pairs/images/      Karpathy's caption file (train, val, test)
  vqa/                                         VQAv2 questions and annotations;
  COCO_<split>_<id>.png
  nlvr2/{train,dev}.json                       JSON lines; images/train/<directory>/, dev/
  imagenet/{train,val}/<color>_<shape>/        ten class folders
  coco/annotations/, coco/{train,val}/         COCO instances and captions
  ade20k/{images,annotations}/{training,validation}/, ade20k/classes.txt
  shards/train-NNNNNN.tar                      WebDataset tars of png, txt and json members
"""

import io
import json
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
DOCUMENTS_PER_FILE = 1000
PAIRS_PER_SHARD = 300
STREAM, SEED = (
    2**32,
    2**40,
)  # scene seeds set aside for one stream, and for all streams of one world


@dataclass(frozen=True)
class WorldSizes:
    """How much of everything there is; the parts that only show a format take a fixed share of the
    pictures."""

    num_train: int
    num_val: int
    num_test: int
    num_questions: int

    @property
    def vqa(self) -> tuple[int, int]:
        """Pictures of the VQA train and val splits."""
        return self.num_questions // QUESTIONS_PER_IMAGE, self.num_val

    @property
    def nlvr2(self) -> tuple[int, int]:
        """Statements, each on two pictures, of NLVR2's train and dev."""
        return max(1, self.num_train // 6), max(1, self.num_val // 2)

    @property
    def small(self) -> tuple[int, int]:
        """Pictures of ImageNet, COCO and ADE20K, train and val (the tars take the first number)."""
        least = len(IMAGENET_CLASSES)
        return max(least, self.num_train // 10), max(least, self.num_val // 5)

    def total(self) -> int:
        """Steps that `progress` counts: one per picture or document."""
        pairs = self.num_train + self.num_val + self.num_test
        plain = 2 * (self.num_train + self.num_val)
        return plain + pairs + sum(self.vqa) + sum(self.nlvr2) + 3 * sum(self.small) + self.small[0]


def write_world(
    out: str | Path,
    *,
    num_train: int = 6000,
    num_val: int = 500,
    num_test: int = 500,
    num_questions: int = 9000,
    image_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the whole world to the new folder `out`: all of it or, when interrupted, nothing.

    `num_questions` counts the VQA training questions (3 per picture). The same arguments give the
    same bytes.
    ValueError: a size below 1 (3 questions), a negative seed, or an `out` that exists and is not an
    empty folder.
    """
    out = Path(out).absolute()
    _check(out, seed, num_train=num_train, num_val=num_val, num_test=num_test)
    if num_questions < QUESTIONS_PER_IMAGE:
        raise ValueError(
            f"num_questions: {num_questions} is below the {QUESTIONS_PER_IMAGE} of one picture"
        )
    sizes = WorldSizes(num_train, num_val, num_test, num_questions)
    partial = out.with_name(
        f".{out.name}.partial-{os.getpid()}"
    )  # a sibling, so that the rename is atomic
    try:
        shutil.rmtree(partial, ignore_errors=True)
        camera = _Camera(partial, image_size, seed)
        for done, _ in enumerate(_parts(camera, sizes), start=1):
            if progress is not None:
                progress(done, sizes.total())
        os.replace(partial, out)
    except BaseException:  # an interrupt from the keyboard included
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass(frozen=True)
class _Camera:
    """Deals out scenes and writes files below `root`."""

    root: Path
    image_size: int
    seed: int

    def scenes(
        self, stream: str, count: int, *, num_objects: tuple[float, float, float] = NUM_OBJECTS
    ) -> Iterator[tuple[int, Scene, np.random.Generator]]:
        """(index, scene, generator for its words) of a stream; no two streams, of any `seed`, share
        a scene seed."""
        first = self.seed * SEED + STREAMS.index(stream) * STREAM
        for index in range(count):
            scene = make_scene(first + index, num_objects=num_objects)
            yield index, scene, np.random.default_rng((first + index, 1))

    def shoot(self, scene: Scene, path: str) -> None:
        self.picture(render(scene, self.image_size), path)

    def picture(self, picture: Image.Image, path: str) -> None:
        self.folder(path)
        picture.save(self.root / path, compress_level=1)  # twice as fast as the default, 5 % larger

    def text(self, text: str, path: str) -> None:
        self.folder(path)
        (self.root / path).write_text(text, encoding="utf-8")

    def folder(self, path: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)


# A stream's place decides its scenes: append only.
STREAMS = (
    *(
        "images/train",
        "images/val",
        "texts/train",
        "texts/val",
        "pairs/train",
        "pairs/val",
        "pairs/test",
    ),
    *("vqa/train", "vqa/val", "nlvr2/train", "nlvr2/train/right", "nlvr2/dev", "nlvr2/dev/right"),
    *(
        "imagenet/train",
        "imagenet/val",
        "coco/train",
        "coco/val",
        "ade20k/train",
        "ade20k/val",
        "shards/train",
    ),
)


def _check(out: Path, seed: int, **counts: int) -> None:
    for field, count in counts.items():
        if count < 1:
            raise ValueError(f"{field}: {count} is too few; give 1 or more")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative; give 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists already; name a new folder or remove that one")


def _parts(camera: _Camera, sizes: WorldSizes) -> Iterator[None]:
    """Writes everything, yielding once per picture or document."""
    for split, count in (("train", sizes.num_train), ("val", sizes.num_val)):
        yield from _images(camera, split, count)
        yield from _texts(camera, split, count)
    yield from _pairs(
        camera, {"train": sizes.num_train, "val": sizes.num_val, "test": sizes.num_test}
    )
    for split, count in zip(("train", "val"), sizes.vqa, strict=True):
        yield from _vqa(camera, split, count)
    for split, count in zip(("train", "dev"), sizes.nlvr2, strict=True):
        yield from _nlvr2(camera, split, count)
    for split, count in zip(("train", "val"), sizes.small, strict=True):
        yield from _imagenet(camera, split, count)
        yield from _coco(camera, split, count)
        yield from _ade20k(camera, split, count)
    yield from _shards(camera, sizes.small[0])


def _images(camera: _Camera, split: str, count: int) -> Iterator[None]:
    for index, scene, _ in camera.scenes(f"images/{split}", count):
        camera.shoot(scene, f"images/{split}/{index:06d}.png")
        yield


def _texts(camera: _Camera, split: str, count: int) -> Iterator[None]:
    documents = []
    for index, scene, rng in camera.scenes(f"texts/{split}", count):
        documents.append(write_paragraph(scene, rng))
        if len(documents) == DOCUMENTS_PER_FILE or index == count - 1:
            camera.text(
                "\n\n".join(documents) + "\n",
                f"texts/{split}/{index // DOCUMENTS_PER_FILE:03d}.txt",
            )
            documents = []
        yield


def _pairs(camera: _Camera, counts: dict[str, int]) -> Iterator[None]:
    records: list[dict[str, Any]] = []
    for split, count in counts.items():
        for _, scene, rng in camera.scenes(f"pairs/{split}", count):
            imgid = len(records)
            filename = f"{imgid:06d}.png"
            camera.shoot(scene, f"pairs/images/{filename}")
            sentids = [imgid * CAPTIONS_PER_IMAGE + k for k in range(CAPTIONS_PER_IMAGE)]
            sentences = [
                {"tokens": _tokens(raw), "raw": raw, "imgid": imgid, "sentid": sentid}
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
    camera.text(json.dumps({"dataset": "world", "images": records}), "pairs/dataset_world.json")


def _tokens(raw: str) -> list[str]:
    """Karpathy's tokens: the words without the marks."""
    return [word for word in raw.split() if word.isalnum()]


def _vqa(camera: _Camera, split: str, count: int) -> Iterator[None]:
    subset = f"{split}2014"
    asked, answered = [], []
    for index, scene, rng in camera.scenes(f"vqa/{split}", count):
        image_id = 2 * (index + 1) + (
            split == "val"
        )  # like COCO's, unique over both splits and not consecutive
        camera.shoot(scene, f"vqa/{subset}/COCO_{subset}_{image_id:012d}.png")
        for k, question in enumerate(ask_questions(scene, rng, QUESTIONS_PER_IMAGE)):
            ids = {"image_id": image_id, "question_id": 1000 * image_id + k}
            asked.append({**ids, "question": question.text})
            answered.append({**ids, **_annotation(question)})
        yield
    head = {
        "info": {"description": "embedded world"},
        "license": {},
        "data_type": "mscoco",
        "data_subtype": subset,
    }
    body = {**head, "task_type": "Open-Ended", "questions": asked}
    camera.text(json.dumps(body), f"vqa/v2_OpenEnded_mscoco_{subset}_questions.json")
    camera.text(
        json.dumps({**head, "annotations": answered}), f"vqa/v2_mscoco_{subset}_annotations.json"
    )


def _annotation(question: Question) -> dict[str, Any]:
    """VQAv2's annotation fields: ten annotators who agree; the question type is its first two
    words."""
    answer = question.answer
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    votes = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
    opening = " ".join(question.text.split()[:2])
    return {
        "question_type": opening,
        "answer_type": kind,
        "multiple_choice_answer": answer,
        "answers": votes,
    }


def _nlvr2(camera: _Camera, split: str, count: int) -> Iterator[None]:
    lines = []
    lefts = camera.scenes(f"nlvr2/{split}", count)
    rights = camera.scenes(f"nlvr2/{split}/right", count)
    for (index, left, rng), (_, right, _) in zip(lefts, rights, strict=True):
        sentence, label = make_statement(left, right, rng)
        directory = index % 100
        folder = f"nlvr2/images/train/{directory}" if split == "train" else f"nlvr2/{split}"
        for side, scene in enumerate((left, right)):
            camera.shoot(scene, f"{folder}/{split}-{index}-0-img{side}.png")
        record = {"sentence": sentence, "label": str(label), "identifier": f"{split}-{index}-0-0"}
        lines.append(
            {**record, "directory": directory} if split == "train" else record
        )  # dev has no directory
        yield
    camera.text(_lines(lines), f"nlvr2/{split}.json")


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _imagenet(camera: _Camera, split: str, count: int) -> Iterator[None]:
    for index, scene, _ in camera.scenes(f"imagenet/{split}", count, num_objects=(1.0, 0.0, 0.0)):
        label = IMAGENET_CLASSES[index % len(IMAGENET_CLASSES)]
        color, shape = label.split("_")
        scene = replace(scene, objects=(replace(scene.objects[0], color=color, shape=shape),))
        camera.shoot(scene, f"imagenet/{split}/{label}/{label}_{index:06d}.png")
        yield


def _coco(camera: _Camera, split: str, count: int) -> Iterator[None]:
    size = camera.image_size
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    for index, scene, rng in camera.scenes(f"coco/{split}", count):
        image_id = 2 * (index + 1) + (split == "val")
        file_name = f"{image_id:012d}.png"
        camera.shoot(scene, f"coco/{split}/{file_name}")
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for item in scene.objects:
            instances.append(
                {"id": len(instances) + 1, "image_id": image_id, **_instance(item, size)}
            )
        for caption in write_captions(scene, rng, CAPTIONS_PER_IMAGE):
            said.append({"id": len(said) + 1, "image_id": image_id, "caption": caption})
        yield
    categories = [
        {"id": k, "name": shape, "supercategory": "shape"}
        for k, shape in enumerate(SHAPES, start=1)
    ]
    head = {"info": {"description": "embedded world"}, "licenses": [], "images": images}
    body = {**head, "annotations": instances, "categories": categories}
    camera.text(json.dumps(body), f"coco/annotations/instances_{split}.json")
    if split == "val":
        camera.text(json.dumps({**head, "annotations": said}), "coco/annotations/captions_val.json")


def _instance(item: Object, size: int) -> dict[str, Any]:
    """COCO's fields of one object: polygon, its box xywh and area, in pixels rounded as COCO's
    are."""
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


def _ade20k(camera: _Camera, split: str, count: int) -> Iterator[None]:
    folder = {"train": "training", "val": "validation"}[split]
    camera.text(
        "".join(f"{describe_object}\n" for describe_object in SEMANTIC_CLASSES),
        "ade20k/classes.txt",
    )
    for index, scene, _ in camera.scenes(f"ade20k/{split}", count):
        stem = f"{folder}/ADE_{split}_{index + 1:08d}.png"
        camera.shoot(scene, f"ade20k/images/{stem}")
        camera.picture(
            Image.fromarray(render_semantic_map(scene, camera.image_size)),
            f"ade20k/annotations/{stem}",
        )
        yield


def _shards(camera: _Camera, count: int) -> Iterator[None]:
    dealt = camera.scenes("shards/train", count)
    for shard in range(-(-count // PAIRS_PER_SHARD)):
        path = f"shards/train-{shard:06d}.tar"
        camera.folder(path)
        with tarfile.open(camera.root / path, "w") as tar:
            for index, scene, rng in islice(dealt, PAIRS_PER_SHARD):
                caption = write_captions(scene, rng, 1)[0]
                record = {
                    "key": f"{index:09d}",
                    "caption": caption,
                    "objects": [describe_object(item) for item in scene.objects],
                }
                buffer = io.BytesIO()
                render(scene, camera.image_size).save(buffer, format="PNG", compress_level=1)
                _add(tar, f"{index:09d}.png", buffer.getvalue())
                _add(tar, f"{index:09d}.txt", caption.encode())
                _add(tar, f"{index:09d}.json", json.dumps(record).encode())
                yield


def _add(tar: tarfile.TarFile, member: str, content: bytes) -> None:
    header = tarfile.TarInfo(member)  # its time stays 0: the same world, the same bytes
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
