"""The record of a question about an image, as all readers of questions make it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from beit3.data.prepare.formats.split_names import Record
from beit3.metrics.text import normalize_answer

CHOSEN_ANSWER = "multiple_choice_answer"


def make_question(
    id: int | str,
    image_path: str,
    text: str,
    answers: list[str] | dict[str, Any],
    chosen_answer: str | None,
) -> Record:
    """Makes a record of a question.

    Args:
        id: Id of the question.
        image_path: Absolute path of the image.
        text: The question.
        answers: One answer per annotator, or answer -> score; empty in a test split.
        chosen_answer: The most common answer, or that of the highest score; None without answers.
    """
    return {
        "id": id,
        "image": image_path,
        "text": text,
        "answers": answers,
        CHOSEN_ANSWER: chosen_answer,
    }


def choose_answer(answers: Sequence[str] | Mapping[str, float]) -> str:
    """Returns the most common of the annotators' answers, or that of the highest score.

    "Red" and "red " are one answer here, of which the first spelling is returned.
    """
    scores: Counter[str] = Counter()
    spellings: dict[str, str] = {}
    pairs = answers.items() if isinstance(answers, Mapping) else ((answer, 1) for answer in answers)
    for answer, score in pairs:
        key = normalize_answer(answer) or answer.strip().lower()
        scores[key] += score  # type: ignore[assignment]
        spellings.setdefault(key, answer)
    return spellings[scores.most_common(1)[0][0]]
