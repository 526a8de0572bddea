"""Measures of what a pretrained network has learned, and of guesses that need no learning.

All numbers are over held-out records, with the masks that evaluation always draws for them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.data.loader import RecordDataset
from beit3.data.views.masking import IGNORE_INDEX
from beit3.files import read_json, write_text
from beit3.recipe import Recipe
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import evaluate, iterate_batches
from beit3.training.sources import open_source
from beit3.weights import loading
from beit3.world.scene import COLORS, SHAPES, SIZES

BATCH_SIZE = 100


# Words that need the image ------------------------------------------------------------------------


def find_attribute_ids(tokenizer: TextTokenizer) -> dict[str, list[int]]:
    """Returns the token ids of the world's color, shape and size words, by kind.

    Raises ValueError unless each word is one token.
    """
    attributes = {"color": COLORS, "shape": SHAPES, "size": SIZES}
    ids = {}
    for kind, words in attributes.items():
        word_ids = [tokenizer.encode_pieces(f"a {word}")[1:] for word in words]
        if any(len(pieces) != 1 for pieces in word_ids):
            raise ValueError(
                f"the text tokenizer splits {kind} words into several tokens: train it with a "
                "larger vocabulary"
            )
        ids[kind] = [pieces[0] for pieces in word_ids]
    return ids


@torch.no_grad()
def measure_attributes(
    task: Pretrain, pairs: RecordDataset, *, limit: int = 1500
) -> dict[str, float]:
    """Returns the accuracy of masked attribute words with the right image and with another
    record's.

    The keys are `right/color`, `wrong/color` and so on for each kind, `right` and `wrong` for all
    kinds, and `text_right` and `text_wrong`, the mean paired text loss in nats.
    """
    attribute_ids = find_attribute_ids(task.tokenizer)
    values: dict[str, list[float]] = defaultdict(list)
    for batch in iterate_batches(task, islice(pairs, limit), BATCH_SIZE):
        masked = batch["text_target"] != IGNORE_INDEX
        targets = batch["text_target"][masked]
        shift = len(batch["id"]) // 2  # so many records on, the image shows another scene
        for side, image in (("right", batch["image"]), ("wrong", batch["image"].roll(shift, 0))):
            logits = task.text_head(task.encode(batch | {"image": image}).of("text")[masked])
            values[f"text_{side}"] += F.cross_entropy(logits, targets, reduction="none").tolist()
            is_correct = logits.argmax(-1) == targets
            for kind, ids in attribute_ids.items():
                hits = is_correct[torch.isin(targets, torch.tensor(ids))].float().tolist()
                values[f"{side}/{kind}"] += hits
                values[side] += hits
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


@torch.no_grad()
def measure_single_attributes(
    task: Pretrain, pairs: RecordDataset, *, limit: int = 1500
) -> dict[str, float]:
    """Returns the accuracy of attribute words that are masked one at a time, all else visible.

    The keys are `single_right/color`, `single_wrong/color`, and so on. In the half-masked captions
    of `measure_attributes` the words that tell which object is meant are often masked too; with
    one masked word, errors come from the image alone.
    """
    attribute_ids = find_attribute_ids(task.tokenizer)
    kind_of_id = {token: kind for kind, ids in attribute_ids.items() for token in ids}
    hits: dict[str, list[float]] = {
        f"single_{side}/{kind}": [] for kind in attribute_ids for side in ("right", "wrong")
    }
    for batch in iterate_batches(task, islice(pairs, limit), BATCH_SIZE):
        is_visible = batch["text_target"] == IGNORE_INDEX
        text = torch.where(is_visible, batch["text"], batch["text_target"])
        is_attribute = torch.isin(text, torch.tensor(list(kind_of_id)))
        rows, positions = is_attribute.nonzero(as_tuple=True)
        examples = torch.arange(len(rows))
        targets = text[rows, positions]
        masked_text = text[rows].clone()
        masked_text[examples, positions] = task.tokenizer.mask
        padding = batch["text_padding"][rows]
        images, shift = task.normalize_images(batch), len(text) // 2
        for side, image in (("right", images), ("wrong", images.roll(shift, 0))):
            output = task.backbone(image[rows], masked_text, text_padding=padding)
            states = output.of("text")[examples, positions]
            is_correct = task.text_head(states).argmax(-1) == targets
            for token, correct in zip(targets.tolist(), is_correct.tolist(), strict=True):
                hits[f"single_{side}/{kind_of_id[token]}"].append(float(correct))
    return {name: float(np.mean(numbers)) for name, numbers in hits.items()}


# Guesses without learning -------------------------------------------------------------------------


def compute_nearest_patch_loss(
    task: Pretrain, train: RecordDataset, held_out: RecordDataset, *, limit: int = 2000
) -> float:
    """Returns the loss, in nats, of the best guess of a masked patch's code from the code of its
    nearest visible patch.

    The table P(code | nearest visible code) is counted on training images under the same masking,
    with add-half smoothing, and evaluated on held-out images.
    """
    num_codes = task.config.num_codes
    counts = np.full((num_codes, num_codes), 0.5)
    for masked_codes, nearest_codes in iterate_nearest_codes(task, train, limit):
        np.add.at(counts, (nearest_codes, masked_codes), 1)
    losses = []
    for masked_codes, nearest_codes in iterate_nearest_codes(task, held_out, limit):
        probabilities = counts[nearest_codes, masked_codes] / counts[nearest_codes].sum(1)
        losses.append(-np.log(probabilities))
    return float(np.concatenate(losses).mean())


def iterate_nearest_codes(
    task: Pretrain, source: RecordDataset, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each image the codes of its masked patches, and those of their nearest visible
    patches."""
    for batch_codes, batch_masks in iterate_codes(task, source, limit):
        for codes, mask in zip(batch_codes.numpy(), batch_masks.numpy(), strict=True):
            nearest = find_nearest_visible(mask.reshape(task.config.model.grid))
            yield codes[mask], codes[nearest][mask]


def iterate_codes(
    task: Pretrain, source: RecordDataset, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields codes [B, P] and masks [B, P] of a source's images."""
    for batch in iterate_batches(task, islice(source, limit), BATCH_SIZE):
        yield task.compute_codes(batch), batch["image_mask"]


def find_nearest_visible(mask: np.ndarray) -> np.ndarray:
    """Returns the flat index of the nearest visible patch of every patch of a mask [h, w].

    Ties go to the first in reading order.
    """
    patches = np.argwhere(np.ones_like(mask))
    visible = np.argwhere(~mask)
    distances = ((patches[:, None] - visible[None]) ** 2).sum(-1)
    return np.ravel_multi_index(tuple(visible[distances.argmin(1)].T), mask.shape)


def compute_frequency_loss(
    task: Pretrain, train: RecordDataset, held_out: RecordDataset, *, limit: int = 3000
) -> float:
    """Returns the loss, in nats, of guessing masked tokens by their frequency among the masked
    tokens of the training texts."""
    counts = np.full(task.config.model.vocab_size, 0.5)
    np.add.at(counts, collect_masked_tokens(task, train, limit), 1)
    losses = -np.log(counts / counts.sum())
    return float(losses[collect_masked_tokens(task, held_out, limit)].mean())


def collect_masked_tokens(task: Pretrain, source: RecordDataset, limit: int) -> np.ndarray:
    """Returns the true ids of all masked tokens of a source."""
    examples = [task.example(record, False) for record in islice(source, limit)]
    targets = torch.cat([example["text_target"] for example in examples])
    return targets[targets != IGNORE_INDEX].numpy()


# All together -------------------------------------------------------------------------------------


def measure_pretraining(run: Path, *, cache: Path) -> dict[str, float]:
    """Returns all numbers of a pretraining run, which are kept in the JSON file `cache`."""
    if cache.exists():
        return read_json(cache)
    task = loading.load_weights(run / "last")
    assert isinstance(task, Pretrain)
    recipe = Recipe.from_dict(read_json(run / "recipe.json")["recipe"], PretrainConfig)
    root = Path(recipe.data.root) if recipe.data.root else prepare_embedded_world(Pretrain)
    train, held_out = (
        {name: open_source(root, Pretrain, name, recipe, split) for name in Pretrain.sources}
        for split in ("train", "val")
    )
    scores = evaluate(task.eval(), held_out, batch_size=BATCH_SIZE)
    measures = {
        "image_loss": scores["images/image_loss"],
        "image_accuracy": scores["images/image_accuracy"],
        "nearest_patch": compute_nearest_patch_loss(task, train["images"], held_out["images"]),
        "text_loss": scores["texts/text_loss"],
        "frequency": compute_frequency_loss(task, train["texts"], held_out["texts"]),
        **measure_attributes(task, held_out["pairs"]),
        **measure_single_attributes(task, held_out["pairs"]),
    }
    write_text(cache, json.dumps(measures, indent=1) + "\n")
    return measures
