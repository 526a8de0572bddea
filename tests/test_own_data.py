"""A user's own data in one command, which names a folder with a table and images, initial weights,
and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE, GIANT, LARGE, SMALL, TINY
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights import initialization, store
from tests.data.prepare.test_formats_docs import SHOWN_TABLES

TABLES = {
    "vqa": "questions/train.csv",
    "nlvr2": "statements/all.csv",
    "captioning": "captions/all.csv",
    "retrieval": "captions/all.csv",
    "imagenet": "classes/all.csv",
}
PREDICTION_INPUTS = {
    "vqa": ["is it open?"],
    "nlvr2": ["cat.jpg", "one image shows a cat"],
    "retrieval": ["a red door"],
}


@pytest.fixture(scope="module")
def weights(root, tmp_path_factory) -> Path:
    """A pretraining of TINY, as it starts."""
    tokenizer = TextTokenizer(root / "text.model")
    task = Pretrain(
        PretrainConfig(model=TINY, image=Preprocessing(32), num_codes=9, text_length=20),
        tokenizer=tokenizer,
    )
    task.init_weights(0)
    path = tmp_path_factory.mktemp("own") / "weights"
    store.save_weights(task, path)
    return path


@pytest.mark.parametrize("task", TABLES)
def test_a_table_and_weights_are_enough(task, weights, tmp_path, run_cli):
    table = tmp_path / "mine" / "table.csv"
    (table.parent / "photos").mkdir(parents=True)
    table.write_text(SHOWN_TABLES[TABLES[task]])
    for number, name in enumerate(("door", "cat", "cat2")):
        Image.new("RGB", (40, 30), (80 * number, 90, 0)).save(
            table.parent / "photos" / f"{name}.jpg"
        )
    out, small = tmp_path / "run", ["--run.steps", 1, "--data.batch.main", 1, "--run.device", "cpu"]
    run_cli("train", task, "--data.root", table.parent, "--init", weights, "--out", out, *small)
    assert (table.parent / task / "main" / "train.jsonl").is_file()
    run_cli("eval", out, "--data.root", table.parent)
    photos = table.parent / "photos"
    inputs = [
        photos / word if word.endswith("jpg") else word
        for word in ("door.jpg", *PREDICTION_INPUTS.get(task, ()))
    ]
    assert run_cli("predict", out, *inputs).startswith("[{")


def test_a_folder_without_records_or_data_is_refused(weights, tmp_path, run_failing_cli):
    (tmp_path / "empty").mkdir()
    message = run_failing_cli(
        "train",
        "vqa",
        "--data.root",
        tmp_path / "empty",
        "--init",
        weights,
        "--out",
        tmp_path / "run",
    )
    assert (
        "no vqa/main/train.jsonl under" in message
        and "nor can" in message
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BASE, ["base_480", "base_224", "base_480", "base_384_coco", "base_224"]),
        (LARGE, ["large_480", "large_224", "large_480", "large_384_coco", "large_224"]),
        (GIANT, ["giant_756", "giant_224", "giant_392", "giant_420_coco", "giant_224_in21k"]),
        (SMALL, ["laptop"] * 5),
        (TINY, ["demo"] * 5),
        (replace(BASE, depth=3), ["demo"] * 5),
    ],
)
def test_the_recipe_follows_the_weights(model, expected, monkeypatch, tmp_path):
    """Without a name the first recipe for a network of their size is taken."""
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(
        initialization,
        "read_config",
        lambda path: store.StoredConfig(
            "pretrain", PretrainConfig(model=model, image=Preprocessing(model.image_size)), None, {}
        ),
    )
    monkeypatch.setattr(initialization, "find_weights", lambda path: path)
    assert [initialization.find_recipe(load_task(task), tmp_path) for task in TABLES] == expected
