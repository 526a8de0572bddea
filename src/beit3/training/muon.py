"""Muon for the matrices of the blocks and AdamW for everything else, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch

from beit3.recipe import OptimConfig

MOMENTUM = 0.95
"""Muon's own default; its other moments are AdamW's `betas`."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Updates its first groups by Muon and the others by AdamW.

    Muon (Jordan, 2024) makes the momentum of a matrix orthogonal before each step, so that
    directions with small gradients move as far as those with large ones. Its steps are scaled to
    the size of AdamW's (Liu et al., 2025, "Muon is Scalable for LLM Training", section 2.2), so
    that one learning rate serves both. Both parts work on this object's groups and state.
    """

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        config: OptimConfig,
    ):
        muon = torch.optim.Muon(
            matrices, lr=config.lr, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            others, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        muon.state = adamw.state = self.state
        self.parts = (muon, adamw)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates all parameters."""
        for part in self.parts:
            part.step()
