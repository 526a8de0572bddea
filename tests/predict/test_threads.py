"""One predictor serves several threads at once."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.predict import Predictor
from beit3.quantize import check_support
from tests.predict.networks import assert_same, make_pixels, make_predictor

ROUNDS, THREADS = 12, 4
TEXTS = ["red", "how many red circles are left of the blue square", "is it a ball", "what"]


def run_in_threads(calls: list) -> list:
    with ThreadPoolExecutor(THREADS) as executor:
        return [future.result() for future in [executor.submit(call) for call in calls]]


def make_calls(predictor: Predictor, rounds: int, sizes: int) -> list:
    """Returns calls of changing batch size and kind of input."""

    def embed(number: int) -> dict:
        count = 1 + number % sizes
        images = [make_pixels(number * 10 + index) for index in range(count)]
        features = predictor.embed(images, TEXTS[:count], workers=number % 2)
        pairs = predictor.embed_pairs(images, TEXTS[number % 4])
        return {
            "image": features["image"].tolist(),
            "text": features["text"].tolist(),
            "pair": pairs["text"].tolist(),
        }

    return [lambda number=number: embed(number) for number in range(rounds)]


def skip_unless_available(options: dict) -> None:
    if options.get("packed") and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    if options.get("compiled") and shutil.which("g++") is None:
        pytest.skip("compilation needs a C++ compiler")
    if options.get("precision") == "int8":
        try:
            check_support(torch.device("cpu"))
        except ValueError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True},
        {"precision": "bfloat16"},
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
        pytest.param({"precision": "int8"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_threads_get_what_one_thread_gets(options, root):
    skip_unless_available(options)
    predictor = make_predictor("retrieval", root, **options)
    compiles = predictor._is_compiled  # every size is a program
    calls = make_calls(predictor, *((8, 2) if compiles else (ROUNDS, 3)))
    in_threads = run_in_threads(calls)  # first, so that threads compile and lay out weights
    tolerance = 0.02 if "precision" in options else 1e-4
    assert_same(in_threads, [call() for call in calls], tolerance)


@pytest.mark.parametrize("task_name", ["vqa", "captioning", "imagenet", "nlvr2"])
def test_threads_predict_as_one_thread_does(task_name, root):
    predictor = make_predictor(task_name, root)
    texts = {"vqa": 1, "nlvr2": 1}.get(task_name, 0)
    num_images = 2 if task_name == "nlvr2" else 1

    def predict(number: int) -> list:
        images = [Image.fromarray(make_pixels(number + index)) for index in range(num_images)]
        return predictor(*images, *[TEXTS[number % 4]] * texts)

    calls = [lambda number=number: predict(number) for number in range(ROUNDS)]
    assert_same(run_in_threads(calls), [call() for call in calls])


def test_threads_fingerprint_and_inspect_one_predictor(root):
    predictor = make_predictor("retrieval", root)
    fingerprints = run_in_threads([lambda: predictor.fingerprint] * 8)
    assert all(fingerprint == fingerprints[0] for fingerprint in fingerprints)
    images = [make_pixels(number) for number in range(8)]
    calls = [
        lambda image=image: predictor.inspect(image, TEXTS[1], attention=True) for image in images
    ]
    for actual, call in zip(run_in_threads(calls), calls, strict=True):
        expected = call().get_word_attention()
        np.testing.assert_allclose(actual.get_word_attention(), expected, atol=1e-6)
