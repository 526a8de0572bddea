"""Cards of a report, as HTML: an image, and beside it or below it what each run predicts."""

from collections.abc import Sequence
from html import escape

from beit3.report.document import render_run_label
from beit3.task import Record, Task


def render_card(images: str, terms: str, heading: str = "", *, images_on_top: bool = False) -> str:
    """Returns a card.

    Args:
        images: HTML of the images.
        terms: HTML of the terms below the heading, from `render_term` and `render_run_terms`.
        heading: Plain text.
        images_on_top: Place the images above the text; by default they stand to its left.
    """
    css_class = "card tall" if images_on_top else "card"
    title = f"<b>{escape(heading)}</b>" if heading else ""
    return f'<div class="{css_class}">{images}<div>{title}<dl>{terms}</dl></div></div>'


def render_term(name: str, texts: Sequence[str]) -> str:
    """Returns a name and the plain texts under it."""
    lines = "".join(f"<dd>{escape(text)}</dd>" for text in texts)
    return f"<dt>{name}</dt>{lines}"


def render_run_terms(
    labels: Sequence[str], lines: Sequence[Sequence[str]], single_label: str
) -> str:
    """Returns the name of each run and its lines of HTML.

    Args:
        labels: Labels of the runs.
        lines: For each run its lines, as HTML.
        single_label: Stands in place of the label where there is only one run.
    """
    terms: list[str] = []
    for name, run_lines in zip(render_run_labels(labels, single_label), lines, strict=True):
        terms.append(f"<dt>{name}</dt>")
        terms += [f"<dd>{line}</dd>" for line in run_lines]
    return "".join(terms)


def render_run_labels(labels: Sequence[str], single_label: str) -> list[str]:
    """Returns each run's label in its color, as HTML; of a single run `single_label`."""
    if len(labels) == 1:
        return [single_label]
    return [render_run_label(label, index) for index, label in enumerate(labels)]


def render_mark(text: str, is_right: bool | None) -> str:
    """Returns a text as HTML, marked as right or wrong; None leaves it without a mark."""
    if is_right is None:
        return escape(text)
    if is_right:
        return f'<mark class="right">✓ {escape(text)}</mark>'
    return f'<mark class="wrong">✗ {escape(text)}</mark>'


def select_mark(rank: int, is_right: bool) -> bool | None:
    """Returns how `render_mark` marks a result of a ranking; rank 0 is the first.

    The first result is marked as right or wrong, later ones only if they are right.
    """
    if is_right:
        return True
    return False if rank == 0 else None


def render_number_line(*numbers: tuple[str, str]) -> str:
    """Returns a line of large numbers, each given as (number, description)."""
    spans = (f"<span><b>{number}</b> {escape(text)}</span>" for number, text in numbers)
    return f'<p class="figures">{" ".join(spans)}</p>'


def decode_text(task: Task, text: str | Sequence[int]) -> str:
    """Returns the text of a record as a string.

    Records of token stores hold token ids: they are decoded if the task has its tokenizer, and
    listed otherwise.
    """
    if isinstance(text, str):
        return text
    if task.has_tokenizer:
        return task.tokenizer.decode(text)
    return f"ids {' '.join(map(str, text))}"


def get_captions(record: Record) -> list[str | list[int]]:
    """Returns the captions of a record, as text or token ids; empty if it has none."""
    captions = record.get("captions")
    if captions:
        return list(captions)
    return [record["text"]] if "text" in record else []
