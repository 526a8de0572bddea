"""A small index of random vectors, and weights that encode any text or image in an instant."""

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from beit3.search.folder import write_shard
from beit3.search.manifest import Manifest, write_manifest
from beit3.search.query import Searcher
from beit3.search.stores.exact import ExactStore

DIM = 8
FINGERPRINT = {"task": "retrieval", "weights": "toy", "image": "toy", "text": "toy"}
MAX_TEXT_IDS = 8


def make_unit_vectors(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def encode(content: str) -> np.ndarray:
    """Returns the unit vector of a text, or of an image by its path."""
    rng = np.random.default_rng(zlib.crc32(content.encode()))
    return make_unit_vectors(rng, 1)[0]


class ToyPredictor:
    """Stands for loaded weights: a token for each word, and vectors by checksum."""

    def __init__(self, **fingerprint: str) -> None:
        self.fingerprint = FINGERPRINT | fingerprint
        self.task = SimpleNamespace(
            config=SimpleNamespace(text_length=MAX_TEXT_IDS),
            tokenizer=SimpleNamespace(encode=lambda text: ["<s>", *text.split(), "</s>"]),
        )
        self.num_encoded = 0

    def embed(self, images: Any = (), texts: Any = ()) -> dict[str, np.ndarray]:
        self.num_encoded += len(images) + len(texts)
        features = {"image": images, "text": texts}
        return {
            name: np.stack([encode(str(value)) for value in values])
            for name, values in features.items()
            if len(values)
        }


def write_index(
    folder: Path,
    vectors: np.ndarray,
    metadata: dict[str, Any],
    *,
    text_vectors: np.ndarray | None = None,
    dtype: str = "float32",
    image_root: str = "",
    **fingerprint: str,
) -> Path:
    """Writes an index of one shard."""
    by_modality = {"image": vectors}
    if text_vectors is not None:
        by_modality["text"] = text_vectors
    shard = write_shard(folder, 0, by_modality, pa.table(metadata), dtype=dtype)
    write_manifest(
        folder,
        Manifest(
            dim=vectors.shape[1],
            fingerprint=FINGERPRINT | fingerprint,
            weights="toy-weights",
            dtype=dtype,
            modalities=tuple(by_modality),
            image_root=image_root,
            shards=(shard,),
        ),
    )
    return folder


def make_searcher(
    folder: Path, vectors: np.ndarray, metadata: dict[str, Any], **options: Any
) -> Searcher:
    """Writes an index and returns its searcher."""
    fingerprint = {name: options[name] for name in options if name in FINGERPRINT}
    write_index(folder, vectors, metadata, **options)
    return Searcher(ExactStore(folder), ToyPredictor(**fingerprint))  # type: ignore[arg-type]
