"""Reads captioned images: Karpathy's JSON, Flickr8k's lists, and the JSON of COCO and NoCaps.

For pretraining there is one record per caption, {id: "file#k", image, text}. For captioning and
retrieval there is one per image, {id, image, image_id, captions: [str], domain?}, whose id is
image_id as a str.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.files import (
    FLICKR30K_FOLDERS,
    ImageFinder,
    find_files,
    find_folder,
    find_single_file,
    get_field,
    make_unknown_error,
)
from beit3.data.prepare.formats.json_lists import find_lists
from beit3.data.prepare.formats.split_names import (
    SPLITS,
    Record,
    SplitRecord,
    choose_split,
    infer_split,
    infer_subset,
    make_split_error,
    parse_split,
)
from beit3.files import read_json, read_lines

COCO_FILES = ("captions_*.json", "nocaps_*.json", "image_info_*.json")
"""COCO's and NoCaps' captions, and the test images of both, which have none."""


# Karpathy's splits of COCO, Flickr30k and Flickr8k ------------------------------------------------


class KarpathyImage(NamedTuple):
    """An image of Karpathy's JSON."""

    split: str
    name: str
    image_id: int | str
    path: str
    captions: list[str]


def read_karpathy(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads Karpathy's `dataset_*.json`, one record per caption: {id: "file#k", image, text}."""
    for image in _read_karpathy_images(raw):
        for k, text in enumerate(image.captions):
            yield image.split, {"id": f"{image.name}#{k}", "image": image.path, "text": text}


def read_karpathy_images(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads Karpathy's `dataset_*.json`, one record per image: {id, image, image_id, captions}.

    `image_id` is COCO's number, else the file's own number, else the file name.
    """
    for image in _read_karpathy_images(raw):
        yield image.split, _make_record(image.image_id, image.path, image.captions)


def is_karpathy(raw: Path) -> bool:
    """Returns whether `raw` is a JSON file that is no list, or holds a `dataset_*.json`."""
    if raw.is_file():
        return raw.suffix == ".json" and not find_lists(raw, set())
    return bool(find_files(raw, "dataset_*.json"))


def _read_karpathy_images(raw: str | Path) -> Iterator[KarpathyImage]:
    file = find_single_file(raw, "dataset_*.json", "a Karpathy file")
    # The file may be in annotations/, with the images beside that folder.
    parent = Path(raw).absolute() if Path(raw).is_dir() else file.parent.parent
    image_finder = ImageFinder(
        file.parent,
        "",
        "images",
        "Images",
        *FLICKR30K_FOLDERS,
        also=[parent] if parent != file.parent else (),
    )
    for number, image in enumerate(get_field(read_json(file), "images", list, file)):
        location = f"{file} images[{number}]"
        name = get_field(image, "filename", str, location)
        split = get_field(image, "split", str, location)
        folder = get_field({"filepath": "", **image}, "filepath", str, location)
        path = image_finder.find(name, folder=folder)
        captions = [
            get_field(sentence, "raw", str, location)
            for sentence in get_field(image, "sentences", list, location)
        ]
        numbers = [image[key] for key in ("cocoid", "imgid") if isinstance(image.get(key), int)]
        image_id = numbers[0] if numbers else name
        yield KarpathyImage(parse_split(split, location), name, image_id, path, captions)


# Flickr8k -----------------------------------------------------------------------------------------


def read_flickr8k(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads Flickr8k's own lists, one record per caption: {id: "file#k", image, text}.

    They are `Flickr8k.token.txt` and, beside it, `Flickr_8k.{train,dev,test}Images.txt`.
    """
    tokens = find_single_file(raw, "*Flickr8k.token.txt", "Flickr8k's captions")
    image_finder = ImageFinder(
        find_folder(raw), "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images", ""
    )
    splits = _read_flickr8k_splits(tokens)
    for number, line in enumerate(read_lines(tokens), 1):
        key, tab, text = line.rstrip("\n").partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if line.strip() and not (tab and hash_sign):
            raise ValueError(
                f"{tokens} line {number} is not `file#k<TAB>caption`: {line.strip()[:60]!r}"
            )
        # The token file describes 8,092 images, of which the lists name 8,000.
        if name in splits:
            image_path = image_finder.find(name)
            yield splits[name], {"id": key, "image": image_path, "text": text.strip()}


def is_flickr8k(raw: Path) -> bool:
    """Returns whether `raw` holds Flickr8k's captions."""
    return bool(find_files(raw, "*Flickr8k.token.txt"))


def _read_flickr8k_splits(tokens: Path) -> dict[str, str]:
    """Returns image name -> split from the lists beside the token file."""
    splits = {}
    for name in ("train", "dev", "test"):
        path = tokens.with_name(f"Flickr_8k.{name}Images.txt")
        if path.is_file():
            splits.update({line.strip(): SPLITS[name] for line in read_lines(path) if line.strip()})
    if not splits:
        raise ValueError(
            f"no Flickr_8k.trainImages.txt beside {tokens}: put the official split lists there"
        )
    return splits


# COCO and NoCaps ----------------------------------------------------------------------------------


def read_coco_captions(raw: str | Path) -> Iterator[SplitRecord]:
    """Reads COCO's `captions_<split>.json` and NoCaps' `nocaps_<split>_*.json`.

    There is one record per image: {id, image, image_id, captions, domain?}. Test files need no
    annotations. Without a val file, 5 % of the images are held out.
    """
    raw = find_folder(raw)
    files, left_out = _find_coco_splits(raw)
    if not files:
        raise make_unknown_error(raw, f"{', '.join(COCO_FILES)} (coco_captions)")
    for file in left_out:
        yield "test", {"id": file.name, "left_out": f"{file.name} (images without captions)"}
    for split, file in files.items():
        content = read_json(file)
        images = get_field(content, "images", list, file)
        captions: dict[int, list[str]] = {}
        if split != "test" or "annotations" in content:
            captions = group_captions(content, file)
        subset = infer_subset(file)
        folders = [subset, subset.replace("-dev", ""), split]
        folders += [f"images/{folder}" for folder in folders]
        image_finder = ImageFinder(raw, *dict.fromkeys(folders), "images", "")
        for number, image in enumerate(images):
            location = f"{file} images[{number}]"
            id = get_field(image, "id", int, location)
            name = get_field(image, "file_name", str, location)
            record = _make_record(id, image_finder.find(name), captions.pop(id, []))
            if "domain" in image:
                record["domain"] = image["domain"]
            yield choose_split(split, name, has_val="val" in files), record
        if captions:
            raise ValueError(
                f"{file} has captions of image_id {next(iter(captions))}, which its images do not "
                "list: check it is complete"
            )


def is_coco_captions(raw: Path) -> bool:
    """Returns whether `raw` holds captions as COCO and NoCaps publish them."""
    return bool(_find_coco_files(raw))


def group_captions(content: Any, file: Path) -> dict[int, list[str]]:
    """Returns image_id -> captions from `annotations` as COCO has them."""
    captions: dict[int, list[str]] = {}
    for number, row in enumerate(get_field(content, "annotations", list, file)):
        location = f"{file} annotations[{number}]"
        image_id = get_field(row, "image_id", int, location)
        caption = get_field(row, "caption", str, location)
        captions.setdefault(image_id, []).append(caption)
    return captions


def _find_coco_splits(raw: Path) -> tuple[dict[str, Path], list[Path]]:
    """Returns split -> file, and the files left out: those that list other images than tests, and
    test-dev, which is a part of test, beside it.

    Raises ValueError for two files of one split.
    """
    files: dict[str, Path] = {}
    left_out = []
    all_files = _find_coco_files(raw)
    names = {file.name for file in all_files}
    for file in all_files:
        split = infer_split(file, raw) or "train"
        is_list = file.name.startswith("image_info_")
        if is_list and (split != "test" or file.name.replace("-dev", "") in names - {file.name}):
            left_out.append(file)
            continue
        if split in files:
            raise make_split_error(files[split], file, raw, split)
        files[split] = file
    return files, left_out


def _find_coco_files(raw: Path) -> list[Path]:
    return [file for pattern in COCO_FILES for file in find_files(raw, pattern)]


# Between records of captions and records of images ------------------------------------------------


def group_by_image(pairs: Iterable[SplitRecord]) -> Iterator[SplitRecord]:
    """Turns records of captions, with ids "image#k", into one record per image.

    The images come in the order of their first captions. Records with a fault stay as they are.
    """
    images: dict[tuple[str, str], Record] = {}
    for split, record in pairs:
        if "text" not in record:  # a fault, or left out
            yield split, record
            continue
        key = record["id"].rpartition("#")[0]
        image = images.setdefault((split, key), _make_record(key, record["image"], []))
        if image["image"] == record["image"]:
            image["captions"].append(record["text"])
        else:
            yield split, {"id": record["id"], "fault": f"{key} is the id of another image as well"}
    for (split, _), image in images.items():
        yield split, image


def split_by_caption(images: Iterable[SplitRecord]) -> Iterator[SplitRecord]:
    """Turns training images into one record per caption.

    Images of other splits stay one record each, with all captions as references. Images of train
    and val without a caption can neither be learned nor scored, and become faults.
    """
    for split, image in images:
        if split in ("train", "val") and image.get("captions") == []:
            yield split, {"id": image["id"], "fault": f"a {split} image without captions"}
            continue
        if split != "train" or "captions" not in image:
            yield split, image
            continue
        shared_fields = {
            key: value for key, value in image.items() if key not in ("id", "captions")
        }
        for number, caption in enumerate(image["captions"]):
            yield split, {"id": f"{image['id']}#{number}", **shared_fields, "text": caption}


def _make_record(image_id: int | str, path: str, captions: list[str]) -> Record:
    return {"id": str(image_id), "image": path, "image_id": image_id, "captions": captions}
