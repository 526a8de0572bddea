"""The visual tokenizer VQ-KD (BEiT v2, section 3.1): one code per patch, learned from a teacher.

Images [B, 3, H, W], uint8 or floats in [0, 1], become codes [B, P] int64 in row-major order; codes
become features [B, P, F] in the teacher's space. H and W may be any multiples of the patch size:
positions are resampled.

Few images are too few to learn an encoder from. Then the encoder may be the pretrained teacher
itself, frozen: codebook and decoder are learned on its features, with the same losses. (HuBERT,
arXiv:2106.07447, likewise clusters the features of a network for its targets.)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from beit3.ops.precision import promote_to_float32
from beit3.seeding import make_generator
from beit3.tokenizer.efficientnet import EfficientNetLite0
from beit3.tokenizer.quantizer import Quantizer
from beit3.tokenizer.teacher import Teacher
from beit3.tokenizer.teacher_efficientnet import EFFICIENTNET_DIM, EfficientNetTeacher
from beit3.tokenizer.vit import Grid, ViT, ViTConfig, compute_patch_grid, to_unit_range


@dataclass(frozen=True)
class VisualTokenizerConfig:
    """Sizes. The published base tokenizer has 224, 16, 768, 12, 12, 3072, 3, 32, 8192, 512."""

    image_size: int
    """Pixels."""
    patch_size: int
    """Pixels."""
    dim: int
    """Width of encoder and decoder."""
    depth: int
    """Blocks of the encoder; 0 where it is EfficientNet."""
    num_heads: int
    ffn_dim: int
    decoder_depth: int
    """Blocks of the decoder."""
    code_dim: int
    num_codes: int
    teacher_dim: int
    """Channels of the teacher's features."""
    ln_eps: float = 1e-6
    revive_after: int = 0
    """Updates after which unused codes are replaced; 0, the paper's value, = never."""
    decay: float = 0.99
    beta: float = 1.0
    encoder_network: Literal["vit", "efficientnet"] = "vit"
    """VQ-KD's Vision Transformer, or the pretrained EfficientNet-Lite0, frozen."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} lies outside 0 <= decay < 1")
        if self.revive_after < 0:
            raise ValueError(
                f"revive_after {self.revive_after} is negative: "
                "give a number of updates, 0 for never"
            )
        if self.encoder_network == "efficientnet" and self.depth:
            raise ValueError(
                f"depth {self.depth}: the encoder efficientnet has blocks of its own, set it to 0"
            )

    @property
    def encoder_dim(self) -> int:
        """Channels of the encoder's states."""
        return self.dim if self.encoder_network == "vit" else EFFICIENTNET_DIM

    @property
    def encoder(self) -> ViTConfig:
        return ViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            dim=self.dim,
            depth=self.depth,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            ln_eps=self.ln_eps,
        )

    @property
    def decoder(self) -> ViTConfig:
        """The decoder's image is the map of quantized vectors, with patches of one vector."""
        return ViTConfig(
            image_size=self.image_size // self.patch_size,
            patch_size=1,
            dim=self.dim,
            depth=self.decoder_depth,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            in_channels=self.code_dim,
            ln_eps=self.ln_eps,
        )


class VisualTokenizer(nn.Module):
    """Encoder, quantizer and decoder, with two layers on either side of the codebook."""

    def __init__(self, config: VisualTokenizerConfig):
        super().__init__()
        self.config = config
        self.encoder = _make_encoder(config)
        self.to_code = _make_two_layers(config.encoder_dim, config.code_dim)
        self.quantizer = Quantizer(
            config.num_codes,
            config.code_dim,
            decay=config.decay,
            beta=config.beta,
            revive_after=config.revive_after,
        )
        self.decoder = ViT(config.decoder)
        self.to_feature = _make_two_layers(config.dim, config.teacher_dim)

    def forward(
        self, images: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features [B, P, F], the commitment loss and codes [B, P] of images.

        In train mode the codebook moves one step. `states` are the encoder's where they are known.
        """
        quantized, commitment, codes = self.quantizer(self.encode(images, states))
        grid = compute_patch_grid(images, self.config.patch_size)
        return self.decode(quantized, grid), commitment, codes

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Returns the codes [B, P] int64 of images; changes no state in any mode."""
        return self.quantizer.find_codes(self.encode(images))

    def encode(self, images: Tensor, states: Tensor | None = None) -> Tensor:
        """Returns the vectors [B, P, C] of images before quantization, in float32.

        `states` [B, P, D] are the encoder's where they are known.

        Raises ValueError for pixels outside [0, 1].
        """
        if states is None:
            states = self.compute_states(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.to_code(promote_to_float32(states))

    def compute_states(self, images: Tensor) -> Tensor:
        """Returns the encoder's states [B, P, D] of images."""
        if isinstance(self.encoder, Teacher):
            return self.encoder.extract_features(images)
        pixels = to_unit_range(images).to(self.encoder.patch.weight.dtype)
        return self.encoder(pixels * 2 - 1)[:, 1:]

    def decode(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        """Returns the features [B, P, F] of codes.

        Args:
            codes: Codes [B, P] int64, or quantized vectors [B, P, C].
            grid: Rows and columns of patches; by default a square.

        Raises:
            ValueError: P is not the product of rows and columns.
        """
        vectors = codes if codes.is_floating_point() else self.quantizer.codebook[codes]
        num_patches = vectors.shape[1]
        rows, columns = grid or (math.isqrt(num_patches), math.isqrt(num_patches))
        if rows * columns != num_patches:
            raise ValueError(
                f"{num_patches} codes do not fill a {rows} x {columns} grid: "
                "give its rows and columns"
            )
        code_map = vectors.transpose(1, 2).unflatten(2, (rows, columns))  # [B, C, rows, columns]
        states = self.decoder(code_map)  # [B, 1 + P, D]
        return self.to_feature(states[:, 1:])

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Sets BEiT's initial values, each parameter from a generator of its own.

        They depend on neither the number of processes nor the order of parameters.
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, make_generator(seed, name))
        self.quantizer.init_weights(make_generator(seed, "quantizer.codebook"))

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Sets norms to 1, biases to 0, and the rest to normal values of deviation .02.

        The two outputs of each block are divided by sqrt(2 * layer). Upstream cuts the normal
        distribution at +-2, which is 100 deviations, so not at all.
        """
        if "norm" in name or name.endswith("bias"):
            is_norm_weight = "norm" in name and name.endswith("weight")
            nn.init.constant_(parameter, float(is_norm_weight))
            return
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        parameter.copy_(values.normal_(std=0.02, generator=generator))
        if name.endswith((".attention.out.weight", ".ffn.fc2.weight")):
            layer = int(name.split(".")[2]) + 1
            parameter.div_(math.sqrt(2 * layer))


def _make_encoder(config: VisualTokenizerConfig) -> ViT | EfficientNetTeacher:
    if config.encoder_network == "vit":
        return ViT(config.encoder)
    return EfficientNetTeacher(EfficientNetLite0(), patch_size=config.patch_size)


def _make_two_layers(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, out_dim))
