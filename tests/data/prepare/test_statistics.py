"""What `prepare` says of a source: against lists sorted by hand, on a real sample, and as people
read it."""

import json
import random
import statistics
from collections import Counter

import pytest

from beit3.data.prepare import formats
from beit3.data.prepare.splits import write_splits
from beit3.data.prepare.statistics import BAR, BINS, Lengths, Survey, describe, histogram, quantile
from beit3.tokenizer.text import TextTokenizer
from tests.data.prepare.test_formats import sample


def surveyed(records: list[dict], lengths: Lengths | None = None) -> dict:
    survey = Survey(lengths)
    for record in records:
        survey.add(record)
    return survey.report()


def letters(text: str) -> list[int]:
    """A tokenizer of ten pieces: a is 4, b is 5 ...; what is beyond j is unknown."""
    return [ord(letter) - ord("a") + 4 if letter <= "j" else 3 for letter in text]


LETTERS = Lengths(letters, limit=6, unk=3, num_pieces=10)


def test_lengths_in_words_and_uses_of_images():
    texts = ["one", "one two", "one two three", "one  two\nthree four"]
    records = [
        {"id": str(i), "image": f"{i // 3}.png", "text": text} for i, text in enumerate(texts)
    ]
    report = surveyed([*records, {"id": "i", "image": "9.png"}])
    assert report["images"] == {"distinct": 3, "median_uses": 1, "most_uses": 3}
    lengths = report["lengths"]
    assert (lengths["unit"], lengths["median"], lengths["percentile_95"], lengths["longest"]) == (
        "words",
        2,
        4,
        4,
    )
    assert lengths["histogram"] == {"1-1": 1, "2-2": 1, "3-3": 1, "4-4": 1} and "cut" not in lengths
    assert surveyed([{"id": "1", "image": "a"}]).keys() == {"images"} and surveyed(
        [{"id": "1", "text": "a"}]
    ).keys() == {"lengths"}


def test_lengths_in_tokens_count_marks_and_cuts_as_the_task_does():
    report = surveyed([{"text": text} for text in ("abcd", "aaaaa", "az", "a")], LETTERS)["lengths"]
    # With begin and end: 6, 7, 4, 3; the limit of 6 cuts one of four. Of 12 pieces one is unknown;
    # a, b, c, d of ten occur.
    assert report["unit"] == "tokens" and (
        report["median"],
        report["longest"],
        report["limit"],
    ) == (4, 7, 6)
    assert report["cut"] == 0.25 and report["unknown"] == pytest.approx(1 / 12)
    assert report["pieces"] == 10 and report["pieces_seen"] == 0.4
    assert (
        surveyed([{"text": "a" * 99}], Lengths(letters, limit=0, unk=3, num_pieces=10))["lengths"][
            "cut"
        ]
        == 0
    )


def test_captions_of_an_image_are_texts_and_two_images_are_both_used():
    report = surveyed(
        [
            {"id": "1", "image": "a", "image2": "a", "captions": ["one", "one two"]},
            {"id": "2", "image": "a", "image2": "b"},
        ]
    )
    assert report["images"] == {"distinct": 2, "median_uses": 1, "most_uses": 2}
    assert report["lengths"]["histogram"] == {"1-1": 1, "2-2": 1}


def test_balance_of_labels():
    few = surveyed([{"id": str(i), "label": int(i < 3)} for i in range(10)] + [{"id": "t"}])
    assert few == {
        "labels": {"distinct": 2, "smallest": 3, "largest": 7, "counts": {"0": 7, "1": 3}}
    }
    assert "labels       2 distinct; 7 of 0, 3 of 1\n" in describe(few)
    many = surveyed([{"id": str(i), "label": i % 1000} for i in range(1500)])
    assert many == {"labels": {"distinct": 1000, "smallest": 1, "largest": 2}}
    assert "labels       1,000 distinct; smallest of 1 records, largest of 2\n" in describe(many)


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_and_bins_agree_with_sorted_lists(seed):
    draw = random.Random(seed)
    values = [int(draw.lognormvariate(3, 1.5)) for _ in range(draw.randrange(1, 500))]
    counts = Counter(values)
    assert quantile(counts, 0.5) == statistics.median_low(values)
    for share in (0.95, 0.99):
        assert quantile(counts, share) == min(
            v for v in values if sum(w <= v for w in values) >= share * len(values)
        )
    bins = histogram(counts)
    edges = [tuple(map(int, name.split("-"))) for name in bins]
    assert len(bins) <= BINS and edges[0][0] == min(values) and edges[-1][1] == max(values)
    assert all(before[1] + 1 == after[0] for before, after in zip(edges, edges[1:], strict=False))
    assert list(bins.values()) == [
        sum(first <= value <= last for value in values) for first, last in edges
    ]


def test_the_report_as_people_read_it(tmp_path):
    records = [
        ("train", {"id": str(i), "text": "abc" if i % 3 else "abcdefghz"}) for i in range(1200)
    ]
    faults = [("val", {"id": f"f{i}", "fault": "it has no text"}) for i in range(3)]
    report = write_splits(
        tmp_path,
        "t",
        "main",
        [*records, ("val", {"id": "v", "text": "j"}), *faults],
        lengths=LETTERS,
    )
    said = describe(report | {"answers": 13})
    for line in (
        "train        1,200",
        "val          1",
        "answers      13",
        "passed over  3",
        "  f0: it has no text",
        "texts        median 5 tokens, 95 % up to 11, longest 11",
        "33.3% are longer than 6 tokens and will be cut",
        "vocabulary   90.0% of 10 pieces occur, 6.67% unknown",
        "texts by length in tokens",
    ):
        assert line in said, said
    bars = {line.split()[0]: line.count("#") for line in said.splitlines() if "#" in line}
    assert bars == {"3-3": 1, "5-5": BAR, "11-11": BAR // 2}
    assert (
        describe({"records": {"train": 1}, "passed_over": [f"line {i}" for i in range(30)]}).count(
            "line "
        )
        == 20
    )
    json.dumps(report)


def test_without_a_tokenizer_words_are_counted_and_the_way_to_tokens_is_shown(tmp_path):
    report = write_splits(tmp_path, "t", "main", [("train", {"id": "1", "text": "a b"})])
    hint = (
        f"for tokens: beit3 tokenizer train {tmp_path}/t/main/train.jsonl --model "
        f"{tmp_path}/text.model, then prepare again"
    )
    assert report["lengths"]["hint"] == hint and hint in describe(report)


def test_a_real_tokenizer_on_real_captions(tmp_path):
    pairs = list(formats.pairs(sample("flickr8k_mini")))
    texts = [record["text"] for _, record in pairs]
    tokenizer = TextTokenizer.train(texts[:2000], vocab_size=400, model_type="bpe")
    lengths = Lengths(
        tokenizer.encode_pieces,
        limit=32,
        unk=tokenizer.unk,
        num_pieces=tokenizer.mask - tokenizer.first_piece,
    )
    found = write_splits(tmp_path, "pretrain", "pairs", pairs, lengths=lengths)["lengths"]
    whole = [tokenizer.encode(text) for text in texts]
    assert found["longest"] == max(map(len, whole)) and found["median"] == statistics.median_low(
        map(len, whole)
    )
    assert found["cut"] == sum(
        len(ids) > len(tokenizer.encode(text, 32)) for ids, text in zip(whole, texts, strict=True)
    ) / len(texts)
    ids = [id for ids in whole for id in ids[1:-1]]
    assert found["unknown"] == ids.count(tokenizer.unk) / len(ids)
    real = {
        id for id in range(tokenizer.vocab_size) if tokenizer.first_piece <= id < tokenizer.mask
    }
    assert (
        found["pieces"] == len(real)
        and found["pieces_seen"] == len(real & set(ids)) / len(real) > 0.9
    )
