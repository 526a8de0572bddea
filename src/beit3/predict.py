"""From raw inputs to a prediction: one call loads any weights, another asks them.

The predictor knows files and pictures, the network (`.task`) only tensors: `.task.outputs(batch)`
works without a text
tokenizer and without answer names.
"""

import inspect
import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit3.data.stores import label_names
from beit3.model.packed import pack
from beit3.quantize import check_support, quantize
from beit3.task import Prediction, Record, Task, task_name
from beit3.task import load_task as load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.training.evaluate import iterate_batches, to_device
from beit3.training.parallel import wrap_blocks
from beit3.weights import loading, state_dicts, store
from beit3.weights.adapt import add_names
from beit3.weights.matching import LoadReport, get_weights, serves_text

CLASSES = "imagenet/main/classes.txt"
"""Class names below a root of records."""

Names = str | Path | Sequence[str] | None
"""Names of a head's outputs: a file, a list, or none."""


class Predictor:
    """A task in evaluation mode. `task`: the network; `report`: what was loaded, ignored, left
    fresh; the others: as for `load`."""

    def __init__(
        self,
        task: Task,
        report: LoadReport,
        *,
        int8: bool = False,
        packed: bool = False,
        compiled: bool = False,
    ):
        for name, given in (("packed", packed), ("compiled", compiled)):
            if int8 and given:
                raise ValueError(
                    f"int8 lays weights out and compiles in its own way: leave {name} out"
                )
        self.task = quantize(task) if int8 else task.eval()
        if packed:
            pack(self.task)
        wrap_blocks(self.task, compiled=compiled)
        self.report = report
        self.int8, self.packed = int8, packed

    def to(self, device: torch.device | str) -> "Predictor":
        """Itself, with the network on `device`. ValueError for one in int8 or packed, which a
        processor alone computes."""
        if self.int8:
            check_support(torch.device(device))
        if self.packed and torch.device(device).type != "cpu":
            raise ValueError(
                f"packed weights are for a processor, and the device here is {device}: leave "
                "packed out"
            )
        self.task.to(device)
        return self

    def check_trained(self) -> None:
        """ValueError where parts of the task besides those for texts and pairs are at their initial
        values."""
        untrained = [key for key in self.report.fresh if not serves_text(key)]
        if untrained:
            name = task_name(type(self.task))
            raise ValueError(
                f"the head of {name} is untrained ({untrained[0]}), {self.report.source} has "
                f"none: give weights of {name}, "
                f"fine-tune (beit3 train {name} --init), or use .task.outputs(batch)"
            )

    def match_class_names(self, file: Path) -> None:
        """Before scoring records whose class names are in `file`: a task that classifies by names
        and has none takes them.

        ValueError where the weights' classes are others, or in another order: labels would mean
        something else.
        """
        config, own_names = self.task.config, self.task.class_names
        if not file.exists() or not (own_names or config.classifies_by_names):
            return
        record_names = read_classes(file)
        if not own_names:
            self.task.config = add_names(config, type(self.task), classes=record_names, fixed={})
            return
        for label, (own, other) in enumerate(zip_longest(own_names, record_names)):
            if own != other:
                raise ValueError(
                    f"class {label} is {own!r} to the weights and {other!r} in {file}: "
                    "score records of the same classes"
                )

    @torch.inference_mode()
    def __call__(self, *inputs: Any) -> list[Prediction]:
        """What the task says of one set of raw inputs, those of its `record`: its candidates, the
        best first.

        A task that ranks none gives a list of its one prediction. Images as paths or PIL images;
        None leaves one out.

        Raises ValueError for inputs that the task does not take or cannot read, and for parts that
        nobody has trained.
        """
        name, input_names = task_name(type(self.task)), self.task.input_names
        if not input_names:
            raise ValueError(f"{name} takes no raw inputs: give tensors to .task.outputs(batch)")
        self.check_trained()
        try:
            inspect.signature(self.task.record).bind(*inputs)
        except TypeError:
            raise ValueError(
                f"{name} takes {', '.join(input_names)}: {len(inputs)} inputs given"
            ) from None
        record = self.task.record(*inputs)
        self._require_side(record)
        batch = self.task.collate([self.task.example(record, False)])
        prediction = self.task.predict(to_device(batch, next(self.task.parameters()).device))[0]
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in prediction.items()
        }
        return plain.get("candidates", [plain])

    @torch.inference_mode()
    def embed(
        self, images: Iterable[Any] = (), texts: Iterable[str] = (), *, batch_size: int = 32
    ) -> dict[str, np.ndarray]:
        """Features `image` [n, D] and `text` [m, D] in float32, of whichever was given, each input
        encoded by itself.

        images: paths or PIL images, prepared as the weights know them. Those of retrieval are unit
        vectors in one space.
        Those of backbone are the class token's and the begin mark's states as they are, neither
        normalised nor in one
        space. Raises ValueError for a task without features, and for an input that cannot be read.
        """
        make = self.task.record
        if set(self.task.input_names) != {"image", "text"}:
            raise ValueError(
                f"{task_name(type(self.task))} has no features of single inputs: give weights of "
                "retrieval, or load these with task='backbone'"
            )
        self.check_trained()
        given = {
            "image": [make(image) for image in images],
            "text": [make(None, text) for text in texts],
        }
        found = {}
        for side, records in given.items():
            for place, record in enumerate(records):
                if side not in record:
                    raise ValueError(f"{side}s[{place}] is empty: leave it out")
                self._require_side(record)
            if records:
                found[side] = self._features(side, records, batch_size)
        return found

    def _features(self, side: str, records: list[Record], batch_size: int) -> np.ndarray:
        """One feature a record: the task's own, else the first state of the side."""
        weights, rows = next(self.task.parameters()), []
        order = sorted(
            range(len(records)), key=lambda place: len(records[place].get("text", ""))
        )  # little padding in a batch
        for batch in iterate_batches(self.task, [records[place] for place in order], batch_size):
            outputs = self.task.outputs(to_device(batch, weights.device, weights.dtype))
            features = (
                outputs[f"{side}_features"]
                if f"{side}_features" in outputs
                else outputs[side][:, 0]
            )
            rows.append(features.float().cpu().numpy())
        return np.concatenate(rows)[np.argsort(order)]

    def _require_side(self, record: Record) -> None:
        """ValueError for a text where the weights hold no text side."""
        if "text" in record and any(map(serves_text, self.report.fresh)):
            raise ValueError(
                f"{self.report.source} holds the image side alone: give images without text"
            )


def load(
    path: str | Path,
    *,
    task: str | None = None,
    num_heads: int | None = None,
    text_model: str | Path | None = None,
    answers: Names = None,
    classes: Names = None,
    prompt: str = "",
    int8: bool = False,
    packed: bool = False,
    compiled: bool = False,
) -> Predictor:
    """Weights of any kind, ready to use on the CPU.

    path: a directory of weights, a run with `best` or `last` in it, or a released file. task: what
    to build, by default
    what the weights are; parts that they do not hold are at their initial values then, and the
    predictor refuses to
    use them. num_heads: where 64 units a head is wrong. text_model: the SentencePiece file of
    released weights.
    answers: names of the VQA head's outputs. classes: names of imagenet's, for weights of retrieval
    any names, which
    `prompt` may put into a sentence in place of {}. int8: in 8-bit integers, two to four times
    faster on CPUs that
    have instructions for them. packed: weights laid out for batches that recur, for a third more
    speed on single images and
    captions, and up to twice the memory of the weights. compiled: each block a program, for many
    batches of one size; half a minute
    at the start (docs/speed.md has all three). Raises ValueError, in one line.
    """
    path = Path(path)
    named = {"answers": read_answers(answers), "classes": read_classes(classes)}
    read, place = (
        (_load_directory, store.find_weights(path)) if path.is_dir() else (_load_file, path)
    )
    built, report = read(place, task, num_heads, text_model, named, prompt)
    return Predictor(built, report, int8=int8, packed=packed, compiled=compiled)


def _load_file(
    path: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    named: dict[str, tuple[str, ...]],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Released weights, as their own task or another; `named`: answers and classes."""
    tokenizer = None if text_model is None else TextTokenizer(text_model)
    state = state_dicts.read_state_dict(path)
    try:
        return loading.load_released(
            state,
            task,
            num_heads=num_heads,
            answers=named["answers"],
            classes=named["classes"],
            prompt=prompt,
            tokenizer=tokenizer,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_directory(
    directory: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    named: dict[str, tuple[str, ...]],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Weights of ours, as their own task or another; `named`: answers and classes."""
    answers, classes = named["answers"], named["classes"]
    description = store.read_config(directory)
    config: Any = description.config
    if num_heads not in (None, config.model.num_heads):
        raise ValueError(
            f"num_heads {num_heads} given, {directory} holds weights of {config.model.num_heads} "
            "heads: leave num_heads out"
        )
    if task not in (None, description.task):
        return loading.load_weights_as(
            directory, task, text_model=text_model, answers=answers, classes=classes, prompt=prompt
        )
    try:
        config = add_names(
            config,
            load_task(description.task),
            answers=answers,
            classes=classes,
            prompt=prompt,
            fixed=config.head_sizes,
        )
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    built = loading.load_weights(directory, text_model=text_model, config=config)
    return built, LoadReport(f"{directory} ({description.task})", tuple(get_weights(built)), {}, {})


def read_answers(names: Names) -> tuple[str, ...]:
    """Names of the VQA head's outputs; a file as released, or one per line."""
    if isinstance(names, str | Path):
        return label_names.read_answers(Path(names))
    return tuple(names or ())


def read_classes(names: Names) -> tuple[str, ...]:
    """Class names; a file of one per line, a .json as dense tasks have it, or a directory of
    records, whose own are taken."""
    if isinstance(names, str | Path) and Path(names).suffix == ".json":
        return tuple(
            each["name"] if isinstance(each, dict) else each
            for each in json.loads(Path(names).read_text(encoding="utf-8"))
        )
    if isinstance(names, str | Path):
        path = Path(names)
        return label_names.read_class_names(path / CLASSES if path.is_dir() else path)
    return tuple(names or ())
