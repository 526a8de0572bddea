"""What panels are made of: a run's weights, its held-out records, and the titled fragment itself.

Shapes: Run -> task in evaluation mode, Source of records with absolute image paths, Panel of HTML.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TypeVar

import numpy as np

from beit3 import task as tasks
from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.report.runs import Run
from beit3.task import Record, Task
from beit3.tasks.pretrain import PretrainConfig
from beit3.training.embedded_world import prepare_embedded_world
from beit3.weights import loading, store

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Panel:
    """A titled fragment of the page. `lead`, plain text, says what is to be seen; `body` is
    HTML."""

    title: str
    lead: str
    body: str


def panel(title: str, lead: str, body: Callable[[], str]) -> Panel:
    """A panel; where its weights or records are gone, it says so in one line."""
    try:
        return Panel(title, lead, body())
    except ValueError as error:
        return Panel(title, lead, f'<p class="none">Nothing to show: {escape(str(error))}</p>')


def weights(run: Run, kind: type[T], *, frozen: bool = True) -> T:
    """The run's best weights, else its last ones, in evaluation mode; ValueError where there are
    none yet.

    frozen=False leaves a pretraining's visual tokenizer out, whose file may have moved.
    """
    found = [run.path / name for name in ("best", "last") if store.is_weights(run.path / name)]
    if not found:
        raise ValueError(f"run {run.label} has no weights yet")
    config = store.read_config(found[0]).config
    if isinstance(config, PretrainConfig) and not frozen:
        config = replace(config, visual_tokenizer="")
    task = loading.load_weights(found[0], config=config).eval()
    assert isinstance(task, kind)
    return task


def records(run: Run, source: str, split: str) -> RecordDataset:
    """The run's records of one split; ValueError where they are no longer there."""
    kind = tasks.load_task(run.task)
    root = Path(run.recipe["data"]["root"] or prepare_embedded_world(kind))
    return RecordDataset(
        locate_split(root, kind.records_from.get(source, run.task), source, split), root
    )


def spread(source: RecordDataset, count: int) -> list[Record]:
    """At most `count` records, evenly spaced over the source: no picking of what looks good."""
    return [
        source[int(index)] for index in np.unique(np.linspace(0, len(source) - 1, count).round())
    ]
