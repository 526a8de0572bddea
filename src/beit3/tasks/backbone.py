"""BEiT-3 without a head: features of images, texts or pairs (paper figure 3).

They serve search, probes and other heads; nothing trains here. A bare backbone loads into this
task, and so does every released file whose own task this version lacks.

Batches hold `image` [B, 3, H, W], uint8 or normalized, and/or `text` [B, L] with `text_padding`
[B, L]. Both together are encoded as one fused sequence; for a dual encoder make a batch of each.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from beit3.images import open_image
from beit3.model.beit3 import BEiT3
from beit3.recipe import Recipe, TaskConfig
from beit3.task import Batch, Example, Prediction, Record, Task, make_record
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
        """Makes a record of an image, a text or both; None or an empty string leaves one out."""
        return make_record(image=image, text=text)

    def example(
        self, record: Record, train: bool, *, rng: np.random.Generator | None = None
    ) -> Example:
        """Returns what the record holds: `image` uint8 [3, S, S], `text` and `text_padding` [L]."""
        config = self.config
        example: Example = {"id": str(record["id"])}
        if "image" in record:
            example["image"] = config.image.preprocess(open_image(record["image"]))
        if "text" in record:
            text, padding = self.tokenize_text(record["text"], config.text_length)
            example["text"], example["text_padding"] = text, padding
        return example

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the states of all `tokens` [B, N, D], and by modality what is present of them.

        `image` is [B, 1 + P, D], class token first; `text` is [B, L, D], BOS first.
        """
        image = self.normalize_images(batch) if "image" in batch else None
        encoded = self.backbone(image, batch.get("text"), text_padding=batch.get("text_padding"))
        outputs = {"tokens": encoded.tokens}
        for name, _ in encoded.spans:
            outputs[name] = encoded.of(name)
        return outputs

    def predict(self, batch: Batch) -> list[Prediction]:
        """Returns the class token's state as `image` and that of BOS as `text`, lists of floats."""
        outputs = self.outputs(batch)
        predictions: list[Prediction] = [{"id": id} for id in batch["id"]]
        for modality in ("image", "text"):
            if modality in outputs:
                features = outputs[modality][:, 0].float().tolist()
                for prediction, feature in zip(predictions, features, strict=True):
                    prediction[modality] = feature
        return predictions
