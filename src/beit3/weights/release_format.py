"""Released BEiT-3 files: read safely, recognise by their keys, load into a task, and give back under their names.

The release names everything twice, `.A` for images and `.B` for texts, keeps query, key and value apart and mislabels
two norms; TABLE is the whole correspondence. Shapes: dict[str, Tensor] under the released names, in float32
unless asked otherwise.
"""

import argparse
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beit3.data.views.transforms import Preprocessing
from beit3.model.config import ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.recipe import TaskConfig
from beit3.task import Task, task_name
from beit3.task import load_task as load_task
from beit3.tokenizer.teacher import is_torchscript
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.adapt import adapted, fields_of, with_names
from beit3.weights.beit2_format import DROPPED, read_vqkd
from beit3.weights.catalog import about
from beit3.weights.matching import KEEP, Report, complete, first_few, match, stored

PREFIX = "beit3."
"""In front of the backbone's names in files of a task; a bare backbone has none."""

TABLE = (
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
"""(ours, released): # a layer, @ a modality, * weight or bias; [qkv] three tensors that ours stacks by rows."""

SIDES = {"image": "A", "text": "B"}

HEADS: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("mlm_head.", "mim_head."),
    "captioning": ("mlm_head.",),
    "vqa": ("pooler.", "head.0.", "head.1.", "head.3."),
    "nlvr2": ("head.norm1.", "head.dense1.", "head.norm2.", "head.dense2."),
    "retrieval": ("vision_head.", "language_head.", "logit_scale"),
    "imagenet": ("fc_norm.", "head.weight", "head.bias"),
}
"""What the released heads of each task are called; a file is of the first task of which it holds every part."""

SCALAR = "logit_scale"
"""Without dimensions in the files, with one here: sharding cannot cut a scalar."""

RELEASED_ROWS, RELEASED_IDS = 64010, 64002
"""Rows of the released text tables, and ids of the released tokenizer."""

HEAD_SIZES = {
    "num_answers": "head.3.bias",
    "num_codes": "mim_head.bias",
    "num_classes": "head.bias",
}
"""Config fields that a head's rows tell."""

CAPTION_LENGTH = 64
"""Tokens up to which the release's evaluation writes a caption; it trains on half of that."""


# Reading -------------------------------------------------------------------------------------------------------------


def read_file(path: str | Path, *, as_stored: bool = False) -> dict[str, Tensor]:
    """The tensors of a released file under its own names, floating ones in float32 or, `as_stored`, as they are.

    The content decides, not the ending: safetensors, or what torch.save wrote, nested under `model`, `module` or
    `state_dict` or bare. Nothing in the file is executed. Raises ValueError, in one line, for everything else; for a
    file that is not there it says what the release calls so.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, a released file is needed here: give a .pth file")
    if not path.is_file():
        raise ValueError(
            f"no weights at {path}: {about(path.name) or 'give a released .pth file or a directory of weights'}"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        content = _read_pickle(path)
    elif start[8:] == b"{":
        content = _read_safetensors(path)
    else:
        raise ValueError(f"{path} is neither a torch nor a safetensors file: download it again")
    for nest in ("model", "module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no named tensors: a state dict is expected")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {key!r} is of type {type(value).__name__}: a state dict of tensors is expected"
            )
    return {str(key): value if as_stored else in_float32(value) for key, value in content.items()}


def in_float32(tensor: Tensor) -> Tensor:
    """Floating tensors in float32, others as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _read_pickle(path: Path) -> Any:
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, as OpenAI's CLIP files are: a file of tensors is needed here"
        )
    try:
        # Checkpoints of the official trainer carry their command line.
        # An open file, because torch.load goes by the ending where it is given a path.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something damaged"
        raise ValueError(
            f"{path} is refused, it holds {what}: ask for a file of tensors alone"
        ) from None
    except (RuntimeError, EOFError, KeyError, AttributeError, IndexError, ValueError, OSError):
        raise ValueError(f"{path} is not a whole torch file: download it again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path} is not a whole safetensors file: download it again") from None


# Recognising ---------------------------------------------------------------------------------------------------------


def family(keys: Iterable[str]) -> str:
    """Which released model these keys are of: "vqkd", a task of HEADS, or "backbone"; ValueError for none of them."""
    keys = list(keys)
    if any(key.startswith("quantize.") for key in keys):
        return "vqkd"
    if any(key.startswith("backbone.") for key in keys):
        raise ValueError("these are this package's own tensors: give the directory that holds them")
    if any(key.startswith(("visual.", "vision_model.")) for key in keys):
        raise ValueError(
            "these are CLIP's tensors, not BEiT-3's: they can teach a vqkd (beit3 convert clip)"
        )
    if not any(
        key.removeprefix(PREFIX).startswith(("vision_embed.", "text_embed.")) for key in keys
    ):
        raise ValueError(
            f"not BEiT-3 weights: the keys begin with {first_few(keys)}; give a released BEiT-3 file or weights of ours"
        )
    for task, heads in HEADS.items():
        if all(any(key.startswith(head) for key in keys) for head in heads):
            return task
    return "backbone"


def sizes(state: Mapping[str, Tensor], num_heads: int | None = None) -> ModelConfig:
    """The network that these shapes imply. The shapes do not tell the heads: 64 units each, as released, unless given.

    A file without the text side gets the released text tables. Raises ValueError for shapes that imply no network.
    """
    state = {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}

    def shape(key: str, rank: int) -> torch.Size:
        if key not in state or state[key].ndim != rank:
            raise ValueError(f"not BEiT-3 weights: no tensor of {rank} dimensions called {key}")
        return state[key].shape

    dim, _, patch, _ = shape("vision_embed.proj.weight", 4)
    rows = shape("encoder.embed_positions.A.weight", 2)[0] - KEEP
    if rows < 1 or isqrt(rows) ** 2 != rows:
        raise ValueError(
            f"encoder.embed_positions.A.weight has {rows + KEEP} rows: not {KEEP} and a square grid"
        )
    if num_heads is None and dim % 64:
        raise ValueError(
            f"width {dim} is not a multiple of 64, so the number of heads is unknown: give num_heads"
        )
    words, positions = (
        key in state for key in ("text_embed.weight", "encoder.embed_positions.B.weight")
    )
    return ModelConfig(
        dim=dim,
        depth=1
        + max(
            (int(key.split(".")[2]) for key in state if key.startswith("encoder.layers.")),
            default=-1,
        ),
        num_heads=num_heads or dim // 64,
        ffn_dim=shape("encoder.layers.0.ffn.A.fc1.weight", 2)[0],
        image_size=isqrt(rows) * patch,
        patch_size=patch,
        vocab_size=shape("text_embed.weight", 2)[0] if words else ModelConfig.vocab_size,
        text_positions=shape("encoder.embed_positions.B.weight", 2)[0]
        if positions
        else ModelConfig.text_positions,
        sub_ln="encoder.layers.0.self_attn.inner_attn_ln.A.weight" in state,
        final_norm="encoder.layer_norm.A.weight" in state,
    )


# Loading and writing -------------------------------------------------------------------------------------------------


def load_official(
    state: Mapping[str, Tensor],
    task: str | type[Task] | None = None,
    *,
    num_heads: int | None = None,
    answers: Sequence[str] = (),
    classes: Sequence[str] = (),
    prompt: str = "",
    tokenizer: TextTokenizer | None = None,
) -> tuple[Task, Report]:
    """A task built after a released file's shapes and filled with its tensors, and the report.

    Without `task` the keys decide. Pictures are prepared as for the file's own task. What the file cannot give is
    initialised with seed 0 and reported. `classes` and `prompt` are for imagenet, which takes retrieval files too and
    then classifies by names. Raises ValueError for missing or unknown keys, for shapes that do not agree, and for names
    of another number than the head's outputs.
    """
    kind = task if isinstance(task, type) else load_task(task or family(state))
    config = _config(state, kind, num_heads)
    fixed = {name: len(state[key]) for name, key in HEAD_SIZES.items() if key in state}
    built = kind(
        with_names(config, kind, answers=answers, classes=classes, prompt=prompt, fixed=fixed),
        tokenizer=tokenizer,
    )
    if any(key.endswith("text_embed.weight") for key in state):
        refuse_other_tokenizer(tokenizer, built.config)
    tensors, ignored, label = translate(state, built)
    values, fresh = match(built, tensors, exact=True, label=label)
    complete(built, values, fresh)
    return built, Report(f"a released {family(state)} file", tuple(values), ignored, fresh)


def refuse_other_tokenizer(tokenizer: TextTokenizer | None, config: TaskConfig) -> None:
    """ValueError where the text table is the released one and the tokenizer is not: its <mask> would be another row."""
    if (
        tokenizer is None
        or config.model.vocab_size != RELEASED_ROWS
        or tokenizer.vocab_size == RELEASED_IDS
    ):
        return
    raise ValueError(
        f"the text tokenizer has {tokenizer.vocab_size} ids, the released one {RELEASED_IDS}: give the beit3.spm of the release"
    )


def to_official(task: Task, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a task, or `tensors` under its names, under the released ones, in memory of their own.

    Raises ValueError for a parameter that the release has no name for.
    """
    state = {}
    for name, tensor in (stored(task) if tensors is None else tensors).items():
        keys = keys_of(name, task.official_names)
        if not keys:
            raise ValueError(
                f"{name} has no counterpart in the released files: keep these weights as they are"
            )
        for key, rows in zip(
            keys, tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,), strict=True
        ):
            state[key] = rows.detach().clone().squeeze() if key == SCALAR else rows.detach().clone()
    return state


def keys_of(name: str, heads: Mapping[str, str], prefix: str = PREFIX) -> tuple[str, ...]:
    """The released keys of a task's parameter: none, one, or three of which ours is the rows, one after the other."""
    if name.startswith("backbone."):
        return tuple(prefix + key for key in _backbone_keys(name.removeprefix("backbone.")))
    for ours, theirs in heads.items():
        if name == ours or name.startswith(f"{ours}."):
            return (theirs + name.removeprefix(ours),)
    return ()


def translate(
    state: Mapping[str, Tensor], task: Task
) -> tuple[dict[str, Tensor], dict[str, str], Callable[[str], str]]:
    """A released file for `task`: (tensors under our names, ignored keys with reasons, our name -> released name).

    ValueError for keys that no released file has.
    """
    found, _ = _same_kind(state, type(task))
    if found == "vqkd":
        tensors = {
            f"backbone.{name}": tensor for name, tensor in read_vqkd(state, num_heads=1)[1].items()
        }
        return (
            tensors,
            {key: "only its training used it" for key in state if DROPPED.match(key)},
            str,
        )
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    here = stored(task)
    keys = {name: keys_of(name, task.official_names, prefix) for name in here}
    given = [name for name, parts in keys.items() if any(key in state for key in parts)]
    tensors = {name: _stack(state, keys[name], here[name].shape) for name in given}
    used = {key for parts in keys.values() for key in parts}
    ignored = _ignored([key for key in state if key not in used], prefix, found, task)
    return tensors, ignored, lambda name: " / ".join(keys[name]) or name


def _same_kind(state: Iterable[str], kind: type[Task]) -> tuple[str, str]:
    """(what the file is, the task's name); ValueError where one is a visual tokenizer and the other is not."""
    found, task = family(state), task_name(kind)
    if (found == "vqkd") != (task == "vqkd"):
        raise ValueError(
            f"a released {found} file cannot become {task}: give another file or another task"
        )
    return found, task


def _backbone_keys(name: str) -> tuple[str, ...]:
    for ours, theirs in TABLE:
        pattern = (
            re.escape(ours).replace(r"\#", r"(?P<layer>\d+)").replace("@", "(?P<side>image|text)")
        )
        found = re.fullmatch(pattern.replace(r"\*", "(?P<part>weight|bias)"), name)
        if found:
            groups = found.groupdict()
            key = theirs.replace("#", groups.get("layer", "")).replace("*", groups.get("part", ""))
            key = key.replace("@", SIDES.get(groups.get("side", ""), ""))
            return (
                tuple(key.replace("[qkv]", letter) for letter in "qkv")
                if "[qkv]" in key
                else (key,)
            )
    return ()


def _stack(state: Mapping[str, Tensor], keys: tuple[str, ...], shape: torch.Size) -> Tensor:
    """One tensor of ours from its released parts; where there are several, each must have its share of the rows."""
    if len(keys) == 1:
        return state[keys[0]].view(1) if keys[0] == SCALAR else state[keys[0]]
    share = torch.Size((shape[0] // len(keys), *shape[1:]))
    for key in keys:
        if key not in state:
            raise ValueError(f"1 tensor is missing: {key}")
        if state[key].shape != share:
            raise ValueError(f"{key} has shape {list(state[key].shape)}, {list(share)} is needed")
    return torch.cat([state[key] for key in keys])


def _ignored(keys: Iterable[str], prefix: str, found: str, task: Task) -> dict[str, str]:
    """Reasons for the keys that the task leaves in the file; ValueError where there is none."""
    ignored, unknown, kind = {}, [], task_name(type(task))
    for key in keys:
        owners = [name for name, heads in HEADS.items() if key.startswith(heads)]
        if isinstance(task.backbone, ImageTrunk) and (
            ".B." in key or key.startswith(f"{prefix}text_embed.")
        ):
            ignored[key] = f"{kind} takes images alone"
        elif key.startswith(f"{prefix}encoder.layer_norm."):
            ignored[key] = f"the final norm: {kind} reads the states before it"
        elif owners:
            owner = found if found in owners else owners[0]
            ignored[key] = f"head of {owner}: no part of {kind}"
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} unknown tensors: {first_few(unknown)}")
    return ignored


def known_pictures(state: Iterable[str]) -> Preprocessing | None:
    """How the pictures of a released file's own task are prepared, at that task's size; None where the keys tell no task."""
    found = family(state)
    return None if found == "backbone" else load_task(found).Config().image


def _config(state: Mapping[str, Tensor], kind: type[Task], num_heads: int | None) -> Any:
    """The task's own config with the file's sizes."""
    found, task = _same_kind(state, kind)
    image = known_pictures(state) or kind.Config().image
    if found == "vqkd":
        visual, _ = read_vqkd(state, num_heads=num_heads)
        tokenizer: Any = kind.Config()
        return replace(tokenizer, model=visual, image=replace(image, image_size=visual.image_size))
    model = sizes(state, num_heads)
    config = adapted(
        kind, model, replace(image, image_size=model.image_size), by_names=found == "retrieval"
    )
    known = fields_of(config)
    changes = {
        name: len(state[key]) for name, key in HEAD_SIZES.items() if name in known and key in state
    }
    if found == task == "captioning":
        changes["text_length"] = min(CAPTION_LENGTH, model.max_text_length)
    return replace(config, **changes)
