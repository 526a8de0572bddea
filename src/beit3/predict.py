"""From raw inputs to a prediction: one call loads any weights, another asks them.

The predictor knows files and pictures, the network (`.task`) only tensors: `.task.outputs(batch)` works without a text
tokenizer and without answer names.
"""

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from beit3.task import Prediction, Task
from beit3.tokenizer.text import TextTokenizer
from beit3.train.evaluate import to_device
from beit3.weights import official, store
from beit3.weights.fill import Report, is_text, stored, task_name


class Predictor:
    """A task in evaluation mode. `task`: the network; `report`: what was loaded, ignored, left fresh."""

    def __init__(self, task: Task, report: Report):
        self.task = task.eval()
        self.report = report

    def require_trained(self) -> None:
        """ValueError where parts of the task besides the text side are at their initial values."""
        untrained = [key for key in self.report.fresh if not is_text(key)]
        if untrained:
            name = task_name(type(self.task))
            raise ValueError(f"the head of {name} is untrained ({untrained[0]}): fine-tune, or use .task.outputs(batch)")

    @torch.inference_mode()
    def __call__(self, *inputs: Any) -> list[Prediction]:
        """What the task says of one set of raw inputs, those of its `record`: its candidates, the best first.

        A task that ranks none gives a list of its one prediction. Images as paths or PIL images; None leaves one out.

        Raises ValueError for inputs that the task does not take or cannot read, and for parts that nobody has trained.
        """
        name = task_name(type(self.task))
        make = getattr(self.task, "record", None)
        if make is None:
            raise ValueError(f"{name} takes no raw inputs: give tensors to .task.outputs(batch)")
        self.require_trained()
        signature = inspect.signature(make)
        try:
            signature.bind(*inputs)
        except TypeError:
            raise ValueError(f"{name} takes {', '.join(signature.parameters)}: {len(inputs)} inputs given") from None
        record = make(*inputs)
        if "text" in record and any(map(is_text, self.report.fresh)):
            raise ValueError(f"{self.report.source} holds the image side alone: give images without text")
        batch = self.task.collate([self.task.example(record, False)])
        prediction = self.task.predict(to_device(batch, next(self.task.parameters()).device))[0]
        return prediction.get("candidates", [prediction])


def load(
    path: str | Path,
    *,
    task: str | None = None,
    num_heads: int | None = None,
    text_model: str | Path | None = None,
    answers: str | Path | Sequence[str] | None = None,
) -> Predictor:
    """Weights of any kind, ready to use on the CPU.

    path: a directory of weights, a run with `best` or `last` in it, or a released file. task: what to build from a
    released file, by default what its keys say. num_heads: where 64 units a head is wrong. text_model: the
    SentencePiece file of released weights. answers: names of the VQA head's outputs, a list or a file. Raises
    ValueError, in one line.
    """
    path = Path(path)
    names = _answers(answers)
    if path.is_dir():
        return _load_directory(path, task, text_model, names)
    tokenizer = None if text_model is None else TextTokenizer(text_model)
    state = official.read_file(path)
    try:
        built, report = official.load_official(state, task, num_heads=num_heads, answers=names, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Predictor(built, report)


def _load_directory(path: Path, task: str | None, text_model: str | Path | None, answers: tuple[str, ...]) -> Predictor:
    directory = store.find(path)
    description = store.read_config(directory)
    if task not in (None, description.task):
        raise ValueError(f"{directory} holds weights of {description.task}, not of {task}: leave task out")
    config = description.config
    if answers:
        if "answers" not in {field.name for field in fields(config)}:
            raise ValueError(f"answers given, but {directory} holds weights of {description.task}: leave answers out")
        changes: dict[str, Any] = {"answers": answers}
        config = replace(config, **changes)
    built = store.load(directory, text_model=text_model, config=config)
    return Predictor(built, Report(f"{directory} ({description.task})", tuple(stored(built)), {}, {}))


def _answers(answers: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(answers, str | Path):
        from beit3.tasks.vqa import read_answers

        return read_answers(Path(answers))
    return tuple(answers or ())

