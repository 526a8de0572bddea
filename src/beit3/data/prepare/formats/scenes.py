"""Images with a label for every pixel: folders as ADE20K, CamVid and Cityscapes publish them -> one
record per image.

{id: its path in its split's folder without the ending, image, label_map}. A label map holds numbers
in one channel, which
stay as they are. What they mean stands in the options, beside the names of the classes:
`reduce_zero`: 0 is no class, 1 is
label 0; `ignore`: the number of pixels that count nowhere (255, where it is no class, is another);
`lookup`, where it is
there: the label of each number, `ignore` for none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from beit3.data.prepare.formats.files import SPLITS, Pair, folder, nothing_known, or_held_out, walk
from beit3.data.prepare.formats.folders import IMAGES
from beit3.data.views.label_maps import IGNORE_INDEX, INDEXED_MODES, read_pixel_values
from beit3.files import read_lines
from beit3.images import DECODE_ERRORS, read_upright_size

Options = dict[str, Any]
Scenes = tuple[tuple[str, ...], Options, Iterator[Pair]]

LABEL_MAPS = (".png", ".bmp", ".tif", ".tiff")
"""Endings of files that keep numbers as they are; JPEG does not."""

# SegNet's selection of CamVid, in the order of its labels; 11 is unlabelled.
CAMVID = (
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
CITYSCAPES = {
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
CITYSCAPES_IDS = 34


class Part(NamedTuple):
    """One split: its folder of images and that of their label maps (None: not published), and how
    the names of both end."""

    split: str
    images: Path
    label_maps: Path | None
    image_ending: str = ""
    map_ending: str = ""


class Layout(NamedTuple):
    """How a data set lies: what reads its parts, what finds them in a folder, and what people are
    told to look for."""

    read: Callable[[Path, list[Part]], Scenes]
    parts: Callable[[Path], list[Part]]
    looks: str


def scenes(raw: str | Path) -> Scenes:
    """(names in the order of the labels, options, the pairs) of a folder in one of `LAYOUTS`.

    Without a val folder, 5 % of the images are held out. An image whose label map is missing, of
    another size or of several
    channels is a fault. ValueError where the folder is of no layout, or a list of names is not of
    its format.
    """
    raw = folder(raw)
    for layout in LAYOUTS.values():
        parts = layout.parts(raw)
        if parts:
            return layout.read(raw, parts)
    raise nothing_known(
        raw, "; ".join(f"{layout.looks} ({name})" for name, layout in LAYOUTS.items())
    )


def ade20k(raw: Path, parts: list[Part]) -> Scenes:
    """ADE20K's: 0 is no class. Names from objectInfo150.txt or classes.txt beside the folders.

    Without them the classes are called 1, 2, ... up to the largest number in all label maps.
    """
    beside = parts[0].images.parents[1]
    names = _object_info(beside / "objectInfo150.txt") or _listed(beside / "classes.txt")
    if not names:
        largest = max(
            (_largest(path) for part in parts for path in _label_maps(part).values()), default=0
        )
        names = tuple(str(number) for number in range(1, largest + 1))
    return names, {"reduce_zero": True, "ignore": IGNORE_INDEX}, _pairs(parts)


def camvid(raw: Path, parts: list[Part]) -> Scenes:
    """CamVid's eleven classes as SegNet numbers them, or those of a classes.txt; the number after
    the last is unlabelled."""
    names = _listed(raw / "classes.txt") or CAMVID
    return names, {"reduce_zero": False, "ignore": len(names)}, _pairs(parts)


def cityscapes(raw: Path, parts: list[Part]) -> Scenes:
    """Cityscapes' 19 classes: *_labelTrainIds.png where there are some, else *_labelIds.png and
    their lookup.

    The published maps of test are empty: its records have none.
    """
    trained = any((raw / "gtFine").glob("*/*/*_gtFine_labelTrainIds.png"))
    ending = "_gtFine_labelTrainIds" if trained else "_gtFine_labelIds"
    parts = [part._replace(image_ending="_leftImg8bit", map_ending=ending) for part in parts]
    options: Options = {"reduce_zero": False, "ignore": IGNORE_INDEX}
    if not trained:
        labels = {number: label for label, number in enumerate(CITYSCAPES.values())}
        options["lookup"] = [labels.get(number, IGNORE_INDEX) for number in range(CITYSCAPES_IDS)]
    return tuple(CITYSCAPES), options, _pairs(parts)


def _ade20k_parts(raw: Path) -> list[Part]:
    """images/training with annotations/training, and validation alike; perhaps in
    ADEChallengeData2016, as the zip unpacks."""
    raw = raw / "ADEChallengeData2016" if (raw / "ADEChallengeData2016").is_dir() else raw
    return _there(
        Part(SPLITS[name], raw / "images" / name, raw / "annotations" / name)
        for name in ("training", "validation")
    )


def _camvid_parts(raw: Path) -> list[Part]:
    """train with trainannot, and val and test alike; a test may have no label maps."""
    parts = _there(
        Part(split, raw / split, raw / f"{split}annot") for split in ("train", "val", "test")
    )
    return [
        part._replace(label_maps=None)
        if part.split == "test" and not _is_folder(part.label_maps)
        else part
        for part in parts
    ]


def _cityscapes_parts(raw: Path) -> list[Part]:
    parts = _there(
        Part(split, raw / "leftImg8bit" / split, raw / "gtFine" / split)
        for split in ("train", "val")
    )
    test = raw / "leftImg8bit" / "test"
    return [*parts, *([Part("test", test, None)] if parts and test.is_dir() else [])]


LAYOUTS = {
    "ade20k": Layout(
        ade20k,
        _ade20k_parts,
        "images/{training,validation}/ with annotations/{training,validation}/",
    ),
    "camvid": Layout(camvid, _camvid_parts, "{train,val,test}/ with {train,val,test}annot/"),
    "cityscapes": Layout(
        cityscapes,
        _cityscapes_parts,
        "leftImg8bit/{train,val,test}/<city>/ with gtFine/{train,val}/<city>/",
    ),
}


def _there(parts: Iterable[Part]) -> list[Part]:
    """The parts whose folders of images are there; [] where none has a folder of label maps."""
    there = [part for part in parts if part.images.is_dir()]
    return there if any(_is_folder(part.label_maps) for part in there) else []


def _is_folder(place: Path | None) -> bool:
    return place is not None and place.is_dir()


def _pairs(parts: Sequence[Part]) -> Iterator[Pair]:
    has_val = any(part.split == "val" for part in parts)
    for part in parts:
        label_maps = _label_maps(part)
        seen: set[str] = set()
        for path in walk(part.images):
            if path.suffix.lower() not in IMAGES or not path.stem.endswith(part.image_ending):
                continue
            key = _key(path, part.images, part.image_ending)
            split = or_held_out(part.split, key, has_val=has_val)
            fault = (
                f"{path.name} is another image of this name"
                if key in seen
                else _fault(path, key, part, label_maps)
            )
            seen.add(key)
            record = {"id": key, "image": str(path)} | (
                {"label_map": str(label_maps[key])} if key in label_maps else {}
            )
            yield split, {"id": key, "fault": fault} if fault else record


def _label_maps(part: Part) -> dict[str, Path]:
    """Key of an image -> its label map."""
    if part.label_maps is None:
        return {}
    files = (
        path
        for path in walk(part.label_maps)
        if path.suffix.lower() in LABEL_MAPS and path.stem.endswith(part.map_ending)
    )
    return {_key(path, part.label_maps, part.map_ending): path for path in files}


def _key(path: Path, place: Path, ending: str) -> str:
    """aachen/aachen_0 of leftImg8bit/train/aachen/aachen_0_leftImg8bit.png, by which an image and
    its label map are joined."""
    return (path.relative_to(place).parent / path.stem.removesuffix(ending)).as_posix()


def _fault(image: Path, key: str, part: Part, label_maps: Mapping[str, Path]) -> str:
    """What is wrong with the label map of an image, or ''; of an image that cannot be read
    `prepare` says so."""
    if part.label_maps is None:
        return ""
    if key not in label_maps:
        others = ", ".join(LABEL_MAPS[1:])
        return (
            f"its label map {part.label_maps / key}{part.map_ending}{LABEL_MAPS[0]} is missing "
            f"(or {others}; not .jpg)"
        )
    try:
        with Image.open(label_maps[key]) as header:
            mode, size = header.mode, header.size
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        return f"its label map {label_maps[key]} cannot be read ({type(error).__name__})"
    if mode not in INDEXED_MODES:
        return (
            f"its label map {label_maps[key]} is a picture ({mode}): one channel of numbers is "
            "needed"
        )
    try:
        with Image.open(image) as header:
            found = read_upright_size(header)
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        return ""
    differ = (
        f"its label map {label_maps[key]} has {size[0]} x {size[1]} pixels, the image {found[0]} "
        f"x {found[1]}"
    )
    return "" if size == found else differ


def _largest(path: Path) -> int:
    """The largest number in a label map that is a class; 0 where it cannot be read, which `_fault`
    says."""
    try:
        numbers = read_pixel_values(path)
    except ValueError:
        return 0
    return int(numbers[numbers != IGNORE_INDEX].max(initial=0))


def _object_info(file: Path) -> tuple[str, ...]:
    """The names in ADE20K's objectInfo150.txt, each the first of its synonyms unless two classes
    share it; () without the file."""
    if not file.is_file():
        return ()
    rows = [line.rstrip().split("\t") for line in read_lines(file) if line.strip()][1:]
    if not rows or [row[0].strip() for row in rows] != [
        str(number) for number in range(1, len(rows) + 1)
    ]:
        raise ValueError(
            f"{file} does not list Idx, ..., Name of the classes 1, 2, ...: take it from "
            "ADEChallengeData2016 again"
        )
    whole = [" ".join(row[-1].split()) for row in rows]
    uses = Counter(name.partition(",")[0] for name in whole)
    return tuple(first if uses[first := name.partition(",")[0]] == 1 else name for name in whole)


def _listed(file: Path) -> tuple[str, ...]:
    """The lines of a classes.txt; () without the file."""
    return (
        tuple(" ".join(line.split()) for line in read_lines(file) if line.strip())
        if file.is_file()
        else ()
    )
