"""Answer lists for visual question answering, and questions as records with soft answers.

The released heads answer from VQAv2's list: normalized answers in the order in which they first
appear, those that are given at least nine times. In VQA's own datasets (`is_vqa`) a record scores
the annotators' answers as they stand, as upstream does; in other datasets it normalizes them.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from beit3.metrics.text import compute_soft_scores, normalize_answer

Question = Mapping[str, Any]

MIN_ANSWER_COUNT = 9
"""VQAv2 answers that are given less often are not in the list: 3129 remain (release)."""

MIN_VQA_QUESTIONS = 10_000
"""Fewer questions are a sample of VQA, from which the list of the release cannot come."""


def choose_min_count(num_questions: int, *, is_vqa: bool) -> int:
    """Returns how often an answer must be given to be in the list, where nobody says it."""
    return MIN_ANSWER_COUNT if is_vqa and num_questions >= MIN_VQA_QUESTIONS else 1


def build_answers(
    questions: Iterable[Question], min_count: int, *, is_vqa: bool = True
) -> tuple[str, ...]:
    """Returns the answers of at least `min_count` questions, in the order of first appearance.

    A question counts by its most common answer, or by all answers where they come with scores.
    Raises ValueError where no answer is given so often.
    """
    counts: Counter[str] = Counter()
    for question in questions:
        if isinstance(question.get("answers"), Mapping):
            counts.update(dict.fromkeys(_normalize(a, is_vqa) for a in question["answers"]).keys())
        elif question.get("multiple_choice_answer") is not None:
            counts[_normalize(question["multiple_choice_answer"], is_vqa)] += 1
    answers = tuple(
        answer for answer, count in counts.items() if count >= min_count and (answer or is_vqa)
    )
    if not answers:
        remedy = "give training questions with answers"
        if min_count > 1:
            remedy = "give a smaller --at_least"
        raise ValueError(
            f"no answer is given {min_count} times in these questions, so none can be learned: "
            f"{remedy}"
        )
    return answers


def make_vqa_record(
    question: Question, answer_list: Collection[str] | None, *, is_vqa: bool = True
) -> dict[str, Any]:
    """Returns a question as a record whose `answers` map listed answers to soft scores.

    Several annotators' answers are kept as `annotators` besides, for the official score. Answers
    that come with scores keep them. Without an `answer_list` (None) all answers are kept. A
    question with a fault is returned as it is.
    """
    if "answers" not in question:  # a fault, or left out
        return dict(question)
    answers = question["answers"]
    if answer_list is None:
        answer_list = {_normalize(answer, is_vqa) for answer in answers}
    has_annotators = len(answers) > 1 and not isinstance(answers, Mapping)
    if isinstance(answers, Mapping):
        scores = _merge_spellings(answers, is_vqa)
    elif has_annotators:
        normalized = answers if is_vqa else [_normalize(answer, is_vqa) for answer in answers]
        scores = compute_soft_scores(normalized)
    else:
        scores = {_normalize(answer, is_vqa): 1.0 for answer in answers}
    record: dict[str, Any] = {
        "id": str(question["id"]),
        "image": question["image"],
        "text": question["text"],
        "answers": {answer: score for answer, score in scores.items() if answer in answer_list},
    }
    if has_annotators:
        record["annotators"] = list(answers)
    return record


def _merge_spellings(answers: Mapping[str, Any], is_vqa: bool) -> dict[str, float]:
    """Returns normalized answer -> score; spellings of one answer add up, to 1 at most."""
    scores: dict[str, float] = {}
    for answer, score in answers.items():
        key = _normalize(answer, is_vqa)
        scores[key] = min(1.0, scores.get(key, 0.0) + float(score))
    return scores


def _normalize(answer: str, is_vqa: bool) -> str:
    """Normalizes an answer for the list. VQA's articles become "", others' stay letters.

    Of other datasets, a letter and its accent in one character or in two are the same.
    """
    if is_vqa:
        return normalize_answer(answer)
    answer = unicodedata.normalize("NFC", answer)
    return normalize_answer(answer) or " ".join(answer.lower().split())
