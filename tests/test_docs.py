"""The documents agree with the code.

Commands parse, fields, paths and functions exist, tables equal the recipes, Python blocks run, and
links lead to files.
"""

import ast
import csv
import importlib
import json
import re
import shlex
import sys
import tokenize
from collections.abc import Iterator
from contextlib import chdir
from functools import cache
from pathlib import Path
from types import ModuleType
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
from tests.test_architecture import FLOOR, SIDEWAYS

PROJECT = Path(__file__).resolve().parents[1]
SOURCE = PROJECT / "src/beit3"
DOCS = sorted((*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")))
CONTRIBUTING = PROJECT / "CONTRIBUTING.md"
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
SHELLS = {"", "bash", "sh", "shell", "console"}
FILE_READING_CALLS = {"load", "train", "read_file", "TextTokenizer"} | {
    "predictor",
    "embed_pairs",
    "embed_patches",
    "inspect",
}
"""Blocks with these calls are compiled and their imports are run, but not the rest. Those of
docs/predict.md are run by tests/predict/test_page.py."""


def relative_name(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


@cache
def find_code_blocks(path: Path) -> tuple[tuple[str, str], ...]:
    """Returns (language, content) of the fenced blocks of a document."""
    return tuple(FENCE.findall(path.read_text(encoding="utf-8")))


def find_python_blocks(path: Path) -> list[str]:
    return [content for language, content in find_code_blocks(path) if language == "python"]


# Commands -----------------------------------------------------------------------------------------


def find_commands(path: Path) -> Iterator[list[str]]:
    """Yields the arguments of every `beit3 ...` and `... -m beit3 ...` in shell blocks.

    Comments and environment variables are removed.
    """
    for language, content in find_code_blocks(path):
        if language not in SHELLS:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            if not re.match(r"(\$ )?([A-Z_0-9]+=\S* )*([\w./]*/)?(beit3|torchrun|python3?) ", line):
                continue
            words = shlex.split(line, comments=True)
            programs = [word.rpartition("/")[2] for word in words]
            if "beit3" in programs:
                yield words[programs.index("beit3") + 1 :]


COMMANDS = {
    f"{relative_name(path)}: {' '.join(words)}": words
    for path in DOCS
    for words in find_commands(path)
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_parse(words):
    verb, arguments = read_command(words)
    name, fields = words[0], list(arguments.get("fields", ()))
    if name in ("train", "plan"):
        if "." in arguments["task"]:
            return  # a task of the reader's own
        recipe = arguments.get("recipe", "")
        read_recipe(arguments["task"], [recipe, *fields], verb, init="")
    elif name in ("eval", "predict") and fields:
        # The fields belong to the task whose name is a part of the weights' path.
        tasks = [task for task in list_tasks() if f"/{task}/" in arguments["weights"]]
        override(load_task(tasks[0]).recipes["demo"], fields)
    elif name == "prepare":
        task = load_task(arguments["task"])
        parse_keyword_options(task.prepare, list(arguments.get("options", ())))
        own_sources = [source for source in task.sources if source not in task.records_from]
        source = arguments.get("source", "").partition("/")[0]  # pairs/coco: its own dataset
        assert source in own_sources if len(own_sources) > 1 else source in ("", *own_sources)


def test_documents_show_every_verb_that_makes_something():
    assert {"world", "prepare", "tokenizer", "train", "eval", "predict"} <= {
        words[0] for words in COMMANDS.values() if words
    }


# Python -------------------------------------------------------------------------------------------


def reads_files(tree: ast.AST) -> bool:
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        (call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", ""))
        in FILE_READING_CALLS
        for call in calls
    )


@pytest.mark.parametrize(
    "path", [path for path in DOCS if find_python_blocks(path)], ids=relative_name
)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    module = ModuleType("__docs__")  # importable: a modality is given by its dotted path
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with chdir(tmp_path):
        for code in find_python_blocks(path):
            tree = ast.parse(code, filename=relative_name(path))
            if reads_files(tree):
                tree.body = [
                    node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
                ]
                for name in re.findall(r"\bbeit3\.(\w+)\(", code):
                    assert name in beit3.__all__
            exec(compile(tree, relative_name(path), "exec"), module.__dict__)


# Links and tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=relative_name)
def test_links_lead_to_files(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if not re.match(r"\w+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), (
                f"{relative_name(path)} links to {target}"
            )


def test_defaults_in_the_table_of_open_choices():
    text = (PROJECT / "docs/pretraining.md").read_text(encoding="utf-8")
    section = text[text.index("## What the paper leaves open") : text.index("### Masking patches")]
    choices = re.findall(r"`([\w.]+)=([^`]+)`", section)
    assert len(choices) > 15
    for field, value in choices:
        default = PretrainConfig()
        for name in field.split("."):
            default = getattr(default, name)
        assert default == ast.literal_eval(value), field


def make_recipe_row(task: str, name: str, recipe: Recipe) -> str:
    """Returns a row of the table of recipes."""
    model, run, optim = recipe.task.model, recipe.run, recipe.optim
    batch = ", ".join(f"{count} {source}" for source, count in recipe.data.batch.items())
    batch = batch.replace(" main", " images").replace(" 1 texts", " 1 text")
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    warmup = (
        f"{optim.warmup_steps:,} steps" if optim.warmup_steps else f"{optim.warmup_epochs:g} epochs"
    )
    network = f"{model.depth} x {model.dim}" if model.depth else "EfficientNet-Lite0"
    size = f"{network} | {model.image_size} / {model.patch_size}"
    return f"| `{task} {name}` | {size} | {batch} | {length} | {warmup} | {optim.lr:g} |"


def test_recipes_equal_the_table_of_pretraining():
    text = (PROJECT / "docs/pretraining.md").read_text(encoding="utf-8")
    for task in ("vqkd", "pretrain"):
        for name, recipe in load_task(task).recipes.items():
            assert make_recipe_row(task, name, recipe) in text


def make_tuning_row(task: str, name: str, recipe: Recipe) -> str:
    """Returns a row of the tables of the tasks."""
    model, run, optim = recipe.task.model, recipe.run, recipe.optim
    size = f"{model.depth} x {model.dim} | {model.image_size} | {sum(recipe.data.batch.values()):,}"
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    return (
        f"| `{task} {name}` | {size} | {length} | {optim.lr:g} | {optim.layer_decay:g} | "
        f"{recipe.note} |"
    )


def test_recipes_equal_the_tables_of_the_tasks():
    text = (PROJECT / "docs/tasks.md").read_text(encoding="utf-8")
    for task in ("vqa", "nlvr2", "captioning", "retrieval", "imagenet"):
        for name, recipe in load_task(task).recipes.items():
            assert make_tuning_row(task, name, recipe) in text


def make_dense_row(task: str, name: str, recipe: Recipe) -> str:
    """Returns a row of the tables of the dense tasks."""
    config: Any = recipe.task
    model, run, optim = config.model, recipe.run, recipe.optim
    side = config.image.image_size if task == "coco" else config.train_view.crop
    size = f"{model.depth} x {model.dim} | {side} | {sum(recipe.data.batch.values()):,}"
    length = f"{run.steps:,} steps" if run.steps else f"{run.epochs:g} epochs"
    return (
        f"| `{task} {name}` | {size} | {length} | {optim.lr:g} | {optim.layer_decay:g} | "
        f"{model.drop_path_rate:g} | {recipe.note} |"
    )


def test_recipes_equal_the_tables_of_the_dense_tasks():
    text = (PROJECT / "docs/dense.md").read_text(encoding="utf-8")
    for task in ("coco", "ade20k"):
        for name, recipe in load_task(task).recipes.items():
            assert make_dense_row(task, name, recipe) in text


def test_citation_and_changelog_name_this_version():
    citation, changes = (
        (PROJECT / name).read_text(encoding="utf-8") for name in ("CITATION.cff", "CHANGELOG.md")
    )
    assert re.search(rf"^version: {re.escape(beit3.__version__)}$", citation, re.MULTILINE)
    assert f"## [{beit3.__version__}]" in changes


# Paths, functions and floors ----------------------------------------------------------------------

PATH_NAME = re.compile(
    r"(?<![\w/.~-])(?:(?:src|docs|tests|benchmarks|launch)/[\w./-]*\w|(?:[\w.-]+/)*[\w-]+\.(?:py|md)\b)"
)
FOREIGN_FILES = {"modeling_finetune.py", "labels.py", "results.md", "parity.md"}
"""Files of upstream and of cityscapesScripts, and files that a program writes."""
CURRENT_DOCS = [path for path in DOCS if path.name != "CHANGELOG.md"]


def find_missing_paths(text: str, folder: Path) -> set[str]:
    """Returns the paths named in a text that no file or folder of the repository has.

    A path starts at the repository, the package, `docs`, or the folder of the text.
    """
    roots = (PROJECT, SOURCE, PROJECT / "docs", folder)
    return {
        name
        for name in PATH_NAME.findall(text)
        if name not in FOREIGN_FILES and not any((root / name).exists() for root in roots)
    }


@pytest.mark.parametrize("path", CURRENT_DOCS, ids=relative_name)
def test_paths_in_documents_exist(path):
    text = LINK.sub("", path.read_text(encoding="utf-8"))  # links have a test of their own
    assert not find_missing_paths(text, path.parent)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=relative_name)
def test_paths_in_docstrings_and_comments_exist(path):
    with tokenize.open(path) as file:
        prose = [
            token.string
            for token in tokenize.generate_tokens(file.readline)
            if token.type in (tokenize.COMMENT, tokenize.STRING)
        ]
    assert not find_missing_paths("\n".join(prose), path.parent)


CONSTANT_NAME = re.compile(r"`(?:[\w.]+\.)?([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*)`")

FOREIGN_VARIABLES = ("NCCL_", "GLOO_", "TORCH_")
"""Beginnings of environment variables that other software reads."""


@cache
def read_code_words() -> frozenset[str]:
    """Returns the words of all code and of the files that start it."""
    folders = ("src", "tests", "benchmarks", "launch", ".ci")
    files = [file for folder in folders for file in (PROJECT / folder).rglob("*") if file.is_file()]
    texts = [
        file.read_text(encoding="utf-8")
        for file in (*files, PROJECT / "Makefile")
        if file.suffix in ("", ".py", ".sh", ".sbatch", ".yaml") and file != Path(__file__)
    ]
    return frozenset(re.findall(r"\w+", "\n".join(texts)))


@pytest.mark.parametrize("path", CURRENT_DOCS, ids=relative_name)
def test_constants_in_documents_exist(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    names = set(CONSTANT_NAME.findall(text))
    ours = {name for name in names if not name.startswith(FOREIGN_VARIABLES)}
    assert not ours - read_code_words()


def find_definition(tree: ast.AST, qualified_name: str) -> ast.AST | None:
    """Returns the function or class of a name such as `Pretrain.forward`, or None."""
    node: ast.AST | None = tree
    for name in qualified_name.split("."):
        definitions = {
            child.name: child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef)
        }
        node = definitions.get(name)
        if node is None:
            return None
    return node


def test_functions_of_where_to_look_exist():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| `(src/[^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) > 20
    for file, function in rows:
        tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
        assert find_definition(tree, function), f"{file} has no {function}"


def test_floor_diagram_equals_the_table_of_the_architecture():
    (diagram,) = [
        content
        for language, content in find_code_blocks(CONTRIBUTING)
        if language == "text" and "cli" in content
    ]
    floors, sideways, floor = {}, set(), 0
    for line in diagram.splitlines():
        names = line.partition("|")[0]
        if names[0].isdigit():
            floor = int(names[0])
        floors |= dict.fromkeys(re.findall(r"[a-z_]+", names), floor)
        sideways |= {(importer, room) for room, importer in re.findall(r"(\w+) <- (\w+)", names)}
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    rooms = packages | {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert floors == {room: floor for room, floor in FLOOR.items() if room in rooms}
    assert sideways == SIDEWAYS


# Complete examples --------------------------------------------------------------------------------


def test_json_example_is_prepared(tmp_path):
    """`prepare` reads the JSON of docs/records.md."""
    raw, root = tmp_path / "mine", tmp_path / "data"
    questions, annotations = [
        content
        for language, content in find_code_blocks(PROJECT / "docs/records.md")
        if language == "json"
    ]
    (raw / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(raw / "images/000000000007.jpg")
    for split in ("train", "val"):
        (raw / f"{split}_questions.json").write_text(questions)
        (raw / f"{split}_annotations.json").write_text(annotations)
    assert VQA.prepare(raw, root, "main")["records"] == {"train": 2, "val": 2}
    first, second = Records(root / "vqa/main/train.jsonl")
    assert first["answers"] == {"red": 1.0} and second["answers"] == {"yes": pytest.approx(0.9)}


def test_records_written_by_hand_are_read(tmp_path):
    """VQA reads the records that the Python block of docs/records.md writes."""
    with chdir(tmp_path):
        exec(find_python_blocks(PROJECT / "docs/records.md")[0], {})
    folder = tmp_path / "data/vqa/main"
    assert read_answers(folder / "answer2label.txt") == ("red", "yes")
    records = list(RecordDataset(folder / "train.jsonl", tmp_path / "data"))
    assert [record["answers"] for record in records] == [{"red": 1.0}, {"yes": 1.0}]
    assert {Path(record["image"]).resolve() for record in records} == {
        tmp_path.resolve() / "photos/door.jpg"
    }


@pytest.fixture
def rating_class(tmp_path, monkeypatch) -> Iterator[type[Task]]:
    """The task of CONTRIBUTING.md, loaded by its dotted name."""
    (code,) = find_python_blocks(CONTRIBUTING)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").touch()
    (tmp_path / "mine/rating.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield load_task("mine.rating")
    for name in ("mine.rating", "mine"):
        sys.modules.pop(name, None)


def test_example_task_trains_and_predicts(rating_class, tmp_path):
    raw, root = tmp_path / "raw", tmp_path / "data"
    image_names = [f"{split}/{number}.png" for split in ("train", "val") for number in range(4)]
    for number, name in enumerate(image_names):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (30 * number, 0, 0)).save(raw / name)
    with (raw / "ratings.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "rating"), *((name, number) for number, name in enumerate(image_names))]
        )
    assert rating_class.prepare(raw, root, "main")["records"] == {"train": 4, "val": 4}

    fields = f"--data.root {root} --data.batch.main 4 --run.steps 2 --run.device cpu".split()
    scores = beit3.train(
        override(rating_class.recipes["demo"], fields), rating_class, out=tmp_path / "run"
    )
    assert scores["negative_error"] == -scores["error"] < 0
    predictor = beit3.load(tmp_path / "run")
    assert predictor(str(raw / image_names[0]))[0]["rating"] == pytest.approx(
        predictor(Image.open(raw / image_names[0]))[0]["rating"]
    )
    assert json.loads((tmp_path / "run/recipe.json").read_text())["task"] == "mine.rating"


def test_example_task_names_its_unused_parameters(rating_class):
    task = rating_class(rating_class.recipes["demo"].task)
    task.init_weights()
    batch = {"id": ["0"], "image": torch.rand(1, 3, 32, 32), "rating": torch.ones(1)}
    task(batch)["losses"]["loss"].backward()
    for name, parameter in task.trainable_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient != name.startswith(tuple(task.unused_parameters)), name
