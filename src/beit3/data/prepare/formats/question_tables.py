"""Reads questions from tables, and from the soft labels that LXMERT made for OK-VQA."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import find_files, find_single_file, get_field
from beit3.data.prepare.formats.questions import make_question
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.data.prepare.formats.table_cells import ColumnNames
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, read_table_rows

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
NO_ANSWERS: tuple[Any, ...] = ("", [], {}, None)
"""Cells that hold no answer; 0 is an answer."""


def read_question_tables(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads tables with image, question, answer, and optionally id and split.

    In JSON lines `answers` may be a list, or {answer: score}. A row without an answer is a fault,
    except in a test split.
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
        cell = row.cells.get("answers", "")
        if row.fault or (cell in NO_ANSWERS and row.split != "test"):
            yield row.split, {"id": row.location, "fault": row.fault or "it has no answer"}
            continue
        answers = _parse_answers(cell, row.location)
        chosen_answer = None
        if answers:  # the most common one, or that of the highest score
            chosen_answer = Counter(answers).most_common(1)[0][0]
        id = str(row.cells["id"]) or f"{row.image_name}#{num_questions[row.image_name]}"
        num_questions[row.image_name] += 1
        text = get_field(row.cells, "question", str, row.location)
        yield row.split, make_question(id, row.image_path, text, answers, chosen_answer)


def _parse_answers(cell: Any, location: str) -> list[str] | dict[str, Any]:
    """Parses one answer, a list of answers, or {answer: score}; raises ValueError otherwise."""
    if isinstance(cell, dict):
        if all(isinstance(score, int | float) and 0 <= score <= 1 for score in cell.values()):
            return cell
        raise ValueError(f"{location} has answers {str(cell)[:60]}: scores are numbers from 0 to 1")
    answers = cell if isinstance(cell, list) else [cell]
    if cell == "":
        answers = []
    if not all(isinstance(answer, str | int) for answer in answers):
        raise ValueError(
            f"{location} has answers {str(cell)[:60]}: give an answer, a list of answers, or "
            "{answer: score}"
        )
    return [str(answer) for answer in answers]
