"""The vector quantizer of VQ-KD (BEiT v2, section 3.1): a codebook that moves by running averages.

Codes are unit vectors. Vectors [B, P, C] become quantized vectors [B, P, C] with the
straight-through gradient, a scalar commitment loss, and codes [B, P] int64. Everything is computed
in float32 with autocast off. Everything the quantizer learns is a buffer, so a resumed run
continues bit for bit. Codebook and statistics change in train mode only, alike on all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.ops import collectives
from beit3.ops.precision import promote_to_float32

CHUNK = 16384
"""Vectors compared with the codebook at once: 512 MiB of distances with 8192 codes."""

KMEANS_ITERATIONS = 10


class Quantizer(nn.Module):
    """A codebook [K, C] of unit vectors.

    It starts as the result of spherical k-means on the first training batch of all ranks.

    Args:
        num_codes: K.
        dim: C.
        decay: Decay of the running averages.
        beta: Weight of the commitment loss.
        revive_after: Number of updates after which codes that were unused in all of them are
            replaced by encoder vectors of the current batch; 0 = never. Revival is not in the
            paper: it is the remedy for a codebook that collapses on small data.
    """

    codebook: Tensor  # [K, C]
    started: Tensor  # [] bool: k-means is done or the codebook was loaded
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
        """Sets random unit vectors, which k-means will replace, and empty statistics."""
        vectors = torch.randn(self.codebook.shape, generator=generator)
        self.codebook.copy_(F.normalize(vectors, dim=1))
        for state in (self.started, self.updates, self.counts, self.last_used):
            state.zero_()

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes vectors [B, P, C]; in train mode the codebook then moves one step.

        Returns quantized vectors [B, P, C], the commitment loss, and codes [B, P]. The commitment
        is the mean over all elements, channels included, so 1/C of the squared distance.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(promote_to_float32(vectors), dim=-1)
            flat = unit.detach().flatten(0, -2)  # [B * P, C]
            if self.training and not self.started:
                self._init_codebook(flat)
            codes = find_nearest(flat, self.codebook)
            quantized = self.codebook[codes].view_as(unit)
            if self.training:
                self._update(flat, codes)
            commitment = self.beta * F.mse_loss(unit, quantized)
            straight_through = unit + (quantized - unit).detach()
            return straight_through, commitment, codes.view(unit.shape[:-1])

    @torch.no_grad()
    def find_codes(self, vectors: Tensor) -> Tensor:
        """Returns the codes [B, P] int64 of vectors [B, P, C]; changes no state in any mode."""
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(promote_to_float32(vectors), dim=-1)
            return find_nearest(unit.flatten(0, -2), self.codebook).view(unit.shape[:-1])

    def compute_usage(self) -> Tensor:
        """Returns the fraction of codes that the last 1 / (1 - decay) updates chose, a scalar."""
        window = round(1 / (1 - self.decay))
        return ((self.last_used > 0) & (self.last_used > self.updates - window)).float().mean()

    def compute_perplexity(self) -> Tensor:
        """Returns exp(entropy) of the running counts, a scalar.

        It is K when all codes are used alike, and 1 before the first update.
        """
        total = self.counts.sum().clamp_min(torch.finfo(self.counts.dtype).tiny)
        return torch.special.entr(self.counts / total).sum().exp()

    @torch.no_grad()
    def _init_codebook(self, vectors: Tensor) -> None:
        """Runs k-means on rank 0, because every rank would get slightly different means."""
        samples = collectives.all_gather(vectors)
        num_codes, generator = len(self.codebook), torch.Generator().manual_seed(0)
        picks = torch.randperm(len(samples), generator=generator)[:num_codes]
        if len(picks) < num_codes:  # too few vectors: duplicates, which later updates drive apart
            picks = torch.randint(len(samples), (num_codes,), generator=generator)
        means = samples[picks.to(samples.device)]
        if collectives.rank() == 0:
            means, _ = run_kmeans(samples, means, KMEANS_ITERATIONS)
        self.codebook.copy_(collectives.broadcast(means))
        self.started.fill_(True)

    @torch.no_grad()
    def _update(self, vectors: Tensor, codes: Tensor) -> None:
        """Moves the codebook towards the vectors [N, C] of all ranks and updates the statistics."""
        sums, counts = _sum_by_code(vectors, codes, len(self.codebook))
        totals = collectives.all_reduce(torch.cat((sums, counts[:, None]), 1))
        sums, counts = totals[:, :-1], totals[:, -1]
        means = _compute_unit_means(sums, counts, self.codebook)
        self.codebook.copy_(
            F.normalize(self.decay * self.codebook + (1 - self.decay) * means, dim=1)
        )
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.updates.add_(1)
        self.last_used.copy_(torch.where(counts > 0, self.updates, self.last_used))
        if self.revive_after and int(self.updates) % self.revive_after == 0:
            self._revive_codes(vectors, int(self.updates))

    def _revive_codes(self, vectors: Tensor, update: int) -> None:
        """Replaces unused codes by vectors.

        The choice depends only on the update and on the vectors of all ranks, so all ranks agree.
        """
        unused = self.last_used <= update - self.revive_after
        candidates = collectives.all_gather(vectors)
        generator = torch.Generator().manual_seed(update)
        picks = torch.randint(len(candidates), (len(unused),), generator=generator)
        replacements = candidates[picks.to(candidates.device)]
        self.codebook.copy_(torch.where(unused[:, None], replacements, self.codebook))


def find_nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Returns the nearest code [N] int64 of each vector [N, C] in a codebook [K, C].

    Distances are |v|^2 + |e|^2 - 2 v e, for vectors and codes of any length.
    """
    squared_lengths = codebook.square().sum(1)
    codes = []
    for chunk in vectors.split(CHUNK):
        products = 2 * chunk @ codebook.T
        distances = chunk.square().sum(1, keepdim=True) + squared_lengths - products  # [n, K]
        codes.append(distances.argmin(1))
    return torch.cat(codes)


def run_kmeans(samples: Tensor, means: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Runs spherical k-means on unit samples [N, C] from initial means [K, C].

    Returns the means [K, C] and the samples per mean [K] int64, counted in the last assignment
    before the means moved. A mean without samples stays where it is.
    """
    counts = means.new_zeros(len(means))
    for _ in range(iterations):
        codes = torch.cat([(chunk @ means.T).argmax(1) for chunk in samples.split(CHUNK)])
        sums, counts = _sum_by_code(samples, codes, len(means))
        means = _compute_unit_means(sums, counts, means)
    return means, counts.long()


def _sum_by_code(vectors: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Returns the sum [K, C] and number [K] (floats, exact below 2^24) of each code's vectors."""
    sums = vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, codes, vectors)
    return sums, codes.bincount(minlength=num_codes).to(vectors.dtype)


def _compute_unit_means(sums: Tensor, counts: Tensor, fallback: Tensor) -> Tensor:
    """Returns the unit mean of each code, and `fallback` where no vector was assigned."""
    means = F.normalize(sums / counts.clamp_min(1)[:, None], dim=1)
    return torch.where(counts[:, None] > 0, means, fallback)
