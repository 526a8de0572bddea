"""The record of a question about an image, as all readers of questions make it."""

from typing import Any

from beit3.data.prepare.formats.split_names import Record

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
