"""The graphs that can be made of a task: for each mode its network, inputs and outputs.

A mode is a function of tensors alone. `image`, `text` and `pair` are `Task.outputs` of a batch that
holds these inputs. A captioning network is two modes: `start` encodes an image and the first tokens
and returns their keys and values, `step` continues from them. `match` is the matching head of
retrieval, where the weights have one. `trunk` is the image side of dense tasks.

Axes that may vary have names: batch, length, rows and columns of patches. The others are numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.cache import Cache, LayerCache
from beit3.model.config import ModelConfig
from beit3.task import Task, task_name

BATCH, LENGTH, ROWS, COLUMNS = "batch", "length", "rows", "columns"
CACHED, ATTENDED = "cached", "attended"

IMAGE_MODE, TEXT_MODE, PAIR_MODE = "image", "text", "pair"
START_MODE, STEP_MODE, TRUNK_MODE, MATCH_MODE = "start", "step", "trunk", "match"

TASK_MODES: Mapping[str, tuple[str, ...]] = {
    "backbone": (IMAGE_MODE, TEXT_MODE, PAIR_MODE),
    "retrieval": (IMAGE_MODE, TEXT_MODE),
    "vqa": (PAIR_MODE,),
    "nlvr2": (PAIR_MODE,),
    "imagenet": (IMAGE_MODE,),
    "pretrain": (IMAGE_MODE, TEXT_MODE, PAIR_MODE),
    "captioning": (START_MODE, STEP_MODE, PAIR_MODE),
    "coco": (TRUNK_MODE,),
    "ade20k": (TRUNK_MODE,),
}
"""Task -> its modes, those that are exported by default and those that must be named."""

NAMED_ONLY = {("captioning", PAIR_MODE)}
"""(task, mode) that is exported only where it is named: captions are written without it."""


@dataclass(frozen=True)
class Axis:
    """An axis of any size: a multiple of `factor`."""

    name: str
    factor: int = 1


@dataclass(frozen=True)
class Input:
    """An input of a graph: its dtype and axes."""

    dtype: torch.dtype
    axes: tuple[Axis | int, ...]


@dataclass(frozen=True)
class Mode:
    """A graph that is not made yet."""

    name: str
    network: nn.Module
    """Maps the inputs, in their order, to a tuple of outputs in theirs."""
    inputs: Mapping[str, Input]
    output_names: tuple[str, ...]
    limits: Mapping[str, int]
    """Name of an axis -> the largest size that the network takes."""


# Choosing ---------------------------------------------------------------------------------------


def list_modes(task: Task) -> tuple[str, ...]:
    """Returns the modes of a task; those of a task of your own follow from its raw inputs."""
    name = task_name(type(task))
    if name in TASK_MODES:
        return (*TASK_MODES[name], MATCH_MODE) if task.has_matching_head else TASK_MODES[name]
    if set(task.input_names) == {"image"} and isinstance(task.backbone, BEiT3):
        return (IMAGE_MODE,)
    return ()


def choose_modes(task: Task, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the modes to export: those named, else all that the task's predictions need.

    Raises ValueError for a mode that the task does not have, and for tasks without modes.
    """
    task_modes, kind = list_modes(task), task_name(type(task))
    if not task_modes:
        raise ValueError(f"{kind} has no mode to export: give weights of another task")
    for name in names:
        if name not in task_modes:
            raise ValueError(
                f"{kind} has no mode {name!r}: give {', '.join(task_modes)}, or other weights"
            )
    if names:
        return tuple(dict.fromkeys(names))
    return tuple(name for name in task_modes if (kind, name) not in NAMED_ONLY)


def needs_text(mode: str) -> bool:
    """Returns whether a mode uses parameters of the text side."""
    return mode not in (IMAGE_MODE, TRUNK_MODE)


def make_mode(task: Task, name: str, *, fixed_size: bool = False) -> Mode:
    """Describes one graph of a task.

    Args:
        task: The task, in evaluation mode.
        name: A mode of `list_modes`.
        fixed_size: Whether images have the size of the config alone.
    """
    image = make_image_input(task, fixed_size=fixed_size)
    if name == TRUNK_MODE:
        return Mode(name, TrunkGraph(task), {"image": image}, ("features",), {})
    if name == START_MODE:
        return make_start_mode(task, image)
    if name == STEP_MODE:
        return make_step_mode(task)
    text_inputs = {
        "text": Input(torch.int64, (Axis(BATCH), Axis(LENGTH))),
        "text_padding": Input(torch.bool, (Axis(BATCH), Axis(LENGTH))),
    }
    inputs: dict[str, Input] = {}
    if name != TEXT_MODE:
        inputs["image"] = image
    if name != IMAGE_MODE:
        inputs |= text_inputs
    if name == MATCH_MODE:
        return Mode(name, MatchGraph(task), inputs, ("matching",), get_limits(task))
    graph = OutputsGraph(task, tuple(inputs))
    return Mode(name, graph, inputs, graph.output_names, get_limits(task))


def make_image_input(task: Task, *, fixed_size: bool) -> Input:
    """Returns normalized pixels [B, 3, H, W]; NLVR2 takes two images a record."""
    size = task.config.image.image_size
    sides: tuple[Axis | int, ...] = (size, size)
    if not fixed_size:
        patch_size = task.config.model.patch_size
        sides = (Axis(ROWS, patch_size), Axis(COLUMNS, patch_size))
    two_images = (2,) if task_name(type(task)) == "nlvr2" else ()
    return Input(torch.float32, (Axis(BATCH), *two_images, 3, *sides))


def get_limits(task: Task) -> dict[str, int]:
    """Returns the largest text length."""
    model = task.config.model
    return {LENGTH: model.max_text_length} if isinstance(model, ModelConfig) else {}


# Networks ---------------------------------------------------------------------------------------


class OutputsGraph(nn.Module):
    """`Task.outputs` as a function of tensors."""

    def __init__(self, task: Task, input_names: tuple[str, ...]):
        super().__init__()
        self.task, self.input_names = task, input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, found by a run on one small example."""
        task = self.task
        size = task.config.image.image_size
        shape = (1, 2, 3, size, size) if task_name(type(task)) == "nlvr2" else (1, 3, size, size)
        examples = {
            "image": torch.zeros(shape),
            "text": torch.zeros(1, 3, dtype=torch.int64),
            "text_padding": torch.zeros(1, 3, dtype=torch.bool),
        }
        with torch.no_grad():
            names = tuple(task.outputs({name: examples[name] for name in self.input_names}))
        # An ONNX graph must not call two of its values the same.
        return tuple(f"{name}_states" if name in self.input_names else name for name in names)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.task.outputs(dict(zip(self.input_names, tensors, strict=True))).values())


class MatchGraph(nn.Module):
    """The matching head of retrieval: logits [B] of pairs."""

    def __init__(self, task: Any):
        super().__init__()
        self.task = task

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        image, text, padding = tensors
        return (self.task.match({"image": image, "text": text, "text_padding": padding}),)


class TrunkGraph(nn.Module):
    """The trunk of a dense task: normalized pixels [B, 3, H, W] -> features [B, h, w, D]."""

    def __init__(self, task: Task):
        super().__init__()
        self.trunk = task.backbone

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (self.trunk(*tensors),)


class RecordedCache(LayerCache):
    """Keys and values of earlier calls, and beside them those of this call.

    A graph cannot grow a buffer in place: it gives the new keys and values out, and its caller
    appends them.
    """

    new_key: Tensor
    new_value: Tensor

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.new_key, self.new_value = key, value
        if self.key is None or self.value is None:
            return key, value
        return torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)


class StartGraph(nn.Module):
    """Encodes images and the first tokens of their captions, a [MASK] token the last."""

    def __init__(self, backbone: BEiT3, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Maps `image` and `text` [B, L] to logits [B, 1, V] of the last token, then the keys and
        values of every layer.
        """
        image, text = tensors
        patch_size = self.backbone.config.patch_size
        num_patches = (image.shape[2] // patch_size) * (image.shape[3] // patch_size)
        mask = make_image_to_text_mask(1 + num_patches, text.shape[1], device=text.device)
        cache = Cache([RecordedCache() for _ in self.backbone.blocks], fused=True)
        encoded = self.backbone(image, text, attention_mask=mask, cache=cache, read="last")
        return self.head(encoded.of("text")), *list_new_entries(cache)


class StepGraph(nn.Module):
    """Encodes further tokens of captions, given keys and values of the image and earlier tokens."""

    def __init__(self, backbone: BEiT3, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Maps these tensors to logits [B, n, V] of all new tokens, then their keys and values.

        Args:
            tensors: Token ids [B, n]; each token's place in its caption [n]; which of the K cached
                tokens and of the new ones a token attends to, bool [B, 1, n, K + n]; the key and
                value [B, H, K, D / H] of each layer in turn.
        """
        text, position_ids, attention_mask, *past = tensors
        layers: list[LayerCache] = [
            RecordedCache(key, value) for key, value in zip(past[::2], past[1::2], strict=True)
        ]
        cache = Cache(layers, fused=True)
        encoded = self.backbone(
            text=text, attention_mask=attention_mask, text_position_ids=position_ids, cache=cache
        )
        return self.head(encoded.of("text")), *list_new_entries(cache)


def list_new_entries(cache: Cache) -> list[Tensor]:
    """Returns the new key and value of each layer in turn."""
    return [
        tensor
        for layer in cache.layers
        if isinstance(layer, RecordedCache)
        for tensor in (layer.new_key, layer.new_value)
    ]


def name_cache_entries(depth: int, prefix: str) -> list[str]:
    """Returns the names of keys and values in the order of `list_new_entries`: past.0.key ..."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(depth) for kind in ("key", "value")]


def make_start_mode(task: Task, image: Input) -> Mode:
    """Describes the graph that encodes an image and the first tokens of a caption."""
    backbone, head = get_decoder(task)
    inputs = {"image": image, "text": Input(torch.int64, (Axis(BATCH), Axis(LENGTH)))}
    outputs = ("logits", *name_cache_entries(backbone.config.depth, "new"))
    return Mode(START_MODE, StartGraph(backbone, head), inputs, outputs, get_limits(task))


def make_step_mode(task: Task) -> Mode:
    """Describes the graph that continues captions."""
    backbone, head = get_decoder(task)
    config = backbone.config
    entry = Input(
        torch.float32,
        (Axis(BATCH), config.num_heads, Axis(CACHED), config.dim // config.num_heads),
    )
    inputs = {
        "text": Input(torch.int64, (Axis(BATCH), Axis(LENGTH))),
        "position_ids": Input(torch.int64, (Axis(LENGTH),)),
        "attention_mask": Input(torch.bool, (Axis(BATCH), 1, Axis(LENGTH), Axis(ATTENDED))),
        **dict.fromkeys(name_cache_entries(config.depth, "past"), entry),
    }
    outputs = ("logits", *name_cache_entries(config.depth, "new"))
    return Mode(STEP_MODE, StepGraph(backbone, head), inputs, outputs, {})


def get_decoder(task: Task) -> tuple[BEiT3, nn.Module]:
    """Returns the network and the head over the vocabulary of a task that writes captions."""
    backbone, head = task.backbone, task.get_submodule("text_head")
    assert isinstance(backbone, BEiT3)
    return backbone, head
