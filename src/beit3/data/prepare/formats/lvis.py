"""Reads LVIS: lvis_v1_train.json and lvis_v1_val.json, which are of COCO's format.

Images are COCO's, named by `coco_url`, and lie in train2017/ and val2017/, as LVIS takes images of
both for its own val. Which categories were searched for in an image (`neg_category_ids`,
`not_exhaustive_category_ids`) is not kept: scores of these records are COCO's, not LVIS's.
"""

import re
from collections import Counter
from pathlib import Path

from beit3.data.prepare.formats.files import find_files, find_folder
from beit3.data.prepare.formats.instances import InstanceFile, read_instance_files
from beit3.data.prepare.formats.objects import Instances
from beit3.data.prepare.formats.split_names import make_split_error
from beit3.files import read_json

FILE_PATTERN = "lvis_*.json"
SPLIT_NAMES = {"train": "train", "val": "val", "minival": "val", "test": "test", "dev": "test-dev"}
"""Word in a file's name -> split; the last word counts."""
IMAGE_FOLDERS = ("train2017", "val2017", "test2017", "unlabeled2017")


def is_lvis(raw: Path) -> bool:
    """Returns whether there is a file of LVIS."""
    return bool(find_files(raw, FILE_PATTERN))


def read_lvis(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads the files lvis_*.json in `raw` or in the folders directly below it.

    `repaired` counts repairs. Raises ValueError for a name that tells no split, for two files of
    one split, and for parts that are not of the format.
    """
    raw = find_folder(raw)
    paths: dict[str, Path] = {}
    for path in find_files(raw, FILE_PATTERN):
        split = _infer_lvis_split(path)
        if split in paths:
            raise make_split_error(paths[split], path, raw, split)
        paths[split] = path
    folders = ["", *IMAGE_FOLDERS, *(f"images/{name}" for name in IMAGE_FOLDERS), "images"]
    files = [
        InstanceFile(
            path, read_json(path), split, folders, has_objects="image_info" not in path.stem
        )
        for split, path in paths.items()
    ]
    return read_instance_files(raw, files, repaired)


def _infer_lvis_split(path: Path) -> str:
    """Returns the split that a file's name tells."""
    words = re.split(r"[._-]", path.stem)
    splits = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
    if not splits:
        raise ValueError(
            f"{path} tells no split by its name: call it lvis_v1_train.json or lvis_v1_val.json"
        )
    return splits[-1]
