"""Detection and segmentation on small real datasets: overfitting, learning, and guessing.

    python benchmarks/dense.py --data ../shared/data --out runs/dense --json benchmarks/dense.json

There are four parts; `--only` selects some. On one thread `overfit` takes 12 minutes, `coco` half
an hour, each side of `camvid` 9 minutes, and `ade20k` seconds.

- overfit: eight images of coco_mini without jitter, scored on themselves.
- coco: its 80 training images, scored on the 79 others and on themselves.
- camvid: 180 training images, 50 others; beside them the most frequent label of each position.
- ade20k: three images through reader and score.

With --init, weights of `pretrain laptop`, `coco` starts from them and `camvid` starts from them
and from scratch. Finished parts are kept and stopped ones continue; the table holds all that --out
has.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from probe import save_results

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.data.views.label_maps import open_label_map
from beit3.demo.tables import format_markdown, make_row
from beit3.files import write_text
from beit3.metrics.segmentation import (
    ConfusionMatrix,
    compute_class_ious,
    compute_confusion,
    summarize_confusion,
)
from beit3.recipe import Recipe
from beit3.segmentation.records import encode_label_map, get_label_map_options
from beit3.task import Record, load_task
from beit3.tasks.ade20k import CLASSES_FILE, Ade20k, Ade20kConfig, sum_confusion
from beit3.tasks.coco import CATEGORIES_FILE, Coco, CocoConfig
from beit3.training.evaluate import predict
from beit3.training.loop import train
from beit3.weights import loading

EIGHT_IMAGES = {
    "37666": "person, skateboard",
    "84533": "motorcycle, person",
    "100667": "three persons, four bananas",
    "121647": "wine glass, fork, pizza, table, book",
    "196393": "bird, cat, two bowls",
    "281789": "two zebras",
    "330993": "two cars, two parking meters",
    "420862": "four cows",
}
"""Images of the train split of coco_mini whose objects are all at least 32 px wide and high, and no
crowds."""
OVERFIT_STEPS = 1000
"""Each has two images."""
COCO_STEPS = 1500
"""Each has four images."""
Results = dict[str, Any]


def overfit(args: argparse.Namespace) -> Results:
    """Returns the AP of eight images on which the network was trained, without augmentation."""
    source, root = prepare_records("coco", "coco_mini", args), args.out / "records" / "eight"
    records = [
        record
        for record in RecordDataset(locate_split(source, "coco", "main", "train"), source)
        if record["id"] in EIGHT_IMAGES
    ]
    assert len(records) == len(EIGHT_IMAGES), f"coco_mini lacks some of {list(EIGHT_IMAGES)}"
    for split in ("train", "val"):
        write_text(
            root / "coco" / "main" / f"{split}.jsonl",
            "".join(json.dumps(record) + "\n" for record in records),
        )
    write_text(
        root / "coco" / "main" / CATEGORIES_FILE,
        (source / "coco" / "main" / CATEGORIES_FILE).read_text(),
    )
    recipe = make_recipe("coco", root, args.steps or OVERFIT_STEPS)
    assert isinstance(recipe.task, CocoConfig)
    recipe = replace(
        recipe,
        task=replace(recipe.task, scale=(1.0, 1.0), flip=0.0),
        data=replace(recipe.data, batch={"main": 2}),
        run=replace(recipe.run, eval_every=200),
    )
    return fine_tune("coco", recipe, args.out / "runs" / "overfit")


def coco(args: argparse.Namespace) -> Results:
    """Returns the AP of held-out images and of the training images."""
    root = prepare_records("coco", "coco_mini", args)
    run = args.out / "runs" / "coco"
    results = fine_tune("coco", make_recipe("coco", root, args.steps or COCO_STEPS), run, args.init)
    train_records = list(RecordDataset(locate_split(root, "coco", "main", "train"), root))
    task = loading.load_weights(run / "last")
    return results | {"seen": Coco.score(predict(task, train_records, batch_size=4), train_records)}


def camvid(args: argparse.Namespace) -> Results:
    """Returns mIoU and IoU per class of each side, and of guesses that ignore the image."""
    root = prepare_records("ade20k", "camvid_mini", args)
    train_records, val_records = (
        list(RecordDataset(locate_split(root, "ade20k", "main", split), root))
        for split in ("train", "val")
    )
    names = json.loads((root / "ade20k" / "main" / CLASSES_FILE).read_text())
    results: Results = {
        "names": names,
        "sides": {},
        "guesses": score_guesses(train_records, val_records, len(names)),
    }
    for side, init in {"scratch": "", **({"pretrained": args.init} if args.init else {})}.items():
        run = args.out / "runs" / f"camvid-{side}"
        scores = fine_tune("ade20k", make_recipe("ade20k", root, args.steps), run, init)
        counts = sum_confusion(
            predict(loading.load_weights(run / "last"), val_records, batch_size=4), val_records
        )
        results["sides"][side] = scores | {"ious": list_ious(counts)}
        results["share"] = (counts.sum(1) / counts.sum()).tolist()
    return results


def ade20k(args: argparse.Namespace) -> Results:
    """Makes examples of every record; scores its own label map and that of the commonest class."""
    root = prepare_records("ade20k", "ade20k_sample", args)
    records = list(RecordDataset(locate_split(root, "ade20k", "main", "val"), root))
    config = Ade20k.recipes["demo"].task
    assert isinstance(config, Ade20kConfig)
    task = Ade20k(replace(config, num_classes=records[0]["labels"]["num_classes"]))
    for record in records:
        task.example(record, True), task.example(record, False)
    maps = [read_label_map(record) for record in records]
    most_frequent = int(
        np.bincount(np.concatenate([labels[labels != 255] for labels in maps])).argmax()
    )
    sides = {"own": maps, "constant": [np.full_like(labels, most_frequent) for labels in maps]}
    return {"pictures": len(records)} | {
        side: score_label_maps(maps, records) for side, maps in sides.items()
    }


PARTS: dict[str, Callable[[argparse.Namespace], Results]] = {
    "overfit": overfit,
    "coco": coco,
    "camvid": camvid,
    "ade20k": ade20k,
}


def prepare_records(task: str, raw: str, args: argparse.Namespace) -> Path:
    """Writes the records of a dataset once and returns their root."""
    root = args.out / "records" / raw
    if not (root / task).exists():
        load_task(task).prepare(args.data / raw, root, "main")
    return root


def make_recipe(task: str, root: Path, steps: int) -> Recipe:
    """Returns the recipe `laptop` with the records of `root`; steps 0: those of the recipe."""
    recipe = load_task(task).recipes["laptop"]
    return replace(
        recipe,
        data=replace(recipe.data, root=str(root)),
        run=replace(recipe.run, steps=steps or recipe.run.steps),
    )


def fine_tune(task: str, recipe: Recipe, out: Path, init: str = "") -> Results:
    """Returns the final scores of a run and its CPU seconds, evaluation included."""
    with count_cpu_seconds(out.with_suffix(".seconds")) as spent:
        scores = train(recipe, load_task(task), out=out, init=init)
    return scores | {"processor": sum(map(float, spent.read_text().split()))}


@contextmanager
def count_cpu_seconds(file: Path) -> Iterator[Path]:
    """Appends the CPU seconds of the block as a line to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    try:
        yield file
    finally:
        with file.open("a") as lines:
            lines.write(f"{time.process_time() - started:.1f}\n")


def score_guesses(
    train_records: Sequence[Record], records: Sequence[Record], num_classes: int
) -> Results:
    """Scores the most frequent training label of each position, and the most frequent of all."""
    maps = [read_label_map(record) for record in train_records]
    counts = np.stack(
        [sum((labels == label).astype(np.int64) for labels in maps) for label in range(num_classes)]
    )  # [C, H, W]
    by_position, everywhere = (
        counts.argmax(0),
        np.full(counts.shape[1:], counts.sum((1, 2)).argmax()),
    )
    return {
        name: score_label_maps([guess] * len(records), records)
        for name, guess in (("places", by_position), ("everywhere", everywhere))
    }


def read_label_map(record: Record) -> np.ndarray:
    return open_label_map(record["label_map"], **get_label_map_options(record)).numpy()


def score_label_maps(maps: Sequence[np.ndarray], records: Sequence[Record]) -> Results:
    """Returns the scores of label maps as predictions, with the IoU of each class."""
    predictions = [
        {"id": record["id"], "map": encode_label_map(torch.from_numpy(labels))}
        for labels, record in zip(maps, records, strict=True)
    ]
    classes = records[0]["labels"]["num_classes"]
    pairs = zip(maps, records, strict=True)
    counts = sum(
        compute_confusion(labels, read_label_map(record), num_classes=classes)
        for labels, record in pairs
    )
    score = Ade20k.score(predictions, records)
    assert score == summarize_confusion(counts), "the score counts what the matrices count"
    return score | {"ious": list_ious(counts)}


def list_ious(counts: ConfusionMatrix) -> list[float | None]:
    """Returns the IoU of each class; None for one that is neither labeled nor predicted."""
    return [None if np.isnan(iou) else float(iou) for iou in compute_class_ious(counts)]


# Table ----------------------------------------------------------------------------------------


def format_table(results: Results) -> str:
    rows, classes = [], ""
    if "overfit" in results:
        rows.append(
            format_detection(
                "8 images of coco_mini, overfitted",
                results["overfit"],
                format_cost(results["overfit"]),
            )
        )
    if "coco" in results:
        rows.append(
            format_detection(
                "coco_mini: 79 held-out images",
                results["coco"],
                format_cost(results["coco"]),
            )
        )
        rows.append(
            format_detection("coco_mini: the 80 training images", results["coco"]["seen"], "")
        )
    if "camvid" in results:
        for side, scores in results["camvid"]["sides"].items():
            rows.append(
                make_row(f"camvid_mini, {side}", format_segmentation(scores), format_cost(scores))
            )
        for name, label in (
            ("places", "the most frequent class of each position"),
            ("everywhere", "the most frequent class everywhere"),
        ):
            rows.append(
                make_row(
                    f"camvid_mini, {label}",
                    format_segmentation(results["camvid"]["guesses"][name]),
                    "no learning",
                )
            )
        classes = "\n" + format_classes(results["camvid"])
    if "ade20k" in results:
        count = results["ade20k"]["pictures"]
        rows.append(
            make_row(
                f"ade20k_sample, {count} images, their own maps",
                format_segmentation(results["ade20k"]["own"]),
                "",
            )
        )
        rows.append(
            make_row(
                "ade20k_sample, the most frequent class everywhere",
                format_segmentation(results["ade20k"]["constant"]),
                "",
            )
        )
    return format_markdown(rows) + classes


def format_detection(label: str, scores: Results, reference: str) -> dict[str, str]:
    parts = [
        f"{shape} AP50 {scores[f'{shape}_ap50']:.3f}, AP {scores[f'{shape}_ap']:.3f}"
        for shape in ("box", "mask")
    ]
    return make_row(label, "; ".join(parts), reference)


def format_segmentation(scores: Results) -> str:
    return f"mIoU {scores['miou']:.3f}, pixels {scores['aacc']:.3f}, classes {scores['macc']:.3f}"


def format_cost(scores: Results) -> str:
    return f"{scores['step']} steps, {scores['processor'] / 60:.0f} CPU minutes"


def format_classes(results: Results) -> str:
    """Formats the IoU of each class of camvid_mini."""
    sides = {side: scores["ious"] for side, scores in results["sides"].items()} | {
        "each place's": results["guesses"]["places"]["ious"]
    }
    lines = [f"| class | pixels | {' | '.join(sides)} |", "|---" * (2 + len(sides)) + "|"]
    for index, (name, fraction) in enumerate(zip(results["names"], results["share"], strict=True)):
        lines.append(
            f"| {name} | {fraction:.1%} | "
            f"{' | '.join(format_value(ious[index]) for ious in sides.values())} |"
        )
    return "\n".join(lines) + "\n"


def format_value(iou: float | None) -> str:
    return "" if iou is None else f"{iou:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    parser.add_argument(
        "--init",
        default="",
        help="weights of pretrain laptop: coco and camvid start from them, camvid also without",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--steps", type=int, default=0, help="instead of the usual number, for a trial"
    )
    args = parser.parse_args()
    for name in args.only:
        file = args.out / f"{name}.json"
        if not file.exists():
            write_text(file, json.dumps(PARTS[name](args), indent=1) + "\n")
    files = {name: args.out / f"{name}.json" for name in PARTS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    print(format_table(results))
    if args.json:
        save_results(args.json, format_table(results), results)


if __name__ == "__main__":
    main()
