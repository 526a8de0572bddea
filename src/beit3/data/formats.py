"""Readers of public annotation files: what the data sets' owners publish -> plain records with absolute image paths.

`images`, `texts`, `pairs` and `questions` recognise the files of their kind and give (split, record): train, val, test.
A record is {id, image and/or text}; questions add answers [str per annotator] and multiple_choice_answer.
A missing image is not noticed here (`prepare` counts them); a file that breaks its format is a ValueError naming it.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from textwrap import wrap
from typing import Any

Record = dict[str, Any]
Pair = tuple[str, Record]

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
# What data sets call their splits. Karpathy's restval is the rest of COCO's val, used for training.
SPLITS = {
    **{name: "train" for name in ("train", "training", "restval", "train2014", "train2017")},
    **{name: "val" for name in ("val", "valid", "validation", "dev", "eval", "val2014", "val2017")},
    **{name: "test" for name in ("test", "testing", "test2014", "test2015")},
    "test-dev2015": "test-dev",
}
HELD_OUT = 0.05
# Characters of a text record: about 512 tokens, the longest text of pretraining.
LONGEST_TEXT = 2000
UNDERSTOOD = {
    "karpathy": "dataset_*.json",
    "flickr8k": "Flickr8k.token.txt",
    "easy_vqa": "{train,test}/questions.json",
    "vqav2": "*_questions.json",
    "daquar": "qa.*.txt or data_*.csv",
    "image_folder": "images",
    "text_files": ".txt files",
}
DAQUAR_IMAGE = re.compile(r"image ?(\d+)")
DAQUAR_ENDING = re.compile(r"\s+in (the )?image ?\d+\s*\??$")


def images(raw: str | Path) -> Iterator[Pair]:
    """The images below `raw`, split by its folders or by hash."""
    return split(image_folder(raw), raw)


def texts(raw: str | Path) -> Iterator[Pair]:
    """The paragraphs of the text files below `raw`, split by its folders or by hash."""
    return split(text_files(raw), raw)


def pairs(raw: str | Path) -> Iterator[Pair]:
    """Captioned images, one record per caption: Karpathy's or Flickr8k's files."""
    readers = {"karpathy": karpathy, "flickr8k": flickr8k}
    return readers[detect(raw, *readers)](raw)


def questions(raw: str | Path) -> Iterator[Pair]:
    """Questions about images: the files of easy-VQA, VQA or DAQUAR."""
    readers = {"easy_vqa": easy_vqa, "vqav2": vqav2, "daquar": daquar}
    return readers[detect(raw, *readers)](raw)


def detect(raw: str | Path, *among: str) -> str:
    """The name of the reader in this module (of `among`, if given) that understands `raw`; else a ValueError."""
    raw = Path(raw)
    for name in among or UNDERSTOOD:
        if _understands(name, raw):
            return name
    wanted = "; ".join(f"{UNDERSTOOD[name]} ({name})" for name in among or UNDERSTOOD)
    raise ValueError(f"nothing known in {raw}: it should hold one of {wanted}")


def image_folder(raw: str | Path) -> Iterator[Record]:
    """Every image below `raw`, in sorted order: {id: its path below `raw`, image}."""
    raw = _folder(raw)
    for path in _walk(raw):
        if path.suffix.lower() in IMAGES:
            yield {"id": path.relative_to(raw).as_posix(), "image": str(path)}


def text_files(raw: str | Path) -> Iterator[Record]:
    """The paragraphs (between blank lines, cut where long) of the .txt files below `raw`: {id: "file:number", text}."""
    raw = _folder(raw)
    for path in _walk(raw):
        if path.suffix.lower() != ".txt":
            continue
        for number, text in enumerate(_paragraphs(path), 1):
            yield {"id": f"{path.relative_to(raw).as_posix()}:{number}", "text": text}


def karpathy(raw: str | Path) -> Iterator[Pair]:
    """Karpathy's `dataset_*.json` (COCO, Flickr30k, Flickr8k), one record per sentence: {id: "file#k", image, text}."""
    file = _only(raw, "dataset_*.json", "a Karpathy file")
    listing = _Listing(file.parent, "", "images", "Images")
    for number, image in enumerate(_field(_json(file), "images", list, file)):
        where = f"{file} images[{number}]"
        name, split = _field(image, "filename", str, where), _field(image, "split", str, where)
        path = listing.find(name, folder=image.get("filepath", ""))
        for k, sentence in enumerate(_field(image, "sentences", list, where)):
            text = _field(sentence, "raw", str, where)
            yield _split_name(split, where), {"id": f"{name}#{k}", "image": path, "text": text}


def flickr8k(raw: str | Path) -> Iterator[Pair]:
    """Flickr8k's own `Flickr8k.token.txt` and `Flickr_8k.{train,dev,test}Images.txt`: {id: "file#k", image, text}."""
    tokens = _only(raw, "*Flickr8k.token.txt", "Flickr8k's captions")
    listing = _Listing(_folder(raw), "Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "images", "")
    splits = {}
    for name in ("train", "dev", "test"):
        path = tokens.with_name(f"Flickr_8k.{name}Images.txt")
        if path.is_file():
            splits.update({line.strip(): SPLITS[name] for line in _lines(path) if line.strip()})
    if not splits:
        raise ValueError(f"no Flickr_8k.trainImages.txt beside {tokens}: put the official split lists there")
    for number, line in enumerate(_lines(tokens), 1):
        key, tab, text = line.rstrip("\n").partition("\t")
        name, hash_, _ = key.rpartition("#")
        if line.strip() and not (tab and hash_):
            raise ValueError(f"{tokens} line {number} is not `file#k<TAB>caption`: {line.strip()[:60]!r}")
        # The token file describes 8,092 images, of which the lists name 8,000.
        if name in splits:
            yield splits[name], {"id": key, "image": listing.find(name), "text": text.strip()}


def vqav2(raw: str | Path) -> Iterator[Pair]:
    """VQA v1/v2 questions and annotations by split: {id: question_id, image, text, answers, multiple_choice_answer}.

    Official file names or plain questions.json / annotations.json. Questions without an annotations file (the test
    splits) have no answers and None.
    """
    raw = _folder(raw)
    detect(raw, "vqav2")
    for file in _question_files(raw):
        content = _json(file)
        subtype = str(content.get("data_subtype") or _subtype(file))
        answers = _annotations(raw, file)
        others = [name for name in ("train2014", "val2014", "test2015") if name != subtype]
        listing = _Listing(raw, subtype, "images", f"images/{subtype}", "", *others)
        prefixes = [subtype.replace("test-dev", "test"), *others]
        for number, question in enumerate(_field(content, "questions", list, file)):
            where = f"{file} questions[{number}]"
            id = _field(question, "question_id", int, where)
            image = _field(question, "image_id", int, where)
            names = [f"COCO_{prefix}_{image:012d}{end}" for prefix in prefixes for end in (".jpg", ".png")]
            path = listing.find(*names, f"{image:012d}.jpg", f"{image:012d}.png")
            if answers is not None and id not in answers:
                raise ValueError(f"{where} has question_id {id}, which its annotations file does not answer")
            given, chosen = answers[id] if answers is not None else ([], None)
            text = _field(question, "question", str, where)
            record = {"id": id, "image": path, "text": text, "answers": given, "multiple_choice_answer": chosen}
            yield _split_name(subtype, str(file)), record


def easy_vqa(raw: str | Path) -> Iterator[Pair]:
    """easy-VQA: {train,test}/questions.json of [question, answer, image]; its test is our val."""
    raw = _folder(raw)
    detect(raw, "easy_vqa")
    for folder, name in (("train", "train"), ("test", "val")):
        file = raw / folder / "questions.json"
        for number, row in enumerate(_json(file) if file.is_file() else ()):
            if not (isinstance(row, list) and len(row) == 3):
                raise ValueError(f"{file} [{number}] is not [question, answer, image]: {str(row)[:60]}")
            text, answer, image = row
            yield name, _answered(f"{folder}-{number}", raw / folder / "images" / f"{image}.png", text, answer)


def daquar(raw: str | Path, *, held_out: float = 0.1) -> Iterator[Pair]:
    """DAQUAR: `qa.*.txt` (question line, answer line) or `data_*.csv`; one person's answer, perhaps "book, cup".

    The image's name leaves the question. Where there is no test or val file, the questions on a share `held_out` of the
    training images are val.
    """
    raw = _folder(raw)
    detect(raw, "daquar")
    files = _daquar_files(raw)
    listing = _Listing(raw, "images", "")
    for name, file in files.items():
        rows = _daquar_csv(file) if file.suffix == ".csv" else _daquar_txt(file)
        for number, (question, answer, image) in enumerate(rows):
            text = DAQUAR_IMAGE.sub("image", DAQUAR_ENDING.sub("", question)).rstrip("? ") + "?"
            path = listing.find(f"{image}.jpg", f"{image}.png")
            # The original writes table_lamp where people and the table's makers write two words.
            answer = ", ".join(" ".join(part.replace("_", " ").split()) for part in answer.split(",") if part.strip())
            side = "val" if len(files) == 1 and name == "train" and holdout(image, held_out) else name
            yield side, _answered(f"{name}-{number}", path, text, answer)


def split(records: Iterable[Record], raw: str | Path, *, held_out: float = HELD_OUT) -> Iterator[Pair]:
    """Give records of `image_folder` or `text_files` their splits: by the folders train, val, test right below `raw`.

    Without a val folder, a share `held_out` of what would be train becomes val, chosen by hash of the id.
    """
    names = {path.name: SPLITS[path.name.lower()] for path in _folder(raw).iterdir() if path.name.lower() in SPLITS}
    for record in records:
        name = names.get(record["id"].partition("/")[0], "train")
        if name == "train" and "val" not in names.values() and holdout(record["id"], held_out):
            name = "val"
        yield name, record


def holdout(key: str, share: float) -> bool:
    """Whether `key` (say an image's name: its questions stay together) is in the held-out share; the same for ever."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64


class _Listing:
    """Image files of some folders below `base`, each listed once; the folders named first win."""

    def __init__(self, base: Path, *folders: str) -> None:
        self.base, self.folders = base.absolute(), folders
        self.listed: dict[str, dict[str, str]] = {}

    def find(self, *names: str, folder: str = "") -> str:
        """Absolute path of the first of `names` that exists; else where the first name was expected."""
        folders = [*([folder] if folder else []), *self.folders]
        # "images" and the folder an entry names may be nested either way.
        folders += [f"{outer}/{folder}" for outer in self.folders if outer and folder]
        for place in folders:
            if place not in self.listed:
                path = self.base / place
                self.listed[place] = {entry.name: entry.path for entry in os.scandir(path)} if path.is_dir() else {}
            for name in names:
                if name in self.listed[place]:
                    return self.listed[place][name]
        return str(self.base / folders[0] / names[0])


def _understands(name: str, raw: Path) -> bool:
    if name == "karpathy" and raw.is_file():
        return raw.suffix == ".json"
    raw = _folder(raw)
    if name == "karpathy":
        return bool(_found(raw, "dataset_*.json"))
    if name == "flickr8k":
        return bool(_found(raw, "*Flickr8k.token.txt"))
    if name == "easy_vqa":
        return any(isinstance(_json(file), list) for file in raw.glob("*/questions.json"))
    if name == "vqav2":
        return bool(_question_files(raw))
    if name == "daquar":
        return bool(_daquar_files(raw))
    wanted = IMAGES if name == "image_folder" else {".txt"}
    return any(path.suffix.lower() in wanted for path in _walk(raw))


def _walk(raw: Path) -> Iterator[Path]:
    """Files below `raw`, sorted, links followed once, hidden ones and macOS leftovers left out."""
    seen = set()
    for folder, folders, files in os.walk(raw, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if name[0] not in "._")
        if real not in seen:
            yield from (Path(folder) / name for name in sorted(files) if name[0] != ".")
        seen.add(real)


def _paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs as single lines of single-spaced words; long ones are cut at the last line end within LONGEST_TEXT.

    Some books of the Gutenberg selections have no blank line at all: each would be one record of a million characters.
    """
    words: list[str] = []
    size = 0
    for line in _short_lines(path):
        if words and (not line.strip() or size + len(line) > LONGEST_TEXT):
            yield " ".join(words)
            words, size = [], 0
        words += line.split()
        size += len(line)
    if words:
        yield " ".join(words)


def _short_lines(path: Path) -> Iterator[str]:
    """Lines, those beyond LONGEST_TEXT cut at spaces: some corpora are one line."""
    for line in _lines(path):
        if len(line) <= LONGEST_TEXT:
            yield line
        else:
            yield from wrap(line, LONGEST_TEXT, break_long_words=False, break_on_hyphens=False) or [""]


def _question_files(raw: Path) -> list[Path]:
    """Open-ended question files; VQA v1 asks the same ones again as MultipleChoice_*."""
    return [file for file in _found(raw, "*questions.json") if "MultipleChoice" not in file.name]


def _annotations(raw: Path, questions: Path) -> dict[int, tuple[list[str], str]] | None:
    """question_id -> (the annotators' answers as given, the chosen one) of the file that belongs to `questions`."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    beside = questions.with_name(name)
    files = [beside] if beside.is_file() else [file for file in _found(raw, name) if name != "annotations.json"]
    if not files:
        return None
    answers = {}
    for number, row in enumerate(_field(_json(files[0]), "annotations", list, files[0])):
        where = f"{files[0]} annotations[{number}]"
        given = [_field(entry, "answer", str, where) for entry in _field(row, "answers", list, where)]
        chosen = row.get("multiple_choice_answer") or Counter(given).most_common(1)[0][0]
        answers[_field(row, "question_id", int, where)] = given, chosen
    return answers


def _subtype(file: Path) -> str:
    """`val2014` of v2_OpenEnded_mscoco_val2014_questions.json; train where the name says nothing."""
    return next((part for part in reversed(file.stem.split("_")) if part.lower() in SPLITS), "train")


def _daquar_files(raw: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in [*sorted(raw.glob("qa.*.txt")), *sorted(raw.glob("data_*.csv"))]:
        name = SPLITS.get(re.split(r"[._]", file.stem)[-1], "")
        if file.suffix == ".txt" and name in files:
            raise ValueError(f"{files[name].name} and {file.name} in {raw} are both {name}: keep one of them")
        # The original text files win over the tables made from them.
        if name:
            files.setdefault(name, file)
    return files


def _daquar_txt(file: Path) -> Iterator[tuple[str, str, str]]:
    lines = [line.strip() for line in _lines(file) if line.strip()]
    for number in range(0, len(lines), 2):
        names = DAQUAR_IMAGE.findall(lines[number])
        if not names or number + 1 == len(lines):
            wrong = "names no imageN" if not names else "has no answer below it"
            raise ValueError(f"{file} line {number + 1} {wrong}: {lines[number][:60]!r}")
        yield lines[number], lines[number + 1], f"image{names[-1]}"


def _daquar_csv(file: Path) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(csv.DictReader(_lines(file)), 2):
        question, answer, image = (row.get(name) for name in ("question", "answer", "image_id"))
        if not (question and answer and image):
            raise ValueError(f"{file} line {number} lacks question, answer or image_id")
        yield question, answer, image


def _answered(id: str, image: Path | str, text: str, answer: str) -> Record:
    """A question that one person answered."""
    return {"id": id, "image": str(image), "text": text, "answers": [answer], "multiple_choice_answer": answer}


def _folder(raw: str | Path) -> Path:
    raw = Path(raw).absolute()
    if not raw.is_dir():
        raise ValueError(f"raw folder {raw} does not exist: give the folder that holds the data set")
    return raw


def _found(raw: Path, pattern: str) -> list[Path]:
    """Files of this name in `raw` or the folders right below it."""
    return sorted(raw.glob(pattern)) + sorted(raw.glob(f"*/{pattern}"))


def _only(raw: str | Path, pattern: str, what: str) -> Path:
    raw = Path(raw).absolute()
    files = [raw] if raw.is_file() else _found(_folder(raw), pattern)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{raw} should hold {what} named {pattern}, one of them; found {found}")
    return files[0]


def _split_name(name: str, where: str) -> str:
    if name.lower() not in SPLITS:
        raise ValueError(f"{where} is of split {name!r}: use one of {', '.join(SPLITS)}")
    return SPLITS[name.lower()]


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        wrong = f"{error.reason} 0x{error.object[error.start]:02x}"
        raise ValueError(f"{path} is not UTF-8 ({wrong}): convert it to UTF-8") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _field(entry: Any, name: str, kind: type, where: str | Path) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise ValueError(f"{where} has no {name} ({kind.__name__}): check that the file is whole and of this format")
    return entry[name]
