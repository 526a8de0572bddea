"""Readers of public annotation files: what the data sets' owners publish -> plain records with
absolute image paths.

`images`, `texts`, `pairs`, `questions`, `statements`, `captioned` and `classes` recognise the files
of their kind and give
(split, record): train, val, test. A record is {id, image and/or text} and what the task adds to it,
see each of them.
A missing image is not noticed here, and a part of a file that holds no record is {id, fault}:
`prepare` counts both. A
file that breaks its format is a ValueError naming it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.captions import (
    by_image,
    coco_captions,
    flickr8k,
    is_coco_captions,
    is_flickr8k,
    is_karpathy,
    karpathy,
    karpathy_images,
    one_per_caption,
)
from beit3.data.prepare.formats.files import (
    HELD_OUT,
    SPLITS,
    Pair,
    Record,
    folder,
    holdout,
    nothing_known,
    split,
)
from beit3.data.prepare.formats.folders import (
    IMAGES,
    LONGEST_TEXT,
    holds_images,
    holds_texts,
    image_folder,
    text_files,
)
from beit3.data.prepare.formats.labels import (
    Classes,
    class_folders,
    class_list,
    class_tables,
    is_class_folders,
    is_class_list,
)
from beit3.data.prepare.formats.nlvr import is_nlvr1, is_nlvr2, nlvr1, nlvr2, statement_tables
from beit3.data.prepare.formats.qa import (
    daquar,
    easy_vqa,
    is_daquar,
    is_easy_vqa,
    is_soft_labels,
    is_vqa,
    is_vqav2,
    question_tables,
    soft_labels,
    visual_genome,
    vqav2,
)
from beit3.data.prepare.formats.tables import is_tables, tables
from beit3.data.prepare.formats.tars import is_webdataset, webdataset

__all__ = [
    "FORMATS",
    "HELD_OUT",
    "IMAGES",
    "LONGEST_TEXT",
    "SPLITS",
    "Classes",
    "Format",
    "Pair",
    "Record",
    "asks_as_vqa",
    "captioned",
    "class_folders",
    "class_list",
    "class_tables",
    "classes",
    "coco_captions",
    "daquar",
    "detect",
    "easy_vqa",
    "extra_questions",
    "flickr8k",
    "holdout",
    "image_folder",
    "images",
    "karpathy",
    "lies_in_tars",
    "nlvr1",
    "nlvr2",
    "pairs",
    "question_tables",
    "questions",
    "one_per_caption",
    "soft_labels",
    "split",
    "statement_tables",
    "statements",
    "tables",
    "text_files",
    "texts",
    "vqav2",
    "webdataset",
]


class Format(NamedTuple):
    """A kind of files: what reads it, whether a folder or file is of it, and what people are told
    to look for."""

    read: Callable[..., Any]
    understands: Callable[[Path], bool]
    looks: str


FORMATS = {
    "karpathy": Format(karpathy, is_karpathy, "dataset_*.json"),
    "flickr8k": Format(flickr8k, is_flickr8k, "Flickr8k.token.txt"),
    "easy_vqa": Format(easy_vqa, is_easy_vqa, "{train,test}/questions.json"),
    "vqav2": Format(vqav2, is_vqav2, "*_questions.json"),
    "daquar": Format(daquar, is_daquar, "qa.*.txt or data_*.csv"),
    "soft_labels": Format(soft_labels, is_soft_labels, "*soft_labels.json"),
    "coco_captions": Format(coco_captions, is_coco_captions, "captions_*.json or nocaps_*.json"),
    "nlvr2": Format(nlvr2, is_nlvr2, "{train,dev,test1}.json"),
    "nlvr1": Format(nlvr1, is_nlvr1, "dev/dev.json"),
    "webdataset": Format(webdataset, is_webdataset, "*.tar"),
    "image_folder": Format(image_folder, holds_images, "images"),
    "text_files": Format(text_files, holds_texts, ".txt files"),
    "class_list": Format(class_list, is_class_list, "classes.tsv with file names"),
    "class_folders": Format(class_folders, is_class_folders, "{train,val}/<class>/ with images"),
    "tables": Format(tables, is_tables, ".csv, .tsv, .jsonl or captions.txt"),
    "question_tables": Format(question_tables, is_tables, ".csv, .tsv or .jsonl"),
    "statement_tables": Format(statement_tables, is_tables, ".csv, .tsv or .jsonl"),
    "class_tables": Format(class_tables, is_tables, ".csv, .tsv or .jsonl"),
}
"""In the order in which they are looked for. Tables come last: a folder of images may well have a
list of its classes."""


CAPTIONED = ("karpathy", "flickr8k", "tables", "webdataset")
QUESTIONS = ("easy_vqa", "vqav2", "daquar", "soft_labels", "question_tables")


def images(raw: str | Path) -> Iterator[Pair]:
    """The images below `raw`, split by its folders or by hash; or those of its tar files."""
    return (
        webdataset(raw, captions=False)
        if lies_in_tars(raw, captions=False)
        else split(image_folder(raw), raw)
    )


def texts(raw: str | Path, *, field: str = "text") -> Iterator[Pair]:
    """The paragraphs of the .txt, .jsonl and .parquet files below `raw`, split by folders, names or
    hash."""
    return text_files(raw, field=field)


def pairs(raw: str | Path) -> Iterator[Pair]:
    """Captioned images, one record per caption: Karpathy's or Flickr8k's files, tables, or tars."""
    return FORMATS[detect(raw, *CAPTIONED)].read(raw)


def lies_in_tars(raw: str | Path, *, captions: bool) -> bool:
    """Whether `pairs` (`images` without captions) reads tars here: unpacked images and other lists
    of captions come first."""
    if captions:
        return detect(raw, *CAPTIONED) == "webdataset"
    return not holds_images(Path(raw)) and is_webdataset(Path(raw))


def questions(raw: str | Path) -> Iterator[Pair]:
    """Questions about images, of VQA, OK-VQA, easy-VQA, DAQUAR or tables: {id, image, text,
    answers, multiple_choice_answer}.

    answers: [str per annotator], or {answer: score} where the file scores them; [] and None in a
    test without answers.
    """
    return FORMATS[detect(raw, *QUESTIONS)].read(raw)


def asks_as_vqa(raw: str | Path) -> bool:
    """Whether `questions` reads VQA v1's or v2's own files here, not another set's or one's own in
    their format."""
    return detect(raw, *QUESTIONS) == "vqav2" and is_vqa(Path(raw).absolute())


def extra_questions(raw: str | Path) -> Iterator[Pair]:
    """Visual Genome's questions, if they lie in the same folder, all train; else none."""
    return visual_genome(raw) if Path(raw).is_dir() else iter(())


def statements(raw: str | Path) -> Iterator[Pair]:
    """True and false statements on two images, of NLVR2, NLVR1 or tables: {id, image, image2, text,
    label?, group, boxes?}."""
    return FORMATS[detect(raw, "nlvr1", "nlvr2", "statement_tables")].read(raw)


def captioned(raw: str | Path) -> Iterator[Pair]:
    """Captioned images, one record per image: {id, image, image_id, captions, domain?}; captions []
    in a test without them."""
    name = detect(raw, "karpathy", "flickr8k", "coco_captions", "tables")
    own = {"karpathy": karpathy_images, "coco_captions": coco_captions}
    return own[name](raw) if name in own else by_image(FORMATS[name].read(raw))


def classes(raw: str | Path) -> Classes:
    """Classified images in class folders, a list or tables: (names in label order, the pairs of
    {id, image, label})."""
    return FORMATS[detect(raw, "class_list", "class_folders", "class_tables")].read(raw)


def detect(raw: str | Path, *among: str) -> str:
    """The name of the format (of `among`, if given) that understands `raw`; else a ValueError."""
    raw = Path(raw).absolute()
    raw = raw if raw.is_file() else folder(raw)
    for name in among or FORMATS:
        if FORMATS[name].understands(raw):
            return name
    raise nothing_known(
        raw, "; ".join(f"{FORMATS[name].looks} ({name})" for name in among or FORMATS)
    )
