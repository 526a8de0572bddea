"""The format of Microsoft's released BEiT-3 checkpoints: their parameter names, and what they hold.

The release stores every parameter twice, `.A` for images and `.B` for texts, keeps query, key and
value apart, and mislabels two norms. `NAME_TABLE` is the complete correspondence between its names
and ours.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.recipe import TaskConfig
from beit3.task import Task, load_task, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.adapt import adapt_config, get_field_names
from beit3.weights.beit2_format import TRAINING_ONLY, read_vqkd
from beit3.weights.matching import NUM_EXTRA_ROWS, abbreviate, get_weights

PREFIX = "beit3."
"""Precedes the backbone's names in checkpoints of a task; a checkpoint of the backbone has none."""

NAME_TABLE = (
    ("text_embedding.tokens.*", "text_embed.*"),
    ("text_embedding.positions", "encoder.embed_positions.B.weight"),
    ("image_embedding.positions", "encoder.embed_positions.A.weight"),
    ("image_embedding.class_token", "vision_embed.cls_token"),
    ("image_embedding.mask_token", "vision_embed.mask_token"),
    ("image_embedding.patch.*", "vision_embed.proj.*"),
    ("blocks.#.norm1.@.*", "encoder.layers.#.self_attn_layer_norm.@.*"),
    ("blocks.#.attention.qkv.@.*", "encoder.layers.#.self_attn.[qkv]_proj.@.*"),
    ("blocks.#.attention.norm.@.*", "encoder.layers.#.self_attn.inner_attn_ln.@.*"),
    ("blocks.#.attention.out.@.*", "encoder.layers.#.self_attn.out_proj.@.*"),
    ("blocks.#.norm2.@.*", "encoder.layers.#.final_layer_norm.@.*"),
    ("blocks.#.ffn.@.fc1.*", "encoder.layers.#.ffn.@.fc1.*"),
    ("blocks.#.ffn.@.norm.*", "encoder.layers.#.ffn.@.ffn_layernorm.*"),
    ("blocks.#.ffn.@.fc2.*", "encoder.layers.#.ffn.@.fc2.*"),
    ("norm.@.*", "encoder.layer_norm.@.*"),
)
"""(our name, released name). `#` is a layer, `@` a modality, `*` weight or bias. `[qkv]` stands for
three tensors that are stacked by rows in ours."""

MODALITY_LETTERS = {"image": "A", "text": "B"}

HEADS: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("mlm_head.", "mim_head."),
    "captioning": ("mlm_head.",),
    "vqa": ("pooler.", "head.0.", "head.1.", "head.3."),
    "nlvr2": ("head.norm1.", "head.dense1.", "head.norm2.", "head.dense2."),
    "retrieval": ("vision_head.", "language_head.", "logit_scale"),
    "imagenet": ("fc_norm.", "head.weight", "head.bias"),
}
"""Name prefixes of each task's released head. A checkpoint belongs to the first task of which it
holds every part."""

SCALAR_KEY = "logit_scale"
"""Zero-dimensional in the released files and of shape [1] in ours: sharding cannot cut a scalar."""

RELEASED_ROWS, RELEASED_IDS = 64010, 64002
"""Rows of the released token embedding, and number of ids of the released tokenizer."""

HEAD_SIZES = {
    "num_answers": "head.3.bias",
    "num_codes": "mim_head.bias",
    "num_classes": "head.bias",
}
"""Config field -> the released parameter whose length it is."""

CAPTION_LENGTH = 64
"""Tokens up to which the release's evaluation writes a caption; it trains on half of that."""


# Identify a checkpoint ---------------------------------------------------------------------------


def identify_checkpoint(keys: Iterable[str]) -> str:
    """Returns which released model has these keys: "vqkd", a task of `HEADS`, or "backbone".

    Raises ValueError where they belong to none.
    """
    keys = list(keys)
    if any(key.startswith("quantize.") for key in keys):
        return "vqkd"
    if any(key.startswith("backbone.") for key in keys):
        raise ValueError("these are this package's own tensors: give the directory that holds them")
    if any(key.startswith(("visual.", "vision_model.")) for key in keys):
        raise ValueError(
            "these are CLIP's tensors, not BEiT-3's: they can teach a vqkd (beit3 convert clip)"
        )
    embeddings = ("vision_embed.", "text_embed.")
    if not any(key.removeprefix(PREFIX).startswith(embeddings) for key in keys):
        raise ValueError(
            f"not BEiT-3 weights: the keys begin with {abbreviate(keys)}; "
            "give a released BEiT-3 file or weights of ours"
        )
    for task, prefixes in HEADS.items():
        if all(any(key.startswith(prefix) for key in keys) for prefix in prefixes):
            return task
    return "backbone"


def infer_model_config(state: Mapping[str, Tensor], num_heads: int | None = None) -> ModelConfig:
    """Returns the config of the network that the shapes in a released checkpoint imply.

    A checkpoint without text parameters gets the released text tables.

    Args:
        state: Tensors under released names, with or without `PREFIX`.
        num_heads: Number of attention heads, which no shape tells. By default one per 64 channels,
            as in all released networks.

    Raises:
        ValueError: The shapes imply no network.
    """
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}

    def get_shape(key: str, rank: int) -> torch.Size:
        if key not in state or state[key].ndim != rank:
            raise ValueError(f"not BEiT-3 weights: no tensor of {rank} dimensions called {key}")
        return state[key].shape

    dim, _, patch_size, _ = get_shape("vision_embed.proj.weight", 4)
    num_rows = get_shape("encoder.embed_positions.A.weight", 2)[0]
    num_patches = num_rows - NUM_EXTRA_ROWS
    if num_patches < 1 or isqrt(num_patches) ** 2 != num_patches:
        raise ValueError(
            f"encoder.embed_positions.A.weight has {num_rows} rows: "
            f"not {NUM_EXTRA_ROWS} and a square grid"
        )
    if num_heads is None and dim % 64:
        raise ValueError(
            f"width {dim} is not a multiple of 64, so the number of heads is unknown: "
            "give num_heads"
        )
    layers = [int(key.split(".")[2]) for key in state if key.startswith("encoder.layers.")]
    vocab_size, text_positions = ModelConfig.vocab_size, ModelConfig.text_positions
    if "text_embed.weight" in state:
        vocab_size = get_shape("text_embed.weight", 2)[0]
    if "encoder.embed_positions.B.weight" in state:
        text_positions = get_shape("encoder.embed_positions.B.weight", 2)[0]
    return ModelConfig(
        dim=dim,
        depth=1 + max(layers, default=-1),
        num_heads=num_heads or dim // 64,
        ffn_dim=get_shape("encoder.layers.0.ffn.A.fc1.weight", 2)[0],
        image_size=isqrt(num_patches) * patch_size,
        patch_size=patch_size,
        vocab_size=vocab_size,
        text_positions=text_positions,
        sub_ln="encoder.layers.0.self_attn.inner_attn_ln.A.weight" in state,
        final_norm="encoder.layer_norm.A.weight" in state,
    )


def infer_task_config(
    state: Mapping[str, Tensor], task_class: type[Task], num_heads: int | None
) -> Any:
    """Returns the default config of a task with the sizes and preprocessing of a checkpoint."""
    checkpoint, task = _check_compatible(state, task_class)
    default: Any = task_class.Config()
    image = find_preprocessing(state) or default.image
    if checkpoint == "vqkd":
        visual, _ = read_vqkd(state, num_heads=num_heads)
        return replace(default, model=visual, image=replace(image, image_size=visual.image_size))
    model = infer_model_config(state, num_heads)
    image = replace(image, image_size=model.image_size)
    config = adapt_config(task_class, model, image, by_names=checkpoint == "retrieval")
    field_names = get_field_names(config)
    changes = {
        field: len(state[key])
        for field, key in HEAD_SIZES.items()
        if field in field_names and key in state
    }
    if checkpoint == task == "captioning":
        changes["text_length"] = min(CAPTION_LENGTH, model.max_text_length)
    return replace(config, **changes)


def find_preprocessing(keys: Iterable[str]) -> Preprocessing | None:
    """Returns how a checkpoint's own task prepares images, or None where its keys tell no task.

    The image size is that of the task's default config.
    """
    checkpoint = identify_checkpoint(keys)
    return None if checkpoint == "backbone" else load_task(checkpoint).Config().image


def has_text_embedding(keys: Iterable[str]) -> bool:
    """Returns whether a checkpoint holds a token embedding."""
    return any(key.endswith("text_embed.weight") for key in keys)


def check_released_tokenizer(tokenizer: TextTokenizer | None, config: TaskConfig) -> None:
    """Raises ValueError where the token embedding is the released one and the tokenizer is not.

    The id of <mask> would then select another row of the embedding.
    """
    if tokenizer is None or config.model.vocab_size != RELEASED_ROWS:
        return
    if tokenizer.vocab_size != RELEASED_IDS:
        raise ValueError(
            f"the text tokenizer has {tokenizer.vocab_size} ids, the released one {RELEASED_IDS}: "
            "give the beit3.spm of the release"
        )


# Translate names ---------------------------------------------------------------------------------


def find_released_keys(
    name: str, heads: Mapping[str, str], prefix: str = PREFIX
) -> tuple[str, ...]:
    """Returns the released names of one parameter of a task.

    The tuple is empty where the release has no such parameter, and holds three names where query,
    key and value are stacked by rows in ours.

    Args:
        name: Our name, such as `backbone.blocks.3.ffn.image.fc1.weight`.
        heads: The task's `released_names`.
        prefix: What precedes the backbone's names in the file.
    """
    if name.startswith("backbone."):
        keys = _find_backbone_keys(name.removeprefix("backbone."))
        return tuple(prefix + key for key in keys)
    for our_prefix, released_prefix in heads.items():
        if name == our_prefix or name.startswith(f"{our_prefix}."):
            return (released_prefix + name.removeprefix(our_prefix),)
    return ()


def split_rows(tensor: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """Returns views of a tensor's rows in equal parts, or the tensor itself for one part."""
    return tensor.chunk(num_parts) if num_parts > 1 else (tensor,)


def to_released_state(task: Task, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns copies of a task's weights under their released names.

    Args:
        task: The task that names the parameters.
        tensors: Tensors under the task's names to take in place of its own weights.

    Raises:
        ValueError: The release has no name for a parameter.
    """
    state = {}
    for name, tensor in (get_weights(task) if tensors is None else tensors).items():
        keys = find_released_keys(name, task.released_names)
        if not keys:
            raise ValueError(
                f"{name} has no counterpart in the released files: keep these weights as they are"
            )
        for key, rows in zip(keys, split_rows(tensor, len(keys)), strict=True):
            copy = rows.detach().clone()
            state[key] = copy.squeeze() if key == SCALAR_KEY else copy
    return state


def translate(
    state: Mapping[str, Tensor], task: Task
) -> tuple[dict[str, Tensor], dict[str, str], Callable[[str], str]]:
    """Translates a released checkpoint to the names of a task.

    Returns:
        The tensors under our names; for each ignored key the reason; and a function from one of
        our names to what the file calls it, for error messages.

    Raises:
        ValueError: A key occurs in no released file, or the checkpoint and the task are of
            different kinds.
    """
    checkpoint, _ = _check_compatible(state, type(task))
    if checkpoint == "vqkd":
        _, visual_tensors = read_vqkd(state, num_heads=1)
        ignored = {key: "only its training used it" for key in state if TRAINING_ONLY.match(key)}
        return {f"backbone.{name}": t for name, t in visual_tensors.items()}, ignored, str
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    weights = get_weights(task)
    keys_by_name = {name: find_released_keys(name, task.released_names, prefix) for name in weights}
    tensors = {
        name: _stack_parts(state, keys, weights[name].shape)
        for name, keys in keys_by_name.items()
        if any(key in state for key in keys)
    }
    used_keys = {key for keys in keys_by_name.values() for key in keys}
    unused_keys = [key for key in state if key not in used_keys]
    ignored = _explain_ignored(unused_keys, prefix, checkpoint, task)
    return tensors, ignored, lambda name: " / ".join(keys_by_name[name]) or name


def _check_compatible(keys: Iterable[str], task_class: type[Task]) -> tuple[str, str]:
    """Returns the kind of a checkpoint and the task's name.

    Raises ValueError where one is a visual tokenizer and the other is not.
    """
    checkpoint, task = identify_checkpoint(keys), task_name(task_class)
    if (checkpoint == "vqkd") != (task == "vqkd"):
        raise ValueError(
            f"a released {checkpoint} file cannot become {task}: give another file or another task"
        )
    return checkpoint, task


def _find_backbone_keys(name: str) -> tuple[str, ...]:
    """Returns the released names, without prefix, of a backbone's parameter."""
    for our_name, released_name in NAME_TABLE:
        pattern = re.escape(our_name).replace(r"\#", r"(?P<layer>\d+)")
        pattern = pattern.replace("@", "(?P<modality>image|text)")
        pattern = pattern.replace(r"\*", "(?P<part>weight|bias)")
        match = re.fullmatch(pattern, name)
        if match:
            groups = match.groupdict()
            key = released_name.replace("#", groups.get("layer", ""))
            key = key.replace("*", groups.get("part", ""))
            key = key.replace("@", MODALITY_LETTERS.get(groups.get("modality", ""), ""))
            if "[qkv]" in key:
                return tuple(key.replace("[qkv]", letter) for letter in "qkv")
            return (key,)
    return ()


def _stack_parts(state: Mapping[str, Tensor], keys: tuple[str, ...], shape: torch.Size) -> Tensor:
    """Returns one tensor of ours from its released parts, each of which must have its rows."""
    if len(keys) == 1:
        tensor = state[keys[0]]
        return tensor.view(1) if keys[0] == SCALAR_KEY else tensor
    part_shape = [shape[0] // len(keys), *shape[1:]]
    for key in keys:
        if key not in state:
            raise ValueError(f"1 tensor is missing: {key}")
        if list(state[key].shape) != part_shape:
            raise ValueError(f"{key} has shape {list(state[key].shape)}, {part_shape} is needed")
    return torch.cat([state[key] for key in keys])


def _explain_ignored(
    keys: Iterable[str], prefix: str, checkpoint: str, task: Task
) -> dict[str, str]:
    """Returns why the task ignores each key; raises ValueError for a key without a reason."""
    reasons, unknown, name = {}, [], task_name(type(task))
    for key in keys:
        owners = [owner for owner, prefixes in HEADS.items() if key.startswith(prefixes)]
        serves_text = ".B." in key or key.startswith(f"{prefix}text_embed.")
        if isinstance(task.backbone, ImageTrunk) and serves_text:
            reasons[key] = f"{name} takes images alone"
        elif key.startswith(f"{prefix}encoder.layer_norm."):
            reasons[key] = f"the final norm: {name} reads the states before it"
        elif owners:
            owner = checkpoint if checkpoint in owners else owners[0]
            reasons[key] = f"head of {owner}: no part of {name}"
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} unknown tensors: {abbreviate(unknown)}")
    return reasons
