"""Captions word by word (paper section 3.1, image captioning): the state of a [MASK] slot says the next word.

The image and the words so far are encoded once and kept as keys and values; a step encodes the newest word and the slot
behind it, reads the slot, and forgets it. Rows: B images, R = B * beams sequences. Lengths count the begin mark, the
words and one more for the slot or the end mark.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from beit3.model.attention_mask import image_to_text
from beit3.model.beit3 import BEiT3
from beit3.model.layers import Cache
from beit3.ops.collectives import all_reduce, world_size

CANDIDATES = 3
"""Continuations looked at per beam (release)."""


@dataclass(frozen=True)
class Decoding:
    """How words are chosen; the defaults are the release's."""

    method: Literal["beam", "greedy", "sample"] = "beam"
    num_beams: int = 3
    length_penalty: float = 0.6
    """A finished caption of length n scores its log-probability / n ** length_penalty."""
    temperature: float = 1.0
    """Sampling: below 1 prefers likely words more."""
    top_p: float = 1.0
    """Sampling: only the likeliest words that together have this probability."""
    seed: int = 0
    """Sampling: every record draws from a generator of its own."""

    def __post_init__(self) -> None:
        if self.num_beams < 1 or not 0 < self.top_p <= 1 or self.temperature <= 0:
            raise ValueError(
                f"num_beams {self.num_beams}, top_p {self.top_p}, temperature {self.temperature}: "
                "at least 1, within (0, 1], above 0"
            )


@dataclass(frozen=True)
class Caption:
    """Words of one image, marks left out, and their score: the log-probability, for beams divided by the length's power."""

    words: list[int]
    score: float


@dataclass(frozen=True)
class Marks:
    """Ids of the begin mark, the end mark, padding and the [MASK] slot."""

    bos: int
    eos: int
    pad: int
    mask: int


class Slots:
    """The sequences being written: log-probabilities [R, V] of each one's next word, and the step to it.

    R = B * beams. The beams of an image lie side by side in one sequence, whose image is encoded and kept once: a step
    appends a word of each beam and reads a slot behind each, and the mask lets a word see its own ancestors. So nothing
    that is kept ever moves, whatever beams go on.
    """

    def __init__(
        self, backbone: BEiT3, head: Callable[[Tensor], Tensor], image: Tensor, marks: Marks
    ):
        self.backbone, self.head, self.marks = backbone, head, marks
        self.cache, self.step = Cache(), 0
        self.num_image = 1 + (image.shape[-2] // backbone.config.patch_size) * (
            image.shape[-1] // backbone.config.patch_size
        )
        self.seen = torch.ones(
            len(image), 1, 1, dtype=torch.bool, device=image.device
        )  # [B, beams, text kept]: a beam's words
        start = torch.full((len(image), 1), marks.bos, device=image.device)
        self.log_probs = self._read(
            start, image, image_to_text(self.num_image, 2, device=image.device)
        )

    def advance(self, rows: Tensor, words: Tensor) -> None:
        """Go on with sequences `rows`, equally many [B * beams] of each image in its order, each with one of `words` behind it."""
        count, beams = self.seen.shape[:2]
        rows = rows.view(count, -1)
        before = self.seen.gather(1, (rows % beams)[..., None].expand(-1, -1, self.seen.shape[2]))
        own = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device).expand(count, -1, -1)
        self.seen = torch.cat((before, own), 2)
        image = self.seen.new_ones(count, rows.shape[1], self.num_image)
        words_see, slots_see = (
            torch.cat((image, self.seen, own & False), 2),
            torch.cat((image, self.seen, own), 2),
        )
        self.log_probs = self._read(
            words.view(count, -1), None, torch.cat((words_see, slots_see), 1)[:, None]
        )

    def _read(self, words: Tensor, image: Tensor | None, mask: Tensor) -> Tensor:
        """Encode the newest word of each beam [B, beams] and a slot behind each, and read the slots."""
        beams, place = words.shape[1], self.step
        text = torch.cat((words, torch.full_like(words, self.marks.mask)), 1)
        places = torch.tensor([place, place + 1], device=words.device).repeat_interleave(beams)
        read: Literal["all", "last"] = "all" if image is None else "last"
        encoded = self.backbone(
            image, text, attention_mask=mask, text_places=places, cache=self.cache, read=read
        )
        self.cache.drop_last(beams)
        states = encoded.of("text")[:, -beams:].flatten(0, 1)  # [R, D]
        self.step += 1
        return self.head(states).float().log_softmax(-1)


def generate(
    slots: Slots, max_length: int, decoding: Decoding, draws: Sequence[Callable[[], float]] = ()
) -> list[Caption]:
    """One caption per image, of at most `max_length` tokens, marks included; beams, as released, hold one word fewer.

    `draws`: for sampling, what gives each image its next number in [0, 1).

    ValueError for a `max_length` without room for a word or beyond the text table.
    """
    longest, least = slots.backbone.config.max_text_length, 4 if decoding.method == "beam" else 3
    if not least <= max_length <= longest:
        raise ValueError(
            f"captions of {max_length} tokens: at least {least} (marks, a word), at most {longest}, rows of the text table"
        )
    if decoding.method == "beam":
        return beam_search(slots, max_length, decoding.num_beams, decoding.length_penalty)
    return one_by_one(slots, max_length, decoding, draws)


def one_by_one(
    slots: Slots, max_length: int, decoding: Decoding, draws: Sequence[Callable[[], float]]
) -> list[Caption]:
    """The likeliest next word each time, or a drawn one."""
    count, marks = len(slots.log_probs), slots.marks
    words: list[list[int]] = [[] for _ in range(count)]
    scores, open_rows = [0.0] * count, [True] * count
    rows = torch.arange(count, device=slots.log_probs.device)
    for length in range(3, max_length + 1):
        chosen = (
            slots.log_probs.argmax(1)
            if decoding.method == "greedy"
            else sample(slots.log_probs, decoding, draws)
        )
        gained = slots.log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        for row, word in enumerate(chosen.tolist()):
            if open_rows[row]:
                scores[row] += gained[row]
                open_rows[row] = word != marks.eos
                words[row] += [word] if word != marks.eos else []
        if everyone(not any(open_rows)) or length == max_length:
            break
        slots.advance(rows, chosen)
    return [Caption(each, score) for each, score in zip(words, scores, strict=True)]


def sample(log_probs: Tensor, decoding: Decoding, draws: Sequence[Callable[[], float]]) -> Tensor:
    """A word [R] per row from the tempered probabilities [R, V], cut to the likeliest that have `top_p` together."""
    probs, order = (log_probs / decoding.temperature).softmax(-1).sort(dim=-1, descending=True)
    summed = probs.cumsum(-1)
    probs = probs.masked_fill(summed - probs >= decoding.top_p, 0.0)
    summed = probs.cumsum(-1)
    drawn = torch.tensor([[draw()] for draw in draws], dtype=summed.dtype, device=summed.device)
    place = torch.searchsorted(summed, drawn * summed[:, -1:], right=True).clamp_(
        max=probs.shape[-1] - 1
    )
    return order.gather(1, place)[:, 0]


@dataclass
class Search:
    """The sequences of one image: the open ones with their log-probabilities, and the best that is finished.

    The release's books: the end mark closes a sequence, and so does the last length, where it is scored with the word that
    would follow but without it; lengths count the begin mark and the slot.
    """

    num_beams: int
    penalty: float
    max_length: int
    words: list[list[int]] = field(default_factory=lambda: [[]])
    """One open sequence until the first words are known."""
    log_probs: list[float] = field(default_factory=lambda: [0.0])
    best: Caption | None = None
    done: bool = False

    def step(
        self, candidates: Sequence[tuple[int, int, float]], pad: int, eos: int, *, last: bool
    ) -> list[tuple[int, int]]:
        """Take continuations (beam, word, log-probability), the likeliest first; returns the `num_beams` (beam, word) that go on."""
        most = (
            candidates[0][2] / (self.max_length - 1) ** self.penalty
        )  # what the likeliest could still score
        self.done = self.done or (self.best is not None and self.best.score >= most)
        kept: list[tuple[int, int, float]] = []
        for beam, word, log_prob in () if self.done else candidates:
            if word == eos or last:
                self.close(self.words[beam], log_prob)
            else:
                kept.append((beam, word, log_prob))
            if len(kept) == self.num_beams:
                break
        kept = kept or [(0, pad, 0.0)] * self.num_beams
        self.words = [[*self.words[beam], word] for beam, word, _ in kept]
        self.log_probs = [log_prob for *_, log_prob in kept]
        return [(beam, word) for beam, word, _ in kept]

    def close(self, words: list[int], log_prob: float) -> None:
        score = log_prob / (len(words) + 2) ** self.penalty
        if self.best is None or score > self.best.score:
            self.best = Caption(words, score)


def beam_search(slots: Slots, max_length: int, num_beams: int, penalty: float) -> list[Caption]:
    """The best caption of each image among those that end, or reach `max_length`, on any of `num_beams` beams."""
    (count, vocab), device, marks = slots.log_probs.shape, slots.log_probs.device, slots.marks
    searches, num_candidates = (
        [Search(num_beams, penalty, max_length) for _ in range(count)],
        CANDIDATES * num_beams,
    )
    for length in range(2, max_length):
        before = torch.tensor(
            [search.log_probs for search in searches], device=device
        )  # [B, beams], or [B, 1] at first
        likely, following = slots.log_probs.topk(
            min(num_candidates, vocab), dim=1
        )  # [R, C]: no more of a beam can be chosen
        totals = (before[:, :, None] + likely.view(count, -1, likely.shape[1])).flatten(
            1
        )  # [B, beams * C]
        values, places = totals.topk(min(num_candidates, totals.shape[1]), dim=1)
        chosen, of_beam = (
            following.view(count, -1).gather(1, places).tolist(),
            (places // likely.shape[1]).tolist(),
        )
        rows, words = [], []
        for index, search in enumerate(searches):
            candidates = list(
                zip(of_beam[index], chosen[index], values[index].tolist(), strict=True)
            )
            for beam, word in search.step(
                candidates, marks.pad, marks.eos, last=length == max_length - 1
            ):
                rows.append(index * before.shape[1] + beam)
                words.append(word)
        if everyone(all(search.done for search in searches)) or length == max_length - 1:
            break
        slots.advance(torch.tensor(rows, device=device), torch.tensor(words, device=device))
    return [search.best or Caption([], 0.0) for search in searches]


def everyone(done: bool) -> bool:
    """Whether every process is done: sharded weights are gathered in every step, so all of them must take it."""
    return done if world_size() == 1 else int(all_reduce(torch.tensor(int(done)))) == world_size()
