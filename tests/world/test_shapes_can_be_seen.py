"""The world must show shapes: what no classifier learns from it, no pretraining can teach.

Slow: 1,500 training steps take two to three minutes of one core.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY
from beit3.world.render import render
from beit3.world.scene import SHAPES, make_scene

NUM_TRAIN, NUM_TEST, STEPS, BATCH_SIZE = 24_000, 1000, 1500, 64


def render_single_objects(first_seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images [N, 3, 32, 32] in [-1, 1] of one object each, and their shapes [N]."""
    scenes = [make_scene(first_seed + k, num_objects=(1.0, 0.0, 0.0)) for k in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    labels = [SHAPES.index(scene.objects[0].shape) for scene in scenes]
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


@pytest.mark.slow
def test_a_classifier_from_scratch_names_nine_of_ten_shapes():
    torch.manual_seed(0)
    images, labels = render_single_objects(0, NUM_TRAIN)
    test_images, test_labels = render_single_objects(10**7, NUM_TEST)
    backbone, head = BEiT3(TINY), torch.nn.Linear(TINY.dim, len(SHAPES))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        return head(backbone(image=pixels).of("image")[:, 1:].mean(1))

    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2
            )
        batch = torch.randint(NUM_TRAIN, (BATCH_SIZE,))
        optimizer.zero_grad()
        F.cross_entropy(classify(images[batch]), labels[batch]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
    with torch.inference_mode():
        predicted = torch.cat([classify(chunk).argmax(1) for chunk in test_images.split(250)])
    accuracy = (predicted == test_labels).float().mean().item()
    assert accuracy >= 0.9, f"{accuracy:.3f} of the shapes are named"
