"""Reads Roboflow's exports of COCO's format: {train,valid,test}/_annotations.coco.json with the
images beside it.

Roboflow adds a category that stands for the whole project: it has the supercategory "none", is the
supercategory of others, and no annotation is of it. It is left out and counted.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import find_files, find_folder
from beit3.data.prepare.formats.instances import InstanceFile, read_instance_files
from beit3.data.prepare.formats.objects import Instances
from beit3.data.prepare.formats.split_names import infer_split, make_split_error
from beit3.files import read_json

FILE_NAME = "_annotations.coco.json"


def is_roboflow(raw: Path) -> bool:
    """Returns whether there is a file of Roboflow's."""
    return bool(find_files(raw, FILE_NAME))


def read_roboflow(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads the files _annotations.coco.json in `raw` or in the folders directly below it.

    `repaired` counts repairs. Raises ValueError for a folder whose name tells no split, for two
    files of one split, and for parts that are not of the format.
    """
    raw = find_folder(raw)
    paths: dict[str, Path] = {}
    for path in find_files(raw, FILE_NAME):
        split = "train" if path.parent == raw else infer_split(path, raw)
        if not split:
            raise ValueError(f"folder {path.parent} is none of train, valid and test: rename it")
        if split in paths:
            raise make_split_error(paths[split], path, raw, split)
        paths[split] = path
    files = [
        InstanceFile(path, read_json(path), split, [path.parent.relative_to(raw).as_posix()])
        for split, path in paths.items()
    ]
    num_left_out = _leave_out_project_category([file.content for file in files])
    if num_left_out and repaired is not None:
        repaired["categories that stand for the whole project, left out"] += num_left_out
    return read_instance_files(raw, files, repaired)


def _leave_out_project_category(contents: list[Any]) -> int:
    """Removes the categories that stand for the whole project; returns their number."""
    if not all(isinstance(content, dict) for content in contents):
        return 0
    categories = [entry for entry in _list_entries(contents, "categories") if "id" in entry]
    used_ids = {str(row.get("category_id")) for row in _list_entries(contents, "annotations")}
    children = [entry for entry in categories if entry.get("supercategory") not in (None, "none")]
    parent_names = {str(entry["supercategory"]) for entry in children}
    project_ids = {
        str(entry["id"])
        for entry in categories
        if entry.get("supercategory") == "none"
        and str(entry.get("name")) in parent_names
        and str(entry["id"]) not in used_ids
    }
    for content in contents:
        if isinstance(content.get("categories"), list):
            content["categories"] = [
                entry
                for entry in content["categories"]
                if not isinstance(entry, dict) or str(entry.get("id")) not in project_ids
            ]
    return len(project_ids)


def _list_entries(contents: list[Any], name: str) -> list[dict[str, Any]]:
    """Returns the objects in the lists of this name; others are left to the reader."""
    lists = [content[name] for content in contents if isinstance(content.get(name), list)]
    return [entry for entries in lists for entry in entries if isinstance(entry, dict)]
