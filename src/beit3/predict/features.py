"""Features beside those of single inputs: fused pairs, layers, maps of patches, attention.

Weights of any task with a BEiT-3 backbone serve, whatever their head. An image and a text together
are one sequence, in which all tokens attend to all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from beit3.data.batches import trim_padding
from beit3.data.views.preprocessing import resize
from beit3.images import open_image
from beit3.model.beit3 import BEiT3
from beit3.model.layers import Block
from beit3.model.layout import Layout, Parts
from beit3.predict.inputs import OnError, align_inputs, is_list, list_inputs, run_in_batches
from beit3.task import Batch, Example, Record, Task, make_record, task_name
from beit3.weights.matching import LoadReport, serves_text

ImageSize = int | tuple[int, int] | None
"""Side of a square in pixels, (height, width), or None for the size of the weights."""


@dataclass(frozen=True)
class Inspection:
    """What the network holds between its blocks, for one image, text or pair.

    Layers are numbered as `Predictor.inspect` describes; -1 is the last one. The sequence is the
    class token, the patches row by row, then the tokens of the text: N = 1 + P + L, or one alone.
    """

    depth: int
    """Number of blocks."""
    words: tuple[str, ...]
    """Tokens of the text [L] as text, `<s>` and `</s>` included; a space begins a new word."""
    grid: tuple[int, int]
    """Rows and columns of patches; (0, 0) without an image."""
    states: Mapping[int, np.ndarray]
    """Layer -> states [N, D] after it, float32. Those of the last are after the final norm, where
    the network has one."""
    attention: Mapping[int, np.ndarray]
    """Layer -> attention [H, N, N] in that block, float32: head, token that attends, token that is
    attended to. Each row sums to one. Empty where it was not asked for."""

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens of the image, the class token included."""
        rows, columns = self.grid
        return 1 + rows * columns if rows else 0

    def get_image_states(self, layer: int = -1) -> np.ndarray:
        """Returns the states [1 + P, D] of the image's tokens, the class token first."""
        return self._get(self.states, layer)[: self.num_image_tokens]

    def get_text_states(self, layer: int = -1) -> np.ndarray:
        """Returns the states [L, D] of the text's tokens, `<s>` first."""
        return self._get(self.states, layer)[self.num_image_tokens :]

    def get_patch_map(self, layer: int = -1) -> np.ndarray:
        """Returns the states of the patches as a map [D, h, w]."""
        patches = self.get_image_states(layer)[1:]
        return patches.T.reshape(-1, *self.grid)

    def get_word_attention(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Returns how much each word attends to each patch, [L, h, w].

        A map sums to less than one: words also attend to the class token and to words.

        Args:
            layer: The block; None averages over all that were inspected.
            head: The head, from 0; None averages over all.

        Raises:
            ValueError: There is no image, no text, no attention, or no such layer or head.
        """
        if not self.words or not self.num_image_tokens:
            raise ValueError("attention of words over patches needs an image and a text: give both")
        if not self.attention:
            raise ValueError("no attention was computed: inspect with attention=True")
        if layer is None:
            weights = np.mean(list(self.attention.values()), axis=0)  # [H, N, N]
        else:
            weights = self._get(self.attention, layer)
        if head is not None and not 0 <= head < len(weights):
            raise ValueError(f"head {head} is none of the {len(weights)}: they count from 0")
        averaged = weights.mean(0) if head is None else weights[head]
        over_patches = averaged[self.num_image_tokens :, 1 : self.num_image_tokens]
        return over_patches.reshape(-1, *self.grid)

    def _get(self, values: Mapping[int, np.ndarray], layer: int) -> np.ndarray:
        number = resolve_layer(layer, self.depth)
        if number not in values:
            kept = ", ".join(map(str, values)) or "none"
            raise ValueError(f"layer {layer} was not inspected: give it in layers (kept: {kept})")
        return values[number]


class LoadedTask(Protocol):
    """What the functions below need of a `Predictor`, which has them as methods."""

    task: Task
    report: LoadReport

    def check_text_side(self, records: Iterable[Record]) -> None:
        """Raises ValueError for texts that the weights cannot read."""

    def compute(self, function: Callable[[Batch], Any], batch: Batch) -> Any:
        """Calls a function of the network on a batch."""


# Public functions, as methods of Predictor --------------------------------------------------------


def embed_pairs(
    predictor: LoadedTask,
    images: Any,
    texts: Any,
    *,
    batch_size: int,
    workers: int,
    on_error: OnError,
) -> dict[str, np.ndarray]:
    """See `Predictor.embed_pairs`."""
    task = predictor.task
    check_backbone(predictor)
    values = {"image": images, "text": texts}
    records = [make_record(**pair) for pair in align_inputs(values)]
    predictor.check_text_side(records)

    def prepare(record: Record) -> Example:
        for name in ("image", "text"):
            if name not in record:
                raise ValueError(f"the {name} of the pair is empty: leave the pair out")
        return make_example(task, record, None)

    def run(examples: list[Example]) -> list[np.ndarray]:
        image, text = predictor.compute(partial(encode_pairs, task), collate(examples))
        return list(torch.stack((image, text), 1).float().cpu().numpy())  # [2, D] each

    rows = run_in_batches(
        records,
        prepare,
        run,
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        label="pairs",
    )
    if not rows:
        return {}
    stacked = stack_rows(rows, "pairs")  # [N, 2, D]
    return {"image": stacked[:, 0], "text": stacked[:, 1]}


def embed_patches(
    predictor: LoadedTask,
    images: Any,
    *,
    layer: int,
    image_size: ImageSize,
    batch_size: int,
    workers: int,
    on_error: OnError,
) -> np.ndarray:
    """See `Predictor.embed_patches`."""
    task = predictor.task
    backbone = check_backbone(predictor)
    number = resolve_layer(layer, backbone.config.depth)
    check_image_size(task, image_size)
    records = [make_record(image=image) for image in list_inputs(images)]
    if not records:
        raise ValueError("no images to encode: give one or more")

    def prepare(record: Record) -> Example:
        if "image" not in record:
            raise ValueError("the image is empty: leave it out")
        return make_example(task, record, image_size)

    def run(examples: list[Example]) -> np.ndarray:
        batch = collate(examples)
        states, _ = predictor.compute(
            partial(encode_layers, task, layers=(number,), attention=False), batch
        )
        patches = states[number][:, 1:].transpose(1, 2)  # [B, D, P]
        return patches.unflatten(2, get_grid(task, batch)).float().cpu().numpy()

    rows = run_in_batches(
        records,
        prepare,
        run,
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        label="images",
    )
    return stack_rows(rows, "images")


def inspect(
    predictor: LoadedTask,
    image: Any,
    text: str | None,
    *,
    layers: Sequence[int],
    attention: bool,
    image_size: ImageSize,
) -> Inspection:
    """See `Predictor.inspect`."""
    task = predictor.task
    backbone = check_backbone(predictor)
    for name, value in (("images", image), ("texts", text)):
        if value is not None and is_list(value):
            raise ValueError(f"inspect takes one input, not a list of {name}: call it for each")
    record = make_record(image=image, text=text)
    if not record.keys() - {"id"}:
        raise ValueError("nothing to inspect: give an image, a text or both")
    numbers = sorted({resolve_layer(layer, backbone.config.depth) for layer in layers})
    if "image" in record:
        check_image_size(task, image_size)
    predictor.check_text_side([record])
    example = make_example(task, record, image_size)
    words: tuple[str, ...] = ()
    if "text" in example:
        length = int((~example["text_padding"]).sum())
        example["text"], padding = example["text"][:length], example.pop("text_padding")[:length]
        assert not padding.any()
        words = tuple(task.tokenizer.id_to_piece(id) for id in example["text"].tolist())
    batch = {name: value[None] for name, value in example.items() if name != "id"}
    states, weights = predictor.compute(
        partial(encode_layers, task, layers=numbers, attention=attention), batch
    )
    return Inspection(
        depth=backbone.config.depth,
        words=words,
        grid=get_grid(task, batch) if "image" in batch else (0, 0),
        states={layer: value[0].float().cpu().numpy() for layer, value in states.items()},
        attention={layer: value[0].float().cpu().numpy() for layer, value in weights.items()},
    )


# The network --------------------------------------------------------------------------------------


def encode_pairs(task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the final states [B, D] of the class token and of `<s>` of fused pairs."""
    encoded = task.backbone(
        task.normalize_images(batch),
        batch["text"],
        text_padding=batch.get("text_padding"),
        read="first",
    )
    return encoded.first("image"), encoded.first("text")


def encode_layers(
    task: Task, batch: Batch, *, layers: Sequence[int], attention: bool
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Returns the states [B, N, D] after each of `layers`, and their attention [B, H, N, N].

    Layer 0 has no attention. Without `attention` the second dictionary is empty.
    """
    backbone = task.backbone
    assert isinstance(backbone, BEiT3)
    states: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}

    def observe(index: int, parts: Parts, layout: Layout, mask: Tensor | None) -> None:
        """Keeps a block's input, which is the state after layer `index`."""
        if index in layers:
            states[index] = torch.cat(parts, 1)
        if attention and index + 1 in layers:
            block = backbone.blocks[index]
            assert isinstance(block, Block)
            normed = block.norm1(parts, layout.experts)
            weights[index + 1] = block.attention.compute_weights(normed, layout, mask)

    encoded = backbone(
        task.normalize_images(batch) if "image" in batch else None,
        batch.get("text"),
        text_padding=batch.get("text_padding"),
        observe=observe,
    )
    if backbone.config.depth in layers:
        states[backbone.config.depth] = encoded.tokens
    return states, weights


def check_backbone(predictor: LoadedTask) -> BEiT3:
    """Returns the backbone. Raises ValueError where it is no BEiT-3, or is not loaded."""
    task = predictor.task
    if not isinstance(task.backbone, BEiT3):
        raise ValueError(
            f"{task_name(type(task))} has no BEiT-3 backbone for images and texts: give weights "
            "of another task"
        )
    untrained = [
        name
        for name in predictor.report.fresh
        if name.startswith("backbone.") and not serves_text(name)
    ]
    if untrained:
        raise ValueError(
            f"the backbone is untrained ({untrained[0]}), {predictor.report.source} has none: "
            "give other weights"
        )
    return task.backbone


def resolve_layer(layer: int, depth: int) -> int:
    """Returns the number of a layer, 0 to `depth`; negative ones count from the end."""
    if not -depth - 1 <= layer <= depth:
        raise ValueError(
            f"there is no layer {layer}: give 0 (the embeddings) to {depth}, or -1 for the last"
        )
    return layer if layer >= 0 else layer + depth + 1


# Inputs -------------------------------------------------------------------------------------------


def check_image_size(task: Task, image_size: ImageSize) -> None:
    """Raises ValueError for a size that patches do not tile."""
    config: Any = task.config
    patch = config.model.patch_size
    if image_size is None:
        return
    sides = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    is_tiled = all(isinstance(side, int) and side > 0 and side % patch == 0 for side in sides)
    if len(sides) not in (1, 2) or not is_tiled:
        raise ValueError(
            f"image_size {image_size} is no size that patches of {patch} px tile: give a multiple "
            "of it, or (height, width)"
        )


def make_example(task: Task, record: Record, image_size: ImageSize) -> Example:
    """Returns what the record holds: `image` uint8 [3, H, W], `text` and `text_padding` [L].

    An image of (height, width) is resized to it without keeping the aspect ratio.
    """
    config: Any = task.config
    example: Example = {}
    if "image" in record:
        image, preprocessing = open_image(record["image"]), config.image
        if isinstance(image_size, tuple | list):
            image = resize(image, image_size[0], image_size[1], preprocessing.interpolation)
        else:
            size = image_size or preprocessing.image_size
            image = replace(preprocessing, image_size=size).preprocess(image)
        example["image"] = image
    if "text" in record:
        text, padding = task.tokenize_text(record["text"], config.text_length)
        example["text"], example["text_padding"] = text, padding
    return example


def collate(examples: Sequence[Example]) -> Batch:
    """Stacks tensors by key; texts are cut to the longest."""
    batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    return trim_padding(batch)


def get_grid(task: Task, batch: Batch) -> tuple[int, int]:
    """Returns the rows and columns of patches of a batch's images."""
    config: Any = task.config
    height, width = batch["image"].shape[-2:]
    return height // config.model.patch_size, width // config.model.patch_size


def stack_rows(rows: Sequence[np.ndarray | None], label: str) -> np.ndarray:
    """Stacks one array per input; NaN takes the place of those that could not be read.

    Raises ValueError where none could: the shape is not known then.
    """
    shape = next((row.shape for row in rows if row is not None), None)
    if shape is None:
        raise ValueError(f"none of {len(rows)} {label} can be read: each was named before")
    empty = np.full(shape, np.nan, dtype=np.float32)
    return np.stack([empty if row is None else row for row in rows]).astype(np.float32, copy=False)
