"""Vocabulary losses computed in chunks equal those of all logits at once, with their gradients."""

from functools import partial

import pytest
import torch

from beit3.ops.losses import chunked_vocabulary_loss, label_smoothed_kl_div, token_cross_entropy


@pytest.mark.parametrize("max_logits", [1, 30, 77, 1000])
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_chunks_give_the_losses_and_gradients_of_all_logits_at_once(max_logits, smoothing):
    torch.manual_seed(0)
    states, target = torch.randn(13, 5, dtype=torch.float64), torch.randint(0, 11, (13,))
    loss = token_cross_entropy
    if smoothing is not None:
        loss = partial(label_smoothed_kl_div, smoothing=smoothing)
    results, logit_counts = [], []
    for limit in (10**9, max_logits):
        head = torch.nn.Linear(5, 11, dtype=torch.float64, device="cpu")
        torch.nn.init.constant_(head.bias, 0.1)
        head.weight.data = torch.linspace(-1, 1, 55, dtype=torch.float64).view(11, 5)
        head.register_forward_hook(
            lambda module, inputs, output: logit_counts.append(output.numel())
        )
        inputs = states.clone().requires_grad_()
        losses, is_correct = chunked_vocabulary_loss(inputs, target, head, loss, max_logits=limit)
        (losses * torch.arange(13)).sum().backward()
        gradients = (inputs.grad, head.weight.grad, head.bias.grad)
        results.append((losses.detach(), is_correct.double(), *gradients))
    for at_once, in_chunks in zip(*results, strict=True):
        torch.testing.assert_close(at_once, in_chunks, rtol=0, atol=1e-12)
    assert logit_counts[0] == 13 * 11
    assert max(logit_counts[1:]) <= max(max_logits, 11)


def test_no_predictions_have_no_losses():
    head = torch.nn.Linear(5, 11)
    states, target = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    losses, is_correct = chunked_vocabulary_loss(states, target, head, token_cross_entropy)
    assert losses.shape == is_correct.shape == (0,)
