"""A world small enough for every test: raw files, records, and recipes that train in a second."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3.data.stores.records import Records
from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY, ModelConfig
from beit3.recipe import DataConfig, OptimConfig, Recipe, RunConfig
from beit3.task import Task, list_tasks, load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tasks.vqa import VQAConfig
from beit3.tasks.vqkd import VQKDConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.training.embedded_world import prepare_world_records
from beit3.world.export import write_world

NUM_TRAIN, NUM_VAL, NUM_QUESTIONS, NUM_CODES = 60, 8, 48, 16
SMALL = replace(TINY, dim=32, depth=2, num_heads=2, ffn_dim=48, text_positions=40)
"""The paper's form, one of its two layers with a vision-language expert."""


def list_trainable_tasks() -> list[type[Task]]:
    """Returns the tasks that have recipes."""
    return [task for task in map(load_task, list_tasks()) if task.recipes]


def write_raw(folder: Path) -> Path:
    """Writes the world in public formats."""
    write_world(
        folder, num_train=NUM_TRAIN, num_val=NUM_VAL, num_test=2, num_questions=NUM_QUESTIONS
    )
    return folder


def write_root(raw: Path, root: Path) -> Path:
    """Writes records of every task that trains, and the text tokenizer.

    `root` lies beside the folder that holds `raw`.
    """
    for task in list_trainable_tasks():
        prepare_world_records(raw, root, task)
    texts = [
        record["text"]
        for source in ("texts", "pairs")
        for record in Records(root / "pretrain" / source / "train.jsonl")
    ]
    TextTokenizer.train(texts, vocab_size=300, model_type="bpe").save(root / "text.model")
    return root


def make_vqkd_recipe(root: Path, *, steps: int = 6, **run) -> Recipe:
    """Returns a recipe of a visual tokenizer with 16 codes."""
    model = VisualTokenizerConfig(
        image_size=32,
        patch_size=8,
        dim=32,
        depth=1,
        num_heads=2,
        ffn_dim=64,
        decoder_depth=1,
        code_dim=8,
        num_codes=NUM_CODES,
        teacher_dim=45,
        revive_after=4,
    )
    return Recipe(
        task=VQKDConfig(
            teacher="gradients",
            model=model,
            image=replace(VQKDConfig().image, image_size=32),
            crop=(0.5, 1.0),
        ),
        data=DataConfig(root=str(root), batch={"main": 8}),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.99), warmup_steps=2),
        run=RunConfig(steps=steps, log_every=1, **run),
    )


def make_pretrain_recipe(
    root: Path, visual: Path, *, steps: int = 6, model: ModelConfig = SMALL, **run
) -> Recipe:
    """Returns a recipe of pretraining on all three sources."""
    task = PretrainConfig(
        model=model,
        image=Preprocessing(32),
        visual_tokenizer=str(visual),
        num_codes=NUM_CODES,
        token_size=32,
        min_mask_block=3,
        text_length=24,
        monomodal_text_length=32,
    )
    return Recipe(
        task=task,
        data=DataConfig(root=str(root), batch={"images": 4, "texts": 4, "pairs": 8}),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, clip=3.0),
        run=RunConfig(steps=steps, log_every=1, **run),
    )


def make_finetuning_recipe(
    name: str, root: Path, *, steps: int = 6, task: Mapping[str, Any] | None = None, **run
) -> Recipe:
    """Returns the demo recipe of a task with a smaller network and changed `task` fields."""
    demo = load_task(name).recipes["demo"]
    settings: Any = demo.task
    model = replace(SMALL, final_norm=settings.model.final_norm)
    return Recipe(
        task=replace(settings, **{"model": model} | dict(task or {})),
        data=DataConfig(root=str(root), batch={"main": 8}),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, clip=3.0),
        run=RunConfig(steps=steps, log_every=1, **run),
    )


def make_vqa_recipe(root: Path, *, steps: int = 6, model: ModelConfig = SMALL, **run) -> Recipe:
    """Returns a recipe of VQA with random crops, so that a step depends on its seeds."""
    return Recipe(
        task=VQAConfig(
            model=replace(model, final_norm=False),
            image=Preprocessing(32),
            text_length=16,
            num_answers=1,
        ),
        data=DataConfig(root=str(root), batch={"main": 8}),
        optim=OptimConfig(lr=2e-3, warmup_steps=2, clip=3.0),
        run=RunConfig(steps=steps, log_every=1, **run),
    )
