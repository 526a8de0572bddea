"""Statements on two images, true or false: NLVR2 and NLVR1 in the files of their owners, and tables
of one's own.

All give (split, {id, image, image2, text, label: 0 | 1, group, boxes?}); tests may lack the label.
`group` is shared by the
uses of one sentence, which NLVR2's consistency counts together. `boxes`: pixels [left, top, right,
bottom] of `image` and
of `image2` that are looked at.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3.data.prepare.formats.files import (
    Listing,
    Pair,
    Record,
    field,
    folder,
    found,
    nothing_known,
)
from beit3.data.prepare.formats.tables import (
    IMAGE_COLUMNS,
    OPTIONAL,
    TEXT_COLUMNS,
    find_image,
    table_rows,
)
from beit3.files import read_json_lines

# Their files -> our splits. test1 is the public test of NLVR2 (test-P), test2 the one that was held
# back first (test-U);
# test is NLVR1's, and in NLVR2's folder somebody's own: both are one split here, so that they
# cannot stand side by side.
FILES = {"train": "train", "dev": "val", "test1": "test", "test": "test", "test2": "test2"}

PERMUTATIONS = 6
"""Orders of the three boxes in which NLVR1 draws each example."""
VAL_DIRECTORY = "5"
"""NLVR1's directories share no group of sentences: where there is one file alone, this one is
val."""
CANVAS = [[0, 0, 250, 100], [250, 0, 400, 100]]
"""NLVR1's 400 x 100 pixels, three boxes: the first two are one image, the third the other."""

TRUTH = {"true": 1, "1": 1, "yes": 1, "false": 0, "0": 0, "no": 0}


def nlvr2(raw: str | Path) -> Iterator[Pair]:
    """NLVR2's {train,dev,test1}.json: {id: identifier, image, image2, text, label, group}.

    Images `images/train/<directory>/`, `images/dev/`, `images/test1/`, or without `images/`.
    """
    raw = folder(raw)
    files = _files(raw)
    if not files:
        raise nothing_known(raw, "{train,dev,test1}.json (nlvr2)")
    listing = Listing(raw, "images", "")
    for name, file in files.items():
        place = f"images/{name}" if (raw / "images" / name).is_dir() else name
        for where, row in read_json_lines(file):
            identifier = field(row, "identifier", str, where)
            if identifier.count("-") < 3:
                raise ValueError(
                    f"{where} has identifier {identifier[:60]!r}: NLVR2's are "
                    "split-set-pair-sentence"
                )
            stem = identifier.rpartition("-")[0]
            inside = f"{place}/{row['directory']}" if "directory" in row else place
            image, image2 = (
                listing.find(f"{stem}-img{side}.png", folder=inside) for side in (0, 1)
            )
            record = {
                "id": identifier,
                "image": image,
                "image2": image2,
                "text": field(row, "sentence", str, where),
            }
            yield (
                FILES[name],
                record | _label(row, name, where) | {"group": sentence_of(identifier)},
            )


def nlvr1(raw: str | Path) -> Iterator[Pair]:
    """NLVR1's train/train.json, dev/dev.json, test/test.json: {id: "n-m-k", image, image2: the
    same, text, label, group: "n", boxes}.

    Training records are all six orders k of the boxes, others the first. Where there is one file
    alone, its directory 5 is val.
    """
    files = _files(folder(raw))
    if not files:
        raise nothing_known(Path(raw), "dev/dev.json (nlvr1)")
    for name, file in files.items():
        listing = Listing(file.parent, "images")
        for where, row in read_json_lines(file):
            identifier, directory = (
                field(row, "identifier", str, where),
                field(row, "directory", str, where),
            )
            split = (
                FILES[name] if len(files) > 1 else "val" if directory == VAL_DIRECTORY else "train"
            )
            same = {"text": field(row, "sentence", str, where), **_label(row, name, where)}
            same |= {"group": identifier.partition("-")[0], "boxes": CANVAS}
            for k in range(PERMUTATIONS if split == "train" else 1):
                image = listing.find(f"{name}-{identifier}-{k}.png", folder=f"images/{directory}")
                yield split, {"id": f"{identifier}-{k}", "image": image, "image2": image, **same}


def statement_tables(raw: str | Path) -> Iterator[Pair]:
    """Tables with image, image2, text, label (true, false, 1, 0, yes, no), perhaps id, split and
    group; group is else the text.

    A row without a label is a fault, unless it is of a test split.
    """
    needed = {
        "image": ("image", "image1", "left", *IMAGE_COLUMNS[1:]),
        "image2": ("image2", "right"),
        "text": TEXT_COLUMNS,
    }
    seen: Counter[str] = Counter()
    for row in table_rows(
        raw, needed, {**OPTIONAL, "label": ("label", "answer"), "group": ("group",)}
    ):
        cells = row.cells
        lacking = [
            name
            for name in ("image2", "label")
            if cells.get(name, "") == "" and (name, row.split) != ("label", "test")
        ]
        if row.fault or lacking:
            yield row.split, {"id": row.where, "fault": row.fault or f"it has no {lacking[0]}"}
            continue
        text, image2 = (
            field(cells, "text", str, row.where),
            find_image(row.file, field(cells, "image2", str, row.where)),
        )
        label = {"label": truth(cells["label"], row.where)} if cells["label"] != "" else {}
        id = str(cells["id"]) or f"{row.image}#{seen[row.image]}"
        seen[row.image] += 1
        record = {"id": id, "image": row.path, "image2": image2, "text": text}
        yield row.split, record | label | {"group": str(cells["group"]) or text}


def sentence_of(identifier: str) -> str:
    """NLVR2's identifier split-set-pair-sentence without the pair."""
    *rest, _, sentence = identifier.split("-")
    return "-".join([*rest, sentence])


def truth(value: Any, where: str) -> int:
    """1 for a true statement, 0 for a false one, however it is written."""
    if str(value).lower() not in TRUTH:
        raise ValueError(f"{where} has label {str(value)[:30]!r}: write one of {', '.join(TRUTH)}")
    return TRUTH[str(value).lower()]


def is_nlvr2(raw: Path) -> bool:
    """Whether `raw` holds {train,dev,test1}.json that are not NLVR1's."""
    return bool(_files(raw)) and not is_nlvr1(raw)


def is_nlvr1(raw: Path) -> bool:
    """Whether `raw` holds {train,dev,test}.json with the drawn boxes of NLVR1 in their first
    lines."""
    firsts = (next(read_json_lines(file), ("", None))[1] for file in _files(raw).values())
    return any(isinstance(row, dict) and "structured_rep" in row for row in firsts)


def _files(raw: Path) -> dict[str, Path]:
    """Name of the file -> file; ValueError for two of one name."""
    files: dict[str, Path] = {}
    for name in FILES:
        places = found(raw, f"{name}.json")
        if len(places) > 1:
            raise ValueError(f"{' and '.join(map(str, places))} are both {name}: keep one of them")
        if places:
            files[name] = places[0]
    if {"test", "test1"} <= files.keys():
        raise ValueError(
            f"{files['test1']} and {files['test']} would both be test, and are different splits: "
            "keep the one that is meant"
        )
    return files


def _label(row: Record, name: str, where: str) -> dict[str, int]:
    """The label of a line, as far as there is one in a test."""
    return (
        {}
        if name.startswith("test") and "label" not in row
        else {"label": truth(field(row, "label", str, where), where)}
    )
