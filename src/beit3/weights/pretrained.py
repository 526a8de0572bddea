"""Writes weights as a folder to share: a weights directory and its model card."""

import re
import shutil
from pathlib import Path

from beit3.task import Task
from beit3.weights import hub
from beit3.weights.card import read_run, write_card
from beit3.weights.matching import LoadReport
from beit3.weights.store import (
    CONFIG_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    replace_directory,
    write_weights_files,
)

CARD_FILE = "README.md"
LICENSE = re.compile(r"[\w.-]+")
FILES = (MODEL_FILE, CONFIG_FILE, TOKENIZER_FILE, CARD_FILE)


def save_folder(
    task: Task,
    folder: str | Path,
    *,
    report: LoadReport,
    source: Path | None = None,
    license: str = "",
    push_to: str = "",
    private: bool = False,
) -> Path:
    """Writes the weights of a task with a model card, and uploads them where `push_to` is given.

    Args:
        task: The task, in floating point.
        folder: Where to write. It may hold an earlier save, whose card is kept as it is.
        report: What was loaded into the task.
        source: The weights directory that it was loaded from. In a run directory, the card tells
            settings and scores of the run.
        license: The license's identifier for the card, such as "mit".
        push_to: Repository of the Hugging Face hub, as owner/name.
        private: Whether a new repository is visible to its owner alone.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds other files, a part of the task is untrained, or the upload
            failed.
    """
    folder = Path(folder)
    if push_to:
        hub.check_name(push_to)
    if license and not LICENSE.fullmatch(license):
        raise ValueError(f"license {license!r} is no identifier: give one such as mit")
    _check_folder(folder)
    if report.fresh:
        raise ValueError(
            f"{len(report.fresh)} parameters are untrained ({next(iter(report.fresh))}), "
            f"{report.source} has none: fine-tune first, or use beit3 convert"
        )
    card = folder / CARD_FILE
    with replace_directory(folder) as new:
        write_weights_files(task, new)
        if card.is_file():
            shutil.copyfile(card, new / CARD_FILE)
        else:
            run = read_run(source, type(task)) if source is not None else None
            title = folder.resolve().name
            text = write_card(task, title=title, license=license, run=run, example=push_to)
            (new / CARD_FILE).write_text(text, encoding="utf-8")
    if push_to:
        hub.push_folder(folder, push_to, private=private)
    return folder


def _check_folder(folder: Path) -> None:
    """Raises ValueError where a folder holds what a save would remove."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder")
    others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = sorted(name for name in others if name not in FILES)
    if others:
        raise ValueError(f"{folder} holds {others[0]}, which is no part of weights: give another")
