"""Heads that the release puts on the backbone's states, for VQA and NLVR2. D: backbone width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pooler(nn.Module):
    """Norm, linear and tanh on the class token's state: [B, D] -> [B, D]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dense = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(states)))


class AnswerHead(nn.Sequential):
    """Two linear layers with norm and GELU between them: [B, D] -> logits [B, A]."""

    def __init__(self, dim: int, num_answers: int, eps: float):
        super().__init__(
            nn.Linear(dim, 2 * dim),
            nn.LayerNorm(2 * dim, eps=eps),
            nn.GELU(),
            nn.Linear(2 * dim, num_answers),
        )


class TwoPairHead(nn.Module):
    """Norm, linear, norm, GELU and linear on four states of two pairs: [B, 4D] -> logits [B, 2]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(4 * dim, eps=eps)
        self.dense1 = nn.Linear(4 * dim, 2 * dim)
        self.norm2 = nn.LayerNorm(2 * dim, eps=eps)
        self.dense2 = nn.Linear(2 * dim, 2)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.dense1(self.norm1(states))
        return self.dense2(F.gelu(self.norm2(hidden)))
