"""What Pascal VOC's objects and label maps share: the folder with JPEGImages, and its lists of
splits in ImageSets."""

import re
from collections.abc import Iterable
from pathlib import Path

from beit3.data.prepare.formats.files import ImageFinder, find_folder
from beit3.files import read_lines

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp", ".webp")
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The classes of Pascal VOC's own images."""

LIST_SPLITS = {"train": "train", "val": "val", "test": "test"}


def find_voc_folders(raw: str | Path, content: Iterable[str]) -> list[Path]:
    """Returns `raw` and the folders VOC* below it and in VOCdevkit that hold one of the folders
    `content`."""
    raw = Path(raw).absolute()
    folders = [raw, *sorted(raw.glob("VOC2*")), *sorted(raw.glob("VOCdevkit/VOC2*"))]
    return [folder for folder in folders if any((folder / name).is_dir() for name in content)]


def choose_voc_folder(raw: str | Path, content: Iterable[str]) -> Path:
    """Returns the only one of `find_voc_folders`; raises ValueError for several years."""
    folders = find_voc_folders(find_folder(raw), content)
    if len(folders) > 1:
        names = " and ".join(map(str, folders))
        raise ValueError(f"{names} are datasets of their own: give one of them as --raw")
    return folders[0]


def read_split_lists(folder: Path, kind: str) -> dict[str, str]:
    """Returns stem of an image -> split, of the lists in ImageSets/<kind>; {} without lists.

    Stems of trainval.txt that neither train.txt nor val.txt has are train. Raises ValueError for a
    stem that is in two lists.
    """
    lists = folder / "ImageSets" / kind
    splits: dict[str, str] = {}
    for name, split in LIST_SPLITS.items():
        for stem in _read_stems(lists / f"{name}.txt"):
            if splits.setdefault(stem, split) != split:
                raise ValueError(
                    f"{lists} has {stem} in {splits[stem]}.txt and in {name}.txt: keep it in one"
                )
    for stem in _read_stems(lists / "trainval.txt"):
        splits.setdefault(stem, "train")
    return splits


def is_original(folder: Path, kind: str, stems: Iterable[str]) -> bool:
    """Returns whether these are Pascal VOC's own images: there are lists in ImageSets/<kind>, and
    the names are like 2007_000032 or 000005."""
    has_lists = (folder / "ImageSets" / kind).is_dir()
    return has_lists and all(re.fullmatch(r"(20\d\d_)?\d{6}", stem) for stem in stems)


def find_voc_image(image_finder: ImageFinder, stem: str) -> str:
    """Returns the path of an image by its name without the ending."""
    path = Path(stem)
    folder = "" if len(path.parts) < 2 else path.parent.as_posix()
    return image_finder.find(*(f"{path.name}{ending}" for ending in IMAGE_ENDINGS), folder=folder)


def _read_stems(file: Path) -> list[str]:
    """Returns the first word of each line; [] without the file."""
    if not file.is_file():
        return []
    return [line.split()[0] for line in read_lines(file) if line.strip()]
