"""What the documents show is true: commands parse, fields exist, tables agree with the code, Python
runs, links lead somewhere."""

import ast
import csv
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import beit3
from beit3.cli.app import read_command
from beit3.cli.train import read_recipe
from beit3.config import override, parse_keyword_options
from beit3.data.loader import RecordDataset
from beit3.data.stores.label_names import read_answers
from beit3.data.stores.records import Records
from beit3.recipe import Recipe
from beit3.task import Task, list_tasks, load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tasks.vqa import VQA

PROJECT = Path(__file__).resolve().parents[1]
DOCS = sorted(path for path in (*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = {"", "bash", "sh", "shell", "console"}
NEEDS_FILES = {"load", "train", "read_file", "TextTokenizer"}
"""Calls whose blocks are compiled, and their imports checked, but not run."""


def named(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@cached
def blocks(path: Path) -> tuple[tuple[str, str], ...]:
    """(language, content) of the fenced blocks of a document."""
    return tuple(FENCE.findall(path.read_text(encoding="utf-8")))


def python(path: Path) -> list[str]:
    return [content for language, content in blocks(path) if language == "python"]


# Commands -----------------------------------------------------------------------------------------


def shown(path: Path) -> Iterator[list[str]]:
    """The arguments of every `beit3 ...` and `... -m beit3 ...` in shell blocks, comments and
    environment taken off."""
    for language, content in blocks(path):
        if language in SHELLS:
            for line in content.replace("\\\n", " ").splitlines():
                if re.match(r"(\$ )?([A-Z_0-9]+=\S* )*([\w./]*/)?(beit3|torchrun|python3?) ", line):
                    words = shlex.split(line, comments=True)
                    place = next(
                        (i for i, word in enumerate(words) if word.rpartition("/")[2] == "beit3"),
                        None,
                    )
                    if place is not None:
                        yield words[place + 1 :]


COMMANDS = {f"{named(path)}: {' '.join(words)}": words for path in DOCS for words in shown(path)}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_are_those_of_the_command_line(words):
    verb, arguments = read_command(words)
    name, fields = words[0], list(arguments.get("fields", ()))
    if name in ("train", "plan"):
        if "." in arguments["task"]:
            return  # a task of the reader's own
        recipe = arguments.get("recipe", "")
        read_recipe(arguments["task"], [recipe, *fields], verb, init="")
    elif name in ("eval", "predict") and fields:
        # How weights are used: the task is in the words before.
        tasks = [task for task in list_tasks() if f"/{task}/" in arguments["weights"]]
        override(load_task(tasks[0]).recipes["demo"], fields)
    elif name == "prepare":
        task = load_task(arguments["task"])
        parse_keyword_options(task.prepare, list(arguments.get("options", ())))
        own_sources = [source for source in task.sources if source not in task.records_from]
        source = arguments.get("source", "").partition("/")[0]  # pairs/coco: its own dataset
        assert source in own_sources if len(own_sources) > 1 else source in ("", *own_sources)


def test_every_verb_but_the_checks_is_shown():
    assert {"world", "prepare", "tokenizer", "train", "eval", "predict"} <= {
        words[0] for words in COMMANDS.values() if words
    }


# Python -------------------------------------------------------------------------------------------


def needs_files(tree: ast.AST) -> bool:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        (call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")) in NEEDS_FILES
        for call in calls
    )


@pytest.mark.parametrize("path", [path for path in DOCS if python(path)], ids=named)
def test_python_runs_where_it_needs_no_weights(path, tmp_path):
    space: dict = {"__name__": "__docs__"}
    with chdir(tmp_path):
        for code in python(path):
            tree = ast.parse(code, filename=named(path))
            if needs_files(tree):
                tree.body = [
                    node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
                ]
                for name in re.findall(r"\bbeit3\.(\w+)\(", code):
                    assert name in beit3.__all__
            exec(compile(tree, named(path), "exec"), space)


# Links and tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_links_lead_to_files(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if not re.match(r"\w+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), (
                f"{named(path)} links to {target}"
            )


def test_defaults_of_open_questions():
    text = (PROJECT / "docs/pretraining.md").read_text(encoding="utf-8")
    section = text[text.index("## What it leaves open") : text.index("### Hiding patches")]
    found = re.findall(r"`([\w.]+)=([^`]+)`", section)
    assert len(found) > 15
    for field, value in found:
        default = PretrainConfig()
        for name in field.split("."):
            default = getattr(default, name)
        assert default == ast.literal_eval(value), field


def row(task: str, name: str, recipe: Recipe) -> str:
    """A line of the table of recipes."""
    model, run, optim = recipe.task.model, recipe.run, recipe.optim
    batch = ", ".join(f"{count} {source}" for source, count in recipe.data.batch.items()).replace(
        " main", " images"
    )
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    warmup = (
        f"{optim.warmup_steps:,} steps" if optim.warmup_steps else f"{optim.warmup_epochs:g} epochs"
    )
    size = f"{model.depth} x {model.dim} | {model.image_size} / {model.patch_size}"
    return f"| `{task} {name}` | {size} | {batch} | {length} | {warmup} | {optim.lr:g} |"


def test_table_of_recipes():
    text = (PROJECT / "docs/pretraining.md").read_text(encoding="utf-8")
    for task in ("vqkd", "pretrain"):
        for name, recipe in load_task(task).recipes.items():
            assert row(task, name, recipe) in text


def tuning_row(task: str, name: str, recipe: Recipe) -> str:
    """A line of the tables of the tasks."""
    model, run, optim = recipe.task.model, recipe.run, recipe.optim
    size = f"{model.depth} x {model.dim} | {model.image_size} | {sum(recipe.data.batch.values()):,}"
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    return (
        f"| `{task} {name}` | {size} | {length} | {optim.lr:g} | {optim.layer_decay:g} | "
        f"{recipe.note} |"
    )


def test_tables_of_the_tasks():
    text = (PROJECT / "docs/tasks.md").read_text(encoding="utf-8")
    for task in ("vqa", "nlvr2", "captioning", "retrieval", "imagenet"):
        for name, recipe in load_task(task).recipes.items():
            assert tuning_row(task, name, recipe) in text


def dense_row(task: str, name: str, recipe: Recipe) -> str:
    """A line of the tables of dense tasks."""
    config: Any = recipe.task
    model, run, optim = config.model, recipe.run, recipe.optim
    side = config.image.image_size if task == "coco" else config.train_view.crop
    size = f"{model.depth} x {model.dim} | {side} | {sum(recipe.data.batch.values()):,}"
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    return (
        f"| `{task} {name}` | {size} | {length} | {optim.lr:g} | {optim.layer_decay:g} | "
        f"{model.drop_path_rate:g} | {recipe.note} |"
    )


def test_tables_of_the_dense_tasks():
    text = (PROJECT / "docs/dense.md").read_text(encoding="utf-8")
    for task in ("coco", "ade20k"):
        for name, recipe in load_task(task).recipes.items():
            assert dense_row(task, name, recipe) in text


def test_citation_is_of_this_version():
    citation, changes = (
        (PROJECT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md")
    )
    assert re.search(rf"^version: {re.escape(beit3.__version__)}$", citation, re.MULTILINE)
    assert f"## [{beit3.__version__}]" in changes


# Examples that are whole --------------------------------------------------------------------------


def test_own_questions_as_json(tmp_path):
    """The JSON of docs/records.md, prepared."""
    raw, root = tmp_path / "mine", tmp_path / "data"
    asked, answered = [
        content for language, content in blocks(PROJECT / "docs/records.md") if language == "json"
    ]
    (raw / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(raw / "images/000000000007.jpg")
    for split in ("train", "val"):
        (raw / f"{split}_questions.json").write_text(asked)
        (raw / f"{split}_annotations.json").write_text(answered)
    assert VQA.prepare(raw, root, "main")["records"] == {"train": 2, "val": 2}
    first, second = Records(root / "vqa/main/train.jsonl")
    assert first["answers"] == {"red": 1.0} and second["answers"] == {"yes": pytest.approx(0.9)}


def test_own_records_by_hand(tmp_path):
    """The Python of docs/records.md: what it writes is what VQA reads."""
    with chdir(tmp_path):
        exec(python(PROJECT / "docs/records.md")[0], {})
    folder = tmp_path / "data/vqa/main"
    assert read_answers(folder / "answer2label.txt") == ("red", "yes")
    records = list(RecordDataset(folder / "train.jsonl", tmp_path / "data"))
    assert [record["answers"] for record in records] == [{"red": 1.0}, {"yes": 1.0}]
    assert {Path(record["image"]).resolve() for record in records} == {
        tmp_path.resolve() / "photos/door.jpg"
    }


@pytest.fixture
def rating(tmp_path, monkeypatch) -> Iterator[type[Task]]:
    """The task of CONTRIBUTING.md, found by a dotted name as a reader's own would be."""
    (code,) = python(PROJECT / "CONTRIBUTING.md")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/rating.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield load_task("mine.rating")
    for name in ("mine.rating", "mine"):
        sys.modules.pop(name, None)


def test_the_task_of_the_guide_trains_and_predicts(rating, tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "data"
    list_tasks = [f"{split}/{number}.png" for split in ("train", "val") for number in range(4)]
    for number, name in enumerate(list_tasks):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (30 * number, 0, 0)).save(raw / name)
    with (raw / "ratings.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "rating"), *((name, number) for number, name in enumerate(list_tasks))]
        )
    assert rating.prepare(raw, root, "main")["records"] == {"train": 4, "val": 4}

    fields = [
        "--data.root",
        str(root),
        "--data.batch.main",
        "4",
        "--run.steps",
        "2",
        "--run.device",
        "cpu",
    ]
    scores = beit3.train(override(rating.recipes["demo"], fields), rating, out=tmp_path / "run")
    assert scores["negative_error"] == -scores["error"] < 0
    predictor = beit3.load(tmp_path / "run")
    assert predictor(str(raw / list_tasks[0]))[0]["rating"] == pytest.approx(
        predictor(Image.open(raw / list_tasks[0]))[0]["rating"]
    )
    assert json.loads((tmp_path / "run/recipe.json").read_text())["task"] == "mine.rating"


def test_the_task_of_the_guide_names_what_it_leaves_unused(rating):
    task = rating(rating.recipes["demo"].task)
    task.init_weights()
    task({"id": ["0"], "image": torch.rand(1, 3, 32, 32), "rating": torch.ones(1)})["losses"][
        "loss"
    ].backward()
    for name, parameter in task.trainable_parameters():
        used = parameter.grad is not None and bool(parameter.grad.any())
        assert used != name.startswith(tuple(task.unused_parameters)), name
