"""Images with one class each: ImageNet's and CIFAR's class folders, a list of classes, tables.

All give (names, iterator of (split, {id, image, label})): names in the order of the labels, which
count the sorted classes
from 0, as ImageNet's do; numbers in a table are the labels themselves.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from beit3.data.prepare.formats.files import (
    SPLITS,
    Listing,
    Pair,
    folder,
    found,
    nothing_known,
    or_held_out,
    walk,
)
from beit3.data.prepare.formats.folders import IMAGES
from beit3.data.prepare.formats.tables import IMAGE_COLUMNS, Row, table_rows
from beit3.files import read_lines

Classes = tuple[tuple[str, ...], Iterator[Pair]]

LABEL_COLUMNS = ("label", "class", "category", "label_name", "class_name")
# Files that name the classes, beside their folders; the first is Kaggle's of ImageNet.
NAMES = ("LOC_synset_mapping.txt", "classes.tsv", "classes.txt")
# Kaggle's ImageNet: where its images are, and the classes of those in its val/, which has no
# folders.
KAGGLE = "ILSVRC/Data/CLS-LOC"
VAL_CLASSES = "LOC_val_solution.csv"
MOST_CLASSES = 100_000
"""Beyond it a number in a table is no label; ImageNet-21k has 21,841 classes."""


def class_folders(raw: str | Path) -> Classes:
    """train/<class>/, val/<class>/, test/<class>/ (or synonyms), images at any depth: {id: path
    below `raw`, image, label}.

    test is val where there is no val. Without either, or with class folders right in `raw`, 5 % are
    held out. Images right
    in test/ have no label; those right in val/ need Kaggle's LOC_val_solution.csv beside it or
    above.
    """
    raw = _inside(folder(raw))
    places = _places(raw)
    classes = _class_folders(places.get("train", places.get("val", raw / "train")))
    if not classes:
        raise nothing_known(raw, "train/<class>/ and val/<class>/ with images (class_folders)")
    flat = _checked(raw, places, classes)
    return _names(raw, classes), _folder_records(
        raw, places, {each: label for label, each in enumerate(classes)}, flat
    )


def class_list(raw: str | Path) -> Classes:
    """`classes.tsv` of index, class, name, file, with the images in `images/`, all of them train:
    {id: file, image, label}."""
    raw = folder(raw)
    file = raw / "classes.tsv"
    rows = [
        (number, line.rstrip("\r\n").split("\t"))
        for number, line in enumerate(read_lines(file), 1)
        if line.strip()
    ]
    for number, cells in rows:
        if len(cells) != 4:
            raise ValueError(
                f"{file} line {number} has {len(cells)} cells: give index, class, name and file"
            )
    classes = sorted({cells[1] for _, cells in rows})
    labels = {each: label for label, each in enumerate(classes)}
    listing = Listing(raw, "images", "")
    records = (
        ("train", {"id": image, "image": listing.find(image), "label": labels[each]})
        for _, (_, each, _, image) in rows
    )
    return _names(raw, classes), records


def class_tables(raw: str | Path) -> Classes:
    """Tables with image and label (the class's name, or the label itself), perhaps id and split:
    {id: image, image, label}.

    A row without a label is a fault, unless it is of a test split. Labels beyond the classes that a
    classes.txt names are a
    ValueError; without one the largest label says how many there are.
    """
    raw = Path(raw).absolute()
    rows = list(table_rows(raw, {"image": IMAGE_COLUMNS, "label": LABEL_COLUMNS}))
    # By path: the images of train/ and test/ may have the same names.
    uses = Counter(os.path.normpath(row.path) for row in rows)
    place = raw if raw.is_dir() else raw.parent
    given = {str(row.cells["label"]) for row in rows if not row.fault} - {""}
    if given and all(each.isdecimal() for each in given):
        classes = _numbered(place, rows)
        labels = {each: int(each) for each in given}
    else:
        classes = sorted(given)
        labels = {each: label for label, each in enumerate(classes)}

    def records() -> Iterator[Pair]:
        for row in rows:
            label = str(row.cells.get("label", ""))
            fault = row.fault or ("it has no label" if not label and row.split != "test" else "")
            count = uses[os.path.normpath(row.path)]
            if fault or count > 1:
                yield (
                    row.split,
                    {
                        "id": row.where,
                        "fault": fault or f"{row.image} has {count} rows, and can have one class",
                    },
                )
                continue
            record = {"id": str(row.cells["id"]) or row.image, "image": row.path}
            yield row.split, record | ({"label": labels[label]} if label else {})

    return _names(place, classes), records()


def is_class_folders(raw: Path) -> bool:
    """Whether `raw` holds class folders, in split folders or on their own."""
    return bool(_places(_inside(raw)))


def is_class_list(raw: Path) -> bool:
    """Whether `raw` holds a classes.tsv that names image files."""
    file = raw / "classes.tsv"
    return file.is_file() and _is_image(Path(next(read_lines(file), "").strip()))


def _inside(raw: Path) -> Path:
    """The folder of Kaggle's ImageNet that holds train and val; else `raw`."""
    return raw / KAGGLE if (raw / KAGGLE).is_dir() else raw


def _places(raw: Path) -> dict[str, Path]:
    """Split -> its folder of class folders; {"train": raw} for class folders on their own; {} where
    there are none."""
    places: dict[str, Path] = {}
    for each in _class_folders(raw):
        name = SPLITS.get(each.lower(), "")
        if name in places:
            raise ValueError(f"{places[name]} and {raw / each} are both {name}: keep one of them")
        places |= {name: raw / each} if name else {}
    if not any(map(_class_folders, places.values())):
        if len(places) > 1:
            return {}
        # One of the classes may be called "train".
        own = [each for each in _class_folders(raw) if each.lower() not in SPLITS]
        return (
            {"train": raw}
            if sum(any(map(_is_image, (raw / each).iterdir())) for each in own) > 1
            else {}
        )
    if "val" not in places and _class_folders(places.get("test", raw / "test")):
        places["val"] = places.pop("test")
    return places


def _class_folders(place: Path) -> list[str]:
    """Sorted names of the folders in a folder; [] where there is none."""
    return (
        sorted(path.name for path in place.iterdir() if path.is_dir() and path.name[0] not in "._")
        if place.is_dir()
        else []
    )


def _checked(raw: Path, places: dict[str, Path], classes: Sequence[str]) -> dict[str, str]:
    """ValueError for a folder that is no class; else the classes of the images right in val/, {}
    where it has class folders."""
    flat: dict[str, str] = {}
    known = set(classes)
    for name, place in places.items():
        inside = _class_folders(place)
        if name == "val" and not inside:
            flat = _val_classes(raw, place)
        elif name == "train" and not inside:
            raise ValueError(
                f"{place} holds no class folders: sort its images into {place}/<class>/"
            )
        for each in sorted(set(inside) - known)[:1]:
            raise ValueError(
                f"{place / each} is no class of the training folder: remove it, or add it there"
            )
    for image, each in flat.items():
        if each not in known:
            raise ValueError(
                f"{VAL_CLASSES} says that {image} is {each[:30]!r}, which is no class of the "
                "training folder: add it there"
            )
    return flat


def _val_classes(raw: Path, place: Path) -> dict[str, str]:
    """Image -> class as Kaggle lists ImageNet's val: `ILSVRC2012_val_00000001,n01440764 1 2 3
    4`."""
    file = next(iter([*found(raw, VAL_CLASSES), *_above(raw, VAL_CLASSES)]), None)
    if file is None:
        raise ValueError(
            f"{place} holds no class folders: sort its images into {place}/<class>/, or put "
            f"{VAL_CLASSES} beside it"
        )
    rows = [row for row in csv.reader(read_lines(file)) if row][1:]
    if not all(len(row) == 2 and row[1].split() for row in rows):
        raise ValueError(
            f"{file} has lines that are not `image,class and boxes`: download it again"
        )
    return {image: boxes.split()[0] for image, boxes in rows}


def _above(raw: Path, name: str) -> list[Path]:
    """Files of this name up to where Kaggle unpacks them, three folders above the images."""
    return [parent / name for parent in raw.parents[:3] if (parent / name).is_file()]


def _folder_records(
    raw: Path, places: dict[str, Path], labels: Mapping[str, int], flat: Mapping[str, str]
) -> Iterator[Pair]:
    for name, place in places.items():
        for path in walk(place):
            if not _is_image(path):
                continue
            key, parts = path.relative_to(raw).as_posix(), path.relative_to(place).parts
            record = {"id": key, "image": str(path)}
            given = parts[0] if len(parts) > 1 else flat.get(path.stem, "") if name == "val" else ""
            if given:
                yield (
                    or_held_out(name, key, has_val="val" in places),
                    record | {"label": labels[given]},
                )
            elif name == "test":
                yield name, record
            elif name == "val" and flat:
                yield name, {"id": key, "fault": f"{VAL_CLASSES} has no line about it"}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def _names(raw: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Readable names of the classes, from the first of `NAMES` in `raw` or right below it (Kaggle's
    also above), else their own."""
    files = _names_files(raw)
    given = _named(files[0], classes) if files else {}
    return tuple(
        " ".join(given.get(each, each).replace("_", " ").split()) or each for each in classes
    )


def _names_files(raw: Path) -> list[Path]:
    return [file for name in NAMES for file in found(raw, name)] + _above(raw, NAMES[0])


def _numbered(raw: Path, rows: Sequence[Row]) -> list[str]:
    """The classes 0, 1, ... of a table of numbers: as many as `NAMES` has lines, else up to the
    largest label."""
    file = next(iter(found(raw, NAMES[2])), None)
    count = sum(1 for line in read_lines(file) if line.strip()) if file else MOST_CLASSES
    numbers = {
        row.where: int(row.cells["label"])
        for row in rows
        if not row.fault and str(row.cells["label"])
    }
    where = max(numbers, key=lambda where: numbers[where])
    if numbers[where] >= count:
        limit = (
            f"{file} names {count} classes, 0 to {count - 1}"
            if file
            else f"labels go up to {count - 1}"
        )
        raise ValueError(
            f"{where} has label {numbers[where]}, but {limit}: number them from 0, or write names"
        )
    return [str(label) for label in range(count if file else numbers[where] + 1)]


def _named(file: Path, classes: Sequence[str]) -> dict[str, str]:
    """Class -> name: from lines that hold a class and its name, else from as many lines as there
    are classes, in their order."""
    rows = [line.strip() for line in read_lines(file) if line.strip()]
    known = set(classes)
    named: dict[str, str] = {}
    for row in rows:
        cells = row.split("\t") if "\t" in row else row.split(maxsplit=1)
        if row.replace(" ", "_") not in known:  # a line that is a class itself has no other name
            named |= {
                one: name for one, name in zip(cells[:2], cells[1:3], strict=False) if one in known
            }
    if named and file.name == NAMES[0]:
        # "tench, Tinca tinca": the first of the synonyms, unless two classes share it.
        uses = Counter(name.partition(",")[0] for name in named.values())
        named = {
            one: first if uses[first := name.partition(",")[0]] == 1 else name
            for one, name in named.items()
        }
    if named or file.name == NAMES[0]:
        return named
    if len(rows) != len(classes) or known & {row.replace(" ", "_") for row in rows}:
        return {}
    order = sorted(classes, key=int) if all(each.isdecimal() for each in classes) else classes
    return dict(zip(order, rows, strict=True))
