"""One optimizer step: how many targets it has, its gradients, and what may stop it.

A step's loss is the sum over loss names of weight * (sum over targets) / (targets of the whole
step, over all micro-batches and processes). Gradient accumulation, three objectives and any number
of processes therefore give the same number.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from beit3.data.loader import MAX_LISTED_RECORDS, SKIPPED, RecordDataset
from beit3.ops.collectives import all_gather_objects, all_reduce, gather_full, world_size
from beit3.task import Batch, Task
from beit3.training.log import Log
from beit3.training.parallel import set_gradient_sync

MoveBatch = Callable[[Batch], Batch]
"""Moves a micro-batch to the device that computes it."""

MAX_LISTED_IDS = 8
"""Record ids that an error lists."""


def sum_targets(task: Task, micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Returns the targets of the step per loss name, over all micro-batches and processes."""
    totals: dict[str, int] = {}
    for batch in micro_batches:
        for name, count in task.targets(batch).items():
            totals[name] = totals.get(name, 0) + count
    if world_size() > 1:
        counts = all_reduce(torch.tensor(list(totals.values()), dtype=torch.int64))
        totals = dict(zip(totals, counts.tolist(), strict=True))
    return totals


def backward(
    task: Task,
    micro_batches: Sequence[Batch],
    totals: Mapping[str, int],
    autocast: torch.autocast,
    move_batch: MoveBatch = lambda batch: batch,
) -> tuple[dict[str, float], list[Tensor]]:
    """Computes the gradients of the step's loss.

    A task whose loss compares all examples of a step uses gradient caching when there are several
    micro-batches. Features that all micro-batches share are computed once: each micro-batch adds to
    their gradient, and the last one passes the sum on to the weights.

    Args:
        task: The task; gradients are added to those of its parameters.
        micro_batches: This process's micro-batches of the step, in order.
        totals: Targets of the whole step per loss name, from `sum_targets`.
        autocast: The precision of the forward pass.
        move_batch: Moves a micro-batch to the device of the task.

    Returns:
        The step's `loss`, `loss/<name>` and metrics, each averaged over its targets on all
        processes; and this process's loss of each micro-batch.
    """
    if task.compares_examples and len(micro_batches) > 1:
        return backward_with_cached_gradients(task, micro_batches, totals, autocast, move_batch)
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    shared: dict[str, Tensor] = {}
    if len(micro_batches) > 1:
        with autocast:
            shared = task.compute_shared_features()
    leaves = {name: feature.detach().requires_grad_() for name, feature in shared.items()}
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        set_gradient_sync(task, is_last)
        with autocast:
            result = task(move_batch(batch) | (shared if is_last else leaves))
        loss, logged = combine_losses(task, result, totals)
        objective = loss
        if is_last:
            for name, leaf in leaves.items():
                if leaf.grad is None:
                    raise ValueError(
                        f"{type(task).__name__}.compute_shared_features returns {name!r}, which "
                        "the loss of no micro-batch uses: use it in forward, or leave it out"
                    )
                objective = objective + (shared[name] * leaf.grad).sum()
        objective.backward()
        losses.append(loss.detach())
        for name, value in logged.items():
            sums[name] = sums.get(name, 0) + value
    return sum_over_ranks(sums), losses


# Gradient caching ---------------------------------------------------------------------------------


def backward_with_cached_gradients(
    task: Task,
    micro_batches: Sequence[Batch],
    totals: Mapping[str, int],
    autocast: torch.autocast,
    move_batch: MoveBatch,
) -> tuple[dict[str, float], list[Tensor]]:
    """Does what `backward` does for a loss that compares all examples of the step.

    Gradient caching (Gao et al. 2021, arXiv:2101.06983) needs the memory of one micro-batch: it
    computes the features of every micro-batch without gradients, then the loss of all features and
    its gradients with respect to them, then each micro-batch again with those gradients. Both
    passes start from the same random states, so that stochastic depth drops the same blocks.
    Losses beside the comparison belong to the last pass, which has the micro-batch at hand.
    """
    device = next(task.parameters()).device
    rng_states: list[list[Tensor]] = []
    parts: list[dict[str, Tensor]] = []
    for batch in micro_batches:
        rng_states.append(get_rng_state(device))
        with torch.no_grad(), autocast:
            parts.append(task.outputs(move_batch(batch)))

    features = {
        name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]
    }
    set_gradient_sync(task, False)
    with autocast:
        result = task({"features": features})
    loss, sums = combine_losses(task, result, totals)
    loss.backward()
    gradients = {
        name: feature.grad.split([len(part[name]) for part in parts])
        for name, feature in features.items()
        if feature.grad is not None
    }

    losses: list[Tensor] = []
    for index, batch in enumerate(micro_batches):
        set_rng_state(device, rng_states[index])
        set_gradient_sync(task, index == len(micro_batches) - 1)
        feature_gradients = {name: pieces[index] for name, pieces in gradients.items()}
        with autocast:
            result = task(move_batch(batch) | {"feature_gradients": feature_gradients})
        objective = result["losses"].pop("loss")
        losses.append(loss.detach())
        if result["losses"]:  # of this micro-batch alone
            further_loss, logged = combine_losses(task, result, totals)
            objective = objective + further_loss
            losses[-1] = losses[-1] + further_loss.detach()
            for name, value in logged.items():
                sums[name] = sums.get(name, 0) + value
        objective.backward()
    return sum_over_ranks(sums), losses


def get_rng_state(device: torch.device) -> list[Tensor]:
    """Returns the random states that a forward pass uses: the CPU's and the accelerator's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_rng_state(device: torch.device, states: list[Tensor]) -> None:
    """Restores the random states that `get_rng_state` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


# Losses and metrics -------------------------------------------------------------------------------


def combine_losses(
    task: Task, result: Mapping[str, Mapping[str, Tensor]], totals: Mapping[str, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divides the sums that `forward` returned by the step's totals.

    Returns:
        This micro-batch's part of the step's loss, with gradient; and that part, those of all
        losses and those of all metrics by the names under which they are logged.
    """
    means = {name: value / max(1, totals[name]) for name, value in result["losses"].items()}
    weighted = [task.loss_weights.get(name, 1.0) * mean for name, mean in means.items()]
    loss = torch.stack(weighted).sum()
    logged = {"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()}
    for name, value in result["metrics"].items():
        target = name.rpartition("/")[0]
        logged[name.removeprefix("loss/")] = value / max(1, totals[target])
    return loss, {name: value.detach().double() for name, value in logged.items()}


def sum_over_ranks(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums the parts of means over processes; waits for the device once."""
    values = all_reduce(torch.stack(list(parts.values())).cpu())
    return dict(zip(parts, values.tolist(), strict=True))


def measure_gradient_norms(task: Task) -> dict[str, float]:
    """Returns `gradient_norm/<part>` of every part of the network: embeddings, blocks, heads."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in task.trainable_parameters():
        if parameter.grad is not None:
            gradients.setdefault(get_part_name(name), []).append(parameter.grad)
    norms: dict[str, float] = {}
    for part, tensors in gradients.items():
        norms[f"gradient_norm/{part}"] = float(gather_full(torch.nn.utils.get_total_norm(tensors)))
    return norms


def get_part_name(name: str) -> str:
    """Returns the part of the network that a parameter belongs to.

    That is `blocks.3` for backbone.blocks.3.ffn.image.fc1.weight, else the first name below the
    backbone, or the name of the head.
    """
    names = name.removeprefix("backbone.").split(".")
    return ".".join(names[:2]) if names[0] == "blocks" else names[0]


# Checks -------------------------------------------------------------------------------------------


def check_finite(
    step: int, loss: float, norm: float, micro_batches: Sequence[Batch], losses: Sequence[Tensor]
) -> None:
    """Raises FloatingPointError, on all processes, if the loss or the gradient norm is not finite.

    The error names the records of the micro-batches whose loss is not finite, or all of the step's
    if only gradients are not.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    faulty_batches = [
        batch
        for batch, value in zip(micro_batches, losses, strict=True)
        if not math.isfinite(float(value))
    ]
    faulty_ids, all_ids = _gather_ids(faulty_batches), _gather_ids(micro_batches)
    ids = faulty_ids or all_ids
    listed = ", ".join(ids[:MAX_LISTED_IDS]) + (" ..." if len(ids) > MAX_LISTED_IDS else "")
    raise FloatingPointError(
        f"step {step + 1}: loss {loss}, gradient norm {norm}; records {listed}; "
        "lower optim.lr, set optim.clip, or look at those records"
    )


def _gather_ids(batches: Sequence[Batch]) -> list[str]:
    """Returns the record ids of all processes' batches."""
    ids = [str(record_id) for batch in batches for record_id in batch.get("id", [])]
    return [record_id for rank_ids in all_gather_objects(ids) for record_id in rank_ids]


def report_unreadable_records(
    reported: dict[str, set[str]],
    micro_batches: Sequence[Batch],
    sources: Mapping[str, RecordDataset],
    max_fraction: float,
    log: Log,
) -> None:
    """Logs each unreadable record once and removes the lines about them from the batches.

    Args:
        reported: Source -> lines logged so far; lines are added.
        micro_batches: The step's micro-batches with the loader's lines under `SKIPPED`.
        sources: The records of each source.
        max_fraction: The fraction of a source's records that may be unreadable.
        log: Where the lines go.

    Raises:
        ValueError: More than `max_fraction` of a source's records are unreadable, on any process.
    """
    lines = [line for batch in micro_batches for line in batch.pop(SKIPPED)]
    if not int(all_reduce(torch.tensor(len(lines)))):
        return
    all_lines = [line for rank_lines in all_gather_objects(lines) for line in rank_lines]
    for line in dict.fromkeys(all_lines):
        name = line.split(" record ")[0]
        source, source_lines = sources[name], reported.setdefault(name, set())
        if line in source_lines:
            continue
        source_lines.add(line)
        log.info(f"skipped: {line}")
        if len(source_lines) > max_fraction * len(source):
            raise ValueError(
                f"{len(source_lines)} of {len(source)} records of {source.path} cannot be read, "
                f"data.bad_share allows {max_fraction:.0%}: "
                f"{'; '.join(sorted(source_lines)[:MAX_LISTED_RECORDS])}"
            )
