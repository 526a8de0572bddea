"""What a pretrained network has learnt, beside the guesses that need no learning.

All figures are over held-out records, with the masks that evaluation always draws for them.
"""

import json
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
from beit3.task import Batch
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.training.embedded_world import prepare_embedded_world
from beit3.training.evaluate import evaluate, iterate_batches
from beit3.training.sources import open_source
from beit3.weights import loading
from beit3.world.scene import COLORS, SHAPES, SIZES

BATCH = 100


def attribute_ids(tokenizer: TextTokenizer) -> dict[str, list[int]]:
    """Token ids of the world's color, shape and size words; ValueError unless each word is one
    token."""
    kinds = {"color": COLORS, "shape": SHAPES, "size": SIZES}
    ids = {}
    for kind, words in kinds.items():
        pieces = [tokenizer.encode_pieces(f"a {word}")[1:] for word in words]
        if any(len(piece) != 1 for piece in pieces):
            raise ValueError(
                f"the text tokenizer cuts {kind} words into several tokens: train it with a "
                "larger vocabulary"
            )
        ids[kind] = [piece[0] for piece in pieces]
    return ids


@torch.no_grad()
def attribute_words(task: Pretrain, pairs: RecordDataset, *, limit: int = 1500) -> dict[str, float]:
    """Share of hidden attribute words filled correctly with the right image and with another
    record's.

    Keys `right`, `wrong`, `text_right`, `text_wrong` (mean paired text loss in nats), and per kind
    `right/color` ...
    """
    kinds = attribute_ids(task.tokenizer)
    hits: dict[str, list[float]] = {}
    for batch in iterate_batches(task, islice(pairs, limit), BATCH):
        hidden = batch["text_target"] != IGNORE_INDEX
        targets = batch["text_target"][hidden]
        shift = len(batch["id"]) // 2  # far enough that the other image is of another scene
        for name, image in (("right", batch["image"]), ("wrong", batch["image"].roll(shift, 0))):
            logits = task.text_head(task.encode(batch | {"image": image}).of("text")[hidden])
            hits.setdefault(f"text_{name}", []).extend(
                F.cross_entropy(logits, targets, reduction="none").tolist()
            )
            correct = logits.argmax(-1) == targets
            for kind, ids in kinds.items():
                chosen = correct[torch.isin(targets, torch.tensor(ids))].float().tolist()
                hits.setdefault(f"{name}/{kind}", []).extend(chosen)
                hits.setdefault(name, []).extend(chosen)
    return {name: float(np.mean(values)) for name, values in hits.items()}


@torch.no_grad()
def single_words(task: Pretrain, pairs: RecordDataset, *, limit: int = 1500) -> dict[str, float]:
    """The same with one attribute word of a caption hidden at a time and all else in sight.

    Keys `single_right/color`, `single_wrong/color`, and so on. Under the half-hidden captions of
    `attribute_words` the
    words that say which object is meant are often hidden too; here the picture alone can be at
    fault.
    """
    kinds = attribute_ids(task.tokenizer)
    kind_of = {token: kind for kind, ids in kinds.items() for token in ids}
    hits: dict[str, list[float]] = {
        f"single_{side}/{kind}": [] for kind in kinds for side in ("right", "wrong")
    }
    for batch in iterate_batches(task, islice(pairs, limit), BATCH):
        text = torch.where(
            batch["text_target"] == IGNORE_INDEX, batch["text"], batch["text_target"]
        )
        rows, places = torch.isin(text, torch.tensor(list(kind_of))).nonzero(as_tuple=True)
        truth, shift = text[rows, places], len(text) // 2
        hidden = text[rows].clone()
        hidden[torch.arange(len(rows)), places] = task.tokenizer.mask
        images = task.normalize_images(batch)
        for side, image in (("right", images), ("wrong", images.roll(shift, 0))):
            states = task.backbone(
                image[rows], hidden, text_padding=batch["text_padding"][rows]
            ).of("text")
            found = task.text_head(states[torch.arange(len(rows)), places]).argmax(-1)
            for token, correct in zip(truth.tolist(), (found == truth).tolist(), strict=True):
                hits[f"single_{side}/{kind_of[token]}"].append(float(correct))
    return {name: float(np.mean(values)) for name, values in hits.items()}


def hidden_patches(
    task: Pretrain, source: RecordDataset, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(codes [B, P], mask [B, P]) of a source's images."""
    for batch in iterate_batches(task, islice(source, limit), BATCH):
        yield task.compute_codes(batch), batch["image_mask"]


def nearest_visible(mask: np.ndarray) -> np.ndarray:
    """For a mask [h, w] the flat index of the nearest visible patch of every patch; ties go to the
    first in reading order."""
    places = np.argwhere(np.ones_like(mask))
    visible = np.argwhere(~mask)
    distance = ((places[:, None] - visible[None]) ** 2).sum(-1)
    return np.ravel_multi_index(tuple(visible[distance.argmin(1)].T), mask.shape)


@torch.no_grad()
def nearest_patch_guess(
    task: Pretrain, train: RecordDataset, held_out: RecordDataset, *, limit: int = 2000
) -> float:
    """Cross-entropy in nats of the best guess of a hidden patch's code from its nearest visible
    patch's code.

    The table P(code | nearest visible code) is counted on training images under the same masking,
    with add-half
    smoothing, and read on held-out ones.
    """
    num_codes, grid = task.config.num_codes, task.config.model.grid
    counts = np.full((num_codes, num_codes), 0.5)
    losses: list[np.ndarray] = []
    for source, count in ((train, True), (held_out, False)):
        for codes, mask in hidden_patches(task, source, limit):
            for row, hidden in zip(codes.numpy(), mask.numpy(), strict=True):
                near = row[nearest_visible(hidden.reshape(grid))][hidden]
                if count:
                    np.add.at(counts, (near, row[hidden]), 1)
                else:
                    losses.append(-np.log(counts[near, row[hidden]] / counts[near].sum(1)))
    return float(np.concatenate(losses).mean())


def frequency_guess(
    task: Pretrain, train: RecordDataset, held_out: RecordDataset, *, limit: int = 3000
) -> float:
    """Cross-entropy in nats of guessing hidden tokens by their frequency among the training texts'
    hidden tokens."""
    counts = np.full(task.config.model.vocab_size, 0.5)
    np.add.at(counts, hidden_tokens(task, train, limit), 1)
    return float(-np.log(counts / counts.sum())[hidden_tokens(task, held_out, limit)].mean())


def hidden_tokens(task: Pretrain, source: RecordDataset, limit: int) -> np.ndarray:
    """The true ids of all hidden tokens of a source."""
    found: list[Batch] = [task.example(record, False) for record in islice(source, limit)]
    targets = torch.cat([example["text_target"] for example in found])
    return targets[targets != IGNORE_INDEX].numpy()


def pretraining_figures(run: Path, *, cache: Path) -> dict[str, float]:
    """All figures of a pretraining run, computed once and kept in the JSON file `cache`."""
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
    scores = evaluate(task.eval(), held_out, batch_size=BATCH)
    figures = {
        "image_loss": scores["images/image_loss"],
        "image_accuracy": scores["images/image_accuracy"],
        "nearest_patch": nearest_patch_guess(task, train["images"], held_out["images"]),
        "text_loss": scores["texts/text_loss"],
        "frequency": frequency_guess(task, train["texts"], held_out["texts"]),
        **attribute_words(task, held_out["pairs"]),
        **single_words(task, held_out["pairs"]),
    }
    write_text(cache, json.dumps(figures, indent=1) + "\n")
    return figures
