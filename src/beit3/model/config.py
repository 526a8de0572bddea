"""The configuration of a BEiT-3 network, and the published sizes as constants.

Two published architectures differ in a few fields only. The released base and large models hold
every layer once per modality, with sub-LN and without a vision-language expert. The paper's giant
shares self-attention and has vision-language experts in its top three layers (section 2.1 and
table 2).

`TINY`, `SMALL` and `MEDIUM` are neither: they pair the paper's form with other initial values,
PyTorch's own and the release's (Magneto's).
"""

from dataclasses import dataclass, replace
from typing import Literal

IMAGE, TEXT = "image", "text"
"""The two published modalities. A modality's name is also the name of its expert."""

FUSION = "fusion"
"""The expert of sequences that hold several modalities (the paper's vision-language expert)."""

POSITION_OFFSET = 2
"""Rows of both position tables that are never read. Row 2 belongs to the class token or `<s>`."""


@dataclass(frozen=True)
class Modality:
    """One kind of input: it has an embedding and an expert, both under its name."""

    name: str
    """Its key in the arguments `inputs`, `masks` and `padding` of `BEiT3.forward`; also the name of
    its expert."""
    embedding: str
    """Dotted path of a subclass of `beit3.model.embeddings.Embedding`."""
    init_from: str = ""
    """Expert that this one copies where loaded weights lack it. Empty: it keeps initial values."""


IMAGE_MODALITY = Modality(IMAGE, "beit3.model.embeddings.ImageEmbedding")
TEXT_MODALITY = Modality(TEXT, "beit3.model.embeddings.TextEmbedding")


@dataclass(frozen=True)
class ModelConfig:
    """The network's hyperparameters. Widths are in units, sizes in pixels, lengths in tokens."""

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 64010
    text_positions: int = 1024
    """Rows of the text position table. Two are never read: a text has at most two tokens fewer."""
    shared_attention: bool = False
    """True: one set of query, key, value and output projections for all modalities (paper).
    False: one per modality (release)."""
    shared_norms: bool = False
    """True: one norm before attention and one final norm for all modalities. The norm before an
    expert is always per expert."""
    sub_ln: bool = True
    """Adds a norm before the output projection and one inside the feed-forward layers (Magneto)."""
    fusion_layers: int = 0
    """Number of top layers in which all tokens of a fused sequence use the fusion expert."""
    final_norm: bool = True
    """False for the released VQA and ImageNet models, whose heads norm the states themselves."""
    norm_eps: float = 1e-5
    drop_path_rate: float = 0.0
    """Stochastic depth rate of the last layer; it grows linearly from 0 at the first layer."""
    init: Literal["beit", "magneto", "torch"] = "magneto"
    """Scheme of the initial values, see `MultiwayBackbone.init_weights`."""
    modalities: tuple[Modality, ...] = (IMAGE_MODALITY, TEXT_MODALITY)
    """What the network can read, in the order in which a sequence holds them."""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 0 <= self.fusion_layers <= self.depth:
            raise ValueError(
                f"fusion_layers {self.fusion_layers} lies outside 0..depth {self.depth}"
            )
        names = self.modality_names
        if (
            len(set(names)) != len(names)
            or FUSION in names
            or not all(map(str.isidentifier, names))
        ):
            raise ValueError(
                f"modalities {', '.join(names)}: give each a name of its own, an identifier, "
                f"not {FUSION!r}"
            )

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Names of the modalities, in the order in which a sequence holds them."""
        return tuple(modality.name for modality in self.modalities)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the configured image size."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches of an image at the configured size, without the class token."""
        return self.grid[0] * self.grid[1]

    @property
    def max_text_length(self) -> int:
        """Number of tokens that the text position table has rows for."""
        return self.text_positions - POSITION_OFFSET

    @property
    def first_fusion_layer(self) -> int:
        """Index of the first layer with a fusion expert; `depth` where there is none."""
        return self.depth - self.fusion_layers

    @property
    def experts_per_layer(self) -> tuple[tuple[str, ...], ...]:
        """Names of the experts that each layer holds, first layer first."""
        names = self.modality_names
        return (names,) * self.first_fusion_layer + ((*names, FUSION),) * self.fusion_layers


TINY = ModelConfig(
    dim=128,
    depth=4,
    num_heads=4,
    ffn_dim=512,
    image_size=32,
    patch_size=8,
    vocab_size=512,
    text_positions=130,
    shared_attention=True,
    shared_norms=True,
    sub_ln=False,
    fusion_layers=1,
    init="torch",
)
"""The paper's architecture, small enough to train in minutes on a laptop. Its initial values are
PyTorch's, not BEiT's as in `GIANT`; at this size they learned faster (docs/decisions.md)."""

TINY_RELEASE = ModelConfig(
    dim=128,
    depth=4,
    num_heads=4,
    ffn_dim=512,
    image_size=32,
    patch_size=8,
    vocab_size=512,
    text_positions=130,
)
"""The released architecture at the size of `TINY`."""

SMALL = replace(
    TINY,
    init="magneto",
    dim=192,
    depth=6,
    num_heads=3,
    ffn_dim=768,
    image_size=112,
    patch_size=16,
    vocab_size=8010,
    text_positions=514,
)
"""The paper's architecture with Magneto's initial values, for photographs on a laptop; texts have
up to 512 tokens."""

MEDIUM = replace(
    TINY,
    init="magneto",
    dim=512,
    depth=12,
    num_heads=8,
    ffn_dim=2048,
    image_size=224,
    patch_size=16,
    vocab_size=16010,
    text_positions=514,
    fusion_layers=2,
)
"""The paper's architecture with Magneto's initial values at 224 pixels, for an hour of one large
GPU."""

BASE = ModelConfig()
"""Released base: 276.511M parameters with both pretraining heads."""

LARGE = ModelConfig(dim=1024, depth=24, num_heads=16, ffn_dim=4096)
"""Released large: 746.710M parameters with both pretraining heads."""

GIANT = ModelConfig(
    dim=1408,
    depth=40,
    num_heads=16,
    ffn_dim=6144,
    patch_size=14,
    shared_attention=True,
    shared_norms=True,
    sub_ln=False,
    fusion_layers=3,
    init="beit",
)
"""The paper's BEiT-3 (table 2): 692M vision, 692M language and 52M vision-language expert
parameters, 317M of shared attention."""
