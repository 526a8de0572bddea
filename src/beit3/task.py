"""The contract between a task and everything that trains, evaluates, stores or serves it.

A task is one module of `beit3.tasks`, or of a dotted path of your own, that defines exactly one
`Task` subclass.

Training:   record (JSON) -> example (tensors) -> batch (stacked tensors) -> losses
Inference:  record -> example -> batch -> prediction (JSON) -> score
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from beit3.config import suggest
from beit3.data.batches import (
    check_same_fields,
    count_examples,
    pad_token_ids,
    trim_padding,
)
from beit3.data.prepare.statistics import TokenCounter
from beit3.data.stores.record_fields import FieldKind, Purpose, RecordField
from beit3.model.backbone import MultiwayBackbone
from beit3.model.beit3 import BEiT3
from beit3.model.config import ModelConfig
from beit3.ops.collectives import copy_to_shard
from beit3.ops.init import trunc_normal
from beit3.recipe import Recipe, TaskConfig
from beit3.seeding import make_generator, make_rng
from beit3.tokenizer.text import MODEL_FILE, TextTokenizer

Record = dict[str, Any]
Example = dict[str, Any]
Batch = dict[str, Any]
Prediction = dict[str, Any]


@dataclass(frozen=True)
class FrozenFile:
    """Path of the weights that a frozen child was loaded from, and the SHA-256 of their file."""

    path: str
    sha256: str


class Task(nn.Module):
    """A network together with its data mapping, losses, predictions and score."""

    # Declared by the class ---------------------------------------------------------------------

    Config: ClassVar[type[TaskConfig]]
    recipes: ClassVar[Mapping[str, Recipe]]
    """Named settings; `demo` trains on the embedded world in minutes."""
    sources: ClassVar[tuple[str, ...]] = ("main",)
    """Kinds of records, in the order in which a step visits them."""
    records_from: ClassVar[Mapping[str, str]] = {}
    """Sources that are the records of another task -> the name of that task."""
    record_fields: ClassVar[Mapping[str, RecordField]] = {}
    """What the fields of a record hold and what each is needed for. `id` needs no declaration; a
    task whose sources differ overrides `get_record_fields`."""
    prediction_fields: ClassVar[Mapping[str, FieldKind]] = {}
    """What the fields of a prediction hold that `score` needs, beside `id`."""
    left_out_reason: ClassVar[str] = ""
    """Why training leaves out the records that `trains_on` is false for, for messages."""
    names_file: ClassVar[str] = "classes.txt"
    """File beside the records that holds the class names, where the task has labels."""
    headline: ClassVar[str]
    """Name of the score that decides which weights are best; larger is better."""
    released_names: ClassVar[Mapping[str, str]] = {}
    """Our prefix of the head's parameters -> their prefix in released checkpoints."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Children that never train and are not stored with the weights."""
    unused_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameter prefixes that get no gradient by design -> the reason. Make it a property where
    the config decides."""
    updates_buffers: ClassVar[bool] = False
    """Whether a training forward changes buffers. A process must then see all its records of a
    step in one forward."""
    compares_examples: ClassVar[bool] = False
    """Whether the loss compares the examples of a step with each other. `compare` then computes it
    from the features that `outputs` returns."""

    # Set by the instance -----------------------------------------------------------------------

    backbone: nn.Module
    frozen_files: Mapping[str, FrozenFile] = {}
    """Name of a frozen child -> the file that it was loaded from."""
    has_matching_head: bool = False
    """Whether the task also tells if an image and a text belong together."""
    stored_fingerprint: Mapping[str, str] = {}
    """Of an export, which holds no weights: what decides the features of those it was made of."""

    def __init__(self, config: TaskConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"the text tokenizer has {tokenizer.vocab_size} ids, the weights "
                f"{config.model.vocab_size}: give the tokenizer that they were trained with"
            )

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer. Raises ValueError where none was given."""
        if self._tokenizer is None:
            raise ValueError(
                "text needs a tokenizer file and these weights came without: "
                "give text_model=FILE.spm"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels in their order; empty where the task has none or they are unknown."""
        return self.config.class_names

    # Data --------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Converts the public annotation files under `raw` to records under `root`.

        Returns the report: counts and remarks, as JSON. Keyword-only arguments of a task's own
        become options of `beit3 prepare`.
        """
        raise NotImplementedError

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """Completes `config` with facts that only the records know: answer list, class names."""
        return config

    @classmethod
    def get_record_fields(cls, source: str) -> Mapping[str, RecordField]:
        """Returns the declared fields of the records of a source."""
        return cls.record_fields

    @staticmethod
    def find_record_fault(record: Record, purpose: Purpose, config: TaskConfig | None) -> str:
        """Returns what is wrong with a record whose fields are as declared, or "".

        Tasks override it for what a table of fields cannot say. `config` is None where records are
        checked without a network.
        """
        return ""

    @staticmethod
    def trains_on(record: Record) -> bool:
        """Returns whether a record of the train split is trained on."""
        return True

    def record(self, *args: Any, **kwargs: Any) -> Record:
        """Makes a record of raw inputs, for `Predictor`. Raises ValueError where there are none.

        Tasks that predict from raw inputs override it with named parameters (image, question).
        """
        raise ValueError(
            f"{task_name(type(self))} takes no raw inputs: give tensors to .task.outputs(batch)"
        )

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the raw inputs that `record` takes; empty for a task that takes none."""
        if type(self).record is Task.record:
            return ()
        return tuple(inspect.signature(self.record).parameters)

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Converts one record to tensors.

        Args:
            record: The record, its image paths absolute.
            train: Whether to augment.
            rng: Source of all randomness; by default it is seeded by the record's id.
        """
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stacks tensors by key; other values become lists. Texts are cut to the longest."""
        check_same_fields(examples)
        batch: Batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            # In a loader worker, default_collate stacks into shared memory.
            batch[key] = default_collate(values) if isinstance(values[0], Tensor) else values
        return trim_padding(batch)

    def without_network(self) -> "Task":
        """Returns a copy without parameters and modules, which makes examples and batches.

        Loader processes are sent it: a network would be copied to each of them, a tensor at a time.
        """
        copy = object.__new__(_find_task_class(type(self)))
        nn.Module.__init__(copy)
        for name, value in self.__dict__.items():
            # Sharding leaves methods bound to the sharded task, and a state under a private name.
            is_added = inspect.ismethod(value) or name.startswith("__")
            if name not in copy.__dict__ and not is_added:
                copy.__dict__[name] = value
        return copy

    def normalize_images(self, batch: Batch) -> Tensor:
        """Returns the batch's images [..., 3, H, W] normalized, in the dtype of the weights.

        uint8 images are normalized here, on the device; floating-point images already are.
        """
        images = batch["image"]
        if images.is_floating_point():
            return images
        dtype = next(self.backbone.parameters()).dtype
        return self.config.image.normalize(images).to(dtype)

    def tokenize_text(self, text: str | Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """Returns `text` [length] int64 and `text_padding` [length] bool of a text."""
        return pad_token_ids(self.encode_text(text, length), length, TextTokenizer.pad)

    def encode_text(self, text: str | Sequence[int], length: int) -> list[int]:
        """Returns at most `length` token ids, BOS and EOS included.

        `text` is a string, or ids of its pieces, as upstream's index files and `.tokens` files
        hold them.
        """
        if isinstance(text, str):
            return self.tokenizer.encode(text, length)
        ids = [TextTokenizer.bos, *map(int, text[: length - 2]), TextTokenizer.eos]
        vocab_size = self.config.model.vocab_size
        if not text or not all(0 <= id < vocab_size for id in ids):
            raise ValueError(
                f"text {str(list(text))[:60]} holds no ids below {vocab_size}: "
                "give a string or other ids"
            )
        return ids

    # Training ----------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """Counts the targets of a batch: name of a loss -> number of targets that it sums over."""
        return {"loss": count_examples(batch)}

    @property
    def training_notes(self) -> Sequence[str]:
        """Lines that a run prints before its first step, about what it learns from."""
        return ()

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss's mean in the total; 1 for names that are absent."""
        return {}

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the network's full output tensors, for inference and comparisons."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Returns `{"losses": {name: sum over its targets}, "metrics": {name: sum}}`.

        The loop divides by the targets of the whole step; a metric `x/y` is averaged over the
        targets of loss `x`.

        A task that compares examples takes two further kinds of batches, for gradient caching
        (training/step.py): `features` alone gives their loss; a batch with `feature_gradients`
        gives, as its loss, the product of its features with them.
        """
        if "features" in batch:
            return self.compare(batch["features"])
        features = self.outputs(batch)
        if "feature_gradients" in batch:
            products = [
                (features[name] * gradient).sum()
                for name, gradient in batch["feature_gradients"].items()
            ]
            result = {"losses": {"loss": torch.stack(products).sum()}, "metrics": {}}
        else:
            result = self.compare(features)
        further = self.compute_further_losses(batch, features)
        return {kind: values | further.get(kind, {}) for kind, values in result.items()}

    def compute_further_losses(
        self, batch: Batch, features: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Returns, as `forward` does, losses of a task that compares examples beside `compare`'s.

        They need the batch itself, and are computed where the loop has it: from one micro-batch
        and its `features`. They may not be called `loss`.
        """
        return {}

    def compute_shared_features(self) -> dict[str, Tensor]:
        """Returns tensors that the losses of all records of a step share; {} = none.

        A step of several micro-batches computes it once, and `forward` finds it in each batch under
        the same names. Batches without it are complete as well.
        """
        return {}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Returns what `forward` does, from the features of all this process's examples."""
        raise NotImplementedError

    # Inference ---------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns one JSON object per example, each with the example's `id`."""
        raise NotImplementedError

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Computes the scores of predictions, which are joined to their records by id."""
        raise NotImplementedError

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """Returns the JSON objects that the evaluation server takes; ValueError without one."""
        raise ValueError(
            "no evaluation server takes this task's predictions: leave --submission out"
        )

    # Parameters --------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initializes every trainable parameter from a generator of its own.

        Initial values depend neither on the order of parameters nor on the number of processes.
        """
        for name, parameter in self.trainable_parameters():
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            self.init_parameter(name, values, make_generator(seed, name))
            copy_to_shard(parameter, values)

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Writes initial values into the whole parameter of this name.

        The backbone follows its own table, heads follow BEiT: weights are normal with deviation
        .02 cut at one deviation, biases 0, norms 1 and 0.
        """
        if isinstance(self.backbone, MultiwayBackbone) and name.startswith("backbone."):
            self.backbone.init_parameter(name.removeprefix("backbone."), parameter, generator)
        elif parameter.ndim > 1:
            trunc_normal(parameter, generator)
        else:
            module_name, _, kind = name.rpartition(".")
            is_norm = isinstance(self.get_submodule(module_name), nn.LayerNorm)
            nn.init.constant_(parameter, float(is_norm and kind == "weight"))

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the named parameters that the optimizer updates."""
        for name, parameter in self.named_parameters():
            if name.split(".")[0] not in self.frozen:
                yield name, parameter

    def find_unused_in_backbone(
        self, *calls: Sequence[str], read: Sequence[str] = ()
    ) -> dict[str, str]:
        """Returns `unused_parameters` of a task that calls its backbone in these ways alone.

        Args:
            calls: modalities of each kind of call, see `BEiT3.find_unused_parameters`.
            read: modalities whose final states are read; empty: of all.
        """
        assert isinstance(self.backbone, BEiT3)
        unused = self.backbone.find_unused_parameters(*calls, read=read)
        return {f"backbone.{name}": reason for name, reason in unused.items()}

    def layer_of(self, name: str) -> tuple[int, int]:
        """Returns the depths of a parameter and of the head, for layer-wise learning rates."""
        if not isinstance(self.backbone, MultiwayBackbone):
            return 0, 0
        head_depth = self.backbone.config.depth + 1
        if not name.startswith("backbone."):
            return head_depth, head_depth
        return self.backbone.layer_of(name.removeprefix("backbone.")), head_depth


# Configuring and preparing ---------------------------------------------------------------------


def grow_vocabulary(config: TaskConfig, tokenizer: TextTokenizer | None) -> TaskConfig:
    """Returns `config` with a text embedding at least as large as the tokenizer.

    Raises ValueError for text lengths beyond the network's position table.
    """
    if tokenizer is None or not isinstance(config.model, ModelConfig):
        return config
    max_length = config.model.max_text_length
    for field in fields(config):
        if field.name.endswith("text_length") and getattr(config, field.name) > max_length:
            raise ValueError(
                f"task.{field.name} {getattr(config, field.name)} is beyond the {max_length} "
                "tokens of the text table: shorten it, or raise task.model.text_positions"
            )
    if tokenizer.vocab_size <= config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def make_length_counter(root: Path, limit: int) -> TokenCounter | None:
    """Returns how `prepare` measures texts: in tokens of the root's tokenizer, cut at `limit`.

    None where the root has no tokenizer.
    """
    if not (root / MODEL_FILE).exists():
        return None
    tokenizer = TextTokenizer(root / MODEL_FILE)
    return TokenCounter(
        tokenizer.encode_pieces, limit, tokenizer.unk, tokenizer.mask - tokenizer.first_piece
    )


# Records and predictions ------------------------------------------------------------------------


def make_record(**inputs: Any) -> Record:
    """Makes a record of raw inputs by name; None or an empty string leaves an input out."""
    record: Record = {"id": "0"}
    for name, value in inputs.items():
        is_empty = isinstance(value, str) and not value
        if value is not None and not is_empty:
            record[name] = value
    return record


def make_record_rng(record: Record) -> np.random.Generator:
    """Returns the generator of a record outside training: the same at every evaluation."""
    return make_rng(0, 0, str(record["id"]))


def join_by_id(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> list[tuple[Prediction, Record]]:
    """Pairs predictions with their records; ValueError unless every record has exactly one."""
    records_by_id = {str(record["id"]): record for record in records}
    seen_ids: set[str] = set()
    pairs = []
    for prediction in predictions:
        id = str(prediction["id"])
        if id in seen_ids:
            raise ValueError(f"two predictions for record {id}: each record must have one")
        if id not in records_by_id:
            raise ValueError(f"a prediction names record {id}, which is not in this split")
        seen_ids.add(id)
        pairs.append((prediction, records_by_id[id]))
    missing_ids = [id for id in records_by_id if id not in seen_ids]
    if missing_ids:
        raise ValueError(
            f"{len(missing_ids)} of {len(records_by_id)} records have no prediction, "
            f"the first is {missing_ids[0]}"
        )
    return pairs


def join_labels(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> list[tuple[Prediction, Record]]:
    """Pairs predictions with records that all hold a `label`; ValueError where one does not."""
    pairs = join_by_id(predictions, records)
    if any("label" not in record for _, record in pairs):
        raise ValueError(
            "some of these records hold no label to compare with: score a split that has them"
        )
    return pairs


def read_server_id(record: Record, key: str = "id") -> int:
    """Returns the number by which an evaluation server knows a record.

    Raises ValueError where the record's `key` is no number.
    """
    if not str(record[key]).isdecimal():
        raise ValueError(
            f"{key} {record[key]!r} is no number of the public dataset: servers take no other"
        )
    return int(record[key])


# Tasks by name ---------------------------------------------------------------------------------


def list_tasks() -> list[str]:
    """Returns the names of this package's tasks."""
    directory = Path(__file__).with_name("tasks")
    return sorted(module.name for module in pkgutil.iter_modules([str(directory)]))


def load_task(name: str) -> type[Task]:
    """Returns the `Task` subclass of module `beit3.tasks.<name>`, or of the dotted path `name`.

    Raises ValueError for unknown names and for modules that do not define exactly one task.
    """
    path = name if "." in name else f"beit3.tasks.{name}"
    if "." not in name and name not in list_tasks():
        raise ValueError(
            f"unknown task {name!r}{suggest(name, list_tasks())} (known: {', '.join(list_tasks())})"
        )
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", path):
        raise ValueError(f"unknown task {name!r}: give a task's name, or a module as a.b.c")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"unknown task {name!r}: there is no module {error.name}") from None
    tasks = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == path
    ]
    if len(tasks) != 1:
        raise ValueError(
            f"module {path} defines {len(tasks)} Task classes: exactly one is expected"
        )
    return tasks[0]


def task_name(kind: type[Task]) -> str:
    """Returns the name by which `load_task` finds a task.

    It is the module's name within `beit3.tasks`, or the whole dotted path of other modules.
    """
    return _find_task_class(kind).__module__.removeprefix("beit3.tasks.")


def _find_task_class(kind: type[Task]) -> type[Task]:
    """Returns the task's own class: sharding puts a class of torch in front of it."""
    return next(base for base in kind.__mro__ if not base.__module__.startswith("torch."))
