"""Batches as a pure function of (seed, step, process), and records that cannot be read."""

import pickle
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3.data.loader import PASSED_OVER, Examples, Source, Stack, step_batches, step_places
from beit3.data.stores.records import write_records
from beit3.images import open_image

SIZES = {"images": 7, "texts": 10}
BATCH = {"images": 4, "texts": 6}


def make(record: dict, train: bool, *, rng: np.random.Generator) -> dict:
    """An example that shows its record and its randomness; records called bad are faults."""
    assert train
    if record.get("bad"):
        raise ValueError(f"{record['id']} is broken")
    return {"id": record["id"], "draw": torch.tensor(rng.random())}


def collate(examples: list[dict]) -> dict:
    return {
        "id": [example["id"] for example in examples],
        "draw": torch.stack([example["draw"] for example in examples]),
    }


def sources(folder: Path, *, bad: dict[str, set[int]] | None = None) -> dict[str, Source]:
    for name, size in SIZES.items():
        rows = ({"id": f"{name}-{i}", "bad": i in (bad or {}).get(name, ())} for i in range(size))
        write_records(folder / f"{name}.jsonl", rows)
    return {name: Source(folder / f"{name}.jsonl", folder) for name in SIZES}


def run(
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
    """The batches of these steps on one process."""
    examples = Examples(sources(folder, **bad), make, seed=seed)
    places = partial(
        step_places,
        batch=BATCH,
        sources=list(SIZES),
        micro_batch=micro_batch,
        rank=rank,
        world=world,
    )
    return list(step_batches(examples, collate, places, steps, workers=workers))


def same(one: list, two: list) -> None:
    assert len(one) == len(two)
    for left, right in zip(chain(*one), chain(*two), strict=True):
        assert left["id"] == right["id"] and left[PASSED_OVER] == right[PASSED_OVER]
        assert torch.equal(left["draw"], right["draw"])


def ids(steps: list) -> list[list[str]]:
    return [[key for batch in step for key in batch["id"]] for step in steps]


def test_a_step_visits_every_source_in_order_with_its_own_batch(tmp_path):
    for step in run(tmp_path, range(3)):
        assert [len(batch["id"]) for batch in step] == [4, 6]
        assert [{key.partition("-")[0] for key in batch["id"]} for batch in step] == [
            {"images"},
            {"texts"},
        ]


def test_places_count_on_for_ever():
    """Step s of batch B reads positions s*B to (s+1)*B - 1."""
    for step in range(5):
        images, texts = step_places(step, BATCH, list(SIZES), micro_batch=0, rank=0, world=1)
        assert images == [("images", p) for p in range(4 * step, 4 * step + 4)]
        assert texts == [("texts", p) for p in range(6 * step, 6 * step + 6)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 100])
def test_any_processes_and_micro_batches_read_the_same(world, micro_batch):
    for step in (0, 3):
        whole = list(chain(*step_places(step, BATCH, list(SIZES), micro_batch=0, rank=0, world=1)))
        shares = [
            step_places(step, BATCH, list(SIZES), micro_batch=micro_batch, rank=rank, world=world)
            for rank in range(world)
        ]
        assert sorted(chain(*chain(*shares))) == whole
        assert all(0 < len(piece) <= (micro_batch or 100) for share in shares for piece in share)
        assert [[piece[0][0] for piece in share] for share in shares] == [
            [piece[0][0] for piece in shares[0]]
        ] * world, "all processes meet the sources in the same order"


def test_two_processes_draw_what_one_draws(tmp_path):
    alone = run(tmp_path, range(4))
    shares = [run(tmp_path, range(4), rank=rank, world=2) for rank in range(2)]
    for step, *halves in zip(alone, *shares, strict=True):
        for batch, first, second in zip(step, *halves, strict=True):
            assert batch["id"] == first["id"] + second["id"]
            assert torch.equal(batch["draw"], torch.cat((first["draw"], second["draw"])))


def test_a_batch_that_does_not_divide_names_the_field():
    with pytest.raises(ValueError, match=r"data\.batch\.images 4 does not divide over 3 processes"):
        step_places(0, BATCH, list(SIZES), micro_batch=0, rank=0, world=3)


def test_epochs_are_permutations(tmp_path):
    """Seven images in steps of four: epochs end within a step, and each holds every record once."""
    seen = [key for step in run(tmp_path, range(14)) for key in step[0]["id"]]
    epochs = [seen[start : start + 7] for start in range(0, 56, 7)]
    assert all(sorted(epoch) == sorted(f"images-{i}" for i in range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4, "each in an order of its own"


def test_seeds_change_order_and_draws(tmp_path):
    first, second = run(tmp_path, range(3)), run(tmp_path, range(3), seed=1)
    assert ids(first) != ids(second)
    by_id = [
        {key: float(value) for key, value in zip(step[0]["id"], step[0]["draw"], strict=True)}
        for step in (first[0], second[0])
    ]
    shared = by_id[0].keys() & by_id[1].keys()
    assert shared and all(by_id[0][key] != by_id[1][key] for key in shared)


def test_a_record_draws_anew_each_epoch(tmp_path):
    draws: dict[str, list[float]] = {}
    for step in run(tmp_path, range(14)):
        for key, value in zip(step[0]["id"], step[0]["draw"].tolist(), strict=True):
            draws.setdefault(key, []).append(value)
    assert all(len(values) == len(set(values)) == 8 for values in draws.values())


@pytest.mark.parametrize("start", [1, 4])
def test_a_resume_reads_what_would_have_come(tmp_path, start):
    same(run(tmp_path, range(6))[start:], run(tmp_path, range(start, 6)))


def test_loader_processes_change_nothing(tmp_path):
    bad = {"bad": {"texts": {3, 4}}}
    same(run(tmp_path, range(5), **bad), run(tmp_path, range(5), workers=2, **bad))


def test_loader_processes_need_not_be_forked(tmp_path):
    """macOS and Python 3.14 start them afresh and send them everything pickled."""
    examples = Examples(sources(tmp_path), make, seed=0)
    again, stack = pickle.loads(pickle.dumps((examples, Stack(collate))))
    one, two = (
        stack([these[("texts", place)] for place in range(3)]) for these in (examples, again)
    )
    same([[one]], [[two]])


def test_a_long_run_starts_at_once(tmp_path):
    """The paper's million steps of 6144 places are never in memory together."""
    examples = Examples(sources(tmp_path), make, seed=0)
    places = partial(step_places, batch=BATCH, sources=list(SIZES), micro_batch=0, rank=0, world=1)
    steps = step_batches(examples, collate, places, range(10**12), workers=0)
    same(list(islice(steps, 2)), run(tmp_path, range(2)))


def test_micro_batches_cut_the_same_examples(tmp_path):
    whole, cut = run(tmp_path, range(3)), run(tmp_path, range(3), micro_batch=3)
    assert [[len(batch["id"]) for batch in step] for step in cut] == [[3, 1, 3, 3]] * 3
    assert ids(whole) == ids(cut)
    for one, two in zip(whole, cut, strict=True):
        assert torch.equal(
            torch.cat([batch["draw"] for batch in one]), torch.cat([batch["draw"] for batch in two])
        )


# Broken records ------------------------------------------------------------------------------------------------------


def test_a_broken_record_is_named_and_replaced_by_the_next_of_the_epoch(tmp_path):
    good = [key for step in run(tmp_path / "good", range(7)) for key in step[0]["id"]]
    steps = run(tmp_path / "bad", range(7), bad={"images": {2}})
    for position, key in enumerate(chain(*(step[0]["id"] for step in steps))):
        epoch = good[position // 7 * 7 : position // 7 * 7 + 7]
        wanted = good[position]
        assert key == (wanted if wanted != "images-2" else epoch[(position + 1) % 7])
    lines = list(chain(*(batch[PASSED_OVER] for step in steps for batch in step)))
    assert lines == ["images record images-2: images-2 is broken"] * 4, "once an epoch"
    same(steps, run(tmp_path / "bad", range(7), bad={"images": {2}}))


def test_several_broken_ones_in_a_row(tmp_path):
    bad = {"texts": set(range(1, 10))}
    steps = run(tmp_path, range(2), bad=bad)
    assert all(set(step[1]["id"]) == {"texts-0"} for step in steps)
    names = {
        line.split(" record ")[1].split(":")[0] for step in steps for line in step[1][PASSED_OVER]
    }
    assert names == {f"texts-{i}" for i in range(1, 10)}


def test_nothing_but_broken_records_is_an_error(tmp_path):
    message = r"7 records of .*images\.jsonl in a row cannot be read; the first: images record images-\d+: .*broken"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, range(1), bad={"images": set(range(7))})


def test_a_damaged_image_file(tmp_path, root):
    """The same with the real reader."""
    rows = [dict(record) for record in Source(root / "vqkd/main/train.jsonl", root)][:4]
    (tmp_path / "half.png").write_bytes(Path(rows[1]["image"]).read_bytes()[:90])
    rows[1]["image"] = str(tmp_path / "half.png")
    write_records(tmp_path / "train.jsonl", rows)
    examples = Examples(
        {"main": Source(tmp_path / "train.jsonl", tmp_path)},
        lambda r, train, rng: {"x": open_image(r["image"])},
        seed=0,
    )
    failures = [line for place in range(4) for line in examples[("main", place)][PASSED_OVER]]
    assert len(failures) == 1 and "half.png" in failures[0] and rows[1]["id"] in failures[0]


# Sources -------------------------------------------------------------------------------------------------------------


def test_image_paths_become_absolute_and_limit_takes_the_first(tmp_path):
    write_records(tmp_path / "a.jsonl", ({"id": i, "image": f"x/{i}.png"} for i in range(5)))
    source = Source(tmp_path / "a.jsonl", tmp_path, limit=3)
    write_records(
        tmp_path / "b.jsonl",
        [{"id": "1", "image": "x/1.png", "image2": "../2.png"}, {"id": "2", "text": "a"}],
    )
    two, none = Source(tmp_path / "b.jsonl", tmp_path)
    assert (
        two["image2"] == str(tmp_path / "../2.png")
        and two["image"] == str(tmp_path / "x/1.png")
        and "image" not in none
    )
    assert [record["id"] for record in source] == [0, 1, 2] and len(source) == 3
    assert source[1]["image"] == str(tmp_path / "x/1.png")
    assert len(Source(tmp_path / "a.jsonl", tmp_path, limit=9)) == 5


def test_a_source_without_records_says_so(tmp_path):
    write_records(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        Source(tmp_path / "empty.jsonl", tmp_path)
