"""What every network of Multiway blocks has in common: its config, its initial values, and how deep a parameter lies."""

import math

import torch
from torch import Tensor, nn

from beit3.model.config import ModelConfig
from beit3.ops.init import trunc_normal
from beit3.seeding import make_generator


class Backbone(nn.Module):
    """Parameters are named `*_embedding.*`, `blocks.{i}.*`, and whatever else comes after the blocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initial values, each parameter from its own generator, so that they do not depend on the process count.

        | parameter                      | beit (paper, section 2.3)               | magneto (release)                     |
        |--------------------------------|-----------------------------------------|---------------------------------------|
        | norms; biases                  | 1, 0; 0                                 | 1, 0; 0                               |
        | mask and class token, tables   | normal .02 cut at one deviation         | the same                              |
        | qkv, out, fc1, fc2             | the same; out, fc2 / sqrt(2 * layer)    | Xavier; value, out, fc1, fc2 * sqrt(ln(2 * depth)) |
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The table of `init_weights`, for the parameter of this name."""
        config = self.config
        kind = name.rsplit(".", 1)[-1]
        if "norm" in name or kind == "bias":
            nn.init.constant_(parameter, float("norm" in name and kind == "weight"))
            return
        if config.init == "beit" or not name.startswith("blocks."):
            trunc_normal(parameter, generator)
            if name.startswith("blocks.") and (".out." in name or ".fc2." in name):
                parameter.div_(math.sqrt(2 * self.layer_of(name)))
            return
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        gain = math.sqrt(math.log(2 * config.depth))
        if ".qkv." in name:
            for index, rows in enumerate(values.chunk(3)):
                nn.init.xavier_uniform_(rows, gain=gain if index == 2 else 1.0, generator=generator)
        else:
            nn.init.xavier_uniform_(values, gain=gain, generator=generator)
        parameter.copy_(values)

    def layer_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embeddings, 1..depth blocks, depth + 1 the rest."""
        if "embedding." in name:
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.config.depth + 1
