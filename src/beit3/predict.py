"""Loads weights of any kind and predicts from raw inputs.

The predictor works on files and images, its network (`.task`) on tensors alone:
`.task.outputs(batch)` needs neither a text tokenizer nor answer names.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
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

Names = str | Path | Sequence[str] | Mapping[int | str, str] | None
"""Names of a head's outputs: a file, a list, {label: name}, or none."""


# Predicting ---------------------------------------------------------------------------------------


class Predictor:
    """A task in evaluation mode, which takes raw inputs.

    Args:
        task: The network.
        report: Which weights were loaded, were not used, or are at their initial values.
        int8: Whether to compute in 8-bit integers.
        packed: Whether to lay the weights out for batches of recurring size.
        compiled: Whether to compile each block.

    Raises:
        ValueError: `int8` was combined with `packed` or `compiled`.
    """

    def __init__(
        self,
        task: Task,
        report: LoadReport,
        *,
        int8: bool = False,
        packed: bool = False,
        compiled: bool = False,
    ) -> None:
        for name, is_set in (("packed", packed), ("compiled", compiled)):
            if int8 and is_set:
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
        """Moves the network to `device` and returns the predictor itself.

        Raises ValueError for int8 or packed weights, which only a CPU can use.
        """
        if self.int8:
            check_support(torch.device(device))
        if self.packed and torch.device(device).type != "cpu":
            raise ValueError(
                f"packed weights run on CPU, and the device is {device}: leave packed out"
            )
        self.task.to(device)
        return self

    def check_trained(self) -> None:
        """Raises ValueError where parts of the task are at their initial values.

        Those for texts and pairs do not count: weights of the image side alone lack them.
        """
        untrained = [key for key in self.report.fresh if not serves_text(key)]
        if untrained:
            name = task_name(type(self.task))
            raise ValueError(
                f"the head of {name} is untrained ({untrained[0]}), {self.report.source} has "
                f"none: give weights of {name}, "
                f"fine-tune (beit3 train {name} --init), or use .task.outputs(batch)"
            )

    def match_class_names(self, file: Path) -> None:
        """Compares the class names with those of the records to evaluate, which `file` lists.

        A task that classifies by names and has none takes them from the file. Raises ValueError
        where the weights have other classes, or another order: labels would mean something else.
        """
        config, own_names = self.task.config, self.task.class_names
        if not file.exists() or not (own_names or config.classifies_by_names):
            return
        record_names = read_classes(file)
        if not own_names:
            self.task.config = add_names(config, type(self.task), classes=record_names, fixed={})
            return
        for label, (own_name, record_name) in enumerate(zip_longest(own_names, record_names)):
            if own_name != record_name:
                raise ValueError(
                    f"class {label} is {own_name!r} to the weights and {record_name!r} in {file}: "
                    "score records of the same classes"
                )

    @torch.inference_mode()
    def __call__(self, *inputs: Any) -> list[Prediction]:
        """Predicts from the raw inputs of one record.

        Args:
            inputs: The inputs in the order of the task's `record`: images of any kind that
                `beit3.images.open_image` reads, texts as str. None leaves an input out.

        Returns:
            The task's candidates, the best first. A task without candidates returns a list of its
            single prediction.

        Raises:
            ValueError: The task does not take these inputs, an input cannot be read, or a part of
                the task is untrained.
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
        if not record.keys() - {"id"}:
            raise ValueError(f"{name} takes {' or '.join(input_names)}: all inputs are empty")
        self._check_text_side(record)
        batch = self.task.collate([self.task.example(record, False)])
        device = next(self.task.parameters()).device
        prediction = self.task.predict(to_device(batch, device))[0]
        json_prediction = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in prediction.items()
        }
        return json_prediction.get("candidates", [json_prediction])

    @torch.inference_mode()
    def embed(
        self,
        images: Any = (),
        texts: str | Iterable[str] = (),
        *,
        batch_size: int = 32,
    ) -> dict[str, np.ndarray]:
        """Returns features of images and of texts, each input encoded by itself.

        Those of retrieval are unit vectors in one space. Those of backbone are the final states of
        the class token and of `<s>`, neither normalized nor in one space.

        Args:
            images: N images of any kind that `beit3.images.open_image` reads, or one. They are
                prepared as the weights need them.
            texts: M texts, or one.
            batch_size: Number of inputs that are encoded at once.

        Returns:
            `image` [N, D] and `text` [M, D], float32; a key without inputs is left out.

        Raises:
            ValueError: The task has no features of single inputs, or an input cannot be read.
        """
        make_record = self.task.record
        if set(self.task.input_names) != {"image", "text"}:
            raise ValueError(
                f"{task_name(type(self.task))} has no features of single inputs: give weights of "
                "retrieval, or load these with task='backbone'"
            )
        self.check_trained()
        records_by_modality = {
            "image": [make_record(image) for image in _list_inputs(images)],
            "text": [make_record(None, text) for text in _list_inputs(texts)],
        }
        features = {}
        for modality, records in records_by_modality.items():
            for index, record in enumerate(records):
                if modality not in record:
                    raise ValueError(f"{modality}s[{index}] is empty: leave it out")
                self._check_text_side(record)
            if records:
                features[modality] = self._encode(modality, records, batch_size)
        return features

    def _encode(self, modality: str, records: list[Record], batch_size: int) -> np.ndarray:
        """Returns [N, D]: the task's own features, else each sequence's first state."""
        parameter = next(self.task.parameters())
        # Texts of similar length share a batch, so that there is little padding.
        order = sorted(range(len(records)), key=lambda index: len(records[index].get("text", "")))
        batches = iterate_batches(self.task, [records[index] for index in order], batch_size)
        chunks = []
        for batch in batches:
            outputs = self.task.outputs(to_device(batch, parameter.device, parameter.dtype))
            if f"{modality}_features" in outputs:
                features = outputs[f"{modality}_features"]
            else:
                features = outputs[modality][:, 0]
            chunks.append(features.float().cpu().numpy())
        return np.concatenate(chunks)[np.argsort(order)]

    def _check_text_side(self, record: Record) -> None:
        """Raises ValueError for a text where the weights have no text side."""
        if "text" in record and any(map(serves_text, self.report.fresh)):
            raise ValueError(
                f"{self.report.source} holds the image side alone: give images without text"
            )


def _list_inputs(inputs: Any) -> list[Any]:
    """Returns one input or many as a list: a text, path or image is one, and so is an array of it.

    None stands for no inputs.
    """
    if inputs is None:
        return []
    is_array = isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim in (2, 3)
    is_file = hasattr(inputs, "read") or isinstance(inputs, bytes | bytearray | memoryview)
    if is_array or is_file or not isinstance(inputs, Iterable):
        return [inputs]
    return [inputs] if isinstance(inputs, str) else list(inputs)


# Loading ------------------------------------------------------------------------------------------


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
    """Loads weights of any kind, ready to use on the CPU.

    Args:
        path: A weights directory, a run directory with `best` or `last` in it, or a released file.
        task: Name of the task to build, by default the one of the weights. Parts that the weights
            do not have are at their initial values then, and the predictor refuses to use them.
        num_heads: Number of attention heads, where 64 units per head is wrong.
        text_model: SentencePiece file for released weights.
        answers: Names of the VQA head's outputs.
        classes: Names of ImageNet's classes; for weights of retrieval any names.
        prompt: Sentence in which {} stands for a class name, for weights of retrieval.
        int8: Computes in 8-bit integers, two to four times faster on CPUs that have instructions
            for them.
        packed: Lays weights out for batches of recurring size: a third faster on single images
            and captions, for up to twice the memory of the weights.
        compiled: Compiles each block, which pays for many batches of one size and takes half a
            minute at the start. docs/speed.md compares the three.

    Raises:
        ValueError: The weights cannot be loaded in this way; the message is one line.
    """
    path = Path(path)
    answer_names, class_names = read_answers(answers), read_classes(classes)
    if path.is_dir():
        directory = store.find_weights(path)
        built, report = _load_directory(
            directory, task, num_heads, text_model, answer_names, class_names, prompt
        )
    else:
        built, report = _load_file(
            path, task, num_heads, text_model, answer_names, class_names, prompt
        )
    return Predictor(built, report, int8=int8, packed=packed, compiled=compiled)


def _load_file(
    path: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    answers: tuple[str, ...],
    classes: tuple[str, ...],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Loads a released file, as its own task or another."""
    tokenizer = None if text_model is None else TextTokenizer(text_model)
    file = state_dicts.read_checkpoint(path)
    try:
        return loading.load_released(
            file.tensors,
            task,
            num_heads=num_heads,
            answers=answers,
            classes=classes,
            prompt=prompt,
            tokenizer=tokenizer,
            notes=file.notes,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_directory(
    directory: Path,
    task: str | None,
    num_heads: int | None,
    text_model: str | Path | None,
    answers: tuple[str, ...],
    classes: tuple[str, ...],
    prompt: str,
) -> tuple[Task, LoadReport]:
    """Loads a weights directory, as its own task or another."""
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
    """Returns the names of the VQA head's outputs.

    A file has the released format, or another of those that `label_names` reads. Of a root of
    records the answer list of its VQA records is read.
    """
    if isinstance(names, str | Path):
        return label_names.read_answers(Path(names))
    return _parse_names(names, "answers")


def read_classes(names: Names) -> tuple[str, ...]:
    """Returns class names.

    A file has one name per line, or is JSON as dense tasks, Keras or Hugging Face write it. Of a
    root of records the names of its ImageNet records are read.
    """
    if isinstance(names, str | Path):
        return label_names.read_class_names(Path(names))
    return _parse_names(names, "classes")


def _parse_names(names: Any, location: str) -> tuple[str, ...]:
    """Returns names that are no file; () for None."""
    if names is None:
        return ()
    return label_names.parse_names(names if isinstance(names, Mapping) else list(names), location)
