"""Reads Visual Genome's region descriptions, which are part of the paper's pretraining pairs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import (
    ImageFinder,
    find_files,
    find_folder,
    find_single_file,
    get_field,
)
from beit3.data.prepare.formats.json_lists import stream_json_list
from beit3.data.prepare.formats.split_names import Record, SplitRecord, choose_split

FILE_NAME = "region_descriptions.json"
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images", "images/VG_100K", "images/VG_100K_2", "images2")


def read_region_descriptions(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads region_descriptions.json: (split, {id: "vg-<region>", image, text}) per phrase.

    The image is the entire one, with all of its 50 phrases in one split: 5 % of the images are
    held out. A phrase that is empty is {id, fault}.
    """
    file = find_single_file(raw, FILE_NAME, "Visual Genome's region descriptions")
    folder = find_folder(raw) if Path(raw).is_dir() else file.parent
    image_finder = ImageFinder(folder, *IMAGE_FOLDERS, "", also=[file.parent.parent])
    for location, entry in stream_json_list(file):
        regions = get_field(entry, "regions", list, location)
        image_id = _get_image_id(entry, regions, location)
        path = image_finder.find(f"{image_id}.jpg", f"{image_id}.png")
        split = choose_split("train", str(image_id), has_val=False)
        for number, region in enumerate(regions):
            region_location = f"{location} regions[{number}]"
            text = get_field(region, "phrase", str, region_location)
            id = region.get("region_id", region.get("id", f"{image_id}-{number}"))
            yield split, {"id": f"vg-{id}", "image": path, "text": " ".join(text.split())}


def _get_image_id(entry: Record, regions: list[Any], location: str) -> int:
    """Returns the number of an entry's image, which the first version tells with each region."""
    for name in ("id", "image_id"):
        if name in entry:
            return get_field(entry, name, int, location)
    if not regions:
        return get_field(entry, "id", int, location)
    return get_field(regions[0], "image_id", int, f"{location} regions[0]")


def is_region_descriptions(raw: Path) -> bool:
    """Returns whether `raw` is or holds region_descriptions.json."""
    if raw.is_file():
        return raw.name == FILE_NAME
    return bool(find_files(raw, FILE_NAME))
