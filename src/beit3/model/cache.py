"""The key-value cache of a growing sequence: an image and a prefix once, then a few tokens a call.

The cache belongs to the caller, never to the network, so one network decodes for several callers.
"""

from dataclasses import dataclass, field

from torch import Tensor

SPARE_TOKENS = 64
"""Tokens by which a full buffer grows. Growing copies the whole buffer, so it is done rarely."""


@dataclass
class LayerCache:
    """Keys and values [B, H, K, D/H] of the tokens that one layer has seen."""

    key: Tensor | None = None
    value: Tensor | None = None
    length: int = 0
    """K, the number of tokens held. The buffers may have room for more."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, H, n, D/H] of new tokens and returns those of all K."""
        start, self.length = self.length, self.length + key.shape[2]
        if self.key is None or self.value is None or self.length > self.key.shape[2]:
            self.key = self._grow(self.key, key, start)
            self.value = self._grow(self.value, value, start)
        self.key[:, :, start : self.length] = key
        self.value[:, :, start : self.length] = value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]

    def _grow(self, buffer: Tensor | None, like: Tensor, num_kept: int) -> Tensor:
        """Returns a buffer with room for `length` tokens and more, with the first ones copied."""
        batch, num_heads, _, head_dim = like.shape
        grown = like.new_empty(batch, num_heads, self.length + SPARE_TOKENS, head_dim)
        if buffer is not None:
            grown[:, :, :num_kept] = buffer[:, :, :num_kept]
        return grown


@dataclass
class Cache:
    """The caches of all layers, and what later calls need to know about the sequence.

    A later call brings text alone; `fused` remembers that the sequence holds other modalities too.
    """

    layers: list[LayerCache] = field(default_factory=list)
    fused: bool = False
    num_text: int = 0
    """Text tokens held."""

    def drop_last(self, count: int) -> None:
        """Forgets the last `count` text tokens, such as the [MASK] tokens of a decoding step."""
        self.num_text -= count
        for layer in self.layers:
            layer.length -= count
