"""`beit3 prepare`: public annotation files become records."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from beit3.cli.options import TaskName, Word, list_options
from beit3.config import parse_keyword_options

if TYPE_CHECKING:
    from beit3.task import Task


def prepare(task: TaskName, /, *options: Word, raw: Path, root: Path, source: str = "") -> None:
    """Convert annotation files to records.

    ```
    beit3 prepare vqa --raw vqav2 --root data
    beit3 prepare pretrain --source texts --raw books --root data --pack 512 --workers 8
    ```

    docs/records.md lists the files that each task reads.

    Args:
        task: A task; `beit3 recipes` lists them.
        options: The task's own. The texts of pretrain take `--pack N` tokens a record (512; 0
            leaves paragraphs as text), `--field NAME` of .jsonl and .parquet, and `--workers N`.
            Every task takes `--bad_share 0.05`, the fraction of records that may be unusable; it
            is 0.01 by default.
        raw: Directory of the downloaded files.
        root: Directory to write the records to.
        source: images, texts or pairs for pretrain; other tasks have one source.
    """
    from beit3.data.prepare.statistics import describe
    from beit3.task import load_task

    task_class = load_task(task)
    source = choose_source(task, task_class, source)
    keywords = parse_keyword_options(task_class.prepare, options, options=list_options(prepare))
    statistics = task_class.prepare(raw, root, source, **keywords)
    print(describe(statistics), file=sys.stderr)
    print(json.dumps(statistics, indent=1, ensure_ascii=False))


def choose_source(name: str, task: "type[Task]", source: str) -> str:
    """Returns `source`, or the only source of the task; ValueError where there is no such one."""
    if not task.sources:
        raise ValueError(f"task {name} reads no records: there is nothing to prepare")
    own_sources = [known for known in task.sources if known not in task.records_from]
    if not source and len(own_sources) > 1:
        choices = " or ".join(own_sources)
        raise ValueError(f"task {name} has several sources: give --source {choices}")
    source = source or task.sources[0]
    # A source may hold several datasets: pairs/coco.
    if source.partition("/")[0] not in task.sources:
        raise ValueError(f"--source {source} is none of {', '.join(task.sources)} of task {name}")
    if source in task.records_from:
        owner = task.records_from[source]
        raise ValueError(
            f"--source {source} of {name} are the records of {owner}: prepare those of {owner}"
        )
    return source
