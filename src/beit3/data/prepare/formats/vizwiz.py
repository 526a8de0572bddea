"""Reads VizWiz: {train,val,test}.json, lists of an image, a question and ten people's answers."""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.prepare.formats.files import ImageFinder, get_field, make_unknown_error
from beit3.data.prepare.formats.json_lists import find_lists, stream_json_list
from beit3.data.prepare.formats.lavis import QUESTION_FIELDS, find_split_files
from beit3.data.prepare.formats.questions import choose_answer, make_question
from beit3.data.prepare.formats.split_names import SplitRecord, choose_split


def read_vizwiz(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads the questions by split; the id of a question is the name of its image.

    All answers count, as in the challenge, whatever their `answer_confidence`; that a question is
    unanswerable is an answer. Tests have no answers. Images are in `train/`, `val/` and `test/`,
    `images/`, or beside the files.
    """
    raw = Path(raw).absolute()
    files = _find_lists(raw)
    if not files:
        raise make_unknown_error(raw, "{train,val,test}.json of image and question (vizwiz)")
    folder = raw if raw.is_dir() else raw.parent
    splits = find_split_files(files, raw)
    for file, file_split in splits.items():
        image_finder = ImageFinder(
            folder, file.stem, f"images/{file.stem}", "images", "", also=[folder.parent]
        )
        for location, entry in stream_json_list(file):
            name = get_field(entry, "image", str, location)
            text = get_field(entry, "question", str, location)
            answers = [
                get_field(vote, "answer", str, location)
                for vote in get_field({"answers": [], **entry}, "answers", list, location)
            ]
            split = choose_split(file_split, name, has_val="val" in splits.values())
            if not answers and split != "test":
                yield split, {"id": location, "fault": "it has no answers"}
                continue
            chosen_answer = choose_answer(answers) if answers else None
            path = image_finder.find(name)
            yield split, make_question(Path(name).stem, path, text, answers, chosen_answer)


def is_vizwiz(raw: Path) -> bool:
    """Returns whether `raw` is or holds lists of images and questions without further ids."""
    return bool(_find_lists(raw))


def _find_lists(raw: Path) -> list[Path]:
    lavis_files = find_lists(raw, QUESTION_FIELDS)
    return [file for file in find_lists(raw, {"image", "question"}) if file not in lavis_files]
