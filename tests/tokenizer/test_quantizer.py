"""The codebook against the official one's recorded numbers, and what ours adds: agreement of ranks,
resume, revival."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from beit3.tokenizer.quantizer import Quantizer, find_nearest, run_kmeans
from tests.golden import load_tensors


def sequence(maps: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]."""
    return maps.flatten(2).transpose(1, 2)


def golden_quantizer() -> Quantizer:
    model = load_tensors("norm_ema_quantizer", "model")
    quantizer = Quantizer(128, 16)
    quantizer.codebook.copy_(model["embedding.weight"])
    quantizer.counts.copy_(model["cluster_size"])
    quantizer.started.fill_(True)
    return quantizer


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-5, rtol=1e-5)


def test_training_equals_the_official_quantizer():
    inputs, outputs = (
        load_tensors("norm_ema_quantizer", "inputs"),
        load_tensors("norm_ema_quantizer", "outputs"),
    )
    quantizer = golden_quantizer()
    maps = inputs["z"].requires_grad_()
    quantised, loss, codes = quantizer(sequence(maps))
    ((quantised * sequence(inputs["z_q_grad_weight"])).sum() + loss).backward()
    assert torch.equal(codes.flatten(), outputs["train.indices"])
    close(quantised, sequence(outputs["train.z_q"]))
    close(loss, outputs["train.loss"])
    close(maps.grad, outputs["train.z_grad"])
    close(quantizer.counts, outputs["train.cluster_size_after"])


def test_updates_equal_the_published_rule_code_by_code():
    """The fixture cannot tell: its three `*_after` states are one and the same, that of its last
    (eval) forward."""
    inputs = load_tensors("norm_ema_quantizer", "inputs")
    quantizer = golden_quantizer()
    codebook, counts = quantizer.codebook.clone(), quantizer.counts.clone()
    for scale, shift in ((1.0, 0.0), (0.7, 0.3), (0.8, 0.3)):
        vectors = sequence(inputs["z"] * scale + shift)
        _, _, codes = quantizer(vectors)
        unit = [v / v.norm() for v in vectors.flatten(0, 1)]
        assert codes.flatten().tolist() == [
            int((codebook - v).square().sum(1).argmin()) for v in unit
        ]
        for k in range(128):
            mine = [v for v, code in zip(unit, codes.flatten().tolist(), strict=True) if code == k]
            counts[k] = 0.99 * counts[k] + 0.01 * len(mine)
            if mine:
                mean = sum(mine) / len(mine)
                moved = 0.99 * codebook[k] + 0.01 * mean / mean.norm()
                codebook[k] = moved / moved.norm()
        close(quantizer.codebook, codebook)
        close(quantizer.counts, counts)


def test_evaluation_equals_the_official_quantizer_and_changes_nothing():
    inputs, outputs = (
        load_tensors("norm_ema_quantizer", "inputs"),
        load_tensors("norm_ema_quantizer", "outputs"),
    )
    quantizer = golden_quantizer()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert torch.equal(
        quantizer.find_codes(sequence(inputs["z"])).flatten(), outputs["eval.indices"]
    )  # in train mode
    quantised, loss, codes = quantizer.eval()(sequence(inputs["z"]))
    assert torch.equal(codes.flatten(), outputs["eval.indices"])
    close(quantised, sequence(outputs["eval.z_q"]))
    close(loss, outputs["eval.loss"])
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_kmeans_equals_the_official_one():
    inputs, outputs = (
        load_tensors("norm_ema_quantizer", "inputs"),
        load_tensors("norm_ema_quantizer", "outputs"),
    )
    means, bins = run_kmeans(inputs["kmeans.samples"], inputs["kmeans.initial_means"], 10)
    close(means, outputs["kmeans.means_after_10_iters"])
    assert torch.equal(bins, outputs["kmeans.bins"])


def test_nearest_minds_the_length_of_codes(monkeypatch):
    monkeypatch.setattr("beit3.tokenizer.quantizer.CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(30, 4, generator=generator)
    codebook = torch.randn(9, 4, generator=generator) * torch.linspace(0.2, 3, 9)[:, None]
    expected = [
        min(range(9), key=lambda k: float((v - codebook[k]).square().sum())) for v in vectors
    ]
    assert find_nearest(vectors, codebook).tolist() == expected
    assert expected != (vectors @ codebook.T).argmax(1).tolist()


def blobs(seed: int, count: int = 64) -> Tensor:
    """Vectors [4, count / 4, 3] around the 6 half axes."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.cat((torch.eye(3), -torch.eye(3)))
    picks = torch.randint(6, (count,), generator=generator)
    return (centers[picks] + 0.1 * torch.randn(count, 3, generator=generator)).view(4, -1, 3)


def test_the_first_training_batch_starts_the_codebook():
    quantizer = Quantizer(12, 3)
    quantizer.eval()(blobs(0))
    assert not quantizer.started
    quantizer.train()
    _, loss, _ = quantizer(blobs(0))
    assert quantizer.started and loss < 0.02
    lonely = Quantizer(200, 3)  # fewer vectors than codes
    lonely(blobs(0))
    assert torch.isfinite(lonely.codebook).all() and quantizer.compute_usage() > 0


def test_codes_stay_unit_and_unused_ones_stay_put():
    quantizer = Quantizer(40, 3)
    quantizer.started.fill_(True)
    before = quantizer.codebook.clone()
    _, _, codes = quantizer(blobs(0))
    used = torch.zeros(40, dtype=torch.bool)
    used[codes.flatten()] = True
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(quantizer.codebook[~used], before[~used])
    assert (quantizer.codebook[used] - before[used]).abs().sum(1).min() > 1e-5


def test_usage_and_perplexity():
    quantizer = Quantizer(4, 2, decay=0.5)  # a window of two updates
    quantizer.codebook.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    quantizer.started.fill_(True)
    assert (quantizer.compute_usage(), quantizer.compute_perplexity()) == (0, 1)
    quantizer(torch.tensor([[[1.0, 0], [0, 1]]]))
    assert quantizer.compute_usage() == 0.5
    torch.testing.assert_close(quantizer.compute_perplexity(), torch.tensor(2.0))
    quantizer(torch.tensor([[[-1.0, 0]]]))
    assert quantizer.compute_usage() == 0.75
    quantizer(torch.tensor([[[-1.0, 0]]]))
    assert quantizer.compute_usage() == 0.25


def test_revival_replaces_codes_unused_for_that_many_updates():
    vectors = blobs(0)
    unit = F.normalize(vectors, dim=-1).flatten(0, 1)
    quantizer = Quantizer(6, 3, revive_after=2)
    quantizer.codebook.copy_(
        F.normalize(torch.tensor([[1.0, 1, 1]] * 6), dim=1)
    )  # collapsed: all but the first are twins
    quantizer.started.fill_(True)
    twins = quantizer.codebook[5].clone()
    quantizer(vectors)
    torch.testing.assert_close(quantizer.codebook[5], twins)
    quantizer.last_used[5] = 1  # as if it had been chosen in the first update
    quantizer(vectors)
    torch.testing.assert_close(quantizer.codebook[5], twins)
    for code in quantizer.codebook[2:5]:
        assert (unit - code).abs().sum(1).min() == 0


def test_a_restored_quantizer_continues_bit_for_bit():
    first = Quantizer(12, 3, revive_after=2)
    for seed in range(3):
        first(blobs(seed))
    second = Quantizer(12, 3, revive_after=2)
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        first(blobs(seed))
        second(blobs(seed))
    assert all(
        torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items()
    )


def test_float32_under_autocast():
    quantizer = golden_quantizer()
    vectors = sequence(load_tensors("norm_ema_quantizer", "inputs")["z"])
    with torch.autocast("cpu", torch.bfloat16):
        quantised, loss, codes = quantizer(vectors)
    assert quantised.dtype == loss.dtype == torch.float32
    assert torch.equal(
        codes.flatten(), load_tensors("norm_ema_quantizer", "outputs")["train.indices"]
    )


def test_two_ranks_equal_one(tmp_path: Path):
    mp.spawn(_process, (tmp_path,), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    alone = _train(slice(0, 4))
    for name, value in left.items():
        torch.testing.assert_close(value, alone[name], msg=name)


def _train(rows: slice) -> dict[str, Tensor]:
    quantizer = Quantizer(12, 3, revive_after=2)
    quantizer.init_weights(torch.Generator().manual_seed(0))
    for seed in range(5):
        quantizer(blobs(seed)[rows])
    return quantizer.state_dict()


def _process(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_train(slice(2 * rank, 2 * rank + 2)), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_gradient_is_that_of_the_unit_vector(training: bool):
    vectors = blobs(3).requires_grad_()
    quantizer = Quantizer(12, 3).train(training)
    weight = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((quantizer(vectors)[0] * weight).sum(), vectors)
    (expected,) = torch.autograd.grad((F.normalize(vectors, dim=-1) * weight).sum(), vectors)
    torch.testing.assert_close(ours, expected)
