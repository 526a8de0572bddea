"""The store of ids: what was written comes back by index; opening reads nothing; what is damaged or another's is refused."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from beit3.data.loader import Source
from beit3.data.stores.records import locate
from beit3.data.stores.tokens import RUN, About, Tokens
from beit3.data.text.packing import Packer
from beit3.data.text.tokenize import write_tokens
from beit3.task import load_task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.training.evaluate import refuse_other_ids

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


def expected(tokenizer: TextTokenizer) -> list[dict]:
    """The records of train, in the order of the files' names with those of folders behind."""
    found = []
    for name in ("a.txt", "c.txt", "d.txt", "b/ö.txt"):
        ids = Packer(tokenizer.pieces, 16).records(io.StringIO(TEXTS[name]))
        rows = [np.frombuffer(each, np.uint16).tolist() for each in ids]
        found += [
            {"id": f"train/{name}:{number}", "text": row} for number, row in enumerate(rows, 1)
        ]
    return found


def test_records_come_back_by_index(root, tokenizer):
    tokens, rows = Tokens(root / "pretrain/texts/train.tokens"), expected(tokenizer)
    assert [*tokens] == rows and len(tokens) == len(rows) > 10
    assert [tokens[i] for i in (3, 0, -1, np.int64(2))] == [rows[i] for i in (3, 0, -1, 2)]
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            tokens[index]
    assert tokens.tokenizer == tokenizer.digest and tokens.runs.sum() == len(tokens)
    json.dumps(tokens[0])


def test_opening_reads_no_array_and_what_is_pickled_is_the_path(root):
    """An array of a terabyte, all hole: who reads it does not come back."""
    path, size = root / "pretrain/texts/train.tokens", 1 << 39
    about = json.loads(path.read_text())
    with (path.parent / about["arrays"] / "train.ids.npy").open("r+b") as file:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": "<u2", "fortran_order": False, "shape": (size,)}
        )
        file.write(head.getvalue())
        file.truncate(len(head.getvalue()) + 2 * size)
    path.write_text(json.dumps(about | {"ids": size}))
    tokens = Tokens(path)
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy[1] == tokens[1] and len(pickle.dumps(tokens)) < 1000


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    about = About("arrays", "digest", (1 << 16) + 1, 512, 3, 1, 2)
    assert (
        about.dtype("ids") == np.uint32
        and About("arrays", "digest", 1 << 16, 512, 3, 1, 2).dtype("ids") == np.uint16
    )


def test_as_a_source(root, tokenizer):
    """`locate` finds it, `limit` cuts it, and an epoch reads every record once."""
    source = Source(locate(root, "pretrain", "texts", "train"), root)
    assert [*source] == expected(tokenizer)
    assert len(Source(source.path, root, limit=3)) == 3
    order = source.order(0, lambda name: np.random.default_rng(0))
    assert sorted(order[i] for i in range(len(source))) == [*range(len(source))]
    assert RUN < 100_000, "a window holds many runs"


def test_an_example_of_ids_is_that_of_their_words(root, tokenizer):
    """Masks are drawn from the id, so the two records need the same."""
    config = PretrainConfig(
        model=load_task("pretrain").recipes["demo"].task.model, monomodal_text_length=16
    )
    task = Pretrain(config, tokenizer=tokenizer)
    for record in Tokens(root / "pretrain/texts/train.tokens"):
        words = record | {"text": tokenizer.decode(record["text"])}
        one, two = task.example(record, False), task.example(words, False)
        assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def test_another_tokenizer_is_refused(root, tokenizer):
    other = TextTokenizer.train(
        ["Another text altogether. One two."], vocab_size=40, model_type="bpe"
    )
    sources = {"texts": Source(locate(root, "pretrain", "texts", "val"), root)}
    config = PretrainConfig(model=load_task("pretrain").recipes["demo"].task.model)
    refuse_other_ids(Pretrain(config, tokenizer=tokenizer), sources)
    with pytest.raises(
        ValueError,
        match=r"val.tokens holds ids of another text tokenizer .* give --data.text_model",
    ):
        refuse_other_ids(Pretrain(config, tokenizer=other), sources)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path, arrays: path.unlink(), "no records at"),
        (lambda path, arrays: path.write_text("{"), "is no index of tokens"),
        (lambda path, arrays: path.write_text('{"format": 1}'), "is no index of tokens"),
        (
            lambda path, arrays: path.write_text(
                path.read_text().replace('"format": 1', '"format": 9')
            ),
            "format 9, not 1",
        ),
        (
            lambda path, arrays: path.write_text(
                path.read_text().replace("tokens-1", "../tokens-1")
            ),
            "not beside it",
        ),
        (lambda path, arrays: (arrays / "train.ids.npy").unlink(), "train.ids.npy cannot be read"),
        (
            lambda path, arrays: (arrays / "train.ids.npy").write_bytes(
                (arrays / "train.ids.npy").read_bytes()[:-1]
            ),
            "cannot be read",
        ),
        (
            lambda path, arrays: (arrays / "train.records.npy").write_bytes(b""),
            "train.records.npy cannot be read",
        ),
        (
            lambda path, arrays: (arrays / "val.ids.npy").replace(arrays / "train.names.npy"),
            "is not the one that",
        ),
    ],
)
def test_what_is_damaged_is_named(root, change, words):
    path = root / "pretrain/texts/train.tokens"
    change(path, path.parent / "tokens-1")
    with pytest.raises(
        ValueError, match="run `beit3 prepare` again|write them with `beit3 prepare`"
    ) as error:
        Tokens(path)
    assert words in str(error.value) and "\n" not in str(error.value)
