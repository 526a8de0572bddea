"""Statistics of a source: against lists sorted by hand, on a real sample, and as text."""

import json
import random
import statistics
from collections import Counter

import pytest

from beit3.data.prepare.formats.detect import read_pairs
from beit3.data.prepare.splits import write_splits
from beit3.data.prepare.statistics import (
    BAR_WIDTH,
    NUM_BINS,
    RecordStatistics,
    TokenCounter,
    compute_histogram,
    compute_quantile,
    describe,
)
from beit3.tokenizer.text import TextTokenizer
from tests.data.prepare.test_formats import find_sample


def report_on(records: list[dict], lengths: TokenCounter | None = None) -> dict:
    record_statistics = RecordStatistics(lengths)
    for record in records:
        record_statistics.add(record)
    return record_statistics.report()


def encode_letters(text: str) -> list[int]:
    """A tokenizer of ten pieces: a is 4, b is 5 ...; letters beyond j are unknown."""
    return [ord(letter) - ord("a") + 4 if letter <= "j" else 3 for letter in text]


LETTER_COUNTER = TokenCounter(encode_letters, limit=6, unk=3, num_pieces=10)


def test_lengths_in_words_and_uses_per_image():
    texts = ["one", "one two", "one two three", "one  two\nthree four"]
    records = [
        {"id": str(i), "image": f"{i // 3}.png", "text": text} for i, text in enumerate(texts)
    ]
    report = report_on([*records, {"id": "i", "image": "9.png"}])
    assert report["images"] == {"distinct": 3, "median_uses": 1, "most_uses": 3}
    lengths = report["lengths"]
    assert (lengths["unit"], lengths["median"], lengths["percentile_95"], lengths["longest"]) == (
        "words",
        2,
        4,
        4,
    )
    assert lengths["histogram"] == {"1-1": 1, "2-2": 1, "3-3": 1, "4-4": 1} and "cut" not in lengths
    assert report_on([{"id": "1", "image": "a"}]).keys() == {"images"} and report_on(
        [{"id": "1", "text": "a"}]
    ).keys() == {"lengths"}


def test_lengths_in_tokens_count_special_tokens_and_cut_texts():
    report = report_on([{"text": text} for text in ("abcd", "aaaaa", "az", "a")], LETTER_COUNTER)[
        "lengths"
    ]
    # With `<s>` and `</s>` there are 6, 7, 4 and 3 tokens; the limit of 6 cuts one text of four.
    # One of 12 pieces is unknown; a, b, c and d of the ten pieces occur.
    assert report["unit"] == "tokens" and (
        report["median"],
        report["longest"],
        report["limit"],
    ) == (4, 7, 6)
    assert report["cut"] == 0.25 and report["unknown"] == pytest.approx(1 / 12)
    assert report["pieces"] == 10 and report["pieces_seen"] == 0.4
    assert (
        report_on(
            [{"text": "a" * 99}], TokenCounter(encode_letters, limit=0, unk=3, num_pieces=10)
        )["lengths"]["cut"]
        == 0
    )


def test_captions_count_as_texts_and_both_images_of_a_record_as_used():
    report = report_on(
        [
            {"id": "1", "image": "a", "image2": "a", "captions": ["one", "one two"]},
            {"id": "2", "image": "a", "image2": "b"},
        ]
    )
    assert report["images"] == {"distinct": 2, "median_uses": 1, "most_uses": 2}
    assert report["lengths"]["histogram"] == {"1-1": 1, "2-2": 1}


def test_records_are_counted_by_label():
    few = report_on([{"id": str(i), "label": int(i < 3)} for i in range(10)] + [{"id": "t"}])
    assert few == {
        "labels": {"distinct": 2, "smallest": 3, "largest": 7, "counts": {"0": 7, "1": 3}}
    }
    assert "labels       2 distinct; 7 of 0, 3 of 1\n" in describe(few)
    many = report_on([{"id": str(i), "label": i % 1000} for i in range(1500)])
    assert many == {"labels": {"distinct": 1000, "smallest": 1, "largest": 2}}
    assert "labels       1,000 distinct; smallest of 1 records, largest of 2\n" in describe(many)


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_and_bins_agree_with_sorted_lists(seed):
    rng = random.Random(seed)
    values = [int(rng.lognormvariate(3, 1.5)) for _ in range(rng.randrange(1, 500))]
    counts = Counter(values)
    assert compute_quantile(counts, 0.5) == statistics.median_low(values)
    for fraction in (0.95, 0.99):
        assert compute_quantile(counts, fraction) == min(
            value
            for value in values
            if sum(other <= value for other in values) >= fraction * len(values)
        )
    bins = compute_histogram(counts)
    edges = [tuple(map(int, name.split("-"))) for name in bins]
    assert len(bins) <= NUM_BINS and edges[0][0] == min(values) and edges[-1][1] == max(values)
    assert all(before[1] + 1 == after[0] for before, after in zip(edges, edges[1:], strict=False))
    assert list(bins.values()) == [
        sum(first <= value <= last for value in values) for first, last in edges
    ]


def test_describe_shows_counts_faults_and_a_histogram(tmp_path):
    records = [
        ("train", {"id": str(i), "text": "abc" if i % 3 else "abcdefghz"}) for i in range(1200)
    ]
    faults = [("val", {"id": f"f{i}", "fault": "it has no text"}) for i in range(3)]
    report = write_splits(
        tmp_path,
        "t",
        "main",
        [*records, ("val", {"id": "v", "text": "j"}), *faults],
        lengths=LETTER_COUNTER,
    )
    text = describe(report | {"answers": 13})
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
        assert line in text, text
    bars = {line.split()[0]: line.count("#") for line in text.splitlines() if "#" in line}
    assert bars == {"3-3": 1, "5-5": BAR_WIDTH, "11-11": BAR_WIDTH // 2}
    assert (
        describe({"records": {"train": 1}, "passed_over": [f"line {i}" for i in range(30)]}).count(
            "line "
        )
        == 20
    )
    json.dumps(report)


def test_without_a_tokenizer_words_are_counted_and_a_hint_is_given(tmp_path):
    report = write_splits(tmp_path, "t", "main", [("train", {"id": "1", "text": "a b"})])
    hint = (
        f"for tokens: beit3 tokenizer train {tmp_path}/t/main/train.jsonl --model "
        f"{tmp_path}/text.model, then prepare again"
    )
    assert report["lengths"]["hint"] == hint and hint in describe(report)


def test_lengths_of_real_captions_with_a_real_tokenizer(tmp_path):
    pairs = list(read_pairs(find_sample("flickr8k_mini")))
    texts = [record["text"] for _, record in pairs]
    tokenizer = TextTokenizer.train(texts[:2000], vocab_size=400, model_type="bpe")
    lengths = TokenCounter(
        tokenizer.encode_pieces,
        limit=32,
        unk=tokenizer.unk,
        num_pieces=tokenizer.mask - tokenizer.first_piece,
    )
    lengths_report = write_splits(tmp_path, "pretrain", "pairs", pairs, lengths=lengths)["lengths"]
    token_ids = [tokenizer.encode(text) for text in texts]
    assert lengths_report["longest"] == max(map(len, token_ids)) and lengths_report[
        "median"
    ] == statistics.median_low(map(len, token_ids))
    assert lengths_report["cut"] == sum(
        len(ids) > len(tokenizer.encode(text, 32))
        for ids, text in zip(token_ids, texts, strict=True)
    ) / len(texts)
    ids = [id for ids in token_ids for id in ids[1:-1]]
    assert lengths_report["unknown"] == ids.count(tokenizer.unk) / len(ids)
    piece_ids = {
        id for id in range(tokenizer.vocab_size) if tokenizer.first_piece <= id < tokenizer.mask
    }
    assert (
        lengths_report["pieces"] == len(piece_ids)
        and lengths_report["pieces_seen"] == len(piece_ids & set(ids)) / len(piece_ids) > 0.9
    )
