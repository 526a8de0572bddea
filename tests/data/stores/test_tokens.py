"""Token ids in arrays: access by index, opening without reading, errors for damaged files."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beit3.data.loader import RecordDataset
from beit3.data.stores.split_files import locate_split
from beit3.data.stores.tokens import RUN_LENGTH, Tokens, TokensHeader
from beit3.data.text.packing import Packer
from beit3.data.text.tokenize import write_tokens
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.training.sources import check_tokenizer

TEXTS = {
    "a.txt": "One two three. " * 9,
    "b/ö.txt": "Four five. " * 30,
    "c.txt": " \n",
    "d.txt": "Six.",
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS.values(), vocab_size=40, model_type="bpe")


@pytest.fixture
def raw(tmp_path) -> Path:
    for name, text in TEXTS.items():
        for split in ("train", "val"):
            path = tmp_path / "raw" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path / "raw"


@pytest.fixture
def root(raw, tokenizer, tmp_path) -> Path:
    write_tokens(raw, tmp_path / "root/pretrain/texts", tokenizer, pack=16, workers=1)
    tokenizer.save(tmp_path / "root/text.model")
    return tmp_path / "root"


def make_records(tokenizer: TextTokenizer) -> list[dict]:
    """Returns the train records in the order of file names, those in directories last."""
    records = []
    for name in ("a.txt", "c.txt", "d.txt", "b/ö.txt"):
        packed = Packer(tokenizer.encode_pieces, 16).pack(io.StringIO(TEXTS[name]))
        for number, ids in enumerate(packed, 1):
            text = np.frombuffer(ids, np.uint16).tolist()
            records.append({"id": f"train/{name}:{number}", "text": text})
    return records


def test_records_are_read_by_index(root, tokenizer):
    tokens, records = Tokens(root / "pretrain/texts/train.tokens"), make_records(tokenizer)
    assert [*tokens] == records and len(tokens) == len(records) > 10
    indices = (3, 0, -1, 2)
    assert [tokens[i] for i in (3, 0, -1, np.int64(2))] == [records[i] for i in indices]
    for index in (len(records), -len(records) - 1):
        with pytest.raises(IndexError):
            tokens[index]
    assert tokens.tokenizer_digest == tokenizer.digest
    assert tokens.run_lengths.sum() == len(tokens)
    json.dumps(tokens[0])


def test_opening_reads_no_array_and_pickling_keeps_only_the_path(root):
    """The array is a sparse file of a terabyte, which would take hours to read."""
    path, size = root / "pretrain/texts/train.tokens", 1 << 39
    header = json.loads(path.read_text())
    with (path.parent / header["arrays"] / "train.ids.npy").open("r+b") as file:
        buffer = io.BytesIO()
        fields = {"descr": "<u2", "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(buffer, fields)
        file.write(buffer.getvalue())
        file.truncate(len(buffer.getvalue()) + 2 * size)
    path.write_text(json.dumps(header | {"ids": size}))
    tokens = Tokens(path)
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy[1] == tokens[1] and len(pickle.dumps(tokens)) < 1000


@pytest.mark.parametrize("vocab_size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_a_large_vocabulary_takes_32_bits(vocab_size, dtype):
    header = TokensHeader("arrays", "digest", vocab_size, 512, 3, 1, 2)
    assert header.get_dtype("ids") == dtype


def test_a_record_dataset_reads_tokens(root, tokenizer):
    """Records can be limited, and an epoch reads every record once."""
    dataset = RecordDataset(locate_split(root, "pretrain", "texts", "train"), root)
    assert [*dataset] == make_records(tokenizer)
    limited = RecordDataset(dataset.path, root, limit=3)
    assert len(limited) == len([*limited]) == 3
    limited_order = limited.make_order(0, lambda name: np.random.default_rng(0))
    assert sorted(limited_order[i] for i in range(3)) == [0, 1, 2]
    order = dataset.make_order(0, lambda name: np.random.default_rng(0))
    assert sorted(order[i] for i in range(len(dataset))) == [*range(len(dataset))]
    assert RUN_LENGTH < 100_000, "a window holds many runs"


def test_an_example_from_ids_equals_that_from_text(root, tokenizer):
    """Masks depend on the id of a record, so both records have the same id."""
    demo: Any = load_task("pretrain").recipes["demo"].task
    config = PretrainConfig(model=demo.model, image=demo.image, monomodal_text_length=16)
    task = Pretrain(config, tokenizer=tokenizer)
    for record in Tokens(root / "pretrain/texts/train.tokens"):
        text_record = record | {"text": tokenizer.decode(record["text"])}
        from_ids, from_text = task.example(record, False), task.example(text_record, False)
        assert from_ids.keys() == from_text.keys()
        assert all(np.array_equal(from_ids[key], from_text[key]) for key in from_ids)


def test_ids_of_another_tokenizer_are_refused(root, tokenizer):
    other = TextTokenizer.train(
        ["Another text altogether. One two."], vocab_size=40, model_type="bpe"
    )
    sources = {"texts": RecordDataset(locate_split(root, "pretrain", "texts", "val"), root)}
    demo = load_task("pretrain").recipes["demo"].task
    config = PretrainConfig(model=demo.model, image=demo.image)
    check_tokenizer(Pretrain(config, tokenizer=tokenizer), sources)
    message = r"val.tokens holds ids of another text tokenizer .* give --data.text_model"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(Pretrain(config, tokenizer=other), sources)


# Damaged files --------------------------------------------------------------------------------


def replace_in(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "no records at": lambda path, arrays: path.unlink(),
    "is no index of tokens (Exp": lambda path, arrays: path.write_text("{"),
    "is no index of tokens (Tok": lambda path, arrays: path.write_text('{"format": 1}'),
    "records should be of type int": lambda path, arrays: replace_in(
        path, '"records": ', '"records": 0.5, "pack": '
    ),
    "format 9, not 1": lambda path, arrays: replace_in(path, '"format": 1', '"format": 9'),
    "not beside it": lambda path, arrays: replace_in(path, "tokens-1", "../tokens-1"),
    "ids.npy cannot be read ([": lambda path, arrays: (arrays / "train.ids.npy").unlink(),
    "ids.npy cannot be read (m": lambda path, arrays: truncate(arrays / "train.ids.npy"),
    "records.npy cannot be": lambda path, arrays: (arrays / "train.records.npy").write_bytes(b""),
    "names.npy is not the one that": lambda path, arrays: (arrays / "val.ids.npy").replace(
        arrays / "train.names.npy"
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named(root, message):
    path = root / "pretrain/texts/train.tokens"
    DAMAGES[message](path, path.parent / "tokens-1")
    remedy = "run `beit3 prepare` again|write them with `beit3 prepare`"
    with pytest.raises(ValueError, match=remedy) as error:
        Tokens(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["names", "records"])
def test_damage_inside_the_arrays_is_named(root, name):
    path = root / "pretrain/texts/train.tokens"
    array_path = path.parent / "tokens-1" / f"train.{name}.npy"
    content = array_path.read_bytes()
    start = content.index(b"\n") + 1  # behind numpy's header
    array_path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    with pytest.raises(ValueError, match=rf"train\.{name}\.npy.* is damaged at record 0: run"):
        Tokens(path)[0]
