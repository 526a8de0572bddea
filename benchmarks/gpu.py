"""On an accelerator: forward pass and pretraining step beside torchscale, and their utilization.

    benchmarks/gpu.sh

BASE, LARGE and GIANT in bfloat16. A step has three micro-batches, of images, of texts of 512 tokens
and of pairs, with codes given. Utilization is the model's FLOPs, without recomputation, over
989 TFLOP/s, the dense bfloat16 peak of an H100; beside it stands what the step's own matrix
products alone reach. torchscale has the form of BASE and LARGE, and for GIANT the same sizes
unshared; the faster of plain and compiled counts on both sides. On CPU (--device cpu --sizes tiny)
it only shows that the program runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pretrain_step import make_micro_batches
from probe import save_results
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from versus_torchscale import ReleasedNetwork, import_torchscale

from beit3.data.views.masking import IGNORE_INDEX
from beit3.model.config import BASE, GIANT, LARGE, TINY, ModelConfig
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.training.parallel import wrap_blocks

PEAK = 989e12
SIZES: dict[str, tuple[ModelConfig, tuple[int, int, int], str]] = {
    "tiny": (TINY, (4, 2, 4), "none"),
    "base": (BASE, (128, 64, 128), "none"),
    "large": (LARGE, (64, 32, 64), "selective"),
    "giant": (GIANT, (32, 32, 32), "selective"),
}
"""Network; images, texts, pairs of a micro-batch; what the backward pass recomputes."""


class Clock:
    """Measures the seconds of a call, including the accelerator's work."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def move_to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


class TorchscalePretraining(nn.Module):
    """Computes the same losses with torchscale's network."""

    def __init__(self, model: ModelConfig, num_codes: int):
        super().__init__()
        self.network = ReleasedNetwork(model)
        self.mim_head = nn.Linear(model.dim, num_codes)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.network.beit3(
            textual_tokens=batch.get("text"),
            visual_tokens=batch.get("image"),
            vision_masked_position=batch.get("image_mask"),
        )["encoder_out"]
        results, num_image = [], 0
        if "image" in batch:
            num_image, mask = 1 + batch["image_mask"].shape[1], batch["image_mask"].bool()
            results.append(
                (self.mim_head(states[:, 1:num_image][mask]), batch["image_codes"][mask])
            )
        if "text" in batch:
            mask = batch["text_target"] != IGNORE_INDEX
            results.append(
                (self.network.mlm_head(states[:, num_image:][mask]), batch["text_target"][mask])
            )
        return torch.stack(
            [F.cross_entropy(logits, target, reduction="sum") for logits, target in results]
        ).sum()


def build_step(
    network: nn.Module,
    loss: Callable[[dict[str, Tensor]], Tensor],
    batches: Sequence[dict[str, Tensor]],
) -> Callable[[], None]:
    """Returns a training step: forward and backward of micro-batches in bfloat16, AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True)
    device = next(network.parameters()).device

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(batch)
            value.backward()
        optimizer.step()

    return step


def measure_products(batches_flops: dict[tuple[int, int, int], int], clock: Clock) -> float:
    """Measures the FLOP/s of the step's matrix products, given as (rows, in, out) -> count."""
    total, seconds = 0.0, 0.0
    for (rows, inner, outer), count in batches_flops.items():
        left = torch.randn(rows, inner, device=clock.device, dtype=torch.bfloat16)
        right = torch.randn(inner, outer, device=clock.device, dtype=torch.bfloat16)
        left @ right
        seconds += count * min(clock(lambda left=left, right=right: left @ right) for _ in range(5))
        total += count * 2 * rows * inner * outer
    return total / seconds


def count_product_shapes(
    task: Pretrain, batches: Sequence[dict[str, Tensor]]
) -> dict[tuple[int, int, int], int]:
    """Counts the products (rows, in, out) of linear layers in a forward pass over `batches`."""
    results: dict[tuple[int, int, int], int] = {}

    def note(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        key = (inputs[0].numel() // inputs[0].shape[-1], module.in_features, module.out_features)
        results[key] = results.get(key, 0) + 1

    hooks = [
        module.register_forward_hook(note) for module in task.modules() if type(module) is nn.Linear
    ]
    with torch.no_grad():
        for batch in batches:
            task(batch)
    for hook in hooks:
        hook.remove()
    return results


def measure(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measures steps, forward passes, utilization and memory of one network on both sides."""
    model, counts, recompute = SIZES[size]
    clock, config = Clock(device), PretrainConfig(model=model)
    torch.manual_seed(0)
    with torch.device(device):
        ours = Pretrain(config).train()
    ours.init_weights()
    batches = [move_to(batch, device) for batch in make_micro_batches(ours, *counts)]
    with FlopCounterMode(display=False) as counter, torch.autocast(device.type, torch.bfloat16):
        for batch in batches:
            torch.stack(list(ours(batch)["losses"].values())).sum().backward()
    flops = counter.get_total_flops()
    rate = measure_products(count_product_shapes(ours, batches), clock)
    wrap_blocks(ours, recompute=recompute, compiled=device.type == "cuda")  # type: ignore[arg-type]
    steps = {
        "ours": build_step(
            ours, lambda batch: torch.stack(list(ours(batch)["losses"].values())).sum(), batches
        )
    }
    forwards = {"ours": lambda: [ours(batch) for batch in batches]}
    results: dict[str, Any] = {
        "size": size,
        "counts": counts,
        "recompute": recompute,
        "flops": flops,
        "product_rate": rate,
    }
    for side in ("ours", "theirs"):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            if side == "theirs":
                with torch.device(device):
                    theirs = TorchscalePretraining(
                        replace(model, shared_attention=False), config.num_codes
                    ).train()
                call = torch.compile(theirs) if device.type == "cuda" else theirs
                steps["theirs"] = build_step(theirs, call, batches)
                forwards["theirs"] = lambda call=call: [call(batch) for batch in batches]
            for _ in range(3):
                steps[side]()
            results[f"{side}_memory_gb"] = (
                torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
            )
        except torch.OutOfMemoryError:
            results[f"{side}_memory_gb"], steps = (
                "out of memory",
                {name: step for name, step in steps.items() if name != side},
            )
            forwards.pop(side, None)
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {side: [] for side in steps}
    passes: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(rounds):
        for side in steps:
            times[side].append(clock(steps[side]))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                passes[side].append(clock(forwards[side]))
    for side in steps:
        results[f"{side}_step_s"], results[f"{side}_forward_s"] = (
            statistics.median(times[side]),
            statistics.median(passes[side]),
        )
    results["utilization"], results["product_utilization"] = (
        flops / results["ours_step_s"] / PEAK,
        rate / PEAK,
    )
    with suppress(KeyError):
        results["ratio"] = statistics.median(
            theirs_seconds / ours_seconds
            for ours_seconds, theirs_seconds in zip(times["ours"], times["theirs"], strict=True)
        )
    return results


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| network | step | torchscale | ratio | utilization | products alone | memory, GB | "
        "torchscale |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        theirs, ratio = row.get("theirs_step_s"), row.get("ratio")
        cells = [
            row["size"],
            f"{row['ours_step_s'] * 1e3:.0f} ms",
            f"{theirs * 1e3:.0f} ms" if theirs else "",
            f"{ratio:.2f}" if ratio else "",
            f"{row['utilization']:.1%}",
            f"{row['product_utilization']:.1%}",
            str(row["ours_memory_gb"]),
            str(row.get("theirs_memory_gb")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchscale", required=True, help="folder of `pip install --target`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=("base", "large", "giant"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    import_torchscale(options.torchscale)
    rows = []
    for size in options.sizes:
        rows.append(measure(size, torch.device(options.device), options.rounds))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            save_results(options.json, format_table(rows), rows)


if __name__ == "__main__":
    main()
