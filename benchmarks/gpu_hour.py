"""The `gpu_hour` recipes, visual tokenizer first, then pretraining: throughput, memory and losses.

    python benchmarks/gpu_hour.py data --out runs/gpu_hour      # one large GPU, 30 to 60 minutes
    python benchmarks/gpu_hour.py data --out runs/dry --dry     # a few steps of it, also on CPU

`data` holds prepared records (docs/records.md) with `text.model`. It needs no network access. A
stopped run continues when it is started again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from beit3.files import write_text
from beit3.recipe import Recipe
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.vqkd import VQKD
from beit3.training.loop import train

DRY_STEPS = 4


def shorten(recipe: Recipe, device: str) -> Recipe:
    """Returns the recipe with few steps of few records."""
    batch = {name: max(2, count // 128) for name, count in recipe.data.batch.items()}
    run = replace(
        recipe.run,
        steps=DRY_STEPS,
        log_every=1,
        eval_every=0,
        save_every=2,
        eval_records=4,
        device=device,
    )
    return replace(recipe, data=replace(recipe.data, batch=batch, workers=0), run=run)


def measure_run(run: Path) -> dict:
    """Returns throughput, memory and losses of a run, without its first quarter of steps.

    These include compilation and the start of the loader.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "seconds" in line]
    later = steps[len(steps) // 4 :]
    seconds = sorted(line["seconds"] for line in later)[len(later) // 2]
    total, waiting = (sum(line[name] for line in later) for name in ("seconds", "seconds_waiting"))
    return {
        "steps": steps[-1]["step"],
        "records_a_step": steps[-1]["samples"],
        "seconds_a_step": seconds,
        "records_a_second": steps[-1]["samples"] / seconds,
        "waiting_fraction": waiting / total,
        "memory_gb": steps[-1]["memory"],
        "first": read_losses(steps[0]),
        "last": read_losses(steps[-1]),
        "held_out": {
            name: value for line in lines for name, value in line.items() if name.startswith("val/")
        },
    }


def read_losses(line: dict) -> dict:
    return {name: value for name, value in line.items() if name.startswith("loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="steps of pretraining, where less than an hour is at hand",
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.dry:
        raise SystemExit("no GPU here: give --dry")
    codes, pretrain = VQKD.recipes["gpu_hour"], Pretrain.recipes["gpu_hour"]
    if args.dry:
        codes, pretrain = shorten(codes, device), shorten(pretrain, device)
    if args.steps:
        pretrain = replace(pretrain, run=replace(pretrain.run, steps=args.steps))
    root = str(args.data)
    train(replace(codes, data=replace(codes.data, root=root)), VQKD, out=args.out / "codes")
    task = replace(pretrain.task, visual_tokenizer=str(args.out / "codes" / "last"))
    train(
        replace(pretrain, task=task, data=replace(pretrain.data, root=root)),
        Pretrain,
        out=args.out / "pretrain",
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results = {"device": name, "dry": args.dry} | {
        part: measure_run(args.out / part) for part in ("codes", "pretrain")
    }
    write_text(args.out / "gpu_hour.json", json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
