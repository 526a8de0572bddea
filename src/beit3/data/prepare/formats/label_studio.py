"""Reads Label Studio's export of COCO's format: result.json, with the images in images/.

Names of images are whatever Label Studio stored: "images/3f2a-street.jpg", the same with
backslashes, "upload/1/3f2a-street.jpg", or a URL of its local files. The image is looked for in
that folder, then by its last part in images/ and beside the file.
"""

from collections import Counter
from pathlib import Path

from beit3.data.prepare.formats.files import find_files, find_folder
from beit3.data.prepare.formats.instances import InstanceFile, read_instance_files
from beit3.data.prepare.formats.objects import Instances
from beit3.data.prepare.formats.split_names import infer_split, make_split_error
from beit3.files import read_json

FILE_NAMES = ("result.json", "result_coco.json")
LOCAL_FILES = "?d="
"""Precedes the path in a URL of local files, "/data/local-files/?d=photos/street.jpg"."""


def is_label_studio(raw: Path) -> bool:
    """Returns whether there is an export of Label Studio."""
    return any(find_files(raw, name) for name in FILE_NAMES)


def read_label_studio(raw: str | Path, *, repaired: Counter[str] | None = None) -> Instances:
    """Reads the exports in `raw`, or in the folders train, val and test directly below it.

    `repaired` counts repairs. Raises ValueError for two files of one split, and for parts that are
    not of the format.
    """
    raw = find_folder(raw)
    files: dict[str, InstanceFile] = {}
    for path in (path for name in FILE_NAMES for path in find_files(raw, name)):
        split = "train" if path.parent == raw else infer_split(path, raw) or "train"
        if split in files:
            raise make_split_error(files[split].path, path, raw, split)
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            content["images"] = [_shorten_local_url(image) for image in content["images"]]
        folder = path.parent.relative_to(raw).as_posix()
        files[split] = InstanceFile(path, content, split, [f"{folder}/images", folder])
    return read_instance_files(raw, [*files.values()], repaired)


def _shorten_local_url(image: object) -> object:
    """Returns the entry of an image with the path in the place of a URL of local files."""
    if isinstance(image, dict) and isinstance(image.get("file_name"), str):
        return image | {"file_name": image["file_name"].rpartition(LOCAL_FILES)[2]}
    return image
