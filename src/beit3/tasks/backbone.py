"""BEiT-3 without a head: features of images, texts or pairs (paper figure 3), for search, for
probes, for other heads.

Nothing trains here. It is what a bare backbone loads into, and every released file whose own task
this version lacks.
Batches hold `image` [B, 3, H, W], uint8 or normalised, and/or `text` [B, L] with `text_padding` [B,
L]; both together are encoded as one
fused sequence, so for a dual encoder make one batch of each.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from beit3.images import open_image
from beit3.model.beit3 import BEiT3
from beit3.recipe import Recipe, TaskConfig
from beit3.task import Batch, Example, Prediction, Record, Task
from beit3.tokenizer.text import TextTokenizer


class Backbone(Task):
    """The network alone."""

    Config = TaskConfig
    recipes: ClassVar[Mapping[str, Recipe]] = {}
    sources = ()

    def __init__(self, config: TaskConfig, *, tokenizer: TextTokenizer | None = None):
        super().__init__(config, tokenizer=tokenizer)
        self.backbone = BEiT3(config.model)

    def record(self, image: Any = None, text: str | None = None) -> Record:
        """Raw inputs -> record: an image, a text or both; None or an empty string leaves one
        out."""
        given = {"image": image, "text": text}
        return {"id": "0"} | {
            name: value for name, value in given.items() if value not in (None, "")
        }

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """`image` uint8 [3, S, S], `text` and `text_padding` [L], of whatever the record holds."""
        example: Example = {"id": str(record["id"])}
        if "image" in record:
            example["image"] = self.config.image.preprocess(open_image(record["image"]))
        if "text" in record:
            example["text"], example["text_padding"] = self.tokenize_text(
                record["text"], self.config.text_length
            )
        return example

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """`tokens` [B, N, D], and its parts `image` [B, 1 + P, D] and `text` [B, L, D] as far as
        they are present."""
        image = self.normalize_images(batch) if "image" in batch else None
        encoded = self.backbone(image, batch.get("text"), text_padding=batch.get("text_padding"))
        return {"tokens": encoded.tokens} | {name: encoded.of(name) for name, _ in encoded.spans}

    def predict(self, batch: Batch) -> list[Prediction]:
        """`image`: the class token's feature, `text`: the begin mark's, each a list of D
        numbers."""
        outputs = self.outputs(batch)
        features = {
            name: outputs[name][:, 0].float().tolist()
            for name in ("image", "text")
            if name in outputs
        }
        return [
            {"id": key} | {name: rows[i] for name, rows in features.items()}
            for i, key in enumerate(batch["id"])
        ]
