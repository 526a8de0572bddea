"""Losses against their definitions, computed by hand from probabilities in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from beit3.ops.losses import contrastive_loss, drop_worst, label_smoothed_kl_div


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_divergence_is_from_the_distribution_that_spreads_over_all_other_classes(
    smoothing,
):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    losses = label_smoothed_kl_div(logits, labels, smoothing)
    for row, label, loss in zip(logits.tolist(), labels.tolist(), losses.tolist(), strict=True):
        total = sum(map(math.exp, row))
        expected = 0.0
        for index, logit in enumerate(row):
            target = 1 - smoothing if index == label else smoothing / 4
            if target:
                expected += target * (math.log(target) - math.log(math.exp(logit) / total))
        assert loss == pytest.approx(expected, abs=1e-12)


def test_contrastive_loss_is_the_mean_of_both_directions():
    generator = torch.Generator().manual_seed(1)
    image, text = (
        F.normalize(torch.randn(4, 3, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    scale = torch.tensor(7.0, dtype=torch.float64)
    loss, num_first = contrastive_loss(image, text, scale)
    similarities = [[7 * float(i @ t) for t in text] for i in image]
    expected, both_first = 0.0, 0
    for k in range(4):
        row, column = similarities[k], [line[k] for line in similarities]
        for values in (row, column):
            expected += (math.log(sum(map(math.exp, values))) - values[k]) / 2
        both_first += row[k] == max(row) and column[k] == max(column)
    assert loss.item() == pytest.approx(expected, abs=1e-12) and int(num_first) == both_first


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, 10), (0.2, 8), (0.35, 6), (1.0, 0)])
def test_dropping_the_worst_keeps_the_mean_of_the_smallest(fraction, kept):
    losses = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 10.0, 2.0, 8.0, 4.0, 6.0])
    expected = 55.0 if not kept else 10 * (kept + 1) / 2
    assert drop_worst(losses, fraction).item() == pytest.approx(expected)
