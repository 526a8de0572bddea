"""Folders of images and label maps as ADE20K, CamVid and Cityscapes publish them.

A record is {id: path in its split's folder without the ending, image, label_map}. A label map holds
numbers in one channel, which stay as they are. What they mean, the options say
(label_map_numbers.py). Every label map is read once, so that numbers which are no class are found
before training.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from beit3.data.prepare.formats.class_names import keep_first_synonyms
from beit3.data.prepare.formats.files import find_folder, walk_files
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.label_map_numbers import (
    LabelNumbers,
    Options,
    check_numbers,
    find_wrong_number,
    has_labels,
    name_by_number,
    read_all_numbers,
)
from beit3.data.prepare.formats.split_names import SPLITS, SplitRecord, choose_split
from beit3.data.stores.label_names import read_class_names
from beit3.data.views.label_maps import IGNORE_INDEX, INDEXED_MODES
from beit3.files import read_lines
from beit3.images import open_with_pillow, read_upright_size

LABEL_MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
"""Endings of files that keep numbers as they are; JPEG does not."""
CLASS_LISTS = ("classes.txt", "class_names.txt", "labels.txt")
"""Lists of the classes' names beside the folders; the first that exists counts."""


# SegNet's selection of CamVid, in the order of its labels; 11 is unlabelled.
CAMVID_CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)

# The classes of Cityscapes that are trained (labels.py of cityscapesScripts), and their numbers in
# *_labelIds.png, 0 to 33.
CITYSCAPES_CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
NUM_CITYSCAPES_IDS = 34


class LabelMapDataset(NamedTuple):
    """A dataset of images with a label for every pixel."""

    class_names: tuple[str, ...]
    """In the order of the labels."""
    options: Options
    """What the numbers in the label maps mean."""
    records: Iterator[SplitRecord]


class SplitFolders(NamedTuple):
    """The folders of one split, and how the names of its files end before their suffix."""

    split: str
    images: Path
    label_maps: Path | None
    """None if they are not published."""
    image_ending: str = ""
    map_ending: str = ""
    keys: frozenset[str] | None = None
    """The images that belong to the split; None for all in the folder."""


# Layouts ------------------------------------------------------------------------------------------


def is_ade20k(raw: Path) -> bool:
    """Returns whether there are images/training and annotations/training, or validation."""
    return bool(_find_ade20k_splits(raw))


def read_ade20k(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads ADE20K, in which 0 is no class.

    Names come from objectInfo150.txt or one of `CLASS_LISTS` beside the folders. Without them the
    classes are called 1, 2, ... up to the largest number in all label maps.

    Raises:
        ValueError: The label maps hold no class, or 0 and 1 alone without a list of names.
    """
    splits = _find_ade20k_splits(find_folder(raw))
    top = splits[0].images.parents[1]
    names = _read_object_info(top / "objectInfo150.txt") or read_listed_names(top)
    numbers = read_split_numbers(splits)
    options = {"reduce_zero": True, "ignore": IGNORE_INDEX}
    if not names and numbers.all == {0, 1}:
        raise ValueError(
            f"the label maps of {top} hold 0 and 1 alone, and 0 may be unlabeled, as in ADE20K, or "
            "a class: write 1 and 2 for two classes; or name the one class in classes.txt"
        )
    names = names or name_by_number(numbers, start=1)
    check_numbers(numbers, names, options, top)
    return LabelMapDataset(names, options, make_records(splits, numbers, names, options, counts))


def is_camvid(raw: Path) -> bool:
    """Returns whether there are train and trainannot, or val and valannot."""
    return bool(_find_camvid_splits(raw))


def read_camvid(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads CamVid with SegNet's eleven classes, or those of a list beside its folders.

    The number after the last class is unlabelled.
    """
    raw = find_folder(raw)
    splits = _find_camvid_splits(raw)
    names = read_listed_names(raw) or CAMVID_CLASSES
    options = {"reduce_zero": False, "ignore": len(names)}
    numbers = read_split_numbers(splits)
    check_numbers(numbers, names, options, raw)
    return LabelMapDataset(names, options, make_records(splits, numbers, names, options, counts))


def is_cityscapes(raw: Path) -> bool:
    """Returns whether there are leftImg8bit/train and gtFine/train, or val."""
    return bool(_find_cityscapes_splits(raw))


def read_cityscapes(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads Cityscapes with its 19 trained classes.

    *_labelTrainIds.png are read where there are some, else *_labelIds.png with their lookup. The
    published maps of test are empty: its records have none.
    """
    raw = find_folder(raw)
    splits = _find_cityscapes_splits(raw)
    options: Options = {"reduce_zero": False, "ignore": IGNORE_INDEX}
    ending = "_gtFine_labelTrainIds"
    if not any((raw / "gtFine").glob("*/*/*_gtFine_labelTrainIds.png")):
        ending = "_gtFine_labelIds"
        labels = {number: label for label, number in enumerate(CITYSCAPES_CLASSES.values())}
        options["lookup"] = [
            labels.get(number, IGNORE_INDEX) for number in range(NUM_CITYSCAPES_IDS)
        ]
    splits = [split._replace(image_ending="_leftImg8bit", map_ending=ending) for split in splits]
    names, numbers = tuple(CITYSCAPES_CLASSES), read_split_numbers(splits)
    check_numbers(numbers, names, options, raw)
    return LabelMapDataset(names, options, make_records(splits, numbers, names, options, counts))


def _find_ade20k_splits(raw: Path) -> list[SplitFolders]:
    """Finds images/training and annotations/training, and validation alike.

    They may lie in ADEChallengeData2016, as the zip file unpacks.
    """
    if (raw / "ADEChallengeData2016").is_dir():
        raw = raw / "ADEChallengeData2016"
    return keep_existing(
        SplitFolders(SPLITS[name], raw / "images" / name, raw / "annotations" / name)
        for name in ("training", "validation")
    )


def _find_camvid_splits(raw: Path) -> list[SplitFolders]:
    """Finds train and trainannot, and val and test alike; a test may have no label maps."""
    splits = keep_existing(
        SplitFolders(name, raw / name, raw / f"{name}annot") for name in ("train", "val", "test")
    )
    return [
        split._replace(label_maps=None)
        if split.split == "test" and not _is_folder(split.label_maps)
        else split
        for split in splits
    ]


def _find_cityscapes_splits(raw: Path) -> list[SplitFolders]:
    """Finds leftImg8bit/{train,val,test} and gtFine/{train,val}."""
    splits = keep_existing(
        SplitFolders(name, raw / "leftImg8bit" / name, raw / "gtFine" / name)
        for name in ("train", "val")
    )
    test_images = raw / "leftImg8bit" / "test"
    if splits and test_images.is_dir():
        splits.append(SplitFolders("test", test_images, None))
    return splits


def keep_existing(splits: Iterable[SplitFolders]) -> list[SplitFolders]:
    """Returns the splits with a folder of images; none if no split has a folder of label maps."""
    existing = [split for split in splits if split.images.is_dir()]
    return existing if any(_is_folder(split.label_maps) for split in existing) else []


def _is_folder(path: Path | None) -> bool:
    """Returns whether there is a folder at `path`."""
    return path is not None and path.is_dir()


# Records ------------------------------------------------------------------------------------------


def read_split_numbers(splits: Sequence[SplitFolders]) -> LabelNumbers:
    """Reads the numbers of all label maps of all splits."""
    return read_all_numbers(path for split in splits for path in find_label_maps(split).values())


def make_records(
    splits: Sequence[SplitFolders],
    numbers: LabelNumbers,
    class_names: Sequence[str],
    options: Options,
    counts: Counter[str] | None = None,
) -> Iterator[SplitRecord]:
    """Yields the records of all splits.

    Label maps without a labeled pixel stay, and are counted in `counts`. Raises ValueError where a
    split for training or evaluation has no other.
    """
    has_val = any(folders.split == "val" for folders in splits)
    for folders in splits:
        label_maps = find_label_maps(folders)
        keys: set[str] = set()
        num_labeled = num_unlabeled = 0
        for path in filter(is_image, walk_files(folders.images)):
            if not path.stem.endswith(folders.image_ending):
                continue
            key = _make_key(path, folders.images, folders.image_ending)
            if folders.keys is not None and key not in folders.keys:
                continue
            split = choose_split(folders.split, key, has_val=has_val)
            if key in keys:
                fault = f"{path.name} is another image of this name"
            else:
                fault = _find_fault(path, key, folders, label_maps)
            if not fault and key in label_maps:
                label_map = label_maps[key]
                map_numbers = numbers.by_path[label_map]
                fault = numbers.faults.get(label_map, "")
                fault = fault or find_wrong_number(map_numbers, label_map, class_names, options)
            keys.add(key)
            if fault:
                yield split, {"id": key, "fault": fault}
                continue
            record = {"id": key, "image": str(path)}
            if key in label_maps:
                record["label_map"] = str(label_maps[key])
                is_labeled = has_labels(map_numbers, options)
                num_labeled += is_labeled
                num_unlabeled += not is_labeled
            yield split, record
        for key in sorted((folders.keys or frozenset()) - keys):
            split = choose_split(folders.split, key, has_val=has_val)
            yield split, {"id": key, "fault": f"image {folders.images / key}.jpg is missing"}
        if num_unlabeled and counts is not None:
            counts["label maps without a labeled pixel"] += num_unlabeled
        if num_unlabeled and not num_labeled and folders.split != "test":
            raise ValueError(
                f"none of the {num_unlabeled} label maps of {folders.split} in "
                f"{folders.label_maps} has a labeled pixel: get them again"
            )


def find_label_maps(folders: SplitFolders) -> dict[str, Path]:
    """Returns key of an image of the split -> its label map."""
    if folders.label_maps is None:
        return {}
    label_maps: dict[str, Path] = {}
    for path in walk_files(folders.label_maps):
        if path.suffix.lower() in LABEL_MAP_SUFFIXES and path.stem.endswith(folders.map_ending):
            key = _make_key(path, folders.label_maps, folders.map_ending)
            if folders.keys is None or key in folders.keys:
                label_maps[key] = path
    return label_maps


def _make_key(path: Path, folder: Path, ending: str) -> str:
    """Returns the key by which an image and its label map are joined.

    It is aachen/aachen_0 for leftImg8bit/train/aachen/aachen_0_leftImg8bit.png.
    """
    return (path.relative_to(folder).parent / path.stem.removesuffix(ending)).as_posix()


def _find_fault(
    image: Path, key: str, folders: SplitFolders, label_maps: Mapping[str, Path]
) -> str:
    """Returns what is wrong with the label map of an image, or "".

    An image that cannot be read is left to `prepare`.
    """
    if folders.label_maps is None:
        return ""
    if key not in label_maps:
        others = ", ".join(LABEL_MAP_SUFFIXES[1:])
        expected = f"{folders.label_maps / key}{folders.map_ending}{LABEL_MAP_SUFFIXES[0]}"
        return f"its label map {expected} is missing (or {others}; not .jpg)"
    label_map = label_maps[key]
    try:
        with open_with_pillow(label_map, f"its label map {label_map}") as header:
            mode, map_size = header.mode, header.size
    except ValueError as error:
        return str(error)
    if mode not in INDEXED_MODES:
        return f"its label map {label_map} is a color image ({mode}): give one channel of numbers"
    try:
        with open_with_pillow(image, f"image {image}") as header:
            image_size = read_upright_size(header)
    except ValueError:
        return ""
    if map_size == image_size:
        return ""
    return (
        f"its label map {label_map} has {map_size[0]} x {map_size[1]} pixels, the image "
        f"{image_size[0]} x {image_size[1]}"
    )


# Classes ------------------------------------------------------------------------------------------


def _read_object_info(file: Path) -> tuple[str, ...]:
    """Returns the names in ADE20K's objectInfo150.txt, each the first synonym if it is unique.

    The result is empty without the file.
    """
    if not file.is_file():
        return ()
    rows = [line.rstrip().split("\t") for line in read_lines(file) if line.strip()][1:]
    numbers = [row[0].strip() for row in rows]
    if not rows or numbers != [str(number) for number in range(1, len(rows) + 1)]:
        raise ValueError(
            f"{file} does not list Idx, ..., Name of the classes 1, 2, ...: take it from "
            "ADEChallengeData2016 again"
        )
    return tuple(keep_first_synonyms([" ".join(row[-1].split()) for row in rows]))


def read_listed_names(folder: Path) -> tuple[str, ...]:
    """Returns the names in the first of `CLASS_LISTS` in a folder; empty without a list."""
    files = [folder / name for name in CLASS_LISTS if (folder / name).is_file()]
    names = read_class_names(files[0]) if files else ()
    return tuple(" ".join(name.split()) for name in names)
