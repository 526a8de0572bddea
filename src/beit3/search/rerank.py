"""Re-ranks what a search found: the network reads each image and the text in one sequence.

There are two kinds of scores. The matching head of `retrieval` gives the logit that an image and a
text belong together. Weights of `captioning` or `pretrain`, which predict masked tokens, give the
likelihood of the text given the image less its likelihood alone, without any further training.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3.data.batches import trim_padding
from beit3.model.attention_mask import make_image_to_text_mask
from beit3.ops.losses import chunked_vocabulary_loss, token_cross_entropy
from beit3.predict import load
from beit3.search.input_tables import open_any_image
from beit3.task import Batch, Task, task_name
from beit3.tasks.captioning import Captioning
from beit3.tasks.pretrain import Pretrain
from beit3.tasks.retrieval import Retrieval
from beit3.training.evaluate import to_device

NUM_GROUPS = 2
"""Groups into which the tokens of a text are divided for `pretrain` weights, each masked in a pass
of its own. On the embedded world 2, 3, 4 and each token alone re-rank alike, within 0.8 points of
mean recall; each token alone takes eight times the time of 2 (benchmarks/RESULTS.md)."""


class Reranker(ABC):
    """Scores pairs of an image and a text by reading both in one sequence.

    Args:
        task: The network, on its device and in its precision.
        batch_size: Pairs that are read at once.
    """

    weight: ClassVar[float]
    """Factor of the standardized fused score beside the standardized score of the search."""

    def __init__(self, task: Any, *, batch_size: int = 32):
        self.task = task.eval()
        self.batch_size = batch_size

    @abstractmethod
    def score_texts(self, text: Tensor, padding: Tensor) -> Tensor:
        """Returns [T], the part of the score that each text [T, L] has with any image."""

    @abstractmethod
    def score_pairs(self, batch: Batch) -> Tensor:
        """Returns [B], the scores of the batch's images and texts before that part is taken off."""

    @torch.inference_mode()
    def score(self, texts: Sequence[str], images: Sequence[Any]) -> np.ndarray:
        """Returns one score per pair as float32 [N]; larger is better.

        Scores of different texts can be compared as well as those of different images.

        Args:
            texts: N texts. Each distinct one is tokenized once.
            images: N images of any kind that `open_any_image` reads.

        Raises:
            ValueError: The numbers differ, a text is empty, or an image cannot be read.
        """
        if len(texts) != len(images):
            raise ValueError(
                f"{len(texts)} texts and {len(images)} images: give one image for each text"
            )
        for index, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"texts[{index}] is empty: re-ranking reads images with words")
        distinct_texts = list(dict.fromkeys(texts))
        token_ids, padding = self._tokenize(distinct_texts)
        parts_of_texts = self._score_distinct_texts(token_ids, padding)
        rows = {value: row for row, value in enumerate(distinct_texts)}
        text_rows = np.array([rows[value] for value in texts], dtype=int)

        scores = np.empty(len(texts), np.float32)
        pixels: dict[Any, Tensor] = {}
        for start in range(0, len(texts), self.batch_size):
            indices = range(start, min(start + self.batch_size, len(texts)))
            pixels = self._read_images([images[index] for index in indices], pixels)
            chosen = text_rows[indices.start : indices.stop]
            batch = {
                "image": torch.stack([pixels[_identify(images[index])] for index in indices]),
                "text": token_ids[chosen],
                "text_padding": padding[chosen],
            }
            pair_scores = self.score_pairs(self._move(trim_padding(batch))).float().cpu().numpy()
            scores[indices.start : indices.stop] = pair_scores - parts_of_texts[chosen]
        return scores

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns token ids [T, L] and padding [T, L]; texts are cut as the task cuts them."""
        length = self.task.config.text_length
        pairs = [self.task.tokenize_text(text, length) for text in texts]
        if not pairs:
            return torch.empty(0, length, dtype=torch.int64), torch.empty(0, length).bool()
        ids, paddings = zip(*pairs, strict=True)
        return torch.stack(ids), torch.stack(paddings)

    def _score_distinct_texts(self, text: Tensor, padding: Tensor) -> np.ndarray:
        """Returns `score_texts` in batches as float32 [T]."""
        parts = [np.empty(0, np.float32)]
        for start in range(0, len(text), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = self._move(trim_padding({"text": text[rows], "text_padding": padding[rows]}))
            values = self.score_texts(batch["text"], batch["text_padding"])
            parts.append(values.float().cpu().numpy())
        return np.concatenate(parts)

    def _read_images(
        self, images: Sequence[Any], known_pixels: dict[Any, Tensor]
    ) -> dict[Any, Tensor]:
        """Returns the pixels of a batch's images, uint8 [3, S, S] by identity.

        Those of the batch before are kept, so that one image with many texts is read once.
        """
        pixels: dict[Any, Tensor] = {}
        for image in images:
            key = _identify(image)
            if key in known_pixels:
                pixels[key] = known_pixels[key]
            elif key not in pixels:
                pixels[key] = self.task.config.image.preprocess(open_any_image(image))
        return pixels

    def _move(self, batch: Batch) -> Batch:
        parameter = next(self.task.parameters())
        return to_device(batch, parameter.device, parameter.dtype)


def _identify(image: Any) -> Any:
    """Returns what two uses of the same image have in common: its path, else the object's id."""
    return str(image) if isinstance(image, str | Path) else id(image)


# Matching head ------------------------------------------------------------------------------------


class MatchingReranker(Reranker):
    """The matching head of `retrieval`: the logit that an image and a text belong together."""

    weight = 1.0
    task: Retrieval

    def score_texts(self, text: Tensor, padding: Tensor) -> Tensor:
        return torch.zeros(len(text), device=text.device)

    def score_pairs(self, batch: Batch) -> Tensor:
        return self.task.match(batch)


# Likelihood ---------------------------------------------------------------------------------------


class MaskedReranker(Reranker):
    """Weights of `pretrain`: the likelihood of masked tokens, which see those before and behind.

    The tokens are divided into groups, and each group is masked in a pass of its own. The sum of
    all log-probabilities is the text's pseudo-log-likelihood (Salazar et al. 2020,
    arXiv:1910.14659, who mask one token at a time).

    Args:
        task: The network.
        batch_size: Pairs that are read at once.
        num_groups: Groups of tokens; 0 = each token is masked alone.
    """

    weight = 1.0
    task: Pretrain

    def __init__(self, task: Any, *, batch_size: int = 32, num_groups: int = NUM_GROUPS):
        super().__init__(task, batch_size=batch_size)
        self.num_groups = num_groups

    def score_texts(self, text: Tensor, padding: Tensor) -> Tensor:
        return self._sum_log_probs({"text": text, "text_padding": padding})

    def score_pairs(self, batch: Batch) -> Tensor:
        return self._sum_log_probs(batch | {"image": self.task.normalize_images(batch)})

    def _sum_log_probs(self, batch: Batch) -> Tensor:
        """Returns the sum of the log-probabilities of each text's tokens, [B]."""
        text, padding = batch["text"], batch["text_padding"]
        sums = torch.zeros(len(text), device=text.device)
        for is_masked in self._make_groups(text):
            encoded = self.task.backbone(
                batch.get("image"),
                text.masked_fill(is_masked, self.task.tokenizer.mask),
                text_padding=padding,
                read="real",
            )
            losses, _ = chunked_vocabulary_loss(
                encoded.of("text")[is_masked],
                text[is_masked],
                self.task.text_head,
                token_cross_entropy,
            )
            sums.index_add_(0, is_masked.nonzero()[:, 0], -losses.float())
        return sums

    def _make_groups(self, text: Tensor) -> Iterator[Tensor]:
        """Yields masks [B, L]: of every `num_groups`-th token, special tokens left out.

        Neighbors are in different groups, because they tell most about each other.
        """
        is_piece = text >= self.task.tokenizer.first_piece
        order = is_piece.cumsum(1) - 1
        num_groups = self.num_groups or max(1, int(is_piece.sum(1).max()))
        for group in range(num_groups):
            is_masked = is_piece & (order % num_groups == group)
            if is_masked.any():
                yield is_masked


class CaptioningReranker(Reranker):
    """Weights of `captioning`: the likelihood that the network writes this text for the image.

    Each token is predicted by a [MASK] token that sees the image and the tokens before, as when a
    caption is written (model/generation.py). All [MASK] tokens stand in one sequence behind the
    text, so a pair takes a single pass.
    """

    weight = 1.0
    task: Captioning

    def score_texts(self, text: Tensor, padding: Tensor) -> Tensor:
        return self._sum_log_probs(text, padding, None)

    def score_pairs(self, batch: Batch) -> Tensor:
        image = self.task.normalize_images(batch)
        return self._sum_log_probs(batch["text"], batch["text_padding"], image)

    def _sum_log_probs(self, text: Tensor, padding: Tensor, image: Tensor | None) -> Tensor:
        """Returns the log-probability [B] of each text, its EOS token included."""
        num_slots = text.shape[1] - 1
        slots = torch.full_like(text[:, 1:], self.task.tokenizer.mask)
        steps = torch.arange(num_slots, device=text.device)
        # A text that fills its length ends without EOS among `text[:, :-1]`, as it should.
        is_target = ~padding[:, 1:]
        num_image_tokens = 0 if image is None else self._count_image_tokens(image)
        encoded = self.task.backbone(
            image,
            torch.cat((text[:, :-1], slots), 1),
            text_padding=torch.cat((~is_target, ~is_target), 1),
            text_position_ids=torch.cat((steps, steps + 1)),
            attention_mask=make_slot_mask(num_image_tokens, num_slots, device=text.device),
            read="real",
        )
        losses, _ = chunked_vocabulary_loss(
            encoded.of("text")[:, num_slots:][is_target],
            text[:, 1:][is_target],
            self.task.text_head,
            token_cross_entropy,
        )
        sums = torch.zeros(len(text), device=text.device)
        return sums.index_add_(0, is_target.nonzero()[:, 0], -losses.float())

    def _count_image_tokens(self, image: Tensor) -> int:
        size = self.task.config.model.patch_size
        return 1 + (image.shape[-2] // size) * (image.shape[-1] // size)


def make_slot_mask(num_image: int, num_slots: int, *, device: torch.device | None = None) -> Tensor:
    """Returns the mask [N, N] of an image, n tokens, and a [MASK] token behind each of them.

    Slot j sees the image, tokens 0 to j and itself. No token sees a slot.
    """
    num_context = num_image + num_slots
    context = make_image_to_text_mask(num_image, num_slots, device=device)
    mask = torch.zeros(num_context + num_slots, num_context + num_slots, dtype=torch.bool)
    mask = mask.to(context.device)
    mask[:num_context, :num_context] = context
    mask[num_context:, :num_context] = context[num_image:]
    mask[num_context:, num_context:] = torch.eye(num_slots, dtype=torch.bool, device=mask.device)
    return mask


# Loading and order --------------------------------------------------------------------------------

RERANKERS: dict[str, type[Reranker]] = {
    "retrieval": MatchingReranker,
    "captioning": CaptioningReranker,
    "pretrain": MaskedReranker,
}
"""Name of a task -> how its weights re-rank."""


def load_reranker(weights: str | Path, *, batch_size: int = 32, **options: Any) -> Reranker:
    """Loads weights that re-rank: of `retrieval` with a matching head, `captioning` or `pretrain`.

    Args:
        weights: A weights directory, a run directory or a released file.
        batch_size: Pairs that are read at once.
        options: Arguments of `beit3.predict.load`, such as `text_model` or `precision`.

    Raises:
        ValueError: The weights cannot re-rank; the message says what is needed.
    """
    return make_reranker(load(weights, **options).task, batch_size=batch_size, source=weights)


def make_reranker(
    task: Task, *, batch_size: int = 32, source: str | Path = "these weights"
) -> Reranker:
    """Returns the reranker of a loaded task; `source` names its weights in messages.

    Raises:
        ValueError: The task cannot re-rank; the message says what is needed.
    """
    name = task_name(type(task))
    has_no_head = isinstance(task, Retrieval) and task.matching_head is None
    if name not in RERANKERS or has_no_head:
        found = "retrieval without a matching head" if has_no_head else name
        raise ValueError(
            f"{source} holds weights of {found}, which cannot re-rank: give weights of a recipe "
            "retrieval *_matching, of captioning, or of pretrain"
        )
    return RERANKERS[name](task, batch_size=batch_size)


@dataclass(frozen=True)
class Reranked:
    """The new order of a search's candidates."""

    order: np.ndarray
    """Indices of the candidates, best first, [N] int64."""
    scores: np.ndarray
    """Score of each candidate in the order given, by which they are sorted, [N] float32."""
    fused: np.ndarray
    """What the reranker alone says of each candidate in the order given, [N] float32."""


def rerank(
    reranker: Reranker,
    texts: Sequence[str],
    images: Sequence[Any],
    scores: Sequence[float] | np.ndarray,
    *,
    weight: float | None = None,
) -> Reranked:
    """Sorts the best candidates of one search anew.

    Args:
        reranker: What reads the pairs.
        texts: The query N times where images were searched; the N texts found otherwise.
        images: The N images found; the query N times where texts were searched.
        scores: The search's own scores [N].
        weight: Factor of the fused scores; by default the reranker's own.
    """
    fused = reranker.score(texts, images)
    combined = combine_scores(scores, fused, reranker.weight if weight is None else weight)
    return Reranked(np.argsort(-combined, kind="stable"), combined, fused)


def combine_scores(
    first: Sequence[float] | np.ndarray, fused: np.ndarray, weight: float
) -> np.ndarray:
    """Returns the standardized scores of a search plus `weight` times the standardized fused ones.

    Both are standardized over the candidates of one query [N], so that neither scale matters.
    """
    return (standardize(first) + weight * standardize(fused)).astype(np.float32)


def standardize(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns values [N] with mean 0 and deviation 1 as float64; zeros where they are all equal."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return array
    deviation = array.std()
    return (array - array.mean()) / deviation if deviation > 0 else np.zeros_like(array)
