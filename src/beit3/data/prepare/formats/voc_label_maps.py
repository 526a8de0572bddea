"""Reads Pascal VOC's label maps: SegmentationClass/*.png, JPEGImages/ and the lists in
ImageSets/Segmentation.

0 is the background, which is a class, and 255 marks the borders, which are ignored. VOC's own
images, which their names tell, have its 20 further classes. Others have those of a list beside the
folders, with or without the background, or are called by their numbers.
"""

from collections import Counter
from pathlib import Path

from beit3.data.prepare.formats.label_map_numbers import LabelNumbers, check_numbers, name_by_number
from beit3.data.prepare.formats.label_maps import (
    LabelMapDataset,
    SplitFolders,
    find_label_maps,
    make_records,
    read_listed_names,
    read_split_numbers,
)
from beit3.data.prepare.formats.voc import (
    IMAGE_FOLDERS,
    VOC_CLASSES,
    choose_voc_folder,
    find_voc_folders,
    is_original,
    read_split_lists,
)
from beit3.data.views.label_maps import IGNORE_INDEX

LABEL_MAP_FOLDERS = ("SegmentationClass", "SegmentationClassPNG")
BACKGROUND_NAMES = ("background", "_background_", "__background__")
IGNORED_NAME = "__ignore__"
"""labelme's name for 255, in the first line of its lists."""


def is_voc_label_maps(raw: Path) -> bool:
    """Returns whether there is a folder of VOC's label maps."""
    return bool(find_voc_folders(raw, LABEL_MAP_FOLDERS))


def read_voc_label_maps(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads `raw`, or the folder of one year below it.

    Without lists in ImageSets/Segmentation, every image with a label map is train. `counts` counts
    what is odd. Raises ValueError for two years, and for label maps in which no class is left.
    """
    folder = choose_voc_folder(raw, LABEL_MAP_FOLDERS)
    splits = _find_splits(folder)
    num_unlisted = len(find_label_maps(splits[0]._replace(keys=None)))
    num_unlisted -= sum(len(find_label_maps(split)) for split in splits)
    if num_unlisted > 0 and counts is not None:
        counts["label maps that no list names, passed over"] += num_unlisted
    numbers = read_split_numbers(splits)
    names = _name_classes(folder, splits, numbers)
    options = {"reduce_zero": False, "ignore": IGNORE_INDEX}
    check_numbers(numbers, names, options, folder)
    return LabelMapDataset(names, options, make_records(splits, numbers, names, options, counts))


def _find_splits(folder: Path) -> list[SplitFolders]:
    """Returns the splits that the lists give, else train with all label maps."""
    maps = next(folder / name for name in LABEL_MAP_FOLDERS if (folder / name).is_dir())
    images = next(folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir())
    splits: list[SplitFolders] = []
    keys_by_split: dict[str, set[str]] = {}
    for stem, split in read_split_lists(folder, "Segmentation").items():
        keys_by_split.setdefault(split, set()).add(stem)
    for split, stems in keys_by_split.items():
        splits.append(SplitFolders(split, images, maps, keys=frozenset(stems)))
    if not splits:
        train = SplitFolders("train", images, maps)
        return [train._replace(keys=frozenset(find_label_maps(train)))]
    return [
        folders._replace(label_maps=None)
        if folders.split == "test" and not find_label_maps(folders)
        else folders
        for folders in splits
    ]


def _name_classes(
    folder: Path, splits: list[SplitFolders], numbers: LabelNumbers
) -> tuple[str, ...]:
    """Returns the names of the classes from 0, the background, on."""
    names = tuple(name for name in read_listed_names(folder) if name != IGNORED_NAME)
    if names:
        has_background = names[0].lower() in BACKGROUND_NAMES or numbers.largest < len(names)
        return names if has_background else ("background", *names)
    keys = [key for split in splits for key in split.keys or ()]
    if is_original(folder, "Segmentation", keys) and numbers.largest <= len(VOC_CLASSES):
        return ("background", *VOC_CLASSES)
    return ("background", *name_by_number(numbers, start=1))
