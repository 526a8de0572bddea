"""Images in class folders, as torchvision reads them: ImageNet's, Kaggle's and CIFAR's.

Labels count the sorted class folders from 0, as ImageNet's do.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from beit3.data.prepare.formats.class_names import (
    NAME_FILES,
    ClassifiedImages,
    find_class_names,
    find_files_above,
)
from beit3.data.prepare.formats.delimited import open_table
from beit3.data.prepare.formats.files import (
    find_files,
    find_folder,
    make_unknown_error,
    name_kind,
    walk_files,
)
from beit3.data.prepare.formats.image_folders import is_image
from beit3.data.prepare.formats.split_names import SPLITS, SplitRecord, choose_split

KAGGLE_FOLDER = "ILSVRC/Data/CLS-LOC"
"""Where the images of Kaggle's ImageNet lie."""
VAL_CLASSES = "LOC_val_solution.csv"
"""Kaggle's list of the classes of ImageNet's val images, which lie in no class folders."""


def read_class_folders(raw: str | Path) -> ClassifiedImages:
    """Reads train/<class>/, val/<class>/ and test/<class>/ (or synonyms), with images at any depth.

    Records are {id: path relative to `raw`, image, label}. test is val where there is no val. With
    neither, or with class folders right in `raw`, 5 % are held out. Images right in test/ have no
    label; those right in val/ need Kaggle's LOC_val_solution.csv beside it or above.

    Raises:
        ValueError: There are no class folders, or a split has a class that the training folder
            lacks. All folders are checked before the first record.
    """
    raw = _enter_kaggle_folder(find_folder(raw))
    split_folders = _find_split_folders(raw)
    training_folder = split_folders.get("train", split_folders.get("val", raw / "train"))
    classes = _list_class_folders(training_folder)
    if not classes:
        raise make_unknown_error(raw, "train/<class>/ and val/<class>/ with images (class_folders)")
    val_classes = _read_val_classes(raw, split_folders)
    _check_classes(split_folders, val_classes, set(classes))
    labels = {name: label for label, name in enumerate(classes)}
    records = _read_folders(raw, split_folders, labels, val_classes)
    return ClassifiedImages(find_class_names(raw, classes), records)


def is_class_folders(raw: Path) -> bool:
    """Returns whether `raw` holds class folders, in split folders or on their own."""
    return bool(_find_split_folders(_enter_kaggle_folder(raw)))


# Folders ------------------------------------------------------------------------------------------


def _enter_kaggle_folder(raw: Path) -> Path:
    """Returns the folder of Kaggle's ImageNet that holds train and val, else `raw`."""
    kaggle_folder = raw / KAGGLE_FOLDER
    return kaggle_folder if kaggle_folder.is_dir() else raw


def _find_split_folders(raw: Path) -> dict[str, Path]:
    """Returns split -> the folder of its class folders.

    It is {"train": raw} for class folders on their own, and empty where there are none.
    """
    split_folders = _find_named_splits(raw)
    if not any(_list_class_folders(folder) for folder in split_folders.values()):
        # A single folder named after a split may be one of the classes.
        is_dataset = len(split_folders) <= 1 and _holds_class_folders(raw)
        return {"train": raw} if is_dataset else {}
    if "val" not in split_folders and _list_class_folders(split_folders.get("test", raw / "test")):
        split_folders["val"] = split_folders.pop("test")
    return split_folders


def _find_named_splits(raw: Path) -> dict[str, Path]:
    """Returns split -> the folder in `raw` that is named after it."""
    split_folders: dict[str, Path] = {}
    for name in _list_class_folders(raw):
        split = SPLITS.get(name.lower(), "")
        if split in split_folders:
            raise ValueError(
                f"{split_folders[split]} and {raw / name} are both {split}: keep one of them"
            )
        if split:
            split_folders[split] = raw / name
    return split_folders


def _holds_class_folders(raw: Path) -> bool:
    """Returns whether at least two folders in `raw` hold images and are not named after splits."""
    folders = [raw / name for name in _list_class_folders(raw) if name.lower() not in SPLITS]
    return sum(any(map(is_image, folder.iterdir())) for folder in folders) > 1


def _list_class_folders(folder: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder; empty where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"
    )


def _check_classes(
    split_folders: Mapping[str, Path], val_classes: Mapping[str, str], classes: set[str]
) -> None:
    """Raises ValueError for a class folder or a class of a val image that train/ does not have."""
    for split, folder in split_folders.items():
        class_folders = _list_class_folders(folder)
        if split == "train" and not class_folders:
            raise ValueError(
                f"{folder} holds no class folders: sort its images into {folder}/<class>/"
            )
        for name in class_folders:
            if name not in classes:
                raise ValueError(
                    f"{folder / name} is not a class of the training folder: remove it, or add it "
                    "there"
                )
    for image, name in val_classes.items():
        if name not in classes:
            raise ValueError(
                f"{VAL_CLASSES} says that {image} is {name[:30]!r}, which is not a class of the "
                "training folder: add it there"
            )


# Kaggle's val split -------------------------------------------------------------------------------


def _read_val_classes(raw: Path, split_folders: Mapping[str, Path]) -> dict[str, str]:
    """Returns image -> class for a val folder without class folders, else an empty dict."""
    folder = split_folders.get("val")
    if folder is None or _list_class_folders(folder):
        return {}
    files = [*find_files(raw, VAL_CLASSES), *find_files_above(raw, VAL_CLASSES)]
    if not files:
        raise ValueError(
            f"{folder} holds no class folders: sort its images into {folder}/<class>/, or put "
            f"{VAL_CLASSES} beside it"
        )
    return _parse_val_classes(files[0])


def _parse_val_classes(file: Path) -> dict[str, str]:
    """Returns image -> class of lines like `ILSVRC2012_val_00000001,n01440764 1 2 3 4`."""
    rows = [cells for _, cells in open_table(file).rows]
    if not all(len(row) == 2 and row[1].split() for row in rows):
        raise ValueError(
            f"{file} has lines that are not `image,class and boxes`: download it again"
        )
    return {image: boxes.split()[0] for image, boxes in rows}


# Records ------------------------------------------------------------------------------------------


def _read_folders(
    raw: Path,
    split_folders: Mapping[str, Path],
    labels: Mapping[str, int],
    val_classes: Mapping[str, str],
) -> Iterator[SplitRecord]:
    """Yields the images of all splits with their labels."""
    has_val = "val" in split_folders
    for split, folder in split_folders.items():
        for path in walk_files(folder):
            record_id = path.relative_to(raw).as_posix()
            if not is_image(path):
                if path.name not in NAME_FILES:
                    yield split, {"id": record_id, "left_out": name_kind(path)}
                continue
            record = {"id": record_id, "image": str(path)}
            class_name = _find_class(path.relative_to(folder).parts, split, val_classes)
            if class_name:
                labeled = record | {"label": labels[class_name]}
                yield choose_split(split, record_id, has_val=has_val), labeled
            elif split == "test":
                yield split, record
            elif split == "val" and val_classes:
                yield split, {"id": record_id, "fault": f"{VAL_CLASSES} has no line about it"}
            else:
                yield split, {"id": record_id, "left_out": "images in no class folder"}


def _find_class(parts: Sequence[str], split: str, val_classes: Mapping[str, str]) -> str:
    """Returns the class of an image by its path in the split's folder, else ""."""
    if len(parts) > 1:
        return parts[0]
    return val_classes.get(Path(parts[0]).stem, "") if split == "val" else ""
