"""Reads the JSON lists that LAVIS, BLIP and ALBEF train on: captions, questions, statements.

The files are called after their splits: coco_karpathy_train.json, vqa_val.json, nlvr_test.json. An
entry names its image as a path below the folder of all images.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.captions import group_by_image
from beit3.data.prepare.formats.files import ImageFinder, get_field, make_unknown_error
from beit3.data.prepare.formats.json_lists import find_lists, stream_json_list
from beit3.data.prepare.formats.nlvr import parse_label
from beit3.data.prepare.formats.questions import choose_answer, make_question
from beit3.data.prepare.formats.split_names import (
    SPLITS,
    Record,
    SplitRecord,
    choose_split,
    infer_split,
    make_split_error,
)

CAPTION_FIELDS = {"image", "caption"}
QUESTION_FIELDS = {"image", "question", "question_id"}
STATEMENT_FIELDS = {"images", "sentence"}
VISUAL_GENOME = "vg"
"""`dataset` of Visual Genome's questions."""
SOFT_LABELS = "*soft_labels.json"
"""Names of lists of questions that another reader reads."""

COCO_IMAGE = re.compile(r"COCO_\w+_(\d{12})\.")
NLVR2_IMAGE = re.compile(r"(\w+-\d+)-\d+-img0\.")
"""Names of images, and the part that is COCO's id or NLVR2's split and set."""

IMAGE_FOLDERS = ("images", "", "coco/images", "coco", "train2017", "val2017", "test2017")
"""Folders below which the images lie, where the paths of the files do not say all."""


# Captions -----------------------------------------------------------------------------------------


def read_lavis_captions(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads lists of {image, caption, image_id?}, one record per caption: {id: "image#k", ...}.

    `caption` is a text or a list of texts. Without a val file, 5 % of the images are held out.
    """
    files = _find_split_files(raw, CAPTION_FIELDS)
    image_finder = _make_image_finder(raw, files)
    num_captions: Counter[tuple[str, str]] = Counter()
    for file, file_split in files.items():
        for location, entry in stream_json_list(file):
            name = get_field(entry, "image", str, location)
            captions = entry.get("caption")
            if isinstance(captions, str):
                captions = [captions]
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise ValueError(f"{location} has no caption: give a text or a list of texts")
            split = choose_split(file_split, name, has_val="val" in files.values())
            path = image_finder.find(name)
            for caption in captions:
                id = f"{name}#{num_captions[split, name]}"
                num_captions[split, name] += 1
                yield split, {"id": id, "image": path, "text": caption}


def read_lavis_images(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads lists of {image, caption}, one record per image: {id, image, image_id, captions}.

    `image_id` is COCO's number where the image is named after it, else the image's name.
    """
    for split, record in group_by_image(read_lavis_captions(raw)):
        coco_image = COCO_IMAGE.search(record["id"])
        if coco_image and "captions" in record:
            record["image_id"] = int(coco_image[1])
            record["id"] = str(record["image_id"])
        yield split, record


def is_lavis_captions(raw: Path) -> bool:
    """Returns whether `raw` is or holds a list of {image, caption}."""
    return bool(find_lists(raw, CAPTION_FIELDS))


# Questions ----------------------------------------------------------------------------------------


def read_lavis_questions(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads lists of {question_id, question, image, answer?}.

    `answer` is one answer or a list with one per annotator; it is missing in tests.
    """
    files = _assign_splits(raw, _find_question_lists(Path(raw).absolute()), QUESTION_FIELDS)
    image_finder = _make_image_finder(raw, files)
    for file, file_split in files.items():
        for location, entry in stream_json_list(file):
            name = get_field(entry, "image", str, location)
            id = get_id(entry, "question_id", location)
            if entry.get("dataset") == VISUAL_GENOME:  # its numbers may be VQA's as well
                id = f"vg-{id}"
            text = get_field(entry, "question", str, location)
            answers = entry.get("answer", [])
            answers = [answers] if isinstance(answers, str) else answers
            if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
                raise ValueError(
                    f"{location} has answer {str(answers)[:60]}: give an answer or a list of "
                    "answers"
                )
            split = choose_split(file_split, name, has_val="val" in files.values())
            if not answers and split != "test":
                yield split, {"id": location, "fault": "it has no answer"}
                continue
            chosen_answer = choose_answer(answers) if answers else None
            path = image_finder.find(name)
            yield split, make_question(id, path, text, answers, chosen_answer)


def is_lavis_questions(raw: Path) -> bool:
    """Returns whether `raw` is or holds a list of {question_id, question, image}."""
    return bool(_find_question_lists(raw))


def is_lavis_vqa(raw: Path) -> bool:
    """Returns whether the lists in `raw` say that they are VQA's own (`dataset` is "vqa").

    Visual Genome's questions beside them ("vg") extend their training data.
    """
    entries = [next(stream_json_list(file))[1] for file in _find_question_lists(raw)]
    datasets = {str(entry.get("dataset")) for entry in entries} - {VISUAL_GENOME}
    return datasets == {"vqa"}


def _find_question_lists(raw: Path) -> list[Path]:
    """Returns the lists of questions that are neither A-OKVQA's nor soft labels."""
    others = {*find_lists(raw, {"choices"}), *find_lists(raw, QUESTION_FIELDS, SOFT_LABELS)}
    return [file for file in find_lists(raw, QUESTION_FIELDS) if file not in others]


# Statements ---------------------------------------------------------------------------------------


def read_lavis_statements(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads lists of {images: [left, right], sentence, label}: NLVR2's statements.

    The group of a statement, by which consistency counts, is its text within the set of pairs
    that its images are named after. `label` may be missing in tests.
    """
    files = _find_split_files(raw, STATEMENT_FIELDS)
    image_finder = _make_image_finder(raw, files)
    num_statements: Counter[str] = Counter()
    for file, file_split in files.items():
        for location, entry in stream_json_list(file):
            names = get_field(entry, "images", list, location)
            if len(names) != 2 or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{location} has images {str(names)[:60]}: give two names")
            text = get_field(entry, "sentence", str, location)
            split = choose_split(file_split, names[0], has_val="val" in files.values())
            if "label" not in entry and split != "test":
                yield split, {"id": location, "fault": "it has no label"}
                continue
            left, right = map(image_finder.find, names)
            id = f"{names[0]}#{num_statements[names[0]]}"
            num_statements[names[0]] += 1
            record: Record = {"id": id, "image": left, "image2": right, "text": text}
            if "label" in entry:
                record["label"] = parse_label(entry["label"], location)
            image_set = NLVR2_IMAGE.search(names[0])
            record["group"] = f"{image_set[1]}: {text}" if image_set else text
            yield split, record


def is_lavis_statements(raw: Path) -> bool:
    """Returns whether `raw` is or holds a list of {images, sentence}."""
    return bool(find_lists(raw, STATEMENT_FIELDS))


# Files and fields ---------------------------------------------------------------------------------


def get_id(entry: Record, name: str, location: str) -> int | str:
    """Returns an id that is a number or a text; raises ValueError for another."""
    id: Any = entry.get(name)
    if isinstance(id, bool) or not isinstance(id, int | str):
        raise ValueError(f"{location} has no {name} (int or str): check that the file is complete")
    return id


def find_split_files(
    files: list[Path], raw: Path, *, repeatable: Collection[str] = ()
) -> dict[Path, str]:
    """Returns file -> split.

    Raises ValueError for two files of one split, unless it is one of `repeatable`.
    """
    splits: dict[Path, str] = {}
    for file in files:
        split = infer_split(file, raw) or "train"
        for other, other_split in splits.items():
            if split == other_split and split not in repeatable:
                raise make_split_error(other, file, raw, split)
        splits[file] = split
    return splits


def _find_split_files(raw: str | Path, fields: set[str]) -> dict[Path, str]:
    return _assign_splits(raw, find_lists(Path(raw).absolute(), fields), fields)


def _assign_splits(raw: str | Path, files: list[Path], fields: set[str]) -> dict[Path, str]:
    """Returns file -> split; several files may be train, as Visual Genome's beside COCO's."""
    raw = Path(raw).absolute()
    if not files:
        description = f".json with a list of objects with {', '.join(sorted(fields))} (lavis)"
        raise make_unknown_error(raw, description)
    return find_split_files(files, raw, repeatable={"train"})


def _make_image_finder(raw: str | Path, files: dict[Path, str]) -> ImageFinder:
    """Returns a finder of the images in `raw`, beside its files and in the folder above them."""
    raw = Path(raw).absolute()
    raw = raw if raw.is_dir() else raw.parent
    others = [file.parent for file in files] + [file.parent.parent for file in files]
    also = [path for path in dict.fromkeys(others) if path != raw]
    return ImageFinder(raw, *IMAGE_FOLDERS, *SPLITS, also=also)
