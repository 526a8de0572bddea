"""Readers of public annotation files: what the data sets' owners publish -> plain records with absolute image paths.

`images`, `texts`, `pairs` and `questions` recognise the files of their kind and give (split, record): train, val, test.
A record is {id, image and/or text}; questions add answers [str per annotator] and multiple_choice_answer.
A missing image is not noticed here, and a part of a file that holds no record is {id, fault}: `prepare` counts both. A
file that breaks its format is a ValueError naming it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.formats.captions import flickr8k, is_flickr8k, is_karpathy, karpathy
from beit3.data.formats.files import HELD_OUT, SPLITS, Pair, Record, folder, holdout, nothing_known, split
from beit3.data.formats.folders import IMAGES, LONGEST_TEXT, holds_images, holds_texts, image_folder, text_files
from beit3.data.formats.qa import daquar, easy_vqa, is_daquar, is_easy_vqa, is_vqav2, vqav2
from beit3.data.formats.tables import is_tables, tables
from beit3.data.formats.tars import is_webdataset, webdataset

__all__ = [
    "FORMATS", "HELD_OUT", "IMAGES", "LONGEST_TEXT", "SPLITS", "Format", "Pair", "Record", "daquar", "detect", "easy_vqa", "flickr8k",
    "holdout", "image_folder", "images", "karpathy", "pairs", "questions", "split", "tables", "text_files", "texts", "vqav2",
    "webdataset",
]  # fmt: skip


class Format(NamedTuple):
    """A kind of files: what reads it, whether a folder or file is of it, and what people are told to look for."""

    read: Callable[..., Iterator[Any]]
    understands: Callable[[Path], bool]
    looks: str


FORMATS = {
    "karpathy": Format(karpathy, is_karpathy, "dataset_*.json"),
    "flickr8k": Format(flickr8k, is_flickr8k, "Flickr8k.token.txt"),
    "easy_vqa": Format(easy_vqa, is_easy_vqa, "{train,test}/questions.json"),
    "vqav2": Format(vqav2, is_vqav2, "*_questions.json"),
    "daquar": Format(daquar, is_daquar, "qa.*.txt or data_*.csv"),
    "webdataset": Format(webdataset, is_webdataset, "*.tar"),
    "image_folder": Format(image_folder, holds_images, "images"),
    "text_files": Format(text_files, holds_texts, ".txt files"),
    "tables": Format(tables, is_tables, ".csv, .tsv, .jsonl or captions.txt"),
}
"""In the order in which they are looked for. Tables come last: a folder of images may well have a list of its classes."""


def images(raw: str | Path, *, unpack: str | Path | None = None) -> Iterator[Pair]:
    """The images below `raw`, split by its folders or by hash; or those of its tar files, unpacked into `unpack`."""
    if not holds_images(Path(raw)) and is_webdataset(Path(raw)):
        return webdataset(raw, unpack=unpack, captions=False)
    return split(image_folder(raw), raw)


def texts(raw: str | Path) -> Iterator[Pair]:
    """The paragraphs of the text files below `raw`, split by its folders or by hash."""
    return split(text_files(raw), raw)


def pairs(raw: str | Path, *, unpack: str | Path | None = None) -> Iterator[Pair]:
    """Captioned images, one record per caption: Karpathy's or Flickr8k's files, tables, or tars unpacked into `unpack`."""
    name = detect(raw, "karpathy", "flickr8k", "tables", "webdataset")
    return webdataset(raw, unpack=unpack) if name == "webdataset" else FORMATS[name].read(raw)


def questions(raw: str | Path) -> Iterator[Pair]:
    """Questions about images: the files of easy-VQA, VQA or DAQUAR."""
    return FORMATS[detect(raw, "easy_vqa", "vqav2", "daquar")].read(raw)


def detect(raw: str | Path, *among: str) -> str:
    """The name of the format (of `among`, if given) that understands `raw`; else a ValueError."""
    raw = Path(raw).absolute()
    raw = raw if raw.is_file() else folder(raw)
    for name in among or FORMATS:
        if FORMATS[name].understands(raw):
            return name
    raise nothing_known(raw, "; ".join(f"{FORMATS[name].looks} ({name})" for name in among or FORMATS))
