"""The text tokenizer: SentencePiece pieces under BEiT-3's ids (BEiT-3 paper section 2.3: a vocabulary of 64k pieces).

Ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then SentencePiece id + 1 for every real piece (first 4), and <mask> = pieces + 1.
The released model has 64000 pieces, so its mask is 64001; its embedding has 64010 rows, the last eight unused.
Shapes: str <-> list[int].
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import sentencepiece

Model = str | Path | bytes

# SentencePiece's fields of a whole model: pieces 1, trainer_spec 2, normalizer_spec 3.
WHOLE = {1, 2, 3}
FILE = "text.model"
"""What its model is called in a root of records and beside weights."""
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# The trainer drops longer texts in silence, in bytes; its default of 4192 is a long paragraph.
LONGEST_LINE = 1 << 20


class TextTokenizer:
    """Text <-> ids. `model` is a SentencePiece file or its bytes; ValueError if it is neither or is cut short."""

    bos, pad, eos, unk = 0, 1, 2, 3
    first_piece = 4

    def __init__(self, model: Model) -> None:
        self._bytes, name = (
            (model, "the given bytes")
            if isinstance(model, bytes)
            else (_read(Path(model)), str(model))
        )
        if not WHOLE <= _top_level_fields(self._bytes):
            raise ValueError(
                f"{name} is not a whole SentencePiece model: download the .spm file again"
            )
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: give the .spm file") from error
        first = tuple(self._pieces.id_to_piece(i) for i in range(min(3, len(self._pieces))))
        if first != ("<unk>", "<s>", "</s>"):
            raise ValueError(
                f"{name} starts with the pieces {first}: BEiT-3's ids need <unk>, <s>, </s>"
            )

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, model_type: str = "unigram"
    ) -> "TextTokenizer":
        """A model of at most `vocab_size` pieces over `texts`. The same texts always give the same bytes.

        `model_type`: "unigram", or "bpe" for small closed vocabularies, whose words unigram would cut: it only knows
        pieces that occur in two different words.
        ValueError when the texts hold no character, or more distinct characters than `vocab_size` has room for.
        """
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text for text in texts if text.strip()),
                model_writer=written,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                normalization_rule_name="nmt_nfkc",
                max_sentence_length=LONGEST_LINE,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip() or "the texts hold no character"
            raise ValueError(
                f"cannot train a text tokenizer with vocab_size {vocab_size}: {reason}"
            ) from error
        return cls(written.getvalue())

    @property
    def bytes(self) -> "Model":
        """The SentencePiece model itself, as stored beside the weights."""
        return self._bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the model, in hex: two tokenizers with one digest give the same ids."""
        return sha256(self._bytes).hexdigest()

    @property
    def mask(self) -> int:
        """The id of <mask>."""
        return len(self._pieces) + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included; an embedding needs at least as many rows."""
        return len(self._pieces) + 2

    def pieces(self, text: str) -> list[int]:
        """Ids of the pieces alone. A special's name inside `text` ("<mask>") is plain text and never becomes its id."""
        return [piece + 1 if piece else self.unk for piece in self._pieces.encode(text)]

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """BOS, pieces, EOS: at most `max_length` ids, the last pieces dropped. ValueError for an empty text."""
        pieces = self.pieces(text)
        if not pieces:
            raise ValueError(
                f"text {text!r} is empty: every text needs at least one visible character"
            )
        if max_length is not None:
            if max_length < 3:
                raise ValueError(
                    f"max_length {max_length} leaves no room between BOS and EOS: use at least 3"
                )
            pieces = pieces[: max_length - 2]
        return [self.bos, *pieces, self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; specials, <mask> and unused rows are left out."""
        return self._pieces.decode(
            [int(i) - 1 for i in ids if self.first_piece <= i < self.mask]
        ).strip()

    def word(self, id: int) -> str:
        """The surface of one id, a leading space where it starts a word; specials by their names."""
        if self.first_piece <= id < self.mask:
            return self._pieces.id_to_piece(int(id) - 1).replace("\u2581", " ")
        if 0 <= id < self.first_piece:
            return SPECIALS[id]
        return "<mask>" if id == self.mask else f"<unused {id}>"

    def save(self, path: str | Path) -> None:
        """Write the model to `path`; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(self._bytes)
        partial.replace(path)

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[Model]]:
        return TextTokenizer, (self._bytes,)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no text tokenizer at {path}: give a SentencePiece .spm file")
    return path.read_bytes()


def _top_level_fields(model: bytes) -> set[int]:
    """Numbers of the protobuf fields in `model`; empty when it is not a chain of length-delimited fields.

    SentencePiece itself accepts a file cut between two pieces, and then every id from <mask> on is silently wrong.
    """
    fields, at = set(), 0
    while at < len(model):
        tag, at = model[at], at + 1
        length, shift = 0, 0
        while at < len(model) and shift < 35:
            length |= (model[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if model[at - 1] < 0x80:
                break
        at += length
        if tag & 7 != 2 or at > len(model):
            return set()
        fields.add(tag >> 3)
    return fields


def texts_of(paths: Iterable[str]) -> Iterator[str]:
    """The texts of files: lines of plain text, or the `text` of records (.jsonl)."""
    for path in map(Path, paths):
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    text = (
                        json.loads(line).get("text", "")
                        if path.suffix == ".jsonl"
                        else line.strip()
                    )
                    if text:
                        yield text
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read texts from {path}: {error}") from None
