"""Token ids of texts in memory-mapped arrays, for corpora of any size.

`beit3 prepare pretrain --source texts` writes them. `<split>.tokens` is a small JSON file. It names
the text tokenizer and a directory beside it with three arrays: `<split>.ids.npy` (uint16, or uint32
for large vocabularies), `<split>.records.npy` (RECORD_DTYPE) and `<split>.names.npy` (bytes).
A record is {"id": "file:number", "text": list of token ids without special tokens}.
"""

import json
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beit3.data.stores.arrays import open_array

SUFFIX = ".tokens"
FORMAT = 1

RECORD_DTYPE = np.dtype([("start", "<u8"), ("name", "<u8"), ("size", "<u4"), ("number", "<u4")])
"""Start and size of a record in `ids`; start of its file's name in `names`, which ends with a zero
byte; and its number within that file."""

ARRAY_DTYPES = {"ids": None, "records": RECORD_DTYPE, "names": np.dtype("u1")}
"""Arrays of a split and their types. The type of the ids depends on the vocabulary."""

RUN_LENGTH = 256
"""Number of neighboring records that an epoch keeps together: 256 KB of disk, or part of a book."""

MAX_NAME_BYTES = 1 << 13
"""Longest name of a file; systems allow 4096 bytes."""


@dataclass(frozen=True)
class TokensHeader:
    """The content of `<split>.tokens`."""

    arrays: str
    """Name of the directory of the arrays, beside the file."""
    tokenizer: str
    """SHA-256 of the text tokenizer that made the ids."""
    vocab_size: int
    pack: int
    """Number of tokens of the longest record, special tokens included."""
    ids: int
    """Length of this array, as the next two."""
    records: int
    names: int
    format: int = FORMAT

    def get_dtype(self, name: str) -> np.dtype:
        """Returns the type of an array."""
        return ARRAY_DTYPES[name] or np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def to_json(self) -> str:
        """Returns the header as the text of its file."""
        return json.dumps(asdict(self), indent=1) + "\n"


class Tokens:
    """The records of one `.tokens` file, by index: {"id": "file:number", "text": token ids}.

    Instances may be used in loader workers, processes and threads; pickled, they are their path.
    Opening maps the arrays without reading them: 160 GB take a millisecond and no memory. Whoever
    reads with a text tokenizer whose digest is not `tokenizer_digest` must refuse the file. Raises
    ValueError when the file is absent or malformed, or its arrays are truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_tokens_header(self.path)
        self._ids, self._records, self._names = (self._open_array(name) for name in ARRAY_DTYPES)

    def __len__(self) -> int:
        return self.header.records

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        start, name_start, size, number = self._records[index].item()
        name, _, _ = (
            self._names[name_start : name_start + MAX_NAME_BYTES].tobytes().partition(b"\0")
        )
        ids = self._ids[start : start + size].tolist()
        try:
            file_name = name.decode()
        except UnicodeDecodeError:
            file_name = ""
        if len(ids) != size or not file_name:
            paths = " or ".join(str(self._locate_array(name)) for name in ("names", "records"))
            raise ValueError(f"{paths} is damaged at record {index}: run `beit3 prepare` again")
        return {"id": f"{file_name}:{number}", "text": ids}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __reduce__(self) -> tuple[type["Tokens"], tuple[Path]]:
        return Tokens, (self.path,)

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the text tokenizer that made the ids."""
        return self.header.tokenizer

    @property
    def run_lengths(self) -> np.ndarray:
        """Number of records in each run of neighbors that are read at about the same time."""
        return np.diff([*range(0, len(self), RUN_LENGTH), len(self)])

    def _locate_array(self, name: str) -> Path:
        return self.path.parent / self.header.arrays / f"{self.path.stem}.{name}.npy"

    def _open_array(self, name: str) -> np.ndarray:
        path = self._locate_array(name)
        array = open_array(path, f"{self.path} needs it; run `beit3 prepare` again")
        expected = self.header.get_dtype(name), (getattr(self.header, name),)
        if (array.dtype, array.shape) != expected:
            raise ValueError(
                f"{path} is not the one that {self.path} was written with: "
                "run `beit3 prepare` again"
            )
        return array.view(np.ndarray)  # the same memory; slicing it is faster than a memmap


def read_tokens_header(path: Path) -> TokensHeader:
    """Reads a `.tokens` file. Raises ValueError when it is absent or malformed."""
    try:
        header = TokensHeader(**json.loads(path.read_text(encoding="utf-8")))
        for name, value in asdict(header).items():
            kind = str if name in ("arrays", "tokenizer") else int
            if type(value) is not kind:
                raise ValueError(f"{name} should be of type {kind.__name__}")
        if header.format != FORMAT:
            raise ValueError(f"format {header.format}, not {FORMAT}")
        if Path(header.arrays).name != header.arrays:
            raise ValueError(f"arrays {header.arrays!r} are not beside it")
    except OSError:
        raise ValueError(f"no records at {path}: write them with `beit3 prepare`") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no index of tokens ({error}): run `beit3 prepare` again"
        ) from None
    return header
