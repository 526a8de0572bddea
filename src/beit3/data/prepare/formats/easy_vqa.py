"""Reads easy-VQA: `{train,test}/questions.json`, lists of [question, answer, image]."""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import find_folder, glob_files, make_unknown_error
from beit3.data.prepare.formats.questions import make_question
from beit3.data.prepare.formats.split_names import SplitRecord
from beit3.files import read_json, read_json_list

SPLIT_DIRECTORIES = {"train": "train", "test": "val"}
"""Directory -> split: its test is our val."""


def read_easy_vqa(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads the questions by split; each has one answer."""
    raw = find_folder(raw)
    if not is_easy_vqa(raw):
        raise make_unknown_error(raw, "{train,test}/questions.json (easy_vqa)")
    for directory, split in SPLIT_DIRECTORIES.items():
        file = raw / directory / "questions.json"
        if not file.is_file():
            continue
        for number, (location, row) in enumerate(read_json_list(file)):
            if (
                not isinstance(row, list)
                or len(row) != 3
                or not all(isinstance(value, str) for value in row[:2])
            ):
                raise ValueError(
                    f"{location} is not [question, answer, image], the first two texts: "
                    f"{str(row)[:60]}"
                )
            text, answer, image = row
            image_path = str(raw / directory / "images" / f"{image}.png")
            yield split, make_question(f"{directory}-{number}", image_path, text, [answer], answer)


def is_easy_vqa(raw: Path) -> bool:
    """Returns whether a folder directly in `raw` holds questions as lists."""
    return any(isinstance(read_json(file), list) for file in glob_files(raw, "*/questions.json"))
