"""Reads VQA v1 and v2 and OK-VQA, which have one format: files of questions and of annotations."""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_files,
    find_folder,
    get_field,
    make_unknown_error,
)
from beit3.data.prepare.formats.questions import CHOSEN_ANSWER, choose_answer, make_question
from beit3.data.prepare.formats.split_names import (
    Record,
    SplitRecord,
    infer_subset,
    make_split_error,
    parse_split,
)
from beit3.files import read_json

IMAGE_SUBSETS = ("train2014", "val2014", "test2015")
"""COCO's subsets, in whose directories the images are."""


def read_vqav2(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads questions by split: {id: question_id, image, text, answers, multiple_choice_answer}.

    The files have their official names, or are questions.json and annotations.json. Questions
    without a file of annotations (the test splits) have the answers [] and None. Of OK-VQA's
    `answer` and `raw_answer` the first counts, as in its scores.
    """
    raw = find_folder(raw)
    if not is_vqav2(raw):
        raise make_unknown_error(raw, "*_questions.json (vqav2)")
    _check_one_dataset(raw)
    files: dict[str, Path] = {}
    for file in find_question_files(raw):
        content = read_questions(file)
        subtype = str(content.get("data_subtype") or infer_subset(file))
        split = parse_split(subtype, str(file))
        if files.setdefault(split, file) != file:
            raise make_split_error(files[split], file, raw, split)
        for record in _read_records(raw, file, content["questions"], subtype):
            yield split, record


def is_vqav2(raw: Path) -> bool:
    """Returns whether `raw` holds files of open-ended questions."""
    return bool(find_question_files(raw))


def is_vqa(raw: Path) -> bool:
    """Returns whether the questions in `raw` are VQA's own, v1 or v2.

    Their files have its names and do not say that they are of another dataset.
    """
    files = find_question_files(raw)
    return bool(files) and all(_is_vqa_file(raw, file) for file in files)


def find_question_files(raw: Path) -> list[Path]:
    """Returns the files of open-ended questions; VQA v1 asks the same again as MultipleChoice_*."""
    return [
        file for file in find_files(raw, "*questions.json") if "MultipleChoice" not in file.name
    ]


def read_questions(file: Path) -> Record:
    """Reads a file of questions and checks that it has a list of them."""
    content = read_json(file)
    get_field(content, "questions", list, file)
    return content


def _read_records(raw: Path, file: Path, questions: list[Record], subtype: str) -> Iterator[Record]:
    """Yields the records of one file; `subtype` is the COCO subset that its images are of."""
    annotations = _read_annotations(raw, file)
    other_subsets = [name for name in IMAGE_SUBSETS if name != subtype]
    image_finder = ImageFinder(raw, subtype, "images", f"images/{subtype}", "", *other_subsets)
    prefixes = [subtype.replace("test-dev", "test"), *other_subsets]
    for number, question in enumerate(questions):
        location = f"{file} questions[{number}]"
        id = get_field(question, "question_id", int, location)
        image_id = get_field(question, "image_id", int, location)
        image_path = image_finder.find(*list_image_names(image_id, prefixes))
        answers: list[str] = []
        chosen_answer = None
        if annotations is not None:
            if id not in annotations:
                raise ValueError(
                    f"{location} has question_id {id}, which its annotations file does not answer"
                )
            answers, chosen_answer = annotations[id]
        text = get_field(question, "question", str, location)
        yield make_question(id, image_path, text, answers, chosen_answer)


def list_image_names(image_id: int, prefixes: list[str]) -> list[str]:
    """Returns the names that COCO's image may have: with a subset, as in 2014, or without."""
    stems = [f"COCO_{prefix}_{image_id:012d}" for prefix in prefixes] + [f"{image_id:012d}"]
    return [f"{stem}{suffix}" for stem in stems for suffix in (".jpg", ".png")]


def _read_annotations(raw: Path, question_file: Path) -> dict[int, tuple[list[str], str]] | None:
    """Returns question_id -> (all annotators' answers, the chosen one); None without a file."""
    file = _find_annotations_file(raw, question_file)
    if not file:
        return None
    annotations = {}
    for number, row in enumerate(get_field(read_json(file), "annotations", list, file)):
        location = f"{file} annotations[{number}]"
        answers = [
            get_field(vote, "answer", str, location)
            for vote in get_field(row, "answers", list, location)
        ]
        if not answers:
            raise ValueError(
                f"{location} has no entry in answers: leave out the file's questions that nobody "
                "answered"
            )
        if CHOSEN_ANSWER in row:
            chosen_answer = get_field(row, CHOSEN_ANSWER, str, location)
        else:  # OK-VQA chooses none
            chosen_answer = choose_answer(answers)
        annotations[get_field(row, "question_id", int, location)] = answers, chosen_answer
    return annotations


def _find_annotations_file(raw: Path, question_file: Path) -> Path | None:
    """Returns the annotations beside the questions, or a file of the official name elsewhere."""
    name = question_file.name.replace("OpenEnded_", "").replace("questions", "annotations")
    sibling = question_file.with_name(name)
    if sibling.is_file():
        return sibling
    if name == "annotations.json":
        return None
    return next(iter(find_files(raw, name)), None)


def _is_vqa_file(raw: Path, file: Path) -> bool:
    info = read_questions(file).get("info")
    description = str(info.get("description") or "") if isinstance(info, dict) else ""
    if "OpenEnded_" not in file.name or (description and "the VQA dataset" not in description):
        return False
    if file.name.startswith("v2_"):
        return True
    # OK-VQA has the file names of v1, but chooses no answer.
    annotations_file = _find_annotations_file(raw, file)
    if not annotations_file:
        return True
    rows = get_field(read_json(annotations_file), "annotations", list, annotations_file)
    return not rows or CHOSEN_ANSWER in rows[0]


def _check_one_dataset(raw: Path) -> None:
    """Raises ValueError where questions of VQAv2 lie beside those of v1 or OK-VQA."""
    names: dict[bool, str] = {}
    for file in find_question_files(raw):
        if "OpenEnded_" in file.name:
            names[file.name.startswith("v2_")] = file.name
    if len(names) > 1:
        raise ValueError(
            f"{raw} holds {names[True]} of VQAv2 and {names[False]} of VQA v1 or OK-VQA: keep "
            "each dataset in its own folder"
        )
