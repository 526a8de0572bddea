"""Captioned images in the files of their owners: Karpathy's JSON (COCO, Flickr30k, Flickr8k) and Flickr8k's own lists.

Both give (split, {id: "file#k", image, text}), one record per caption.
"""

from collections.abc import Iterator
from pathlib import Path

from beit3.data.formats.files import SPLITS, Listing, Pair, field, folder, found, lines, only, read_json, split_name


def karpathy(raw: str | Path) -> Iterator[Pair]:
    """Karpathy's `dataset_*.json` (COCO, Flickr30k, Flickr8k), one record per sentence: {id: "file#k", image, text}."""
    file = only(raw, "dataset_*.json", "a Karpathy file")
    listing = Listing(file.parent, "", "images", "Images")
    for number, image in enumerate(field(read_json(file), "images", list, file)):
        where = f"{file} images[{number}]"
        name, split = field(image, "filename", str, where), field(image, "split", str, where)
        path = listing.find(name, folder=image.get("filepath", ""))
        for k, sentence in enumerate(field(image, "sentences", list, where)):
            text = field(sentence, "raw", str, where)
            yield split_name(split, where), {"id": f"{name}#{k}", "image": path, "text": text}


def flickr8k(raw: str | Path) -> Iterator[Pair]:
    """Flickr8k's own `Flickr8k.token.txt` and `Flickr_8k.{train,dev,test}Images.txt`: {id: "file#k", image, text}."""
    tokens = only(raw, "*Flickr8k.token.txt", "Flickr8k's captions")
    listing = Listing(folder(raw), "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images", "")
    splits = {}
    for name in ("train", "dev", "test"):
        path = tokens.with_name(f"Flickr_8k.{name}Images.txt")
        if path.is_file():
            splits.update({line.strip(): SPLITS[name] for line in lines(path) if line.strip()})
    if not splits:
        raise ValueError(f"no Flickr_8k.trainImages.txt beside {tokens}: put the official split lists there")
    for number, line in enumerate(lines(tokens), 1):
        key, tab, text = line.rstrip("\n").partition("\t")
        name, hash_, _ = key.rpartition("#")
        if line.strip() and not (tab and hash_):
            raise ValueError(f"{tokens} line {number} is not `file#k<TAB>caption`: {line.strip()[:60]!r}")
        # The token file describes 8,092 images, of which the lists name 8,000.
        if name in splits:
            yield splits[name], {"id": key, "image": listing.find(name), "text": text.strip()}


def is_karpathy(raw: Path) -> bool:
    """Whether `raw` is a JSON file or holds a `dataset_*.json`."""
    return raw.suffix == ".json" if raw.is_file() else bool(found(raw, "dataset_*.json"))


def is_flickr8k(raw: Path) -> bool:
    """Whether `raw` holds Flickr8k's captions."""
    return bool(found(raw, "*Flickr8k.token.txt"))
