"""`beit3 eval` and `beit3 score`: weights, or predictions that were written, against records."""

import json
import sys
from functools import partial
from typing import TYPE_CHECKING

from beit3.cli.options import (
    NOT_RELEASED,
    Count,
    PrecisionName,
    RecordsRoot,
    ReleasedOptions,
    Size,
    TaskName,
    Word,
    check_task_fields,
)
from beit3.cli.predict import load_predictor, merge_precision

if TYPE_CHECKING:
    from beit3.task import Task
    from beit3.training.evaluate import SourcePredictions


def evaluate(
    weights: str,
    /,
    *fields: Word,
    split: str = "val",
    root: RecordsRoot = "",
    batch: Count = 32,
    workers: Size = 0,
    predictions: str = "",
    submission: str = "",
    java: bool = False,
    precision: PrecisionName | None = None,
    int8: bool = False,
    released: ReleasedOptions = NOT_RELEASED,
) -> None:
    """Score weights on a split of the records.

    ```
    beit3 eval runs/vqa-demo/best
    beit3 eval runs/vqa-demo/best --data.root data --predictions predictions.jsonl
    beit3 eval beit3_base_patch16_480_vqa.pth --text-model beit3.spm --answers answer2label.txt
    ```

    Under torchrun the processes share the records.

    Args:
        weights: A weights directory, a run or a released file.
        fields: `--task.field value` for how the weights are used, such as the decoding of
            captions.
        split: train, val or test.
        root: Directory of the records; by default the embedded world.
        batch: Records in a batch.
        workers: Processes that read and preprocess images; 0 = the same process.
        predictions: Also write the predictions to this file of JSON lines, also those of records
            that cannot be scored.
        submission: Instead of scores write the file that the evaluation server takes (vqa,
            captioning).
        java: Also METEOR and SPICE, by the Java programs of pycocoevalcap (captioning; minutes).
        precision: Number format of the network; auto measures which one is fastest here
            (docs/speed.md). By default it is float32 on a CPU and, as in training, bfloat16 with
            weights in float32 on a GPU.
        int8: The short form of --precision int8.
    """
    from beit3.data.stores.predictions import write_predictions
    from beit3.ops.collectives import rank, rank_zero_first
    from beit3.progress import show_progress
    from beit3.recipe import RunConfig
    from beit3.task import task_name
    from beit3.tasks.captioning import make_java_scorer
    from beit3.training.evaluate import predict_sources, score_sources
    from beit3.training.launch import init_device
    from beit3.training.parallel import make_autocast
    from beit3.training.record_checks import check_records
    from beit3.training.sources import open_split

    check_task_fields(fields, evaluate, "eval")
    device = init_device(RunConfig())
    name = merge_precision(precision, int8)
    predictor = load_predictor(weights, released, precision=name, fields=fields, device=device)
    predictor.check_trained()
    task = predictor.task
    task_class = type(task)
    if not task.sources:
        raise ValueError(
            f"task {task_name(task_class)} reads no records: there is nothing to score"
        )
    score_by_java = make_java_scorer(task_class) if java else None
    with rank_zero_first():
        sources = open_split(task_class, root, split)
    predictor.match_class_names(next(iter(sources.values())).path.with_name(task.names_file))
    with show_progress("checking records") as advance:
        check = partial(check_records, task_class, sources, config=task.config, progress=advance)
        score_fault = ""
        try:
            check("score")
        except ValueError as error:
            if not (predictions or submission):
                raise
            score_fault = str(error)
            check("predict")
    with show_progress("records") as advance:
        predicted = predict_sources(
            task,
            sources,
            batch_size=batch,
            workers=workers,
            autocast=make_autocast(RunConfig(), device) if name is None else None,
            progress=advance,
        )
    if rank():
        return
    if predictions:
        rows = (
            {"source": source} | prediction
            for source, (source_predictions, _) in predicted.items()
            for prediction in source_predictions
        )
        write_predictions(predictions, rows)
    if submission:
        write_submission(task, predicted, submission)
        return
    if score_fault:
        print(f"not scored: {score_fault}", file=sys.stderr)
        return
    scores = score_sources(task_class, predicted)
    if score_by_java is not None:
        for source_predictions, records in predicted.values():
            scores |= score_by_java(source_predictions, records)
    print(json.dumps(scores, indent=1))


def write_submission(task: "Task", predicted: "SourcePredictions", path: str) -> None:
    """Writes the predictions as the task's evaluation server takes them."""
    from beit3.files import write_text

    lines = [
        line
        for predictions, records in predicted.values()
        for line in task.submission(predictions, records)
    ]
    write_text(path, json.dumps(lines, ensure_ascii=False) + "\n")
    print(f"{len(lines)} predictions for the evaluation server at {path}", file=sys.stderr)


def score(
    task: TaskName,
    predictions: str,
    /,
    *,
    split: str = "val",
    root: RecordsRoot = "",
    source: str = "main",
    java: bool = False,
) -> None:
    """Score a file of predictions.

    ```
    beit3 score vqa predictions.jsonl --data.root data
    ```

    Args:
        task: The task that the predictions are of.
        predictions: A file that `beit3 eval --predictions` wrote, or a JSON list of the same.
        split: train, val or test.
        root: Directory of the records; by default the embedded world.
        source: The source of the records.
        java: Also METEOR and SPICE, as for `beit3 eval`.
    """
    from beit3.data.stores.predictions import read_predictions
    from beit3.task import load_task
    from beit3.tasks.captioning import make_java_scorer
    from beit3.training.record_checks import check_records
    from beit3.training.sources import open_split

    task_class = load_task(task)
    score_by_java = make_java_scorer(task_class) if java else None
    sources = open_split(task_class, root, split)
    if source not in sources:
        raise ValueError(
            f"--source {source} has no {split} records: there are {', '.join(sources)}"
        )
    check_records(task_class, {source: sources[source]}, "score", bad_share=1.0)
    rows = [
        row
        for row in read_predictions(predictions, task_class.prediction_fields)
        if row.get("source", source) == source
    ]
    records = list(sources[source])
    try:
        scores = task_class.score(rows, records)
        if score_by_java is not None:
            scores |= score_by_java(rows, records)
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from None
    print(json.dumps(scores, indent=1))
