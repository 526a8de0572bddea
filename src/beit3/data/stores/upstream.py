"""Upstream's jsonl index files as they are: each line (for evaluation, each image) translated to our record when it is read.

`text_segment` stays a list of piece ids (null in caption files), `image_path` is relative to the root as ours is. Which
file serves which split is in `beit3.data.stores.records`. Beside the index files lie VQA's answer2label.txt and the references of
captions: coco_karpathy_{val,test}_gt.json, nocaps_val_4500_captions.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from beit3.data.prepare.formats.captions import captions_by_image
from beit3.data.prepare.formats.files import field
from beit3.data.prepare.formats.nlvr import sentence_of
from beit3.data.stores.records import Records
from beit3.files import read_json

Record: TypeAlias = dict[str, Any]

# VQA's val without the images of rest_val belongs to training, as soon as rest_val is what is scored.
JOINED = ("vqa.train.jsonl", "vqa.trainable_val.jsonl", "vqa.rest_val.jsonl")
ANSWERS = "answer2label.txt"
REFERENCES = {
    "coco_captioning": "coco_karpathy_{}_gt.json",
    "nocaps": "nocaps_{}_4500_captions.json",
}


class Index:
    """The records of an index file, by index. Retrieval's lines of val and test are grouped to one record per image.

    ValueError naming file and line for what is not as upstream writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind, self.split = path.name.split(".")[:2]
        self.files = [Records(path)]
        if path.name == JOINED[0] and all(path.with_name(name).is_file() for name in JOINED[1:]):
            self.files.append(Records(path.with_name(JOINED[1])))
        self.groups = (
            self._by_image()
            if self.kind in ("coco_retrieval", "flickr30k") and self.split != "train"
            else None
        )
        self.answers = _answers(path.with_name(ANSWERS)) if self.kind == "vqa" else {}
        self.captions = (
            _references(path.with_name(REFERENCES[self.kind].format(self.split)))
            if self.kind in REFERENCES
            else {}
        )

    def __len__(self) -> int:
        return sum(map(len, self.files)) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> Record:
        if self.groups is not None:
            rows = [self._row(line) for line in self.groups[index]]
            return _of_image(*rows[0]) | {"captions": [_text(row, where) for row, where in rows]}
        record = TRANSLATE[self.kind](self, *self._row(index))
        # The captions of one image share its number.
        return (
            record | {"id": f"{record['id']}#{index}"}
            if record.keys() >= {"image_id", "text"}
            else record
        )

    def _row(self, index: int) -> tuple[Record, str]:
        """A line and its name for errors."""
        for records in self.files:
            if index < len(records):
                return records[index], f"{records.path} line {index + 1}"
            index -= len(records)
        raise IndexError(f"record {index} beyond {self.path}")

    def _by_image(self) -> list[list[int]]:
        """Lines of each image, in the order of their first."""
        groups: dict[int, list[int]] = {}
        for line in range(len(self.files[0])):
            row, where = self._row(line)
            groups.setdefault(field(row, "image_id", int, where), []).append(line)
        return list(groups.values())


def is_index(path: Path) -> bool:
    """Whether a file is called as upstream's index files are: vqa.train.jsonl, nlvr2.dev.index.jsonl ..."""
    return path.name.count(".") > 1 and path.name.partition(".")[0] in TRANSLATE


def _question(index: Index, row: Record, where: str) -> Record:
    """{id, image, text, answers: {answer: score}}; answers {} in the tests."""
    record = {
        "id": str(field(row, "qid", int, where)),
        "image": field(row, "image_path", str, where),
        "text": _text(row, where),
    }
    if "labels" not in row:
        return record | {"answers": {}}
    labels, scores = field(row, "labels", list, where), field(row, "scores", list, where)
    unknown = [
        label for label in labels if not isinstance(label, int) or label not in index.answers
    ]
    if unknown or len(labels) != len(scores):
        wrong = (
            f"label {unknown[0]}, which {ANSWERS} beside it does not name"
            if unknown
            else f"{len(labels)} labels, {len(scores)} scores"
        )
        raise ValueError(f"{where} has {wrong}: put the {ANSWERS} that was written with it there")
    return record | {
        "answers": {
            index.answers[label]: score for label, score in zip(labels, scores, strict=True)
        }
    }


def _statement(index: Index, row: Record, where: str) -> Record:
    """{id, image, image2, text, label, group}."""
    identifier = field(row, "identifier", str, where)
    images = {
        "image": field(row, "image_path", str, where),
        "image2": field(row, "image2_path", str, where),
    }
    label = {"label": field(row, "label", int, where)} if "label" in row else {}
    return {
        "id": identifier,
        **images,
        "text": _text(row, where),
        **label,
        "group": sentence_of(identifier),
    }


def _captioned(index: Index, row: Record, where: str) -> Record:
    """{id, image, image_id, text} of a caption; {id, image, image_id, captions} of an image without one."""
    record = _of_image(row, where)
    if row.get("text_segment") is None:
        return record | {"captions": index.captions.get(record["image_id"], [])}
    return record | {"text": _text(row, where)}


def _classified(index: Index, row: Record, where: str) -> Record:
    """{id: image_path, image, label}."""
    image = field(row, "image_path", str, where)
    return {"id": image, "image": image, "label": field(row, "label", int, where)}


TRANSLATE: dict[str, Callable[[Index, Record, str], Record]] = {
    "vqa": _question,
    "nlvr2": _statement,
    "coco_retrieval": _captioned,
    "flickr30k": _captioned,
    "coco_captioning": _captioned,
    "nocaps": _captioned,
    "imagenet": _classified,
}
"""First part of a file's name -> what makes a record of (index, line, its name for errors)."""


def _of_image(row: Record, where: str) -> Record:
    id = field(row, "image_id", int, where)
    return {"id": str(id), "image": field(row, "image_path", str, where), "image_id": id}


def _text(row: Record, where: str) -> str | list[int]:
    text = row.get("text_segment")
    if isinstance(text, str) or (
        isinstance(text, list) and text and all(isinstance(id, int) for id in text)
    ):
        return text
    raise ValueError(f"{where} has text_segment {str(text)[:40]}: it should be a list of piece ids")


def _answers(file: Path) -> dict[int, str]:
    """Label -> answer; {} where the file is absent."""
    rows = enumerate(Records(file) if file.is_file() else (), 1)
    return {
        field(row, "label", int, f"{file} line {line}"): field(
            row, "answer", str, f"{file} line {line}"
        )
        for line, row in rows
    }


def _references(file: Path) -> dict[int, list[str]]:
    """image_id -> captions; {} where the file is absent."""
    return captions_by_image(read_json(file), file) if file.is_file() else {}
