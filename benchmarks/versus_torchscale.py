r"""BASE at 224 px beside torchscale's BEiT-3 with the same weights and inputs, on CPU in float32.

    pip install --no-deps --target TORCHSCALE torchscale==0.3.0
    python benchmarks/versus_torchscale.py --torchscale TORCHSCALE \
        --json benchmarks/versus_torchscale.json

Each row is a use, and both sides return what it reads: the state of the class token for images and
pairs, that of the BOS token for texts, the loss of a training step with AdamW, the captions of a
beam search. Each has a process of its own, in which rounds alternate between the sides; a matrix
product runs before and after each call, so that a round on a busy machine is recognized. torchscale
runs as released and, except for captions, compiled; ours also with packed weights, with blocks
compiled around these, and in training compiled. Its captions are decoded as the release does: the
image repeated for every beam, padding kept, logits at every position.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # threads may spin: faster for both sides

import torch
from probe import measure_product_rate, read_peak_memory, save_results, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit3.data.batches import trim_padding
from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, ModelConfig
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate
from beit3.model.packed import pack
from beit3.task import Batch, Task
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.training.parallel import wrap_blocks
from beit3.weights.release_format import translate

LENGTHS = {8: (9, 11, 13, 14, 16, 17, 19, 23), 4: (11, 14, 16, 21)}
"""Tokens of captions: quantiles of 6,000 of Flickr8k (mean 15.6, longest 39), in a text tokenizer
of 8,000 pieces."""
PADDED, CAPTION, BEAMS, CANDIDATES, VOCAB = 64, 16, 3, 3, BASE.vocab_size
SPECIAL_TOKENS = SpecialTokens(bos=0, eos=2, pad=1, mask=64001)
TOLERANCE = 1e-5
TARGET_RATIOS = {
    "1 image": 1.4,
    "8 images": 1.15,
    "8 texts": 2.0,
    "8 pairs": 1.5,
    "training step, 4 pairs": 1.4,
    "captions, 1 image": 2.2,
    "captions, 4 images": 2.2,
}
"""Ratios to reach, unless `NEAR_PEAK` of the matrix product's rate is reached."""
NEAR_PEAK = 0.92
SIDES = ("ours", "packed", "theirs")


@dataclass(frozen=True)
class Use:
    """One row: calls of both sides, whose results must agree."""

    name: str
    ours: dict[str, Callable[[], Tensor]]
    theirs: dict[str, Callable[[], Tensor]]
    """Setting -> call; the fastest counts."""


# Torchscale ---------------------------------------------------------------------------------------


def import_torchscale(folder: str) -> None:
    """Makes torchscale importable, with stubs of packages whose functions are never called."""
    sys.path.insert(0, folder)
    stubs: dict[str, tuple[str, ...]] = {
        "fairscale": (),
        "fairscale.nn": ("checkpoint_wrapper", "wrap"),
    }
    stubs |= {"timm": (), "timm.models": (), "timm.models.layers": ("drop_path",)}
    for name, members in stubs.items():
        module = ModuleType(name)
        module.__dict__.update(dict.fromkeys(members))
        sys.modules[name] = module


class ReleasedNetwork(nn.Module):
    """torchscale's network in the released configuration, with the head over token ids."""

    def __init__(self, model: ModelConfig = BASE) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3 as Theirs

        self.beit3 = Theirs(
            EncoderConfig(
                img_size=model.image_size,
                patch_size=model.patch_size,
                vocab_size=model.vocab_size,
                multiway=True,
                layernorm_embedding=False,
                normalize_output=True,
                no_output_layer=True,
                encoder_embed_dim=model.dim,
                encoder_attention_heads=model.num_heads,
                encoder_ffn_embed_dim=model.ffn_dim,
                encoder_layers=model.depth,
            )
        )
        self.mlm_head = nn.Linear(model.dim, model.vocab_size)

    def forward(
        self, image: Tensor | None, text: Tensor | None, padding: Tensor | None = None
    ) -> Tensor:
        """Returns the first state [B, D]."""
        return self.beit3(textual_tokens=text, visual_tokens=image, text_padding_position=padding)[
            "encoder_out"
        ][:, 0]

    def captions(self, image: Tensor) -> Tensor:
        """Returns the scores [B] of the best captions, by the released beam search."""
        count, image = len(image), image.repeat_interleave(BEAMS, 0)
        state: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(12)}
        num_image = 1 + (image.shape[-1] // BASE.patch_size) ** 2
        text = torch.tensor([[SPECIAL_TOKENS.bos, SPECIAL_TOKENS.mask]]).repeat(len(image), 1)
        scores = torch.tensor([[0.0] + [-1e9] * (BEAMS - 1)]).repeat(count, 1)
        best = torch.full((count,), -torch.inf)
        for length in range(2, CAPTION):
            encode_first = length == 2
            mask = (~make_image_to_text_mask(num_image, length)).float() * -1e8
            states = self.beit3(
                textual_tokens=text,
                visual_tokens=image if encode_first else None,
                attn_mask=mask if encode_first else mask[-2:],
                incremental_state=state,
                positions=None if encode_first else torch.arange(length, length + 2)[None],
            )["encoder_out"]
            log_probs = self.mlm_head(states[:, num_image:] if encode_first else states)[
                :, -1
            ].log_softmax(-1)
            totals = (scores.view(-1, 1) + log_probs).view(count, -1)
            values, indices = totals.topk(CANDIDATES * BEAMS, dim=1)
            ends = (indices % VOCAB == SPECIAL_TOKENS.eos) | (length == CAPTION - 1)
            closed = torch.where(ends, values / length**0.6, -torch.inf)
            best = torch.maximum(best, closed.max(1).values)
            scores, order = values.masked_fill(ends, -1e9).topk(BEAMS, dim=1)
            indices = indices.gather(1, order)
            rows = (indices // VOCAB + torch.arange(count)[:, None] * BEAMS).view(-1)
            for layer in state.values():
                layer |= {
                    name: layer[name].index_select(0, rows)[:, :, :-1]
                    for name in ("prev_key", "prev_value")
                }
            text = torch.stack(
                ((indices % VOCAB).view(-1), torch.full((len(rows),), SPECIAL_TOKENS.mask)), 1
            )
        return best


# Rows ---------------------------------------------------------------------------------------------


def make_texts(count: int) -> tuple[Tensor, Tensor]:
    """Returns random captions [count, 64] of realistic lengths and their padding."""
    lengths = torch.tensor(LENGTHS[count])
    padding = torch.arange(PADDED) >= lengths[:, None]
    return torch.randint(4, VOCAB - 10, (count, PADDED)).masked_fill(
        padding, SPECIAL_TOKENS.pad
    ), padding


def make_uses(
    forms: Mapping[str, Captioning],
    theirs: ReleasedNetwork | None,
    trained: Sequence[str] = ("eager", "compiled"),
) -> Iterator[Use]:
    """Yields the rows of the table.

    `forms` are our network in several forms, `trained` the forms in which both are trained.
    """
    released = {} if theirs is None else {"eager": theirs, "compiled": torch.compile(theirs)}
    image = torch.randn(8, 3, 224, 224)
    text, padding = make_texts(8)
    encoded = {
        "1 image": (image[:1], None),
        "8 images": (image, None),
        "8 texts": (None, text, padding),
        "8 pairs": (image, text, padding),
    }
    for name, inputs in encoded.items():
        ours_by = {
            form: make_inference(partial(encode_first, task.backbone), inputs)
            for form, task in forms.items()
        }
        yield Use(
            name,
            ours_by,
            {form: make_inference(network, inputs) for form, network in released.items()},
        )
    yield Use(
        "training step, 4 pairs",
        make_our_steps(theirs, trained) if forms else {},
        {} if theirs is None else make_their_steps(theirs, trained),
    )
    for count in (1, 4):
        inputs = (image[:count],)
        ours_by = {
            form: make_inference(partial(captions, task), inputs)
            for form, task in forms.items()
            if form != "packed+compiled"
        }
        theirs_by = {} if theirs is None else {"eager": make_inference(theirs.captions, inputs)}
        yield Use(f"captions, {count} image{'s' if count > 1 else ''}", ours_by, theirs_by)


def encode_first(
    network: BEiT3, image: Tensor | None, text: Tensor | None = None, padding: Tensor | None = None
) -> Tensor:
    """Returns the first state [B, D] of the image, or of the text without an image."""
    batch: Batch = {} if padding is None else trim_padding({"text": text, "text_padding": padding})
    encoded = network(
        image, batch.get("text"), text_padding=batch.get("text_padding"), read="first"
    )
    return encoded.first("text" if image is None else "image")


def captions(task: Captioning, image: Tensor) -> Tensor:
    """Returns the scores [B] of the best captions."""
    results = generate(
        DecoderState(task.backbone, task.text_head, image, SPECIAL_TOKENS), CAPTION, Decoding()
    )
    return torch.tensor([caption.score for caption in results])


def make_inference(call: Callable[..., Tensor], inputs: tuple) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(*inputs)

    return run


def make_question_task() -> tuple[VQA, Batch]:
    """Returns question answering with the released head and 4 pairs, equal at every call."""
    torch.manual_seed(1)
    task = VQA(VQAConfig(model=replace(BASE, final_norm=False), num_answers=3129)).train()
    text, padding = make_texts(4)
    return task, {
        "image": torch.randn(4, 3, 224, 224),
        "text": text,
        "text_padding": padding,
        "target": torch.rand(4, 3129),
    }


def make_our_steps(
    theirs: ReleasedNetwork | None, forms: Sequence[str]
) -> dict[str, Callable[[], Tensor]]:
    """Returns a training step in each form, eager or with compiled blocks, of one network."""
    task, batch = make_question_task()
    if theirs is not None:
        copy_weights(task, theirs)
    wrap_blocks(task, compiled="compiled" in forms)
    call = partial(
        step,
        torch.optim.AdamW(task.parameters(), lr=0.0, fused=True),
        partial(compute_our_loss, task, batch),
    )
    return {form: partial(run_form, form, call) for form in forms}


def run_form(form: str, call: Callable[[], Tensor]) -> Tensor:
    """Makes a call, without compilation if the form is eager."""
    with torch.compiler.set_stance("force_eager" if form == "eager" else "default"):
        return call()


def compute_our_loss(task: VQA, batch: Batch) -> Tensor:
    return task(trim_padding(batch))["losses"]["loss"]


def make_their_steps(
    theirs: ReleasedNetwork, forms: Sequence[str]
) -> dict[str, Callable[[], Tensor]]:
    """Returns the same steps with torchscale's network and the same head."""
    task, batch = make_question_task()
    network = copy.deepcopy(theirs).train()
    del network.mlm_head
    network.beit3.encoder.layer_norm = nn.Identity()
    optimizer = torch.optim.AdamW(
        nn.ModuleList((network, task.pooler, task.head)).parameters(), lr=0.0, fused=True
    )
    call = partial(
        step,
        optimizer,
        partial(compute_their_loss, torch.compile(network), task.pooler, task.head, batch),
    )
    return {form: partial(run_form, form, call) for form in forms}


def compute_their_loss(
    network: Callable[..., Tensor], pooler: nn.Module, head: nn.Module, batch: Batch
) -> Tensor:
    logits = head(pooler(network(batch["image"], batch["text"], batch["text_padding"])))
    return nn.functional.binary_cross_entropy_with_logits(logits, batch["target"], reduction="sum")


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
    """Makes a training step and returns the mean loss."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.detach() / 4 / 3129


def copy_weights(task: Task, theirs: ReleasedNetwork) -> None:
    """Copies torchscale's weights into `task`; heads that they lack keep their values."""
    tensors, _, _ = translate(theirs.state_dict(), task)
    missing = task.load_state_dict(tensors, strict=False).missing_keys
    assert not any(name.startswith("backbone.") for name in missing), missing


# Measuring ----------------------------------------------------------------------------------------


def measure(use: Use, rounds: int) -> dict[str, Any]:
    """Measures seconds of every setting in interleaved rounds, product rates and differences."""
    sides = {f"ours {name}": call for name, call in use.ours.items()} | {
        f"theirs {name}": call for name, call in use.theirs.items()
    }
    outputs = [
        [call() for _ in range(3)][-1] for call in sides.values()
    ]  # so that all is compiled and packed
    error = max(float((output - outputs[0]).abs().max()) for output in outputs)
    assert error <= TOLERANCE, f"{use.name}: outputs differ by {error}"
    with FlopCounterMode(display=False) as counter:
        use.ours["eager"]()
    times: dict[str, list[float]] = {name: [] for name in sides}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            rate_before = measure_product_rate()
            times[name].append(seconds(sides[name]))
            rates[name].append(max(rate_before, measure_product_rate()))
    return {
        "use": use.name,
        "flops": counter.get_total_flops(),
        "error": error,
        "seconds": times,
        "product": rates,
    }


def make_row(results: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row of the table: medians, and ratios in the same round with their range."""
    times, rates, memory = results["seconds"], results["product"], results["peak_gb"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours, theirs = (
        min((name for name in medians if name.startswith(side)), key=lambda name: medians[name])
        for side in ("ours", "theirs")
    )

    def ratio(side: str) -> str:
        values = sorted(
            their_seconds / our_seconds
            for our_seconds, their_seconds in zip(times[ours], times[side], strict=True)
        )
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    utilization = statistics.median(
        results["flops"] / time / rate for time, rate in zip(times[ours], rates[ours], strict=True)
    )
    return {
        "use": results["use"],
        "ours": f"{medians[ours] * 1e3:.0f} ms, {ours.split()[1]}",
        "torchscale": f"{medians['theirs eager'] * 1e3:.0f} ms",
        "ratio": ratio("theirs eager"),
        "its best": f"{medians[theirs] * 1e3:.0f} ms, {theirs.split()[1]}",
        "ratio to that": ratio(theirs),
        "wanted": f"{TARGET_RATIOS[results['use']]}",
        "of the product's rate": f"{utilization:.0%}",
        "peak memory, ours, packed, its": ", ".join(
            f"{memory[side]:.2f}" if side in memory else "" for side in SIDES
        )
        + " GB",
    }


def measure_peaks(folder: str, use: str) -> dict[str, float]:
    """Measures the peak memory in GB of each side in a fresh process."""
    results = {}
    for side in SIDES if not use.startswith("training") else ("ours", "theirs"):
        command = [sys.executable, __file__, "--torchscale", folder, "--peak", side, "--only", use]
        process = subprocess.run(command, check=True, capture_output=True, text=True)
        results[side] = float(process.stdout.split()[-1])
    return results


def measure_peak(side: str, use: str) -> float:
    """Measures in that process."""
    forms: dict[str, Captioning] = {}
    if side != "theirs":
        forms = {
            "packed" if side == "packed" else "eager": Captioning(
                CaptioningConfig(model=BASE)
            ).eval()
        }
        for task in forms.values() if side == "packed" else ():
            pack(task)
    rows = make_uses(forms, None if forms else ReleasedNetwork().eval(), ("eager",))
    results = next(values for values in rows if values.name == use)
    call = next(iter((results.ours or results.theirs).values()))
    for _ in range(3):
        call()
    return read_peak_memory() / 1e9


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Formats the rows as a Markdown table."""
    lines = [
        "| " + " | ".join(cells) + " |"
        for cells in (rows[0], *(make_row.values() for make_row in rows))
    ]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def in_process(options: argparse.Namespace, use: str) -> dict[str, Any]:
    """Measures one use in a fresh process, without memory and programs of the others."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [
            sys.executable,
            __file__,
            "--torchscale",
            options.torchscale,
            "--rounds",
            str(options.rounds),
            "--only",
            use,
        ]
        subprocess.run([*command, "--json", str(out)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())["figures"][0]


def run_in_process(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in that process."""
    torch.manual_seed(0)
    theirs = ReleasedNetwork().eval()
    ours = Captioning(CaptioningConfig(model=BASE)).eval()
    copy_weights(ours, theirs)
    packed, compiled = copy.deepcopy(ours), copy.deepcopy(ours)
    pack(packed)
    pack(compiled)
    wrap_blocks(compiled, compiled=True)
    rows = make_uses({"eager": ours, "packed": packed, "packed+compiled": compiled}, theirs)
    use = next(values for values in rows if values.name == options.only)
    return measure(use, options.rounds) | {"peak_gb": measure_peaks(options.torchscale, use.name)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchscale", required=True, help="folder of `pip install --target`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=TARGET_RATIOS, help="this row")
    parser.add_argument("--peak", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import_torchscale(options.torchscale)
    if options.peak:
        print(measure_peak(options.peak, options.only))
        return
    results = []
    for use in [options.only] if options.only else TARGET_RATIOS:
        results.append(run_in_process(options) if options.only else in_process(options, use))
        print(format_table([make_row(results[-1])]).splitlines()[-1], flush=True)
    table = format_table([make_row(values) for values in results])
    print(table)
    if options.json:
        save_results(options.json, table, results)


if __name__ == "__main__":
    main()
