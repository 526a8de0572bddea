"""Shards against the slow reader of tars, and against the same records in files."""

import pickle
import shutil
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.loader import PASSED_OVER, Examples, Source, step_batches, step_places
from beit3.data.prepare import formats
from beit3.data.prepare.formats import tars
from beit3.data.prepare.splits import write_splits
from beit3.data.prepare.statistics import Lengths
from beit3.data.stores import shards
from beit3.data.stores.records import Records, locate
from beit3.data.stores.shards import Shards, write_shards
from beit3.files import format_tar_member, parse_tar_member, read_tar_member
from beit3.images import open_image
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from tests.data.prepare.test_formats import sample
from tests.data.prepare.test_formats_tars import BROKEN, WANTED, many, pair, picture, shard
from tests.data.test_loader import collate


def pairs(root: Path, raw: Path, source: str = "pairs", **options) -> dict:
    return write_shards(root, "pretrain", source, raw, captions=True, **options)


def slow(root: Path, raw: Path, *, captions: bool = True) -> dict[str, list[dict]]:
    """Split -> records by the reader that goes through a tar from start to end."""
    write_splits(root, "pretrain", "pairs", tars.webdataset(raw, captions=captions), bad_share=1.0)
    return {path.stem: list(Records(path)) for path in (root / "pretrain/pairs").glob("*.jsonl")}


def opened(root: Path, source: str = "pairs") -> dict[str, list[dict]]:
    folder = root / "pretrain" / source
    return {path.stem: list(Shards(path, root)) for path in folder.glob("*.shards")}


@pytest.fixture
def tarred(tmp_path) -> Path:
    """Three tars of 40, 1 and 25 pairs, one of them in a folder."""
    shard(tmp_path / "raw/00000.tar", many(40))
    shard(tmp_path / "raw/00001.tar", pair("only one", 3))
    shard(tmp_path / "raw/more/00000.tar", many(25))
    return tmp_path / "raw"


# Preparing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "captions"), [(0, True), (shards.ALONE, True), (shards.ALONE, False)]
)
def test_the_index_equals_the_slow_reader(tmp_path, tarred, monkeypatch, alone, captions):
    monkeypatch.setattr(shards, "ALONE", alone)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    report = write_shards(tmp_path / "one", "pretrain", "pairs", tarred, captions=captions)
    wanted = slow(tmp_path / "two", tarred, captions=captions)
    found = opened(tmp_path / "one")
    assert (
        found == wanted
        and report["records"] == {split: len(rows) for split, rows in wanted.items()}
        and len(wanted) == 2
    )
    assert (
        report["tars"] == 3
        and report["images"]["distinct"] == 66
        and sorted(report["records"]) == ["train", "val"]
    )
    assert {path.name for path in (tmp_path / "one/pretrain/pairs").iterdir()} == {
        "train.shards",
        "val.shards",
    }


def test_a_real_shard(tmp_path, root):
    raw, tokenizer = sample("cc12m_webdataset"), TextTokenizer(root / "text.model")
    lengths = Lengths(tokenizer.pieces, 64, tokenizer.unk, tokenizer.mask - tokenizer.first_piece)
    report = pairs(tmp_path / "one", raw, lengths=lengths)
    (tmp_path / "two").mkdir()
    again = write_splits(tmp_path / "two", "pretrain", "pairs", formats.pairs(raw), lengths=lengths)
    assert {key: value for key, value in report.items() if key != "tars"} == again
    assert opened(tmp_path / "one") == {
        side: list(Records(tmp_path / f"two/pretrain/pairs/{side}.jsonl"))
        for side in report["records"]
    }
    for record in Source(locate(tmp_path / "one", "pretrain", "pairs", "train"), tmp_path / "one"):
        (tmp_path / "file").write_bytes(read_tar_member(*parse_tar_member(record["image"])))
        assert torch.equal(open_image(record["image"]), open_image(tmp_path / "file"))


def test_splits_by_name(tmp_path):
    shard(tmp_path / "raw/x-train-0000.tar", many(30))
    shard(tmp_path / "raw/x-val-0000.tar", many(3))
    shard(tmp_path / "raw/x-val-0001.tar", many(4))
    assert pairs(tmp_path / "root", tmp_path / "raw")["records"] == {"train": 30, "val": 7}
    assert [record["id"] for record in opened(tmp_path / "root")["val"]][2:4] == [
        "x-val-0000/0002",
        "x-val-0001/0000",
    ]


def test_faults_are_counted_named_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    members = [*many(1000), *BROKEN, ("b7.png", picture()), ("b7.txt", "  ")]
    whole = shard(tmp_path / "raw/00000.tar", members, links={"b10.png": "/etc/passwd"})
    (tmp_path / "raw/00001.tar").write_bytes(
        shard(tmp_path / "whole.tar", many(60)).read_bytes()[: 30 * 6 * 512 + 700]
    )
    (tmp_path / "raw/00002.tar").write_text("<html>not found</html>")
    report = pairs(tmp_path / "root", tmp_path / "raw")
    assert sum(report["records"].values()) == 1002 + 30
    first, second, *rest = report["passed_over"]
    assert (
        "00001.tar is cut or damaged after 30 whole records" in first
        and "00002.tar is cut or damaged after 0" in second
    )
    said = dict(line.removeprefix("00000/").split(": ", 1) for line in rest)
    wanted = WANTED | {"b7": "its text is empty"}
    assert said.keys() == wanted.keys() and all(wanted[key] in said[key] for key in wanted), said
    with pytest.raises(
        ValueError, match=r"10 of 1042 pairs records are unusable.*nothing was written"
    ):
        pairs(tmp_path / "root", tmp_path / "raw", bad_share=0.005)
    assert len(opened(tmp_path / "root")["train"]) == report["records"]["train"] and whole.is_file()


def test_tars_without_a_record_are_refused(tmp_path):
    shard(tmp_path / "raw/00000.tar", [])
    with pytest.raises(ValueError, match="no pairs records found"):
        pairs(tmp_path / "root", tmp_path / "raw")
    (tmp_path / "raw/00001.tar").write_text("no tar")
    with pytest.raises(
        ValueError, match=r"no pairs records found in 2 tars: .*00001\.tar is cut or damaged"
    ):
        pairs(tmp_path / "root", tmp_path / "raw")
    assert not list(tmp_path.rglob("*.jsonl")) and not list(
        tmp_path.glob("root/pretrain/pairs/*.shards")
    )


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path, tarred, monkeypatch):
    read: list[str] = []

    def samples(file, *, captions, stop=""):
        if file.name == stop:
            raise KeyboardInterrupt
        read.append(str(file.relative_to(tarred)))
        yield from tars.samples(file, captions=captions)

    monkeypatch.setattr(shards, "samples", partial(samples, stop="00001.tar"))
    with pytest.raises(KeyboardInterrupt):
        pairs(tmp_path / "root", tarred)
    assert (
        read == ["00000.tar"]
        and not opened(tmp_path / "root")
        and not list(tmp_path.rglob("*.partial"))
    )
    monkeypatch.setattr(shards, "samples", samples)
    pairs(tmp_path / "root", tarred)
    assert read == ["00000.tar", "00001.tar", "more/00000.tar"] and opened(
        tmp_path / "root"
    ) == slow(tmp_path / "root", tarred)
    assert not (tmp_path / "root/pretrain/pairs/.parts").exists()


def test_what_was_read_of_another_tar_is_not_taken(tmp_path, tarred, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shards, "split_writers", None)  # it fails after all tars were read
        with pytest.raises(TypeError):
            pairs(tmp_path / "root", tarred)
    shard(tarred / "00001.tar", many(7))
    assert sum(pairs(tmp_path / "root", tarred)["records"].values()) == 72


def test_preparing_in_the_other_way_takes_the_place(tmp_path, tarred):
    pairs(tmp_path, tarred)
    slow(tmp_path, tarred)
    assert sorted(path.name for path in (tmp_path / "pretrain/pairs").iterdir()) == [
        "train.jsonl",
        "val.jsonl",
    ]
    pairs(tmp_path, tarred)
    assert sorted(path.name for path in (tmp_path / "pretrain/pairs").iterdir()) == [
        "train.shards",
        "val.shards",
    ]


def test_tasks_prepare_tars(tmp_path, tarred):
    report = VQKD.prepare(tarred, tmp_path, "main")
    assert sum(report["records"].values()) == 66
    source = Source(locate(tmp_path, "vqkd", "main", "train"), tmp_path)
    assert source[0].keys() == {"id", "image"} and open_image(source[0]["image"]).shape == (3, 4, 4)


# Reading -------------------------------------------------------------------------------------------------------------


def test_a_root_and_its_tars_may_move_together_and_links_are_followed(tmp_path, tarred):
    (tmp_path / "there").mkdir()
    shutil.move(tarred, tmp_path / "there/raw")
    (tmp_path / "linked").symlink_to(tmp_path / "there/raw")
    pairs(tmp_path / "there/root", tmp_path / "linked")
    shutil.move(tmp_path / "there", tmp_path / "elsewhere")
    (tmp_path / "linked").unlink()
    root = tmp_path / "elsewhere/root"
    assert all(
        open_image(record["image"]).shape == (3, 4, 4)
        for record in Source(locate(root, "pretrain", "pairs", "train"), root)
    )


def test_an_index_can_be_sent_to_workers(tmp_path, tarred):
    pairs(tmp_path, tarred)
    index = Shards(tmp_path / "pretrain/pairs/train.shards", tmp_path)
    first = index[0]
    sent = pickle.dumps(index)
    assert len(sent) < 4000 and pickle.loads(sent)[0] == first
    for wrong in (-1, len(index)):
        with pytest.raises(IndexError):
            index[wrong]


def test_a_tar_that_changed_or_went_away_is_named(tmp_path, tarred):
    pairs(tmp_path, tarred)
    path = tmp_path / "pretrain/pairs/train.shards"
    last = len(Shards(path, tmp_path)) - 1
    with (tarred / "more/00000.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(
        ValueError,
        match=r"more/00000\.tar has \d+ bytes, not the \d+ of .*train\.shards: run `beit3 prepare` again",
    ):
        Shards(path, tmp_path)[last]
    (tarred / "more/00000.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*more/00000\.tar"):
        Shards(path, tmp_path)[last]
    assert Shards(path, tmp_path)[0]["text"] == "caption of 0000"


def test_a_damaged_index_is_refused(tmp_path, tarred):
    pairs(tmp_path, tarred)
    path = tmp_path / "pretrain/pairs/train.shards"
    whole = path.read_bytes()
    none = "line of JSON"
    for bad, words in (
        (whole[:-7], "rows: run"),
        (b"", none),
        (b"\x80pickle\n", none),
        (b"[]\n", none),
        (b'{"format": 3}\n', "no index"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=words):
            Shards(path, tmp_path)


def test_members_are_read_as_files_are(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    names = ("0.png", "1.jpg", "2.gif")
    for name in names:
        noise.save(tmp_path / name)
    tar = shard(tmp_path / "x.tar", [(name, (tmp_path / name).read_bytes()) for name in names])
    found = [record["image"] for _, record in tars.webdataset(tar, captions=False)]
    assert all(
        torch.equal(open_image(image), open_image(tmp_path / name))
        for image, name in zip(found, names, strict=True)
    )


def test_members_that_cannot_be_read_are_named(tmp_path):
    tar = shard(tmp_path / "x.tar", [("0.png", picture())])
    size = tar.stat().st_size
    wrong = {
        format_tar_member(tar, 512, 1 << 40): "more than",
        format_tar_member(tar, size - 10, 100): "ends before byte",
        format_tar_member(tar, 10**17, 5): "ends before",
        format_tar_member(tar, 0, 512): "not an image",
        format_tar_member(tmp_path / "no.tar", 0, 9): "cannot read image",
    }
    for image, words in wrong.items():
        with pytest.raises(ValueError, match=words) as error:
            open_image(image)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# Training order ------------------------------------------------------------------------------------------------------


def make(record: dict, train: bool, *, rng: np.random.Generator) -> dict:
    """An example that shows its record and its randomness, after its image was opened."""
    open_image(record["image"])
    return {"id": record["id"], "draw": torch.tensor(rng.random())}


def batches(
    source: Source, steps: range, *, batch: int = 6, rank: int = 0, world: int = 1, workers: int = 0
) -> list[list[str]]:
    """The ids of each step on one process."""
    examples = Examples({"pairs": source}, make, seed=0)
    places = partial(
        step_places,
        batch={"pairs": batch},
        sources=["pairs"],
        micro_batch=2,
        rank=rank,
        world=world,
    )
    steps = step_batches(examples, collate, places, steps, workers=workers)
    return [
        [
            f"{key} {draw}"
            for batch in step
            for key, draw in zip(batch["id"], batch["draw"].tolist(), strict=True)
        ]
        for step in steps
    ]


@pytest.fixture
def source(tmp_path, tarred) -> Source:
    """Shuffled within windows of 8."""
    pairs(tmp_path, tarred)
    return Source(locate(tmp_path, "pretrain", "pairs", "train"), tmp_path, window=8)


def test_a_resume_anywhere_reads_what_would_have_been_read(source):
    whole = batches(source, range(25))
    ids = [line.partition(" 0.")[0] for line in chain(*whole)]
    size = len(source)
    assert size < 75 and all(
        len(set(ids[start : start + size])) == size for start in range(0, 150 - size, size)
    ), "each epoch reads all"
    assert ids[:size] != ids[size : 2 * size]
    for start in (1, 7, 11, 24):
        assert batches(source, range(start, 25)) == whole[start:]
    assert batches(source, range(3, 9), workers=2) == whole[3:9]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_reads_the_same_in_the_same_order(source, world):
    alone = batches(source, range(20))
    shared = [batches(source, range(20), rank=rank, world=world) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*shared, strict=True)] == alone


def test_an_unreadable_image_is_replaced_by_the_next_of_the_epoch(source, tarred):
    good = [line.partition(" 0.")[0] for line in chain(*batches(source, range(12)))]
    broken = next(record for record in source if record["id"] == "00000/0007")
    tar, start, size = parse_tar_member(broken["image"])
    with Path(tar).open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    examples = Examples({"pairs": source}, make, seed=0)
    found = [examples[("pairs", position)] for position in range(len(source))]
    (position,) = (i for i, key in enumerate(good[: len(source)]) if key == "00000/0007")
    wanted = [
        *good[:position],
        good[(position + 1) % len(source)],
        *good[position + 1 : len(source)],
    ]
    assert [example["id"] for example in found] == wanted
    (line,) = chain(*(example[PASSED_OVER] for example in found))
    assert line.startswith("pairs record 00000/0007: ") and "is not an image" in line


def test_a_limit_takes_the_first_of_the_first_tars(tmp_path, tarred):
    pairs(tmp_path, tarred)
    source = Source(locate(tmp_path, "pretrain", "pairs", "train"), tmp_path, limit=45, window=8)
    examples = Examples({"pairs": source}, make, seed=0)
    ids = {examples[("pairs", position)]["id"] for position in range(45)}
    assert ids == {record["id"] for record in source} and len(ids) == len(source) == 45


def test_a_thousand_shards_are_entered_anywhere(tmp_path):
    one = shard(tmp_path / "one.tar", many(2))
    (tmp_path / "raw").mkdir()
    for number in range(1000):
        (tmp_path / f"raw/{number:05d}.tar").hardlink_to(one)
    write_shards(tmp_path, "pretrain", "images", tmp_path / "raw", captions=False)
    source = Source(locate(tmp_path, "pretrain", "images", "train"), tmp_path, window=100)
    size, names = len(source), [tar["name"] for tar in source.stores[0].tars]
    assert size == 2000 and len(names) == 1000
    examples = Examples({"pairs": source}, make, seed=0)
    found = [examples[("pairs", position)]["id"] for position in range(2 * size - 150, 2 * size)]
    fresh = Examples({"pairs": Source(source.path, tmp_path, window=100)}, make, seed=0)
    assert [fresh[("pairs", position)]["id"] for position in (2 * size - 150, 2 * size - 1)] == [
        found[0],
        found[-1],
    ]
    assert 70 < len({key.partition("/")[0] for key in found}) < 110, (
        "150 records of 75 to 100 tars of two"
    )


# Several sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path, tarred) -> Path:
    """A root whose pairs are three sets: 66 records in tars, 20 and 6 in files, the last without val."""
    pairs(tmp_path, tarred, "pairs/web")
    for name, count in (("coco", 20), ("vg", 6)):
        shard(tmp_path / f"{name}/x-train.tar", many(count))
        write_splits(tmp_path, "pretrain", f"pairs/{name}", tars.webdataset(tmp_path / name))
    return tmp_path


def drawn(source: Source, count: int) -> list[str]:
    examples = Examples({"pairs": source}, make, seed=0)
    return [examples[("pairs", position)]["id"] for position in range(count)]


def test_sets_are_found_and_named(mixed):
    train, val = (
        Source(locate(mixed, "pretrain", "pairs", split), mixed) for split in ("train", "val")
    )
    assert (
        train.path == mixed / "pretrain/pairs/train"
        and train.names == ["coco", "vg", "web"]
        and val.names == ["web"]
    )
    assert len(train) + len(val) == 92 and train.sizes == [20, 6, 66 - len(val)]
    assert len({record["id"] for record in train}) == len(train) and all(
        r["id"].startswith("web/") for r in val
    )
    assert Counter(record["id"].partition("/")[0] for record in train) == dict(
        zip(train.names, train.sizes, strict=True)
    )
    first = Source(train.path, mixed, limit=30)
    assert {record["id"].partition("/")[0] for record in first} == {"coco", "vg", "web"} and len(
        list(first)
    ) == 30


def test_sets_are_mixed_by_size_or_by_weight(mixed):
    path = locate(mixed, "pretrain", "pairs", "train")
    source = Source(path, mixed)
    ids = drawn(source, 2 * len(source))
    for epoch in (ids[: len(source)], ids[len(source) :]):
        assert sorted(epoch) == sorted(record["id"] for record in source), (
            "by size every set ends its epoch at once"
        )
    weighted = drawn(Source(path, mixed, weights={"coco": 2, "vg": 1, "web": 1}), 80)
    for period in range(0, 80, 4):
        assert Counter(key.partition("/")[0] for key in weighted[period : period + 4]) == {
            "coco": 2,
            "vg": 1,
            "web": 1,
        }
    coco = [key for key in weighted if key.startswith("coco/")]
    assert len(set(coco[:20])) == len(set(coco[20:])) == 20 and coco[:20] != coco[20:], (
        "each set has its own epochs"
    )
    vg = [key for key in weighted if key.startswith("vg/")]
    assert all(len(set(vg[start : start + 6])) == 6 for start in (0, 6, 12))


def test_mixed_sets_resume_and_share_as_one_does(mixed):
    source = Source(
        locate(mixed, "pretrain", "pairs", "train"),
        mixed,
        window=8,
        weights={"coco": 0.5, "vg": 0.2, "web": 0.3},
    )
    whole = batches(source, range(20))
    assert batches(source, range(13, 20), workers=1) == whole[13:]
    shared = [batches(source, range(20), rank=rank, world=3) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*shared, strict=True)] == whole


def test_weights_must_name_the_sets(mixed):
    path = locate(mixed, "pretrain", "pairs", "train")
    for weights in (
        {"coco": 1.0},
        {"coco": 1.0, "vg": 1.0, "web": 1.0, "sbu": 1.0},
        {"coco": 1.0, "vg": 1.0, "web": 0.0},
    ):
        with pytest.raises(
            ValueError,
            match="data.weights gives .*its sets are coco, vg, web: give each a weight above 0",
        ):
            Source(path, mixed, weights=weights)
    with pytest.raises(ValueError, match="its sets are none"):
        Source(mixed / "pretrain/pairs/web/train.shards", mixed, weights={"web": 1.0})


def test_records_that_could_be_either_are_refused(mixed):
    folder = mixed / "pretrain/pairs"
    shutil.copy(folder / "coco/train.jsonl", folder / "train.jsonl")
    with pytest.raises(
        ValueError, match=r"pairs/train\.jsonl and .*pairs/coco/train\.jsonl are both train"
    ):
        locate(mixed, "pretrain", "pairs", "train")
    (folder / "train.jsonl").unlink()
    shutil.copy(folder / "coco/train.jsonl", folder / "web/train.jsonl")
    with pytest.raises(
        ValueError, match=r"web/train\.jsonl and .*web/train\.shards are both train: keep"
    ):
        locate(mixed, "pretrain", "pairs", "train")
