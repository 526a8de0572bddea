"""Sizes and loss weights of the segmentation head, as plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadConfig:
    """Configures a Mask2Former head.

    The defaults are the original's (arXiv:2112.01527), for features of a base-sized trunk.
    """

    hidden_dim: int = 256
    """Width of pixel decoder, queries and masks; a multiple of 32."""
    num_heads: int = 8
    encoder_layers: int = 6
    """Deformable attention layers in the pixel decoder."""
    encoder_ffn: int = 1024
    """Inner width of the pixel decoder's feed-forward networks."""
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    """Inner width of the query decoder's feed-forward networks."""
    num_queries: int = 100
    no_object_weight: float = 0.1
    """Weight of the class "no object" in the class loss; every other class has 1."""
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    num_points: int = 12_544
    """Points at which a mask is compared with its target, 112 x 112."""
    oversample: float = 3.0
    """Candidate points per compared point, from which the least certain ones are selected."""
    importance: float = 0.75
    """Fraction of the points that are selected for uncertainty; the others are uniform."""
    checkpointing: bool = False
    """Whether every layer is recomputed in the backward pass."""

    def __post_init__(self) -> None:
        if self.hidden_dim < 1 or self.hidden_dim % 32 or self.hidden_dim % self.num_heads:
            raise ValueError(
                f"hidden_dim {self.hidden_dim}: give a multiple of 32 and of the {self.num_heads} "
                "heads"
            )
        for name in ("encoder_layers", "decoder_layers", "num_queries", "num_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give at least 1")
        if not 0 <= self.importance <= 1:
            raise ValueError(f"importance {self.importance}: give a fraction, 0 to 1")
        if self.oversample < 1:
            raise ValueError(f"oversample {self.oversample}: give at least 1")
        if not 0 < self.no_object_weight <= 1:
            raise ValueError(
                f"no_object_weight {self.no_object_weight}: give a number above 0, at most 1"
            )


SMALL_HEAD = HeadConfig()
LARGE_HEAD = HeadConfig(
    hidden_dim=1024, num_heads=32, encoder_ffn=4096, decoder_ffn=4096, num_queries=200
)
"""ViT-Adapter's head for BEiT-large and giant at 896 pixels."""
