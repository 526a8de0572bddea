"""Lists of inputs: the same as one by one, in order, in batches, with broken inputs among them."""

import io
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.predict import Predictor
from beit3.predict.inputs import plan_batches, run_in_batches
from beit3.task import list_tasks
from tests.predict.networks import (
    assert_same,
    make_pixels,
    make_predictor,
    write_image,
)

TASKS = [name for name in list_tasks() if name != "pretrain"]
QUESTIONS = ["what ?", "what color is the circle left of the red square ?", "how many", "is it"]


@pytest.fixture(scope="module")
def retrieval(root) -> Predictor:
    return make_predictor("retrieval", root)


@pytest.fixture(scope="module")
def vqa(root) -> Predictor:
    return make_predictor("vqa", root)


@pytest.fixture
def images(tmp_path) -> list:
    """Images of several kinds and sizes."""
    path = write_image(tmp_path / "a.png", 0)
    buffer = io.BytesIO()
    Image.fromarray(make_pixels(1, 40, 25)).save(buffer, "PNG")
    return [
        path,
        buffer.getvalue(),
        make_pixels(2, 33, 64),
        torch.from_numpy(make_pixels(3)).permute(2, 0, 1),
    ]


@pytest.mark.parametrize("task_name", TASKS)
def test_many_give_what_each_gives(task_name, root, images):
    predictor = make_predictor(task_name, root)
    lists = {"vqa": (images, QUESTIONS), "nlvr2": (images, images[::-1], QUESTIONS)}
    inputs = lists.get(task_name, (images,))
    expected = [predictor(*one) for one in zip(*inputs, strict=True)]
    for options in ({}, {"batch_size": 3, "workers": 2}, {"batch_size": 1}):
        assert_same(predictor(*inputs, **options), expected)


@pytest.mark.parametrize("task_name", ["retrieval", "backbone"])
def test_lists_may_hold_records_with_different_inputs(task_name, root, images):
    predictor = make_predictor(task_name, root)
    pairs = ([images[0], None, images[1], images[2]], ["red", "how many", None, ""])
    expected = [predictor(*pair) for pair in zip(*pairs, strict=True)]
    assert_same(predictor(*pairs), expected)
    assert [sorted(result[0]) for result in expected].count(["id", "image"]) == 2


def test_one_image_serves_many_questions_and_one_question_many_images(vqa, images):
    expected = [vqa(images[1], question) for question in QUESTIONS]
    for image in (images[1], io.BytesIO(images[1]), Image.open(io.BytesIO(images[1]))):
        assert_same(vqa(image, QUESTIONS, workers=2), expected)
    expected = [vqa(image, "how many") for image in images]
    assert_same(vqa(images, "how many"), expected)
    assert_same(vqa(image=images, question="how many"), expected)
    assert_same(vqa(images, ["how many"] * 4), expected)


def test_lists_are_any_iterables(vqa, retrieval, images):
    expected = [vqa(image, "how many") for image in images]
    for many in (tuple(images), iter(images), (image for image in images)):
        assert_same(vqa(many, "how many"), expected)
    stack = np.stack([make_pixels(0), make_pixels(1)])
    assert_same(vqa(stack, "is it"), [vqa(stack[0], "is it"), vqa(stack[1], "is it")])
    assert_same(
        vqa(torch.from_numpy(stack).permute(0, 3, 1, 2), "is it"), vqa(list(stack), "is it")
    )
    assert_same(vqa(images[0], np.array(QUESTIONS)), vqa(images[0], QUESTIONS))
    assert vqa([], "how many") == [] == vqa([], [])
    assert len(vqa([images[0]], "how many")) == 1, "a list of one gives a list of one"
    paths = [str(images[0]), images[0]]
    assert retrieval.embed(path for path in paths)["image"].shape[0] == 2


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((["a", "b"], ["c"]), {}, "lists of different lengths: 2 of image, 1 of question: give as"),
        ((["a"],), {}, "vqa takes image, question: 1 inputs given"),
        ((["a"], "c"), {"batch_size": 0}, "batch_size 0 is no size of a batch: give 1 or more"),
        ((["a"], "c"), {"workers": -1}, "workers -1 is no number of threads: give 0 or more"),
        ((["a"], "c"), {"on_error": "ignore"}, "on_error 'ignore' is unknown: give raise, skip or"),
        ((["a"],), {"text": "c"}, r"vqa takes image, question: 2 inputs given \(text by name\)"),
    ],
)
def test_what_is_ambiguous_is_refused(vqa, inputs, options, message):
    with pytest.raises(ValueError, match=message) as error:
        vqa(*inputs, **options)
    assert "\n" not in str(error.value)


# Broken inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_a_broken_input_is_named_by_index_and_name(vqa, retrieval, images, tmp_path, workers):
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    many = [*images, tmp_path / "page.jpg", tmp_path / "absent.png"]
    with pytest.raises(ValueError, match=r"inputs\[4\]: image .*page\.jpg is a web page"):
        vqa(many, "how many", workers=workers)
    with pytest.raises(ValueError, match=r"images\[4\]: image .*page\.jpg is a web page"):
        retrieval.embed(many, workers=workers)
    with pytest.raises(ValueError, match=r"pairs\[4\]: image .*page\.jpg is a web page"):
        retrieval.embed_pairs(many, "red", workers=workers)
    with pytest.raises(ValueError, match=r"images\[4\]: image .*page\.jpg is a web page"):
        retrieval.embed_patches(many, workers=workers)


@pytest.mark.parametrize("workers", [0, 3])
def test_skipped_inputs_leave_their_places_empty_and_are_named(
    vqa, retrieval, images, tmp_path, caplog, workers
):
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    many = [tmp_path / "absent.png", *images, tmp_path / "page.jpg", b"no image"]
    with caplog.at_level(logging.WARNING, "beit3.predict"):
        results = vqa(many, "how many", batch_size=2, workers=workers, on_error="skip")
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(":")[0] for line in lines] == ["inputs[0]", "inputs[5]", "inputs[6]"]
    assert "absent.png" in lines[0] and "page.jpg is a web page" in lines[1]
    assert [result is None for result in results] == [True, *[False] * 4, True, True]
    assert_same(results[1:5], [vqa(image, "how many") for image in images])

    named: dict[int, str] = {}
    features = retrieval.embed(
        many, ["red", "", "ball"], batch_size=2, workers=workers, on_error=named.__setitem__
    )
    assert list(np.isnan(features["image"]).all(1)) == [True, *[False] * 4, True, True]
    assert list(np.isnan(features["text"]).all(1)) == [False, True, False]
    assert named[1] == "texts[1]: the text is empty: leave it out"
    assert named[5].startswith("images[5]: image ")
    np.testing.assert_allclose(features["image"][1:5], retrieval.embed(images)["image"], atol=1e-6)
    pairs = retrieval.embed_pairs(many, "red", on_error="skip", workers=workers)
    assert list(np.isnan(pairs["text"]).all(1)) == [True, *[False] * 4, True, True]
    maps = retrieval.embed_patches(many, on_error="skip", workers=workers)
    assert maps.ndim == 4 and np.isnan(maps[[0, 5, 6]]).all()


def test_nothing_but_broken_inputs(vqa, retrieval, tmp_path):
    many = [tmp_path / "absent.png", b"no image"]
    assert vqa(many, "how many", on_error="skip") == [None, None]
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        retrieval.embed(many, on_error="skip")
    with pytest.raises(ValueError, match="absent.png") as error:
        vqa(many[0], "how many", on_error="skip")
    assert "inputs[" not in str(error.value), "one input is no list"


def test_errors_of_the_program_are_no_broken_inputs(retrieval, images, monkeypatch):
    def fail(*arguments):
        raise TypeError("a fault of the program")

    monkeypatch.setattr(retrieval.task, "example", fail)
    for workers in (0, 2):
        with pytest.raises(TypeError, match="a fault of the program"):
            retrieval.embed(images, on_error="skip", workers=workers)


# Batches ------------------------------------------------------------------------------------------


def test_texts_of_similar_length_share_a_batch():
    records = [{"text": "a" * length} for length in (9, 1, 8, 2, 7, 3)] + [{"image": 1}]
    assert plan_batches(records, 2) == [[1, 3], [5, 4], [2, 0], [6]]


def test_pictures_are_decoded_while_the_network_computes():
    """The network waits here until an input of the next batch was prepared by another thread."""
    prepared, threads = threading.Event(), set()

    def prepare(record):
        threads.add(threading.current_thread())
        if record["number"] == 3:
            prepared.set()
        return record

    def run(examples):
        assert prepared.wait(timeout=10)
        return [example["number"] for example in examples]

    records = [{"number": number} for number in range(9)]
    options = {"on_error": "raise", "label": "inputs"}
    assert run_in_batches(records, prepare, run, batch_size=2, workers=2, **options) == list(
        range(9)
    )
    assert threading.current_thread() not in threads and len(threads) <= 2
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        run_in_batches(
            records, prepare, lambda examples: 1 // 0, batch_size=2, workers=2, **options
        )
    assert threading.active_count() == before, "no thread is left behind"


def test_batches_never_exceed_their_size(retrieval, images, monkeypatch):
    sizes = []
    encode = retrieval.encode
    monkeypatch.setattr(
        retrieval, "encode", lambda batch: sizes.append(len(batch["image"])) or encode(batch)
    )
    retrieval.embed(images * 2, batch_size=3)
    assert sizes == [3, 3, 2]


def test_a_batch_is_encoded_as_its_inputs_are(retrieval, root, images):
    for predictor in (retrieval, make_predictor("backbone", root)):
        task = predictor.task
        examples = [
            task.example({"id": "0", "image": image, "text": text}, False)
            for image, text in zip(images, QUESTIONS, strict=True)
        ]
        encoded = predictor.encode(task.without_network().collate(examples))
        embedded = predictor.embed(images, QUESTIONS)
        for modality in ("image", "text"):
            assert encoded[modality].dtype == np.float32
            np.testing.assert_allclose(encoded[modality], embedded[modality], atol=1e-5)
        only_images = [task.example({"id": "0", "image": image}, False) for image in images]
        assert list(predictor.encode(task.collate(only_images))) == ["image"]
    with pytest.raises(ValueError, match="vqa has no features of single inputs"):
        make_predictor("vqa", root).encode({"image": torch.zeros(1, 3, 32, 32)})


def test_a_shared_pillow_image_is_read_by_many_threads(retrieval, tmp_path):
    """Pillow reads the file of a lazily opened image when its pixels are first needed."""
    path = write_image(tmp_path / "large.png", 5, 400, 400)
    expected = retrieval.embed(path)["image"]
    for _ in range(5):
        with Image.open(path) as image:
            features = retrieval.embed([image] * 8, workers=4)["image"]
        np.testing.assert_allclose(features, expected.repeat(8, 0), atol=1e-6)
