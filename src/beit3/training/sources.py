"""The records that a run reads: their root directory, the datasets of a split, the text
tokenizer."""

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import find_split_files, locate_split
from beit3.data.stores.tokens import Tokens
from beit3.ops.collectives import rank
from beit3.recipe import DataConfig, Recipe
from beit3.task import Record, Task, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.training.embedded_world import prepare_embedded_world
from beit3.weights import store
from beit3.weights.names import find_path


def find_records_root(
    task: type[Task],
    root: str,
    sources: Iterable[str],
    split: str = "train",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Returns the directory that holds a split of the records of `sources`.

    That is `root`, or the embedded world's directory where `root` is empty. A directory of public
    files, or of a table of one's own, gets its records beside them on first use, so that own data
    needs one command.

    Raises:
        ValueError: `root` holds neither records nor files that the task reads.
    """
    if not root:
        return prepare_embedded_world(task, progress=progress)
    directory, name = Path(root), task_name(task)
    own_sources = [source for source in task.sources if source not in task.records_from]
    if len(own_sources) != 1:
        return directory
    source = own_sources[0]
    if source not in sources or (directory / name / source).exists():
        return directory
    try:
        locate_split(directory, name, source, split)
    except ValueError as missing:
        try:
            report = task.prepare(directory, directory, source)
        except ValueError as unreadable:
            raise ValueError(
                f"{missing}; nor can {directory} be read as it is: {unreadable}"
            ) from None
        print(f"prepared {directory}: {report['records']}", file=sys.stderr)
    return directory


def open_source(
    root: Path,
    task_class: type[Task],
    name: str,
    recipe: Recipe,
    split: str = "train",
    *,
    eval_records: int = 0,
) -> RecordDataset:
    """Opens the records of one split of source `name` under `root`.

    The train split follows the recipe's limit, shuffle window and dataset weights. Of other splits
    `eval_records` records are kept, or all with 0.
    """
    records_task = task_class.records_from.get(name, task_name(task_class))
    path = locate_split(str(root), records_task, name, split)
    if split != "train":
        return RecordDataset(path, root, limit=eval_records)
    data = recipe.data
    weights = _select_dataset_weights(data, name, task_class.sources)
    dataset = RecordDataset(
        path,
        root,
        limit=data.limit,
        window=data.shuffle_window,
        weights=weights,
        # Asking every record takes time; most tasks train on all.
        keep=None if task_class.trains_on is Task.trains_on else task_class.trains_on,
    )
    if dataset.num_left_out and rank() == 0:
        message = f"{dataset.num_left_out} records of {path} are left out of training"
        print(f"{message}: {task_class.left_out_reason}", file=sys.stderr)
    return dataset


def _select_dataset_weights(
    data: DataConfig, name: str, source_names: tuple[str, ...]
) -> dict[str, float]:
    """Returns dataset -> weight of source `name`; the recipe's keys are `source/dataset`."""
    weights: dict[str, float] = {}
    for key, weight in data.weights.items():
        source, _, dataset = key.partition("/")
        if source not in source_names:
            raise ValueError(
                f"data.weights names {key}: give it by source/dataset, sources are "
                f"{', '.join(source_names)}"
            )
        if source == name:
            weights[dataset] = weight
    return weights


def open_split(task: type[Task], root: str, split: str) -> dict[str, RecordDataset]:
    """Opens all sources of a task that have this split, under `root` or in the embedded world.

    A task's own records take precedence over those that it reads of another task.
    """
    directory = find_records_root(task, root, task.sources, split)
    records_tasks = {
        source: task.records_from.get(source, task_name(task)) for source in task.sources
    }
    available = [
        source
        for source, name in records_tasks.items()
        if find_split_files(directory / name / source, split)
    ]
    own_sources = [source for source in available if source not in task.records_from]
    chosen = own_sources or available or [task.sources[0]]
    return {
        source: RecordDataset(
            locate_split(directory, records_tasks[source], source, split), directory
        )
        for source in chosen
    }


def open_tokenizer(recipe: Recipe, root: Path, init: str | Path) -> TextTokenizer | None:
    """Opens the text tokenizer of the recipe, else of the initial weights, else of the root.

    A directory of weights holds its tokenizer; beside a released checkpoint the tokenizer has the
    name under which it was released, beit3.spm. Returns None where there is none.
    """
    candidates = [Path(recipe.data.text_model)] if recipe.data.text_model else []
    init_path = None
    if init:
        with suppress(ValueError):  # where there are none, starting from them says so
            init_path = find_path(init)
    if init_path is not None and init_path.is_dir():
        candidates.append(store.find_weights(init_path) / store.TOKENIZER_FILE)
    elif init_path is not None:
        candidates.append(init_path.with_name("beit3.spm"))
    candidates.append(root / store.TOKENIZER_FILE)
    for path in candidates:
        if path.exists() or str(path) == recipe.data.text_model:
            return TextTokenizer(path)
    return None


def has_raw_text(record: Record) -> bool:
    """Returns whether a record needs the text tokenizer; upstream index files hold token ids."""
    captions = record.get("captions")
    texts = [record.get("text"), *(captions if isinstance(captions, list) else ())]
    return any(isinstance(text, str) for text in texts)


def check_tokenizer(task: Task, sources: Mapping[str, RecordDataset]) -> None:
    """Raises ValueError for records that hold token ids of another tokenizer than the task's."""
    for source in sources.values():
        for record_store in source.stores:
            if not isinstance(record_store, Tokens):
                continue
            if record_store.tokenizer_digest != task.tokenizer.digest:
                raise ValueError(
                    f"{record_store.path} holds ids of another text tokenizer than the one in use: "
                    "give --data.text_model the one that wrote them, or run beit3 prepare again"
                )
