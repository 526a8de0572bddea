"""One optimizer step: how many targets it has, its gradients, and what may stop it.

A step's loss is the sum over loss names of weight * (sum over targets) / (targets of the whole step, all micro-batches
and processes), so that accumulation, three objectives and any number of processes give one number.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from beit3.data.loader import PASSED_OVER, Source
from beit3.ops.collectives import all_gather_objects, all_reduce, whole, world_size
from beit3.task import Batch, Task
from beit3.training.log import Log
from beit3.training.parallel import sync_gradients

Place = Callable[[Batch], Batch]
"""Moves a micro-batch to the device that computes it."""

NAMED = 8
"""Records that an error lists."""


def sum_targets(task: Task, micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Targets of the step per loss name, over all micro-batches and processes."""
    totals: dict[str, int] = {}
    for batch in micro_batches:
        for name, count in task.targets(batch).items():
            totals[name] = totals.get(name, 0) + count
    if world_size() > 1:
        counts = all_reduce(torch.tensor([totals[name] for name in totals], dtype=torch.int64))
        totals = dict(zip(totals, counts.tolist(), strict=True))
    return totals


def backward(
    task: Task,
    micro_batches: Sequence[Batch],
    totals: Mapping[str, int],
    precision: torch.autocast,
    place: Place = lambda batch: batch,
) -> tuple[dict[str, float], list[Tensor]]:
    """Gradients of the step's loss, summed over processes with the last micro-batch; `place` moves one to its device.

    Returns `loss`, `loss/<name>` and the metrics, each averaged over its targets everywhere, and this process's loss of
    each micro-batch.
    """
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    if task.compares_examples and len(micro_batches) > 1:
        return backward_by_features(task, micro_batches, totals, precision, place)
    for index, batch in enumerate(micro_batches):
        sync_gradients(task, index == len(micro_batches) - 1)
        with precision:
            result = task(place(batch))
        loss, logged = weigh(task, result, totals)
        loss.backward()
        losses.append(loss.detach())
        for name, value in logged.items():
            sums[name] = sums.get(name, 0) + value
    return averaged(sums), losses


def backward_by_features(
    task: Task,
    micro_batches: Sequence[Batch],
    totals: Mapping[str, int],
    precision: torch.autocast,
    place: Place,
) -> tuple[dict[str, float], list[Tensor]]:
    """`backward` of a loss that compares all examples of the step, in the memory of one micro-batch.

    Gradient caching (Gao et al. 2021, arXiv:2101.06983): the features of every micro-batch without gradients, the loss of
    them all and its gradients for them, then each micro-batch again with those. Stochastic depth draws the same twice.
    """
    states, parts = [], []
    device = next(task.parameters()).device
    for batch in micro_batches:
        states.append(chance(device))
        with torch.no_grad(), precision:
            parts.append(task.outputs(place(batch)))
    features = {
        name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]
    }
    sync_gradients(task, False)
    with precision:
        result = task({"features": features})
    loss, sums = weigh(task, result, totals)
    loss.backward()
    gradients = {
        name: value.grad.split([len(part[name]) for part in parts])
        for name, value in features.items()
        if value.grad is not None
    }
    for index, batch in enumerate(micro_batches):
        set_chance(device, states[index])
        sync_gradients(task, index == len(micro_batches) - 1)
        with precision:
            theirs = {name: pieces[index] for name, pieces in gradients.items()}
            product = task(place(batch) | {"feature_gradients": theirs})["losses"]["loss"]
        product.backward()
    return averaged(sums), [loss.detach()] * len(micro_batches)


def chance(device: torch.device) -> list[Tensor]:
    """The random states that a forward draws from: the processor's and the device's."""
    return [torch.get_rng_state()] + (
        [torch.get_device_module(device).get_rng_state(device)] if device.type != "cpu" else []
    )


def set_chance(device: torch.device, states: list[Tensor]) -> None:
    """Back to the states that `chance` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


def weigh(
    task: Task, result: Mapping[str, Mapping[str, Tensor]], totals: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `forward` returned -> (its part of the step's loss, that and every loss and metric as parts of their means)."""
    means = {name: value / max(1, totals[name]) for name, value in result["losses"].items()}
    loss = torch.stack(
        [task.loss_weights.get(name, 1.0) * mean for name, mean in means.items()]
    ).sum()
    logged = {"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()}
    for name, value in result["metrics"].items():
        logged[name.removeprefix("loss/")] = value / max(1, totals[name.rpartition("/")[0]])
    return loss, {name: value.detach().double() for name, value in logged.items()}


def averaged(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Parts of means, summed over processes; one wait for the device a step."""
    values = all_reduce(torch.stack(list(sums.values())).cpu())
    return dict(zip(sums, values.tolist(), strict=True))


def gradient_norms(task: Task) -> dict[str, float]:
    """`gradient_norm/<part>` of every part of the network: embeddings, each block, heads."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in task.trainable():
        if parameter.grad is not None:
            parts.setdefault(part_of(name), []).append(parameter.grad)
    return {
        f"gradient_norm/{part}": float(whole(torch.nn.utils.get_total_norm(grads)))
        for part, grads in parts.items()
    }


def part_of(name: str) -> str:
    """`blocks.3` of backbone.blocks.3.ffn.image.fc1.weight, else the first name below the backbone, or the head's own."""
    names = name.removeprefix("backbone.").split(".")
    return ".".join(names[:2]) if names[0] == "blocks" else names[0]


def check_finite(
    step: int, loss: float, norm: float, micro_batches: Sequence[Batch], losses: Sequence[Tensor]
) -> None:
    """FloatingPointError on a loss or gradient that is not finite, naming step and records, on every process alike.

    The records are those of the micro-batches whose loss is not finite, or all of the step's where only gradients are.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    faulty = [
        batch
        for batch, value in zip(micro_batches, losses, strict=True)
        if not math.isfinite(float(value))
    ]
    some, every = (
        [
            str(key)
            for keys in all_gather_objects(
                [key for batch in batches for key in batch.get("id", [])]
            )
            for key in keys
        ]
        for batches in (faulty, micro_batches)
    )
    ids = some or every
    raise FloatingPointError(
        f"step {step + 1}: loss {loss}, gradient norm {norm}; records {', '.join(ids[:NAMED])}{' ...' if len(ids) > NAMED else ''}; "
        "lower optim.lr, set optim.clip, or look at those records"
    )


def note_broken(
    broken: dict[str, set[str]],
    micro_batches: Sequence[Batch],
    sources: Mapping[str, Source],
    share: float,
    log: Log,
) -> None:
    """Name each unreadable record once; more than `share` of a source's records, on any process, end the run."""
    lines = [line for batch in micro_batches for line in batch.pop(PASSED_OVER)]
    if not int(all_reduce(torch.tensor(len(lines)))):
        return
    for line in dict.fromkeys(line for some in all_gather_objects(lines) for line in some):
        name = line.split(" record ")[0]
        known = broken.setdefault(name, set())
        if line in known:
            continue
        known.add(line)
        log.say(f"passed over: {line}")
        if len(known) > share * len(sources[name]):
            raise ValueError(
                f"{len(known)} of {len(sources[name])} records of {sources[name].path} cannot be read, "
                f"data.bad_share allows {share:.0%}: {'; '.join(sorted(known)[:20])}"
            )
