"""The contract between a task and everything that trains, evaluates, stores or serves it.

A task is one module of `beit3.tasks` (or a dotted path of yours) that defines one `Task` subclass. From file to loss:
record (JSON) -> example (tensors) -> batch (stacked) -> losses; and back: batch -> prediction (JSON) -> score.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from beit3.config import suggestion
from beit3.data.prepare.statistics import Lengths
from beit3.model.backbone import Backbone
from beit3.model.beit3 import BEiT3
from beit3.model.config import IMAGE, TEXT, ModelConfig
from beit3.ops.collectives import keep_shard
from beit3.ops.init import trunc_normal
from beit3.recipe import Recipe, TaskConfig
from beit3.seeding import make_generator
from beit3.seeding import make_rng as seeded_rng
from beit3.tokenizer.text import FILE, TextTokenizer

Record = dict[str, Any]
Example = dict[str, Any]
Batch = dict[str, Any]
Prediction = dict[str, Any]


class Task(nn.Module):
    """A network with its data mapping, losses, predictions and score."""

    Config: ClassVar[type[TaskConfig]]
    recipes: ClassVar[Mapping[str, Recipe]]
    """Named settings; `demo` trains on the embedded world in minutes."""
    sources: ClassVar[tuple[str, ...]] = ("main",)
    """Kinds of records, in the order in which a step visits them."""
    names_file: ClassVar[str] = "classes.txt"
    """What lies beside the records where a task's labels have names."""
    headline: ClassVar[str]
    """The score that decides which weights are best; larger is better."""
    official_names: ClassVar[Mapping[str, str]] = {}
    """Head parameters: our name prefix -> the prefix in released checkpoints."""
    updates_buffers: ClassVar[bool] = False
    """Whether a training forward changes buffers, so that a process must see its share of a step at once."""
    records_from: ClassVar[Mapping[str, str]] = {}
    """Sources that are records of another task -> that task."""
    compares_examples: ClassVar[bool] = False
    """Whether the loss compares the examples of a step with each other: `compare` makes it of the features that `outputs` gives."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Children that never train and are not stored with the weights."""
    unused_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameter prefixes without a gradient by design -> the reason; a property where the config decides."""

    backbone: nn.Module

    def __init__(self, config: TaskConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"the text tokenizer has {tokenizer.vocab_size} ids, the weights {config.model.vocab_size}: "
                "give the tokenizer that the weights were trained with"
            )

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer; ValueError where none was given."""
        if self._tokenizer is None:
            raise ValueError(
                "text needs a tokenizer file and these weights came without: give text_model=FILE.spm"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    # Data ------------------------------------------------------------------------------------------------------------

    @staticmethod
    def prepare(raw: Path, root: Path, source: str) -> Mapping[str, Any]:
        """Public annotation files under `raw` -> records under `root`; returns the report."""
        raise NotImplementedError

    @staticmethod
    def configure(config: TaskConfig, root: Path) -> TaskConfig:
        """`config` with what only the records know: answer list, class names."""
        return config

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """One record as tensors. All randomness comes from `rng`; without one, from the record's id."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack tensors by key; everything else becomes a list. Texts are as long as the longest of them."""
        check_same_fields(examples)
        batch: Batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            batch[key] = (
                default_collate(values) if isinstance(values[0], Tensor) else values
            )  # in a worker, in shared memory
        return trim_padding(batch)

    def normalize_images(self, batch: Batch) -> Tensor:
        """The batch's images [..., 3, H, W] as the network takes them: bytes are normalised here, floats already are."""
        images = batch["image"]
        return (
            images
            if images.is_floating_point()
            else self.config.image.normalize(images).to(next(self.backbone.parameters()).dtype)
        )

    def tokenize_text(self, text: str | Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """A text, in words or ids, -> (text [length] int64, text_padding [length] bool)."""
        return pad_token_ids(self.encode_text(text, length), length, TextTokenizer.pad)

    def encode_text(self, text: str | Sequence[int], length: int) -> list[int]:
        """At most `length` ids with marks, of a text or of its piece ids as index files and `.tokens` hold them."""
        if isinstance(text, str):
            return self.tokenizer.encode(text, length)
        ids = [TextTokenizer.bos, *map(int, text[: length - 2]), TextTokenizer.eos]
        if not text or not all(0 <= id < self.config.model.vocab_size for id in ids):
            raise ValueError(
                f"text {str(list(text))[:60]} holds no ids below {self.config.model.vocab_size}: give words or other ids"
            )
        return ids

    # Training --------------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> dict[str, int]:
        """How many targets each loss sums over in this batch."""
        return {"loss": count_examples(batch)}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Weight of each loss's mean in the total; 1 where a name is absent."""
        return {}

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Full tensors for inference and parity."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """`{"losses": {name: SUM over its targets}, "metrics": {name: sum}}`; a metric `x/y` is averaged over targets x.

        A task that compares examples also takes a batch of `features` alone, and one with `feature_gradients`, for which the
        loss is the features' product with them (training/gradient_cache.py).
        """
        if "features" in batch:
            return self.compare(batch["features"])
        features = self.outputs(batch)
        if "feature_gradients" not in batch:
            return self.compare(features)
        products = [
            (features[name] * gradient).sum()
            for name, gradient in batch["feature_gradients"].items()
        ]
        return {"losses": {"loss": torch.stack(products).sum()}, "metrics": {}}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What `forward` returns, from the features of all examples of this process's step."""
        raise NotImplementedError

    # Inference -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> list[Prediction]:
        """JSON records, one per example, each with its `id`."""
        raise NotImplementedError

    @staticmethod
    def score(predictions: Sequence[Prediction], records: Sequence[Record]) -> dict[str, float]:
        """Official figures from predictions joined to records by id."""
        raise NotImplementedError

    @staticmethod
    def submission(
        predictions: Sequence[Prediction], records: Sequence[Record]
    ) -> list[dict[str, Any]]:
        """What the task's evaluation server takes, a list of JSON objects; ValueError where there is none."""
        raise ValueError(
            "no evaluation server takes this task's predictions: leave --submission out"
        )

    # Parameters ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Every trainable parameter from a generator of its own, so that nothing depends on order or processes."""
        for name, parameter in self.trainable():
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            self.init_parameter(name, values, make_generator(seed, name))
            keep_shard(parameter, values)

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Values for the whole parameter of this name: the backbone's by its own table, heads as BEiT does.

        That is normal .02 cut at one deviation, biases 0, norms 1 and 0.
        """
        if isinstance(self.backbone, Backbone) and name.startswith("backbone."):
            self.backbone.init_parameter(name.removeprefix("backbone."), parameter, generator)
        elif parameter.ndim > 1:
            trunc_normal(parameter, generator)
        else:
            norm_weight = isinstance(
                self.get_submodule(name.rpartition(".")[0]), nn.LayerNorm
            ) and name.endswith("weight")
            nn.init.constant_(parameter, float(norm_weight))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that an optimizer sees."""
        return (
            (name, p)
            for name, p in self.named_parameters()
            if name.split(".")[0] not in self.frozen
        )

    def layer_of(self, name: str) -> tuple[int, int]:
        """(depth of a parameter, depth of the head) for layer-wise learning rates."""
        if not isinstance(self.backbone, Backbone):
            return 0, 0
        head = self.backbone.config.depth + 1
        return (
            self.backbone.layer_of(name.removeprefix("backbone."))
            if name.startswith("backbone.")
            else head
        ), head


def grow_vocabulary(config: TaskConfig, tokenizer: TextTokenizer | None) -> TaskConfig:
    """`config` with a text embedding as large as the tokenizer, if it was smaller. ValueError for texts beyond its positions."""
    if tokenizer is None or not isinstance(config.model, ModelConfig):
        return config
    longest = config.model.max_text_length
    for field in fields(config):
        if field.name.endswith("text_length") and getattr(config, field.name) > longest:
            raise ValueError(
                f"task.{field.name} {getattr(config, field.name)} is beyond the {longest} tokens of the text table: "
                "shorten it, or raise task.model.text_positions"
            )
    if tokenizer.vocab_size <= config.model.vocab_size:
        return config
    return replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))


def make_length_counter(root: Path, limit: int) -> Lengths | None:
    """How `prepare` measures texts: in tokens of the root's tokenizer, cut at `limit`; None where there is none."""
    if not (root / FILE).exists():
        return None
    tokenizer = TextTokenizer(root / FILE)
    return Lengths(tokenizer.pieces, limit, tokenizer.unk, tokenizer.mask - tokenizer.first_piece)


def check_same_fields(examples: Sequence[Example]) -> None:
    """ValueError where one example of a batch has what another lacks, naming both."""
    first = examples[0]
    for example in examples[1:]:
        for key in first.keys() ^ example.keys():
            has, lacks = (first, example) if key in first else (example, first)
            raise ValueError(
                f"record {lacks.get('id')} gives no {key}, record {has.get('id')} does: give it to all records or to none"
            )


def trim_padding(batch: Batch) -> Batch:
    """`batch` without the places [B, L] that are padding in all its texts, but for a length that 8 divides.

    Eights suit the hardware and leave few lengths for `run.compile` to see.
    """
    if "text_padding" not in batch:
        return batch
    longest = int((~batch["text_padding"]).sum(1).max())
    length = -(-longest // 8) * 8
    return batch | {
        key: batch[key][:, :length]
        for key in ("text", "text_padding", "text_target")
        if key in batch
    }


def count_examples(batch: Batch) -> int:
    """Examples in a batch."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def pairs_leave_out(model: ModelConfig, *, unread: str = "") -> dict[str, str]:
    """`unused` of a task that sees pairs alone and does not read the last states of the modality `unread`."""
    last, fused = model.depth - 1, model.depth - model.fusion_layers
    reasons = {"backbone.image_embedding.mask_token": "nothing is masked"}
    own = ["norm2", "ffn"] + ([] if model.shared_attention else ["attention.norm", "attention.out"])
    every = (
        own
        + ([] if model.shared_norms else ["norm1"])
        + ([] if model.shared_attention else ["attention.qkv"])
    )
    for layer in range(fused, model.depth):
        for modality in (IMAGE, TEXT):
            reasons |= {
                f"backbone.blocks.{layer}.{part}.{modality}": "the vision-language expert takes both here"
                for part in every
            }
    if unread and not model.fusion_layers:
        reasons |= {
            f"backbone.blocks.{last}.{part}.{unread}": f"the {unread}'s last states are not read"
            for part in own
        }
    if model.final_norm and not model.shared_norms:
        left_out = (IMAGE, TEXT) if model.fusion_layers else (unread,) if unread else ()
        reasons |= {
            f"backbone.norm.{modality}": "no state that is read goes through it"
            for modality in left_out
        }
    return reasons


def experts_left_out(backbone: BEiT3, *modalities: str) -> dict[str, str]:
    """`unused` of a task in which no token goes through the experts of `modalities`, nor through their embeddings."""
    reasons = {"image_embedding.mask_token": "nothing is masked"}
    for name, _ in backbone.named_parameters():
        for modality in modalities:
            if f".{modality}." in name or name.startswith(f"{modality}_embedding."):
                reasons[name] = f"no {modality} goes through here"
    return {f"backbone.{name}": reason for name, reason in reasons.items()}


def make_record_rng(record: Record) -> np.random.Generator:
    """The generator of a record outside training: the same masks and views at every evaluation."""
    return seeded_rng(0, 0, str(record["id"]))


def pad_token_ids(ids: Sequence[int], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids -> (text [length] int64, text_padding [length] bool, True = padding)."""
    text = torch.full((length,), pad, dtype=torch.int64)
    text[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return text, torch.arange(length) >= len(ids)


def join_by_id(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> list[tuple[Prediction, Record]]:
    """Predictions beside their records; ValueError unless every record has exactly one."""
    by_id = {str(record["id"]): record for record in records}
    seen: set[str] = set()
    pairs = []
    for prediction in predictions:
        key = str(prediction["id"])
        if key in seen:
            raise ValueError(f"two predictions for record {key}: each must have one")
        if key not in by_id:
            raise ValueError(f"a prediction names record {key}, which is not in this split")
        seen.add(key)
        pairs.append((prediction, by_id[key]))
    missing = [key for key in by_id if key not in seen]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(by_id)} records have no prediction, the first is {missing[0]}"
        )
    return pairs


def join_labels(
    predictions: Sequence[Prediction], records: Sequence[Record]
) -> list[tuple[Prediction, Record]]:
    """`joined`, for records that all hold a `label`; ValueError where one does not."""
    pairs = join_by_id(predictions, records)
    if any("label" not in record for _, record in pairs):
        raise ValueError(
            "some of these records hold no label to compare with: score a split that has them"
        )
    return pairs


def read_server_id(record: Record, key: str = "id") -> int:
    """The number that an evaluation server knows a record by; ValueError where its `key` is none."""
    if not str(record[key]).isdecimal():
        raise ValueError(
            f"{key} {record[key]!r} is no number of the public data set: servers take no other"
        )
    return int(record[key])


def list_tasks() -> list[str]:
    """The tasks of this package."""
    return sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("tasks"))])
    )


def load_task(name: str) -> type[Task]:
    """The `Task` subclass of module `beit3.tasks.<name>`, or of the dotted path `name`."""
    path = name if "." in name else f"beit3.tasks.{name}"
    if "." not in name and name not in list_tasks():
        raise ValueError(
            f"unknown task {name!r}{suggestion(name, list_tasks())} (known: {', '.join(list_tasks())})"
        )
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"unknown task {name!r}: there is no module {error.name}") from None
    is_task: Callable[[Any], bool] = lambda x: (
        isinstance(x, type) and issubclass(x, Task) and x.__module__ == path
    )  # noqa: E731
    found = [value for value in vars(module).values() if is_task(value)]
    if len(found) != 1:
        raise ValueError(
            f"module {path} defines {len(found)} Task classes: exactly one is expected"
        )
    return found[0]


def task_name(kind: type[Task]) -> str:
    """The name under which `beit3.task.load` finds a task: its module's, whole for modules of others."""
    own = next(
        each for each in kind.__mro__ if not each.__module__.startswith("torch.")
    )  # sharding puts a class in front
    return own.__module__.removeprefix("beit3.tasks.")
