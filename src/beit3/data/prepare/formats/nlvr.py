"""Reads NLVR2 and NLVR1: statements about two images, true or false.

The records are {id, image, image2, text, label, group, boxes?}. `label` is 1 for true and 0 for
false, and may be missing in tests. `group` is shared by the uses of one sentence, which NLVR2's
consistency counts together. `boxes` are the parts of `image` and of `image2` that the network
sees, [left, top, right, bottom] in pixels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_files,
    find_folder,
    get_field,
    make_unknown_error,
)
from beit3.data.prepare.formats.json_lists import find_lists
from beit3.data.prepare.formats.split_names import Record, SplitRecord
from beit3.files import read_json_lines

FILE_SPLITS = {"train": "train", "dev": "val", "test1": "test", "test": "test", "test2": "test2"}
"""Name of a file -> split.

test1 is the public test of NLVR2 (test-P), test2 the one that was first held back (test-U). test
is NLVR1's, and in NLVR2's folder somebody's own: it and test1 are one split here, so they cannot
lie side by side.
"""

NUM_PERMUTATIONS = 6
"""Number of orders of the three boxes in which NLVR1 draws each example."""
VAL_DIRECTORY = "5"
"""The directory that becomes val where NLVR1 has a single file. No two directories share a group of
sentences."""
NLVR1_BOXES = [[0, 0, 250, 100], [250, 0, 400, 100]]
"""NLVR1 draws three boxes on 400 x 100 pixels: the first two are one image, the third the other."""

LABELS = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}


def read_nlvr2(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads NLVR2's {train,dev,test1}.json: {id: identifier, image, image2, text, label, group}.

    The images are in `images/train/<directory>/`, `images/dev/` and `images/test1/`, or in the
    same folders without `images/`.
    """
    raw = find_folder(raw)
    files = _find_statement_files(raw)
    if not files:
        raise make_unknown_error(raw, "{train,dev,test1}.json (nlvr2)")
    image_finder = ImageFinder(raw, "images", "")
    for name, file in files.items():
        split_folder = f"images/{name}" if (raw / "images" / name).is_dir() else name
        for location, row in read_json_lines(file):
            identifier = get_field(row, "identifier", str, location)
            if identifier.count("-") < 3:
                raise ValueError(
                    f"{location} has identifier {identifier[:60]!r}: NLVR2's are "
                    "split-set-pair-sentence"
                )
            folder = f"{split_folder}/{row['directory']}" if "directory" in row else split_folder
            stem = identifier.rpartition("-")[0]
            left, right = (
                image_finder.find(f"{stem}-img{side}.png", folder=folder) for side in (0, 1)
            )
            record = {
                "id": identifier,
                "image": left,
                "image2": right,
                "text": get_field(row, "sentence", str, location),
                **_read_label(row, name, location),
                "group": remove_pair(identifier),
            }
            yield FILE_SPLITS[name], record


def read_nlvr1(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads NLVR1's train/train.json, dev/dev.json and test/test.json.

    The record of `identifier` "n-m" and order k of the boxes is {id: "n-m-k", image, image2: the
    same, text, label, group: "n", boxes}. Training records have all six orders, others the first.
    Where there is a single file, its directory 5 is val.
    """
    files = _find_statement_files(find_folder(raw))
    if not files:
        raise make_unknown_error(Path(raw), "dev/dev.json (nlvr1)")
    for name, file in files.items():
        image_finder = ImageFinder(file.parent, "images")
        for location, row in read_json_lines(file):
            identifier = get_field(row, "identifier", str, location)
            directory = get_field(row, "directory", str, location)
            split = FILE_SPLITS[name]
            if len(files) == 1:
                split = "val" if directory == VAL_DIRECTORY else "train"
            shared_fields = {
                "text": get_field(row, "sentence", str, location),
                **_read_label(row, name, location),
                "group": identifier.partition("-")[0],
                "boxes": NLVR1_BOXES,
            }
            for k in range(NUM_PERMUTATIONS if split == "train" else 1):
                image = image_finder.find(
                    f"{name}-{identifier}-{k}.png", folder=f"images/{directory}"
                )
                ids = {"id": f"{identifier}-{k}", "image": image, "image2": image}
                yield split, ids | shared_fields


def is_nlvr2(raw: Path) -> bool:
    """Returns whether `raw` holds {train,dev,test1}.json that are not NLVR1's."""
    return bool(_find_statement_files(raw)) and not is_nlvr1(raw)


def is_nlvr1(raw: Path) -> bool:
    """Returns whether `raw` holds {train,dev,test}.json whose first lines have NLVR1's boxes."""
    for file in _find_statement_files(raw).values():
        _, row = next(read_json_lines(file), ("", None))
        if isinstance(row, dict) and "structured_rep" in row:
            return True
    return False


def remove_pair(identifier: str) -> str:
    """Removes the pair from NLVR2's identifier split-set-pair-sentence."""
    *split_and_set, _, sentence = identifier.split("-")
    return "-".join([*split_and_set, sentence])


def parse_label(value: Any, location: str) -> int:
    """Returns 1 for a true statement and 0 for a false one; raises ValueError for other values."""
    name = str(value).lower()
    if name not in LABELS:
        raise ValueError(
            f"{location} has label {str(value)[:30]!r}: write one of {', '.join(LABELS)}"
        )
    return LABELS[name]


def _read_label(row: Record, name: str, location: str) -> dict[str, int]:
    """Returns {label} of a line; {} where a test file has none."""
    if name.startswith("test") and "label" not in row:
        return {}
    return {"label": parse_label(get_field(row, "label", str, location), location)}


def _find_statement_files(raw: Path) -> dict[str, Path]:
    """Returns name -> file; raises ValueError for two files of one split."""
    files: dict[str, Path] = {}
    for name in FILE_SPLITS:
        lists = find_lists(raw, set(), f"{name}.json")
        paths = [path for path in find_files(raw, f"{name}.json") if path not in lists]
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(map(str, paths))} are both {name}: keep one of them")
        if paths:
            files[name] = paths[0]
    if {"test", "test1"} <= files.keys():
        raise ValueError(
            f"{files['test1']} and {files['test']} would both be test, and are different splits: "
            "keep the one that is meant"
        )
    return files
