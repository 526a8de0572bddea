"""Both BEiT-3 architectures a second time: token by token, head by head, from the papers and for
any float type.

Nothing of `beit3` is used but its parameter names: `state` maps those to tensors, `config` is read
for numbers alone.
"""

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def encode(
    state: State,
    config: Any,
    image: Tensor | None = None,
    text: Tensor | None = None,
    *,
    image_mask: Tensor | None = None,
    text_padding: Tensor | None = None,
    may_attend: Tensor | None = None,
    trace: MutableMapping[str, Tensor] | None = None,
) -> Tensor:
    """Token states [B, N, D]; `may_attend` [N, N] bool. `trace` collects what happens between."""
    tokens, kinds = [], []
    if image is not None:
        tokens += image_tokens(state, config, image, image_mask)
        kinds += ["image"] * len(tokens)
    if text is not None:
        words = text_tokens(state, text, text_padding)
        tokens += words
        kinds += ["text"] * len(words)
    batch, length = tokens[0].shape[0], len(tokens)
    everyone = torch.ones(length, length, dtype=torch.bool)
    may = (everyone if may_attend is None else may_attend).expand(batch, -1, -1).clone()
    if text is not None and text_padding is not None:
        may[:, :, length - text.shape[1] :] &= ~text_padding[:, None, :]
    note(trace, "embedding_output", tokens)
    pair = image is not None and text is not None
    for layer in range(config.depth):
        if pair and layer >= config.depth - config.fusion_layers:
            kinds = ["fusion"] * length
        tokens = block(state, config, f"blocks.{layer}", tokens, kinds, may, trace, f"layer{layer}")
        note(trace, f"layer{layer}.out", tokens)
    if config.final_norm:
        tokens = [
            layer_norm(state, config, "norm", kind, token)
            for kind, token in zip(kinds, tokens, strict=True)
        ]
    return torch.stack(tokens, 1)


def image_tokens(state: State, config: Any, image: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Class token, then patches row by row, each with its position's row added."""
    size = config.patch_size
    rows, columns = image.shape[2] // size, image.shape[3] // size
    kernel = state["image_embedding.patch.weight"].flatten(1)  # [D, 3 * size * size]
    tokens = [state["image_embedding.class_token"][0].expand(len(image), -1)]
    for row in range(rows):
        for column in range(columns):
            patch = image[
                :, :, row * size : (row + 1) * size, column * size : (column + 1) * size
            ].flatten(1)
            token = patch @ kernel.T + state["image_embedding.patch.bias"]
            if mask is not None:
                hidden = mask[:, row * columns + column, None].to(token.dtype)
                token = token * (1 - hidden) + state["image_embedding.mask_token"][0] * hidden
            tokens.append(token)
    side = config.image_size // size
    table = bicubic(state["image_embedding.positions"], side, rows, columns)
    return [token + table[2 + index] for index, token in enumerate(tokens)]


def text_tokens(state: State, text: Tensor, padding: Tensor | None) -> list[Tensor]:
    """Words with positions; a padded one enters as zeros."""
    tokens = []
    for index in range(text.shape[1]):
        token = (
            state["text_embedding.tokens.weight"][text[:, index]]
            + state["text_embedding.positions"][2 + index]
        )
        if padding is not None:
            token = torch.where(padding[:, index, None], torch.zeros_like(token), token)
        tokens.append(token)
    return tokens


def block(
    state: State,
    config: Any,
    path: str,
    tokens: list[Tensor],
    kinds: list[str],
    may: Tensor,
    trace: MutableMapping[str, Tensor] | None,
    name: str,
) -> list[Tensor]:
    """x + attention(norm(x)), then x + expert(norm(x)), each token through the copies of its
    kind."""
    queries, keys, values = [], [], []
    for kind, token in zip(kinds, tokens, strict=True):
        normed = layer_norm(state, config, f"{path}.norm1", kind, token)
        query, key, value = linear(state, f"{path}.attention.qkv", kind, normed).chunk(3, -1)
        queries, keys, values = [*queries, query], [*keys, key], [*values, value]
    query, key, value = (torch.stack(rows, 1) for rows in (queries, keys, values))
    mixed, weights = attend(query, key, value, config.num_heads, may)
    changes = []
    for index, kind in enumerate(kinds):
        token = mixed[:, index]
        if config.sub_ln:
            token = layer_norm(state, config, f"{path}.attention.norm", kind, token)
        changes.append(linear(state, f"{path}.attention.out", kind, token))
    note(trace, f"{name}.self_attn_out", changes)
    if trace is not None:
        trace[f"{name}.self_attn_weights"] = weights
    tokens = [token + change for token, change in zip(tokens, changes, strict=True)]
    return [
        token + feed_forward(state, config, path, kind, token)
        for kind, token in zip(kinds, tokens, strict=True)
    ]


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, may: Tensor
) -> tuple[Tensor, Tensor]:
    """All [B, N, D] -> mixed values [B, N, D] and weights [B * heads, N, N], batch-major."""
    width = query.shape[2] // heads
    mixed, weights = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        powers = torch.exp(scores - scores.amax(-1, keepdim=True)) * may
        weights.append(powers / powers.sum(-1, keepdim=True))
        mixed.append(weights[-1] @ value[..., part])
    return torch.cat(mixed, -1), torch.stack(weights, 1).flatten(0, 1)


def feed_forward(state: State, config: Any, path: str, kind: str, token: Tensor) -> Tensor:
    inner = linear(
        state, f"{path}.ffn.{kind}.fc1", "", layer_norm(state, config, f"{path}.norm2", kind, token)
    )
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    if config.sub_ln:
        inner = layer_norm(state, config, f"{path}.ffn.{kind}.norm", "", inner)
    return linear(state, f"{path}.ffn.{kind}.fc2", "", inner)


def linear(state: State, path: str, kind: str, token: Tensor) -> Tensor:
    weight, bias = (parameter(state, path, kind, part) for part in ("weight", "bias"))
    return token @ weight.T + bias


def layer_norm(state: State, config: Any, path: str, kind: str, token: Tensor) -> Tensor:
    weight, bias = (parameter(state, path, kind, part) for part in ("weight", "bias"))
    centered = token - token.mean(-1, keepdim=True)
    return (
        centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + config.norm_eps) * weight
        + bias
    )


def parameter(state: State, path: str, kind: str, part: str) -> Tensor:
    """The copy of this kind, or the one that all kinds share."""
    own = f"{path}.{kind}.{part}"
    return state[own] if own in state else state[f"{path}.{part}"]


def bicubic(table: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """The table [3 + side * side, D] at another grid: Keys' cubic (a = -0.75), half-pixel centers,
    edges repeated."""
    if (rows, columns) == (side, side):
        return table
    grid = table[3:].reshape(side, side, -1)
    made = [
        sum(
            a * b * grid[y, x]
            for y, a in taps(row, rows, side)
            for x, b in taps(column, columns, side)
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.cat((table[:3], torch.stack(made)))


def taps(index: int, new: int, old: int) -> list[tuple[int, float]]:
    """The four old indices that make new index `index`, with their weights."""
    center = (index + 0.5) * old / new - 0.5
    base = math.floor(center)
    return [(min(max(base + k, 0), old - 1), cubic(abs(center - base - k))) for k in (-1, 0, 1, 2)]


def cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a


def note(trace: MutableMapping[str, Tensor] | None, name: str, tokens: list[Tensor]) -> None:
    if trace is not None:
        trace[name] = torch.stack(tokens, 1)
