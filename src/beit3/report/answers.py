"""What the fine-tuned tasks say of held-out pictures, as HTML: panels in which the runs of one task
stand side by side.

All runs are asked about the records of the first one. Pictures are shown as its network sees them,
uint8 [H, W, 3];
a cut, stretched or shrunken one is so here, too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from html import escape

import numpy as np
import torch

from beit3.report.curves import run_class
from beit3.report.panel_inputs import Panel, panel, records, spread, weights
from beit3.report.pictures import picture, pixels
from beit3.report.runs import Run
from beit3.task import Prediction, Record, Task
from beit3.tasks.captioning import Captioning
from beit3.tasks.imagenet import ImageNet
from beit3.tasks.nlvr2 import ANSWERS, NLVR2
from beit3.tasks.retrieval import Retrieval
from beit3.tasks.vqa import VQA
from beit3.training.evaluate import iterate_batches

SHOWN, SEARCHES = 12, 6
"""Cards of a panel: records that are answered, and searches, each with several results."""

NEAREST, GALLERY = 3, 150
"""Results of a search; pictures that are searched, which a network of base size encodes in minutes
without an accelerator."""

HUMAN = 5
"""Captions of people shown for a picture."""

THUMBNAIL = 160
"""Largest side in pixels of a picture among others in a row."""


def vqa_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Questions with the answers of all runs side by side."""
    lead = (
        "Held-out pictures and questions with the likeliest answer and its "
        f"probability{beside(runs)}."
    )
    yield panel("Questions and answers", lead, partial(_cards, runs, VQA, question_card))


def nlvr2_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Statements on two pictures with the judgements of all runs side by side."""
    lead = (
        "Held-out pairs of pictures and a statement on both, with the judgement and its "
        f"probability{beside(runs)}."
    )
    yield panel("Statements and judgements", lead, partial(_cards, runs, NLVR2, statement_card))


def captioning_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Pictures with the captions of all runs side by side, and those of people."""
    lead = (
        f"Held-out pictures with the caption that was written for each{beside(runs)}, and below "
        "it captions that people gave."
    )
    yield panel("Captions", lead, partial(_cards, runs, Captioning, caption_card))


def imagenet_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Pictures with the likeliest classes of all runs side by side."""
    lead = f"Held-out pictures with the likeliest classes and their probabilities{beside(runs)}."
    yield panel("Pictures and classes", lead, partial(_cards, runs, ImageNet, class_card))


def retrieval_panels(runs: Sequence[Run]) -> Iterator[Panel]:
    """Captions with the pictures nearest to them, and pictures with their nearest captions."""
    encoded = cache(partial(gallery, runs))
    lead = (
        f"Held-out captions and the {NEAREST} pictures nearest to each{beside(runs)}; the right "
        "one is framed."
    )
    yield panel(
        "Pictures found by a caption", lead, lambda: _searches(runs, encoded(), picture_search)
    )
    lead = (
        f"Held-out pictures and the {NEAREST} captions nearest to each{beside(runs)}; its own are "
        "marked ✓."
    )
    yield panel(
        "Captions found by a picture", lead, lambda: _searches(runs, encoded(), caption_search)
    )


def beside(runs: Sequence[Run]) -> str:
    """What the sentence on a panel adds where there are several runs."""
    return ", run beside run" if len(runs) > 1 else ""


# One picture, one answer of each run --------------------------------------------------------------


def question_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    given: Sequence[Prediction],
) -> str:
    """A picture, its question and the answers to it; right is what an annotator gave."""
    scores = record.get("answers", {})
    right = sorted(
        (answer for answer, score in scores.items() if score > 0),
        key=lambda answer: -scores[answer],
    )
    question = words(task, record["text"])
    answers = [
        [f"{marked(each['answer'], each['answer'] in right)} {each['score']:.0%}"] for each in given
    ]
    terms = said_by(labels, answers, "answer") + term(
        "truth", [right[0] if right else "(not in the answer list)"]
    )
    return card(picture(image, f"picture asked about: {question}"), terms, question)


def statement_card(
    task: Task,
    record: Record,
    images: np.ndarray,
    labels: Sequence[str],
    given: Sequence[Prediction],
) -> str:
    """Two pictures [2, H, W, 3] side by side, and below them the statement and the judgements."""
    truth = ANSWERS[int(record["label"])] if "label" in record else ""
    statement = words(task, record["text"])
    answers = [
        [
            f"{marked(each['answer'], each['answer'] == truth if truth else None)} "
            f"{each['score']:.0%}"
        ]
        for each in given
    ]
    terms = said_by(labels, answers, "judgement") + term("truth", [truth or "(no label)"])
    sides = zip(("left", "right"), images, strict=True)
    shown = "".join(
        picture(image, f"{side} picture of the statement: {statement}") for side, image in sides
    )
    return card(f'<div class="row">{shown}</div>', terms, statement, above=True)


def caption_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    given: Sequence[Prediction],
) -> str:
    """A picture, the captions written for it, and those of people."""
    human = [words(task, caption) for caption in captioned(record)[:HUMAN]]
    written = [[escape(each["caption"]) or "<i>(no word)</i>"] for each in given]
    terms = said_by(labels, written, "written") + (term("by people", human) if human else "")
    return card(
        picture(image, f"captioned picture: {human[0] if human else 'without captions of people'}"),
        terms,
    )


def class_card(
    task: Task,
    record: Record,
    image: np.ndarray,
    labels: Sequence[str],
    given: Sequence[Prediction],
) -> str:
    """A picture, its likeliest classes as each run has them, and the true one; a class without a
    name goes by its number."""
    assert isinstance(task, ImageNet)
    names, truth = task.config.classes, int(record.get("label", -1))
    true = (
        names[truth] if names and truth >= 0 else f"class {truth}" if truth >= 0 else "(no label)"
    )
    ranked = [
        [
            class_line(place, candidate, truth)
            for place, candidate in enumerate(each["candidates"][:NEAREST])
        ]
        for each in given
    ]
    return card(
        picture(image, f"picture of the class {true}"),
        said_by(labels, ranked, "class") + term("truth", [true]),
    )


def class_line(place: int, candidate: Prediction, truth: int) -> str:
    """A class and its probability, as HTML; the likeliest is at place 0, and a truth below 0 is not
    known."""
    name = str(candidate.get("name", f"class {candidate['label']}"))
    right = first_or_right(place, candidate["label"] == truth) if truth >= 0 else None
    return f"{marked(name, right)} {candidate['score']:.0%}"


@torch.no_grad()
def _cards(runs: Sequence[Run], kind: type[Task], draw: Callable[..., str]) -> str:
    """A card per record, with the predictions of all runs; the task and the pictures are those of
    the first."""
    found, first = (
        spread(records(runs[0], source_of(runs[0]), "val"), SHOWN),
        weights(runs[0], kind),
    )
    images: list[np.ndarray] = []
    given = []
    for run in runs:
        task = first if run is runs[0] else weights(run, kind)
        batch = task.collate([task.example(record, False) for record in found])
        images = images or [*pixels(batch["image"])]
        given.append(task.predict(batch))
    labels = [run.label for run in runs]
    drawn = (
        draw(first, *each[:2], labels, each[2])
        for each in zip(found, images, zip(*given, strict=True), strict=True)
    )
    return f'<div class="cards answers">{"".join(drawn)}</div>'


# Searches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """Pictures [N] with their captions [T]; `owner` [T] is the picture of each. `likeness` [T, N]
    of captions and pictures, by run."""

    images: Sequence[np.ndarray]
    captions: Sequence[str]
    owner: np.ndarray
    likeness: Sequence[np.ndarray]


@torch.no_grad()
def gallery(runs: Sequence[Run]) -> Gallery:
    """Up to `GALLERY` distinct held-out pictures, encoded by every run."""
    evenly = spread(records(runs[0], source_of(runs[0]), "val"), GALLERY)
    found = list(
        {
            str(record.get("image_id", record["image"])): record
            for record in evenly
            if captioned(record)
        }.values()
    )
    if not found:
        raise ValueError("no held-out picture has a caption")
    images: list[np.ndarray] = []
    captions: list[list[str]] = []
    likeness = []
    for run in runs:
        task, encoded = weights(run, Retrieval), []
        for batch in iterate_batches(task, found, 16):
            encoded += task.predict(batch)
            if run is runs[0]:
                images += [*pixels(batch["image"])]
        captions = captions or [
            [words(task, caption) for caption in captioned(record)] for record in found
        ]
        likeness.append(
            np.concatenate([each["texts"] for each in encoded])
            @ np.stack([each["image"] for each in encoded]).T
        )
    owner = np.repeat(np.arange(len(found)), [len(each) for each in captions])
    return Gallery(images, [caption for each in captions for caption in each], owner, likeness)


def picture_search(encoded: Gallery, place: int, labels: Sequence[str]) -> str:
    """The first caption of picture `place`, and the pictures nearest to it in each run, the right
    one framed."""
    query = int(np.flatnonzero(encoded.owner == place)[0])
    results = []
    for likeness in encoded.likeness:
        order = np.argsort(-likeness[query], kind="stable")
        row = "".join(
            f'<figure class="{"hit" if each == place else ""}">'
            + picture(
                encoded.images[each],
                f"{'right' if each == place else 'wrong'} picture at place {at}",
                largest=THUMBNAIL,
            )
            + "</figure>"
            for at, each in enumerate(order[:NEAREST], start=1)
        )
        results.append([f'<div class="row">{row}</div>', *beyond(order == place)])
    return card("", said_by(labels, results, "nearest"), encoded.captions[query], above=True)


def caption_search(encoded: Gallery, place: int, labels: Sequence[str]) -> str:
    """Picture `place`, the captions nearest to it in each run, and one of its own."""
    results = []
    for likeness in encoded.likeness:
        order = np.argsort(-likeness[:, place], kind="stable")
        right = encoded.owner[order] == place
        nearest = enumerate(zip(order[:NEAREST], right, strict=False))
        results.append(
            [marked(encoded.captions[each], first_or_right(at, hit)) for at, (each, hit) in nearest]
            + beyond(right)
        )
    own = encoded.captions[int(np.flatnonzero(encoded.owner == place)[0])]
    shown = picture(encoded.images[place], f"searched picture: {own}")
    return card(shown, said_by(labels, results, "nearest") + term("its own", [own]))


def beyond(right: np.ndarray) -> list[str]:
    """Where the first right result [R] of a search is, as HTML, unless it is among those shown."""
    first = int(np.argmax(right))
    return [f"<small>right one at place {first + 1}</small>"] if first >= NEAREST else []


def _searches(
    runs: Sequence[Run], encoded: Gallery, draw: Callable[[Gallery, int, Sequence[str]], str]
) -> str:
    count = len(encoded.images)
    places = np.unique(np.linspace(0, count - 1, SEARCHES).round().astype(int))
    drawn = (draw(encoded, int(place), [run.label for run in runs]) for place in places)
    counted = f"<p>Among {count} held-out pictures with {len(encoded.captions)} captions.</p>"
    return f'{counted}<div class="cards answers">{"".join(drawn)}</div>'


# Parts of a card ----------------------------------------------------------------------------------


def card(shown: str, terms: str, heading: str = "", *, above: bool = False) -> str:
    """Pictures beside, or above, a heading in plain text and a list of terms."""
    title = f"<b>{escape(heading)}</b>" if heading else ""
    return (
        "<div "
        f'class="card{" tall" if above else ""}">{shown}<div>{title}<dl>{terms}</dl></div></div>'
    )


def said_by(labels: Sequence[str], said: Sequence[Sequence[str]], alone: str) -> str:
    """What each run says, as lines of HTML under its name; the only run goes by `alone`."""
    names = [
        f'<span class="run {run_class(index)}">{escape(label)}</span>'
        for index, label in enumerate(labels)
    ]
    names = names if len(labels) > 1 else [alone]
    lines = ("".join(f"<dd>{line}</dd>" for line in each) for each in said)
    return "".join(f"<dt>{name}</dt>{each}" for name, each in zip(names, lines, strict=True))


def term(name: str, texts: Sequence[str]) -> str:
    """Plain texts under a name."""
    return f"<dt>{name}</dt>{''.join(f'<dd>{escape(text)}</dd>' for text in texts)}"


def marked(text: str, right: bool | None) -> str:
    """A text as HTML, marked right or wrong; None leaves it plain."""
    if right is None:
        return escape(text)
    return (
        f'<mark class="right">✓ {escape(text)}</mark>'
        if right
        else f'<mark class="wrong">✗ {escape(text)}</mark>'
    )


def first_or_right(place: int, right: bool) -> bool | None:
    """How a ranking is marked: the first result either way, later ones only where they are
    right."""
    return bool(right) if right or not place else None


def words(task: Task, text: str | Sequence[int]) -> str:
    """A record's text; of piece ids, which index files hold, the words where the tokenizer is at
    hand."""
    if isinstance(text, str):
        return text
    return task.tokenizer.decode(text) if task.has_tokenizer else f"ids {' '.join(map(str, text))}"


def captioned(record: Record) -> list[str | list[int]]:
    """The captions that people gave, or their ids; empty where none are known."""
    return list(record.get("captions") or ([record["text"]] if "text" in record else []))


def source_of(run: Run) -> str:
    """The source whose held-out records are shown: the first that the run trained on."""
    return next((name for name, count in run.recipe["data"]["batch"].items() if count), "main")
