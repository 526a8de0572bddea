"""Reads DAQUAR: its own text files, or the tables that others made of them."""

import re
from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.delimited import open_table
from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_folder,
    glob_files,
    make_unknown_error,
)
from beit3.data.prepare.formats.questions import make_question
from beit3.data.prepare.formats.split_names import (
    SPLITS,
    SplitRecord,
    is_held_out,
    make_split_error,
)
from beit3.files import read_lines

IMAGE_NAME = re.compile(r"image ?(\d+)")
QUESTION_ENDING = re.compile(r"\s+in (the )?image ?\d+\s*\??$")


def read_daquar(raw: str | Path, *, held_out: float = 0.1) -> Iterator[SplitRecord]:
    """Reads `qa.*.txt` (a line of question, a line of answer) or `data_*.csv`, by split.

    Each question has the answer of one person, which may be several things: "book, cup". The
    name of the image is removed from the question. Where there is only a train file, the
    questions on a fraction `held_out` of its images are val.
    """
    raw = find_folder(raw)
    files = _find_files(raw)
    if not files:
        raise make_unknown_error(raw, "qa.*.txt or data_*.csv (daquar)")
    image_finder = ImageFinder(raw, "images", "")
    for name, file in files.items():
        rows = _read_csv(file) if file.suffix == ".csv" else _read_text(file)
        holds_out = len(files) == 1 and name == "train"
        for number, (question, answer, image) in enumerate(rows):
            image_path = image_finder.find(f"{image}.jpg", f"{image}.png")
            text, answer = _clean_question(question), _normalize_answer(answer)
            split = "val" if holds_out and is_held_out(image, held_out) else name
            yield split, make_question(f"{name}-{number}", image_path, text, [answer], answer)


def is_daquar(raw: Path) -> bool:
    """Returns whether `raw` holds DAQUAR's text files or the tables made of them."""
    return bool(_find_files(raw))


def _find_files(raw: Path) -> dict[str, Path]:
    """Returns split -> file."""
    files: dict[str, Path] = {}
    tables = [file for file in glob_files(raw, "data_*.csv") if _is_daquar_table(file)]
    for file in [*glob_files(raw, "qa.*.txt"), *tables]:
        split = SPLITS.get(re.split(r"[._]", file.stem)[-1], "")
        if file.suffix == ".txt" and split in files:
            raise make_split_error(files[split], file, raw, split)
        # The original text files come before the tables made of them.
        if split:
            files.setdefault(split, file)
    return files


def _is_daquar_table(file: Path) -> bool:
    return "image_id" in next(read_lines(file), "")


def _read_text(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (question, answer, image name) of a text file."""
    lines = [line.strip() for line in read_lines(file) if line.strip()]
    for number in range(0, len(lines), 2):
        question = lines[number]
        image_numbers = IMAGE_NAME.findall(question)
        if not image_numbers or number + 1 == len(lines):
            fault = "names no imageN" if not image_numbers else "has no answer below it"
            raise ValueError(f"{file} line {number + 1} {fault}: {question[:60]!r}")
        yield question, lines[number + 1], f"image{image_numbers[-1]}"


def _read_csv(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (question, answer, image name) of a table."""
    table = open_table(file)
    for line_number, cells in table.rows:
        row = dict(zip(table.columns, cells, strict=False))
        question, answer, image = (row.get(name) for name in ("question", "answer", "image_id"))
        if not (question and answer and image) or len(cells) != len(table.columns):
            raise ValueError(
                f"{file} line {line_number} lacks question, answer or image_id: put quotes around "
                f"cells with {table.delimiter!r}"
            )
        yield question, answer, image


def _clean_question(question: str) -> str:
    """Removes the name of the image."""
    return IMAGE_NAME.sub("image", QUESTION_ENDING.sub("", question)).rstrip("? ") + "?"


def _normalize_answer(answer: str) -> str:
    """Replaces underscores and extra spaces.

    The original writes table_lamp where people, and the makers of the tables, write two words.
    """
    parts = [part for part in answer.split(",") if part.strip()]
    return ", ".join(" ".join(part.replace("_", " ").split()) for part in parts)
