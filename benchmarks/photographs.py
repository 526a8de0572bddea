"""What `pretrain laptop` learned from photographs, books and captions, beside simple guesses.

    python benchmarks/photographs.py runs/laptop --out benchmarks/photographs.json

It uses held-out records under the masks of evaluation. Masked tokens of captions are predicted with
their own image and with each of `OTHERS` other images. The spread is over images, all captions of
one together, because captions of one image are not independent.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from beit3.demo.probes import BATCH, frequency_guess, nearest_patch_guess
from beit3.files import write_text
from beit3.recipe import Recipe
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain, PretrainConfig
from beit3.training.evaluate import evaluate, iterate_batches
from beit3.training.sources import open_source
from beit3.weights import loading

OTHERS = 5
"""Other pictures that every caption is read with."""
WORDS = 8
"""Words shown whose loss falls most with the right picture, of those hidden at least `SEEN`
times."""
SEEN = 12


def figures(run: Path) -> dict:
    """All figures of a run of `pretrain` over images, texts and pairs."""
    task = loading.load_weights(run / "last")
    assert isinstance(task, Pretrain)
    recipe = Recipe.from_dict(
        json.loads((run / "recipe.json").read_text())["recipe"], PretrainConfig
    )
    root = Path(recipe.data.root)
    train, held_out = (
        {n: open_source(root, Pretrain, n, recipe, split) for n in Pretrain.sources}
        for split in ("train", "val")
    )
    scores = evaluate(task.eval(), held_out, batch_size=BATCH)
    return {
        "image_loss": scores["images/image_loss"],
        "image_accuracy": scores["images/image_accuracy"],
        "nearest_patch": nearest_patch_guess(task, train["images"], held_out["images"]),
        "text_loss": scores["texts/text_loss"],
        "text_accuracy": scores["texts/text_accuracy"],
        "frequency": frequency_guess(task, train["texts"], held_out["texts"]),
        "pair_frequency": frequency_guess(task, train["pairs"], held_out["pairs"]),
        "pair_accuracy": scores["pairs/text_accuracy"],
        **paired(task, list(held_out["pairs"])),
    }


@torch.no_grad()
def paired(task: Pretrain, records: list[dict]) -> dict:
    """Losses of hidden words with the right and with other pictures, and the words that gain
    most."""
    pictures = sorted({record["image"] for record in records})
    image_index = {picture: index for index, picture in enumerate(pictures)}
    pixels = task.collate([task.example({"id": p, "image": p}, False) for p in pictures])["image"]
    sums = np.zeros(
        (len(pictures), 1 + OTHERS)
    )  # summed loss per picture: its own, then the others
    counts = np.zeros(len(pictures))
    words: dict[int, list[float]] = defaultdict(list)
    at = 0
    for batch in iterate_batches(task, records, BATCH):
        own = torch.tensor(
            [image_index[record["image"]] for record in records[at : at + len(batch["id"])]]
        )
        at += len(own)
        hidden = batch["text_target"] != IGNORE_INDEX
        targets, rows = batch["text_target"][hidden], own[hidden.nonzero()[:, 0]]
        losses = []
        for turn in range(1 + OTHERS):
            image = pixels[(own + turn * len(pictures) // (1 + OTHERS)) % len(pictures)]
            logits = task.text_head(task.encode(batch | {"image": image}).of("text")[hidden])
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        table = torch.stack(losses, 1).double().numpy()  # [hidden words, 1 + OTHERS]
        np.add.at(sums, rows.numpy(), table)
        np.add.at(counts, rows.numpy(), 1)
        for token, row in zip(targets.tolist(), table, strict=True):
            words[token].append(row[1:].mean() - row[0])
    gains = (sums[:, 1:].mean(1) - sums[:, 0]) / counts  # per picture
    draws = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    resampled = (sums[draws][:, :, 1:].mean(2).sum(1) - sums[draws][:, :, 0].sum(1)) / counts[
        draws
    ].sum(1)
    best = sorted((w for w in words if len(words[w]) >= SEEN), key=lambda w: -np.mean(words[w]))[
        :WORDS
    ]
    return {
        "text_right": sums[:, 0].sum() / counts.sum(),
        "text_wrong": sums[:, 1:].mean(1).sum() / counts.sum(),
        "gain": float(resampled.mean()),
        "gain_interval": np.quantile(resampled, (0.025, 0.975)).tolist(),
        "pictures_that_gain": float((gains > 0).mean()),
        "pictures": len(pictures),
        "captions": len(records),
        "words": [
            {
                "word": task.tokenizer.id_to_piece(w).strip(),
                "seen": len(words[w]),
                "gain": float(np.mean(words[w])),
            }
            for w in best
        ],
    }


def table(results: dict) -> str:
    low, high = results["gain_interval"]
    rows = [
        (
            "hidden patches: loss (nats)",
            f"{results['image_loss']:.3f}",
            f"{results['nearest_patch']:.3f} from the nearest visible patch",
        ),
        (
            "hidden tokens of texts: loss (nats)",
            f"{results['text_loss']:.3f}",
            f"{results['frequency']:.3f} from token frequency",
        ),
        (
            "hidden tokens of captions: loss (nats)",
            f"{results['text_right']:.3f}",
            f"{results['pair_frequency']:.3f} from token frequency",
        ),
        (
            "the same with another's picture",
            f"{results['text_wrong']:.3f}",
            f"{results['gain']:.3f} more (95 %: {low:.3f} to {high:.3f})",
        ),
        (
            "pictures whose captions gain from it",
            f"{results['pictures_that_gain']:.0%}",
            f"of {results['pictures']}; 50 % by chance",
        ),
        (
            "words that gain most (nats)",
            ", ".join(f"{w['word']} {w['gain']:.2f}" for w in results["words"]),
            f"hidden {SEEN} times or more",
        ),
    ]
    return "\n".join(
        [
            "| what | measured | beside |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = figures(args.run)
    write_text(args.out, json.dumps(results, indent=1) + "\n")
    print(table(results))
