"""Records, weights, predictions and runs: what `beit3` itself writes and reads again."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from beit3.data.stores.label_names import read_answers, read_class_names
from beit3.data.stores.shards import Shards
from beit3.data.stores.tokens import Tokens
from beit3.images import open_image
from beit3.model.config import TINY
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig, TaskConfig
from beit3.task import load_task
from beit3.tasks.backbone import Backbone
from beit3.tokenizer.text import TextTokenizer
from beit3.training.embedded_world import prepare_world_records
from beit3.training.loop import train
from beit3.weights.loading import load_released, load_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.state_dicts import read_state_dict
from beit3.weights.store import save_weights
from beit3.world.export import write_world
from benchmarks.fuzzing.annotations import (
    JSON_DAMAGE,
    LINE_DAMAGE,
    TEXT_DAMAGE,
    TEXT_MODEL,
    encode_lines,
    encode_parquet,
    encode_tar,
)
from benchmarks.fuzzing.damage import (
    combine,
    damage_bytes,
    damage_first_line,
    damage_json,
    damage_numbers,
    damage_safetensors,
    damage_zip,
)
from benchmarks.fuzzing.kinds import Kind, make_loader_kind, make_verb_kind, run_verb

MODEL = replace(TINY, dim=32, depth=2, num_heads=2, ffn_dim=48, text_positions=40)
TASKS = ("vqa", "nlvr2", "captioning", "retrieval", "imagenet")
"""Tasks whose records and weights are tried."""

TEMPORARY = tempfile.TemporaryDirectory()


# Intact files -------------------------------------------------------------------------------------


@cache
def make_world() -> Path:
    """Writes a small world with records, weights of each task, and a run of vqa; read only."""
    folder = Path(TEMPORARY.name)
    write_world(folder / "raw", num_train=8, num_val=4, num_test=1, num_questions=9)
    root = folder / "root"
    for name in TASKS:
        prepare_world_records(folder / "raw", root, load_task(name))
    (root / "text.model").write_bytes(TEXT_MODEL)
    for name in TASKS:
        task_class = load_task(name)
        config = task_class.configure(make_config(name), root)
        task = task_class(config, tokenizer=TextTokenizer(root / "text.model"))
        task.init_weights(0)
        save_weights(task, folder / "weights" / name)
    recipe = Recipe(
        task=make_config("vqa"),
        data=DataConfig(root=str(root), batch={"main": 4}),
        optim=OptimConfig(lr=1e-3),
        run=RunConfig(steps=2, log_every=1),
    )
    train(recipe, load_task("vqa"), out=folder / "run")
    return folder


def make_config(name: str) -> Any:
    """Returns the demo config of a task with a smaller network."""
    config: Any = load_task(name).recipes["demo"].task
    return replace(config, model=replace(MODEL, final_norm=config.model.final_norm))


def copy_world(*parts: str) -> Callable[[Path], Path]:
    """Returns a writer that copies a part of the world; it returns the file `parts`."""

    def write(folder: Path) -> Path:
        shutil.copytree(make_world(), folder / "world")
        return folder.joinpath("world", *parts)

    return write


def write_file(name: str, content: bytes) -> Callable[[Path], Path]:
    """Returns a writer of one file."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def write_prepared(source: str, files: dict[str, bytes], name: str) -> Callable[[Path], Path]:
    """Returns a writer of what `beit3 prepare pretrain` writes; it returns the file `name`."""

    def write(folder: Path) -> Path:
        (folder / "raw").mkdir()
        for path, content in files.items():
            (folder / "raw" / path).write_bytes(content)
        (folder / "text.model").write_bytes(TEXT_MODEL)
        words = ["prepare", "pretrain", "--source", source, "--raw", folder / "raw"]
        status, _, err = run_verb([*words, "--root", folder, "--workers", "1"])
        assert status == 0, err
        return next(folder.rglob(name))

    return write


def write_predictions(task: str, name: str) -> Callable[[Path], Path]:
    """Returns a writer of predictions on the world; it returns the file `name` of them."""

    def write(folder: Path) -> Path:
        world = copy_world()(folder)
        words = ["eval", world / "weights" / task, "--data.root", world / "root"]
        status, _, err = run_verb([*words, "--predictions", world / "predictions.jsonl"])
        assert status == 0, err
        return world / name

    return write


def write_released(folder: Path) -> Path:
    """Writes a checkpoint in the released format."""
    config = replace(
        MODEL, shared_attention=False, shared_norms=False, sub_ln=True, fusion_layers=0
    )
    task = Backbone(TaskConfig(model=config))
    task.init_weights(0)
    torch.save({"model": to_released_state(task)}, folder / "released.pth")
    return folder / "released.pth"


# Readers ------------------------------------------------------------------------------------------


def find_world(path: Path) -> Path:
    """Returns the copy of the world that a file is part of."""
    return next(parent for parent in path.parents if parent.name == "world")


def make_eval_words(task: str, path: Path) -> list[object]:
    world = find_world(path)
    return ["eval", world / "weights" / task, "--data.root", world / "root"]


def make_score_words(task: str, path: Path) -> list[object]:
    world = find_world(path)
    return ["score", task, world / "predictions.jsonl", "--data.root", world / "root"]


def make_report_words(path: Path) -> list[object]:
    return ["report", find_world(path) / "run", "--out", find_world(path) / "report.html"]


def read_shards(path: Path) -> None:
    """Reads all records of an index and their images."""
    root = next(parent for parent in path.parents if (parent / "text.model").exists())
    shards = Shards(next(root.rglob("train.shards")), root)
    for record in shards:
        open_image(f"{root}/{record['image']}")


def read_tokens(path: Path) -> None:
    """Reads all records of an array of tokens."""
    root = next(parent for parent in path.parents if (parent / "text.model").exists())
    tokens = Tokens(next(root.rglob("train.tokens")))
    for record in tokens:
        assert isinstance(record["text"], list)


def read_tokenizer(path: Path) -> None:
    """Encodes and decodes a text."""
    tokenizer = TextTokenizer(path)
    tokenizer.decode(tokenizer.encode("a red cube"))


def read_released(path: Path) -> None:
    """Builds the network of a released checkpoint."""
    state = read_state_dict(path)
    try:
        load_released(state, "backbone", num_heads=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None  # as the callers of `load_released` do


def load_directory(path: Path) -> None:
    """Loads the weights that a file is part of."""
    load_weights(path.parent)


# Kinds --------------------------------------------------------------------------------------------

make_tokens_kind = partial(make_loader_kind, load=read_tokens)
TEXT_FILES = {
    "a.parquet": encode_parquet(),
    "b.val.jsonl": encode_lines([{"text": "one red cube"}]),
}
TAR_FILES = {"a-train-0.tar": encode_tar(), "b-val-0.tar": encode_tar()}
ANSWERS = encode_lines([{"answer": text, "label": label} for label, text in enumerate("abc")])

STORE_KINDS: dict[str, Kind] = {
    **{
        f"records of {task}": make_verb_kind(
            copy_world("root", task, "main", "val.jsonl"),
            partial(make_eval_words, task),
            LINE_DAMAGE,
            names=("record ", "records "),
        )
        for task in TASKS
    },
    "answer2label.txt": make_loader_kind(
        write_file("answer2label.txt", ANSWERS), read_answers, combine(LINE_DAMAGE, TEXT_DAMAGE)
    ),
    "classes.txt": make_loader_kind(
        write_file("classes.txt", b"cat\nold dog\nowl\n"), read_class_names, TEXT_DAMAGE
    ),
    "classes.json": make_loader_kind(
        write_file(
            "classes.json",
            json.dumps(
                {str(n): [f"n0{n}", name] for n, name in enumerate(("cat", "dog", "owl"))}
            ).encode(),
        ),
        read_class_names,
        JSON_DAMAGE,
    ),
    "shards index": make_loader_kind(
        write_prepared("pairs", TAR_FILES, "train.shards"),
        read_shards,
        combine(damage_bytes, damage_first_line(damage_json), damage_numbers),
    ),
    "tar of an index": make_loader_kind(
        write_prepared("pairs", TAR_FILES, "a-train-0.tar"), read_shards, damage_numbers
    ),
    "tokens header": make_tokens_kind(
        write_prepared("texts", TEXT_FILES, "train.tokens"), damage=JSON_DAMAGE
    ),
    "tokens ids": make_tokens_kind(
        write_prepared("texts", TEXT_FILES, "train.ids.npy"),
        damage=combine(damage_bytes, damage_numbers),
    ),
    "tokens records": make_tokens_kind(
        write_prepared("texts", TEXT_FILES, "train.records.npy"),
        damage=combine(damage_bytes, damage_numbers),
    ),
    "tokens names": make_tokens_kind(
        write_prepared("texts", TEXT_FILES, "train.names.npy"),
        damage=combine(damage_bytes, damage_numbers),
    ),
    "sentencepiece": make_loader_kind(
        write_file("text.model", TEXT_MODEL), read_tokenizer, combine(damage_bytes, damage_numbers)
    ),
    "weights config.json": make_loader_kind(
        copy_world("weights", "vqa", "config.json"),
        load_directory,
        JSON_DAMAGE,
        names=("is a tokenizer that does not fit", "the config needs", "tensors are"),
    ),
    "weights model.safetensors": make_loader_kind(
        copy_world("weights", "vqa", "model.safetensors"),
        load_directory,
        combine(damage_bytes, damage_safetensors),
    ),
    "weights text.model": make_loader_kind(
        copy_world("weights", "vqa", "text.model"), load_directory
    ),
    "released pth": make_loader_kind(
        write_released, read_released, combine(damage_bytes, damage_zip)
    ),
    "predictions of vqa": make_verb_kind(
        write_predictions("vqa", "predictions.jsonl"), partial(make_score_words, "vqa"), LINE_DAMAGE
    ),
    "predictions of captioning": make_verb_kind(
        write_predictions("captioning", "predictions.jsonl"),
        partial(make_score_words, "captioning"),
        LINE_DAMAGE,
    ),
    "predictions of retrieval": make_verb_kind(
        write_predictions("retrieval", "predictions.jsonl"),
        partial(make_score_words, "retrieval"),
        LINE_DAMAGE,
        names=(".npy",),
    ),
    "predicted arrays": make_verb_kind(
        write_predictions("retrieval", "predictions.image.npy"),
        partial(make_score_words, "retrieval"),
        combine(damage_bytes, damage_numbers),
        names=("predictions.jsonl",),
    ),
    "recipe.json of a run": make_verb_kind(
        copy_world("run", "recipe.json"), make_report_words, JSON_DAMAGE
    ),
    "metrics.jsonl of a run": make_verb_kind(
        copy_world("run", "metrics.jsonl"), make_report_words, LINE_DAMAGE
    ),
}
