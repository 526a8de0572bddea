"""A vocabulary's losses piece by piece equal those of all logits at once, with their gradients."""

from functools import partial

import pytest
import torch

from beit3.ops.losses import chunked_vocabulary_loss, label_smoothed_kl_div, token_cross_entropy


@pytest.mark.parametrize("most", [1, 30, 77, 1000])
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_losses_over_a_vocabulary_equal_those_of_all_logits_at_once(most, smoothing):
    torch.manual_seed(0)
    states, target = torch.randn(13, 5, dtype=torch.float64), torch.randint(0, 11, (13,))
    divergence = (
        token_cross_entropy
        if smoothing is None
        else partial(label_smoothed_kl_div, smoothing=smoothing)
    )
    found, sizes = [], []
    for limit in (10**9, most):
        head = torch.nn.Linear(5, 11, dtype=torch.float64, device="cpu")
        torch.nn.init.constant_(head.bias, 0.1)
        head.weight.data = torch.linspace(-1, 1, 55, dtype=torch.float64).view(11, 5)
        head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
        rows = states.clone().requires_grad_()
        losses, right = chunked_vocabulary_loss(rows, target, head, divergence, most=limit)
        (losses * torch.arange(13)).sum().backward()
        found.append((losses.detach(), right.double(), rows.grad, head.weight.grad, head.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert max(sizes[1:]) <= max(most, 11) and sizes[0] == 13 * 11
    assert not chunked_vocabulary_loss(states[:0], target[:0], head, divergence, most=most)[
        0
    ].numel()
