"""Routing (paper section 2.1): which expert sees which tokens, decided by an argument and never by module state.

A sequence is a tuple of parts, one contiguous tensor [B, n, D] per span; `spans` names them in order, for example
`(("image", 197), ("text", 64))`. Because nothing is stored, one model may serve several threads, and activation
checkpointing recomputes with the experts of the first pass.
"""

from collections.abc import Callable

from torch import Tensor, nn

Parts = tuple[Tensor, ...]
"""The sequence, cut where the expert changes: one [B, n, D] per span; of padded texts the last may be flat (ragged.py)."""

Spans = tuple[tuple[str, int], ...]
"""(expert, number of tokens) for every part."""


class Multiway(nn.Module):
    """One copy of a module per expert, each a child under the expert's name."""

    def __init__(self, make: Callable[[], nn.Module], experts: tuple[str, ...]):
        super().__init__()
        for expert in experts:
            self.add_module(expert, make())

    def forward(self, parts: Parts, spans: Spans) -> Parts:
        return tuple(
            self.get_submodule(expert)(part) for part, (expert, _) in zip(parts, spans, strict=True)
        )


class SharedLinear(nn.Linear):
    """One linear layer for every part, whatever its expert."""

    def forward(self, parts: Parts, spans: Spans) -> Parts:  # type: ignore[override]
        return tuple(self.project(part) for part in parts)

    def project(self, part: Tensor) -> Tensor:
        """One part [B, n, in] -> [B, n, out]."""
        return super().forward(part)


class SharedNorm(nn.LayerNorm):
    """One layer norm for every part, whatever its expert."""

    def forward(self, parts: Parts, spans: Spans) -> Parts:  # type: ignore[override]
        return tuple(super(SharedNorm, self).forward(part) for part in parts)


def linear(in_dim: int, out_dim: int, experts: tuple[str, ...], *, shared: bool) -> nn.Module:
    """A linear layer with bias per expert, or one for all."""
    return (
        SharedLinear(in_dim, out_dim)
        if shared
        else Multiway(lambda: nn.Linear(in_dim, out_dim), experts)
    )


def norm(dim: int, eps: float, experts: tuple[str, ...], *, shared: bool) -> nn.Module:
    """A layer norm per expert, or one for all."""
    return (
        SharedNorm(dim, eps=eps)
        if shared
        else Multiway(lambda: nn.LayerNorm(dim, eps=eps), experts)
    )
