"""Detection and segmentation on small real data sets: what `laptop` learns by heart, what it
learns, and what a guess scores.

    python benchmarks/dense.py --data ../shared/data --out runs/dense --json benchmarks/dense.json

Four parts, of which `--only` names some; on one thread `overfit` takes 12 minutes, `coco` half an
hour, each side of `camvid`
9 minutes, the last seconds. `overfit`: eight pictures of coco_mini without jitter, scored on
themselves. `coco`: its 80
training pictures, scored on the 79 others and on themselves. `camvid`: 180 training pictures, 50
others; beside them the most
frequent label of each place. With --init, weights of `pretrain laptop`, `coco` starts from them and
`camvid` from both.
`ade20k`: three pictures through reader and score. Parts that are finished are kept, stopped ones go
on; the table holds all
that --out has.
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
from probe import save

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.data.views.label_maps import open_label_map
from beit3.demo.comparison import markdown, row
from beit3.files import write_text
from beit3.metrics.segmentation import (
    ConfusionMatrix,
    compute_class_ious,
    compute_confusion,
    summarize_confusion,
)
from beit3.recipe import Recipe
from beit3.task import Record, load_task
from beit3.tasks.ade20k import (
    CLASSES_FILE,
    Ade20k,
    Ade20kConfig,
    encode_label_map,
    label_map_options,
    sum_confusion,
)
from beit3.tasks.coco import CATEGORIES_FILE, Coco, CocoConfig
from beit3.training.evaluate import predict
from beit3.training.loop import train
from beit3.weights import loading

EIGHT = {
    "37666": "person, skateboard",
    "84533": "motorcycle, person",
    "100667": "three persons, four bananas",
    "121647": "wine glass, fork, pizza, table, book",
    "196393": "bird, cat, two bowls",
    "281789": "two zebras",
    "330993": "two cars, two parking meters",
    "420862": "four cows",
}
"""Pictures of coco_mini's training split whose objects are all at least 32 px wide and high, none
of them a crowd."""
OVERFIT_STEPS = 1000
"""Of two pictures each."""
COCO_STEPS = 1500
"""Of four pictures each."""
Found = dict[str, Any]


def overfit(known: argparse.Namespace) -> Found:
    """AP of the eight pictures by a network that was trained on them alone, always whole and the
    same way round."""
    source, root = records("coco", "coco_mini", known), known.out / "records" / "eight"
    rows = [
        each
        for each in RecordDataset(locate_split(source, "coco", "main", "train"), source)
        if each["id"] in EIGHT
    ]
    assert len(rows) == len(EIGHT), f"coco_mini lacks some of {list(EIGHT)}"
    for split in ("train", "val"):
        write_text(
            root / "coco" / "main" / f"{split}.jsonl",
            "".join(json.dumps(each) + "\n" for each in rows),
        )
    write_text(
        root / "coco" / "main" / CATEGORIES_FILE,
        (source / "coco" / "main" / CATEGORIES_FILE).read_text(),
    )
    recipe = recipe_of("coco", root, known.steps or OVERFIT_STEPS)
    assert isinstance(recipe.task, CocoConfig)
    recipe = replace(
        recipe,
        task=replace(recipe.task, scale=(1.0, 1.0), flip=0.0),
        data=replace(recipe.data, batch={"main": 2}),
        run=replace(recipe.run, eval_every=200),
    )
    return tuned("coco", recipe, known.out / "runs" / "overfit")


def coco(known: argparse.Namespace) -> Found:
    """AP of pictures not trained on, and of the training pictures."""
    root = records("coco", "coco_mini", known)
    run = known.out / "runs" / "coco"
    found = tuned("coco", recipe_of("coco", root, known.steps or COCO_STEPS), run, known.init)
    seen = list(RecordDataset(locate_split(root, "coco", "main", "train"), root))
    task = loading.load_weights(run / "last")
    return found | {"seen": Coco.score(predict(task, seen, batch_size=4), seen)}


def camvid(known: argparse.Namespace) -> Found:
    """mIoU and each class's IoU of each side, and of maps that know nothing of the picture."""
    root = records("ade20k", "camvid_mini", known)
    train_rows, rows = (
        list(RecordDataset(locate_split(root, "ade20k", "main", split), root))
        for split in ("train", "val")
    )
    names = json.loads((root / "ade20k" / "main" / CLASSES_FILE).read_text())
    found: Found = {"names": names, "sides": {}, "guesses": guesses(train_rows, rows, len(names))}
    for side, init in {"scratch": "", **({"pretrained": known.init} if known.init else {})}.items():
        run = known.out / "runs" / f"camvid-{side}"
        scores = tuned("ade20k", recipe_of("ade20k", root, known.steps), run, init)
        counts = sum_confusion(
            predict(loading.load_weights(run / "last"), rows, batch_size=4), rows
        )
        found["sides"][side] = scores | {"ious": listed(counts)}
        found["share"] = (counts.sum(1) / counts.sum()).tolist()
    return found


def ade20k(known: argparse.Namespace) -> Found:
    """Every record as an example of training and of evaluation, and the score of its own map and of
    one class everywhere."""
    root = records("ade20k", "ade20k_sample", known)
    rows = list(RecordDataset(locate_split(root, "ade20k", "main", "val"), root))
    config = Ade20k.recipes["demo"].task
    assert isinstance(config, Ade20kConfig)
    task = Ade20k(replace(config, num_classes=rows[0]["labels"]["num_classes"]))
    for each in rows:
        task.example(each, True), task.example(each, False)  # noqa: B018
    maps = [truth(each) for each in rows]
    guess = int(np.bincount(np.concatenate([each[each != 255] for each in maps])).argmax())
    sides = {"own": maps, "constant": [np.full_like(each, guess) for each in maps]}
    return {"pictures": len(rows)} | {side: scored(found, rows) for side, found in sides.items()}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "overfit": overfit,
    "coco": coco,
    "camvid": camvid,
    "ade20k": ade20k,
}


def records(task: str, raw: str, known: argparse.Namespace) -> Path:
    """The root of the records of a data set."""
    root = known.out / "records" / raw
    if not (root / task).exists():
        load_task(task).prepare(known.data / raw, root, "main")
    return root


def recipe_of(task: str, root: Path, steps: int) -> Recipe:
    """`laptop` on the records of `root`; steps 0: its own."""
    recipe = load_task(task).recipes["laptop"]
    return replace(
        recipe,
        data=replace(recipe.data, root=str(root)),
        run=replace(recipe.run, steps=steps or recipe.run.steps),
    )


def tuned(task: str, recipe: Recipe, out: Path, init: str = "") -> Found:
    """Final scores of a run and the processor seconds that it took, evaluation included."""
    with counted(out.with_suffix(".seconds")) as spent:
        scores = train(recipe, load_task(task), out=out, init=init)
    return scores | {"processor": sum(map(float, spent.read_text().split()))}


@contextmanager
def counted(file: Path) -> Iterator[Path]:
    """Processor seconds are added to a file, a line each time that the run goes on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    try:
        yield file
    finally:
        with file.open("a") as lines:
            lines.write(f"{time.process_time() - started:.1f}\n")


def guesses(train_rows: Sequence[Record], rows: Sequence[Record], num_classes: int) -> Found:
    """What the most frequent label of each place over the training maps scores, and the most
    frequent of all."""
    maps = [truth(each) for each in train_rows]
    counts = np.stack(
        [sum((each == label).astype(np.int64) for each in maps) for label in range(num_classes)]
    )  # [C, H, W]
    places, everywhere = counts.argmax(0), np.full(counts.shape[1:], counts.sum((1, 2)).argmax())
    return {
        name: scored([guess] * len(rows), rows)
        for name, guess in (("places", places), ("everywhere", everywhere))
    }


def truth(record: Record) -> np.ndarray:
    return open_label_map(record["label_map"], **label_map_options(record)).numpy()


def scored(maps: Sequence[np.ndarray], rows: Sequence[Record]) -> Found:
    """Figures of label maps through the task's own predictions and score, and each class's IoU."""
    predictions = [
        {"id": each["id"], "map": encode_label_map(torch.from_numpy(found))}
        for found, each in zip(maps, rows, strict=True)
    ]
    classes = rows[0]["labels"]["num_classes"]
    pairs = zip(maps, rows, strict=True)
    counts = sum(
        compute_confusion(found, truth(each), num_classes=classes) for found, each in pairs
    )
    score = Ade20k.score(predictions, rows)
    assert score == summarize_confusion(counts), "the score counts what the matrices count"
    return score | {"ious": listed(counts)}


def listed(counts: ConfusionMatrix) -> list[float | None]:
    """Each class's IoU; None for one that is neither there nor predicted."""
    return [None if np.isnan(each) else float(each) for each in compute_class_ious(counts)]


# The table ----------------------------------------------------------------------------------------


def table(found: Found) -> str:
    rows, classes = [], ""
    if "overfit" in found:
        rows.append(
            detected(
                "8 pictures of coco_mini, learnt by heart", found["overfit"], cost(found["overfit"])
            )
        )
    if "coco" in found:
        rows.append(
            detected("coco_mini: 79 pictures, 80 others learnt", found["coco"], cost(found["coco"]))
        )
        rows.append(detected("the 80 learnt ones", found["coco"]["seen"], ""))
    if "camvid" in found:
        for side, scores in found["camvid"]["sides"].items():
            rows.append(row(f"camvid_mini, {side}", segmented(scores), cost(scores)))
        for name, what in (
            ("places", "the most frequent class of each place"),
            ("everywhere", "the most frequent class everywhere"),
        ):
            rows.append(
                row(
                    f"camvid_mini, {what}",
                    segmented(found["camvid"]["guesses"][name]),
                    "no learning",
                )
            )
        classes = "\n" + by_class(found["camvid"])
    if "ade20k" in found:
        count = found["ade20k"]["pictures"]
        rows.append(
            row(
                f"ade20k_sample, {count} pictures, their own maps",
                segmented(found["ade20k"]["own"]),
                "",
            )
        )
        rows.append(
            row(
                "ade20k_sample, the most frequent class everywhere",
                segmented(found["ade20k"]["constant"]),
                "",
            )
        )
    return markdown(rows) + classes


def detected(what: str, scores: Found, beside: str) -> dict[str, str]:
    parts = [
        f"{kind} AP50 {scores[f'{kind}_ap50']:.3f}, AP {scores[f'{kind}_ap']:.3f}"
        for kind in ("box", "mask")
    ]
    return row(what, "; ".join(parts), beside)


def segmented(scores: Found) -> str:
    return f"mIoU {scores['miou']:.3f}, pixels {scores['aacc']:.3f}, classes {scores['macc']:.3f}"


def cost(scores: Found) -> str:
    return f"{scores['step']} steps, {scores['processor'] / 60:.0f} processor minutes"


def by_class(found: Found) -> str:
    """IoU of each class of camvid_mini."""
    sides = {side: scores["ious"] for side, scores in found["sides"].items()} | {
        "each place's": found["guesses"]["places"]["ious"]
    }
    lines = [f"| class | pixels | {' | '.join(sides)} |", "|---" * (2 + len(sides)) + "|"]
    for place, (name, share) in enumerate(zip(found["names"], found["share"], strict=True)):
        lines.append(
            f"| {name} | {share:.1%} | "
            f"{' | '.join(shown(ious[place]) for ious in sides.values())} |"
        )
    return "\n".join(lines) + "\n"


def shown(iou: float | None) -> str:
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
    known = parser.parse_args()
    for name in known.only:
        file = known.out / f"{name}.json"
        if not file.exists():
            write_text(file, json.dumps(PARTS[name](known), indent=1) + "\n")
    files = {name: known.out / f"{name}.json" for name in PARTS}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    print(table(found))
    if known.json:
        save(known.json, table(found), found)


if __name__ == "__main__":
    main()
