"""Questions about images in the files of their owners: VQA v1 and v2, OK-VQA, easy-VQA, DAQUAR,
Visual Genome; and tables.

All give (split, {id, image, text, answers, multiple_choice_answer}), answers [str per annotator],
or {answer: score} where
the file scores them.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import (
    SPLITS,
    Listing,
    Pair,
    Record,
    field,
    folder,
    found,
    holdout,
    nothing_known,
    only,
    split_name,
    subset,
)
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, Columns, table_rows
from beit3.files import read_json, read_json_list, read_lines

QUESTION_COLUMNS: Columns = {
    "image": IMAGE_COLUMNS,
    "question": ("question", "text", "query", "sent"),
}
# The second names are those of files with joined soft labels, as LXMERT made them for OK-VQA.
ANSWER_COLUMNS: Columns = {
    "answers": ("answer", "answers", "label"),
    "id": ("id", "question_id"),
    "split": ("split", "okvqa_split"),
}

CHOSEN = "multiple_choice_answer"

DAQUAR_IMAGE = re.compile(r"image ?(\d+)")
DAQUAR_ENDING = re.compile(r"\s+in (the )?image ?\d+\s*\??$")


def vqav2(raw: str | Path) -> Iterator[Pair]:
    """VQA v1/v2 and OK-VQA questions and annotations by split: {id: question_id, image, text,
    answers, multiple_choice_answer}.

    Official file names or plain questions.json / annotations.json. Questions without an annotations
    file (the test
    splits) have no answers and None. Of OK-VQA's `answer` and `raw_answer` the first counts, as in
    its scores.
    """
    raw = folder(raw)
    if not is_vqav2(raw):
        raise nothing_known(raw, "*_questions.json (vqav2)")
    _one_set(raw)
    splits: dict[str, Path] = {}
    for file in _question_files(raw):
        content = _whole(file)
        subtype = str(content.get("data_subtype") or subset(file))
        split = split_name(subtype, str(file))
        if splits.setdefault(split, file) != file:
            raise ValueError(f"{splits[split]} and {file} are both {split}: keep one of them")
        answers = _annotations(raw, file)
        others = [name for name in ("train2014", "val2014", "test2015") if name != subtype]
        listing = Listing(raw, subtype, "images", f"images/{subtype}", "", *others)
        prefixes = [subtype.replace("test-dev", "test"), *others]
        for number, question in enumerate(content["questions"]):
            where = f"{file} questions[{number}]"
            id = field(question, "question_id", int, where)
            image = field(question, "image_id", int, where)
            names = [
                f"COCO_{prefix}_{image:012d}{end}"
                for prefix in prefixes
                for end in (".jpg", ".png")
            ]
            path = listing.find(*names, f"{image:012d}.jpg", f"{image:012d}.png")
            if answers is not None and id not in answers:
                raise ValueError(
                    f"{where} has question_id {id}, which its annotations file does not answer"
                )
            given, chosen = answers[id] if answers is not None else ([], None)
            text = field(question, "question", str, where)
            record = {
                "id": id,
                "image": path,
                "text": text,
                "answers": given,
                "multiple_choice_answer": chosen,
            }
            yield split, record


def easy_vqa(raw: str | Path) -> Iterator[Pair]:
    """easy-VQA: {train,test}/questions.json of [question, answer, image]; its test is our val."""
    raw = folder(raw)
    if not is_easy_vqa(raw):
        raise nothing_known(raw, "{train,test}/questions.json (easy_vqa)")
    for place, name in (("train", "train"), ("test", "val")):
        file = raw / place / "questions.json"
        for number, (where, row) in enumerate(read_json_list(file) if file.is_file() else ()):
            if not (
                isinstance(row, list)
                and len(row) == 3
                and isinstance(row[0], str)
                and isinstance(row[1], str)
            ):
                raise ValueError(
                    f"{where} is not [question, answer, image], the first two texts: "
                    f"{str(row)[:60]}"
                )
            text, answer, image = row
            yield (
                name,
                _answered(
                    f"{place}-{number}", str(raw / place / "images" / f"{image}.png"), text, answer
                ),
            )


def daquar(raw: str | Path, *, held_out: float = 0.1) -> Iterator[Pair]:
    """DAQUAR: `qa.*.txt` (question line, answer line) or `data_*.csv`; one person's answer, perhaps
    "book, cup".

    The image's name leaves the question. Where there is no test or val file, the questions on a
    share `held_out` of the
    training images are val.
    """
    raw = folder(raw)
    files = _daquar_files(raw)
    if not files:
        raise nothing_known(raw, "qa.*.txt or data_*.csv (daquar)")
    listing = Listing(raw, "images", "")
    for name, file in files.items():
        rows = _daquar_csv(file) if file.suffix == ".csv" else _daquar_txt(file)
        for number, (question, answer, image) in enumerate(rows):
            text = DAQUAR_IMAGE.sub("image", DAQUAR_ENDING.sub("", question)).rstrip("? ") + "?"
            path = listing.find(f"{image}.jpg", f"{image}.png")
            # The original writes table_lamp where people and the table's makers write two words.
            answer = ", ".join(
                " ".join(part.replace("_", " ").split())
                for part in answer.split(",")
                if part.strip()
            )
            side = (
                "val" if len(files) == 1 and name == "train" and holdout(image, held_out) else name
            )
            yield side, _answered(f"{name}-{number}", path, text, answer)


def soft_labels(raw: str | Path) -> Iterator[Pair]:
    """`*soft_labels.json`, a list of objects with image, question, label {answer: score},
    question_id and okvqa_split."""
    return _asked(raw, [only(raw, "*soft_labels.json", "questions with scored answers")])


def question_tables(raw: str | Path) -> Iterator[Pair]:
    """Tables with image, question, answer, perhaps id and split; in JSON lines `answers` may be a
    list or {answer: score}.

    A row without an answer is a fault, unless it is of a test split.
    """
    return _asked(raw)


def visual_genome(raw: str | Path) -> Iterator[Pair]:
    """Visual Genome's question_answers.json as training questions, images in VG_100K and VG_100K_2;
    nothing where it is absent.

    Images that VQA's val or test in the same folder asks about are left out; image_data.json, which
    knows which are COCO's, must
    then be there.
    """
    raw = folder(raw)
    if not found(raw, "question_answers.json"):
        return
    file = only(raw, "question_answers.json", "Visual Genome's questions")
    listing, held_out = (
        Listing(raw, "VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2"),
        _genome_of_val(raw),
    )
    for where, entry in read_json_list(file):
        image = field(entry, "id", int, where)
        if image in held_out:
            continue
        path = listing.find(f"{image}.jpg", f"{image}.png")
        for row in field(entry, "qas", list, where):
            id, text, answer = (
                field(row, "qa_id", int, where),
                field(row, "question", str, where),
                field(row, "answer", str, where),
            )
            yield "train", _answered(f"vg-{id}", path, text, answer)


def is_vqav2(raw: Path) -> bool:
    """Whether `raw` holds files of open-ended questions."""
    return bool(_question_files(raw))


def is_vqa(raw: Path) -> bool:
    """Whether the questions in `raw` are VQA's own, v1 or v2: files of its names that are not said
    to be of another set."""
    files = _question_files(raw)
    for file in files:
        info = _whole(file).get("info")
        said = str(info.get("description") or "") if isinstance(info, dict) else ""
        if "OpenEnded_" not in file.name or (said and "the VQA dataset" not in said):
            return False
        # OK-VQA has the names of v1, and chooses no answer.
        beside = None if file.name.startswith("v2_") else _annotations_file(raw, file)
        if beside and not all(
            CHOSEN in row for row in field(read_json(beside), "annotations", list, beside)[:1]
        ):
            return False
    return bool(files)


def is_easy_vqa(raw: Path) -> bool:
    """Whether a folder right below `raw` holds questions as lists."""
    return any(isinstance(read_json(file), list) for file in raw.glob("*/questions.json"))


def is_daquar(raw: Path) -> bool:
    """Whether `raw` holds DAQUAR's text files or the tables made from them."""
    return bool(_daquar_files(raw))


def is_soft_labels(raw: Path) -> bool:
    """Whether `raw` is or holds a list of questions with scored answers."""
    return (
        raw.name.endswith("soft_labels.json")
        if raw.is_file()
        else bool(found(raw, "*soft_labels.json"))
    )


def _question_files(raw: Path) -> list[Path]:
    """Open-ended question files; VQA v1 asks the same ones again as MultipleChoice_*."""
    return [file for file in found(raw, "*questions.json") if "MultipleChoice" not in file.name]


def _one_set(raw: Path) -> None:
    """ValueError where questions of VQAv2 stand beside those of v1 or OK-VQA."""
    names: dict[bool, str] = {
        file.name.startswith("v2_"): file.name
        for file in _question_files(raw)
        if "OpenEnded_" in file.name
    }
    if len(names) > 1:
        raise ValueError(
            f"{raw} holds {names[True]} of VQAv2 and {names[False]} of VQA v1 or OK-VQA: keep "
            "each set in its own folder"
        )


def _annotations(raw: Path, questions: Path) -> dict[int, tuple[list[str], str]] | None:
    """question_id -> (the annotators' answers as given, the chosen one) of the file that belongs to
    `questions`."""
    file = _annotations_file(raw, questions)
    if not file:
        return None
    answers = {}
    for number, row in enumerate(field(read_json(file), "annotations", list, file)):
        where = f"{file} annotations[{number}]"
        given = [field(entry, "answer", str, where) for entry in field(row, "answers", list, where)]
        if not given:
            raise ValueError(
                f"{where} has no entry in answers: leave out the file's questions that nobody "
                "answered"
            )
        # OK-VQA chooses none.
        chosen = (
            field(row, CHOSEN, str, where) if CHOSEN in row else Counter(given).most_common(1)[0][0]
        )
        answers[field(row, "question_id", int, where)] = given, chosen
    return answers


def _annotations_file(raw: Path, questions: Path) -> Path | None:
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    beside = questions.with_name(name)
    files = (
        [beside]
        if beside.is_file()
        else [file for file in found(raw, name) if name != "annotations.json"]
    )
    return files[0] if files else None


def _whole(file: Path) -> Record:
    """A file of questions."""
    content = read_json(file)
    field(content, "questions", list, file)
    return content


def _daquar_files(raw: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    tables = (
        file for file in sorted(raw.glob("data_*.csv")) if "image_id" in next(read_lines(file), "")
    )
    for file in [*sorted(raw.glob("qa.*.txt")), *tables]:
        name = SPLITS.get(re.split(r"[._]", file.stem)[-1], "")
        if file.suffix == ".txt" and name in files:
            raise ValueError(
                f"{files[name].name} and {file.name} in {raw} are both {name}: keep one of them"
            )
        # The original text files win over the tables made from them.
        if name:
            files.setdefault(name, file)
    return files


def _daquar_txt(file: Path) -> Iterator[tuple[str, str, str]]:
    rows = [line.strip() for line in read_lines(file) if line.strip()]
    for number in range(0, len(rows), 2):
        names = DAQUAR_IMAGE.findall(rows[number])
        if not names or number + 1 == len(rows):
            wrong = "names no imageN" if not names else "has no answer below it"
            raise ValueError(f"{file} line {number + 1} {wrong}: {rows[number][:60]!r}")
        yield rows[number], rows[number + 1], f"image{names[-1]}"


def _daquar_csv(file: Path) -> Iterator[tuple[str, str, str]]:
    rows = enumerate(csv.DictReader(read_lines(file)), 2)
    try:
        for number, row in rows:
            question, answer, image = (row.get(name) for name in ("question", "answer", "image_id"))
            if not (question and answer and image):
                raise ValueError(f"{file} line {number} lacks question, answer or image_id")
            yield question, answer, image
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read ({error}): check its quotes") from None


def _asked(raw: str | Path, files: Sequence[Path] = ()) -> Iterator[Pair]:
    seen: Counter[str] = Counter()
    for row in table_rows(raw, QUESTION_COLUMNS, ANSWER_COLUMNS, files=files):
        given = row.cells.get("answers", "")
        if row.fault or (given in NOT_GIVEN and row.split != "test"):
            yield row.split, {"id": row.where, "fault": row.fault or "it has no answer"}
            continue
        answers = _answers(given, row.where)
        chosen = next(iter(Counter(answers).most_common(1)), (None,))[
            0
        ]  # the commonest, or that of the highest score
        id = str(row.cells["id"]) or f"{row.image}#{seen[row.image]}"
        seen[row.image] += 1
        text = field(row.cells, "question", str, row.where)
        yield (
            row.split,
            {
                "id": id,
                "image": row.path,
                "text": text,
                "answers": answers,
                "multiple_choice_answer": chosen,
            },
        )


NOT_GIVEN: tuple[Any, ...] = ("", [], {}, None)
"""Answers that are none; 0 is one."""


def _answers(given: Any, where: str) -> list[str] | dict[str, Any]:
    """An answer, a list of them, or {answer: score}; ValueError for anything else."""
    if isinstance(given, dict):
        if all(isinstance(score, int | float) and 0 <= score <= 1 for score in given.values()):
            return given
        raise ValueError(f"{where} has answers {str(given)[:60]}: scores are numbers from 0 to 1")
    answers = given if isinstance(given, list) else [given] if given != "" else []
    if not all(isinstance(answer, str | int) for answer in answers):
        raise ValueError(
            f"{where} has answers {str(given)[:60]}: give an answer, a list of answers, or "
            f"{{answer: score}}"
        )
    return [str(answer) for answer in answers]


def _genome_of_val(raw: Path) -> set[int]:
    """Visual Genome's numbers of the COCO images that the val or test questions in `raw` are
    about."""
    questions = [
        file for file in _question_files(raw) if SPLITS.get(subset(file).lower()) != "train"
    ]
    coco = {
        field(row, "image_id", int, file) for file in questions for row in _whole(file)["questions"]
    }
    if not coco:
        return set()
    file = next(iter(found(raw, "image_data.json")), None)
    if file is None:
        raise ValueError(
            f"Visual Genome's question_answers.json in {raw} needs its image_data.json beside it, "
            "which tells the images of "
            f"{questions[0].name} from those to train on: download it, or move "
            "question_answers.json away"
        )
    rows = (
        (field(row, "image_id", int, where), row.get("coco_id"))
        for where, row in read_json_list(file)
    )
    return {image for image, number in rows if isinstance(number, int) and number in coco}


def _answered(id: str, image: str, text: str, answer: str) -> Record:
    """A question that one person answered."""
    return {
        "id": id,
        "image": image,
        "text": text,
        "answers": [answer],
        "multiple_choice_answer": answer,
    }
