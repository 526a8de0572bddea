"""Reads folders as mmsegmentation expects them of own datasets: img_dir/{train,val} with
ann_dir/{train,val}, and images/{train,val} with annotations/{train,val} (or masks, or labels).

In mmsegmentation 0 is the first class unless its config says `reduce_zero_label`. A list of the
names beside the folders tells: where the largest number equals the number of names, 0 is
unlabeled. Without a list 0 is a class in img_dir and ann_dir, whose owner followed mmsegmentation;
elsewhere 0 is refused, because ADE20K's folders, in which it is unlabeled, are called almost the
same. 255 is ignored.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from beit3.data.prepare.formats.files import find_folder, walk_files
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.label_map_numbers import LabelNumbers, check_numbers, name_by_number
from beit3.data.prepare.formats.label_maps import (
    LABEL_MAP_SUFFIXES,
    LabelMapDataset,
    SplitFolders,
    keep_existing,
    make_records,
    read_listed_names,
    read_split_numbers,
)
from beit3.data.prepare.formats.split_names import find_folder_splits
from beit3.data.views.label_maps import IGNORE_INDEX

FOLDERS = (
    ("img_dir", "ann_dir"),
    ("images", "annotations"),
    ("images", "masks"),
    ("images", "labels"),
)
MAP_ENDINGS = (
    "",
    "_labelTrainIds",
    "_instance_color_RGB",
    "_mask",
    "_label",
    "_labels",
    "_gt",
    "_seg",
    "_segmentation",
)
"""What the names of label maps end in, beyond those of their images; the first that fits counts."""
NUMBERED_FROM_0 = ("_labelTrainIds", "_instance_color_RGB")
"""Endings of which it is known that 0 is a class."""


def is_mmseg(raw: Path) -> bool:
    """Returns whether there are folders as mmsegmentation expects them."""
    return bool(_find_splits(raw))


def read_mmseg(raw: str | Path, *, counts: Counter[str] | None = None) -> LabelMapDataset:
    """Reads a folder of this layout; `counts` counts what is odd.

    Raises:
        ValueError: No list tells whether 0 is a class, no class is left in the label maps, or two
            folders are of one split.
    """
    raw = find_folder(raw)
    splits = _find_splits(raw)
    numbers = read_split_numbers(splits)
    names = read_listed_names(raw)
    reduce_zero = _is_zero_unlabeled(raw, splits, numbers, names)
    options = {"reduce_zero": reduce_zero, "ignore": IGNORE_INDEX}
    names = names or name_by_number(numbers, start=int(reduce_zero))
    check_numbers(numbers, names, options, raw)
    return LabelMapDataset(names, options, make_records(splits, numbers, names, options, counts))


def _is_zero_unlabeled(
    raw: Path, splits: list[SplitFolders], numbers: LabelNumbers, names: tuple[str, ...]
) -> bool:
    """Returns whether the classes are numbered from 1; ValueError where nothing tells."""
    if any(split.map_ending in NUMBERED_FROM_0 for split in splits):
        return False
    if names:
        return numbers.largest == len(names)
    if 0 not in numbers.all:
        return bool(numbers.all)
    if (raw / "ann_dir").is_dir() or numbers.all == {0}:
        return False
    largest = numbers.largest
    raise ValueError(
        f"the label maps of {raw} hold 0 to {largest}, and 0 may be a class, as in "
        "mmsegmentation, or unlabeled, as in ADE20K: write the names into classes.txt there, "
        f"{largest + 1} of them if 0 is the first class, or {largest} if it is unlabeled"
    )


def _find_splits(raw: Path) -> list[SplitFolders]:
    """Returns the splits of the first pair of folders that has label maps."""
    for image_name, map_name in FOLDERS:
        images, maps = raw / image_name, raw / map_name
        if not images.is_dir() or not maps.is_dir():
            continue
        folder_splits = find_folder_splits(images)
        if len(set(folder_splits.values())) < len(folder_splits):
            raise ValueError(
                f"{images} holds {', '.join(sorted(folder_splits))}, of which two are one split: "
                "keep one of them"
            )
        splits = keep_existing(
            SplitFolders(split, images / name, maps / name)
            for name, split in sorted(folder_splits.items())
        )
        if splits:
            return [_find_ending(split) for split in splits]
    return []


def _find_ending(folders: SplitFolders) -> SplitFolders:
    """Returns the folders of a split with the ending of its label maps."""
    if folders.label_maps is None or not folders.label_maps.is_dir():
        return folders._replace(label_maps=None) if folders.split == "test" else folders
    images = _list_stems(folders.images, filter(is_image, walk_files(folders.images)))
    maps = _list_stems(
        folders.label_maps,
        (p for p in walk_files(folders.label_maps) if p.suffix.lower() in LABEL_MAP_SUFFIXES),
    )
    for ending in MAP_ENDINGS:
        if any(f"{stem}{ending}" in maps for stem in images):
            return folders._replace(map_ending=ending)
    return folders


def _list_stems(folder: Path, paths: Iterable[Path]) -> set[str]:
    """Returns the paths below `folder` without their suffixes."""
    return {path.relative_to(folder).with_suffix("").as_posix() for path in paths}
