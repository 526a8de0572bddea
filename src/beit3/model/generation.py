"""Caption generation (paper section 3.1): the state of a [MASK] token predicts the next token.

The image and the tokens so far are encoded once and cached. A step encodes the newest token and a
[MASK] token behind it, reads the latter's state, and drops it from the cache.

Shapes: B images, R = B * beams sequences, V vocabulary. The length of a caption counts `<s>`, its
tokens, and one more for [MASK] or `</s>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.cache import Cache
from beit3.ops.collectives import all_reduce, world_size

CANDIDATES_PER_BEAM = 3
"""Continuations that beam search considers per beam (release)."""


@dataclass(frozen=True)
class Decoding:
    """How next tokens are chosen. The defaults are the release's."""

    method: Literal["beam", "greedy", "sample"] = "beam"
    num_beams: int = 3
    length_penalty: float = 0.6
    """Beam search scores a caption of length n by its log-probability / n ** length_penalty."""
    temperature: float = 1.0
    """Sampling: divides the logits; below 1 likely tokens become likelier."""
    top_p: float = 1.0
    """Sampling: keeps the smallest set of likeliest tokens with this total probability."""
    seed: int = 0
    """Sampling: seed of the records' random generators."""

    def __post_init__(self) -> None:
        if self.num_beams < 1 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ValueError(
                f"num_beams {self.num_beams}, top_p {self.top_p}, temperature {self.temperature}: "
                "at least 1, within (0, 1], above 0"
            )


@dataclass(frozen=True)
class Caption:
    """The token ids of one caption without special tokens, and its score.

    The score is the log-probability; beam search divides it by the length's power.
    """

    token_ids: list[int]
    score: float


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of `<s>`, `</s>`, `<pad>` and `<mask>`."""

    bos: int
    eos: int
    pad: int
    mask: int


class DecoderState:
    """The sequences under way: their cache, and the log-probabilities [R, V] of each next token.

    The beams of an image lie side by side in one sequence, whose image is encoded once. A step
    appends one token per beam and reads one [MASK] token behind each; the attention mask lets a
    token see its own ancestors only. So nothing in the cache moves when beams are reordered.
    """

    def __init__(
        self,
        backbone: BEiT3,
        head: Callable[[Tensor], Tensor],
        image: Tensor,
        special_tokens: SpecialTokens,
    ):
        """Encodes images [B, 3, H, W] and `<s>`.

        Args:
            backbone: the network.
            head: maps states [R, D] to logits [R, V].
            image: normalized pixels.
            special_tokens: ids of the vocabulary's special tokens.
        """
        size = backbone.config.patch_size
        self.backbone, self.head, self.special_tokens = backbone, head, special_tokens
        self.cache, self.num_steps = Cache(), 0
        self.num_image_tokens = 1 + (image.shape[-2] // size) * (image.shape[-1] // size)
        # [B, beams, cached text tokens]: which of them belong to each beam.
        self.ancestors = torch.ones(len(image), 1, 1, dtype=torch.bool, device=image.device)
        bos = torch.full((len(image), 1), special_tokens.bos, device=image.device)
        mask = make_image_to_text_mask(self.num_image_tokens, 2, device=image.device)
        self.log_probs = self._predict_next(bos, image, mask)

    def advance(self, rows: Tensor, token_ids: Tensor) -> None:
        """Continues sequences `rows` [R] int64 with one of `token_ids` [R] each.

        Rows index the current sequences, equally many of each image, in the images' order.
        """
        num_images, num_beams = self.ancestors.shape[:2]
        rows = rows.view(num_images, -1)
        index = (rows % num_beams)[..., None].expand(-1, -1, self.ancestors.shape[2])
        inherited = self.ancestors.gather(1, index)
        new_tokens = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device)
        new_tokens = new_tokens.expand(num_images, -1, -1)
        self.ancestors = torch.cat((inherited, new_tokens), 2)

        image = self.ancestors.new_ones(num_images, rows.shape[1], self.num_image_tokens)
        no_mask_tokens = torch.zeros_like(new_tokens)
        token_mask = torch.cat((image, self.ancestors, no_mask_tokens), 2)
        mask_token_mask = torch.cat((image, self.ancestors, new_tokens), 2)
        mask = torch.cat((token_mask, mask_token_mask), 1)[:, None]
        self.log_probs = self._predict_next(token_ids.view(num_images, -1), None, mask)

    def _predict_next(self, token_ids: Tensor, image: Tensor | None, mask: Tensor) -> Tensor:
        """Encodes each beam's newest token [B, beams] and a [MASK] token; returns [R, V]."""
        num_beams = token_ids.shape[1]
        mask_tokens = torch.full_like(token_ids, self.special_tokens.mask)
        steps = torch.tensor([self.num_steps, self.num_steps + 1], device=token_ids.device)
        read: Literal["all", "last"] = "all" if image is None else "last"
        encoded = self.backbone(
            image,
            torch.cat((token_ids, mask_tokens), 1),
            attention_mask=mask,
            text_position_ids=steps.repeat_interleave(num_beams),
            cache=self.cache,
            read=read,
        )
        self.cache.drop_last(num_beams)
        self.num_steps += 1
        states = encoded.of("text")[:, -num_beams:].flatten(0, 1)  # [R, D]
        return self.head(states).float().log_softmax(-1)


def generate(
    state: DecoderState,
    max_length: int,
    decoding: Decoding,
    draws: Sequence[Callable[[], float]] = (),
) -> list[Caption]:
    """Generates one caption per image.

    Args:
        state: of the images, before the first token.
        max_length: of a caption, special tokens included. As released, beam search ends with one
            token fewer.
        decoding: how next tokens are chosen.
        draws: for sampling, one function per image that returns its next number in [0, 1).

    Raises:
        ValueError: a `max_length` without room for a token, or beyond the text position table.
    """
    longest = state.backbone.config.max_text_length
    shortest = 4 if decoding.method == "beam" else 3
    if not shortest <= max_length <= longest:
        raise ValueError(
            f"captions of {max_length} tokens: give {shortest} (special tokens and one more) "
            f"to {longest} (rows of the text position table)"
        )
    if decoding.method == "beam":
        return search_beams(state, max_length, decoding.num_beams, decoding.length_penalty)
    return decode_token_by_token(state, max_length, decoding, draws)


def decode_token_by_token(
    state: DecoderState,
    max_length: int,
    decoding: Decoding,
    draws: Sequence[Callable[[], float]],
) -> list[Caption]:
    """Decodes greedily or by sampling; see `generate`."""
    num_images, eos = len(state.log_probs), state.special_tokens.eos
    token_ids: list[list[int]] = [[] for _ in range(num_images)]
    scores, is_open = [0.0] * num_images, [True] * num_images
    rows = torch.arange(num_images, device=state.log_probs.device)
    for length in range(3, max_length + 1):
        if decoding.method == "greedy":
            next_ids = state.log_probs.argmax(1)
        else:
            next_ids = sample(state.log_probs, decoding, draws)
        log_probs = state.log_probs.gather(1, next_ids[:, None])[:, 0].tolist()
        for row, token_id in enumerate(next_ids.tolist()):
            if is_open[row]:
                scores[row] += log_probs[row]
                is_open[row] = token_id != eos
                if is_open[row]:
                    token_ids[row].append(token_id)
        if all_ranks_done(not any(is_open)) or length == max_length:
            break
        state.advance(rows, next_ids)
    return [Caption(ids, score) for ids, score in zip(token_ids, scores, strict=True)]


def sample(log_probs: Tensor, decoding: Decoding, draws: Sequence[Callable[[], float]]) -> Tensor:
    """Samples token ids [R] from log-probabilities [R, V] by temperature and top-p."""
    probs, order = (log_probs / decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
    cumulative = probs.cumsum(-1)
    probs = probs.masked_fill(cumulative - probs >= decoding.top_p, 0.0)
    cumulative = probs.cumsum(-1)
    uniform = torch.tensor(
        [[draw()] for draw in draws], dtype=cumulative.dtype, device=cumulative.device
    )
    ranks = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return order.gather(1, ranks.clamp_(max=probs.shape[-1] - 1))[:, 0]


@dataclass
class BeamHypotheses:
    """The open sequences of one image with their log-probabilities, and its best finished caption.

    Rules of the release: `</s>` finishes a sequence. So does the last length: the sequence is then
    scored with its next token but kept without it. Lengths count `<s>` and [MASK].
    """

    num_beams: int
    length_penalty: float
    max_length: int
    token_ids: list[list[int]] = field(default_factory=lambda: [[]])
    """One open sequence before the first step, `num_beams` afterwards."""
    log_probs: list[float] = field(default_factory=lambda: [0.0])
    best: Caption | None = None
    is_done: bool = False

    def step(
        self,
        candidates: Sequence[tuple[int, int, float]],
        special_tokens: SpecialTokens,
        *,
        is_last: bool,
    ) -> list[tuple[int, int]]:
        """Takes the next tokens of all beams.

        Args:
            candidates: (beam, token id, log-probability of the sequence), the likeliest first.
            special_tokens: ids of `</s>` and of the padding that finished images continue with.
            is_last: whether sequences have reached their largest length.

        Returns:
            (beam, token id) of the `num_beams` sequences that go on.
        """
        best_possible = candidates[0][2] / (self.max_length - 1) ** self.length_penalty
        if self.best is not None and self.best.score >= best_possible:
            self.is_done = True
        open_candidates: list[tuple[int, int, float]] = []
        for beam, token_id, log_prob in () if self.is_done else candidates:
            if token_id == special_tokens.eos or is_last:
                self.finish(self.token_ids[beam], log_prob)
            else:
                open_candidates.append((beam, token_id, log_prob))
            if len(open_candidates) == self.num_beams:
                break
        if not open_candidates:
            open_candidates = [(0, special_tokens.pad, 0.0)] * self.num_beams
        self.token_ids = [[*self.token_ids[beam], token] for beam, token, _ in open_candidates]
        self.log_probs = [log_prob for *_, log_prob in open_candidates]
        return [(beam, token_id) for beam, token_id, _ in open_candidates]

    def finish(self, token_ids: list[int], log_prob: float) -> None:
        """Keeps a finished sequence if it scores best."""
        score = log_prob / (len(token_ids) + 2) ** self.length_penalty
        if self.best is None or score > self.best.score:
            self.best = Caption(token_ids, score)


def search_beams(
    state: DecoderState, max_length: int, num_beams: int, length_penalty: float
) -> list[Caption]:
    """Returns the best caption of each image that `num_beams` beams find; see `generate`."""
    num_images, device = len(state.log_probs), state.log_probs.device
    num_candidates = CANDIDATES_PER_BEAM * num_beams
    hypotheses = [BeamHypotheses(num_beams, length_penalty, max_length) for _ in range(num_images)]
    for length in range(2, max_length):
        is_last = length == max_length - 1
        beam_log_probs = torch.tensor([h.log_probs for h in hypotheses], device=device)
        candidates = rank_candidates(state.log_probs, beam_log_probs, num_candidates)
        rows, token_ids = [], []
        for image, hypothesis in enumerate(hypotheses):
            continued = hypothesis.step(candidates[image], state.special_tokens, is_last=is_last)
            for beam, token_id in continued:
                rows.append(image * beam_log_probs.shape[1] + beam)
                token_ids.append(token_id)
        if all_ranks_done(all(h.is_done for h in hypotheses)) or is_last:
            break
        state.advance(torch.tensor(rows, device=device), torch.tensor(token_ids, device=device))
    return [hypothesis.best or Caption([], 0.0) for hypothesis in hypotheses]


def rank_candidates(
    log_probs: Tensor, beam_log_probs: Tensor, num_candidates: int
) -> list[list[tuple[int, int, float]]]:
    """Ranks the continuations of each image's beams by the sequences' log-probabilities.

    Args:
        log_probs: [R, V] of the next tokens.
        beam_log_probs: [B, beams] of the sequences so far; beams is 1 in the first step.
        num_candidates: how many to return of each image.

    Returns:
        For each image (beam, token id, log-probability of the sequence), the likeliest first.
    """
    num_images = len(beam_log_probs)
    # No beam can contribute more than num_candidates: rank those before the sums.
    top, top_ids = log_probs.topk(min(num_candidates, log_probs.shape[1]), dim=1)  # [R, C]
    per_beam = top.shape[1]
    sums = (beam_log_probs[:, :, None] + top.view(num_images, -1, per_beam)).flatten(1)
    sums, indices = sums.topk(min(num_candidates, sums.shape[1]), dim=1)  # [B, candidates]
    token_ids = top_ids.view(num_images, -1).gather(1, indices).tolist()
    beams = (indices // per_beam).tolist()
    return [
        list(zip(*image, strict=True))
        for image in zip(beams, token_ids, sums.tolist(), strict=True)
    ]


def all_ranks_done(is_done: bool) -> bool:
    """Returns whether every process is done.

    Sharded weights are gathered in every step, so all processes take equally many steps.
    """
    if world_size() == 1:
        return is_done
    return int(all_reduce(torch.tensor(int(is_done)))) == world_size()
