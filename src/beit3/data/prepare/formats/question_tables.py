"""Reads questions from tables, and from the soft labels that LXMERT made for OK-VQA."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import find_files, find_single_file, get_field
from beit3.data.prepare.formats.questions import choose_answer, make_question
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.table_cells import ColumnNames
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, read_table_rows
from beit3.data.stores.literals import list_items, parse_literal

QUESTION_COLUMNS: ColumnNames = {
    "image": IMAGE_COLUMNS,
    "question": ("question", "text", "query", "sent"),
}
# The last names are those of the soft labels.
ANSWER_COLUMNS: ColumnNames = {
    "answers": ("answer", "answers", "label"),
    "id": ("id", "question_id"),
    "split": ("split", "okvqa_split"),
}
NULL_ANSWERS = frozenset({"", "nan", "NaN", "<NA>", "null", "NULL"})
"""Texts that stand for no answer; "none" and 0 are answers."""


def read_question_tables(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads tables with image, question, answer, and optionally id and split.

    `answers` may be a list, or {answer: score}, as JSON or Python write them. A row without an
    answer is a fault, except in a test split. Empty answers in a list are left out.
    """
    return _read_tables(raw)


def read_soft_labels(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads `*soft_labels.json`: objects with image, question, label {answer: score}, question_id
    and okvqa_split."""
    return _read_tables(
        raw, [find_single_file(raw, "*soft_labels.json", "questions with scored answers")]
    )


def is_soft_labels(raw: Path) -> bool:
    """Returns whether `raw` is or holds a list of questions with scored answers."""
    if raw.is_file():
        return raw.name.endswith("soft_labels.json")
    return bool(find_files(raw, "*soft_labels.json"))


def _read_tables(raw: str | Path, files: Sequence[Path] = ()) -> Iterator[SplitRecord]:
    num_questions: Counter[str] = Counter()
    """Image -> number of its questions so far."""
    for row in read_table_rows(raw, QUESTION_COLUMNS, ANSWER_COLUMNS, files=files):
        answers: list[str] | dict[str, Any] = []
        if not row.fault:
            answers = _parse_answers(row.cells["answers"], row.location)
        if row.fault or not (answers or row.split == "test"):
            yield row.split, {"id": row.location, "fault": row.fault or "it has no answer"}
            continue
        chosen_answer = choose_answer(answers) if answers else None
        id = str(row.cells["id"]) or f"{row.image_name}#{num_questions[row.image_name]}"
        num_questions[row.image_name] += 1
        text = get_field(row.cells, "question", str, row.location)
        question = make_question(id, row.image_path, text, answers, chosen_answer)
        num_null = _count_null_answers(row.cells["answers"], answers)
        yield row.split, question | {"null_answers": num_null} if num_null else question


def _parse_answers(cell: Any, location: str) -> list[str] | dict[str, Any]:
    """Parses one answer, a list of answers, or {answer: score}; raises ValueError otherwise."""
    try:
        value = parse_literal(cell) if isinstance(cell, str) else cell
        if not isinstance(value, dict):
            value = list_items(value)
    except ValueError as error:
        raise ValueError(f"{location} has answers that {error}") from None
    if isinstance(value, dict):
        if all(isinstance(score, int | float) and 0 <= score <= 1 for score in value.values()):
            return {str(answer): score for answer, score in value.items()}
        raise ValueError(f"{location} has answers {str(cell)[:60]}: scores are numbers from 0 to 1")
    answers: list[Any] = [item.get("answer") if isinstance(item, dict) else item for item in value]
    if not all(isinstance(answer, str | int | float) for answer in answers):
        raise ValueError(
            f"{location} has answers {str(cell)[:60]}: give an answer, a list of answers, or "
            "{answer: score}"
        )
    texts = [_format_answer(answer) for answer in answers]
    return [text for text in texts if text not in NULL_ANSWERS]


def _count_null_answers(cell: Any, answers: list[str] | dict[str, Any]) -> int:
    """Returns how many answers of a list in a cell were left out, because they are empty."""
    value = parse_literal(cell) if isinstance(cell, str) else cell
    return len(value) - len(answers) if isinstance(value, list) else 0


def _format_answer(answer: str | int | float) -> str:
    """Returns an answer as a text: 3.0, as pandas writes a number, is "3"."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).strip()
