"""The settings of a run, as frozen dataclasses: task, data, optimizer, and the run itself.

`Recipe.to_dict` is what a run directory stores as `recipe.json`; `--task.model.dim 128` and the
like override single fields from the command line.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from beit3.config import from_dict, to_dict
from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE, ModelConfig


def check_numbers(section: str, config: Any, **limits: float | tuple[float, float]) -> None:
    """Raises ValueError for the first number of a config that is not finite or beyond its limits.

    Args:
        section: What errors call the config, as in `--run.steps`.
        config: The config. A field may hold several numbers, as a tuple or by name.
        limits: Field -> the smallest value that it takes, or the smallest and the largest.
    """
    for name, limit in limits.items():
        low, high = limit if isinstance(limit, tuple) else (limit, math.inf)
        value = getattr(config, name)
        numbers = {name: value}
        if isinstance(value, Mapping):
            numbers = {f"{name}.{key}": number for key, number in value.items()}
        for path, number in numbers.items():
            for item in number if isinstance(number, tuple | list) else [number]:
                if not low <= item <= high or not math.isfinite(item):
                    expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
                    raise ValueError(f"{section}.{path} {item}: expected {expected}")


@dataclass(frozen=True)
class TaskConfig:
    """Everything that inference needs. Tasks subclass it, and weights are stored with it."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(224)
    """How images become tensors: size, resize rule, mean and deviation. In training, tasks augment
    images before."""
    text_length: int = 64
    """Tokens of a text, BOS and EOS included; longer texts are cut."""

    # Members that training, prediction and reports read of every task. Subclasses override them,
    # some by fields of the same name.

    fixed_image_size: ClassVar[bool] = False
    """Whether images must have `model.image_size`, because masks or counts are made for its patch
    grid. Elsewhere the position table is resampled to other sizes on the fly, at some cost."""
    supports_names_head: ClassVar[bool] = False
    """Whether `head="names"` makes a classifier of class names instead of a linear layer."""

    def __post_init__(self) -> None:
        if self.fixed_image_size and self.image.image_size != self.model.image_size:
            raise ValueError(
                f"task.image.image_size {self.image.image_size} and task.model.image_size "
                f"{self.model.image_size} disagree: give both the same size"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels in their order; empty where there are none or they are unknown."""
        return ()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what the head tells apart, labels or answers; empty as for `class_names`."""
        return self.class_names

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for tasks without labels."""
        return 0

    @property
    def classifies_by_names(self) -> bool:
        """Whether the classes may be any list of names, because no layer has an output for each."""
        return False

    @property
    def head_sizes(self) -> Mapping[str, int]:
        """Fields that count a head's outputs -> their number, which lists of names must have."""
        return {}

    @property
    def resize_patch(self) -> bool | None:
        """Whether loading resamples patch kernels of another size; None without the option."""
        return None

    @property
    def base_depth(self) -> int:
        """Smallest depth with all layers whose number is fixed; further layers are all alike."""
        return 2 + self.model.fusion_layers if isinstance(self.model, ModelConfig) else 2


@dataclass(frozen=True)
class DataConfig:
    """Where records come from, and how many of them make a step."""

    root: str = ""
    """Directory of records, as `beit3 prepare` writes it; empty = the embedded world, which is
    written once to the cache."""
    text_model: str = ""
    """SentencePiece file; empty = that of the initial weights, else `text.model` in the root."""
    batch: Mapping[str, int] = field(default_factory=lambda: {"main": 32})
    """Records of each source in one optimizer step, over all processes."""
    workers: int = 0
    """Loader processes; 0 decodes in the training process."""
    bad_share: float = 0.01
    """Fraction of a source's records that may be unreadable. They are counted, named and skipped;
    more of them end the run."""
    limit: int = 0
    """Train on only so many records of each source, spread evenly over its files and the same for
    every seed; 0 = all. A smaller limit takes some of a larger one's records."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Sampling weight of each dataset in a source of several, by source/dataset: pairs/coco 1
    pairs/cc12m 3. A source that is not named here goes by the sizes of its datasets."""
    shuffle_window: int = 100_000
    """Records of tars, and of tokenized texts, that are shuffled among each other. The tars
    themselves always come in random order."""

    def __post_init__(self) -> None:
        check_numbers("data", self, batch=0, workers=0, limit=0, weights=0, shuffle_window=1)
        check_numbers("data", self, bad_share=(0, 1))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, or Muon with it; linear warmup, then decay, both per optimizer step."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the blocks by Muon and everything else by AdamW: small
    pretrainings learn twice as fast (docs/decisions.md, 2026-11-29). The paper has AdamW."""
    lr: float = 1e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    """Used instead of `warmup_steps` where the run is counted in epochs."""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    """How the learning rate falls after warmup: along half a cosine, along a line, or to a tenth
    at each of `drops`."""
    drops: tuple[float, ...] = (0.889, 0.963)
    """Fractions of the run at which the `steps` schedule drops (detectron2's for ViTDet)."""
    layer_decay: float = 1.0
    """Learning-rate factor per layer, counted down from the head."""
    head_lr_scale: float = 1.0
    """Learning-rate factor of the parameters under `head` (20 in the released VQA recipes)."""
    clip: float = 0.0
    """Largest gradient norm; 0 = no clipping."""
    no_decay: tuple[str, ...] = (
        "image_embedding.positions",
        "image_embedding.class_token",
        "logit_scale",
    )
    """Parameters without weight decay, beside biases, norms and everything of one dimension."""

    def __post_init__(self) -> None:
        check_numbers("optim", self, lr=0, min_lr=0, eps=0, weight_decay=0, head_lr_scale=0, clip=0)
        check_numbers("optim", self, warmup_steps=0, warmup_epochs=0, layer_decay=0)
        check_numbers("optim", self, betas=(0, 1), drops=(0, 1))


@dataclass(frozen=True)
class RunConfig:
    """How long the run is, how often it reports, and what it runs on."""

    steps: int = 0
    """Optimizer steps; 0 = `epochs` over the largest source."""
    epochs: float = 0.0
    micro_batch: int = 0
    """Records per process and forward pass; 0 = all of the process's records of a step. Gradient
    accumulation is derived from it."""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """auto = bfloat16 autocast on an accelerator, float32 on a CPU. float64 keeps the weights so
    too, for checks."""
    device: str = "auto"
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations of each block that the backward pass recomputes: none; the cheap ones (norms,
    GELU, sums), about half of the memory; or all but the block's input."""
    compile: bool = False
    log_every: int = 10
    """Steps between lines of metrics.jsonl; 0 = the last step alone."""
    eval_every: int = 0
    """Steps between evaluations on the val split; 0 = at the end only; -1 = never, and the run then
    needs no val split and writes no `best/`."""
    eval_records: int = 0
    """Evaluate on only so many records of each source, spread as `data.limit` says; 0 = all."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at the end only."""
    keep: int = 2
    """Checkpoints that are kept beside the best weights."""
    async_save: bool = False
    """Train on while a checkpoint is being written, at the cost of a copy of weights and optimizer
    state in memory."""

    def __post_init__(self) -> None:
        check_numbers("run", self, steps=0, epochs=0, micro_batch=0, log_every=0, eval_every=-1)
        check_numbers("run", self, eval_records=0, save_every=0, keep=0)


@dataclass(frozen=True)
class Recipe:
    """All settings of one run; `note` says what it reproduces."""

    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as plain JSON values."""
        return to_dict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any], task_config: type[TaskConfig]) -> "Recipe":
        """Rebuilds a recipe from `to_dict`'s output, given the task's own config class."""
        values = dict(data)
        task = from_dict(task_config, values.pop("task"), "task")
        return dataclasses.replace(from_dict(Recipe, values, "recipe"), task=task)
