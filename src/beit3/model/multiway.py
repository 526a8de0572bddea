"""Routing (paper section 2.1): one copy of a layer per expert, or one copy shared by all of them.

Every module here maps the parts of a sequence, given the name of each part's expert. The names are
an argument and never module state.
"""

from collections.abc import Callable

from torch import Tensor, nn

from beit3.model.layout import Parts


class Multiway(nn.Module):
    """One copy of a module per expert, each a child under the expert's name."""

    def __init__(self, make: Callable[[], nn.Module], experts: tuple[str, ...]):
        super().__init__()
        for expert in experts:
            self.add_module(expert, make())

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:
        """Maps each part [B, n, D] by the copy of its expert."""
        return tuple(
            self.get_submodule(expert)(part) for part, expert in zip(parts, experts, strict=True)
        )


class SharedLinear(nn.Linear):
    """One linear layer for the parts of all experts."""

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:  # type: ignore[override]
        return tuple(self.project(part) for part in parts)

    def project(self, part: Tensor) -> Tensor:
        """Maps one part [B, n, in] -> [B, n, out]."""
        return super().forward(part)


class SharedNorm(nn.LayerNorm):
    """One layer norm for the parts of all experts."""

    def forward(self, parts: Parts, experts: tuple[str, ...]) -> Parts:  # type: ignore[override]
        return tuple(super(SharedNorm, self).forward(part) for part in parts)


def make_linear(in_dim: int, out_dim: int, experts: tuple[str, ...], *, shared: bool) -> nn.Module:
    """Builds a linear layer with bias per expert, or one for all."""
    if shared:
        return SharedLinear(in_dim, out_dim)
    return Multiway(lambda: nn.Linear(in_dim, out_dim), experts)


def make_norm(dim: int, eps: float, experts: tuple[str, ...], *, shared: bool) -> nn.Module:
    """Builds a layer norm per expert, or one for all."""
    if shared:
        return SharedNorm(dim, eps=eps)
    return Multiway(lambda: nn.LayerNorm(dim, eps=eps), experts)
