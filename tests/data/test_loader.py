"""Batches are a pure function of (seed, step, rank); unreadable records are replaced."""

import pickle
from collections import Counter
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from beit3.data.loader import (
    SKIPPED,
    Collator,
    ExampleDataset,
    RecordDataset,
    load_batches,
    sample_micro_batches,
)
from beit3.data.stores.records import write_records
from beit3.images import open_image

SIZES = {"images": 7, "texts": 10}
BATCH = {"images": 4, "texts": 6}


def make_example(record: dict, train: bool, *, rng: np.random.Generator) -> dict:
    """Returns an example with its id and a random number; ids with "bad" raise an error."""
    assert train
    if record.get("bad"):
        raise ValueError(f"{record['id']} is broken")
    return {"id": record["id"], "draw": torch.tensor(rng.random())}


def collate(examples: list[dict]) -> dict:
    return {
        "id": [example["id"] for example in examples],
        "draw": torch.stack([example["draw"] for example in examples]),
    }


def open_sources(
    folder: Path, *, bad: dict[str, set[int]] | None = None
) -> dict[str, RecordDataset]:
    for name, size in SIZES.items():
        rows = ({"id": f"{name}-{i}", "bad": i in (bad or {}).get(name, ())} for i in range(size))
        write_records(folder / f"{name}.jsonl", rows)
    return {name: RecordDataset(folder / f"{name}.jsonl", folder) for name in SIZES}


def load(
    folder: Path,
    steps: range,
    *,
    workers: int = 0,
    micro_batch: int = 0,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    **bad,
):
    """Returns the batches of these steps on one rank."""
    examples = ExampleDataset(open_sources(folder, **bad), make_example, seed=seed)
    sample_step = partial(
        sample_micro_batches,
        batch=BATCH,
        sources=list(SIZES),
        micro_batch=micro_batch,
        rank=rank,
        world=world,
    )
    return list(load_batches(examples, collate, sample_step, steps, workers=workers))


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for left, right in zip(chain(*first), chain(*second), strict=True):
        assert left["id"] == right["id"] and left[SKIPPED] == right[SKIPPED]
        assert torch.equal(left["draw"], right["draw"])


def list_ids(steps: list) -> list[list[str]]:
    return [[key for batch in step for key in batch["id"]] for step in steps]


def test_a_step_visits_every_source_in_order_with_its_own_batch(tmp_path):
    for step in load(tmp_path, range(3)):
        assert [len(batch["id"]) for batch in step] == [4, 6]
        assert [{key.partition("-")[0] for key in batch["id"]} for batch in step] == [
            {"images"},
            {"texts"},
        ]


def test_positions_continue_for_ever():
    """Step s of batch B reads positions s*B to (s+1)*B - 1."""
    for step in range(5):
        images, texts = sample_micro_batches(
            step, BATCH, list(SIZES), micro_batch=0, rank=0, world=1
        )
        assert images == [("images", p) for p in range(4 * step, 4 * step + 4)]
        assert texts == [("texts", p) for p in range(6 * step, 6 * step + 6)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 100])
def test_ranks_and_micro_batches_read_the_same_positions(world, micro_batch):
    for step in (0, 3):
        complete = list(
            chain(*sample_micro_batches(step, BATCH, list(SIZES), micro_batch=0, rank=0, world=1))
        )
        ranks = [
            sample_micro_batches(
                step, BATCH, list(SIZES), micro_batch=micro_batch, rank=rank, world=world
            )
            for rank in range(world)
        ]
        assert sorted(chain(*chain(*ranks))) == complete
        assert all(
            0 < len(batch) <= (micro_batch or 100)
            for micro_batches in ranks
            for batch in micro_batches
        )
        assert [[batch[0][0] for batch in micro_batches] for micro_batches in ranks] == [
            [batch[0][0] for batch in ranks[0]]
        ] * world, "all ranks visit the sources in the same order"


def test_two_ranks_read_what_one_reads(tmp_path):
    alone = load(tmp_path, range(4))
    ranks = [load(tmp_path, range(4), rank=rank, world=2) for rank in range(2)]
    for step, *halves in zip(alone, *ranks, strict=True):
        for batch, first, second in zip(step, *halves, strict=True):
            assert batch["id"] == first["id"] + second["id"]
            assert torch.equal(batch["draw"], torch.cat((first["draw"], second["draw"])))


def test_a_batch_size_that_is_not_divisible_is_named():
    with pytest.raises(ValueError, match=r"data\.batch\.images 4 is not divisible by 3 processes"):
        sample_micro_batches(0, BATCH, list(SIZES), micro_batch=0, rank=0, world=3)


def test_epochs_are_permutations(tmp_path):
    """Seven images in steps of four: epochs end within a step, and each holds every record once."""
    seen = [key for step in load(tmp_path, range(14)) for key in step[0]["id"]]
    epochs = [seen[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(epoch) == sorted(f"images-{i}" for i in range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4, "each has an order of its own"


def test_the_seed_changes_order_and_randomness(tmp_path):
    first, second = load(tmp_path, range(3)), load(tmp_path, range(3), seed=1)
    assert list_ids(first) != list_ids(second)
    by_id = [
        {key: float(value) for key, value in zip(step[0]["id"], step[0]["draw"], strict=True)}
        for step in (first[0], second[0])
    ]
    shared = by_id[0].keys() & by_id[1].keys()
    assert shared and all(by_id[0][key] != by_id[1][key] for key in shared)


def test_the_randomness_of_a_record_changes_each_epoch(tmp_path):
    draws: dict[str, list[float]] = {}
    for step in load(tmp_path, range(14)):
        for key, value in zip(step[0]["id"], step[0]["draw"].tolist(), strict=True):
            draws.setdefault(key, []).append(value)
    assert all(len(values) == len(set(values)) == 8 for values in draws.values())


@pytest.mark.parametrize("start", [1, 4])
def test_a_resumed_run_reads_what_it_would_have_read(tmp_path, start):
    assert_same(load(tmp_path, range(6))[start:], load(tmp_path, range(start, 6)))


def test_loader_processes_change_nothing(tmp_path):
    bad = {"bad": {"texts": {3, 4}}}
    assert_same(load(tmp_path, range(5), **bad), load(tmp_path, range(5), workers=2, **bad))


def test_loader_processes_need_not_be_forked(tmp_path):
    """macOS and Python 3.14 start new processes and send them everything pickled."""
    examples = ExampleDataset(open_sources(tmp_path), make_example, seed=0)
    copy, collator = pickle.loads(pickle.dumps((examples, Collator(collate))))
    first, second = (
        collator([dataset[("texts", position)] for position in range(3)])
        for dataset in (examples, copy)
    )
    assert_same([[first]], [[second]])


def test_a_long_run_starts_at_once(tmp_path):
    """The paper's million steps of 6144 positions are never in memory together."""
    examples = ExampleDataset(open_sources(tmp_path), make_example, seed=0)
    sample_step = partial(
        sample_micro_batches, batch=BATCH, sources=list(SIZES), micro_batch=0, rank=0, world=1
    )
    steps = load_batches(examples, collate, sample_step, range(10**12), workers=0)
    assert_same(list(islice(steps, 2)), load(tmp_path, range(2)))


def test_micro_batches_cut_the_same_examples(tmp_path):
    complete, divided = load(tmp_path, range(3)), load(tmp_path, range(3), micro_batch=3)
    assert [[len(batch["id"]) for batch in step] for step in divided] == [[3, 1, 3, 3]] * 3
    assert list_ids(complete) == list_ids(divided)
    for first, second in zip(complete, divided, strict=True):
        draws = [torch.cat([batch["draw"] for batch in step]) for step in (first, second)]
        assert torch.equal(*draws)


# Broken records -------------------------------------------------------------------------------


def test_a_broken_record_is_named_and_replaced_by_the_next_of_the_epoch(tmp_path):
    good = [key for step in load(tmp_path / "good", range(7)) for key in step[0]["id"]]
    steps = load(tmp_path / "bad", range(7), bad={"images": {2}})
    for position, key in enumerate(chain(*(step[0]["id"] for step in steps))):
        epoch = good[position // 7 * 7 : position // 7 * 7 + 7]
        expected = good[position]
        if expected == "images-2":
            expected = epoch[(position + 1) % 7]
        assert key == expected
    lines = list(chain(*(batch[SKIPPED] for step in steps for batch in step)))
    assert lines == ["images record images-2: images-2 is broken"] * 4, "once an epoch"
    assert_same(steps, load(tmp_path / "bad", range(7), bad={"images": {2}}))


def test_several_broken_records_in_a_row_are_replaced(tmp_path):
    bad = {"texts": set(range(1, 10))}
    steps = load(tmp_path, range(2), bad=bad)
    assert all(set(step[1]["id"]) == {"texts-0"} for step in steps)
    names = {line.split(" record ")[1].split(":")[0] for step in steps for line in step[1][SKIPPED]}
    assert names == {f"texts-{i}" for i in range(1, 10)}


def test_nothing_but_broken_records_is_an_error(tmp_path):
    message = (
        r"7 records of .*images\.jsonl in a row cannot be read; "
        r"the first: images record images-\d+: .*broken"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path, range(1), bad={"images": set(range(7))})


def test_a_damaged_image_file_is_named(tmp_path, root):
    """`open_image` raises the error that is reported."""
    records = [dict(record) for record in RecordDataset(root / "vqkd/main/train.jsonl", root)][:4]
    (tmp_path / "half.png").write_bytes(Path(records[1]["image"]).read_bytes()[:90])
    records[1]["image"] = str(tmp_path / "half.png")
    write_records(tmp_path / "train.jsonl", records)
    examples = ExampleDataset(
        {"main": RecordDataset(tmp_path / "train.jsonl", tmp_path)},
        lambda r, train, rng: {"x": open_image(r["image"])},
        seed=0,
    )
    failures = [line for position in range(4) for line in examples[("main", position)][SKIPPED]]
    assert len(failures) == 1 and "half.png" in failures[0] and records[1]["id"] in failures[0]


# Record datasets ------------------------------------------------------------------------------


def test_image_paths_become_absolute(tmp_path):
    write_records(tmp_path / "a.jsonl", ({"id": i, "image": f"x/{i}.png"} for i in range(5)))
    source = RecordDataset(tmp_path / "a.jsonl", tmp_path)
    write_records(
        tmp_path / "b.jsonl",
        [{"id": "1", "image": "x/1.png", "image2": "../2.png"}, {"id": "2", "text": "a"}],
    )
    pair, text = RecordDataset(tmp_path / "b.jsonl", tmp_path)
    assert (
        pair["image2"] == str(tmp_path / "../2.png")
        and pair["image"] == str(tmp_path / "x/1.png")
        and "image" not in text
    )
    assert [record["id"] for record in source] == [0, 1, 2, 3, 4] and len(source) == 5
    assert source[1]["image"] == str(tmp_path / "x/1.png")


def test_a_limit_keeps_records_of_each_class_of_a_sorted_file(tmp_path):
    """They are the same for every seed, an epoch reads each once, and a larger limit keeps them."""
    path = tmp_path / "a.jsonl"
    write_records(path, ({"id": str(i), "label": i // 60} for i in range(600)))
    limited, larger, full = (RecordDataset(path, tmp_path, limit=limit) for limit in (60, 90, 900))
    ids = [record["id"] for record in limited]
    assert len(limited) == len(set(ids)) == 60 and len(full) == 600
    assert ids == sorted(ids, key=int) and set(ids) < {record["id"] for record in larger}
    counts = Counter(record["label"] for record in limited)
    assert len(counts) == 10 and min(counts.values()) >= 4
    for seed in (0, 1):
        examples = ExampleDataset({"main": limited}, lambda r, train, rng: r, seed=seed)
        for start in (0, 60):
            epoch = [examples["main", position]["id"] for position in range(start, start + 60)]
            assert sorted(epoch, key=int) == ids != epoch


def test_a_limit_counts_the_records_that_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    write_records(path, ({"id": str(i)} for i in range(100)))
    source = RecordDataset(path, tmp_path, limit=20, keep=lambda record: int(record["id"]) % 2 == 0)
    ids = [int(record["id"]) for record in source]
    assert len(ids) == 20 and all(number % 2 == 0 for number in ids) and max(ids) > 90


def test_a_file_without_records_is_named(tmp_path):
    write_records(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        RecordDataset(tmp_path / "empty.jsonl", tmp_path)


def test_the_file_is_named_of_which_no_record_is_left(tmp_path):
    """A file without any record is not said to hold records that are left out, or vice versa."""
    write_records(tmp_path / "a" / "train.jsonl", [{"id": "1"}, {"id": "2"}])
    write_records(tmp_path / "b" / "train.jsonl", [])
    with pytest.raises(ValueError, match=r"b/train\.jsonl holds no records"):
        RecordDataset(tmp_path / "train", tmp_path, keep=lambda record: record["id"] == "1")
    with pytest.raises(ValueError, match=r"a/train\.jsonl holds only records that are left out"):
        RecordDataset(tmp_path / "train", tmp_path, keep=lambda record: False)


def test_rank_0_says_which_records_are_kept(tmp_path):
    """The others read none, and raise what it raises."""
    write_records(tmp_path / "good.jsonl", [{"id": str(number)} for number in range(5)])
    (tmp_path / "bad.jsonl").write_text('{"id": "1"}\n{\n')
    mp.spawn(_leave_out_records, (tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [result.pop("num_read") for result in results] == [6, 0]
    assert results[0] == results[1]
    assert results[0]["ids"] == ["2", "4"] and results[0]["num_left_out"] == 3
    assert "bad.jsonl line 2 is not a JSON object" in results[0]["error"]


def _leave_out_records(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    read: list[str] = []

    def keep(record: dict) -> bool:
        read.append(record["id"])
        return record["id"] in ("2", "4")

    dataset = RecordDataset(folder / "good.jsonl", folder, keep=keep)
    with pytest.raises(ValueError, match="not a JSON object") as error:
        RecordDataset(folder / "bad.jsonl", folder, keep=keep)
    result = {"ids": [record["id"] for record in dataset], "num_left_out": dataset.num_left_out}
    torch.save(result | {"error": str(error.value), "num_read": len(read)}, folder / f"{rank}.pt")
    dist.destroy_process_group()
