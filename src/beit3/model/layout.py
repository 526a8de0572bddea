"""The layout of a sequence: which expert takes which tokens, what is padding, what is read.

A sequence is a tuple of parts, one tensor [B, n, D] per span of the layout. Parts are concatenated
for attention only; norms, projections and experts work part by part. `Layout` is a value: it is
passed along, never stored in a module, so one network serves several threads and activation
checkpointing recomputes with the same experts.

Padding is left out of all work but attention: a part may be held *unpadded*, the T real tokens of
all samples behind one another as [1, T, D]. On an accelerator parts stay padded, because the number
of real tokens is a value: reading it waits for the device at every call and undoes CUDA graphs.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.model.config import FUSION
from beit3.ops.symbolic import is_symbolic

Parts = tuple[Tensor, ...]
"""The tensors of a sequence: one [B, n, D] per span, or [1, T, D] where the part is unpadded."""

Spans = tuple[tuple[str, int], ...]
"""(expert or modality, number of tokens n) of each part."""


class Unpadding(NamedTuple):
    """Index tables between a padded part [B, n, D] and its T real tokens [1, T, D]."""

    real_positions: Tensor
    """[1, T] int64: position of each real token among the B * n."""
    sources: Tensor
    """[B, n] int64: row of each token among the T. Padding points to row 0, unattended."""

    @classmethod
    def from_padding(cls, padding: Tensor | None) -> Self | None:
        """Builds the tables from padding [B, n] bool, True = padding.

        Returns None where unpadding gains nothing: off the CPU, without padding, with nothing else.
        A graph that is exported or compiled whole keeps the padding: its shapes cannot follow it.
        """
        if torch.compiler.is_compiling():
            return None
        if padding is None or padding.device.type != "cpu" or not padding.any() or padding.all():
            return None
        real = ~padding.flatten()
        sources = ((real.cumsum(0) - 1) * real).view(padding.shape)
        return cls(real.nonzero().T.contiguous(), sources)

    def unpad(self, part: Tensor) -> Tensor:
        """Returns the real tokens [1, T, D] of a part [B, n, D]."""
        return look_up(part.flatten(0, 1), self.real_positions)

    def pad(self, part: Tensor) -> Tensor:
        """Returns the part [B, n, D] of real tokens [1, T, D]; padding holds arbitrary states."""
        return look_up(part[0], self.sources)

    def repeat_per_token(self, per_sample: Tensor) -> Tensor:
        """Repeats one value per sample [B, 1, 1] for each of its real tokens: [1, T, 1]."""
        return look_up(per_sample[:, 0], self.real_positions // self.sources.shape[1])


class Layout(NamedTuple):
    """Describes the parts of one sequence between two layers."""

    spans: Spans
    """Expert and number of tokens of each part."""
    modalities: Spans
    """Modality and number of tokens of each input, in order. The same as `spans` until `fuse`
    joins the parts."""
    padding: tuple[Tensor | None, ...] = ()
    """Padding [B, n] bool of each modality, True = padding; None where it has none."""
    unpadding: tuple[Unpadding | None, ...] = ()
    """Index tables of each part that is held unpadded; empty where all parts are padded."""
    selection: tuple[tuple[int, ...], ...] = ()
    """Tokens of each part whose states the next block returns; empty: of all tokens."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The expert of each part."""
        return tuple(expert for expert, _ in self.spans)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each part, padding included."""
        return [length for _, length in self.spans]

    @property
    def starts(self) -> list[int]:
        """Position of each part's first token in the whole sequence."""
        return [sum(self.lengths[:part]) for part in range(len(self.spans))]

    def visible_keys(self) -> Tensor | None:
        """Returns the attention mask [B, 1, 1, N] that hides padding, or None without padding."""
        padded = next((padding for padding in self.padding if padding is not None), None)
        if padded is None:
            return None
        visible = [
            padded.new_ones(padded.shape[0], length) if padding is None else ~padding
            for padding, (_, length) in zip(self.padding, self.modalities, strict=True)
        ]
        return concatenate(visible)[:, None, None, :]

    def leave_out_padding(self, parts: Parts) -> tuple[Parts, Self]:
        """Holds parts with padding unpadded from here on."""
        unpadding = tuple(Unpadding.from_padding(padding) for padding in self.padding)
        layout = self._replace(unpadding=unpadding if any(unpadding) else ())
        return layout.unpad(parts), layout

    def unpad(self, parts: Sequence[Tensor]) -> Parts:
        """Returns padded parts as this layout holds them."""
        if not self.unpadding:
            return tuple(parts)
        return tuple(
            part if table is None else table.unpad(part)
            for part, table in zip(parts, self.unpadding, strict=True)
        )

    def pad(self, parts: Parts) -> Parts:
        """Returns all parts as [B, n, D]; the inverse of `unpad` but for the states of padding."""
        if not self.unpadding:
            return parts
        return tuple(
            part if table is None else table.pad(part)
            for part, table in zip(parts, self.unpadding, strict=True)
        )

    def fuse(self, parts: Parts) -> tuple[Parts, Self]:
        """Joins all parts into one that the fusion expert takes."""
        spans = ((FUSION, sum(self.lengths)),)
        if not self.unpadding:
            return (concatenate(parts),), self._replace(spans=spans)
        visible = self.visible_keys()
        assert visible is not None
        table = Unpadding.from_padding(~visible[:, 0, 0])
        fused = self._replace(spans=spans, unpadding=() if table is None else (table,))
        return fused.unpad((concatenate(self.pad(parts)),)), fused

    def select(self, parts: Parts, token: Literal["first", "last"]) -> tuple[Parts, Self]:
        """Lets the next block return only the first or last token of each modality."""
        indices: list[int] = []
        end = 0
        for _, length in self.modalities:
            start, end = end, end + length
            indices.append(start if token == "first" else end - 1)
        selection = tuple(
            tuple(index - start for index in indices if start <= index < start + length)
            for start, length in zip(self.starts, self.lengths, strict=True)
        )
        return self.pad(parts), self._replace(unpadding=(), selection=selection)

    def selected_indices(self) -> list[int]:
        """Returns the positions of the selected tokens in the whole sequence."""
        return [
            start + row
            for start, rows in zip(self.starts, self.selection, strict=True)
            for row in rows
        ]

    def without_unselected(self) -> Self:
        """Returns the layout of the selected tokens alone; itself where nothing is selected."""
        if not self.selection:
            return self
        spans = tuple(
            (expert, len(rows))
            for (expert, _), rows in zip(self.spans, self.selection, strict=True)
        )
        modalities = tuple((name, 1) for name, _ in self.modalities)
        return self._replace(spans=spans, modalities=modalities, padding=(), selection=())

    def keep_selected(self, parts: Parts) -> tuple[Parts, Self]:
        """Drops the tokens that are not selected; a no-op where nothing is."""
        if self.selection:
            parts = tuple(
                take(part, rows, 1) for part, rows in zip(parts, self.selection, strict=True)
            )
        return parts, self.without_unselected()

    def split_modalities(self, parts: Parts) -> Parts:
        """Returns one part [B, n, D] per modality, also of a fused sequence."""
        parts = self.pad(parts)
        if len(parts) == len(self.modalities):
            return parts
        return parts[0].split([length for _, length in self.modalities], 1)

    def scale_per_part(self, parts: Parts, per_sample: Tensor) -> Parts:
        """Returns one value per sample [B, 1, 1] in a shape that multiplies each part."""
        if not self.unpadding:
            return (per_sample,) * len(parts)
        return tuple(
            per_sample if table is None else table.repeat_per_token(per_sample)
            for table in self.unpadding
        )

    def count_samples(self, parts: Parts) -> int:
        """Returns B, also where the first part is unpadded."""
        table = next(filter(None, self.unpadding), None)
        return len(parts[0]) if table is None else len(table.sources)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Returns one tensor [B, N, ...] of all parts; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


def take(states: Tensor, positions: Sequence[int], dim: int) -> Tensor:
    """Returns the states at some positions of a dimension, in their order.

    A graph that is exported for any length knows a position as a formula, which no index takes.
    """
    if is_symbolic(positions):
        return torch.cat([states.narrow(dim, position, 1) for position in positions], dim)
    return states[(slice(None),) * dim + (list(positions),)]


def look_up(states: Tensor, rows: Tensor) -> Tensor:
    """Returns rows [...] of states [K, W] as [..., W].

    An embedding look-up, because its gradient costs less than that of an index.
    """
    return F.embedding(rows, states)
