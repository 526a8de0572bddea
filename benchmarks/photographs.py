"""What `pretrain laptop` learned from photographs, books and captions, beside simple guesses.

    python benchmarks/photographs.py runs/laptop --out benchmarks/photographs.json

It uses held-out records under the masks of evaluation. Masked tokens of captions are predicted with
their own image and with each of `NUM_OTHER_IMAGES` other images. The spread is over images, all
captions of one together, because captions of one image are not independent.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from beit3.demo.probes import BATCH_SIZE, compute_frequency_loss, compute_nearest_patch_loss
from beit3.files import write_text
from beit3.recipe import Recipe
from beit3.tasks.pretrain import IGNORE_INDEX, Pretrain, PretrainConfig
from beit3.training.evaluate import evaluate, iterate_batches
from beit3.training.sources import open_source
from beit3.weights import loading

NUM_OTHER_IMAGES = 5
"""Number of other images with which every caption is encoded."""
NUM_TOKENS = 8
"""Number of tokens shown whose loss falls most with the right image."""
MIN_MASKED = 12


def measure_run(run: Path) -> dict:
    """Measures a run of `pretrain` on images, texts and pairs."""
    task = loading.load_weights(run / "last")
    assert isinstance(task, Pretrain)
    recipe = Recipe.from_dict(
        json.loads((run / "recipe.json").read_text())["recipe"], PretrainConfig
    )
    root = Path(recipe.data.root)
    train, held_out = (
        {name: open_source(root, Pretrain, name, recipe, split) for name in Pretrain.sources}
        for split in ("train", "val")
    )
    scores = evaluate(task.eval(), held_out, batch_size=BATCH_SIZE)
    return {
        "image_loss": scores["images/image_loss"],
        "image_accuracy": scores["images/image_accuracy"],
        "nearest_patch": compute_nearest_patch_loss(task, train["images"], held_out["images"]),
        "text_loss": scores["texts/text_loss"],
        "text_accuracy": scores["texts/text_accuracy"],
        "frequency": compute_frequency_loss(task, train["texts"], held_out["texts"]),
        "pair_frequency": compute_frequency_loss(task, train["pairs"], held_out["pairs"]),
        "pair_accuracy": scores["pairs/text_accuracy"],
        **compare_images(task, list(held_out["pairs"])),
    }


@torch.no_grad()
def compare_images(task: Pretrain, records: list[dict]) -> dict:
    """Returns losses of masked tokens with the right and with other images, and largest gains."""
    images = sorted({record["image"] for record in records})
    image_index = {image: index for index, image in enumerate(images)}
    pixels = task.collate([task.example({"id": image, "image": image}, False) for image in images])[
        "image"
    ]
    sums = np.zeros(
        (len(images), 1 + NUM_OTHER_IMAGES)
    )  # summed loss per image: with it, then with others
    counts = np.zeros(len(images))
    gains_by_token: dict[int, list[float]] = defaultdict(list)
    start = 0
    for batch in iterate_batches(task, records, BATCH_SIZE):
        image_ids = torch.tensor(
            [image_index[record["image"]] for record in records[start : start + len(batch["id"])]]
        )
        start += len(image_ids)
        masked = batch["text_target"] != IGNORE_INDEX
        targets, rows = batch["text_target"][masked], image_ids[masked.nonzero()[:, 0]]
        losses = []
        for turn in range(1 + NUM_OTHER_IMAGES):
            image = pixels[(image_ids + turn * len(images) // (1 + NUM_OTHER_IMAGES)) % len(images)]
            logits = task.text_head(task.encode(batch | {"image": image}).of("text")[masked])
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        pair_losses = (
            torch.stack(losses, 1).double().numpy()
        )  # [masked tokens, 1 + NUM_OTHER_IMAGES]
        np.add.at(sums, rows.numpy(), pair_losses)
        np.add.at(counts, rows.numpy(), 1)
        for token, row in zip(targets.tolist(), pair_losses, strict=True):
            gains_by_token[token].append(row[1:].mean() - row[0])
    gains = (sums[:, 1:].mean(1) - sums[:, 0]) / counts  # per image
    draws = np.random.default_rng(0).integers(0, len(gains), (2000, len(gains)))
    resampled = (sums[draws][:, :, 1:].mean(2).sum(1) - sums[draws][:, :, 0].sum(1)) / counts[
        draws
    ].sum(1)
    best = sorted(
        (token for token in gains_by_token if len(gains_by_token[token]) >= MIN_MASKED),
        key=lambda token: -np.mean(gains_by_token[token]),
    )[:NUM_TOKENS]
    return {
        "text_right": sums[:, 0].sum() / counts.sum(),
        "text_wrong": sums[:, 1:].mean(1).sum() / counts.sum(),
        "gain": float(resampled.mean()),
        "gain_interval": np.quantile(resampled, (0.025, 0.975)).tolist(),
        "pictures_that_gain": float((gains > 0).mean()),
        "pictures": len(images),
        "captions": len(records),
        "words": [
            {
                "word": task.tokenizer.id_to_piece(token).strip(),
                "seen": len(gains_by_token[token]),
                "gain": float(np.mean(gains_by_token[token])),
            }
            for token in best
        ],
    }


def format_table(results: dict) -> str:
    low, high = results["gain_interval"]
    rows = [
        (
            "masked patches: loss (nats)",
            f"{results['image_loss']:.3f}",
            f"{results['nearest_patch']:.3f} from the nearest visible patch",
        ),
        (
            "masked tokens of texts: loss (nats)",
            f"{results['text_loss']:.3f}",
            f"{results['frequency']:.3f} from token frequency",
        ),
        (
            "masked tokens of captions: loss (nats)",
            f"{results['text_right']:.3f}",
            f"{results['pair_frequency']:.3f} from token frequency",
        ),
        (
            "the same with another image",
            f"{results['text_wrong']:.3f}",
            f"{results['gain']:.3f} more (95 %: {low:.3f} to {high:.3f})",
        ),
        (
            "images that reduce the loss of their captions",
            f"{results['pictures_that_gain']:.0%}",
            f"of {results['pictures']}; 50 % by chance",
        ),
        (
            "tokens whose loss falls most (nats)",
            ", ".join(f"{word['word']} {word['gain']:.2f}" for word in results["words"]),
            f"masked {MIN_MASKED} times or more",
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
    results = measure_run(args.run)
    write_text(args.out, json.dumps(results, indent=1) + "\n")
    print(format_table(results))
