"""What a run is: the network and its task, the data, the optimizer, the run itself. All of it frozen and plain."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from beit3.config import from_dict, to_dict
from beit3.data.views.transforms import Preprocessing
from beit3.model.config import BASE, ModelConfig


@dataclass(frozen=True)
class TaskConfig:
    """All that inference needs. Tasks subclass it; weights keep it."""

    model: ModelConfig = BASE
    image: Preprocessing = Preprocessing(224)
    """How pictures become tensors at evaluation: size, resize rule, mean and deviation."""
    text_length: int = 64
    """Tokens of a text, begin and end marks included; longer ones are cut."""


@dataclass(frozen=True)
class DataConfig:
    """Where records come from and how many make a step."""

    root: str = ""
    """Directory of records (`beit3 prepare` writes it); empty = the embedded world, written once to the cache."""
    text_model: str = ""
    """SentencePiece file; empty = that of the initial weights, else `text.model` in the root."""
    batch: Mapping[str, int] = field(default_factory=lambda: {"main": 32})
    """Records of each source in one optimizer step, over all processes."""
    workers: int = 0
    """Loader processes; 0 decodes in the training process."""
    bad_share: float = 0.01
    """Share of a source's records that may be unreadable; they are counted, named and passed over up to it."""
    limit: int = 0
    """Use only the first `limit` training records of each source; 0 = all."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of each set in a source of several, by source/set: pairs/coco 1 pairs/cc12m 3; a source not named goes by the sets' sizes."""
    shuffle_window: int = 100_000
    """Records of tars, and of tokenised texts, that are shuffled among each other; tars as such always come in random order."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warmup, then decay, both per optimizer step."""

    lr: float = 1e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 0
    warmup_epochs: float = 0.0
    """Used instead of `warmup_steps` where the run is counted in epochs."""
    schedule: Literal["cosine", "linear", "steps"] = "cosine"
    """How the rate falls after warmup: along half a cosine, along a line, or to a tenth at each of `drops`."""
    drops: tuple[float, ...] = (0.889, 0.963)
    """Shares of the run at which a schedule of steps drops (detectron2's for ViTDet)."""
    layer_decay: float = 1.0
    """Learning-rate factor per layer counted down from the head."""
    head_lr_scale: float = 1.0
    """Learning-rate factor of the parameters under `head` (20 in the released VQA recipes)."""
    clip: float = 0.0
    """Largest gradient norm; 0 = no clipping."""
    no_decay: tuple[str, ...] = (
        "image_embedding.positions",
        "image_embedding.class_token",
        "logit_scale",
    )
    """Names without weight decay beside biases, norms and everything of one dimension."""


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, on what."""

    steps: int = 0
    """Optimizer steps; 0 = `epochs` over the largest source."""
    epochs: float = 0.0
    micro_batch: int = 0
    """Records per process and forward pass; 0 = the process's whole share. Accumulation is derived from it."""
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """auto = bfloat16 autocast on an accelerator, float32 on a CPU. float64 keeps weights so too: for checks."""
    device: str = "auto"
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What of each block the backward pass computes again instead of keeping it: nothing; what is cheap (norms, GELU, sums),
    about half of the memory; everything but the block's input."""
    compile: bool = False
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on the val split; 0 = at the end only."""
    eval_records: int = 0
    """Evaluate on the first so many records of each source; 0 = all."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at the end only."""
    keep: int = 2
    """Checkpoints kept besides the best weights."""
    async_save: bool = False
    """Go on training while a checkpoint is being written; it takes memory for a copy of weights and optimizer."""


@dataclass(frozen=True)
class Recipe:
    """One run. `note` says what it reproduces."""

    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any], task_config: type[TaskConfig]) -> "Recipe":
        """The inverse of `to_dict`, given the task's own config class."""
        fields = dict(data)
        task = from_dict(task_config, fields.pop("task"), "task")
        return dataclasses.replace(from_dict(Recipe, fields, "recipe"), task=task)
