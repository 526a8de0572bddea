"""What a BEiT-3 network is: one frozen dataclass, and the sizes as constants.

Two published architectures differ only in these fields. The released base and large models hold everything once per
modality, with sub-LN and no vision-language expert; the paper's giant shares self-attention and has vision-language
experts in its top three layers (section 2.1, table 2).
"""

from dataclasses import dataclass, replace
from typing import Literal

IMAGE, TEXT, FUSION = "image", "text", "fusion"
"""The three experts. The first two also name the modalities, from the batch key to the feed-forward network."""

POSITION_OFFSET = 2
"""Rows of both position tables that are never read: row 2 is the class token's and the first word's."""


@dataclass(frozen=True)
class ModelConfig:
    """Widths are in units, sizes in pixels, lengths in tokens."""

    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    ffn_dim: int = 3072
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 64010
    text_positions: int = 1024
    """Rows of the text position table; two of them are dead, so texts have at most `text_positions - 2` tokens."""
    shared_attention: bool = False
    """One set of query, key, value and output projections for all modalities (paper) or one per modality (release)."""
    shared_norms: bool = False
    """One norm before attention and one final norm for all modalities; the norm before an expert is always its own."""
    sub_ln: bool = True
    """An extra norm before the output projection and before the second feed-forward layer (Magneto)."""
    fusion_layers: int = 0
    """Top layers in which all tokens of a pair go through the vision-language expert."""
    final_norm: bool = True
    """The released VQA and ImageNet models have none: their heads norm the raw states."""
    norm_eps: float = 1e-5
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer; it grows linearly from 0 at the first."""
    init: Literal["beit", "magneto"] = "magneto"

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

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at the configured image size."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def max_text_length(self) -> int:
        """Tokens that the text position table can place."""
        return self.text_positions - POSITION_OFFSET

    def experts(self, layer: int) -> tuple[str, ...]:
        """Names of the experts that `layer` (0 = first) holds."""
        return (IMAGE, TEXT, FUSION) if layer >= self.depth - self.fusion_layers else (IMAGE, TEXT)


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
    init="magneto",
)
"""The paper's form at the size of a laptop's minute."""

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
"""The released form at the same size."""

SMALL = replace(
    TINY,
    dim=192,
    depth=6,
    num_heads=3,
    ffn_dim=768,
    image_size=112,
    patch_size=16,
    vocab_size=8010,
    text_positions=514,
    init="magneto",
)
"""The paper's form for real photographs on a laptop; texts of up to 512 tokens."""

MEDIUM = ModelConfig(
    dim=512,
    depth=12,
    num_heads=8,
    ffn_dim=2048,
    vocab_size=16010,
    text_positions=514,
    shared_attention=True,
    shared_norms=True,
    sub_ln=False,
    fusion_layers=2,
    init="magneto",
)
"""The paper's form at 224 pixels for an hour of one large GPU."""

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
"""The paper's BEiT-3 (table 2): 692M vision, 692M language, 52M vision-language experts, 317M shared attention."""
