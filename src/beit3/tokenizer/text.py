"""The text tokenizer: SentencePiece pieces under BEiT-3's ids (BEiT-3, section 2.3).

Ids are <s> 0, <pad> 1, </s> 2, <unk> 3, then SentencePiece id + 1 for every real piece (the first
is 4), and <mask> = pieces + 1. The released model has 64000 pieces, so its <mask> is 64001; its
embedding has 64010 rows, the last eight of them unused.
"""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import sentencepiece

from beit3.files import atomic_write

Model = str | Path | bytes

COMPLETE_FIELDS = {1, 2, 3}
"""Protobuf fields of a complete SentencePiece model: pieces, trainer_spec, normalizer_spec."""

MODEL_FILE = "text.model"
"""Name of the model's file in a root of records and beside weights."""

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")

MAX_LINE_BYTES = 1 << 20
"""The trainer silently drops longer texts; its default of 4192 is a long paragraph."""


class TextTokenizer:
    """Converts texts to ids and back.

    `model` is a SentencePiece file or its bytes. Raises ValueError where it is neither or is cut
    short.
    """

    bos, pad, eos, unk = 0, 1, 2, 3
    first_piece = 4

    def __init__(self, model: Model) -> None:
        if isinstance(model, bytes):
            self._bytes, name = model, "the given bytes"
        else:
            self._bytes, name = _read_model(Path(model)), str(model)
        if not COMPLETE_FIELDS <= _list_top_level_fields(self._bytes):
            raise ValueError(
                f"{name} is not a complete SentencePiece model: download the .spm file again"
            )
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._bytes)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: give the .spm file") from error
        first = tuple(self._pieces.id_to_piece(id) for id in range(min(3, len(self._pieces))))
        if first != ("<unk>", "<s>", "</s>"):
            raise ValueError(
                f"{name} starts with the pieces {first}: BEiT-3's ids need <unk>, <s>, </s>"
            )

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocab_size: int, model_type: str = "unigram"
    ) -> "TextTokenizer":
        """Trains a tokenizer. The same texts always give the same bytes.

        Args:
            texts: The texts.
            vocab_size: The largest number of pieces.
            model_type: "unigram", or "bpe" for small closed vocabularies. Unigram would cut their
                words, because it only knows pieces that occur in two different words.

        Raises:
            ValueError: The texts hold no character, or more distinct ones than `vocab_size`.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(text for text in texts if text.strip()),
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                normalization_rule_name="nmt_nfkc",
                max_sentence_length=MAX_LINE_BYTES,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1].strip() or "the texts hold no character"
            raise ValueError(
                f"cannot train a text tokenizer with vocab_size {vocab_size}: {reason}"
            ) from error
        return cls(model.getvalue())

    @property
    def bytes(self) -> "Model":
        """The SentencePiece model, as it is stored beside the weights."""
        return self._bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the model, in hex. Tokenizers with the same digest give the same ids."""
        return sha256(self._bytes).hexdigest()

    @property
    def mask(self) -> int:
        """The id of <mask>."""
        return len(self._pieces) + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; an embedding needs at least as many rows."""
        return len(self._pieces) + 2

    def encode_pieces(self, text: str) -> list[int]:
        """Returns the ids of a text's pieces, without BOS and EOS.

        The name of a special token inside the text ("<mask>") is plain text and never its id.
        Raises ValueError for what is no text, or holds parts that are no Unicode characters.
        """
        if not isinstance(text, str):
            raise ValueError(f"a text is expected, not a {type(text).__name__}: {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {text!r} is not Unicode at character {error.start}: its bytes were in "
                "another encoding, such as Latin-1; give it as UTF-8"
            ) from None
        return [piece + 1 if piece else self.unk for piece in self._pieces.encode(text)]

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Returns the ids of BOS, the text's pieces and EOS.

        At most `max_length` ids are returned; the last pieces are dropped. Raises ValueError for
        an empty text.
        """
        pieces = self.encode_pieces(text)
        if not pieces:
            raise ValueError(
                f"text {text!r} is empty: every text needs at least one visible character"
            )
        if max_length is not None:
            if max_length < 3:
                raise ValueError(
                    f"max_length {max_length} has no room between BOS and EOS: use at least 3"
                )
            pieces = pieces[: max_length - 2]
        return [self.bos, *pieces, self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens, <mask> and unused rows are left out."""
        pieces = [int(id) - 1 for id in ids if self.first_piece <= id < self.mask]
        return self._pieces.decode(pieces).strip()

    def id_to_piece(self, id: int) -> str:
        """Returns the text of one id, with a leading space where it starts a word.

        Special tokens are returned by their names.
        """
        if self.first_piece <= id < self.mask:
            return self._pieces.id_to_piece(int(id) - 1).replace("\u2581", " ")
        if 0 <= id < self.first_piece:
            return SPECIAL_TOKENS[id]
        return "<mask>" if id == self.mask else f"<unused {id}>"

    def save(self, path: str | Path) -> None:
        """Writes the model to `path` atomically."""
        with atomic_write(Path(path)) as file:
            file.write(self._bytes)

    def __reduce__(self) -> tuple[type["TextTokenizer"], tuple[Model]]:
        return TextTokenizer, (self._bytes,)


def read_texts(paths: Iterable[str]) -> Iterator[str]:
    """Yields the texts in files: lines of plain text, or the `text` of records (.jsonl)."""
    for path in map(Path, paths):
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if path.suffix == ".jsonl":
                        text = json.loads(line).get("text", "")
                    else:
                        text = line.strip()
                    if text:
                        yield text
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read texts from {path}: {error}") from None


def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"no text tokenizer at {path}: give a SentencePiece .spm file")
    return path.read_bytes()


def _list_top_level_fields(model: bytes) -> set[int]:
    """Returns the numbers of the protobuf fields in `model`.

    The set is empty where `model` is not a chain of length-delimited fields. SentencePiece itself
    accepts a file that was cut between two pieces, and then every id from <mask> on is wrong
    without a sign.
    """
    fields, offset = set(), 0
    while offset < len(model):
        tag = model[offset]
        offset += 1
        length, offset = _read_varint(model, offset)
        offset += length
        is_length_delimited = tag & 7 == 2
        if not is_length_delimited or offset > len(model):
            return set()
        fields.add(tag >> 3)
    return fields


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Returns the protobuf integer at `offset` (at most five bytes) and the offset behind it."""
    value = shift = 0
    while offset < len(data) and shift < 35:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        shift, offset = shift + 7, offset + 1
        if byte < 0x80:
            break
    return value, offset
