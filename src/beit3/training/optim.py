"""Optimizer over named parameter groups, learning rate of a step, and how many steps a run has."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from beit3.ops.collectives import gather_full
from beit3.recipe import OptimConfig, Recipe
from beit3.task import Task
from beit3.training.muon import MuonWithAdamW


def make_optimizer(task: Task, config: OptimConfig) -> torch.optim.Optimizer:
    """Returns fused AdamW, alone or beside Muon; each group's learning-rate factor is `lr_scale`.

    Raises ValueError where Muon or AdamW would have nothing to update.
    """
    groups = make_parameter_groups(task, config)
    if config.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
    matrices = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    if not matrices or not others:
        raise ValueError("optim.name: muon needs blocks with matrices that are trained; give adamw")
    return MuonWithAdamW(matrices, others, config)


def make_parameter_groups(task: Task, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups the trainable parameters by learning-rate factor, weight decay and optimizer.

    With layer decay a group's label is `layer_<n>` or `head`, else `x<factor>`; groups without
    weight decay end in `_no_decay`, those that Muon updates in `_muon`.
    """
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in task.trainable_parameters():
        scale = get_lr_scale(task, name, config)
        decay = has_weight_decay(name, parameter, config.no_decay)
        muon = config.name == "muon" and is_block_matrix(task, name, parameter)
        if (scale, decay, muon) not in groups:
            ending = ("" if decay else "_no_decay") + ("_muon" if muon else "")
            groups[scale, decay, muon] = {
                "params": [],
                "names": [],
                "lr_scale": scale,
                "weight_decay": config.weight_decay if decay else 0.0,
                "muon": muon,
                "label": _make_label(task, name, scale, config) + ending,
            }
        groups[scale, decay, muon]["params"].append(parameter)
        groups[scale, decay, muon]["names"].append(name)
    return list(groups.values())


def count_moments(group: Mapping[str, Any]) -> int:
    """Returns how many tensors of its size the optimizer keeps for each parameter of a group: Muon
    the momentum, AdamW two moments."""
    return 1 if group["muon"] else 2


def _make_label(task: Task, name: str, scale: float, config: OptimConfig) -> str:
    """Returns the label of the group that begins with this parameter."""
    if config.layer_decay == 1:
        return f"x{scale:g}"
    layer, head = task.layer_of(name)
    return "head" if layer == head else f"layer_{layer}"


def is_block_matrix(task: Task, name: str, parameter: Tensor) -> bool:
    """Returns whether a parameter is a matrix of a block, neither of embeddings nor of the head."""
    layer, head = task.layer_of(name)
    return parameter.ndim == 2 and 0 < layer < head


def has_weight_decay(name: str, parameter: Tensor, no_decay: Iterable[str]) -> bool:
    """Returns whether weight decay applies to a parameter.

    It does not for biases, for parameters of one dimension, and for names that end in `no_decay`.
    """
    return parameter.ndim > 1 and not name.endswith(".bias") and not name.endswith(tuple(no_decay))


def get_lr_scale(task: Task, name: str, config: OptimConfig) -> float:
    """Returns a parameter's learning-rate factor.

    It is `layer_decay` to the power of the distance from the head, times `head_lr_scale` for the
    head's own parameters.
    """
    layer, head = task.layer_of(name)
    head_scale = config.head_lr_scale if name.startswith("head") else 1.0
    return config.layer_decay ** (head - layer) * head_scale


def count_steps(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Returns (steps, warmup steps) of a run, given the number of records of each source.

    An epoch is the largest source's number of records over its batch size, rounded down.
    """
    run, optim = recipe.run, recipe.optim
    per_epoch = max(1, max(size // recipe.data.batch[name] for name, size in sizes.items()))
    steps = run.steps or round(run.epochs * per_epoch)
    if steps < 1:
        raise ValueError("run.steps and run.epochs are both 0: give one of them")
    return steps, optim.warmup_steps or round(optim.warmup_epochs * per_epoch)


def compute_learning_rate(step: int, num_steps: int, warmup: int, config: OptimConfig) -> float:
    """Returns the learning rate of step `step`, counted from 0.

    It rises linearly from 0 over `warmup` steps and then follows the schedule: to `min_lr` at the
    last of `num_steps`, or to a tenth at each of `drops`.
    """
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "steps":
        return config.lr * 0.1 ** sum(step >= fraction * num_steps for fraction in config.drops)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        remaining = 1 - progress
    else:
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * remaining


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group to `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def get_group_learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Returns `lr/<label>` of every group."""
    return {f"lr/{group['label']}": group["lr"] for group in optimizer.param_groups}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clips the gradients and returns their norm before; `max_norm` 0 only measures it."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf, foreach=True)
    return float(gather_full(norm))
