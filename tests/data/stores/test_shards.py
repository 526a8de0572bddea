"""Shards equal a slow reader of tars and the same records in files."""

import json
import pickle
import shutil
from collections import Counter
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit3.data.loader import (
    SKIPPED,
    ExampleDataset,
    RecordDataset,
    load_batches,
    sample_micro_batches,
)
from beit3.data.prepare.formats import tars
from beit3.data.prepare.formats.detect import read_pairs
from beit3.data.prepare.splits import write_splits
from beit3.data.prepare.statistics import TokenCounter
from beit3.data.stores import shard_writer
from beit3.data.stores.records import Records
from beit3.data.stores.shard_writer import write_shards
from beit3.data.stores.shards import Shards
from beit3.data.stores.split_files import locate_split
from beit3.files import format_tar_member, parse_tar_member, read_tar_member
from beit3.images import open_image
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from tests.data.prepare.test_formats import find_sample
from tests.data.prepare.test_formats_tars import (
    BROKEN_MEMBERS,
    EXPECTED_FAULTS,
    encode_image,
    make_many_members,
    make_members,
    write_tar,
)
from tests.data.test_loader import collate


def write_pairs(root: Path, raw: Path, source: str = "pairs", **options) -> dict:
    return write_shards(root, "pretrain", source, raw, captions=True, **options)


def read_slowly(root: Path, raw: Path, *, captions: bool = True) -> dict[str, list[dict]]:
    """Returns split -> records, read from each tar from start to end."""
    write_splits(
        root, "pretrain", "pairs", tars.read_webdataset(raw, captions=captions), bad_share=1.0
    )
    return {path.stem: list(Records(path)) for path in (root / "pretrain/pairs").glob("*.jsonl")}


def read_shards(root: Path, source: str = "pairs") -> dict[str, list[dict]]:
    folder = root / "pretrain" / source
    return {path.stem: list(Shards(path, root)) for path in folder.glob("*.shards")}


@pytest.fixture
def tar_root(tmp_path) -> Path:
    """Writes three tars of 40, 1 and 25 pairs, one of them in a folder."""
    write_tar(tmp_path / "raw/00000.tar", make_many_members(40))
    write_tar(tmp_path / "raw/00001.tar", make_members("only one", 3))
    write_tar(tmp_path / "raw/more/00000.tar", make_many_members(25))
    return tmp_path / "raw"


# Preparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("min_bytes", "captions"),
    [(0, True), (shard_writer.MIN_PARALLEL_BYTES, True), (shard_writer.MIN_PARALLEL_BYTES, False)],
)
def test_the_index_equals_the_slow_reader(tmp_path, tar_root, monkeypatch, min_bytes, captions):
    monkeypatch.setattr(shard_writer, "MIN_PARALLEL_BYTES", min_bytes)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    report = write_shards(tmp_path / "one", "pretrain", "pairs", tar_root, captions=captions)
    expected = read_slowly(tmp_path / "two", tar_root, captions=captions)
    records = read_shards(tmp_path / "one")
    assert (
        records == expected
        and report["records"] == {split: len(rows) for split, rows in expected.items()}
        and len(expected) == 2
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


def test_a_real_shard_gives_the_records_of_the_slow_reader(tmp_path, root):
    raw, tokenizer = find_sample("cc12m_webdataset"), TextTokenizer(root / "text.model")
    lengths = TokenCounter(
        tokenizer.encode_pieces, 64, tokenizer.unk, tokenizer.mask - tokenizer.first_piece
    )
    report = write_pairs(tmp_path / "one", raw, lengths=lengths)
    (tmp_path / "two").mkdir()
    again = write_splits(tmp_path / "two", "pretrain", "pairs", read_pairs(raw), lengths=lengths)
    assert {key: value for key, value in report.items() if key != "tars"} == again
    assert read_shards(tmp_path / "one") == {
        side: list(Records(tmp_path / f"two/pretrain/pairs/{side}.jsonl"))
        for side in report["records"]
    }
    for record in RecordDataset(
        locate_split(tmp_path / "one", "pretrain", "pairs", "train"), tmp_path / "one"
    ):
        (tmp_path / "file").write_bytes(read_tar_member(*parse_tar_member(record["image"])))
        assert torch.equal(open_image(record["image"]), open_image(tmp_path / "file"))


def test_splits_by_name(tmp_path):
    write_tar(tmp_path / "raw/x-train-0000.tar", make_many_members(30))
    write_tar(tmp_path / "raw/x-val-0000.tar", make_many_members(3))
    write_tar(tmp_path / "raw/x-val-0001.tar", make_many_members(4))
    assert write_pairs(tmp_path / "root", tmp_path / "raw")["records"] == {"train": 30, "val": 7}
    assert [record["id"] for record in read_shards(tmp_path / "root")["val"]][2:4] == [
        "x-val-0000/0002",
        "x-val-0001/0000",
    ]


def test_faults_are_counted_named_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    members = [
        *make_many_members(1000),
        *BROKEN_MEMBERS,
        ("b7.png", encode_image()),
        ("b7.txt", "  "),
    ]
    tar = write_tar(tmp_path / "raw/00000.tar", members, links={"b10.png": "/etc/passwd"})
    (tmp_path / "raw/00001.tar").write_bytes(
        write_tar(tmp_path / "whole.tar", make_many_members(60)).read_bytes()[: 30 * 6 * 512 + 700]
    )
    (tmp_path / "raw/00002.tar").write_text("<html>not found</html>")
    report = write_pairs(tmp_path / "root", tmp_path / "raw")
    assert sum(report["records"].values()) == 1002 + 30
    first, second, *rest = report["passed_over"]
    assert (
        "00001.tar is cut or damaged after 30 complete records" in first
        and "00002.tar is cut or damaged after 0" in second
    )
    faults = dict(line.removeprefix("00000/").split(": ", 1) for line in rest)
    expected = EXPECTED_FAULTS | {"b7": "its text is empty"}
    assert faults.keys() == expected.keys()
    assert all(expected[key] in faults[key] for key in expected), faults
    with pytest.raises(
        ValueError, match=r"10 of 1042 pairs records are unusable.*nothing was written"
    ):
        write_pairs(tmp_path / "root", tmp_path / "raw", bad_share=0.005)
    assert (
        len(read_shards(tmp_path / "root")["train"]) == report["records"]["train"] and tar.is_file()
    )


def test_tars_without_a_record_are_refused(tmp_path):
    write_tar(tmp_path / "raw/00000.tar", [])
    with pytest.raises(ValueError, match="no pairs records found"):
        write_pairs(tmp_path / "root", tmp_path / "raw")
    (tmp_path / "raw/00001.tar").write_text("no tar")
    with pytest.raises(
        ValueError, match=r"no pairs records found in 2 tars: .*00001\.tar is cut or damaged"
    ):
        write_pairs(tmp_path / "root", tmp_path / "raw")
    assert not list(tmp_path.rglob("*.jsonl")) and not list(
        tmp_path.glob("root/pretrain/pairs/*.shards")
    )


def test_an_interrupted_preparation_continues(tmp_path, tar_root, monkeypatch):
    read: list[str] = []

    def samples(file, *, captions, stop=""):
        if file.name == stop:
            raise KeyboardInterrupt
        read.append(str(file.relative_to(tar_root)))
        yield from tars.read_samples(file, captions=captions)

    monkeypatch.setattr(shard_writer, "read_samples", partial(samples, stop="00001.tar"))
    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path / "root", tar_root)
    assert (
        read == ["00000.tar"]
        and not read_shards(tmp_path / "root")
        and not list(tmp_path.rglob("*.partial"))
    )
    monkeypatch.setattr(shard_writer, "read_samples", samples)
    write_pairs(tmp_path / "root", tar_root)
    assert read == ["00000.tar", "00001.tar", "more/00000.tar"] and read_shards(
        tmp_path / "root"
    ) == read_slowly(tmp_path / "root", tar_root)
    assert not (tmp_path / "root/pretrain/pairs/.parts").exists()


def test_the_part_of_a_tar_that_changed_is_not_used(tmp_path, tar_root, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "open_split_writers", None)  # fails after all tars are read
        with pytest.raises(TypeError):
            write_pairs(tmp_path / "root", tar_root)
    write_tar(tar_root / "00001.tar", make_many_members(7))
    assert sum(write_pairs(tmp_path / "root", tar_root)["records"].values()) == 72


def test_the_last_way_of_preparing_replaces_the_other(tmp_path, tar_root):
    write_pairs(tmp_path, tar_root)
    read_slowly(tmp_path, tar_root)
    assert sorted(path.name for path in (tmp_path / "pretrain/pairs").iterdir()) == [
        "train.jsonl",
        "val.jsonl",
    ]
    write_pairs(tmp_path, tar_root)
    assert sorted(path.name for path in (tmp_path / "pretrain/pairs").iterdir()) == [
        "train.shards",
        "val.shards",
    ]


def test_tasks_prepare_tars_as_shards(tmp_path, tar_root):
    report = VQKD.prepare(tar_root, tmp_path, "main")
    assert sum(report["records"].values()) == 66
    dataset = RecordDataset(locate_split(tmp_path, "vqkd", "main", "train"), tmp_path)
    assert dataset[0].keys() == {"id", "image"} and open_image(dataset[0]["image"]).shape == (
        3,
        4,
        4,
    )


# Reading --------------------------------------------------------------------------------------


def test_a_root_and_its_tars_may_move_together(tmp_path, tar_root):
    (tmp_path / "old").mkdir()
    shutil.move(tar_root, tmp_path / "old/raw")
    (tmp_path / "linked").symlink_to(tmp_path / "old/raw")
    write_pairs(tmp_path / "old/root", tmp_path / "linked")
    shutil.move(tmp_path / "old", tmp_path / "new")
    (tmp_path / "linked").unlink()
    root = tmp_path / "new/root"
    assert all(
        open_image(record["image"]).shape == (3, 4, 4)
        for record in RecordDataset(locate_split(root, "pretrain", "pairs", "train"), root)
    )


def test_an_index_can_be_sent_to_workers(tmp_path, tar_root):
    write_pairs(tmp_path, tar_root)
    index = Shards(tmp_path / "pretrain/pairs/train.shards", tmp_path)
    first = index[0]
    sent = pickle.dumps(index)
    assert len(sent) < 4000 and pickle.loads(sent)[0] == first
    for outside in (-1, len(index)):
        with pytest.raises(IndexError):
            index[outside]


def test_a_tar_that_changed_or_is_gone_is_named(tmp_path, tar_root):
    write_pairs(tmp_path, tar_root)
    path = tmp_path / "pretrain/pairs/train.shards"
    last = len(Shards(path, tmp_path)) - 1
    with (tar_root / "more/00000.tar").open("ab") as tar:
        tar.write(b"more")
    with pytest.raises(
        ValueError,
        match=r"more/00000\.tar has \d+ bytes, not the \d+ of .*train\.shards: run `beit3",
    ):
        Shards(path, tmp_path)[last]
    (tar_root / "more/00000.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*more/00000\.tar"):
        Shards(path, tmp_path)[last]
    assert Shards(path, tmp_path)[0]["text"] == "caption of 0000"


def test_a_damaged_index_is_refused(tmp_path, tar_root):
    write_pairs(tmp_path, tar_root)
    path = tmp_path / "pretrain/pairs/train.shards"
    intact = path.read_bytes()
    line, _, rows = intact.partition(b"\n")
    header = json.loads(line)
    for content, message in (
        (intact[:-7], "rows: run"),
        (b"", "line of JSON"),
        (b"\x80pickle\n", "line of JSON"),
        (b"[]\n", "line of JSON"),
        (b'{"format": 3}\n', "no index"),
        (b"[" * 100_000 + b"\n", "line of JSON"),
        *(
            (json.dumps(header | change).encode() + b"\n" + rows, "damaged in its first line")
            for change in (
                {"width": "x"},
                {"width": -1},
                {"width": 10**30},
                {"captions": None},
                {"tars": None},
                {"tars": [header["tars"][0] | {"path": 3}]},
                {"tars": [header["tars"][0] | {"records": 10**30}]},
                {"tars": [{}]},
            )
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Shards(path, tmp_path)
    path.write_bytes(line + b"\n" + b"\xff" * len(rows))
    with pytest.raises(ValueError, match="train.shards is damaged in row 0: run"):
        Shards(path, tmp_path)[0]


def test_members_are_read_as_files_are(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    names = ("0.png", "1.jpg", "2.gif")
    for name in names:
        noise.save(tmp_path / name)
    tar = write_tar(tmp_path / "x.tar", [(name, (tmp_path / name).read_bytes()) for name in names])
    paths = [record["image"] for _, record in tars.read_webdataset(tar, captions=False)]
    assert all(
        torch.equal(open_image(image), open_image(tmp_path / name))
        for image, name in zip(paths, names, strict=True)
    )


def test_members_that_cannot_be_read_are_named(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("0.png", encode_image())])
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


# Training order -------------------------------------------------------------------------------


def make_example(record: dict, train: bool, *, rng: np.random.Generator) -> dict:
    """Returns an example with its id and a random number; opens its image."""
    open_image(record["image"])
    return {"id": record["id"], "draw": torch.tensor(rng.random())}


def load_ids(
    dataset: RecordDataset,
    steps: range,
    *,
    batch: int = 6,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> list[list[str]]:
    """Returns the ids of each step on one rank, with their random numbers."""
    examples = ExampleDataset({"pairs": dataset}, make_example, seed=0)
    sample_step = partial(
        sample_micro_batches,
        batch={"pairs": batch},
        sources=["pairs"],
        micro_batch=2,
        rank=rank,
        world=world,
    )
    steps = load_batches(examples, collate, sample_step, steps, workers=workers)
    return [
        [
            f"{key} {draw}"
            for batch in step
            for key, draw in zip(batch["id"], batch["draw"].tolist(), strict=True)
        ]
        for step in steps
    ]


@pytest.fixture
def dataset(tmp_path, tar_root) -> RecordDataset:
    """Returns a dataset that is shuffled within windows of 8."""
    write_pairs(tmp_path, tar_root)
    return RecordDataset(locate_split(tmp_path, "pretrain", "pairs", "train"), tmp_path, window=8)


def test_a_resumed_run_reads_what_it_would_have_read(dataset):
    complete = load_ids(dataset, range(25))
    ids = [line.partition(" 0.")[0] for line in chain(*complete)]
    size = len(dataset)
    assert size < 75 and all(
        len(set(ids[start : start + size])) == size for start in range(0, 150 - size, size)
    ), "each epoch reads all"
    assert ids[:size] != ids[size : 2 * size]
    for start in (1, 7, 11, 24):
        assert load_ids(dataset, range(start, 25)) == complete[start:]
    assert load_ids(dataset, range(3, 9), workers=2) == complete[3:9]


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_reads_the_same(dataset, world):
    single = load_ids(dataset, range(20))
    ranks = [load_ids(dataset, range(20), rank=rank, world=world) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == single


def test_an_unreadable_image_is_replaced_by_the_next_of_the_epoch(dataset, tar_root):
    good = [line.partition(" 0.")[0] for line in chain(*load_ids(dataset, range(12)))]
    broken = next(record for record in dataset if record["id"] == "00000/0007")
    tar, start, size = parse_tar_member(broken["image"])
    with Path(tar).open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    examples = ExampleDataset({"pairs": dataset}, make_example, seed=0)
    loaded = [examples[("pairs", position)] for position in range(len(dataset))]
    (position,) = (i for i, key in enumerate(good[: len(dataset)]) if key == "00000/0007")
    expected = [
        *good[:position],
        good[(position + 1) % len(dataset)],
        *good[position + 1 : len(dataset)],
    ]
    assert [example["id"] for example in loaded] == expected
    (line,) = chain(*(example[SKIPPED] for example in loaded))
    assert line.startswith("pairs record 00000/0007: ") and "is not an image" in line


def test_a_limit_keeps_a_fraction_of_each_tar(tmp_path, tar_root):
    """An epoch reads each record once; in windows of one, those of a tar after one another."""
    write_pairs(tmp_path, tar_root)
    path = locate_split(tmp_path, "pretrain", "pairs", "train")
    full = RecordDataset(path, tmp_path)
    tar_sizes = Counter(record["id"].rpartition("/")[0] for record in full)
    for window in (8, 1):
        dataset = RecordDataset(path, tmp_path, limit=20, window=window)
        examples = ExampleDataset({"pairs": dataset}, make_example, seed=0)
        ids = [examples[("pairs", position)]["id"] for position in range(20)]
        assert set(ids) == {record["id"] for record in dataset} and len(set(ids)) == 20
        counts = Counter(id.rpartition("/")[0] for id in ids)
        for tar, size in tar_sizes.items():
            assert abs(counts[tar] - 20 * size / len(full)) <= 2
    assert len(list(groupby(ids, key=lambda id: id.rpartition("/")[0]))) == len(counts)


def test_reading_can_start_anywhere_in_an_epoch_of_a_thousand_shards(tmp_path):
    tar = write_tar(tmp_path / "one.tar", make_many_members(2))
    (tmp_path / "raw").mkdir()
    for number in range(1000):
        (tmp_path / f"raw/{number:05d}.tar").hardlink_to(tar)
    write_shards(tmp_path, "pretrain", "images", tmp_path / "raw", captions=False)
    dataset = RecordDataset(
        locate_split(tmp_path, "pretrain", "images", "train"), tmp_path, window=100
    )
    size, names = len(dataset), [tar["name"] for tar in dataset.stores[0].tars]
    assert size == 2000 and len(names) == 1000
    examples = ExampleDataset({"pairs": dataset}, make_example, seed=0)
    ids = [examples[("pairs", position)]["id"] for position in range(2 * size - 150, 2 * size)]
    fresh = ExampleDataset(
        {"pairs": RecordDataset(dataset.path, tmp_path, window=100)}, make_example, seed=0
    )
    assert [fresh[("pairs", position)]["id"] for position in (2 * size - 150, 2 * size - 1)] == [
        ids[0],
        ids[-1],
    ]
    assert 70 < len({key.partition("/")[0] for key in ids}) < 110, (
        "150 records of 75 to 100 tars of two"
    )


# Several datasets -----------------------------------------------------------------------------


@pytest.fixture
def mixed_datasets(tmp_path, tar_root) -> Path:
    """Writes three datasets of pairs: 66 records in tars, 20 and 6 in files (without val)."""
    write_pairs(tmp_path, tar_root, "pairs/web")
    for name, count in (("coco", 20), ("vg", 6)):
        write_tar(tmp_path / f"{name}/x-train.tar", make_many_members(count))
        write_splits(tmp_path, "pretrain", f"pairs/{name}", tars.read_webdataset(tmp_path / name))
    return tmp_path


def draw_ids(dataset: RecordDataset, count: int) -> list[str]:
    examples = ExampleDataset({"pairs": dataset}, make_example, seed=0)
    return [examples[("pairs", position)]["id"] for position in range(count)]


def test_datasets_are_found_and_named(mixed_datasets):
    train, val = (
        RecordDataset(locate_split(mixed_datasets, "pretrain", "pairs", split), mixed_datasets)
        for split in ("train", "val")
    )
    assert (
        train.path == mixed_datasets / "pretrain/pairs/train"
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
    first = RecordDataset(train.path, mixed_datasets, limit=30)
    assert {record["id"].partition("/")[0] for record in first} == {"coco", "vg", "web"} and len(
        list(first)
    ) == 30


def test_datasets_are_mixed_by_size_or_by_weight(mixed_datasets):
    path = locate_split(mixed_datasets, "pretrain", "pairs", "train")
    dataset = RecordDataset(path, mixed_datasets)
    ids = draw_ids(dataset, 2 * len(dataset))
    for epoch in (ids[: len(dataset)], ids[len(dataset) :]):
        assert sorted(epoch) == sorted(record["id"] for record in dataset), (
            "by size all datasets end their epochs together"
        )
    weighted = draw_ids(
        RecordDataset(path, mixed_datasets, weights={"coco": 2, "vg": 1, "web": 1}), 80
    )
    for period in range(0, 80, 4):
        assert Counter(key.partition("/")[0] for key in weighted[period : period + 4]) == {
            "coco": 2,
            "vg": 1,
            "web": 1,
        }
    coco = [key for key in weighted if key.startswith("coco/")]
    assert len(set(coco[:20])) == len(set(coco[20:])) == 20 and coco[:20] != coco[20:], (
        "each dataset has its own epochs"
    )
    vg = [key for key in weighted if key.startswith("vg/")]
    assert all(len(set(vg[start : start + 6])) == 6 for start in (0, 6, 12))


def test_mixed_datasets_are_resumed_and_divided_as_one(mixed_datasets):
    dataset = RecordDataset(
        locate_split(mixed_datasets, "pretrain", "pairs", "train"),
        mixed_datasets,
        window=8,
        weights={"coco": 0.5, "vg": 0.2, "web": 0.3},
    )
    complete = load_ids(dataset, range(20))
    assert load_ids(dataset, range(13, 20), workers=1) == complete[13:]
    ranks = [load_ids(dataset, range(20), rank=rank, world=3) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == complete


def test_weights_must_name_the_datasets(mixed_datasets):
    path = locate_split(mixed_datasets, "pretrain", "pairs", "train")
    for weights in (
        {"coco": 1.0},
        {"coco": 1.0, "vg": 1.0, "web": 1.0, "sbu": 1.0},
        {"coco": 1.0, "vg": 1.0, "web": 0.0},
    ):
        with pytest.raises(
            ValueError,
            match="data.weights gives .*its datasets are coco, vg, web: give each a weight above 0",
        ):
            RecordDataset(path, mixed_datasets, weights=weights)
    with pytest.raises(ValueError, match="its datasets are none"):
        RecordDataset(
            mixed_datasets / "pretrain/pairs/web/train.shards", mixed_datasets, weights={"web": 1.0}
        )


def test_two_files_of_one_split_are_refused(mixed_datasets):
    folder = mixed_datasets / "pretrain/pairs"
    shutil.copy(folder / "coco/train.jsonl", folder / "train.jsonl")
    with pytest.raises(
        ValueError, match=r"pairs/train\.jsonl and .*pairs/coco/train\.jsonl are both train"
    ):
        locate_split(mixed_datasets, "pretrain", "pairs", "train")
    (folder / "train.jsonl").unlink()
    shutil.copy(folder / "coco/train.jsonl", folder / "web/train.jsonl")
    with pytest.raises(
        ValueError, match=r"web/train\.jsonl and .*web/train\.shards are both train: keep"
    ):
        locate_split(mixed_datasets, "pretrain", "pairs", "train")
