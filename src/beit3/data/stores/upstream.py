"""Index files of the BEiT-3 release, read as they are.

Each line of such a .jsonl file (in evaluation of retrieval, each image) is converted to a record
of ours when it is read. `text_segment` stays a list of piece ids, and is null in files of captions.
`image_path` is relative to the root, as our paths are. `beit3.data.stores.split_files` says which
file holds which split. Beside the index files lie VQA's answer2label.txt and the references of
captions: coco_karpathy_{val,test}_gt.json and nocaps_val_4500_captions.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from beit3.data.prepare.formats.captions import group_captions
from beit3.data.prepare.formats.files import get_field
from beit3.data.prepare.formats.nlvr import remove_pair
from beit3.data.stores.records import Records
from beit3.files import read_json

Record: TypeAlias = dict[str, Any]

# With these three files, VQA's val is rest_val, and the images of val outside it are for training.
VQA_TRAIN_FILES = ("vqa.train.jsonl", "vqa.trainable_val.jsonl")
VQA_REST_VAL_FILE = "vqa.rest_val.jsonl"
VQA_ANSWERS_FILE = "answer2label.txt"

CAPTION_FILES = {
    "coco_captioning": "coco_karpathy_{}_gt.json",
    "nocaps": "nocaps_{}_4500_captions.json",
}


class UpstreamIndex:
    """The records of an index file, by index.

    Retrieval's lines in val and test are grouped to one record per image. Raises ValueError naming
    file and line for content that is not as the release writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind, self.split = path.name.split(".")[:2]
        self.files = [Records(path)]
        if path.name == VQA_TRAIN_FILES[0]:
            others = [path.with_name(name) for name in (*VQA_TRAIN_FILES[1:], VQA_REST_VAL_FILE)]
            if all(other.is_file() for other in others):
                self.files.append(Records(others[0]))
        self.groups: list[list[int]] | None = None
        """Lines of each image where a record is an image, else None."""
        if self.kind in ("coco_retrieval", "flickr30k") and self.split != "train":
            self.groups = self._group_by_image()
        self.answers: dict[int, str] = {}
        """VQA's answers by label."""
        if self.kind == "vqa":
            self.answers = _read_answers(path.with_name(VQA_ANSWERS_FILE))
        self.captions: dict[int, list[str]] = {}
        """Reference captions by image id."""
        if self.kind in CAPTION_FILES:
            captions_file = CAPTION_FILES[self.kind].format(self.split)
            self.captions = _read_captions(path.with_name(captions_file))

    def __len__(self) -> int:
        return sum(map(len, self.files)) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> Record:
        if self.groups is not None:
            lines = [self._read_line(line) for line in self.groups[index]]
            record = _convert_image(*lines[0])
            return record | {"captions": [_get_text(line, location) for line, location in lines]}
        record = CONVERTERS[self.kind](self, *self._read_line(index))
        if "image_id" in record and "text" in record:
            # The captions of one image share its number.
            record["id"] = f"{record['id']}#{index}"
        return record

    def describe(self, index: int) -> str:
        """Returns the file and line of a record, or the first line of an image's."""
        line = index if self.groups is None else self.groups[index][0]
        for records in self.files:
            if line < len(records):
                return records.describe(line)
            line -= len(records)
        raise IndexError(f"record {index} beyond {self.path}")

    def _read_line(self, index: int) -> tuple[Record, str]:
        """Returns a line and its location for error messages."""
        for records in self.files:
            if index < len(records):
                return records[index], records.describe(index)
            index -= len(records)
        raise IndexError(f"record {index} beyond {self.path}")

    def _group_by_image(self) -> list[list[int]]:
        """Returns the lines of each image; images come in the order of their first lines."""
        groups: dict[int, list[int]] = {}
        for index in range(len(self.files[0])):
            line, location = self._read_line(index)
            groups.setdefault(get_field(line, "image_id", int, location), []).append(index)
        return list(groups.values())


def is_upstream_index(path: Path) -> bool:
    """Whether a file has the name of an index file: vqa.train.jsonl, nlvr2.dev.index.jsonl ..."""
    return path.name.count(".") > 1 and path.name.partition(".")[0] in CONVERTERS


# Lines to records -----------------------------------------------------------------------------


def _convert_question(index: UpstreamIndex, line: Record, location: str) -> Record:
    """Returns {id, image, text, answers: {answer: score}}; the test splits have no answers."""
    record = {
        "id": str(get_field(line, "qid", int, location)),
        "image": get_field(line, "image_path", str, location),
        "text": _get_text(line, location),
        "answers": {},
    }
    if "labels" not in line:
        return record
    labels = get_field(line, "labels", list, location)
    scores = get_field(line, "scores", list, location)
    fault = ""
    if len(labels) != len(scores):
        fault = f"{len(labels)} labels, {len(scores)} scores"
    for label in labels:
        if not isinstance(label, int) or label not in index.answers:
            fault = f"label {label}, which {VQA_ANSWERS_FILE} beside it does not name"
            break
    if fault:
        raise ValueError(
            f"{location} has {fault}: put the {VQA_ANSWERS_FILE} that was written with it beside it"
        )
    names = [index.answers[label] for label in labels]
    return record | {"answers": dict(zip(names, scores, strict=True))}


def _convert_statement(index: UpstreamIndex, line: Record, location: str) -> Record:
    """Returns {id, image, image2, text, label, group}, without label where the line has none."""
    identifier = get_field(line, "identifier", str, location)
    record = {
        "id": identifier,
        "image": get_field(line, "image_path", str, location),
        "image2": get_field(line, "image2_path", str, location),
        "text": _get_text(line, location),
    }
    if "label" in line:
        record["label"] = get_field(line, "label", int, location)
    return record | {"group": remove_pair(identifier)}


def _convert_caption(index: UpstreamIndex, line: Record, location: str) -> Record:
    """Returns {id, image, image_id} and the text of a caption, or captions of an image without."""
    record = _convert_image(line, location)
    if line.get("text_segment") is None:
        return record | {"captions": index.captions.get(record["image_id"], [])}
    return record | {"text": _get_text(line, location)}


def _convert_class(index: UpstreamIndex, line: Record, location: str) -> Record:
    """Returns {id, image, label} with the image's path as id."""
    image = get_field(line, "image_path", str, location)
    return {"id": image, "image": image, "label": get_field(line, "label", int, location)}


CONVERTERS: dict[str, Callable[[UpstreamIndex, Record, str], Record]] = {
    "vqa": _convert_question,
    "nlvr2": _convert_statement,
    "coco_retrieval": _convert_caption,
    "flickr30k": _convert_caption,
    "coco_captioning": _convert_caption,
    "nocaps": _convert_caption,
    "imagenet": _convert_class,
}
"""First part of a file's name -> function of (index, line, location) that returns a record."""


def _convert_image(line: Record, location: str) -> Record:
    """Returns {id, image, image_id}."""
    image_id = get_field(line, "image_id", int, location)
    return {
        "id": str(image_id),
        "image": get_field(line, "image_path", str, location),
        "image_id": image_id,
    }


def _get_text(line: Record, location: str) -> str | list[int]:
    """Returns `text_segment`: a list of piece ids, or a string in files that others wrote."""
    text = line.get("text_segment")
    if isinstance(text, str):
        return text
    if isinstance(text, list) and text and all(isinstance(id, int) for id in text):
        return text
    raise ValueError(
        f"{location} has text_segment {str(text)[:40]}: it should be a list of piece ids"
    )


# Files beside the index -----------------------------------------------------------------------


def _read_answers(path: Path) -> dict[int, str]:
    """Returns label -> answer, empty where the file is absent."""
    answers: dict[int, str] = {}
    if not path.is_file():
        return answers
    records = Records(path)
    for index, line in enumerate(records):
        location = records.describe(index)
        label = get_field(line, "label", int, location)
        answers[label] = get_field(line, "answer", str, location)
    return answers


def _read_captions(path: Path) -> dict[int, list[str]]:
    """Returns image id -> captions, empty where the file is absent."""
    return group_captions(read_json(path), path) if path.is_file() else {}
