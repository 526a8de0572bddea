"""ViT-Adapter (arXiv:2205.08534): a trunk of one stride gains maps of four, at any image size.

A convolutional prior and the trunk's blocks talk in `num_interactions` rounds: before each group of
blocks an injector
reads the prior into the trunk, after it an extractor reads the trunk into the prior. Images [B, 3,
H, W] -> four maps
[B, D, h, w] at `strides`, 4/8/16/32 for patches of 14 and 16: the prior's, with the trunk's states
of four depths added, those
of early blocks to the finest, as its release for BEiT does. The trunk is an argument and belongs to
the caller.

Sizes: images are filled up with zeros, at the bottom and on the right, to a multiple of the patch,
and the maps are those
of the filled-up image. Cropped maps would not end where the image does; so who makes a picture of
them enlarges to
`padded_size` and crops that. Grids may be odd: every map carries its own shape, and each halving
rounds up.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from beit3.model.config import ModelConfig
from beit3.model.trunk import ImageTrunk, space_global_layers
from beit3.ops.deformable import Grids
from beit3.segmentation.interaction import (
    DeformableAttention,
    Extractor,
    Injector,
    maps_to_sequence,
    sequence_to_maps,
)
from beit3.segmentation.prior import SpatialPrior, preserve_buffers

NUM_PRIORS = 3
"""Maps that talk with the trunk; the finest of the four is too long a sequence."""


@dataclass(frozen=True)
class AdapterConfig:
    """Defaults are ViT-Adapter's for its base and large models."""

    inplanes: int = 64
    """Channels of the prior at its first stride."""
    num_heads: int = 0
    """Of deformable attention; 0 = as many as the trunk has (12 for base and 16 for large, as
    published)."""
    num_points: int = 4
    """Places that a head reads of each map."""
    deform_ratio: float = 0.5
    """Width of deformable attention's values, of the trunk's."""
    ffn_ratio: float = 0.25
    """Inner width of the extractors' feed-forward networks, of the trunk's."""
    num_interactions: int = 4
    num_extra_extractors: int = 2
    """After the last interaction."""
    drop_path_rate: float = 0.0
    """Share of samples for which an extractor's feed-forward network is left out, alike in all
    extractors."""
    gate_init: float = 0.0
    """0: training starts from the trunk's own features. ViT-Adapter's BEiT models start at 1e-6."""
    recompute: bool = False
    """Compute prior, injectors and extractors again in the backward pass instead of keeping what is
    in them."""


class ViTAdapter(nn.Module):
    """Everything beside the trunk. `strides` of the four maps, in pixels."""

    def __init__(self, model: ModelConfig, config: AdapterConfig):
        super().__init__()
        check(model, config)
        self.config, self.patch_size = config, model.patch_size
        self.stops = space_global_layers(model.depth, config.num_interactions)
        dim, inner = model.dim, int(model.dim * config.deform_ratio)
        attend = partial(
            DeformableAttention,
            dim,
            inner,
            num_heads=config.num_heads or model.num_heads,
            num_points=config.num_points,
        )

        def extractor() -> Extractor:
            attention = attend(num_maps=1)
            return Extractor(
                dim,
                attention,
                ffn_dim=int(dim * config.ffn_ratio),
                drop_path_rate=config.drop_path_rate,
            )

        self.prior = SpatialPrior(dim, config.inplanes, model.patch_size)
        self.level_embedding = nn.Parameter(torch.zeros(NUM_PRIORS, dim))
        self.injectors = nn.ModuleList(
            Injector(dim, attend(num_maps=NUM_PRIORS)) for _ in self.stops
        )
        self.extractors = nn.ModuleList(extractor() for _ in self.stops)
        self.extra_extractors = nn.ModuleList(
            extractor() for _ in range(config.num_extra_extractors)
        )
        self.enlarge = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in self.strides)

    @property
    def strides(self) -> tuple[int, ...]:
        return self.prior.strides

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Of the filled-up image that the maps are of."""
        return height + -height % self.patch_size, width + -width % self.patch_size

    def forward(self, image: Tensor, trunk: ImageTrunk) -> tuple[Tensor, ...]:
        """Four maps [B, D, h, w], finest first, of images [B, 3, H, W] of any size."""
        states, (finest, *priors) = self.interact(image, trunk)
        rows, columns = finest.shape[2:]
        maps = [finest + self.enlarge(priors[0])[:, :, :rows, :columns], *priors]
        sums = [
            each + resized(states[depth], each)
            for each, depth in zip(maps, self.depths, strict=True)
        ]
        return tuple(norm(each) for norm, each in zip(self.norms, sums, strict=True))

    @property
    def depths(self) -> list[int]:
        """After which interaction the trunk's states are added to each map: 0, 1, 2, 3 where there
        are four interactions."""
        rounds, maps = len(self.stops), len(self.strides)
        return [math.ceil(place * rounds / maps) - 1 for place in range(1, maps + 1)]

    def interact(self, image: Tensor, trunk: ImageTrunk) -> tuple[list[Tensor], list[Tensor]]:
        """The trunk's states [B, h, w, D] after each interaction, through its final norm, and the
        prior's four maps with what they
        took from it (all but the finest)."""
        height, width = self.padded_size(*image.shape[2:])
        image = F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))
        finest, *maps = self._run(self.prior, image)
        states = trunk.embed(image)
        grid = states.shape[1:3]
        here, there = (
            Grids.of([(grid[0], grid[1])], image),
            Grids.of([(each.shape[2], each.shape[3]) for each in maps], image),
        )
        embedded = [
            each + level[:, None, None]
            for each, level in zip(maps, self.level_embedding, strict=True)
        ]
        priors, start, found = maps_to_sequence(embedded), 0, []
        for stop, injector, extractor in zip(
            self.stops, self.injectors, self.extractors, strict=True
        ):
            states = self._run(injector, states.flatten(1, 2), here, priors, there).unflatten(
                1, grid
            )
            for layer in range(start, stop + 1):
                states = trunk.blocks[layer](states)
            priors, start = (
                self._run(extractor, priors, there, states.flatten(1, 2), here),
                stop + 1,
            )
            found.append(trunk.apply_final_norm(states))
        for extractor in self.extra_extractors:
            priors = self._run(extractor, priors, there, states.flatten(1, 2), here)
        return found, [finest, *sequence_to_maps(priors, there.shapes)]

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initial values of the parameter of this name, as ViT-Adapter has them.

        | parameter                             | values                                           |
        |---------------------------------------|--------------------------------------------------|
        | norms; other biases                   | 1, 0; 0                                          |
        | gates; level embedding                | `gate_init`; normal 1                            |
        | attention's offsets; its weights      | 0, the bias in all directions around; 0          |
        | attention's value, out                | Xavier                                           |
        | convolutions                          | normal, sqrt(2 / outputs that one input reaches) |
        | other linear layers                   | normal .02                                       |
        """
        path, _, kind = name.rpartition(".")
        layer, part = self.get_submodule(path), path.rpartition(".")[2]
        values = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
        if kind == "gate":
            values.fill_(self.config.gate_init)
        elif kind == "level_embedding":
            values.normal_(generator=generator)
        elif kind == "bias":
            if part == "offsets":
                attention = self.get_submodule(path.rpartition(".")[0])
                assert isinstance(attention, DeformableAttention)
                values.copy_(attention.directions())
        elif parameter.ndim == 1:
            values.fill_(1.0)  # a norm's weight
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            reached = (
                layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1] // layer.groups
            )
            values.normal_(0, (2 / reached) ** 0.5, generator=generator)
        elif part in ("value", "out"):
            nn.init.xavier_uniform_(values, generator=generator)
        elif part not in ("offsets", "weights"):
            values.normal_(0, 0.02, generator=generator)
        parameter.copy_(values)

    def reset_buffers(self) -> None:
        """Running statistics of no image yet; needed after memory was given to what was built on
        meta."""
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()

    def _run(self, part: nn.Module, *inputs: Tensor | Grids) -> Tensor:
        """A part's result, recomputed in the backward pass where the config says so."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return part(*inputs)
        contexts: Callable = lambda: (nullcontext(), preserve_buffers(part))  # noqa: E731
        return checkpoint(part, *inputs, use_reentrant=False, context_fn=contexts)


def resized(states: Tensor, like: Tensor) -> Tensor:
    """States [B, h, w, D] of the trunk as a map [B, D, H, W] of the size of `like`."""
    return F.interpolate(
        states.permute(0, 3, 1, 2), size=like.shape[2:], mode="bilinear", align_corners=False
    )


def check(model: ModelConfig, config: AdapterConfig) -> None:
    """ValueError where an adapter does not fit its trunk."""
    heads, inner = config.num_heads or model.num_heads, model.dim * config.deform_ratio
    if inner < heads or inner % heads:
        raise ValueError(
            f"deform_ratio {config.deform_ratio} of dim {model.dim} is no multiple of num_heads "
            f"{heads}: change one of them"
        )
    if not 0 < config.num_interactions <= model.depth:
        raise ValueError(
            f"num_interactions {config.num_interactions} of a trunk of {model.depth} blocks: give "
            f"1 to {model.depth}"
        )
