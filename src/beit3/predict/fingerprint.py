"""What made a feature: digests of the weights, of how images and of how texts are prepared.

Features of equal fingerprints can be compared. Number formats, devices and files do not matter: a
released file and a directory of its weights have the same fingerprint.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from beit3.config import to_dict
from beit3.machine import count_cores
from beit3.task import Task, task_name
from beit3.weights.matching import get_weights

CALCULATION_FIELDS = ("num_heads", "norm_eps", "patch_size", "fusion_layers")
"""Fields of a network's config that change its features but no shape of its weights."""


def compute_fingerprint(task: Task) -> dict[str, str]:
    """Returns the fingerprint of a task whose weights are in float32, or that an export stores.

    Returns:
        task: Its name.
        weights: SHA-256 of all parameters and of how the network computes with them.
        image: The preprocessing as JSON with sorted keys.
        text: SHA-256 of the text tokenizer and the length of a text; "" without a tokenizer.
    """
    if task.stored_fingerprint:
        return dict(task.stored_fingerprint)
    config: Any = task.config
    text = f"{task.tokenizer.digest} {config.text_length}" if task.has_tokenizer else ""
    return {
        "task": task_name(type(task)),
        "weights": digest_weights(task),
        "image": json.dumps(to_dict(config.image), sort_keys=True),
        "text": hashlib.sha256(text.encode()).hexdigest() if text else "",
    }


def digest_weights(task: Task) -> str:
    """Returns the SHA-256 of all weights in float32, in hex, whatever their order and device."""
    weights = get_weights(task)
    names = sorted(weights)
    with ThreadPoolExecutor(count_cores()) as executor:
        digests = executor.map(_digest_tensor, (weights[name] for name in names))
        lines = [f"{name} {digest}" for name, digest in zip(names, digests, strict=True)]
    model: Any = task.config.model
    for field in CALCULATION_FIELDS:
        lines.append(f"{field} {getattr(model, field, None)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest_tensor(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's shape and float32 values."""
    values = tensor.detach().to("cpu")
    values = values.float() if values.is_floating_point() else values
    digest = hashlib.sha256(str(tuple(values.shape)).encode())
    digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
