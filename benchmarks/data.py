"""Input: images per second of our loader and a plain one, of shards and files, and a first batch.

    python benchmarks/data.py --images DIR --json benchmarks/data.json

1. decode: open, crop, flip, resize and stack JPEGs by our loader, and by Pillow and torchvision's
   transforms in a DataLoader, as training scripts do it; the same views of the same files with the
   same number of workers. Plain workers normalize; we do that on the device, which `ours` leaves
   out and `normalized` counts, in this process on CPU.
2. two views: the same with color jitter and a second view of 112 px, as in pretraining.
3. shards: the same images by our loader from files, and from tars.
4. resume: a fresh loader over 1,000 shards until its first batch, at random positions.

All alternate in one process. Reported are medians over rounds, and ratios to the last of them with
quartiles. `busy` is CPU time over wall time times cores. Beside each round stands the rate that a
plain matrix product reached in it: where that drops, other work was running.
"""

import argparse
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe import measure_product_rate, save_results
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a call by path

from beit3.data.loader import ExampleDataset, RecordDataset, load_batches, sample_micro_batches
from beit3.data.stores.records import write_records
from beit3.data.stores.shard_writer import write_shards
from beit3.data.stores.split_files import locate_split
from beit3.data.views.preprocessing import Preprocessing
from beit3.data.views.transforms import make_two_views
from beit3.images import open_image

SIZE, TOKENS, BATCH, SCALE, JITTER, CORES = 224, 112, 32, (0.2, 1.0), 0.4, os.cpu_count() or 1
SHARDS = 1000
OURS = Preprocessing(SIZE)


def make_example(
    record: dict[str, Any], train: bool, *, rng: np.random.Generator
) -> dict[str, Any]:
    """Returns an example: the view of the network, 224 x 224."""
    view, _ = make_two_views(
        open_image(record["image"]),
        rng,
        image_size=SIZE,
        token_size=SIZE,
        scale=SCALE,
        hflip=0.5,
        color_jitter=0.0,
    )
    return {"id": record["id"], "image": view}


def make_two_view_example(
    record: dict[str, Any], train: bool, *, rng: np.random.Generator
) -> dict[str, Any]:
    """Returns an example of pretraining, with the view of the visual tokenizer."""
    image = open_image(record["image"])
    view, tokens = make_two_views(
        image, rng, image_size=SIZE, token_size=TOKENS, scale=SCALE, hflip=0.5, color_jitter=JITTER
    )
    return {"id": record["id"], "image": view, "token_image": tokens}


class PlainDataset(Dataset):
    """Reads files with Pillow and torchvision's transforms."""

    def __init__(self, paths: Sequence[str], twice: bool):
        self.paths = paths
        bicubic = transforms.InterpolationMode.BICUBIC
        pixels = [transforms.ToTensor(), transforms.Normalize(OURS.mean, OURS.std)]
        flip = transforms.RandomHorizontalFlip()
        if twice:
            self.view = transforms.Compose(
                [transforms.ColorJitter(JITTER, JITTER, JITTER), flip, self.crop]
            )
            self.ends = [
                [transforms.Resize((SIZE, SIZE), bicubic), *pixels],
                [transforms.Resize((TOKENS, TOKENS), bicubic), pixels[0]],
            ]
        else:
            self.view = transforms.Compose(
                [transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=bicubic), flip]
            )
            self.ends = [pixels]

    @staticmethod
    def crop(image: Image.Image) -> Image.Image:
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, list(SCALE), [3 / 4, 4 / 3]
        )
        return image.crop((left, top, left + width, top + height))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.paths[index]) as image:
            view = self.view(image.convert("RGB"))
        return [transforms.Compose(end)(view) for end in self.ends]


def read_ours(
    source: RecordDataset,
    count: int,
    workers: int,
    example: Callable[..., dict[str, Any]] = make_example,
    normalize: bool = False,
) -> None:
    sample_positions = partial(
        sample_micro_batches,
        batch={"images": BATCH},
        sources=["images"],
        micro_batch=0,
        rank=0,
        world=1,
    )
    examples = ExampleDataset({"images": source}, example, seed=0)
    for batches in load_batches(
        examples, default_collate, sample_positions, range(count // BATCH), workers=workers
    ):
        pixels = OURS.normalize(batches[0]["image"]) if normalize else batches[0]["image"]
        assert pixels.shape == (BATCH, 3, SIZE, SIZE)


def read_plain(paths: Sequence[str], count: int, workers: int, twice: bool = False) -> None:
    paths = [paths[i % len(paths)] for i in range(count)]
    for views in DataLoader(
        PlainDataset(paths, twice),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    ):
        assert views[0].shape == (BATCH, 3, SIZE, SIZE)


def read_cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its workers that have ended."""
    return sum(
        sum(resource.getrusage(process)[:2])
        for process in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def measure_epoch(read: Callable[[], None], count: int) -> dict[str, float]:
    wall, busy = time.perf_counter(), read_cpu_seconds()
    read()
    wall, busy = time.perf_counter() - wall, read_cpu_seconds() - busy
    return {
        "images_per_second": count / wall,
        "images_per_cpu_second": count / busy,
        "busy": busy / wall / CORES,
    }


def measure_rounds(sides: dict[str, Callable[[], None]], count: int, number: int) -> dict[str, Any]:
    """Measures all sides by turns after a warm-up round, with ratios to the last side."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    products = []
    for turn in range(number + 1):
        product = measure_product_rate(768) / 1e9
        for name, read in sides.items() if turn % 2 else reversed(sides.items()):
            epoch = measure_epoch(read, count)
            if turn:
                results[name].append(epoch)
        products += [product] if turn else []
    medians = {
        name: {key: float(np.median([values[key] for values in epochs])) for key in epochs[0]}
        for name, epochs in results.items()
    }
    *other_sides, base_side = sides
    ratios: dict[str, dict[str, list[float]]] = {}
    for name in other_sides:
        for key in ("images_per_second", "images_per_cpu_second"):
            values = [
                result[key] / base[key]
                for result, base in zip(results[name], results[base_side], strict=True)
            ]
            ratios.setdefault(f"{name} / {base_side}", {})[key] = [
                float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))
            ]
    return {"matrix_product_gflops": products, "medians": medians, "ratios": ratios}


def write_files(folder: Path, files: Sequence[Path]) -> tuple[RecordDataset, RecordDataset]:
    """Writes the same images as records of files and as tars of 500."""
    names = [(f"{number:06d}", file) for number, file in enumerate(files)]
    write_records(
        folder / "files/train.jsonl", [{"id": key, "image": str(file)} for key, file in names]
    )
    (folder / "raw").mkdir()
    for start in range(0, len(names), 500):
        with tarfile.open(folder / f"raw/train-{start:06d}.tar", "w") as tar:
            for key, file in names[start : start + 500]:
                tar.add(file, f"{key}.jpg")
    write_shards(folder, "vqkd", "main", folder / "raw", captions=False)
    return RecordDataset(folder / "files/train.jsonl", folder), RecordDataset(
        locate_split(folder, "vqkd", "main", "train"), folder
    )


def measure_resumes(folder: Path, file: Path, number: int) -> dict[str, Any]:
    """Measures the seconds of a fresh loader until its first batch.

    It starts at random positions of an epoch over 1,000 shards of 20 images.
    """
    first = folder / "many/train-00000.tar"
    first.parent.mkdir()
    with tarfile.open(first, "w") as tar:
        for key in range(20):
            tar.add(file, f"{key:04d}.jpg")
    for shard in range(1, SHARDS):
        first.with_name(f"train-{shard:05d}.tar").hardlink_to(first)
    start = time.perf_counter()
    write_shards(folder, "pretrain", "images", first.parent, captions=False)
    prepare_seconds, seconds = time.perf_counter() - start, []
    path = locate_split(folder, "pretrain", "images", "train")
    for step in np.random.default_rng(0).integers(0, SHARDS * 20 // BATCH, number).tolist():
        start = time.perf_counter()
        examples = ExampleDataset({"images": RecordDataset(path, folder)}, make_example, seed=0)
        sample_positions = partial(
            sample_micro_batches,
            batch={"images": BATCH},
            sources=["images"],
            micro_batch=0,
            rank=0,
            world=1,
        )
        next(
            load_batches(
                examples, default_collate, sample_positions, range(step, step + 1), workers=CORES
            )
        )
        seconds.append(time.perf_counter() - start)
    return {
        "shards": SHARDS,
        "prepare_seconds": prepare_seconds,
        "median_seconds": float(np.median(seconds)),
        "longest_seconds": max(seconds),
    }


def format_table(results: dict[str, Any]) -> str:
    """Formats the medians of each side, and ratios with quartiles."""
    lines = ["| | images/s | per CPU second | cores busy |", "|---|---|---|---|"]
    for part in ("decode", "two views", "shards"):
        for name, side in results[part]["medians"].items():
            rate, cpu_rate = side["images_per_second"], side["images_per_cpu_second"]
            lines.append(f"| {part}: {name} | {rate:.0f} | {cpu_rate:.0f} | {side['busy']:.0%} |")
        for name, ratios in results[part]["ratios"].items():
            values = ("{1:.2f} ({0:.2f} to {2:.2f})".format(*three) for three in ratios.values())
            lines.append(f"| {part}: {name} | {' | '.join(values)} | |")
    resume = results["resume"]
    median, longest = (
        f"{resume['median_seconds']:.2f} s",
        f"longest {resume['longest_seconds']:.2f} s",
    )
    lines.append(
        f"| first batch after a resume in {resume['shards']} shards | {median} | {longest} | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", required=True, type=Path, help="a folder with JPEGs of photographs"
    )
    parser.add_argument("--count", type=int, default=4096, help="images a side and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=CORES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(
        path.absolute()
        for path in args.images.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg")
    )
    count = args.count // BATCH * BATCH
    with tempfile.TemporaryDirectory() as scratch:
        as_files, as_shards = write_files(Path(scratch), files)
        read_files = partial(read_ours, as_files, count, args.workers)
        plain = partial(read_plain, [str(file) for file in files], count, args.workers)
        shards = partial(read_ours, as_shards, count, args.workers)
        results = {
            "images": len(files),
            "workers": args.workers,
            "count": count,
            "decode": measure_rounds(
                {
                    "ours": read_files,
                    "normalized": partial(read_files, normalize=True),
                    "plain": plain,
                },
                count,
                args.rounds,
            ),
            "two views": measure_rounds(
                {
                    "ours": partial(read_files, make_two_view_example),
                    "plain": partial(plain, twice=True),
                },
                count,
                args.rounds,
            ),
            "shards": measure_rounds({"shards": shards, "files": read_files}, count, args.rounds),
            "resume": measure_resumes(Path(scratch), files[0], args.rounds),
        }
    print(format_table(results))
    if args.json:
        save_results(args.json, format_table(results), results)


if __name__ == "__main__":
    main()
