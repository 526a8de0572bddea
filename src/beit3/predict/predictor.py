"""Predicts from raw inputs with loaded weights.

The predictor works on files and images, its network (`.task`) on tensors alone:
`.task.outputs(batch)` needs neither a text tokenizer nor answer names.
"""

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit3.data.batches import TEXT_KEYS
from beit3.export.runtime import Weightless
from beit3.model.packed import pack
from beit3.precision import (
    HALF_DTYPES,
    PrecisionChoice,
    apply_precision,
    check_precision,
    compare_precisions,
)
from beit3.predict import features
from beit3.predict.features import Inspection
from beit3.predict.fingerprint import compute_fingerprint
from beit3.predict.inputs import OnError, align_inputs, is_list, list_inputs, run_in_batches
from beit3.predict.names import read_classes
from beit3.task import Batch, Example, Prediction, Record, Task, task_name
from beit3.training.evaluate import to_device
from beit3.training.parallel import wrap_blocks
from beit3.weights.adapt import add_names
from beit3.weights.matching import LoadReport, serves_text
from beit3.weights.pretrained import save_folder

COMPILED_CALLS = threading.Lock()
"""Held while a compiled network runs: compilation is no work for two threads of a process."""

MODALITY_KEYS: Mapping[str, Sequence[str]] = {"image": ("image",), "text": TEXT_KEYS}
"""Keys of a batch that belong to a modality."""


class Predictor:
    """A task in evaluation mode, which takes raw inputs, one or many.

    Several threads may use one predictor at once. `to` is for one thread alone.

    Args:
        task: The network, in float32.
        report: Which weights were loaded, were not used, or are at their initial values.
        precision: The number format to compute in, see `beit3.precision`.
        packed: Whether to lay the weights out for batches of recurring size, where they are in
            float32.
        compiled: Whether to compile each block.

    Raises:
        ValueError: This machine cannot compute in `precision`, or it was combined with an option
            that it excludes.
    """

    def __init__(
        self,
        task: Task,
        report: LoadReport,
        *,
        precision: str = "float32",
        packed: bool = False,
        compiled: bool = False,
    ) -> None:
        check_precision(precision)
        for name, is_set in (("packed", packed), ("compiled", compiled)):
            if precision == "int8" and is_set:
                raise ValueError(
                    f"int8 lays weights out and compiles in its own way: leave {name} out"
                )
        if packed and precision in HALF_DTYPES:
            raise ValueError(
                f"{precision} lays weights out in its own way: leave packed out, or take float32"
            )
        self.report = report
        self.source: Path | None = None
        """The weights directory or file that `load` read."""
        self._follows_device = precision == "auto"
        choice = PrecisionChoice(precision)
        if precision == "auto":
            choice = compare_precisions(task, packed=packed)
        self.packed = packed and choice.name == "float32"
        self._fingerprint: dict[str, str] | None = None
        self._is_compiled = compiled
        self.task = task
        self.change_precision(choice)
        if self.packed:
            pack(self.task)
        wrap_blocks(self.task, compiled=compiled)

    def change_precision(self, choice: PrecisionChoice) -> None:
        """Changes a network in float32 to another number format, as `load` does."""
        if choice.name != "float32" and self._fingerprint is None:
            self._fingerprint = compute_fingerprint(self.task)  # weights are about to be rounded
        self.task = apply_precision(self.task, choice.name)
        self._is_compiled |= choice.name == "int8"
        self.precision_choice = choice
        """The number format that the network computes in, and what was measured for it."""

    @property
    def precision(self) -> str:
        """Name of the number format that the network computes in."""
        return self.precision_choice.name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.task.parameters()).device

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides the features, see `beit3.predict.fingerprint`: `task`, `weights`, `image`
        and `text`. The first use takes a second or two for 220 million weights on two cores."""
        if self._fingerprint is None:
            self._fingerprint = compute_fingerprint(self.task)
        return dict(self._fingerprint)

    def to(self, device: torch.device | str) -> "Predictor":
        """Moves the network to `device` and returns the predictor itself.

        With precision "auto" float32 becomes half precision on an accelerator.

        Raises ValueError for int8 or packed weights, which only a CPU can use.
        """
        device = torch.device(device)
        if device.type != "cpu":
            if self.precision == "int8":
                raise ValueError(
                    f"int8 runs on CPU, and the device is {device.type}: leave int8 out, or hide "
                    "the GPU"
                )
            if self.packed:
                raise ValueError(
                    f"packed weights run on CPU, and the device is {device}: leave packed out"
                )
        self.task.to(device)
        is_undecided = self._follows_device and self.precision == "float32"
        if is_undecided and device.type != "cpu":
            self.change_precision(compare_precisions(self.task))
        return self

    # Checks ---------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, license: str = "", push_to: str = "", private: bool = False
    ) -> Path:
        """Writes the weights as a folder to share: weights directory and model card; returns it.

        Args:
            folder: Where to write. It may hold an earlier save, whose card is kept.
            license: The license's identifier for the card, such as "mit".
            push_to: Repository of the Hugging Face hub to upload the folder to, as owner/name.
            private: Whether a new repository is visible to its owner alone.

        Raises:
            ValueError: The weights are not in float32, packed or in part untrained, the predictor
                is an export, the folder holds other files, or the upload failed.
        """
        if isinstance(self.task.backbone, Weightless):
            raise ValueError(f"{self.report.source} holds no weights: save those it was made of")
        if self.precision != "float32" or self.packed:
            raise ValueError(
                f"{'packed' if self.packed else self.precision} weights cannot be saved: load them "
                "in float32, without packed"
            )
        return save_folder(
            self.task,
            folder,
            report=self.report,
            source=self.source,
            license=license,
            push_to=push_to,
            private=private,
        )

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

    def check_text_side(self, records: Iterable[Record]) -> None:
        """Raises ValueError for texts where the weights have no text side or no tokenizer."""
        if not any("text" in record for record in records):
            return
        if any(map(serves_text, self.report.fresh)):
            raise ValueError(
                f"{self.report.source} holds the image side alone: give images without text"
            )
        self.task.tokenizer  # noqa: B018

    # Predictions ----------------------------------------------------------------------------------

    def __call__(
        self,
        *inputs: Any,
        batch_size: int = 32,
        workers: int = 0,
        on_error: OnError = "raise",
        **named_inputs: Any,
    ) -> list[Any]:
        """Predicts from raw inputs: one record, or lists of equal length.

        Args:
            inputs: The inputs in the order of the task's `record`: images of any kind that
                `beit3.images.open_image` reads, texts as str. Each is one input or a list. One
                beside a list belongs to all: an image with many questions. None leaves an input
                out.
            batch_size: Records that are predicted at once.
            workers: Threads that decode images ahead, while the network computes.
            on_error: For lists, what becomes of a record that cannot be read: "raise", "skip" or a
                function of (index, message), see `beit3.predict.inputs.OnError`.
            named_inputs: Inputs by the names of the parameters of `record`.

        Returns:
            The task's candidates, the best first. A task without candidates returns a list of its
            single prediction. For lists, a list of these in the order of the inputs, in which None
            takes the place of a record that cannot be read.

        Raises:
            ValueError: The task does not take these inputs, an input cannot be read, or a part of
                the task is untrained.
        """
        name, input_names = task_name(type(self.task)), self.task.input_names
        if not input_names:
            raise ValueError(f"{name} takes no raw inputs: give tensors to .task.outputs(batch)")
        self.check_trained()
        try:
            bound = inspect.signature(self.task.record).bind(*inputs, **named_inputs)
        except TypeError:
            count = len(inputs) + len(named_inputs)
            named = f" ({', '.join(named_inputs)} by name)" if named_inputs else ""
            raise ValueError(
                f"{name} takes {', '.join(input_names)}: {count} inputs given{named}"
            ) from None
        is_one = not any(map(is_list, bound.arguments.values()))
        records = [self.task.record(**values) for values in align_inputs(bound.arguments)]
        for record in records:
            if not record.keys() - {"id"}:
                raise ValueError(f"{name} takes {' or '.join(input_names)}: all inputs are empty")
        self.check_text_side(records)
        results = run_in_batches(
            records,
            self.make_example,
            self.predict_examples,
            batch_size=batch_size,
            workers=workers,
            on_error="raise" if is_one else on_error,
            label="" if is_one else "inputs",
        )
        return results[0] if is_one else results

    def make_example(self, record: Record) -> Example:
        """Converts a record to tensors. Several threads may call it at once.

        Raises ValueError where the record cannot be read.
        """
        return self.task.example(record, False)

    def predict_examples(self, examples: Sequence[Example]) -> list[list[Prediction]]:
        """Predicts from examples of `make_example` that have the same keys, as one batch.

        Returns the candidates of each example, as a call of the predictor does for each record.
        """
        predictions = self.compute(self.task.predict, self.task.collate(examples))
        candidates = []
        for prediction in predictions:
            values = {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in prediction.items()
            }
            candidates.append(values.get("candidates", [values]))
        return candidates

    @torch.inference_mode()
    def compute(self, function: Callable[[Batch], Any], batch: Batch) -> Any:
        """Calls a function of the network on a batch, which is moved to the weights first."""
        weights = next(self.task.parameters())
        with self._take_turn():
            return function(to_device(batch, weights.device, weights.dtype))

    def _take_turn(self) -> AbstractContextManager[Any]:
        return COMPILED_CALLS if self._is_compiled else nullcontext()

    # Features -------------------------------------------------------------------------------------

    def embed(
        self,
        images: Any = (),
        texts: str | Iterable[str] = (),
        *,
        batch_size: int = 32,
        workers: int = 0,
        on_error: OnError = "raise",
    ) -> dict[str, np.ndarray]:
        """Returns features of images and of texts, each input encoded by itself.

        Those of retrieval are unit vectors in one space. Those of backbone are the final states of
        the class token and of `<s>`, neither normalized nor in one space.

        Args:
            images: N images of any kind that `beit3.images.open_image` reads, or one. They are
                prepared as the weights need them.
            texts: M texts, or one.
            batch_size: Number of inputs that are encoded at once.
            workers: Threads that decode images ahead, while the network computes.
            on_error: What becomes of an input that cannot be read: "raise", "skip" or a function
                of (index, message), whose message begins with `images[3]` or `texts[3]`.

        Returns:
            `image` [N, D] and `text` [M, D], float32; a key without inputs is left out. The row of
            an input that cannot be read is NaN.

        Raises:
            ValueError: The task has no features of single inputs, an input cannot be read, or none
                can.
        """
        self._check_embeds()
        records_by_modality = {
            "image": [self.task.record(image) for image in list_inputs(images)],
            "text": [self.task.record(None, text) for text in list_inputs(texts)],
        }
        self.check_text_side(records_by_modality["text"])
        embedded = {}
        for modality, records in records_by_modality.items():
            if not records:
                continue

            def prepare(record: Record, modality: str = modality) -> Example:
                if modality not in record:
                    raise ValueError(f"the {modality} is empty: leave it out")
                return self.make_example(record)

            def run(examples: list[Example], modality: str = modality) -> np.ndarray:
                return self.encode(self.task.collate(examples))[modality]

            rows = run_in_batches(
                records,
                prepare,
                run,
                batch_size=batch_size,
                workers=workers,
                on_error=on_error,
                label=f"{modality}s",
            )
            embedded[modality] = features.stack_rows(rows, f"{modality}s")
        return embedded

    def encode(self, batch: Batch) -> dict[str, np.ndarray]:
        """Returns the features of a collated batch of the task, each input encoded by itself.

        Args:
            batch: As `task.collate` makes it of `task.example`s: `image` and `text`, or one alone.

        Returns:
            `image` [B, D] and `text` [T, D], float32, as `embed` describes them.

        Raises:
            ValueError: The task has no features of single inputs.
        """
        self._check_embeds()
        encoded = {}
        for modality, keys in MODALITY_KEYS.items():
            if modality not in batch:
                continue
            part = {key: batch[key] for key in keys if key in batch}
            outputs = self.compute(self.task.outputs, part)
            if f"{modality}_features" in outputs:
                states = outputs[f"{modality}_features"]
            else:
                states = outputs[modality][:, 0]
            encoded[modality] = states.float().cpu().numpy()
        return encoded

    def _check_embeds(self) -> None:
        """Raises ValueError unless the task has trained features of single inputs."""
        if set(self.task.input_names) != {"image", "text"}:
            raise ValueError(
                f"{task_name(type(self.task))} has no features of single inputs: give weights of "
                "retrieval, or load these with task='backbone'"
            )
        self.check_trained()

    def embed_pairs(
        self,
        images: Any,
        texts: str | Iterable[str],
        *,
        batch_size: int = 32,
        workers: int = 0,
        on_error: OnError = "raise",
    ) -> dict[str, np.ndarray]:
        """Returns features of images and texts that are encoded together, as one fused sequence.

        Weights of any task with a BEiT-3 backbone serve. The head is not used.

        Args:
            images: N images, or one for all texts.
            texts: N texts, or one for all images.
            batch_size: Pairs that are encoded at once.
            workers: Threads that decode images ahead.
            on_error: What becomes of a pair that cannot be read, as for `embed`.

        Returns:
            `image` [N, D], the final state of the class token, and `text` [N, D], that of `<s>`,
            float32 and not normalized. The row of a pair that cannot be read is NaN.

        Raises:
            ValueError: The weights cannot encode pairs, or an input cannot be read.
        """
        return features.embed_pairs(
            self, images, texts, batch_size=batch_size, workers=workers, on_error=on_error
        )

    def embed_patches(
        self,
        images: Any,
        *,
        layer: int = -1,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        workers: int = 0,
        on_error: OnError = "raise",
    ) -> np.ndarray:
        """Returns the states of the patches of images as maps [N, D, h, w], float32.

        Args:
            images: N images, or one.
            layer: The block after which the states are read, 1 the first; 0 reads the embeddings,
                -1 the final states.
            image_size: Side of the square in pixels, or (height, width), in place of the size of
                the weights; a multiple of the patch size. h and w are these sizes in patches.
            batch_size: Images that are encoded at once.
            workers: Threads that decode images ahead.
            on_error: What becomes of an image that cannot be read, as for `embed`; its map is NaN.

        Raises:
            ValueError: The weights have no BEiT-3 backbone, the size is no multiple of the patch,
                there is no such layer, or an image cannot be read.
        """
        return features.embed_patches(
            self,
            images,
            layer=layer,
            image_size=image_size,
            batch_size=batch_size,
            workers=workers,
            on_error=on_error,
        )

    def inspect(
        self,
        image: Any = None,
        text: str | None = None,
        *,
        layers: Sequence[int] = (-1,),
        attention: bool = False,
        image_size: int | tuple[int, int] | None = None,
    ) -> Inspection:
        """Looks inside the network: states of any layers and attention of an image, a text or both.

        Args:
            image: An image; None encodes the text alone.
            text: A text; None or "" encodes the image alone.
            layers: Numbers of blocks whose output is kept, 1 the first; 0 is the embeddings, -1 the
                last block.
            attention: Whether to compute the attention of these blocks too. It needs memory for
                heads x tokens x tokens per block.
            image_size: As for `embed_patches`.

        Raises:
            ValueError: As for `embed_patches`.
        """
        return features.inspect(
            self, image, text, layers=layers, attention=attention, image_size=image_size
        )
