"""Annotation files, tables, tars and corpora that `beit3 prepare` reads."""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from beit3.tokenizer.text import TextTokenizer
from benchmarks.fuzzing.damage import (
    Damage,
    combine,
    damage_bytes,
    damage_cells,
    damage_gzip,
    damage_json,
    damage_json_lines,
    damage_lines,
    damage_png,
    damage_tar,
)
from benchmarks.fuzzing.kinds import Counts, Kind, make_prepare_kind

JSON_DAMAGE = combine(damage_json, damage_json, damage_bytes)
LINE_DAMAGE = combine(damage_json_lines, damage_json_lines, damage_lines, damage_bytes)
TEXT_DAMAGE = combine(damage_lines, damage_bytes)


def damage_table(delimiter: str) -> Damage:
    return combine(damage_cells(delimiter), damage_lines, damage_bytes)


# Content of intact files --------------------------------------------------------------------------


def encode_image(mode: str = "RGB", size: tuple[int, int] = (8, 6), format: str = "PNG") -> bytes:
    """Returns a small image; of mode L or P its values are 0 to 3."""
    values = np.arange(size[0] * size[1]).reshape(size[1], size[0])
    file = io.BytesIO()
    if mode == "RGB":
        Image.fromarray(np.stack([values, values * 3, values * 5], -1).astype(np.uint8)).save(
            file, format
        )
    else:
        Image.fromarray((values % 4).astype(np.uint8)).save(file, format)
    return file.getvalue()


PNG = encode_image()
PHOTOS = {f"images/{number}.png": PNG for number in range(4)}
WORDS = "a red cube left of the blue ball and one green cone near two small boxes on top".split()


def make_caption(number: int) -> str:
    """Returns a caption that no other number has."""
    return f"{' '.join(WORDS[number % 7 : number % 7 + 5])} {number}"


def encode_table(header: str, rows: list[list[Any]], delimiter: str) -> bytes:
    """Returns a table in which nothing is quoted."""
    lines = [header.replace(",", delimiter)]
    lines += [delimiter.join(map(str, row)) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def encode_lines(entries: list[Any]) -> bytes:
    return "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()


def encode_json(value: Any) -> bytes:
    return json.dumps(value).encode()


CAPTION_ROWS = [
    [f"{number % 4}.png", make_caption(number), "val" if number % 4 == 3 else "train"]
    for number in range(12)
]
QUOTED_CAPTIONS = "".join(
    f'{image},"a cat, {text}",{split}\n' if number % 3 else f"{image},{text},{split}\n"
    for number, (image, text, split) in enumerate(CAPTION_ROWS)
)
QUESTION_ROWS = [
    [f"{number % 4}.png", f"what is {make_caption(number)}?", ["red", "blue", "2"][number % 3]]
    + ["val" if number % 4 == 3 else "train"]
    for number in range(12)
]
STATEMENT_ROWS = [
    [f"{number % 4}.png", f"{(number + 1) % 4}.png", make_caption(number)]
    + [["true", "false"][number % 2], "val" if number % 4 == 3 else "train"]
    for number in range(12)
]
CLASS_ROWS = [
    [f"{number}.png", ["cat", "dog", "old owl"][number % 3], ["train", "val"][number % 2]]
    for number in range(12)
]
KARPATHY = {
    "images": [
        {
            "filename": f"{number}.png",
            "filepath": "images",
            "split": ["train", "restval", "val", "test"][number],
            "cocoid": 40 + number,
            "imgid": number,
            "sentences": [
                {"raw": make_caption(5 * number + k), "tokens": WORDS[:5]} for k in range(3)
            ],
        }
        for number in range(4)
    ],
    "dataset": "coco",
}
COCO_CAPTIONS = {
    "info": {"description": "COCO"},
    "images": [
        {"id": 40 + number, "file_name": f"{number}.png", "width": 8, "height": 6}
        for number in range(4)
    ],
    "annotations": [
        {"id": number, "image_id": 40 + number % 4, "caption": make_caption(number)}
        for number in range(12)
    ],
}
VQA_QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"question_id": number, "image_id": number % 4, "question": f"what is {number}?"}
        for number in range(8)
    ],
}
VQA_ANNOTATIONS = {
    "annotations": [
        {
            "question_id": number,
            "image_id": number % 4,
            "multiple_choice_answer": ["red", "two"][number % 2],
            "answers": [
                {"answer": ["red", "two"][number % 2], "answer_id": k, "answer_confidence": "yes"}
                for k in range(10)
            ],
        }
        for number in range(8)
    ]
}
VQA_FILES = {
    "v2_OpenEnded_mscoco_train2014_questions.json": encode_json(VQA_QUESTIONS),
    "v2_mscoco_train2014_annotations.json": encode_json(VQA_ANNOTATIONS),
    "v2_OpenEnded_mscoco_val2014_questions.json": encode_json(
        VQA_QUESTIONS | {"data_subtype": "val2014"}
    ),
    "v2_mscoco_val2014_annotations.json": encode_json(VQA_ANNOTATIONS),
    **{f"images/{number:012d}.png": PNG for number in range(4)},
}
NLVR2_LINES = [
    {
        "identifier": f"dev-{number}-0-{k}",
        "sentence": make_caption(2 * number + k),
        "label": ["True", "False"][k],
        "query": "cone",
    }
    for number in range(4)
    for k in range(2)
]
NLVR2_FILES = {
    "dev.json": encode_lines(NLVR2_LINES),
    "train.json": encode_lines(NLVR2_LINES),
    **{
        f"{name}/dev-{n}-0-img{k}.png": PNG
        for name in ("dev", "train")
        for n in range(4)
        for k in range(2)
    },
}
INSTANCES = {
    "images": [
        {"id": 40 + number, "file_name": f"{number}.png", "width": 8, "height": 6}
        for number in range(4)
    ],
    "annotations": [
        {
            "id": 1 + number,
            "image_id": 40 + number % 4,
            "category_id": 3 + 4 * (number % 2),
            "bbox": [1.0, 1.0, 4.0, 3.5],
            "area": 14.0,
            "iscrowd": int(number == 9),
            "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]]
            if number != 9
            else {"size": [6, 8], "counts": [6, 12, 30]},
        }
        for number in range(10)
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "old dog"}],
}
CLASS_FOLDERS = {
    f"{split}/n0{label}/{number}.png": PNG
    for split in ("train", "val")
    for label in range(3)
    for number in range(2)
}
ADE20K_FILES = {
    f"images/{split}/{number}.png": PNG
    for split in ("training", "validation")
    for number in range(2)
} | {
    f"annotations/{split}/{number}.png": encode_image("L")
    for split in ("training", "validation")
    for number in range(2)
}
OBJECT_INFO = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
    f"{number}\t0.1\t10\t2\t1\t{name}\n"
    for number, name in enumerate(("wall", "sky, air", "cat"), 1)
)
EASY_VQA = [[f"what is {number}?", ["red", "two"][number % 2], number % 4] for number in range(8)]
DAQUAR = "".join(
    f"what is {make_caption(number)} in the image{number % 4} ?\n{answer}\n"
    for number, answer in enumerate(["book, cup", "two"] * 4)
)
SOFT_LABELS = [
    {
        "question_id": number,
        "image": f"{number % 4}.png",
        "question": f"what is {number}?",
        "label": {"red": 1.0, "two": 0.6},
        "okvqa_split": ["train", "val"][number % 2],
    }
    for number in range(8)
]
FLICKR8K_FILES = {
    "Flickr8k.token.txt": "".join(
        f"{number // 2}.png#{number % 2}\t{make_caption(number)}\n" for number in range(8)
    ).encode(),
    "Flickr_8k.trainImages.txt": b"0.png\n1.png\n",
    "Flickr_8k.devImages.txt": b"2.png\n",
    "Flickr_8k.testImages.txt": b"3.png\n",
    **{f"Images/{number}.png": PNG for number in range(4)},
}
DOCUMENTS = [" ".join([make_caption(number)] * 8) + "." for number in range(8)]
TEXT_MODEL = TextTokenizer.train([" ".join(WORDS)], vocab_size=60).bytes


def encode_tar(num_samples: int = 6, *, in_json: bool = False) -> bytes:
    """Returns a tar of samples with an image and a caption each."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(num_samples):
            caption = make_caption(number)
            members = {"png": PNG, "txt": caption.encode()}
            if in_json:
                members = {"png": PNG, "json": encode_json({"caption": caption, "url": "x"})}
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def encode_parquet() -> bytes:
    """Returns a Parquet file of texts in several row groups."""
    file = io.BytesIO()
    table = pyarrow.table({"text": DOCUMENTS, "number": list(range(len(DOCUMENTS)))})
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


# Counts that do not use the reader ----------------------------------------------------------------


def count_lines(data: bytes) -> int:
    """Returns the number of lines that are not blank, ended by any of LF, CR LF and CR."""
    return sum(bool(line.strip(b' \t\x0b\x0c,"')) for line in re.split(rb"\r\n|\r|\n", data))


def is_wide(data: bytes) -> bool:
    """Returns whether a file may be in UTF-16 or UTF-32, whose lines are not counted here."""
    return b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff"))


def count_rows(data: bytes) -> Counts:
    """Counts the rows of a table below its header; a pair of quotes may join two lines of a row."""
    if is_wide(data):
        return None
    num_rows = count_lines(data) - 1
    num_joined = data.count(b'"') // 2
    num_listed = data.count(b"', '")  # a list in a cell is several captions
    return range(num_rows - num_joined, num_rows + num_listed + 1)


def count_entries(count: Callable[[Any], int]) -> Callable[[bytes], Counts]:
    """Returns a function that counts the entries of a JSON file by `count`."""

    def count_in_file(data: bytes) -> Counts:
        if is_wide(data):
            return None
        number = count(json.loads(data.decode("utf-8-sig")))
        return range(number, number + 1)

    return count_in_file


def count_json_lines(data: bytes) -> Counts:
    """Counts the lines of a file of JSON lines."""
    if is_wide(data):
        return None
    number = count_lines(data.removeprefix(b"\xef\xbb\xbf"))
    return range(number, number + 1)


def count_captions(data: bytes) -> Counts:
    """Counts the captions of JSON lines, in which `caption` may be a list; a fault counts once."""
    if is_wide(data):
        return None
    lines = re.split(rb"[\r\n]+", data.removeprefix(b"\xef\xbb\xbf"))
    entries = [json.loads(line) for line in lines if line.strip()]
    captions = [entry.get("text", entry.get("caption")) for entry in entries]
    number = sum(max(1, len(text)) if isinstance(text, list) else 1 for text in captions)
    return range(len(entries), number + 1)


def count_documents(data: bytes) -> Counts:
    """Counts the lines of a corpus, which end in LF."""
    if is_wide(data):
        return None
    number = sum(bool(line.strip()) for line in data.split(b"\n"))
    return range(number, number + 1)


def count_more(number: int, count: Callable[[bytes], Counts]) -> Callable[[bytes], Counts]:
    """Returns a function that adds the records of the intact files beside the damaged one."""

    def count_all(data: bytes) -> Counts:
        counts = count(data)
        return counts and range(number + counts.start, number + counts.stop)

    return count_all


def count_exactly(number: int) -> Callable[[bytes], Counts]:
    """Returns a function for a file that the number of records does not depend on."""
    return lambda data: range(number, number + 1)


# Kinds --------------------------------------------------------------------------------------------

make_pairs_kind = partial(make_prepare_kind, "pretrain", source="pairs")
make_texts_kind = partial(
    make_prepare_kind,
    "pretrain",
    source="texts",
    options=("--workers", "1"),
    text_model=TEXT_MODEL,
)
CAPTIONS = {
    "a.csv": f"image,caption,split\n{QUOTED_CAPTIONS}".encode(),
    "a.tsv": encode_table("image,caption,split", CAPTION_ROWS, "\t"),
    "a.jsonl": encode_lines(
        [
            {"image": image, "caption": text, "split": split}
            for image, text, split in CAPTION_ROWS[:8]
        ]
        + [{"file_name": "0.png", "text": ["one", "two", "three"], "split": "train"}]
    ),
}
QUESTIONS = {
    "a.csv": encode_table("image,question,answer,split", QUESTION_ROWS, ","),
    "a.jsonl": encode_lines(
        [
            {
                "image": image,
                "question": text,
                "answers": answers,
                "split": split,
                "id": f"q{number}",
            }
            for number, ((image, text, answer, split), answers) in enumerate(
                zip(
                    QUESTION_ROWS,
                    ["red", ["red", "red", "blue"], {"red": 1, "two": 0.6}] * 4,
                    strict=True,
                )
            )
        ]
    ),
}

ANNOTATION_KINDS: dict[str, Kind] = {
    "captions csv": make_pairs_kind(
        {"a.csv": CAPTIONS["a.csv"], **PHOTOS}, "a.csv", damage_table(","), count=count_rows
    ),
    "captions tsv": make_pairs_kind(
        {"a.tsv": CAPTIONS["a.tsv"], **PHOTOS}, "a.tsv", damage_table("\t"), count=count_rows
    ),
    "captions jsonl": make_pairs_kind(
        {"a.jsonl": CAPTIONS["a.jsonl"], **PHOTOS}, "a.jsonl", LINE_DAMAGE, count=count_captions
    ),
    "captions of images csv": make_prepare_kind(
        "captioning", {"a.csv": CAPTIONS["a.csv"], **PHOTOS}, "a.csv", damage_table(",")
    ),
    "questions csv": make_prepare_kind(
        "vqa", {"a.csv": QUESTIONS["a.csv"], **PHOTOS}, "a.csv", damage_table(","), count=count_rows
    ),
    "questions jsonl": make_prepare_kind(
        "vqa",
        {"a.jsonl": QUESTIONS["a.jsonl"], **PHOTOS},
        "a.jsonl",
        LINE_DAMAGE,
        count=count_json_lines,
    ),
    "statements csv": make_prepare_kind(
        "nlvr2",
        {"a.csv": encode_table("image,image2,text,label,split", STATEMENT_ROWS, ","), **PHOTOS},
        "a.csv",
        damage_table(","),
        count=count_rows,
    ),
    "classes csv": make_prepare_kind(
        "imagenet",
        {"a.csv": encode_table("image,label,split", CLASS_ROWS, ",")}
        | {f"images/{number}.png": PNG for number in range(12)},
        "a.csv",
        damage_table(","),
        count=count_rows,
    ),
    "karpathy json, pairs": make_pairs_kind(
        {"dataset_coco.json": encode_json(KARPATHY), **PHOTOS},
        "dataset_coco.json",
        JSON_DAMAGE,
        count=count_entries(lambda content: sum(len(i["sentences"]) for i in content["images"])),
    ),
    "karpathy json, images": make_prepare_kind(
        "captioning",
        {"dataset_coco.json": encode_json(KARPATHY), **PHOTOS},
        "dataset_coco.json",
        JSON_DAMAGE,
    ),
    "coco captions json": make_prepare_kind(
        "captioning",
        {
            "captions_train2017.json": encode_json(COCO_CAPTIONS),
            "captions_val2017.json": encode_json(COCO_CAPTIONS),
            **PHOTOS,
        },
        "captions_val2017.json",
        JSON_DAMAGE,
        count=count_entries(lambda content: 12 + len(content["images"])),
    ),
    "flickr8k tokens": make_pairs_kind(FLICKR8K_FILES, "Flickr8k.token.txt", TEXT_DAMAGE),
    "flickr8k split list": make_pairs_kind(
        FLICKR8K_FILES, "Flickr_8k.trainImages.txt", TEXT_DAMAGE
    ),
    "vqav2 questions json": make_prepare_kind(
        "vqa",
        VQA_FILES,
        "v2_OpenEnded_mscoco_train2014_questions.json",
        JSON_DAMAGE,
        count=count_entries(lambda content: 8 + len(content["questions"])),
    ),
    "vqav2 annotations json": make_prepare_kind(
        "vqa",
        VQA_FILES,
        "v2_mscoco_train2014_annotations.json",
        JSON_DAMAGE,
        count=count_exactly(16),
    ),
    "easy-vqa json": make_prepare_kind(
        "vqa",
        {f"{split}/questions.json": encode_json(EASY_VQA) for split in ("train", "test")}
        | {
            f"{split}/images/{number}.png": PNG
            for split in ("train", "test")
            for number in range(4)
        },
        "train/questions.json",
        JSON_DAMAGE,
        count=count_entries(lambda content: 8 + len(content)),
    ),
    "daquar txt": make_prepare_kind(
        "vqa",
        {"qa.37.raw.train.txt": DAQUAR.encode(), "qa.37.raw.test.txt": DAQUAR.encode()}
        | {f"images/image{number}.png": PNG for number in range(4)},
        "qa.37.raw.train.txt",
        TEXT_DAMAGE,
    ),
    "soft labels json": make_prepare_kind(
        "vqa",
        {"soft_labels.json": encode_json(SOFT_LABELS), **PHOTOS},
        "soft_labels.json",
        JSON_DAMAGE,
        count=count_entries(len),
    ),
    "nlvr2 json": make_prepare_kind(
        "nlvr2",
        NLVR2_FILES,
        "dev.json",
        LINE_DAMAGE,
        count=count_more(8, count_json_lines),
    ),
    "coco instances json": make_prepare_kind(
        "coco",
        {
            "annotations/instances_train2017.json": encode_json(INSTANCES),
            "annotations/instances_val2017.json": encode_json(INSTANCES),
            **PHOTOS,
        },
        "annotations/instances_val2017.json",
        JSON_DAMAGE,
        count=count_entries(lambda content: 4 + len(content["images"])),
    ),
    "class folders' classes.txt": make_prepare_kind(
        "imagenet",
        CLASS_FOLDERS | {"classes.txt": b"n00 cat\nn01 old dog\nn02 owl\n"},
        "classes.txt",
        TEXT_DAMAGE,
        count=count_exactly(12),
    ),
    "class folders' mapping": make_prepare_kind(
        "imagenet",
        CLASS_FOLDERS | {"LOC_synset_mapping.txt": b"n00 cat, tom\nn01 old dog\nn02 owl\n"},
        "LOC_synset_mapping.txt",
        TEXT_DAMAGE,
        count=count_exactly(12),
    ),
    "image in class folder": make_prepare_kind(
        "imagenet",
        CLASS_FOLDERS,
        "train/n00/0.png",
        combine(damage_bytes, damage_png),
        count=count_exactly(12),
    ),
    "label map png": make_prepare_kind(
        "ade20k",
        ADE20K_FILES,
        "annotations/training/0.png",
        combine(damage_bytes, damage_png),
        count=count_exactly(4),
    ),
    "objectInfo150.txt": make_prepare_kind(
        "ade20k",
        ADE20K_FILES | {"objectInfo150.txt": OBJECT_INFO.encode()},
        "objectInfo150.txt",
        combine(damage_cells("\t"), TEXT_DAMAGE),
        count=count_exactly(4),
    ),
    "tar of pairs": make_pairs_kind(
        {"a-train-0.tar": encode_tar(), "b-val-0.tar": encode_tar(in_json=True)},
        "a-train-0.tar",
        combine(damage_bytes, damage_tar),
        options=("--workers", "1"),
    ),
    "tar of pairs with json": make_pairs_kind(
        {"a-train-0.tar": encode_tar(), "b-val-0.tar": encode_tar(in_json=True)},
        "b-val-0.tar",
        combine(damage_bytes, damage_tar),
        options=("--workers", "1"),
    ),
    "tar of images": make_prepare_kind(
        "vqkd",
        {"a-train-0.tar": encode_tar(), "b-val-0.tar": encode_tar(in_json=True)},
        "a-train-0.tar",
        combine(damage_bytes, damage_tar),
    ),
    "texts txt": make_texts_kind(
        {"a.txt": "\n\n".join(DOCUMENTS).encode(), "val/b.txt": b"one red cube"},
        "a.txt",
        TEXT_DAMAGE,
    ),
    "texts jsonl": make_texts_kind(
        {
            "a.jsonl": encode_lines([{"text": text} for text in DOCUMENTS]),
            "val/b.txt": b"one red cube",
        },
        "a.jsonl",
        LINE_DAMAGE,
        count=count_more(1, count_documents),
    ),
    "texts jsonl.gz": make_texts_kind(
        {
            "a.jsonl.gz": gzip.compress(
                encode_lines([{"text": text} for text in DOCUMENTS]), mtime=0
            ),
            "val/b.txt": b"one red cube",
        },
        "a.jsonl.gz",
        combine(damage_bytes, damage_gzip(LINE_DAMAGE)),
    ),
    "texts parquet": make_texts_kind(
        {"a.parquet": encode_parquet(), "val/b.txt": b"one red cube"}, "a.parquet"
    ),
}
