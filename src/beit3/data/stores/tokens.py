"""Texts as piece ids in memory-mapped arrays: what `beit3 prepare pretrain --source texts` writes of corpora of any size.

`<split>.tokens` is a small JSON file that names the folder of the arrays beside it and the tokenizer; the folder holds
`<split>.ids.npy` (uint16, or uint32 for large vocabularies), `<split>.records.npy` (RECORD) and `<split>.names.npy` (bytes).
Shapes: index -> record {id, text: list of ids without marks}.
"""

import json
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENDING = ".tokens"
FORMAT = 1

RECORD = np.dtype([("start", "<u8"), ("name", "<u8"), ("size", "<u4"), ("number", "<u4")])
"""Where a record begins in `ids` and how long it is; where its file's name begins in `names`, ended by a zero; its number there."""

ARRAYS = {"ids": None, "records": RECORD, "names": np.dtype("u1")}
"""Arrays of a split and their types; that of ids goes by the vocabulary."""

RUN = 256
"""Neighbouring records that an epoch keeps near each other: 256 KB of a disk, or part of a book."""

LONGEST_NAME = 1 << 13
"""Bytes; systems allow 4096."""


@dataclass(frozen=True)
class About:
    """What `<split>.tokens` says."""

    arrays: str
    """Folder of the arrays, beside the file."""
    tokenizer: str
    """SHA-256 of the text tokenizer that gave the ids."""
    vocab_size: int
    pack: int
    """Tokens of the longest record, marks included."""
    ids: int
    records: int
    names: int
    """Lengths of the three arrays."""
    format: int = FORMAT

    def dtype(self, name: str) -> np.dtype:
        return ARRAYS[name] or np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


class Tokens:
    """The records of one `.tokens` file, by index: {"id": "file:number", "text": [ids without begin and end mark]}.

    Reads as `Records` does: `len`, `[index]`, iteration; safe in loader workers, processes and threads. Opening maps the
    arrays and reads none of them, so that 160 GB take a millisecond and no memory; pickled, it is its path. `tokenizer`
    is the digest of the text tokenizer that gave the ids: whoever reads with another must refuse. ValueError when the
    file is absent, no such file, or its arrays are cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.about = read_about(self.path)
        self.tokenizer = self.about.tokenizer
        self._ids, self._records, self._names = (self._open(name) for name in ARRAYS)

    def __len__(self) -> int:
        return self.about.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        start, name, size, number = self._records[index].item()
        file = self._names[name : name + LONGEST_NAME].tobytes().partition(b"\0")[0].decode()
        return {"id": f"{file}:{number}", "text": self._ids[start : start + size].tolist()}

    @property
    def runs(self) -> np.ndarray:
        """Records of neighbouring ones that are read about the same time, as the loader's order of shards takes them."""
        return np.diff([*range(0, len(self), RUN), len(self)])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[type["Tokens"], tuple[Path]]:
        return Tokens, (self.path,)

    def _open(self, name: str) -> np.ndarray:
        path = self.path.parent / self.about.arrays / f"{self.path.stem}.{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): run `beit3 prepare` again"
            ) from None
        expected = self.about.dtype(name), (getattr(self.about, name),)
        if (array.dtype, array.shape) != expected:
            raise ValueError(
                f"{path} is not the one that {self.path} was written with: run `beit3 prepare` again"
            )
        return array.view(np.ndarray)  # of the same pages; its slices are made faster


def read_about(path: Path) -> About:
    """What a `.tokens` file says; ValueError where it is absent or none."""
    try:
        about = About(**json.loads(path.read_text(encoding="utf-8")))
        if about.format != FORMAT:
            raise ValueError(f"format {about.format}, not {FORMAT}")
        if Path(about.arrays).name != about.arrays:
            raise ValueError(f"arrays {about.arrays!r} are not beside it")
    except OSError:
        raise ValueError(f"no records at {path}: write them with `beit3 prepare`") from None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no index of tokens ({error}): run `beit3 prepare` again"
        ) from None
    return about
