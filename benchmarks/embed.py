r"""Images a second from JPEG files to vectors: `beit3 embed` beside plain loops, BASE at 224, CPU.

    pip install --no-deps --target TORCHSCALE torchscale==0.3.0
    pip install --no-deps --target OPEN_CLIP open_clip_torch timm ftfy regex wcwidth
    python benchmarks/embed.py PHOTOS --torchscale TORCHSCALE --open-clip OPEN_CLIP \
        --json benchmarks/embed.json

The plain loop is that of public repositories: Pillow opens and resizes one image after the other,
torchscale's network encodes it. open_clip's loop is its own: its transform in a DataLoader of as
many workers as cores, its ViT-B/16, a network of the same size with random weights. Ours encodes
the same files in each precision. Each round encodes the same photographs by every side in turn, so
that a busy machine slows all of them; `busy` is processor time over wall time and cores.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from probe import measure_product_rate, save_results
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from versus_torchscale import ReleasedNetwork, copy_weights, import_torchscale

from beit3.data.views.preprocessing import Preprocessing
from beit3.images import SUFFIXES
from beit3.model.config import BASE
from beit3.search.encoding import encode_shards
from beit3.search.finishing import finish
from beit3.search.folder import open_folder
from beit3.search.inputs import InputOptions
from beit3.search.preparing import EmbedOptions, prepare, read_inputs
from beit3.search.worklist import Worklist
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.weights.store import save_weights

PRECISIONS = ("float32", "bfloat16", "int8")
TORCHSCALE, OPEN_CLIP = "torchscale, plain loop", "open_clip ViT-B/16, its loader"
OPEN_CLIP_BATCH = 32


# Their sides --------------------------------------------------------------------------------------


def make_plain_loop(network: nn.Module, paths: Sequence[Path]) -> Callable[[], np.ndarray]:
    """Returns the loop of public repositories, with the right preprocessing."""
    transform = v2.Compose(
        [
            v2.Resize((224, 224), interpolation=v2.InterpolationMode.BICUBIC),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )

    @torch.inference_mode()
    def run() -> np.ndarray:
        vectors = []
        for path in paths:
            image = transform(Image.open(path).convert("RGB"))[None]
            vectors.append(network(image, None)[0])
        return torch.stack(vectors).numpy()

    return run


class Files(Dataset):
    """Image files as open_clip's transform makes them."""

    def __init__(self, paths: Sequence[Path], transform: Callable) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]))


def make_open_clip_loop(folder: str, paths: Sequence[Path]) -> Callable[[], np.ndarray]:
    """Returns open_clip's own way: its transform in loader workers, its image tower in batches."""
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]  # torchscale got an empty one
    import open_clip

    network, _, transform = open_clip.create_model_and_transforms("ViT-B-16", pretrained=None)
    network.eval()
    loader = DataLoader(
        Files(paths, transform), batch_size=OPEN_CLIP_BATCH, num_workers=os.cpu_count() or 1
    )

    @torch.inference_mode()
    def run() -> np.ndarray:
        return torch.cat([network.encode_image(batch, normalize=True) for batch in loader]).numpy()

    return run


# Our side -----------------------------------------------------------------------------------------


def make_weights(network: ReleasedNetwork, folder: Path) -> None:
    """Writes weights of retrieval that hold torchscale's network."""
    task = Retrieval(RetrievalConfig(model=BASE, image=Preprocessing(224)))
    task.init_weights()
    copy_weights(task, network)
    save_weights(task, folder)


class Embedding:
    """`beit3 embed` of one folder in one precision, again and again."""

    def __init__(self, weights: Path, photos: Path, out: Path, precision: str) -> None:
        self.out, self.options = out, EmbedOptions(precision=precision)
        self.items, self.settings, self.predictor = read_inputs(
            str(weights), [photos], out, InputOptions(), self.options, torch.device("cpu")
        )
        self.num_runs = 0

    def begin(self) -> Worklist:
        """Surveys the images for another run."""
        self.num_runs += 1
        out = self.out / f"{self.num_runs}"
        out.mkdir(parents=True)
        prepare(out, self.settings, self.items, self.options)
        return Worklist(out)

    def run(self) -> np.ndarray:
        """Surveys and encodes the images, writes the folder, and returns the vectors."""
        worklist = self.begin()
        encode_shards(self.predictor, worklist, worklist.list_shards(duplicates=False))
        finish(worklist)
        folder = open_folder(worklist.out)
        return np.concatenate(folder.get_vectors()).astype(np.float32)


# Measuring ----------------------------------------------------------------------------------------


def measure(run: Callable[[], np.ndarray]) -> dict[str, Any]:
    """Measures the wall and processor time of one run, child processes included."""
    cpu_before, started = read_cpu_time(), time.perf_counter()
    vectors = run()
    wall = time.perf_counter() - started
    return {"wall": wall, "cpu": read_cpu_time() - cpu_before, "vectors": vectors}


def read_cpu_time() -> float:
    """Returns the processor seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_rounds(
    sides: dict[str, Callable[[], np.ndarray]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Runs all sides in turn, after a first round that is not counted."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            result = measure(run)
            if number:
                results[name].append(result)
                print(f"{name}: {result['wall']:.2f} s", file=sys.stderr, flush=True)
    return results


def format_table(results: dict[str, list[dict[str, Any]]], num_images: int) -> str:
    """Formats one row a side; ratios are of the same round, medians with quartiles."""
    cores = os.cpu_count() or 1
    exact = results["beit3 float32"][0]["vectors"]
    lines = [
        "| side | images/s | times the plain loop | busy | cosine to float32 |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        walls = [result["wall"] for result in rounds]
        ratios = [
            plain["wall"] / own for plain, own in zip(results[TORCHSCALE], walls, strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        busy = statistics.median(result["cpu"] / result["wall"] / cores for result in rounds)
        cosine = "-"
        if name.startswith("beit3"):
            cosine = f"{(rounds[0]['vectors'] * exact).sum(1).min():.5f}"
        lines.append(
            f"| {name} | {num_images / statistics.median(walls):.2f} | "
            f"{middle:.2f} ({low:.2f} to {high:.2f}) | {busy:.0%} | {cosine} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of JPEG files")
    parser.add_argument("--torchscale", required=True, help="folder of `pip install --target`")
    parser.add_argument("--open-clip", help="the same of open_clip; left out without it")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="*", default=PRECISIONS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import_torchscale(options.torchscale)
    torch.manual_seed(0)
    network = ReleasedNetwork().eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = folder / "photos"
        photos.mkdir()
        files = sorted(path for path in options.photos.iterdir() if path.suffix in SUFFIXES)
        for path in files[: options.images]:
            (photos / path.name).symlink_to(path.resolve())
        paths = sorted(photos.iterdir())
        make_weights(network, folder / "weights")
        sides = {TORCHSCALE: make_plain_loop(network, paths)}
        if options.open_clip:
            sides[OPEN_CLIP] = make_open_clip_loop(options.open_clip, paths)
        for precision in options.precisions:
            embedding = Embedding(folder / "weights", photos, folder / precision, precision)
            sides[f"beit3 {precision}"] = embedding.run
        rate = measure_product_rate() / 1e9
        results = run_rounds(sides, options.rounds)
    table = format_table(results, len(paths))
    table += f"\n\n{len(paths)} photographs, matrix product {rate:.0f} GFLOP/s before."
    print(table)
    if options.json:
        figures = {
            name: [{key: result[key] for key in ("wall", "cpu")} for result in rounds]
            for name, rounds in results.items()
        }
        save_results(options.json, table, figures)


if __name__ == "__main__":
    main()
