"""Detects which reader fits a folder, and reads it: the files of datasets' owners -> plain records.

Each `read_*` function here recognizes the files of one kind of data and yields (split, record). A
record is {id, image and/or text} and what the task adds. A missing image is not noticed here, and a
part of a file that makes no record is {id, fault}: `prepare` counts both. A file that breaks its
format is a ValueError that names it.

A new reader is a file of its own beside this one and a line in `FORMATS`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.caption_tables import read_caption_tables
from beit3.data.prepare.formats.captions import (
    group_by_image,
    is_coco_captions,
    is_flickr8k,
    is_karpathy,
    read_coco_captions,
    read_flickr8k,
    read_karpathy,
    read_karpathy_images,
)
from beit3.data.prepare.formats.class_folders import is_class_folders, read_class_folders
from beit3.data.prepare.formats.class_names import ClassifiedImages
from beit3.data.prepare.formats.class_tables import (
    is_class_list,
    read_class_list,
    read_class_tables,
)
from beit3.data.prepare.formats.daquar import is_daquar, read_daquar
from beit3.data.prepare.formats.easy_vqa import is_easy_vqa, read_easy_vqa
from beit3.data.prepare.formats.files import find_folder, make_unknown_error
from beit3.data.prepare.formats.image_folders import holds_images, read_image_folder
from beit3.data.prepare.formats.nlvr import is_nlvr1, is_nlvr2, read_nlvr1, read_nlvr2
from beit3.data.prepare.formats.question_tables import (
    is_soft_labels,
    read_question_tables,
    read_soft_labels,
)
from beit3.data.prepare.formats.split_names import SplitRecord, assign_splits
from beit3.data.prepare.formats.statement_tables import read_statement_tables
from beit3.data.prepare.formats.tables import is_tables
from beit3.data.prepare.formats.tars import is_webdataset, read_webdataset
from beit3.data.prepare.formats.text_files import holds_texts, read_text_files
from beit3.data.prepare.formats.visual_genome import read_visual_genome
from beit3.data.prepare.formats.vqa import is_vqa, is_vqav2, read_vqav2


class Format(NamedTuple):
    """A format of raw files."""

    read: Callable[..., Any]
    matches: Callable[[Path], bool]
    """Returns whether a folder or file is of this format."""
    description: str
    """The files to look for, for error messages."""


# In the order in which they are tried. Tables come last: a folder of images may well have a list of
# its classes.
FORMATS = {
    "karpathy": Format(read_karpathy, is_karpathy, "dataset_*.json"),
    "flickr8k": Format(read_flickr8k, is_flickr8k, "Flickr8k.token.txt"),
    "easy_vqa": Format(read_easy_vqa, is_easy_vqa, "{train,test}/questions.json"),
    "vqav2": Format(read_vqav2, is_vqav2, "*_questions.json"),
    "daquar": Format(read_daquar, is_daquar, "qa.*.txt or data_*.csv"),
    "soft_labels": Format(read_soft_labels, is_soft_labels, "*soft_labels.json"),
    "coco_captions": Format(
        read_coco_captions, is_coco_captions, "captions_*.json or nocaps_*.json"
    ),
    "nlvr2": Format(read_nlvr2, is_nlvr2, "{train,dev,test1}.json"),
    "nlvr1": Format(read_nlvr1, is_nlvr1, "dev/dev.json"),
    "webdataset": Format(read_webdataset, is_webdataset, "*.tar"),
    "image_folder": Format(read_image_folder, holds_images, "images"),
    "text_files": Format(read_text_files, holds_texts, ".txt files"),
    "class_list": Format(read_class_list, is_class_list, "classes.tsv with file names"),
    "class_folders": Format(
        read_class_folders, is_class_folders, "{train,val}/<class>/ with images"
    ),
    "tables": Format(read_caption_tables, is_tables, ".csv, .tsv, .jsonl or captions.txt"),
    "question_tables": Format(read_question_tables, is_tables, ".csv, .tsv or .jsonl"),
    "statement_tables": Format(read_statement_tables, is_tables, ".csv, .tsv or .jsonl"),
    "class_tables": Format(read_class_tables, is_tables, ".csv, .tsv or .jsonl"),
}

# The formats of each kind of data, in the order in which they are tried.
PAIR_FORMATS = ("karpathy", "flickr8k", "tables", "webdataset")
CAPTIONED_IMAGE_FORMATS = ("karpathy", "flickr8k", "coco_captions", "tables")
QUESTION_FORMATS = ("easy_vqa", "vqav2", "daquar", "soft_labels", "question_tables")
STATEMENT_FORMATS = ("nlvr1", "nlvr2", "statement_tables")
CLASS_FORMATS = ("class_list", "class_folders", "class_tables")


def detect_format(raw: str | Path, *names: str) -> str:
    """Returns the name of the first format that matches `raw`, a folder or file.

    `names` restricts the formats that are tried. Raises ValueError when none matches.
    """
    raw = Path(raw).absolute()
    if not raw.is_file():
        raw = find_folder(raw)
    names = names or tuple(FORMATS)
    for name in names:
        if FORMATS[name].matches(raw):
            return name
    descriptions = (f"{FORMATS[name].description} ({name})" for name in names)
    raise make_unknown_error(raw, "; ".join(descriptions))


def read_images(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields the images below `raw`, split by its folders or by hash, or those of its tar files."""
    if holds_pretraining_tars(raw, captions=False):
        return read_webdataset(raw, captions=False)
    return assign_splits(read_image_folder(raw), raw)


def read_texts(raw: str | Path, *, field: str = "text") -> Iterator[SplitRecord]:
    """Yields the paragraphs of the .txt, .jsonl and .parquet files below `raw`.

    They are split by folders, names or hash. `field` is the field or column that holds the text.
    """
    return read_text_files(raw, field=field)


def read_pairs(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields captioned images, one record per caption.

    They come from Karpathy's or Flickr8k's files, tables, or tar files.
    """
    return FORMATS[detect_format(raw, *PAIR_FORMATS)].read(raw)


def holds_pretraining_tars(raw: str | Path, *, captions: bool) -> bool:
    """Returns whether `read_pairs` (`read_images` if not `captions`) reads tar files in `raw`.

    Unpacked images and other lists of captions come first.
    """
    if captions:
        return detect_format(raw, *PAIR_FORMATS) == "webdataset"
    return not holds_images(Path(raw)) and is_webdataset(Path(raw))


def read_questions(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields questions about images of VQA, OK-VQA, easy-VQA, DAQUAR or tables.

    Records are {id, image, text, answers, multiple_choice_answer}. `answers` is [str per
    annotator], or {answer: score} where the file scores them; in a test split without answers they
    are [] and None.
    """
    return FORMATS[detect_format(raw, *QUESTION_FORMATS)].read(raw)


def holds_vqa_questions(raw: str | Path) -> bool:
    """Returns whether `read_questions` reads the files of VQA v1 or v2 itself in `raw`.

    The questions of other datasets, or of one's own, may have the same format.
    """
    return detect_format(raw, *QUESTION_FORMATS) == "vqav2" and is_vqa(Path(raw).absolute())


def read_extra_questions(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields Visual Genome's questions, all train, if they lie in the same folder."""
    return read_visual_genome(raw) if Path(raw).is_dir() else iter(())


def read_statements(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields true and false statements on two images of NLVR2, NLVR1 or tables.

    Records are {id, image, image2, text, label?, group, boxes?}.
    """
    return FORMATS[detect_format(raw, *STATEMENT_FORMATS)].read(raw)


def read_captioned_images(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields captioned images, one record per image.

    Records are {id, image, image_id, captions, domain?}; captions are [] in a test split without
    them.
    """
    name = detect_format(raw, *CAPTIONED_IMAGE_FORMATS)
    if name == "karpathy":
        return read_karpathy_images(raw)
    records = FORMATS[name].read(raw)
    return records if name == "coco_captions" else group_by_image(records)


def read_classified_images(raw: str | Path) -> ClassifiedImages:
    """Reads classified images from class folders, a list or tables."""
    return FORMATS[detect_format(raw, *CLASS_FORMATS)].read(raw)
