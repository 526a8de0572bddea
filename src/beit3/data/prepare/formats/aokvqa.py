"""Reads A-OKVQA: aokvqa_v1p0_{train,val,test}.json, questions about COCO's images."""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import ImageFinder, get_field, make_unknown_error
from beit3.data.prepare.formats.json_lists import find_lists, stream_json_list
from beit3.data.prepare.formats.lavis import find_split_files, get_id
from beit3.data.prepare.formats.questions import choose_answer, make_question
from beit3.data.prepare.formats.split_names import Record, SplitRecord, choose_split
from beit3.data.prepare.formats.vqa import IMAGE_SUBSETS, list_image_names

FIELDS = {"question_id", "image_id", "question", "choices"}
LEFT_OUT = "questions with difficult_direct_answer"

IMAGE_FOLDERS = ("{split}2017", "images/{split}2017", "coco/{split}2017", "coco/images/{split}2017")
OTHER_FOLDERS = ("images", "", *IMAGE_SUBSETS, "train2017", "val2017", "test2017")


def read_aokvqa(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads the questions by split with their ten `direct_answers`, which tests lack.

    The choices and rationales are not used. Held-out questions that are marked
    `difficult_direct_answer` are left out, as in the dataset's own scores. Images lie in COCO's
    folders of 2017 or 2014, or are named by `image`, as in LAVIS' copy.
    """
    raw = Path(raw).absolute()
    files = find_lists(raw, FIELDS)
    if not files:
        raise make_unknown_error(raw, "aokvqa_v1p0_{train,val,test}.json (aokvqa)")
    folder = raw if raw.is_dir() else raw.parent
    splits = find_split_files(files, raw)
    for file, file_split in splits.items():
        own_folders = (name.format(split=file_split) for name in IMAGE_FOLDERS)
        image_finder = ImageFinder(folder, *own_folders, *OTHER_FOLDERS, also=[folder.parent])
        for location, entry in stream_json_list(file):
            id = get_id(entry, "question_id", location)
            image_names = _list_image_names(entry, location)
            split = choose_split(file_split, image_names[0], has_val="val" in splits.values())
            if split != "train" and entry.get("difficult_direct_answer") is True:
                yield split, {"id": id, "left_out": LEFT_OUT}
                continue
            answers = get_field({"direct_answers": [], **entry}, "direct_answers", list, location)
            if not all(isinstance(answer, str) for answer in answers):
                raise ValueError(f"{location} has direct_answers that are no texts")
            if not answers and split != "test":
                yield split, {"id": id, "fault": "it has no direct_answers"}
                continue
            chosen_answer = choose_answer(answers) if answers else None
            text = get_field(entry, "question", str, location)
            path = image_finder.find(*image_names)
            yield split, make_question(id, path, text, answers, chosen_answer)


def is_aokvqa(raw: Path) -> bool:
    """Returns whether `raw` is or holds A-OKVQA's lists."""
    return bool(find_lists(raw, FIELDS))


def _list_image_names(entry: Record, location: str) -> list[str]:
    """Returns the names that the image of a question may have."""
    names = [entry["image"]] if isinstance(entry.get("image"), str) else []
    image_id = get_field(entry, "image_id", int, location)
    prefixes = [subset.removesuffix("-dev") for subset in IMAGE_SUBSETS]
    # A COCO image of 2017 is called by its number alone.
    return names + sorted(list_image_names(image_id, prefixes), key=len)
