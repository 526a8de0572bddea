"""The vector quantiser of VQ-KD (BEiT v2, section 3.1): an l2-normalised codebook that moves by running averages.

Shapes: vectors [B, P, C] -> quantised vectors [B, P, C] with the straight-through gradient, the commitment loss (a
scalar), codes [B, P] int64. Everything is computed in float32 with autocast off, and everything it learns is a buffer,
so that a resumed run continues bit for bit. Codebook and statistics change in train mode only, alike on all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.ops import collectives
from beit3.ops.precision import at_least_float32

CHUNK = 16384
"""Vectors compared with the codebook at once: 512 MiB of distances with 8192 codes."""


class Quantizer(nn.Module):
    """Codebook [K, C] of unit vectors, found by spherical k-means on the first training batch of all ranks.

    decay: of the running averages. beta: weight of the commitment loss. revive_after: every so many updates, codes
    unused in all of them are replaced by encoder vectors of the present batch; 0 = never. Revival is not in the paper:
    it is the remedy for a codebook that collapses on small data.
    """

    codebook: Tensor  # [K, C]
    started: Tensor  # [] bool: k-means is done or the codebook was given
    updates: Tensor  # [] int64
    counts: Tensor  # [K] running average of vectors per update
    last_used: Tensor  # [K] int64: the update that last chose the code, 0 = never

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        decay: float = 0.99,
        beta: float = 1.0,
        revive_after: int = 0,
    ):
        super().__init__()
        self.decay, self.beta, self.revive_after = decay, beta, revive_after
        self.register_buffer("codebook", F.normalize(torch.randn(num_codes, dim), dim=1))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("counts", torch.zeros(num_codes))
        self.register_buffer("last_used", torch.zeros(num_codes, dtype=torch.int64))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random unit vectors, to be replaced by k-means, and empty statistics."""
        self.codebook.copy_(
            F.normalize(torch.randn(self.codebook.shape, generator=generator), dim=1)
        )
        for state in (self.started, self.updates, self.counts, self.last_used):
            state.zero_()

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, P, C] -> (quantised [B, P, C], commitment, codes [B, P]); in train mode also one step of the codebook.

        The commitment is the mean over all elements, channels included, so 1/C of the squared distance.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(at_least_float32(vectors), dim=-1)
            flat = unit.detach().flatten(0, -2)  # [B * P, C]
            if self.training and not self.started:
                self._start(flat)
            codes = nearest(flat, self.codebook)
            chosen = self.codebook[codes].view_as(unit)
            if self.training:
                self._learn(flat, codes)
            commitment = self.beta * F.mse_loss(unit, chosen)
            return unit + (chosen - unit).detach(), commitment, codes.view(unit.shape[:-1])

    @torch.no_grad()
    def codes(self, vectors: Tensor) -> Tensor:
        """[B, P, C] -> [B, P] int64; changes nothing, in train mode too."""
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(at_least_float32(vectors), dim=-1)
            return nearest(unit.flatten(0, -2), self.codebook).view(unit.shape[:-1])

    def usage(self) -> Tensor:
        """Share of codes chosen at least once in the last 1 / (1 - decay) updates; a scalar."""
        window = round(1 / (1 - self.decay))
        return ((self.last_used > 0) & (self.last_used > self.updates - window)).float().mean()

    def perplexity(self) -> Tensor:
        """exp(entropy) of the running counts: K when all codes are used alike, 1 before the first update; a scalar."""
        share = self.counts / self.counts.sum().clamp_min(torch.finfo(self.counts.dtype).tiny)
        return torch.special.entr(share).sum().exp()

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        """Every rank would find slightly other means, so rank 0's are everybody's."""
        samples = collectives.all_gather(vectors)
        num_codes, generator = len(self.codebook), torch.Generator().manual_seed(0)
        picks = torch.randperm(len(samples), generator=generator)[:num_codes]
        if len(picks) < num_codes:  # too few vectors: twins, which later updates drive apart
            picks = torch.randint(len(samples), (num_codes,), generator=generator)
        means = samples[picks.to(samples.device)]
        if collectives.rank() == 0:
            means, _ = kmeans(samples, means, 10)
        self.codebook.copy_(collectives.broadcast(means))
        self.started.fill_(True)

    @torch.no_grad()
    def _learn(self, vectors: Tensor, codes: Tensor) -> None:
        sums, bins = _totals(vectors, codes, len(self.codebook))
        totals = collectives.all_reduce(torch.cat((sums, bins[:, None]), 1))
        sums, bins = totals[:, :-1], totals[:, -1]
        means = _directions(sums, bins, self.codebook)
        self.codebook.copy_(
            F.normalize(self.decay * self.codebook + (1 - self.decay) * means, dim=1)
        )
        self.counts.mul_(self.decay).add_(bins, alpha=1 - self.decay)
        self.updates.add_(1)
        self.last_used.copy_(torch.where(bins > 0, self.updates, self.last_used))
        if self.revive_after:
            self._revive(vectors, int(self.updates))

    def _revive(self, vectors: Tensor, update: int) -> None:
        """The picks depend on the update and on the ranks' gathered vectors alone, so all ranks agree."""
        if update % self.revive_after:
            return
        dead = self.last_used <= update - self.revive_after
        pool = collectives.all_gather(vectors)
        picks = torch.randint(
            len(pool), (len(dead),), generator=torch.Generator().manual_seed(update)
        )
        self.codebook.copy_(torch.where(dead[:, None], pool[picks.to(pool.device)], self.codebook))


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Code [N] of the smallest |v|^2 + |e|^2 - 2 v e, for vectors [N, C] and codes [K, C] of any length."""
    lengths = codebook.square().sum(1)
    parts = []
    for part in vectors.split(CHUNK):
        distances = part.square().sum(1, keepdim=True) + lengths - 2 * part @ codebook.T  # [n, K]
        parts.append(distances.argmin(1))
    return torch.cat(parts)


def kmeans(samples: Tensor, means: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means: unit samples [N, C] and first means [K, C] -> (means [K, C], samples per mean [K] int64).

    The counts are those of the last assignment, before the means moved. A mean without samples stays.
    """
    bins = means.new_zeros(len(means))
    for _ in range(iterations):
        assigned = torch.cat([(part @ means.T).argmax(1) for part in samples.split(CHUNK)])
        sums, bins = _totals(samples, assigned, len(means))
        means = _directions(sums, bins, means)
    return means, bins.long()


def _totals(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sum [K, C] and number [K] (as floats, exact below 2^24) of the vectors of each code."""
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return sums, codes.bincount(minlength=num_codes).to(vectors.dtype)


def _directions(sums: Tensor, bins: Tensor, fallback: Tensor) -> Tensor:
    """Unit mean per code, `fallback` where nothing was assigned."""
    return torch.where(
        bins[:, None] > 0, F.normalize(sums / bins.clamp_min(1)[:, None], dim=1), fallback
    )
