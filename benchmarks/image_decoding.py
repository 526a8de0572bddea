"""Decoding: images per second of `open_image`, of torchvision's decoder and of Pillow.

    python benchmarks/image_decoding.py --images DIR --json benchmarks/image_decoding.json

`before` is torchvision's decoder for JPEG and PNG, which crashes on damaged PNG files; `pillow` is
Pillow for both. The same photographs are read as JPEG and as PNG, by 1 and by 2 worker processes.
All alternate in each round. Reported are medians over rounds and ratios to `before` with quartiles.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from probe import save_results, seconds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image

from beit3.images import open_image


def decode_with_torchvision(path: Path) -> Tensor:
    with Image.open(path) as header:  # its size and mode were checked by Pillow before, too
        assert header.mode == "RGB"
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    return decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def decode_with_pillow(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


READERS: dict[str, Callable[[Path], Tensor]] = {
    "ours": open_image,
    "before": decode_with_torchvision,
    "pillow": decode_with_pillow,
}


class Decoded(Dataset):
    """The sum of each image's pixels: handing over whole images would be measured too."""

    def __init__(self, paths: list[Path], read: Callable[[Path], Tensor]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        return int(self.read(self.paths[index])[:, ::16, ::16].sum())


def measure_rate(paths: list[Path], reader: str, workers: int) -> float:
    """Measures images per second of `workers` processes, their start left out."""
    dataset = Decoded(paths, READERS[reader])
    batches = iter(DataLoader(dataset, batch_size=16, num_workers=workers, prefetch_factor=2))
    next(batches)
    return (len(paths) - 16) / seconds(lambda: list(batches))


def measure(
    paths: dict[str, list[Path]], rounds: int
) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Measures every reader in every round; returns (format, workers) -> reader -> rates."""
    torch.set_num_threads(1)
    rates: dict[tuple[str, int], dict[str, list[float]]] = {}
    for _ in range(rounds):
        for format in paths:
            for workers in (1, 2):
                of_readers = rates.setdefault((format, workers), {name: [] for name in READERS})
                for name in READERS:
                    of_readers[name].append(measure_rate(paths[format], name, workers))
    return rates


def format_table(rates: dict[tuple[str, int], dict[str, list[float]]]) -> str:
    """Formats a Markdown table: one row per format and number of workers."""
    lines = [
        "| | ours, images/s | before | pillow | ours / before | ours / pillow |",
        "|---|---|---|---|---|---|",
    ]
    for (format, workers), of_readers in rates.items():
        cells = [f"{statistics.median(of_readers[name]):.0f}" for name in READERS]
        for other in ("before", "pillow"):
            pairs = zip(of_readers["ours"], of_readers[other], strict=True)
            low, middle, high = statistics.quantiles([ours / base for ours, base in pairs], n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        unit = "worker" if workers == 1 else "workers"
        lines.append(f"| {format}, {workers} {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jpegs = sorted(args.images.rglob("*.jpg"))[: args.count]
    with tempfile.TemporaryDirectory() as folder:
        pngs = [Path(folder) / f"{number}.png" for number in range(len(jpegs))]
        for jpeg, png in zip(jpegs, pngs, strict=True):
            with Image.open(jpeg) as image:
                image.convert("RGB").save(png)
        jpegs = [path for path in jpegs if Image.open(path).mode == "RGB"]
        rates = measure({"JPEG": jpegs, "PNG": pngs}, args.rounds)
    table = format_table(rates)
    print(table)
    if args.json:
        figures = [
            {"format": format, "workers": workers, "images_per_second": of_readers}
            for (format, workers), of_readers in rates.items()
        ]
        save_results(args.json, table, figures)


if __name__ == "__main__":
    main()
