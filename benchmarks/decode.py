"""Captions on CPU: the cost of the image, of each token, and of encoding everything per token.

    python benchmarks/decode.py --json benchmarks/decode.json

BASE at 224 px, 16 tokens, random weights. One process alternates between the search with a cache,
plain and with packed weights, and encoding image and caption once per token, which is what a
search without a cache does.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from probe import measure_product_rate, save_results, seconds
from torch import Tensor

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.config import BASE
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate
from beit3.model.packed import pack
from beit3.tasks.captioning import Captioning, CaptioningConfig

LENGTH, SPECIAL_TOKENS = 16, SpecialTokens(bos=0, eos=2, pad=1, mask=64001)
CASES = ((1, 1), (1, 3), (1, 5), (4, 3))
"""(images, beams)."""


def search(task: Captioning, image: Tensor, beams: int) -> None:
    generate(
        DecoderState(task.backbone, task.text_head, image, SPECIAL_TOKENS),
        LENGTH,
        Decoding("beam", beams),
    )


def encode_image(task: Captioning, image: Tensor) -> None:
    """Encodes the image and the first token."""
    DecoderState(task.backbone, task.text_head, image, SPECIAL_TOKENS)


def encode_again(task: Captioning, image: Tensor, beams: int) -> None:
    """Encodes image and caption again for every token, after the first for all beams."""
    for length in range(2, LENGTH):
        rows = image if length == 2 else image.repeat_interleave(beams, 0)
        text = torch.full((len(rows), length), SPECIAL_TOKENS.mask)
        states = task.backbone(
            rows,
            text,
            attention_mask=make_image_to_text_mask(1 + BASE.num_patches, length),
            read="last",
        ).of("text")
        task.text_head(states[:, -1]).log_softmax(-1)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain, packed = (Captioning(CaptioningConfig(model=BASE)).eval() for _ in range(2))
    plain.init_weights()
    packed.load_state_dict(plain.state_dict())
    pack(packed)
    results = []
    lines = [
        "| images, beams | search | image | a token | packed | without cache |",
        "|---|---|---|---|---|---|",
    ]
    for count, beams in CASES:
        image = torch.randn(count, 3, 224, 224)
        calls: dict[str, Callable[[], None]] = {
            "search": partial(search, plain, image, beams),
            "first": partial(encode_image, plain, image),
            "packed": partial(search, packed, image, beams),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call(), call()
        rates = []
        for _ in range(options.rounds):
            rates.append(measure_product_rate())
            for name, call in calls.items():
                times[name].append(seconds(call))
        uncached = seconds(partial(encode_again, plain, image, beams))
        medians = {name: statistics.median(values) for name, values in times.items()}
        token = (medians["search"] - medians["first"]) / (LENGTH - 3)
        results.append(
            {"images": count, "beams": beams, "seconds": times, "anew": uncached, "probe": rates}
        )
        milliseconds = [
            f"{1e3 * value:.0f} ms"
            for value in (medians["search"], medians["first"], token, medians["packed"])
        ]
        lines.append(
            f"| {count}, {beams} | {' | '.join(milliseconds)} "
            f"| {uncached * 1e3:.0f} ms ({uncached / medians['search']:.1f}x) |"
        )
    print("\n".join(lines))
    if options.json:
        save_results(options.json, "\n".join(lines), results)


if __name__ == "__main__":
    main()
