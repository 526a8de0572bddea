"""Folders to share: saved with a model card, and loaded from disk and from the hub."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import beit3
from beit3.data.views.preprocessing import Preprocessing
from beit3.predict import from_pretrained, load
from beit3.recipe import TaskConfig
from beit3.task import load_task
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.weights import hub
from beit3.weights.card import read_run, write_card
from beit3.weights.convert import convert_released
from beit3.weights.names import find_pretrained
from beit3.weights.release_format import to_released_state
from beit3.weights.store import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, save_weights
from tests.hub_server import COMMIT, serve_repository
from tests.weights.states import BACKBONE

ANSWERS = ("red", "green", "a blue one")
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
QUESTION = "a red cube"


@pytest.fixture
def task(tokenizer):
    model = replace(BACKBONE, vocab_size=64, text_positions=66, final_norm=False)
    config = VQAConfig(
        model=model, image=Preprocessing(16), answers=ANSWERS, num_answers=3, text_length=12
    )
    task = VQA(config, tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


@pytest.fixture
def released(task, tmp_path):
    """A released-shaped file; its tokenizer and its answers come apart from it."""
    torch.save({"model": to_released_state(task)}, tmp_path / "released.pth")
    return tmp_path / "released.pth"


@pytest.fixture
def run(task, tmp_path):
    """A run directory after three evaluations, of which the second was the best."""
    directory = tmp_path / "runs" / "vqa-mine"
    for name in ("best", "last"):
        save_weights(task, directory / name)
    recipe = {
        "data": {"root": "/home/me/secret", "batch": {"main": 32}},
        "optim": {"lr": 0.0005, "weight_decay": 0.05},
        "run": {"steps": 300, "seed": 7},
    }
    content = {"task": "vqa", "init": "/home/me/runs/pretrain/last", "recipe": recipe}
    (directory / "recipe.json").write_text(json.dumps(content))
    lines = [
        {"step": 100, "val/accuracy": 0.5, "val/official": 0.4},
        {"step": 150, "loss": 3.0},
        {"step": 200, "val/accuracy": 0.75, "val/official": 0.7},
        {"step": 300, "val/accuracy": 0.25, "val/official": 0.2},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def compute_logits(predictor) -> torch.Tensor:
    task = predictor.task
    batch = task.collate([task.example(task.record(IMAGE, QUESTION), False)])
    with torch.inference_mode():
        return task.outputs(batch)["logits"]


def test_a_released_file_our_folder_and_a_hub_folder_give_equal_outputs(
    released, tokenizer, tmp_path, monkeypatch
):
    pytest.importorskip("huggingface_hub")
    tokenizer.save(tmp_path / "beit3.spm")
    from_file = load(released, text_model=tmp_path / "beit3.spm", answers=ANSWERS)
    expected = compute_logits(from_file)

    convert_released(released, tmp_path / "converted", answers=ANSWERS, tokenizer=tokenizer)
    folder = from_file.save_pretrained(tmp_path / "saved", license="mit")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "text.model",
    }
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "optimizer.safetensors").write_bytes(b"large")
    (folder / "checkpoints").mkdir()
    for file in ("model.safetensors", "config.json", "text.model", "beit3.spm"):
        (folder / "checkpoints" / file).write_bytes(b"large")
    with serve_repository("me/vqa", folder, monkeypatch) as fetched:
        cached = from_pretrained("me/vqa", cache_dir=tmp_path / "hub")
        assert sorted(fetched) == ["config.json", "model.safetensors", "text.model"]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        by_prefix = load(f"hf:me/vqa@{COMMIT}")
    offline = from_pretrained("me/vqa", cache_dir=tmp_path / "hub", local_files_only=True)
    for predictor in (
        load(tmp_path / "converted"),
        load(folder),
        from_pretrained(folder),
        cached,
        by_prefix,
        offline,
    ):
        assert torch.equal(compute_logits(predictor), expected)
        assert predictor(IMAGE, QUESTION) == from_file(IMAGE, QUESTION)


def test_what_the_hub_does_not_have_is_one_line(tmp_path, task, monkeypatch):
    pytest.importorskip("huggingface_hub")
    save_weights(task, tmp_path / "weights")
    with serve_repository("me/vqa", tmp_path / "weights", monkeypatch):
        for name, revision in (("me/other", None), ("me/vqa", "v9")):
            with pytest.raises(ValueError, match=f"^{name} on the hub: ") as caught:
                from_pretrained(name, revision=revision, cache_dir=tmp_path / "hub")
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^me/vqa on the hub: "):
        from_pretrained("me/vqa", cache_dir=tmp_path / "empty", local_files_only=True)


def test_a_repository_without_weights_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "deep" / "model.safetensors").write_bytes(b"large")
    with serve_repository("me/other", tmp_path / "other", monkeypatch) as fetched:
        with pytest.raises(ValueError, match="^me/other on the hub has no model.safetensors: "):
            from_pretrained("me/other", cache_dir=tmp_path / "hub")
    assert fetched == []


def test_the_files_of_a_weights_directory_are_fetched():
    assert set(hub.FETCHED) == {MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE}


def test_the_hub_is_never_asked_unless_a_repository_is_named(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "fetch_folder", refuse)
    for name in ("me/vqa", "vqa", "runs/vqa/best"):
        with pytest.raises(ValueError, match=f"no weights at {name}"):
            load(name)
    for name in ("vqa", "./me/vqa", "runs/vqa/best", tmp_path):
        with pytest.raises(ValueError):
            from_pretrained(name)
    for name in ("hf:vqa", "hf:../x", "hf:a/b/c"):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="is no repository of the hub: give owner/name"):
            load(name)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'beit3\[hub\]'"):
        load("hf:me/vqa")


def test_the_options_of_the_hub_are_handed_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        hub, "fetch_folder", lambda name, **options: calls.append((name, options)) or tmp_path
    )
    options = {"token": "t", "cache_dir": "c", "local_files_only": True}
    for name in ("me/vqa", "hf:me/vqa", "me/vqa@v1", "hf:me/vqa@v1"):
        assert find_pretrained(name, **options) == tmp_path
    assert [name for name, _ in calls] == ["me/vqa"] * 4
    assert [options["revision"] for _, options in calls] == [None, None, "v1", "v1"]
    assert all(options.items() <= given.items() for _, given in calls)
    with pytest.raises(ValueError, match="is no repository of the hub: leave revision out"):
        find_pretrained(tmp_path, revision="v1")


# The card -----------------------------------------------------------------------------------------


def test_the_card_tells_sizes_settings_and_the_scores_of_these_weights(run, tmp_path):
    for name, step, accuracy in (("best", 200, "0.75"), ("last", 300, "0.25")):
        folder = load(run / name).save_pretrained(tmp_path / name, license="mit")
        card = (folder / "README.md").read_text()
        header = card.split("---\n")[1]
        assert header == (
            "license: mit\nlibrary_name: beit3\npipeline_tag: visual-question-answering\n"
            "tags:\n- beit3\n- vqa\n"
        )
        assert f"after step {step}." in card and f"| accuracy | {accuracy} |" in card
        assert "| learning rate | 0.0005 |" in card and "| steps | 300 |" in card
        assert "| started from | pretrain/last |" in card
        assert "| width | 64 |" in card and "| layers | 2 |" in card
        assert "16 px, resize rule squash, bicubic, mean 0.5/0.5/0.5" in card
        assert "3: red, green, a blue one" in card
        count = sum(tensor.numel() for tensor in load(folder).task.state_dict().values())
        assert f"| parameters | {count:,} |" in card
        assert "/home" not in card and str(tmp_path) not in card


def test_a_run_directory_tells_of_its_best_weights(run, tmp_path):
    assert (
        "after step 200." in (load(run).save_pretrained(tmp_path / "a") / "README.md").read_text()
    )


def test_what_is_not_known_has_no_line(task, tmp_path):
    save_weights(task, tmp_path / "weights")
    folder = load(tmp_path / "weights").save_pretrained(tmp_path / "shared")
    card = (folder / "README.md").read_text()
    for word in ("license", "Training", "Scores", "None", "needed", "nan", "[", "TODO"):
        assert word not in card.replace('images=["', ""), word
    assert "step 200" not in card


def test_another_task_than_that_of_the_run_has_no_scores(run):
    from beit3.tasks.backbone import Backbone

    assert read_run(run / "best", VQA).scores == {"accuracy": 0.75, "official": 0.7}
    assert read_run(run / "best", Backbone) is None
    assert read_run(run, VQA) is None


def test_names_cannot_break_the_table(task):
    task.config = replace(task.config, answers=("a|b", "c\nd", "e"))
    card = write_card(task, title="x")
    assert "a\\|b, c d, e |" in card
    task.config = replace(task.config, answers=tuple("abcdefghijklmnopqrstuvwxyz"))
    assert "26: a, b, c" in (card := write_card(task, title="x")) and "t and 6 more |" in card


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("backbone", 'predictor.embed(images=["picture.jpg"])'),
        ("retrieval", 'predictor.embed(images=["picture.jpg"], texts=["a red car"])'),
        ("nlvr2", 'predictor("left.jpg", "right.jpg", "both show a car")'),
        ("imagenet", 'predictor("picture.jpg")'),
        ("vqkd", "predictor.task  # takes tensors"),
    ],
)
def test_the_example_is_of_the_task_and_the_sizes_are_those_of_its_network(name, call):
    task_class = load_task(name)
    recipe = task_class.recipes.get("demo")
    config = recipe.task if recipe else TaskConfig(model=BACKBONE, image=Preprocessing(16))
    card = write_card(task_class(config), title="x")
    assert f"\n{call}\n```\n" in card
    assert f"| width | {config.model.dim} |" in card
    # A visual tokenizer has neither experts nor tokens of texts.
    for row in ("| experts |", "| rows of the token embedding |"):
        assert (row in card) == (name != "vqkd")


def test_an_example_can_have_inputs_of_its_own(task):
    card = write_card(task, title="x", example_inputs=('a "b".png', "what?"))
    assert '\npredictor("a \\"b\\".png", "what?")\n' in card and "car" not in card


# Saving -------------------------------------------------------------------------------------------


def test_a_card_that_was_edited_is_kept(task, tmp_path):
    save_weights(task, tmp_path / "weights")
    folder = load(tmp_path / "weights").save_pretrained(tmp_path / "shared")
    (folder / "README.md").write_text("mine")
    load(tmp_path / "weights").save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(compute_logits(load(folder)), compute_logits(load(tmp_path / "weights")))


def test_what_cannot_be_shared_is_refused(task, released, tokenizer, tmp_path):
    save_weights(task, tmp_path / "weights")
    predictor = load(tmp_path / "weights")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"holds notes.txt, which is no part of weights"):
        predictor.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"released.pth is a file: give a folder"):
        predictor.save_pretrained(released)
    with pytest.raises(ValueError, match="license 'mit and\\\\nmore' is no identifier"):
        predictor.save_pretrained(tmp_path / "x", license="mit and\nmore")
    with pytest.raises(ValueError, match="'x' is no repository of the hub"):
        predictor.save_pretrained(tmp_path / "x", push_to="x")
    with pytest.raises(ValueError, match="parameters are untrained"):
        load(released, task="nlvr2").save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="packed weights cannot be saved: load them in float32"):
        load(tmp_path / "weights", packed=True).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists() and (tmp_path / "full" / "notes.txt").exists()


def test_a_folder_is_uploaded_when_asked_to(task, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def __init__(self, token):
            calls.append(("token", token))

        def create_repo(self, name, *, private, exist_ok):
            calls.append(("create", name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            calls.append(("upload", repo_id, folder_path, "README.md" in allow_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    save_weights(task, tmp_path / "weights")
    folder = tmp_path / "shared"
    load(tmp_path / "weights").save_pretrained(folder, push_to="me/vqa", private=True)
    assert calls == [
        ("token", None),
        ("create", "me/vqa", True, True),
        ("upload", "me/vqa", folder, True),
    ]
    assert 'from_pretrained("me/vqa")' in (folder / "README.md").read_text()
    assert beit3.from_pretrained is from_pretrained
