"""Inputs of panels: the weights of a run, its held-out records, and the panel itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.report.document import render_note
from beit3.report.runs import Run
from beit3.task import Record, Task, load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.training.embedded_world import prepare_embedded_world
from beit3.weights import loading, store

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Panel:
    """A part of a report with a title."""

    title: str
    lead: str
    """One sentence on what the panel shows, plain text."""
    body: str
    """HTML."""


def make_panel(title: str, lead: str, render_body: Callable[[], str]) -> Panel:
    """Returns a panel with the HTML that `render_body` returns.

    If that raises ValueError, for example because weights or records are missing, the body is one
    line with the error's message.
    """
    try:
        body = render_body()
    except ValueError as error:
        body = render_note(f"Nothing to show: {error}")
    return Panel(title, lead, body)


def make_title_suffix(run: Run, runs: Sequence[Run]) -> str:
    """Returns what a panel of one run adds to its title where there are several `runs`."""
    return f": {run.label}" if len(runs) > 1 else ""


def make_lead_suffix(runs: Sequence[Run]) -> str:
    """Returns what a panel of all runs adds to its lead where there are several."""
    return ", runs side by side" if len(runs) > 1 else ""


def load_run_weights(run: Run, task_class: type[T], *, load_frozen: bool = True) -> T:
    """Loads the best weights of a run, or else its last ones, in evaluation mode.

    Args:
        run: The run.
        task_class: The class of the run's task.
        load_frozen: False leaves out the visual tokenizer of pretraining, whose file may have
            moved.

    Raises:
        ValueError: The run has no weights yet.
    """
    candidates = [run.path / name for name in ("best", "last")]
    path = next((path for path in candidates if store.is_weights(path)), None)
    if path is None:
        raise ValueError(f"run {run.label} has no weights yet")
    config = store.read_config(path).config
    if isinstance(config, PretrainConfig) and not load_frozen:
        config = replace(config, visual_tokenizer="")
    task = loading.load_weights(path, config=config).eval()
    assert isinstance(task, task_class)
    return task


def open_run_records(run: Run, source: str, split: str) -> RecordDataset:
    """Opens the records of a run's source and split; ValueError where they no longer exist."""
    task_class = load_task(run.task)
    root = Path(run.root or prepare_embedded_world(task_class))
    records_task = task_class.records_from.get(source, run.task)
    return RecordDataset(locate_split(root, records_task, source, split), root)


def open_held_out_records(run: Run) -> RecordDataset:
    """Opens the held-out records of the first source that the run trained on."""
    batch = run.batch
    trained_sources = [name for name, count in batch.items() if count]
    return open_run_records(run, trained_sources[0] if trained_sources else "main", "val")


def pick_evenly(dataset: RecordDataset, count: int) -> list[Record]:
    """Returns at most `count` records, evenly spaced, so that nobody picks what looks good."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, count).round())
    return [dataset[int(index)] for index in indices]
