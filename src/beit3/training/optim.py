"""AdamW over named groups, and the learning rate of a step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from beit3.ops.collectives import whole
from beit3.recipe import OptimConfig
from beit3.task import Task


def decays(name: str, parameter: Tensor, no_decay: Iterable[str]) -> bool:
    """Whether weight decay applies: not to biases, to anything of one dimension, or to the names of `no_decay`."""
    return parameter.ndim > 1 and not name.endswith(".bias") and not name.endswith(tuple(no_decay))


def lr_scale(task: Task, name: str, config: OptimConfig) -> float:
    """Learning-rate factor of a parameter: `layer_decay` to the power of its distance from the head, times the head's own."""
    layer, head = task.layer_of(name)
    return config.layer_decay ** (head - layer) * (
        config.head_lr_scale if name.startswith("head") else 1.0
    )


def parameter_groups(task: Task, config: OptimConfig) -> list[dict]:
    """Groups of equal factor and decay, named `layer_<n>` or `head` with `_no_decay` where none applies."""
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in task.trainable():
        scale, decay = lr_scale(task, name, config), decays(name, parameter, config.no_decay)
        layer, head = task.layer_of(name)
        label = (
            ("head" if layer == head else f"layer_{layer}")
            if config.layer_decay != 1
            else f"x{scale:g}"
        )
        group = groups.setdefault(
            (scale, decay),
            {
                "params": [],
                "names": [],
                "lr_scale": scale,
                "weight_decay": config.weight_decay if decay else 0.0,
                "label": label + ("" if decay else "_no_decay"),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_optimizer(task: Task, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; each group keeps its factor under `lr_scale`."""
    return torch.optim.AdamW(
        parameter_groups(task, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def learning_rate(step: int, steps: int, warmup: int, config: OptimConfig) -> float:
    """Linear from 0 over `warmup` steps, then by the schedule: to `min_lr` at the last of `steps`, or to a tenth at each drop."""
    if step < warmup:
        return config.lr * step / warmup
    if config.schedule == "steps":
        return config.lr * 0.1 ** sum(step >= share * steps for share in config.drops)
    progress = (step - warmup) / max(1, steps - warmup)
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """The gradient norm before clipping; `limit` 0 only measures."""
    return float(whole(nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)))
