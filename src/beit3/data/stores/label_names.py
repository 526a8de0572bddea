"""Files beside the records that name a head's outputs: the answer list of VQA, class names."""

import json
from collections.abc import Sequence
from pathlib import Path

from beit3.files import write_text

ANSWERS_FILE = "answer2label.txt"
CLASSES_FILE = "classes.txt"


def read_answers(path: Path) -> tuple[str, ...]:
    """Reads an answer list in the order of the head's outputs.

    The file holds JSON lines {"answer", "label"} in any order, as released, or one answer per
    line in the head's order. In the second form a blank line is the answer "", which VQAv2's list
    has; at the end of the file it is none.

    Raises:
        ValueError: The file is absent, or its labels are not 0 to A - 1, each once.
    """
    if not path.exists():
        raise ValueError(f"no answer list at {path}: run beit3 prepare vqa, or give one")
    text = path.read_text(encoding="utf-8").rstrip()
    if not text.lstrip().startswith("{"):
        return tuple(line.strip() for line in text.splitlines())
    try:
        entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        labeled = sorted((int(entry["label"]), str(entry["answer"])) for entry in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no answer list of {{"answer", "label"}} lines: {error}'
        ) from None
    if [label for label, _ in labeled] != list(range(len(labeled))):
        raise ValueError(f"{path}: its labels are not 0 to {len(labeled) - 1}, each once")
    return tuple(answer for _, answer in labeled)


def write_answers(path: Path, answers: Sequence[str]) -> None:
    """Writes an answer list as the release has it, one {"answer", "label"} per line."""
    lines = [
        json.dumps({"answer": answer, "label": label}, ensure_ascii=False)
        for label, answer in enumerate(answers)
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_class_names(path: Path) -> tuple[str, ...]:
    """Reads class names, one per line in the order of the labels."""
    if not path.exists():
        raise ValueError(
            f"no class names at {path}: run beit3 prepare imagenet, or give one name per line"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def write_class_names(path: Path, names: Sequence[str]) -> None:
    """Writes class names, one per line in the order of the labels."""
    write_text(path, "".join(f"{name}\n" for name in names))
