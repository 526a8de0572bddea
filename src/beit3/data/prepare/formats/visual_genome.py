"""Reads Visual Genome's questions, with which VQA's training questions are extended."""

from collections.abc import Collection, Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_files,
    find_folder,
    find_single_file,
    get_field,
)
from beit3.data.prepare.formats.questions import make_question
from beit3.data.prepare.formats.split_names import SPLITS, SplitRecord, infer_subset
from beit3.data.prepare.formats.vqa import find_question_files, read_questions
from beit3.files import read_json_list


def read_visual_genome(
    raw: str | Path, *, trained_ids: Collection[str] = ()
) -> Iterator[SplitRecord]:
    """Reads question_answers.json as training questions, with images in VG_100K and VG_100K_2.

    Yields nothing where there is no such file. Images that VQA's val or test questions in the
    same folder are about are left out, but for the questions in `trained_ids`, which are training
    data; then image_data.json is needed, which tells the images that come from COCO.
    """
    raw = find_folder(raw)
    if not find_files(raw, "question_answers.json"):
        return
    file = find_single_file(raw, "question_answers.json", "Visual Genome's questions")
    image_finder = ImageFinder(
        raw, "VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2"
    )
    held_out_ids = _find_held_out_ids(raw, trained_ids)
    for location, image in read_json_list(file):
        image_id = get_field(image, "id", int, location)
        if image_id in held_out_ids:
            continue
        image_path = image_finder.find(f"{image_id}.jpg", f"{image_id}.png")
        for row in get_field(image, "qas", list, location):
            id = get_field(row, "qa_id", int, location)
            text = get_field(row, "question", str, location)
            answer = get_field(row, "answer", str, location)
            yield "train", make_question(f"vg-{id}", image_path, text, [answer], answer)


def _find_held_out_ids(raw: Path, trained_ids: Collection[str]) -> set[int]:
    """Returns Visual Genome's ids of the images of the val and test questions in `raw`."""
    files = [
        file
        for file in find_question_files(raw)
        if SPLITS.get(infer_subset(file).lower()) != "train"
    ]
    coco_ids = {
        get_field(question, "image_id", int, file)
        for file in files
        for question in read_questions(file)["questions"]
        if str(question.get("question_id")) not in trained_ids
    }
    if not coco_ids:
        return set()
    image_data = next(iter(find_files(raw, "image_data.json")), None)
    if image_data is None:
        raise ValueError(
            f"Visual Genome's question_answers.json in {raw} needs its image_data.json beside it, "
            f"which tells the images of {files[0].name} from those to train on: download it, or "
            "move question_answers.json away"
        )
    held_out_ids = set()
    for location, row in read_json_list(image_data):
        image_id = get_field(row, "image_id", int, location)
        coco_id = row.get("coco_id")
        if isinstance(coco_id, int) and coco_id in coco_ids:
            held_out_ids.add(image_id)
    return held_out_ids
