"""The visual tokenizer, VQ-KD (BEiT v2, section 3.1): an image -> a code per patch that stands for a teacher's feature.

Shapes: images [B, 3, H, W], pixels in [0, 1] or uint8 -> codes [B, P] int64, row-major; codes -> features [B, P, F] in
the teacher's space. H and W are any multiples of the patch size: positions are resampled.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit3.ops.precision import at_least_float32
from beit3.seeding import make_generator
from beit3.tokenizer.quantizer import Quantizer
from beit3.tokenizer.vit import Grid, ViT, ViTConfig, patch_grid, unit_pixels


@dataclass(frozen=True)
class VisualTokenizerConfig:
    """Sizes; the published base tokenizer is 224, 16, 768, 12, 12, 3072, 3, 32, 8192, 512."""

    image_size: int
    patch_size: int
    dim: int
    """Width of encoder and decoder."""
    depth: int
    num_heads: int
    ffn_dim: int
    decoder_depth: int
    code_dim: int
    num_codes: int
    teacher_dim: int
    ln_eps: float = 1e-6
    revive_after: int = 0
    """Updates after which unused codes are replaced; 0, the paper's, never."""
    decay: float = 0.99
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} lies outside 0 <= decay < 1")
        if self.revive_after < 0:
            raise ValueError(
                f"revive_after {self.revive_after} is negative: give a number of updates, 0 for never"
            )

    @property
    def encoder(self) -> ViTConfig:
        return ViTConfig(
            self.image_size,
            self.patch_size,
            self.dim,
            self.depth,
            self.num_heads,
            self.ffn_dim,
            ln_eps=self.ln_eps,
        )

    @property
    def decoder(self) -> ViTConfig:
        """Its image is the map of quantised vectors, its patch one of them."""
        side = self.image_size // self.patch_size
        return ViTConfig(
            side,
            1,
            self.dim,
            self.decoder_depth,
            self.num_heads,
            self.ffn_dim,
            self.code_dim,
            self.ln_eps,
        )


class VisualTokenizer(nn.Module):
    """Parts: `encoder`, `to_code`, `quantizer`, `decoder`, `to_feature`."""

    def __init__(self, config: VisualTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = ViT(config.encoder)
        self.to_code = _two_layers(config.dim, config.code_dim)
        self.quantizer = Quantizer(
            config.num_codes,
            config.code_dim,
            decay=config.decay,
            beta=config.beta,
            revive_after=config.revive_after,
        )
        self.decoder = ViT(config.decoder)
        self.to_feature = _two_layers(config.dim, config.teacher_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> (features [B, P, F], commitment, codes [B, P]); in train mode the codebook moves one step."""
        quantised, commitment, codes = self.quantizer(self.encode(images))
        return self.decode(quantised, patch_grid(images, self.config.patch_size)), commitment, codes

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """Images -> codes [B, P] int64. Changes no state, in train mode too."""
        return self.quantizer.codes(self.encode(images))

    def encode(self, images: Tensor) -> Tensor:
        """Images -> vectors [B, P, C] before quantisation, float32. ValueError for pixels outside [0, 1]."""
        pixels = unit_pixels(images).to(self.encoder.patch.weight.dtype)
        states = self.encoder(pixels * 2 - 1)[:, 1:]
        with torch.autocast(images.device.type, enabled=False):
            return self.to_code(at_least_float32(states))

    def decode(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """Codes [B, P] int64, or quantised vectors [B, P, C], -> features [B, P, F].

        `grid` is (rows, columns) of the patches, by default a square. ValueError where P is not their product.
        """
        vectors = codes if codes.is_floating_point() else self.quantizer.codebook[codes]
        rows, columns = grid or (math.isqrt(vectors.shape[1]),) * 2
        if rows * columns != vectors.shape[1]:
            raise ValueError(
                f"{vectors.shape[1]} codes do not fill a {rows} x {columns} grid: give its rows and columns"
            )
        states = self.decoder(
            vectors.transpose(1, 2).unflatten(2, (rows, columns))
        )  # [B, 1 + P, D]
        return self.to_feature(states[:, 1:])

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """BEiT's initial values, each parameter from its own generator: no process or order changes them."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))
        self.quantizer.init_weights(make_generator(seed, "quantizer.codebook"))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Norms 1, biases 0, the rest normal .02; each block's two outputs divided by sqrt(2 * layer).

        The tokenizer's official file cuts the normal at +-2, so 100 deviations: not at all.
        """
        if "norm" in name or name.endswith("bias"):
            nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
            return
        parameter.copy_(
            torch.empty(parameter.shape, dtype=parameter.dtype).normal_(
                std=0.02, generator=generator
            )
        )
        if name.endswith((".attention.out.weight", ".ffn.fc2.weight")):
            parameter.div_(math.sqrt(2 * (int(name.split(".")[2]) + 1)))


def _two_layers(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out))
