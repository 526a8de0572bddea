"""ViT-Adapter (arXiv:2205.08534): turns a trunk of one stride into maps of four strides.

It takes images [B, 3, H, W] of any size and returns four maps [B, D, h, w] at `strides`, which are
4, 8, 16 and 32 for patches of 14 and 16. A convolutional prior and the trunk's blocks exchange
features in `num_interactions` rounds: an injector adds the prior to the trunk's states before each
group of blocks, and an extractor adds the trunk's states to the prior after it. The returned maps
are the prior's, with the trunk's states of four depths added. States of early blocks go to the
finest map, as in the adapter's release for BEiT. The trunk is an argument and belongs to the
caller.

Images are padded with zeros, at the bottom and on the right, to a multiple of the patch, and the
maps are those of the padded image. They are not cropped, because a cropped map would not end where
the image does: to draw a map over the image, enlarge it to `compute_padded_size` and crop that.
Grids may be odd: every map has its own shape, and each halving rounds up.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
"""Prior maps that interact with the trunk; the finest of the four is too long a sequence."""


@dataclass(frozen=True)
class AdapterConfig:
    """Configures the adapter. The defaults are ViT-Adapter's for its base and large models."""

    inplanes: int = 64
    """Channels of the prior at its first stride."""
    num_heads: int = 0
    """Heads of deformable attention; 0 = as many as the trunk has (12 for base and 16 for large,
    as published)."""
    num_points: int = 4
    """Locations that a head reads on each map."""
    deform_ratio: float = 0.5
    """Width of deformable attention's values, as a fraction of the trunk's."""
    ffn_ratio: float = 0.25
    """Inner width of the extractors' feed-forward networks, as a fraction of the trunk's."""
    num_interactions: int = 4
    num_extra_extractors: int = 2
    """Extractors after the last interaction."""
    drop_path_rate: float = 0.0
    """Fraction of samples that skip an extractor's feed-forward network, equal in all
    extractors."""
    gate_init: float = 0.0
    """Initial value of the gates. At 0, training starts from the trunk's own features.
    ViT-Adapter's BEiT models start at 1e-6."""
    recompute: bool = False
    """Whether prior, injectors and extractors are recomputed in the backward pass, which saves
    their activations."""


class ViTAdapter(nn.Module):
    """Holds everything of ViT-Adapter but the trunk."""

    def __init__(self, model: ModelConfig, config: AdapterConfig):
        super().__init__()
        check_adapter(model, config)
        self.config, self.patch_size = config, model.patch_size
        self.last_blocks = space_global_layers(model.depth, config.num_interactions)
        dim = model.dim

        def make_attention(num_maps: int) -> DeformableAttention:
            return DeformableAttention(
                dim,
                int(dim * config.deform_ratio),
                num_heads=config.num_heads or model.num_heads,
                num_maps=num_maps,
                num_points=config.num_points,
            )

        def make_extractor() -> Extractor:
            return Extractor(
                dim,
                make_attention(num_maps=1),
                ffn_dim=int(dim * config.ffn_ratio),
                drop_path_rate=config.drop_path_rate,
            )

        self.prior = SpatialPrior(dim, config.inplanes, model.patch_size)
        self.level_embedding = nn.Parameter(torch.zeros(NUM_PRIORS, dim))
        self.injectors = nn.ModuleList(
            Injector(dim, make_attention(num_maps=NUM_PRIORS)) for _ in self.last_blocks
        )
        self.extractors = nn.ModuleList(make_extractor() for _ in self.last_blocks)
        self.extra_extractors = nn.ModuleList(
            make_extractor() for _ in range(config.num_extra_extractors)
        )
        self.enlarge = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in self.strides)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the four maps, in pixels."""
        return self.prior.strides

    @property
    def state_indices(self) -> list[int]:
        """For each map, the interaction whose trunk states are added to it: 0, 1, 2, 3 where there
        are four interactions."""
        num_rounds, num_maps = len(self.last_blocks), len(self.strides)
        return [math.ceil(index * num_rounds / num_maps) - 1 for index in range(1, num_maps + 1)]

    def compute_padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of the padded image, which the maps cover."""
        return height + -height % self.patch_size, width + -width % self.patch_size

    def forward(self, image: Tensor, trunk: ImageTrunk) -> tuple[Tensor, ...]:
        """Returns four maps [B, D, h, w], finest first, of images [B, 3, H, W] of any size."""
        states, (finest, *priors) = self.interact(image, trunk)
        rows, columns = finest.shape[2:]
        maps = [finest + self.enlarge(priors[0])[:, :, :rows, :columns], *priors]
        return tuple(
            norm(feature_map + resize_states(states[index], feature_map))
            for norm, feature_map, index in zip(self.norms, maps, self.state_indices, strict=True)
        )

    def interact(self, image: Tensor, trunk: ImageTrunk) -> tuple[list[Tensor], list[Tensor]]:
        """Runs prior and trunk with their interactions.

        Args:
            image: [B, 3, H, W].
            trunk: The image trunk whose blocks are run.

        Returns:
            The trunk's states [B, h, w, D] after each interaction, through its final norm; and the
            prior's four maps [B, D, h, w], all but the finest with what they read from the trunk.
        """
        height, width = self.compute_padded_size(*image.shape[2:])
        image = F.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))
        finest, *maps = self._run(self.prior, image)
        states = trunk.embed(image)
        grid = states.shape[1:3]
        trunk_grids = Grids.from_shapes([(grid[0], grid[1])], image)
        prior_grids = Grids.from_shapes([(prior.shape[2], prior.shape[3]) for prior in maps], image)
        priors = maps_to_sequence(
            [
                prior + embedding[:, None, None]
                for prior, embedding in zip(maps, self.level_embedding, strict=True)
            ]
        )
        normed_states = []
        first_block = 0
        for last_block, injector, extractor in zip(
            self.last_blocks, self.injectors, self.extractors, strict=True
        ):
            states = self._run(injector, states.flatten(1, 2), trunk_grids, priors, prior_grids)
            states = states.unflatten(1, grid)
            for layer in range(first_block, last_block + 1):
                states = trunk.blocks[layer](states)
            priors = self._run(extractor, priors, prior_grids, states.flatten(1, 2), trunk_grids)
            normed_states.append(trunk.apply_final_norm(states))
            first_block = last_block + 1
        for extractor in self.extra_extractors:
            priors = self._run(extractor, priors, prior_grids, states.flatten(1, 2), trunk_grids)
        return normed_states, [finest, *sequence_to_maps(priors, prior_grids.shapes)]

    @torch.no_grad()
    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initializes the parameter of this name in place, as ViT-Adapter does.

        | parameter                          | values                                              |
        |------------------------------------|-----------------------------------------------------|
        | norms; other biases                | 1, 0; 0                                             |
        | gates; level embedding             | `gate_init`; normal 1                               |
        | attention's offsets; its weights   | 0, the bias in all directions around; 0             |
        | attention's value, out             | Xavier                                              |
        | convolutions                       | normal, sqrt(2 / number of outputs of an input)     |
        | other linear layers                | normal .02                                          |
        """
        path, _, kind = name.rpartition(".")
        parent_path, _, module_name = path.rpartition(".")
        module = self.get_submodule(path)
        values = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
        if kind == "gate":
            values.fill_(self.config.gate_init)
        elif kind == "level_embedding":
            values.normal_(generator=generator)
        elif kind == "bias":
            if module_name == "offsets":
                attention = self.get_submodule(parent_path)
                assert isinstance(attention, DeformableAttention)
                values.copy_(attention.make_initial_offsets())
        elif parameter.ndim == 1:
            values.fill_(1.0)  # a norm's weight
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            kernel_area = module.kernel_size[0] * module.kernel_size[1]
            fan_out = module.out_channels * kernel_area // module.groups
            values.normal_(0, (2 / fan_out) ** 0.5, generator=generator)
        elif module_name in ("value", "out"):
            nn.init.xavier_uniform_(values, generator=generator)
        elif module_name not in ("offsets", "weights"):
            values.normal_(0, 0.02, generator=generator)
        parameter.copy_(values)

    def reset_buffers(self) -> None:
        """Resets the running statistics of all batch norms.

        This is needed after a module built on the meta device was given memory.
        """
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()

    def _run(self, module: nn.Module, *inputs: Tensor | Grids) -> Tensor:
        """Calls a submodule; where the config says so, the backward pass recomputes it."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return module(*inputs)

        def make_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), preserve_buffers(module)

        return checkpoint(module, *inputs, use_reentrant=False, context_fn=make_contexts)


def resize_states(states: Tensor, like: Tensor) -> Tensor:
    """Resizes states [B, h, w, D] of the trunk to a map [B, D, H, W] of the size of `like`."""
    return F.interpolate(
        states.permute(0, 3, 1, 2), size=like.shape[2:], mode="bilinear", align_corners=False
    )


def check_adapter(model: ModelConfig, config: AdapterConfig) -> None:
    """Raises ValueError if an adapter of this config does not fit the trunk."""
    num_heads, inner_dim = config.num_heads or model.num_heads, model.dim * config.deform_ratio
    if inner_dim < num_heads or inner_dim % num_heads:
        raise ValueError(
            f"deform_ratio {config.deform_ratio} of dim {model.dim} is no multiple of num_heads "
            f"{num_heads}: change one of them"
        )
    if not 0 < config.num_interactions <= model.depth:
        raise ValueError(
            f"num_interactions {config.num_interactions} of a trunk of {model.depth} blocks: give "
            f"1 to {model.depth}"
        )
