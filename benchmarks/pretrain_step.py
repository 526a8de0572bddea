"""Memory and time of a pretraining step: the cost of its largest parts, and what is saved.

    python benchmarks/pretrain_step.py --json benchmarks/pretrain_step.json

Two tables. The head over 64,010 token ids: peak memory of forward and backward beside states and
weights, for growing numbers of predictions, with all logits at once and in chunks; each is measured
in a process of its own, by the system's count of resident memory. And a complete step of BASE
(4 images, 1 text of 512 tokens, 4 pairs; codes given) under the three settings of
`run.checkpointing`: peak memory, and time in interleaved rounds with a matrix product beside each.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from probe import measure_product_rate, read_peak_memory, save_results, seconds
from torch import Tensor, nn

from beit3.data.views.masking import IGNORE_INDEX
from beit3.model.config import BASE, TINY, ModelConfig
from beit3.ops.losses import MAX_LOGITS, chunked_vocabulary_loss, token_cross_entropy
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.training.parallel import wrap_blocks

PREDICTIONS = (512, 1024, 2048, 4096, 8192)
SETTINGS = ("none", "selective", "full")
SIZES = {"base": BASE, "tiny": TINY}


def measure_head_memory(predictions: int, max_logits: int) -> dict[str, float]:
    """Measures the MB of the head's losses and gradients beyond states, weights and gradients."""
    head, states = nn.Linear(768, 64010), torch.randn(predictions, 768, requires_grad=True)
    target = torch.randint(0, 64010, (predictions,))
    for tensor in (*head.parameters(), states):
        tensor.grad = torch.zeros_like(tensor) + 1
    memory_before = read_peak_memory()
    chunked_vocabulary_loss(states, target, head, token_cross_entropy, max_logits=max_logits)[
        0
    ].sum().backward()
    return {"mb": (read_peak_memory() - memory_before) / 1e6}


def make_micro_batches(task: Pretrain, images: int, texts: int, pairs: int) -> list[dict[str, Any]]:
    """Returns random batches of the three sources with the mask rates of the paper."""
    config, model = task.config, task.config.model
    side = model.image_size

    def image(count: int) -> dict[str, Tensor]:
        mask = torch.arange(model.num_patches) < int(config.image_mask_rate * model.num_patches)
        codes = torch.randint(0, config.num_codes, (count, model.num_patches))
        return {
            "image": torch.randn(count, 3, side, side),
            "image_mask": mask.expand(count, -1),
            "image_codes": codes,
        }

    def text(count: int, length: int, rate: float) -> dict[str, Tensor]:
        ids = torch.randint(4, model.vocab_size, (count, length))
        return {
            "text": ids,
            "text_target": ids.masked_fill(torch.rand(count, length) > rate, IGNORE_INDEX),
        }

    length = min(config.monomodal_text_length, model.max_text_length)
    pair_batch = image(pairs) | text(pairs, config.text_length, config.pair_text_mask_rate)
    batches = [image(images), text(texts, length, config.text_mask_rate), pair_batch]
    return [batch for batch, count in zip(batches, (images, texts, pairs), strict=True) if count]


class Step:
    """A pretraining step with one setting of activation checkpointing."""

    def __init__(self, model: ModelConfig, recompute: str, counts: tuple[int, int, int]):
        torch.manual_seed(0)
        self.task = Pretrain(PretrainConfig(model=model)).train()
        self.task.init_weights()
        wrap_blocks(self.task, recompute=recompute)  # type: ignore[arg-type]
        self.batches = make_micro_batches(self.task, *counts)
        self.optimizer = torch.optim.AdamW(self.task.parameters(), lr=0.0, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        for batch in self.batches:
            torch.stack(list(self.task(batch)["losses"].values())).sum().backward()
        self.optimizer.step()


def measure_step_memory(size: str, setting: str, counts: tuple[int, int, int]) -> dict[str, float]:
    step = Step(SIZES[size], setting, counts)
    step(), step()
    return {"mb": read_peak_memory() / 1e6}


def measure_step_times(size: str, counts: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Measures seconds of a step under each setting, and product rates beside them."""
    steps = {setting: Step(SIZES[size], setting, counts) for setting in SETTINGS}
    times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    rates = []
    for step in steps.values():
        step()
    for _ in range(rounds):
        for setting, step in steps.items():
            rates.append(measure_product_rate())
            times[setting].append(seconds(step))
    ratios = {
        setting: statistics.median(
            time / base_time for time, base_time in zip(times[setting], times["none"], strict=True)
        )
        for setting in SETTINGS
    }
    return {"seconds": times, "ratio": ratios, "probe": rates}


def run_in_process(*arguments: object) -> float:
    """Measures memory in a fresh process."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[
        "mb"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument(
        "--counts", type=int, nargs=3, default=(4, 1, 4), help="images, texts, pairs"
    )
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = tuple(options.counts)
    if options.one:
        part, first, second = options.one[:3]
        results = (
            measure_head_memory(int(first), int(second))
            if part == "head"
            else measure_step_memory(first, second, tuple(map(int, options.one[3:])))
        )
        print(json.dumps(results))
        return
    head = {
        count: {
            "at once": run_in_process("head", count, 1 << 40),
            "in pieces": run_in_process("head", count, MAX_LOGITS),
        }
        for count in PREDICTIONS
    }
    lines = ["| predictions over 64,010 ids | all logits at once | in pieces |", "|---|---|---|"]
    lines += [
        f"| {count} | {results['at once']:.0f} MB | {results['in pieces']:.0f} MB |"
        for count, results in head.items()
    ]
    memory = {
        setting: run_in_process("step", options.size, setting, *counts) for setting in SETTINGS
    }
    times = measure_step_times(options.size, counts, options.rounds)
    lines += ["", "| run.checkpointing | peak memory | time beside none |", "|---|---|---|"]
    for setting in SETTINGS:
        median = statistics.median(times["seconds"][setting])
        lines.append(
            f"| {setting} | {memory[setting]:.0f} MB | {times['ratio'][setting]:.2f} "
            f"({median:.2f} s) |"
        )
    print("\n".join(lines))
    if options.json:
        save_results(options.json, "\n".join(lines), {"head": head, "memory": memory, **times})


if __name__ == "__main__":
    main()
