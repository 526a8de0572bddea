"""Predictors with initial weights, and images of every kind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3.model.config import TINY
from beit3.predict import Predictor
from beit3.task import Task, grow_vocabulary, load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport


def make_task(name: str, root: Path) -> Task:
    """Returns the demo's network of a task with initial weights."""
    kind, tokenizer = load_task(name), TextTokenizer(root / "text.model")
    if kind.recipes and name != "pretrain":
        config: Any = kind.configure(kind.recipes["demo"].task, root)
    else:
        default = kind.Config()
        model = replace(TINY, text_positions=514)
        config = replace(default, model=model, image=replace(default.image, image_size=32))
    task = kind(grow_vocabulary(config, tokenizer), tokenizer=tokenizer)
    task.init_weights(0)
    return task


def make_predictor(name: str, root: Path, **options: Any) -> Predictor:
    return Predictor(make_task(name, root), LoadReport("nowhere", (), {}, {}), **options)


def make_pixels(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    """Returns uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path: Path, seed: int, height: int = 20, width: int = 30) -> Path:
    Image.fromarray(make_pixels(seed, height, width)).save(path)
    return path


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compares nested results; numbers may differ by rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(actual[key], value, tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            assert_same(actual_item, expected_item, tolerance)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=tolerance, rel=tolerance)
    else:
        assert actual == expected
