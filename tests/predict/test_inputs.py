"""Every task's predictor takes images of every kind, and of every shape."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.images import open_image
from beit3.model.config import TINY
from beit3.predict import Predictor
from beit3.report.drawing import predict_and_draw
from beit3.task import grow_vocabulary, list_tasks, load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport

TASKS = [name for name in list_tasks() if name != "pretrain"]
"""Tasks that take raw inputs."""
TEXTS = {"vqa": ("what ?",), "nlvr2": ("one is red",)}
THIN_MEMORY = 200
"""MB that an image of 12,000 x 1 may take."""


@pytest.fixture(scope="module", params=TASKS)
def task_name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def predictor(task_name, root) -> Predictor:
    """The demo's network with initial weights."""
    kind, tokenizer = load_task(task_name), TextTokenizer(root / "text.model")
    if kind.recipes:
        config: Any = kind.configure(kind.recipes["demo"].task, root)
    else:
        default = kind.Config()
        config = replace(default, model=TINY, image=replace(default.image, image_size=32))
    task = kind(grow_vocabulary(config, tokenizer), tokenizer=tokenizer)
    task.init_weights(0)
    return Predictor(task, LoadReport("nowhere", (), {}, {}))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A JPEG that lies on its side, as telephones write them."""
    path = tmp_path_factory.mktemp("photo") / "图.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def predict(predictor: Predictor, task_name: str, image: Any) -> list[dict[str, Any]]:
    images = (image, image) if task_name == "nlvr2" else (image,)
    predictions = predictor(*images, *TEXTS.get(task_name, ()))
    return [
        {key: value for key, value in prediction.items() if key != "id"}
        for prediction in predictions
    ]


def test_every_kind_of_image_gives_the_same_prediction(predictor, task_name, photo):
    expected = predict(predictor, task_name, photo)
    pixels = open_image(photo)
    assert pixels.shape == (3, 30, 20)
    kinds = {
        "text": str(photo),
        "bytes": photo.read_bytes(),
        "Pillow": Image.open(photo),
        "array": pixels.permute(1, 2, 0).numpy(),
        "tensor": pixels,
    }
    for kind, image in kinds.items():
        assert predict(predictor, task_name, image) == expected, kind
    if task_name != "nlvr2":  # a file can be read once
        assert predict(predictor, task_name, io.BytesIO(photo.read_bytes())) == expected
        with photo.open("rb") as file:
            assert predict(predictor, task_name, file) == expected


def test_what_is_no_image_is_named(predictor, task_name, photo, tmp_path):
    photo_bytes = photo.read_bytes()
    files = {
        "page.jpg": (b"<html>404</html>", "is a web page: download the image again"),
        "heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(50), "is a HEIC photograph: convert it"),
        "empty.jpg": (b"", "is empty"),
        "cut.jpg": (photo_bytes[:-200], "cannot be read: "),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            predict(predictor, task_name, path)
        with pytest.raises(ValueError, match=message):
            predict(predictor, task_name, content)
    with pytest.raises(ValueError, match=r"Pillow image .*cut\.jpg cannot be read"):
        predict(predictor, task_name, Image.open(tmp_path / "cut.jpg"))
    others = {
        "is empty": (Image.new("RGB", (0, 0)), np.zeros((0, 4, 3), np.uint8)),
        "an image cannot be a": (
            torch.zeros(3, 20, 20),
            np.zeros((20, 20, 3)),
            torch.zeros(2, 3, 9, dtype=torch.uint8),
            7,
            {"a": 1},
        ),
    }
    for message, images in others.items():
        for image in images:
            with pytest.raises(ValueError, match=message):
                predict(predictor, task_name, image)
    with pytest.raises(ValueError, match="image"):
        predict(predictor, task_name, None)


@pytest.mark.parametrize("size", [(12_000, 1), (1, 12_000), (1, 1)])
def test_thin_images_take_little_memory(predictor, task_name, tmp_path, size):
    resource = pytest.importorskip("resource")

    def measure_peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    predict(predictor, task_name, Image.new("RGB", (40, 30)))
    before = measure_peak()
    image = Image.new("RGB", size, "red")
    assert predict(predictor, task_name, image)
    if task_name in ("coco", "ade20k"):
        predict_and_draw(predictor, [image], tmp_path / "drawing.png", min_score=0.0)
    assert measure_peak() - before < THIN_MEMORY


def test_features_of_every_kind_of_image_are_equal(root, photo):
    kind, tokenizer = load_task("retrieval"), TextTokenizer(root / "text.model")
    config = grow_vocabulary(kind.recipes["demo"].task, tokenizer)
    task = kind(config, tokenizer=tokenizer)
    task.init_weights(0)
    predictor = Predictor(task, LoadReport("nowhere", (), {}, {}))
    pixels = open_image(photo)
    images = [photo, photo.read_bytes(), Image.open(photo), pixels, pixels.permute(1, 2, 0).numpy()]
    features = predictor.embed([*images, io.BytesIO(photo.read_bytes())])["image"]
    np.testing.assert_allclose(features, features[:1].repeat(6, 0), rtol=0, atol=1e-6)
    for image in (*images, io.BytesIO(photo.read_bytes())):
        assert predictor.embed(image)["image"].shape == (1, features.shape[1])
