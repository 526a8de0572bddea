"""BASE at 224 beside torchscale's BEiT-3 with the same weights and inputs, on a processor in float32.

    pip install --no-deps --target TORCHSCALE torchscale==0.3.0
    python benchmarks/versus_torchscale.py --torchscale TORCHSCALE --json benchmarks/versus_torchscale.json

Each row is a use, and both sides return what it reads: the class token's state of images and pairs, the begin mark's of
texts, the loss of a training step with AdamW, the captions of a beam search. Rounds alternate between the sides in one
process; a matrix product runs before and after each call, so that a round in which the machine was busy is known. torchscale
runs as released and compiled, and the faster of the two counts. Its captions are decoded as the release does: the image
repeated for every beam, padding kept, logits at every position.
"""

import argparse
import copy
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # alone on the machine threads may spin: faster for both sides

import torch
from probe import probe, save, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit3.model.attention_mask import image_to_text
from beit3.model.beit3 import BEiT3
from beit3.model.config import BASE, ModelConfig
from beit3.model.generation import Decoding, Marks, Slots, generate
from beit3.model.packed import pack
from beit3.task import Batch, Task, trimmed
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.weights.official import translate

LENGTHS = {8: (9, 11, 13, 14, 16, 17, 19, 23), 4: (11, 14, 16, 21)}
"""Tokens of captions: quantiles of 6,000 of Flickr8k (mean 15.6, longest 39), in a text tokenizer of 8,000 pieces."""
PADDED, CAPTION, BEAMS, CANDIDATES, VOCAB = 64, 16, 3, 3, BASE.vocab_size
MARKS = Marks(bos=0, eos=2, pad=1, mask=64001)
TOLERANCE = 1e-5
WANTED = {
    "1 image": 1.4, "8 images": 1.15, "8 texts": 2.0, "8 pairs": 1.5, "training step, 4 pairs": 1.4,
    "captions, 1 image": 2.2, "captions, 4 images": 2.2,
}  # fmt: skip
"""Ratios to reach, or `NEAR` of the rate of the matrix product in that round."""
NEAR = 0.92


@dataclass(frozen=True)
class Use:
    """One row: what both sides compute, and return as a tensor that must agree."""

    name: str
    ours: dict[str, Callable[[], Tensor]]
    theirs: dict[str, Callable[[], Tensor]]
    """By setting; the fastest counts."""


# Torchscale ----------------------------------------------------------------------------------------------------------


def import_torchscale(folder: str) -> None:
    """Make torchscale importable, with stand-ins for what it imports and a network like this never calls."""
    sys.path.insert(0, folder)
    stubs: dict[str, tuple[str, ...]] = {"fairscale": (), "fairscale.nn": ("checkpoint_wrapper", "wrap")}
    stubs |= {"timm": (), "timm.models": (), "timm.models.layers": ("drop_path",)}
    for name, members in stubs.items():
        module = ModuleType(name)
        module.__dict__.update(dict.fromkeys(members))
        sys.modules[name] = module


class Released(nn.Module):
    """torchscale's network as the release puts it to use, with the words' head."""

    def __init__(self, model: ModelConfig = BASE) -> None:
        super().__init__()
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3 as Theirs

        self.beit3 = Theirs(
            EncoderConfig(
                img_size=model.image_size, patch_size=model.patch_size, vocab_size=model.vocab_size, multiway=True,
                layernorm_embedding=False, normalize_output=True, no_output_layer=True, encoder_embed_dim=model.dim,
                encoder_attention_heads=model.num_heads, encoder_ffn_embed_dim=model.ffn_dim, encoder_layers=model.depth,
            )
        )  # fmt: skip
        self.mlm_head = nn.Linear(model.dim, model.vocab_size)

    def forward(self, image: Tensor | None, text: Tensor | None, padding: Tensor | None = None) -> Tensor:
        """The first state [B, D]."""
        return self.beit3(textual_tokens=text, visual_tokens=image, text_padding_position=padding)["encoder_out"][:, 0]

    def captions(self, image: Tensor) -> Tensor:
        """Beam search by the release's procedure: [B] scores of the best captions."""
        count, image = len(image), image.repeat_interleave(BEAMS, 0)
        state: dict[int, dict[str, Tensor]] = {layer: {} for layer in range(12)}
        num_image = 197
        text = torch.tensor([[MARKS.bos, MARKS.mask]]).repeat(len(image), 1)
        scores = torch.tensor([[0.0] + [-1e9] * (BEAMS - 1)]).repeat(count, 1)
        best = torch.full((count,), -torch.inf)
        for length in range(2, CAPTION):
            first = length == 2
            mask = (~image_to_text(num_image, length)).float() * -1e8
            states = self.beit3(
                textual_tokens=text, visual_tokens=image if first else None, attn_mask=mask if first else mask[-2:],
                incremental_state=state, positions=None if first else torch.arange(length, length + 2)[None],
            )["encoder_out"]  # fmt: skip
            log_probs = self.mlm_head(states[:, num_image:] if first else states)[:, -1].log_softmax(-1)
            totals = (scores.view(-1, 1) + log_probs).view(count, -1)
            values, places = totals.topk(CANDIDATES * BEAMS, dim=1)
            ends = (places % VOCAB == MARKS.eos) | (length == CAPTION - 1)
            closed = torch.where(ends, values / length**0.6, -torch.inf)
            best = torch.maximum(best, closed.max(1).values)
            scores, order = values.masked_fill(ends, -1e9).topk(BEAMS, dim=1)
            places = places.gather(1, order)
            rows = (places // VOCAB + torch.arange(count)[:, None] * BEAMS).view(-1)
            for layer in state.values():
                layer |= {name: layer[name].index_select(0, rows)[:, :, :-1] for name in ("prev_key", "prev_value")}
            text = torch.stack(((places % VOCAB).view(-1), torch.full((len(rows),), MARKS.mask)), 1)
        return best


# Rows ----------------------------------------------------------------------------------------------------------------


def texts(count: int) -> tuple[Tensor, Tensor]:
    """Captions [count, 64] and their padding, in the lengths of real ones."""
    lengths = torch.tensor(LENGTHS[count])
    padding = torch.arange(PADDED) >= lengths[:, None]
    return torch.randint(4, VOCAB - 10, (count, PADDED)).masked_fill(padding, MARKS.pad), padding


def uses(ours: Captioning, theirs: Released) -> Iterator[Use]:
    """The rows, in the order of the table."""
    network, compiled, packed = ours.backbone, torch.compile(theirs), copy.deepcopy(ours)
    pack(packed)
    image = torch.randn(8, 3, 224, 224)
    text, padding = texts(8)

    encoded = {"1 image": (image[:1], None), "8 images": (image, None), "8 texts": (None, text, padding), "8 pairs": (image, text, padding)}
    for name, inputs in encoded.items():
        yield Use(
            name,
            {"eager": inferring(partial(first, network), inputs), "packed": inferring(partial(first, packed.backbone), inputs)},
            {"eager": inferring(theirs, inputs), "compiled": inferring(compiled, inputs)},
        )
    yield training(theirs)
    for count in (1, 4):
        inputs = (image[:count],)
        yield Use(
            f"captions, {count} image{'s' if count > 1 else ''}",
            {"eager": inferring(partial(captions, ours), inputs), "packed": inferring(partial(captions, packed), inputs)},
            {"eager": inferring(theirs.captions, inputs)},
        )


def first(network: BEiT3, image: Tensor | None, text: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
    """The first state [B, D] of images and pairs, of the texts where they are alone."""
    batch: Batch = {} if padding is None else trimmed({"text": text, "text_padding": padding})
    encoded = network(image, batch.get("text"), text_padding=batch.get("text_padding"), read="first")
    return encoded.first("text" if image is None else "image")


def captions(task: Captioning, image: Tensor) -> Tensor:
    """Scores [B] of the best captions."""
    found = generate(Slots(task.backbone, task.text_head, image, MARKS), CAPTION, Decoding())
    return torch.tensor([caption.score for caption in found])


def inferring(call: Callable[..., Tensor], inputs: tuple) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return call(*inputs)

    return run


def training(theirs: Released) -> Use:
    """A step of question answering on 4 pairs: forward, backward, AdamW; both end at the released head and loss."""
    task = VQA(VQAConfig(model=replace(BASE, final_norm=False), num_answers=3129))
    task.init_weights()
    text, padding = texts(4)
    batch = {"image": torch.randn(4, 3, 224, 224), "text": text, "text_padding": padding, "target": torch.rand(4, 3129)}
    head = copy.deepcopy(nn.ModuleList((task.pooler, task.head)))
    fill(task, theirs)
    copied = nn.ModuleDict({"network": copy.deepcopy(theirs), "head": head}).train()
    del copied["network"].mlm_head
    copied["network"].beit3.encoder.layer_norm = nn.Identity()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.0, fused=True) for each in (task, copied)]

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach() / 4 / 3129

    def released() -> Tensor:
        logits = head[1](head[0](copied["network"](batch["image"], text, padding)))
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["target"], reduction="sum")

    return Use(
        "training step, 4 pairs",
        {"eager": lambda: step(optimizers[0], lambda: task.forward(trimmed(batch))["losses"]["loss"])},
        {"eager": lambda: step(optimizers[1], released)},
    )


def fill(task: Task, theirs: Released) -> None:
    """torchscale's weights through our loader's table; the heads of `task` that they lack keep their values."""
    tensors, _, _ = translate(theirs.state_dict(), task)
    missing = task.load_state_dict(tensors, strict=False).missing_keys
    assert not any(name.startswith("backbone.") for name in missing), missing


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(use: Use, rounds: int) -> dict[str, object]:
    """Medians over interleaved rounds, and ratios with their spread."""
    outputs = [[call() for _ in range(3)][-1] for call in (*use.ours.values(), *use.theirs.values())]  # compiled and packed by now
    error = max(float((output - outputs[0]).abs().max()) for output in outputs)
    assert error <= TOLERANCE, f"{use.name}: outputs differ by {error}"
    with FlopCounterMode(display=False) as counter:
        next(iter(use.ours.values()))()
    sides = {f"ours {name}": call for name, call in use.ours.items()} | {f"theirs {name}": call for name, call in use.theirs.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            before = probe()
            times[name].append(seconds(sides[name]))
            if name.startswith("ours"):
                rates.append(counter.get_total_flops() / times[name][-1] / max(before, probe()))
    ours, theirs = (min((n for n in times if n.startswith(side)), key=lambda n: statistics.median(times[n])) for side in ("ours", "theirs"))
    ratios = sorted(there / here for here, there in zip(times[ours], times[theirs], strict=True))
    return {
        "use": use.name, "ours_s": statistics.median(times[ours]), "theirs_s": statistics.median(times[theirs]), "settings": [ours, theirs],
        "ratio": statistics.median(ratios), "ratios": ratios, "of_product": statistics.median(rates), "error": error,
        "seconds": times,
    }  # fmt: skip


def table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "use": each["use"], "ours": f"{each['ours_s'] * 1e3:.0f} ms", "torchscale": f"{each['theirs_s'] * 1e3:.0f} ms",
            "ratio": f"{each['ratio']:.2f} ({each['ratios'][0]:.2f} to {each['ratios'][-1]:.2f})", "wanted": f"{WANTED[each['use']]}",
            "our share of the product's rate": f"{each['of_product']:.0%}",
        }
        for each in found
    ]  # fmt: skip


def lined(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a table of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (rows[0], *(row.values() for row in rows))]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchscale", required=True, help="folder of `pip install --target`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    import_torchscale(options.torchscale)
    torch.manual_seed(0)
    theirs = Released().eval()
    ours = Captioning(CaptioningConfig(model=BASE)).eval()
    fill(ours, theirs)
    found = []
    for use in uses(ours, theirs):
        if options.only in use.name:
            found.append(measure(use, options.rounds))
            print(lined(table(found[-1:])).splitlines()[-1], flush=True)
    print(lined(table(found)))
    if options.json:
        save(options.json, lined(table(found)), found)


if __name__ == "__main__":
    main()
