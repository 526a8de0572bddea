"""Captioned images in the files of their owners: Karpathy's JSON (COCO, Flickr30k, Flickr8k),
Flickr8k's lists, COCO's and NoCaps' JSON.

For pretraining (split, {id: "file#k", image, text}), one record per caption; for captioning and
retrieval one per image,
(split, {id, image, image_id, captions: [str], domain?}), where id is image_id as a str.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from beit3.data.prepare.formats.files import (
    FLICKR30K,
    SPLITS,
    Listing,
    Pair,
    Record,
    field,
    folder,
    found,
    named_split,
    nothing_known,
    only,
    or_held_out,
    split_name,
    subset,
)
from beit3.files import read_json, read_lines

# COCO's and NoCaps' captions; and the test images of both, which have none.
COCO_FILES = ("captions_*.json", "nocaps_*.json", "image_info_*.json")


class Entry(NamedTuple):
    """An image of Karpathy's JSON."""

    split: str
    name: str
    image_id: int | str
    path: str
    captions: list[str]


def karpathy(raw: str | Path) -> Iterator[Pair]:
    """Karpathy's `dataset_*.json` (COCO, Flickr30k, Flickr8k), one record per sentence: {id:
    "file#k", image, text}."""
    for entry in _karpathy(raw):
        for k, text in enumerate(entry.captions):
            yield entry.split, {"id": f"{entry.name}#{k}", "image": entry.path, "text": text}


def karpathy_images(raw: str | Path) -> Iterator[Pair]:
    """The same, one record per image: {id, image, image_id: COCO's number, else the file's own,
    captions: all sentences}."""
    for entry in _karpathy(raw):
        yield entry.split, _image(entry.image_id, entry.path, entry.captions)


def flickr8k(raw: str | Path) -> Iterator[Pair]:
    """Flickr8k's own `Flickr8k.token.txt` and `Flickr_8k.{train,dev,test}Images.txt`: {id:
    "file#k", image, text}."""
    tokens = only(raw, "*Flickr8k.token.txt", "Flickr8k's captions")
    listing = Listing(folder(raw), "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images", "")
    splits = {}
    for name in ("train", "dev", "test"):
        path = tokens.with_name(f"Flickr_8k.{name}Images.txt")
        if path.is_file():
            splits.update({line.strip(): SPLITS[name] for line in read_lines(path) if line.strip()})
    if not splits:
        raise ValueError(
            f"no Flickr_8k.trainImages.txt beside {tokens}: put the official split lists there"
        )
    for number, line in enumerate(read_lines(tokens), 1):
        key, tab, text = line.rstrip("\n").partition("\t")
        name, hash_, _ = key.rpartition("#")
        if line.strip() and not (tab and hash_):
            raise ValueError(
                f"{tokens} line {number} is not `file#k<TAB>caption`: {line.strip()[:60]!r}"
            )
        # The token file describes 8,092 images, of which the lists name 8,000.
        if name in splits:
            yield splits[name], {"id": key, "image": listing.find(name), "text": text.strip()}


def coco_captions(raw: str | Path) -> Iterator[Pair]:
    """COCO's `captions_<split>.json` and NoCaps' `nocaps_<split>_*.json`: {id, image, image_id,
    captions, domain?}.

    Test files need no annotations. Without a val, 5 % of the images are held out.
    """
    raw = folder(raw)
    files: dict[str, Path] = {}
    for file in _coco_files(raw):
        name = named_split(file, raw) or "train"
        if name in files:
            raise ValueError(
                f"{files[name].name} and {file.name} in {raw} are both {name}: keep one of them"
            )
        files[name] = file
    if not files:
        raise nothing_known(raw, f"{', '.join(COCO_FILES)} (coco_captions)")
    for name, file in files.items():
        content = read_json(file)
        images = field(content, "images", list, file)
        captions = (
            {}
            if name == "test" and "annotations" not in content
            else captions_by_image(content, file)
        )
        listing = Listing(
            raw, subset(file), name, f"images/{subset(file)}", f"images/{name}", "images", ""
        )
        for number, entry in enumerate(images):
            where = f"{file} images[{number}]"
            id, image = field(entry, "id", int, where), field(entry, "file_name", str, where)
            record = _image(id, listing.find(image), captions.pop(id, []))
            yield (
                or_held_out(name, image, has_val="val" in files),
                record | {key: entry[key] for key in ("domain",) if key in entry},
            )
        if captions:
            raise ValueError(
                f"{file} has captions of image_id {next(iter(captions))}, which its images do not "
                "list: check it is whole"
            )


def captions_by_image(content: Any, file: Path) -> dict[int, list[str]]:
    """image_id -> captions of COCO-like `annotations`."""
    captions: dict[int, list[str]] = {}
    for number, row in enumerate(field(content, "annotations", list, file)):
        where = f"{file} annotations[{number}]"
        captions.setdefault(field(row, "image_id", int, where), []).append(
            field(row, "caption", str, where)
        )
    return captions


def by_image(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Records of captions "image#k" -> one record per image, in the order of their first captions;
    faults as they are."""
    images: dict[tuple[str, str], Record] = {}
    for split, record in pairs:
        if "fault" in record:
            yield split, record
            continue
        key = record["id"].rpartition("#")[0]
        image = images.setdefault((split, key), _image(key, record["image"], []))
        if image["image"] == record["image"]:
            image["captions"].append(record["text"])
        else:
            yield split, {"id": record["id"], "fault": f"{key} is the id of another image as well"}
    for (split, _), image in images.items():
        yield split, image


def one_per_caption(images: Iterable[Pair]) -> Iterator[Pair]:
    """Training images become one record per caption; others stay one per image, with all captions
    as references."""
    for split, image in images:
        if split != "train" or "captions" not in image:
            yield split, image
            continue
        rest = {key: value for key, value in image.items() if key not in ("id", "captions")}
        for number, caption in enumerate(image["captions"]):
            yield split, {"id": f"{image['id']}#{number}", **rest, "text": caption}


def is_karpathy(raw: Path) -> bool:
    """Whether `raw` is a JSON file or holds a `dataset_*.json`."""
    return raw.suffix == ".json" if raw.is_file() else bool(found(raw, "dataset_*.json"))


def is_flickr8k(raw: Path) -> bool:
    """Whether `raw` holds Flickr8k's captions."""
    return bool(found(raw, "*Flickr8k.token.txt"))


def is_coco_captions(raw: Path) -> bool:
    """Whether `raw` holds captions as COCO and NoCaps publish them."""
    return bool(_coco_files(raw))


def _karpathy(raw: str | Path) -> Iterator[Entry]:
    file = only(raw, "dataset_*.json", "a Karpathy file")
    # The file may lie in annotations/, the images beside that folder.
    above = Path(raw).absolute() if Path(raw).is_dir() else file.parent.parent
    listing = Listing(
        file.parent,
        "",
        "images",
        "Images",
        *FLICKR30K,
        also=[above] if above != file.parent else (),
    )
    for number, image in enumerate(field(read_json(file), "images", list, file)):
        where = f"{file} images[{number}]"
        name, split = field(image, "filename", str, where), field(image, "split", str, where)
        path = listing.find(name, folder=field({"filepath": "", **image}, "filepath", str, where))
        captions = [
            field(sentence, "raw", str, where)
            for sentence in field(image, "sentences", list, where)
        ]
        id = next(
            (image[key] for key in ("cocoid", "imgid") if isinstance(image.get(key), int)), name
        )
        yield Entry(split_name(split, where), name, id, path, captions)


def _coco_files(raw: Path) -> list[Path]:
    return [file for pattern in COCO_FILES for file in found(raw, pattern)]


def _image(id: int | str, path: str, captions: list[str]) -> Record:
    return {"id": str(id), "image": path, "image_id": id, "captions": captions}
