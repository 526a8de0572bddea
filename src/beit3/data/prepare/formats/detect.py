"""Detects which reader fits a folder, and reads it: the files of datasets' owners -> plain records.

Each `read_*` function here recognizes the files of one kind of data and yields (split, record). A
record is {id, image and/or text} and what the task adds. A missing image is not noticed here, a
part of a file that makes no record is {id, fault}, and a file that is none of the dataset's is
{id, left_out: its kind}: `prepare` counts all three. A file that breaks its format is a ValueError
that names it.

A new reader is a file of its own beside this one and a line in `FORMATS`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.aokvqa import is_aokvqa, read_aokvqa
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
from beit3.data.prepare.formats.class_tars import is_class_tars, read_class_tars
from beit3.data.prepare.formats.daquar import is_daquar, read_daquar
from beit3.data.prepare.formats.easy_vqa import is_easy_vqa, read_easy_vqa
from beit3.data.prepare.formats.files import find_files, find_folder, make_unknown_error
from beit3.data.prepare.formats.image_folders import holds_images, read_image_folder
from beit3.data.prepare.formats.instances import is_coco_instances, read_coco_instances
from beit3.data.prepare.formats.label_maps import (
    LabelMapDataset,
    is_ade20k,
    is_camvid,
    is_cityscapes,
    read_ade20k,
    read_camvid,
    read_cityscapes,
)
from beit3.data.prepare.formats.label_studio import is_label_studio, read_label_studio
from beit3.data.prepare.formats.lavis import (
    is_lavis_captions,
    is_lavis_questions,
    is_lavis_statements,
    is_lavis_vqa,
    read_lavis_captions,
    read_lavis_images,
    read_lavis_questions,
    read_lavis_statements,
)
from beit3.data.prepare.formats.lvis import is_lvis, read_lvis
from beit3.data.prepare.formats.mmseg_folders import is_mmseg, read_mmseg
from beit3.data.prepare.formats.nlvr import is_nlvr1, is_nlvr2, read_nlvr1, read_nlvr2
from beit3.data.prepare.formats.objects import Instances
from beit3.data.prepare.formats.question_tables import (
    is_soft_labels,
    read_question_tables,
    read_soft_labels,
)
from beit3.data.prepare.formats.region_descriptions import (
    is_region_descriptions,
    read_region_descriptions,
)
from beit3.data.prepare.formats.roboflow import is_roboflow, read_roboflow
from beit3.data.prepare.formats.sidecar_captions import (
    are_most_captioned,
    is_sidecar_captions,
    read_sidecar_captions,
)
from beit3.data.prepare.formats.split_names import SplitRecord, assign_splits
from beit3.data.prepare.formats.statement_tables import read_statement_tables
from beit3.data.prepare.formats.tables import is_tables
from beit3.data.prepare.formats.tars import is_webdataset, read_webdataset
from beit3.data.prepare.formats.text_files import holds_texts, read_text_files
from beit3.data.prepare.formats.visual_genome import read_visual_genome
from beit3.data.prepare.formats.vizwiz import is_vizwiz, read_vizwiz
from beit3.data.prepare.formats.voc_label_maps import is_voc_label_maps, read_voc_label_maps
from beit3.data.prepare.formats.voc_objects import is_voc_objects, read_voc_objects
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
    "soft_labels": Format(read_soft_labels, is_soft_labels, "*soft_labels.json"),
    "lavis_captions": Format(
        read_lavis_captions, is_lavis_captions, ".json lists with image and caption"
    ),
    "lavis_questions": Format(
        read_lavis_questions,
        is_lavis_questions,
        ".json lists with image, question_id, question and answer",
    ),
    "lavis_statements": Format(
        read_lavis_statements, is_lavis_statements, ".json lists with images, sentence and label"
    ),
    "karpathy": Format(read_karpathy, is_karpathy, "dataset_*.json"),
    "flickr8k": Format(read_flickr8k, is_flickr8k, "Flickr8k.token.txt"),
    "easy_vqa": Format(read_easy_vqa, is_easy_vqa, "{train,test}/questions.json"),
    "vqav2": Format(read_vqav2, is_vqav2, "*_questions.json"),
    "aokvqa": Format(read_aokvqa, is_aokvqa, "aokvqa_v1p0_*.json"),
    "vizwiz": Format(
        read_vizwiz, is_vizwiz, "{train,val,test}.json with image, question and answers"
    ),
    "daquar": Format(read_daquar, is_daquar, "qa.*.txt or data_*.csv"),
    "coco_captions": Format(
        read_coco_captions, is_coco_captions, "captions_*.json or nocaps_*.json"
    ),
    "region_descriptions": Format(
        read_region_descriptions, is_region_descriptions, "region_descriptions.json"
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
    "class_tars": Format(read_class_tars, is_class_tars, "<class>.tar with images"),
    "sidecar_captions": Format(
        read_sidecar_captions, is_sidecar_captions, "images with a .txt of the same name beside"
    ),
    "coco": Format(
        read_coco_instances,
        is_coco_instances,
        "instances_*.json or image_info_test*.json, or Objects365's zhiyuan_objv2_*.json",
    ),
    "lvis": Format(read_lvis, is_lvis, "lvis_*.json"),
    "roboflow": Format(read_roboflow, is_roboflow, "{train,valid}/_annotations.coco.json"),
    "label_studio": Format(read_label_studio, is_label_studio, "result.json with images/"),
    "voc": Format(read_voc_objects, is_voc_objects, "Annotations/*.xml with JPEGImages/"),
    "ade20k": Format(
        read_ade20k,
        is_ade20k,
        "images/{training,validation}/ with annotations/{training,validation}/",
    ),
    "camvid": Format(read_camvid, is_camvid, "{train,val,test}/ with {train,val,test}annot/"),
    "cityscapes": Format(
        read_cityscapes,
        is_cityscapes,
        "leftImg8bit/{train,val,test}/<city>/ with gtFine/{train,val}/<city>/",
    ),
    "mmseg": Format(
        read_mmseg,
        is_mmseg,
        "img_dir/{train,val}/ with ann_dir/{train,val}/, or images/ with annotations/",
    ),
    "voc_label_maps": Format(
        read_voc_label_maps, is_voc_label_maps, "JPEGImages/ with SegmentationClass/"
    ),
}

# The formats of each kind of data, in the order in which they are tried.
PAIR_FORMATS = (
    "lavis_captions",
    "karpathy",
    "flickr8k",
    "region_descriptions",
    "tables",
    "sidecar_captions",
    "webdataset",
)
CAPTIONED_IMAGE_FORMATS = (
    "lavis_captions",
    "karpathy",
    "flickr8k",
    "coco_captions",
    "tables",
    "sidecar_captions",
)
QUESTION_FORMATS = (
    "soft_labels",
    "aokvqa",
    "lavis_questions",
    "easy_vqa",
    "vqav2",
    "vizwiz",
    "daquar",
    "question_tables",
)
STATEMENT_FORMATS = ("nlvr1", "nlvr2", "lavis_statements", "statement_tables")
CLASS_FORMATS = ("class_list", "class_folders", "class_tables", "class_tars")

INSTANCE_FORMATS = ("coco", "lvis", "roboflow", "label_studio", "voc")
LABEL_MAP_FORMATS = ("ade20k", "camvid", "cityscapes", "mmseg", "voc_label_maps")

NAMED_FORMATS = (
    {"lavis_captions", "karpathy", "flickr8k", "region_descriptions", "coco_captions"},
    {"soft_labels", "aokvqa", "lavis_questions", "easy_vqa", "vqav2", "vizwiz", "daquar"},
    {"nlvr1", "nlvr2", "lavis_statements"},
    set(INSTANCE_FORMATS),
)
"""Kinds of data: formats of which a folder should hold one, as the others would be passed over."""
SAME_DATA = {
    ("lavis_captions", "coco_captions"): ("*coco*.json", "nocaps_*.json"),
    ("karpathy", "coco_captions"): ("dataset_coco*.json", "nocaps_*.json"),
    ("karpathy", "flickr8k"): ("dataset_flickr8k*.json", ""),
    ("soft_labels", "vqav2"): ("*soft_labels.json", "v2_*questions.json"),
    ("easy_vqa", "vqav2"): ("questions.json", "*_questions.json"),
    ("nlvr1", "nlvr2"): ("dev.json", "test1.json"),
}
"""Format that is read -> one with the same data, or of the same names, in other files.

With them, a file that is there then and one that is not.
"""


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
            _refuse_second_format(raw, name, names)
            return name
    if "coco_captions" in names and is_region_descriptions(raw):
        raise ValueError(
            f"{raw} holds Visual Genome's region descriptions, which are about parts of images: "
            "they are pairs for `beit3 prepare pretrain --source pairs`, not captions"
        )
    descriptions = (f"{FORMATS[name].description} ({name})" for name in names)
    raise make_unknown_error(raw, "; ".join(descriptions))


def _refuse_second_format(raw: Path, name: str, names: Sequence[str]) -> None:
    """Raises ValueError where a folder of one format is also of another that would be read."""
    if not raw.is_dir():
        return
    others = [
        other
        for kind in NAMED_FORMATS
        if name in kind
        for other in names
        if other in kind and other != name and not _hold_same_data(raw, name, other)
    ]
    found = [other for other in others if FORMATS[other].matches(raw)]
    if name == "tables" and "sidecar_captions" in names and are_most_captioned(raw):
        found = ["sidecar_captions"]
    if found:
        raise ValueError(
            f"{raw} holds {FORMATS[name].description} ({name}) and also "
            f"{FORMATS[found[0]].description} ({found[0]}): move one of them away"
        )


def _hold_same_data(raw: Path, name: str, other: str) -> bool:
    """Returns whether a folder of two formats has the same data in both, as `SAME_DATA` tells."""
    if (name, other) not in SAME_DATA:
        return False
    needed, excluded = SAME_DATA[name, other]
    return bool(find_files(raw, needed)) and not (excluded and find_files(raw, excluded))


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

    They come from Karpathy's, Flickr8k's or LAVIS' files, Visual Genome's regions, tables, texts
    beside the images, or tar files.
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
    """Yields questions about images of VQA and datasets like it, DAQUAR, LAVIS' files or tables.

    Records are {id, image, text, answers, multiple_choice_answer}. `answers` is [str per
    annotator], or {answer: score} where the file scores them; in a test split without answers they
    are [] and None.
    """
    return FORMATS[detect_format(raw, *QUESTION_FORMATS)].read(raw)


def holds_vqa_questions(raw: str | Path) -> bool:
    """Returns whether `read_questions` reads the files of VQA v1 or v2 itself in `raw`.

    The questions of other datasets, or of one's own, may have the same format.
    """
    name = detect_format(raw, *QUESTION_FORMATS)
    if name == "lavis_questions":
        return is_lavis_vqa(Path(raw).absolute())
    return name == "vqav2" and is_vqa(Path(raw).absolute())


def read_extra_questions(
    raw: str | Path, *, trained_ids: Collection[str] = ()
) -> Iterator[SplitRecord]:
    """Yields Visual Genome's questions, all train, if they lie in the same folder.

    `trained_ids` are the ids of val questions that are training data.
    """
    if not Path(raw).is_dir():
        return iter(())
    return read_visual_genome(raw, trained_ids=trained_ids)


def read_statements(raw: str | Path) -> Iterator[SplitRecord]:
    """Yields true and false statements on two images of NLVR2, NLVR1, LAVIS or tables.

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
    if name == "lavis_captions":
        return read_lavis_images(raw)
    records = FORMATS[name].read(raw)
    return records if name == "coco_captions" else group_by_image(records)


def read_classified_images(raw: str | Path) -> ClassifiedImages:
    """Reads classified images from class folders, a list or tables."""
    return FORMATS[detect_format(raw, *CLASS_FORMATS)].read(raw)


def read_instances(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads objects in images; see `instances`.

    Args:
        raw: Folder of the raw dataset.
        repaired: Counts repairs by their description, while the records are read.

    Returns:
        The categories [{id, name}] in the order of the labels, and pairs of (split, record).
    """
    return FORMATS[detect_format(raw, *INSTANCE_FORMATS)].read(raw, repaired=repaired)


def read_label_maps(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads images with a label for every pixel; see `label_maps`.

    Without a val split, 5 % of the images are held out. An image whose label map is missing, of
    another size, of several channels or holds other numbers than the classes is a fault. `counts`
    counts what is odd.
    """
    return FORMATS[detect_format(raw, *LABEL_MAP_FORMATS)].read(raw, counts=counts)
