"""What all networks of Multiway blocks share: the config, initial values, depths of parameters."""

import math

import torch
from torch import Tensor, nn

from beit3.model.config import ModelConfig
from beit3.ops.init import trunc_normal
from beit3.seeding import make_generator


class MultiwayBackbone(nn.Module):
    """Names its parameters `*_embedding.*`, `blocks.{i}.*`, and anything for what follows them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Sets initial values, each parameter from a generator of its own.

        So values depend on seed and name alone, not on the number of processes.

        | parameter                 | beit (paper, section 2.3)        | magneto (release)         |
        |---------------------------|----------------------------------|---------------------------|
        | norms; biases             | 1, 0; 0                          | 1, 0; 0                   |
        | mask, class token, tables | normal .02, cut at one deviation | the same                  |
        | qkv, out, fc1, fc2        | same; out, fc2 / sqrt(2 * layer) | Xavier; value, out, fc1,  |
        |                           |                                  | fc2 * sqrt(ln(2 * depth)) |

        `torch` has PyTorch's own values for patches, token table (normal 1) and blocks (uniform up
        to 1 / sqrt(inputs)), and beit's for everything else: tokens start as large as what
        the first block adds to them.
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Sets the initial values of the parameter of this name, by the table of `init_weights`."""
        config = self.config
        kind = name.rsplit(".", 1)[-1]
        if "norm" in name or kind == "bias":
            nn.init.constant_(parameter, float("norm" in name and kind == "weight"))
            return
        in_block = name.startswith("blocks.")
        if config.init == "torch" and (in_block or kind == "weight"):
            _init_like_torch(name, parameter, generator)
            return
        if config.init == "beit" or not in_block:
            trunc_normal(parameter, generator)
            if in_block and (".out." in name or ".fc2." in name):
                parameter.div_(math.sqrt(2 * self.layer_of(name)))
            return
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        gain = math.sqrt(math.log(2 * config.depth))
        if ".qkv." in name:
            for index, rows in enumerate(values.chunk(3)):
                is_value = index == 2
                nn.init.xavier_uniform_(rows, gain=gain if is_value else 1.0, generator=generator)
        else:
            nn.init.xavier_uniform_(values, gain=gain, generator=generator)
        parameter.copy_(values)

    def layer_of(self, name: str) -> int:
        """Returns a parameter's depth for layer-wise learning rates.

        0 for embeddings, 1 to `depth` for blocks, depth + 1 for the rest.
        """
        if "embedding." in name:
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.config.depth + 1


def _init_like_torch(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Writes PyTorch's initial values of a table of tokens, a convolution or a linear layer."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype)
    if name.endswith("tokens.weight"):
        values.normal_(generator=generator)
    else:
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    parameter.copy_(values)
